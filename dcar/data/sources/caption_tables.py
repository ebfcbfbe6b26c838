"""Tables that say which picture has which words: CSV, TSV, JSON lines or parquet, row by row."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from typing import Any

from dcar.data.storage import name_of, open_read
from dcar.errors import DataError, MissingExtraError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
csv.field_size_limit(2**24)  # characters of one caption; the default of 131,072 is an error

Row = tuple[str, str | None]


def read_table(url: str, *, image_column: str, caption_column: str) -> Iterator[Row]:
    """(image, caption) of each row, in order, in memory of a few rows.

    Words that are not UTF-8 come with surrogates. Raises ValueError for a column that is not there
    or a suffix that is not one of SUFFIXES, DataError naming the file where it is damaged.
    """
    suffix = f".{name_of(url).rpartition('.')[2].lower()}"
    if suffix not in SUFFIXES:
        raise ValueError(f"captions={url} is none of {', '.join(SUFFIXES)}")
    columns = {"image_column": image_column, "caption_column": caption_column}
    read = {".parquet": _parquet_rows, ".jsonl": _json_rows}.get(suffix, _csv_rows)
    for number, row in enumerate(read(url, columns), 1):
        image, caption = row[image_column], row[caption_column]
        if not isinstance(image, str) or not image:
            raise DataError(f"{url}: row {number} has no {image_column}")
        yield image, caption if isinstance(caption, str) else None


def _check_columns(url: str, columns: dict[str, str], found: Sequence[str]) -> None:
    for setting, column in columns.items():
        if column not in found:
            raise ValueError(f"{setting}={column}: {url} has the columns {', '.join(found)}")


def _text(url: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(
        open_read(url), encoding="utf-8-sig", errors="surrogateescape", newline=""
    )


def _csv_rows(url: str, columns: dict[str, str]) -> Iterator[dict[str, Any]]:
    delimiter = "\t" if url.lower().endswith(".tsv") else ","
    with _text(url) as file:
        try:
            rows = csv.DictReader(file, delimiter=delimiter, strict=True)
            _check_columns(url, columns, list(rows.fieldnames or []))
            yield from rows
        except csv.Error as error:
            raise DataError(f"{url}: {error}") from error


def _json_rows(url: str, columns: dict[str, str]) -> Iterator[dict[str, Any]]:
    with _text(url) as file:
        is_checked = False
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = dict(json.loads(line))
            except (ValueError, TypeError, RecursionError) as error:
                raise DataError(f"{url}: line {number} is no JSON object: {error}") from error
            if not is_checked:
                _check_columns(url, columns, list(row))
                is_checked = True
            yield {column: row.get(column) for column in columns.values()}


def _parquet_rows(url: str, columns: dict[str, str]) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise MissingExtraError(
            "reading parquet needs pyarrow: pip install 'dcar-lightning[data]'"
        ) from error
    try:
        with open_read(url) as file, ParquetFile(file) as table:
            _check_columns(url, columns, table.schema_arrow.names)
            for batch in table.iter_batches(batch_size=1024, columns=list(columns.values())):
                yield from batch.to_pylist()
    except pyarrow.ArrowInvalid as error:  # a ValueError
        raise DataError(f"{url}: {error}") from error
