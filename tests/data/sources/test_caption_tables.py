"""Tables of captions in every form, read a row at a time."""

import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from dcar.data.sources.caption_tables import read_table
from dcar.errors import DataError

ROWS = [("a/1.jpg", 'words, "quoted"\nand a line'), ("2.png", "é"), ("3.png", None)]


def written(path: Path, columns: tuple[str, str] = ("file_name", "text")) -> Path:
    image, caption = columns
    if path.suffix == ".parquet":
        table = {image: [r[0] for r in ROWS], caption: [r[1] for r in ROWS], "other": [0, 0, 0]}
        parquet.write_table(pyarrow.table(table), path)
    elif path.suffix == ".jsonl":
        lines = [json.dumps({image: r[0], caption: r[1]}) for r in ROWS]
        path.write_text("\n".join(lines) + "\n\n")
    else:
        comma = "\t" if path.suffix == ".tsv" else ","
        quoted = '"words, ""quoted""\nand a line"'
        text = f"{caption}{comma}{image}\n{quoted}{comma}a/1.jpg\né{comma}2.png\n{comma}3.png\n"
        path.write_text(text, encoding="utf-8-sig")
    return path


def read(path: Path, image: str = "file_name", caption: str = "text") -> list:
    return list(read_table(str(path), image_column=image, caption_column=caption))


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_each_form_gives_the_same_rows(suffix: str, tmp_path: Path) -> None:
    found = read(written(tmp_path / f"t.{suffix}"))
    assert [(image, caption or None) for image, caption in found] == ROWS


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_column_that_is_not_there_is_named_with_those_that_are(suffix, tmp_path: Path) -> None:
    path = written(tmp_path / f"t.{suffix}")
    with pytest.raises(ValueError, match="caption_column=words: .*has the columns .*text"):
        read(path, caption="words")
    with pytest.raises(ValueError, match="image_column=path"):
        read(path, image="path")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("t.parquet", b"PAR1 and no more"),
        ("t.jsonl", b'{"file_name": "1.jpg", "text": "a"}\n[1]\n'),
        ("t.jsonl", b'{"file_name": "1.jpg", "text": "a"}\n{"file_'),
        ("t.jsonl", b'{"file_name": "1.jpg", "text": "a"}\n' + b"[" * 100_000),
        ("t.csv", b'file_name,text\n1.jpg,"never closed'),
        ("t.csv", b"file_name,text\n,words without a picture\n"),
        ("t.jsonl", b'{"file_name": 7, "text": "a"}\n'),
    ],
)
def test_a_damaged_table_is_named(name: str, data: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=name):
        read(tmp_path / name)


def test_columns_are_looked_for_in_the_first_row_that_is_not_empty(tmp_path: Path) -> None:
    path = tmp_path / "table.jsonl"
    path.write_text('\n{"file": "1.jpg", "text": "a"}\n')
    with pytest.raises(ValueError, match="file_name"):
        list(read_table(str(path), image_column="file_name", caption_column="text"))


def test_a_table_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="t.xlsx is none of .csv"):
        read(tmp_path / "t.xlsx")


def test_words_that_are_not_utf_8_are_passed_on_for_the_build_to_count(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"file_name,text\n1.jpg,\xff\xfe\n")
    ((_, caption),) = read(tmp_path / "t.csv")
    assert caption.encode("utf-8", "surrogateescape") == b"\xff\xfe"


def test_a_caption_of_a_million_letters_is_read(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(f"file_name,text\n1.jpg,{'a' * 10**6}\n")
    ((_, caption),) = read(tmp_path / "t.csv")
    assert len(caption) == 10**6
