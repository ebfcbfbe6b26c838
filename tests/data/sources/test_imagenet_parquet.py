"""The hub's parquet files: pieces of files, keys, odd rows."""

import io
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dcar.data.sources import imagenet_parquet
from dcar.data.sources.imagenet_parquet import parquet_files, parquet_units, read_parquet
from dcar.errors import DataError
from tests.layouts import imagenet_parquet as imagenet_parquet_layout
from tests.layouts import imagenet_picture


def stored(path: Path, rows: list[dict[str, object]], labels: list[int], group: int = 4) -> str:
    pq.write_table(pa.table({"image": rows, "label": labels}), path, row_group_size=group)
    return str(path)


def test_the_hub_s_files_are_told_from_others(tmp_path: Path) -> None:
    names = ["data/train-00001-of-00002.parquet", "data/train-00000-of-00002.parquet"]
    others = ["data/test-00000-of-00001.parquet", "README.md", "data/train.csv"]
    val = "data/validation-00000-of-00001.parquet"
    assert parquet_files([*names, *others, val]) == {"train": names[::-1], "val": [val]}


@pytest.mark.parametrize("group", [1, 4, 100])
def test_pieces_of_a_file_are_its_rows_whatever_the_row_groups(tmp_path: Path, group: int) -> None:
    imagenet_parquet_layout(tmp_path, rows_per_group=group)
    url = str(tmp_path / "data/train-00000-of-00002.parquet")
    whole = list(read_parquet(url, 0, 13))
    assert len({record.key for record in whole}) == 13
    units = parquet_units("train", [url], samples_per_shard=4)
    assert [unit.samples for unit in units] == [3, 3, 3, 4]
    assert [record for unit in units for record in read_parquet(*unit.reference)] == whole


def test_rows_without_a_name_are_named_by_their_place(tmp_path: Path) -> None:
    data = imagenet_picture("x")
    rows: list[dict[str, object]] = [
        {"bytes": data, "path": None},
        {"bytes": data, "path": "n01440764_10026.JPEG"},
        {"bytes": data, "path": "some.jpg"},
    ]
    url = stored(tmp_path / "train-00000-of-00001.parquet", rows, [0, 1, 2])
    first, second, third = read_parquet(url, 0, 3)
    assert first.key == "train-00000-of-00001/0000000" and "wnid" not in first.facts
    assert second.key == "n01440764_10026" and second.facts["wnid"] == "n01440764"
    assert third.key == "train-00000-of-00001/0000002" and third.label == 2


def test_rows_without_a_picture_or_with_a_huge_one_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imagenet_parquet, "MAX_MEMBER_BYTES", 5)
    rows: list[dict[str, object]] = [
        {"bytes": data, "path": "a.JPEG"} for data in (b"12345", None, b"", b"123456")
    ]
    url = stored(tmp_path / "train-0.parquet", rows, [0] * 4)
    dropped = [record.dropped for record in read_parquet(url, 0, 4)]
    assert dropped == [None, "no image", "no image", "file too large"]


def test_broken_files_are_named(tmp_path: Path) -> None:
    imagenet_parquet_layout(tmp_path)
    path = tmp_path / "data/train-00000-of-00002.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="train-00000-of-00002.parquet: broken or cut short"):
        parquet_units("train", [str(path)], 5)
    path.write_bytes(whole[:2000] + bytes(3000) + whole[5000:])
    with pytest.raises(DataError, match="train-00000-of-00002.parquet: broken or cut short"):
        list(read_parquet(str(path), 0, 13))


def test_a_table_of_something_else_is_named_with_what_it_lacks(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [1]}), tmp_path / "train-0.parquet")
    with pytest.raises(DataError, match="train-0.parquet: has no column 'label'"):
        parquet_units("train", [str(tmp_path / "train-0.parquet")], 5)


def test_rows_are_read_from_a_store_as_from_disk() -> None:
    table = pa.table(
        {"image": [{"bytes": b"1", "path": "n01440764_1_n01440764.JPEG"}], "label": [0]}
    )
    file = io.BytesIO()
    pq.write_table(table, file)
    with fsspec.open("memory://hub/train-0.parquet", "wb") as stored:
        stored.write(file.getvalue())
    (record,) = read_parquet("memory://hub/train-0.parquet", 0, 1)
    assert record.key == "n01440764_1" and record.image == b"1"
