"""Whole shards to readers: batches, shards and samples that go wrong, workers, ranks."""

import json
import os
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from dcar.data.cache import ShardCache
from dcar.data.members import BadSample, Raw
from dcar.data.shards import read_manifest, write_shards
from dcar.errors import DataError
from dcar.lit.shard_reader import ShardReader, Source, collate, find_sources
from tests.prediction_toys import UNEVEN, row, write_pictures
from tests.servers import FaultyServer

KEYS = [f"toys/{number:03d}" for number in range(sum(UNEVEN))]


def decode(raw: Raw) -> dict[str, Any]:
    key = str(raw["__key__"])
    if b"bad" in raw["txt"]:  # type: ignore[operator]
        raise BadSample("said to be bad")
    return {"key": key, "number": torch.tensor([int(key[-3:])])}


def reader(folder: Path, **settings: Any) -> ShardReader:
    defaults = {"decode": decode, "batch_size": 3, "cache": ShardCache(folder / "cache")}
    return ShardReader(find_sources(folder / "*.tar"), **{**defaults, **settings})


def test_batches_never_cross_shards_and_the_last_of_each_is_marked(tmp_path: Path) -> None:
    batches = list(reader(write_pictures(tmp_path)))
    assert [(batch["shard"][:7], len(batch["key"]), batch["last"]) for batch in batches] == [
        ("train-0", 3, False),
        ("train-0", 2, True),
        ("train-1", 2, True),
        ("train-2", 3, False),
        ("train-2", 3, False),
        ("train-2", 1, True),
        ("train-3", 3, True),
    ]
    assert [key for batch in batches for key in batch["key"]] == KEYS
    assert batches[1]["number"].tolist() == [[3], [4]]


@pytest.mark.parametrize("workers", [0, 2, 5])
def test_each_worker_takes_whole_shards_in_order(tmp_path: Path, workers: int) -> None:
    loader = DataLoader(reader(write_pictures(tmp_path)), batch_size=None, num_workers=workers)
    keys: dict[str, list[str]] = {}
    ended: list[str] = []
    for batch in loader:
        assert batch["shard"] not in ended
        keys.setdefault(batch["shard"], []).extend(batch["key"])
        ended += [batch["shard"]] if batch["last"] else []
    assert [key for name in sorted(keys) for key in keys[name]] == KEYS
    assert sorted(ended) == sorted(keys)


def test_bad_samples_are_left_out_and_counted_with_the_batches(tmp_path: Path) -> None:
    bad = {number: {"txt": b"bad"} for number in (1, 5, 6)}  # 5 and 6 are the whole second shard
    batches = list(reader(write_pictures(tmp_path, changed=bad)))
    counted = sum((Counter(batch["bad"]) for batch in batches), Counter())
    assert counted == {"said to be bad": 3} and sum(batch["tried"] for batch in batches) == 17
    second = [batch for batch in batches if batch["shard"].startswith("train-1")]
    assert [(batch["key"], batch["tried"], batch["last"]) for batch in second] == [([], 2, True)]
    assert [len(batch["key"]) for batch in batches if batch["shard"][:7] == "train-0"] == [3, 1]


def test_what_a_broken_shard_has_lost_is_counted_by_its_manifest(tmp_path: Path) -> None:
    path = next(write_pictures(tmp_path).glob("train-2*"))
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"toys/010.png")])
    batches = [batch for batch in reader(tmp_path) if batch["shard"] == path.name]
    assert [batch["key"] for batch in batches] == [KEYS[7:10]]
    assert batches[0]["bad"] == {"lost with its shard": 4} and batches[0]["tried"] == 7


def test_a_key_that_comes_again_is_bad(tmp_path: Path) -> None:
    write_shards([row(1), row(2)], tmp_path, "a", 2)
    write_shards([row(3), row(4) | {"__key__": "toys/001"}], tmp_path, "b", 2)
    first, second = (path.read_bytes().rstrip(b"\0") for path in sorted(tmp_path.glob("*.tar")))
    padded = (part + b"\0" * (-len(part) % 512) for part in (first, second))
    for path in tmp_path.glob("*.tar"):
        path.unlink()
    (tmp_path / "c.tar").write_bytes(b"".join(padded) + b"\0" * 1024)
    (batch,) = reader(tmp_path)
    assert batch["key"] == ["toys/001", "toys/002", "toys/003"] and batch["bad"] == {"key twice": 1}


def test_a_file_that_is_no_tar_ends_the_run_by_name(tmp_path: Path) -> None:
    (tmp_path / "page.tar").write_text("<html>not found</html>" * 100)
    with pytest.raises(DataError, match=r"page\.tar"):
        list(reader(tmp_path))


def test_an_impossible_batch_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size=0"):
        reader(write_pictures(tmp_path), batch_size=0)


def test_shards_of_one_name_in_two_folders_are_refused_with_both(tmp_path: Path) -> None:
    for name in "ab":
        write_pictures(tmp_path / name, (1,))
    with pytest.raises(ValueError, match=r"a/train-0-000000\.tar and .*b/train-0-000000\.tar"):
        find_sources(tmp_path / "*" / "*.tar")


def test_a_split_is_the_manifest_s_or_the_name_without_its_number(tmp_path: Path) -> None:
    write_pictures(tmp_path, (2,), split="val")
    assert [(s.split, s.entry and s.entry.samples) for s in find_sources(tmp_path / "*.tar")] == [
        ("val", 2)
    ]
    (tmp_path / "manifest.json").unlink()
    assert [(s.split, s.entry) for s in find_sources(tmp_path / "*.tar")] == [("val-0", None)]


def test_a_foreign_manifest_may_leave_splits_to_the_names(tmp_path: Path) -> None:
    write_pictures(tmp_path, (2,))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    del manifest["shards"][0]["split"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    (source,) = find_sources(tmp_path / "*.tar")
    assert source.split == "train-0" and source.entry is not None


def test_a_shard_is_known_by_its_entry_or_by_when_it_was_changed(tmp_path: Path) -> None:
    path = next(write_pictures(tmp_path, (2,)).glob("*.tar"))
    (listed,) = find_sources(path)
    assert listed.identity() == asdict(read_manifest(tmp_path)[path.name])
    (tmp_path / "manifest.json").unlink()
    (bare,) = find_sources(path)
    before = bare.identity()
    assert before["bytes"] == path.stat().st_size and bare.identity() == before
    os.utime(path, ns=(0, 1))
    assert bare.identity() == before | {"mtime_ns": 1}


def test_a_remote_shard_without_an_entry_is_known_by_its_url_and_size() -> None:
    (entry,) = write_shards([row(1)], "memory://shard-reader", "train", 1)
    url = f"memory://shard-reader/{entry.name}"
    assert Source(url, "train", None).identity() == {"url": url, "bytes": entry.bytes}


def test_a_signature_is_no_part_of_what_a_shard_is_known_by(tmp_path: Path) -> None:
    """It differs each time, and is no one else's business."""
    (tmp_path / "a.tar").write_bytes(bytes(700))
    with FaultyServer(tmp_path) as server:
        identity = Source(server.url("a.tar") + "?key=secret", "train", None).identity()
    assert identity == {"url": server.url("a.tar"), "bytes": 700}


def test_a_batch_of_nothing_still_has_keys() -> None:
    assert collate([]) == {"key": []}
