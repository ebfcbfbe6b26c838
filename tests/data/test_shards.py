"""Shards: same bytes each time, nothing half written, what others' readers make of them."""

import hashlib
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from datasets import Image, load_dataset

from dcar.data.index import read_shard
from dcar.data.shards import (
    ShardWriter,
    read_facts,
    read_manifest,
    read_sizes,
    read_splits,
    split_of,
    write_manifest,
    write_shards,
)
from dcar.data.storage import expand
from dcar.errors import DataError


def samples(count: int) -> list[dict[str, bytes | str]]:
    return [
        {"__key__": f"a/{i:03d}", "webp": bytes([i]) * 700, "txt": f"caption {i}".encode()}
        for i in range(count)
    ]


def folder_of(tmp_path: Path, count: int = 10, per_shard: int = 4) -> Path:
    entries = write_shards(samples(count), tmp_path / "set", "train", per_shard)
    write_manifest(tmp_path / "set", {"train": entries})
    return tmp_path / "set"


def test_what_was_written_is_read_back_in_order(tmp_path):
    folder = folder_of(tmp_path)
    read = [raw for path in expand(folder / "train-*.tar") for raw in read_shard(path)]
    assert read == samples(10)


def test_the_same_samples_give_the_same_bytes(tmp_path):
    first = write_shards(samples(9), tmp_path / "one", "train", 4)
    assert write_shards(samples(9), tmp_path / "two", "train", 4) == first
    assert [entry.samples for entry in first] == [4, 4, 1]


def test_a_writer_that_fails_leaves_no_shard(tmp_path):
    def failing():
        yield from samples(5)
        raise OSError("the source broke")

    with pytest.raises(OSError, match="the source broke"):
        write_shards(failing(), tmp_path, "train", 100)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_neither_shard_nor_leftovers(tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_shards(samples(3), tmp_path, "train", 3)
    assert list(tmp_path.iterdir()) == []


def test_nor_does_one_that_is_full_when_the_archive_ends(tmp_path, monkeypatch):
    def full(tar: tarfile.TarFile) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(tarfile.TarFile, "close", full)
    writer = ShardWriter(tmp_path / "train-000000.tar")
    with pytest.raises(OSError, match="no space"), writer:
        writer.write(samples(1)[0])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "sample",
    [
        {"__key__": "../up", "txt": b"x"},
        {"__key__": "/root", "txt": b"x"},
        {"__key__": "dotted.name", "txt": b"x"},
        {"__key__": "fine", "pyd": b"x"},
        {"__key__": "fine", "txt": "not bytes"},
    ],
)
def test_a_sample_no_reader_would_take_is_refused_by_the_writer(tmp_path, sample):
    with pytest.raises(ValueError):
        write_shards([sample], tmp_path, "train", 1)


def test_a_broken_manifest_is_an_error(tmp_path):
    folder = folder_of(tmp_path)
    for content in ('{"shards": [{"name": "a"}]}', '{"shards": [3]}', '{"shards": 3}', "[]", "{"):
        (folder / "manifest.json").write_text(content)
        with pytest.raises(DataError, match="manifest"):
            read_manifest(folder)


def test_shards_of_no_sample_are_refused(tmp_path):
    with pytest.raises(ValueError, match="samples_per_shard is 0"):
        write_shards(samples(1), tmp_path, "train", 0)


def test_a_manifest_tells_the_split_of_each_shard(tmp_path):
    splits = {split: write_shards(samples(2), tmp_path, split, 2) for split in ("train", "val")}
    write_manifest(tmp_path, splits)
    listed = json.loads((tmp_path / "manifest.json").read_text())["shards"]
    assert [(each["split"], each["name"]) for each in listed] == [
        ("train", "train-000000.tar"),
        ("val", "val-000000.tar"),
    ]


@pytest.mark.parametrize("shards", ["[3]", '[{"split": "train"}]', '[{"name": 7}]'])
def test_splits_of_a_broken_manifest_are_an_error(tmp_path, shards):
    (tmp_path / "manifest.json").write_text(f'{{"shards": {shards}}}')
    with pytest.raises(DataError, match="manifest"):
        read_splits(tmp_path)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-000012.tar", "train"),
        ("in-1k-val-07.tar", "in-1k-val"),
        ("my-train.tar", "my-train"),
        ("val_3.tar", "val"),
        ("7.tar", "all"),
    ],
)
def test_a_name_tells_the_split_by_all_before_its_number(name, split):
    assert split_of(name) == split


def test_splits_are_the_manifest_s_and_where_it_is_silent_the_names(tmp_path):
    listed = [{"name": "mine-0.tar", "split": "train"}, {"name": "other-1.tar"}]
    (tmp_path / "manifest.json").write_text(json.dumps({"shards": listed}))
    assert read_splits(tmp_path) == {"mine-0.tar": "train", "other-1.tar": "other"}
    assert read_splits(tmp_path / "none") == {}


def test_a_key_written_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'a/000' is written twice"):
        write_shards([*samples(1), *samples(1)], tmp_path, "train", 5)


def test_the_entry_describes_the_file(tmp_path):
    (entry,) = write_shards(samples(3), tmp_path, "train", 5)
    data = (tmp_path / entry.name).read_bytes()
    assert (entry.samples, entry.bytes) == (3, len(data))
    assert entry.sha256 == hashlib.sha256(data).hexdigest()


def test_a_writer_tells_its_size_as_it_grows(tmp_path):
    with ShardWriter(tmp_path / "x.tar") as writer:
        sizes = []
        for sample in samples(3):
            writer.write(sample)
            sizes.append(writer.size)
    assert sizes == sorted(set(sizes)) and writer.samples == 3
    assert writer.entry.bytes >= sizes[-1]


def test_facts_and_sizes_stand_beside_the_shards(tmp_path):
    entries = write_shards(samples(2), tmp_path, "train", 5)
    sizes = {entries[0].name: np.array([[640, 480], [30_000, 1]], np.uint16)}
    write_manifest(tmp_path, {"train": entries}, sizes=sizes, seed=3)
    assert read_facts(tmp_path) == {"seed": 3}
    assert read_sizes(tmp_path)[entries[0].name].tolist() == [[640, 480], [30_000, 1]]
    assert (read_facts(tmp_path / "none"), read_sizes(tmp_path / "none")) == ({}, {})


def test_sizes_are_the_same_bytes_each_time(tmp_path):
    sizes = {"b": np.ones((3, 2), np.uint16), "a": np.zeros((2, 2), np.uint16)}
    for folder, listed in (("one", sizes), ("two", dict(reversed(sizes.items())))):
        write_manifest(tmp_path / folder, {}, sizes=listed)
    one, two = ((tmp_path / folder / "sizes.npz").read_bytes() for folder in ("one", "two"))
    assert one == two


@pytest.mark.parametrize("cut", [0, 5, 60, -30])
def test_damaged_sizes_are_an_error(tmp_path, cut):
    write_manifest(tmp_path, {}, sizes={"a": np.ones((3, 2), np.uint16)})
    path = tmp_path / "sizes.npz"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match="sizes.npz"):
        read_sizes(tmp_path)


def test_hf_datasets_and_webdataset_read_what_is_written(tmp_path):
    write_shards(samples(5), tmp_path, "train", 3)
    paths = sorted(str(path) for path in tmp_path.glob("*.tar"))
    expected = [(sample["__key__"], sample["txt"], sample["webp"]) for sample in samples(5)]
    plain = webdataset.WebDataset(paths, shardshuffle=False)
    assert [(each["__key__"], each["txt"], each["webp"]) for each in plain] == expected
    rows = load_dataset("webdataset", data_files=paths, split="train", streaming=True)
    raw = rows.cast_column("webp", Image(decode=False))
    assert [
        (each["__key__"], each["txt"].encode(), each["webp"]["bytes"]) for each in raw
    ] == expected
