"""ImageNet as the Hugging Face hub keeps it: parquet files of rows {image {bytes, path}, label}.

The hub's files are shuffled already, so a unit is a run of rows of one file.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dcar.data.members import MAX_MEMBER_BYTES
from dcar.data.sources.archives import naming
from dcar.data.sources.ranges import ranges
from dcar.data.sources.source import Record, Unit
from dcar.data.storage import name_of, open_read
from dcar.errors import DataError, MissingExtraError

_FILE = re.compile(r"(train|validation|val)-.*\.parquet")
_NAME = re.compile(r"((?:(n\d{8})|ILSVRC2012_val)_\d+)(?:_(n\d{8}))?")
_ROWS = 16  # in memory at a time


def parquet_files(urls: list[str]) -> dict[str, list[str]]:
    """split -> its files, in order. The hub's test pictures have no labels and are left out."""
    files: dict[str, list[str]] = {}
    for url in sorted(urls, key=name_of):
        if named := _FILE.fullmatch(name_of(url)):
            files.setdefault("train" if named[1] == "train" else "val", []).append(url)
    return files


@contextmanager
def _opened(url: str) -> Iterator[Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError(
            "reading parquet needs pyarrow: pip install 'dcar-lightning[data]'"
        ) from error
    with open_read(url) as file, naming(url, pyarrow.ArrowException, OSError):
        yield pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=2**20)


def parquet_units(split: str, urls: list[str], samples_per_shard: int) -> list[Unit]:
    """Runs of rows of at most `samples_per_shard`, none of which crosses from file to file."""
    units: list[Unit] = []
    for url in urls:
        with _opened(url) as parquet:
            if missing := {"image", "label"} - set(parquet.schema_arrow.names):
                raise DataError(f"{url}: has no column {min(missing)!r}")
            rows = parquet.metadata.num_rows
        for first, stop in ranges(rows, samples_per_shard):
            units.append(Unit(split, len(units), stop - first, [url, first, stop]))
    return units


def read_parquet(url: str, first: int, stop: int) -> Iterator[Record]:
    """Rows [first, stop) of a file, from the row groups that hold them."""
    with _opened(url) as parquet:
        starts = [0]
        for group in range(parquet.num_row_groups):
            starts.append(starts[-1] + parquet.metadata.row_group(group).num_rows)
        groups = [
            g for g, start in enumerate(starts[:-1]) if start < stop and starts[g + 1] > first
        ]
        row = starts[groups[0]]
        columns = ["image", "label"]
        for batch in parquet.iter_batches(_ROWS, row_groups=groups, columns=columns):
            for values in batch.to_pylist():
                if first <= row < stop:
                    yield _record(values, f"{name_of(url).partition('.')[0]}/{row:07d}")
                row += 1


def _record(values: dict[str, Any], place: str) -> Record:
    """The hub appends `_<wnid>` to ImageNet's own file names; the key is without it."""
    image = values["image"] or {}
    data = image.get("bytes")
    stem = name_of(image.get("path") or "").partition(".")[0]
    named = _NAME.fullmatch(stem)
    key = named[1] if named else place
    wnid = (named[3] or named[2]) if named else None
    return Record(
        key=key,
        image=data or b"",
        label=values["label"],
        facts={"id": f"{key}.JPEG" if named else place} | ({"wnid": wnid} if wnid else {}),
        dropped=_reason(data),
    )


def _reason(data: bytes | None) -> str | None:
    if not data:
        return "no image"
    return "file too large" if len(data) > MAX_MEMBER_BYTES else None
