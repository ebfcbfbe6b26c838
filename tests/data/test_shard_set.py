"""Shard sets: any sample of any shard, what manifests say, files that belong to one process."""

import json
import logging
import multiprocessing
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from dcar.data.members import BadSample
from dcar.data.shard_set import OPEN_SHARDS, ShardSet, caption_names
from dcar.data.shards import write_manifest, write_shards
from tests.shards import UNEVEN, build, row


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("uneven"))


def test_counts_come_from_the_manifest_or_from_the_shards(shards, tmp_path):
    for path in shards.glob("*.tar"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for folder in (shards, tmp_path):
        assert ShardSet(folder / "s*.tar").counts == list(UNEVEN)


def test_any_sample_is_read_by_its_place(shards):
    data = ShardSet(shards / "s*.tar")
    assert data.read(2, 4)["__key__"] == "k0024"
    assert data.read(0, 12) == row("k0012")


def test_a_place_that_the_shard_does_not_have_is_lost(shards, tmp_path, caplog):
    folder = build(tmp_path)
    (folder / "s1-000000.tar").write_bytes(b"<html>")
    data = ShardSet(folder / "s*.tar")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            with pytest.raises(BadSample, match="lost with its shard"):
                data.read(1, 0)
    assert caplog.text.count("s1-000000.tar") == 1  # tried and told once
    (folder / "s1-000000.tar").write_bytes((shards / "s1-000000.tar").read_bytes())
    data.forget_losses()
    assert data.read(1, 0)["__key__"] == "k0013"


def read_in_child(data: ShardSet, places: list[tuple[int, int]], queue) -> None:
    queue.put([data.read(*place)["__key__"] for place in places])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_each_process_reads_through_files_of_its_own(shards, method):
    data = ShardSet(shards / "s*.tar")
    places = [(shard, position) for shard, size in enumerate(UNEVEN) for position in range(size)]
    data.read(0, 0)
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=read_in_child, args=(data, places * 20, queue))
    child.start()
    here = [data.read(*place)["__key__"] for place in places * 20]
    assert queue.get(timeout=60) == here
    child.join()


def test_no_more_than_so_many_shards_stay_open(tmp_path):
    folder = build(tmp_path, sizes=(1,) * (OPEN_SHARDS + 20))
    data = ShardSet(folder / "s*.tar")
    before = len(os.listdir("/proc/self/fd"))
    keys = [data.read(shard, 0)["__key__"] for shard in range(len(data.urls))]
    assert len(set(keys)) == OPEN_SHARDS + 20
    assert len(os.listdir("/proc/self/fd")) - before <= OPEN_SHARDS


def test_a_set_travels_without_its_open_files(shards):
    data = ShardSet(shards / "s*.tar")
    data.read(0, 0)
    copy = pickle.loads(pickle.dumps(data))
    assert copy.read(0, 1)["__key__"] == "k0001"


def test_sizes_come_from_beside_the_manifest_or_from_the_pictures(tmp_path):
    entries = write_shards([row("k0000"), row("k0001", 20, 30)], tmp_path, "s", 2)
    write_manifest(tmp_path, {"train": entries})
    assert ShardSet(tmp_path / "s*.tar").sizes()[0].tolist() == [[12, 8], [20, 30]]
    told = {entries[0].name: np.array([[1, 2], [3, 4]], np.uint16)}
    write_manifest(tmp_path, {"train": entries}, sizes=told)
    assert ShardSet(tmp_path / "s*.tar").sizes()[0].tolist() == [[1, 2], [3, 4]]


def test_facts_are_the_manifest_s_and_name_their_folder(tmp_path):
    entries = write_shards([row("k0000")], tmp_path, "s", 2)
    write_manifest(tmp_path, {"train": entries}, kind="tokens", size=16)
    (facts,) = ShardSet(tmp_path / "s*.tar").facts()
    assert facts == {"kind": "tokens", "size": 16, "folder": str(tmp_path)}


def test_captions_of_several_folders_are_joined_by_key(shards, tmp_path):
    for name in ("one", "two"):
        text = {"captions": {name: f"{name} words", "empty": ""}}
        rows = [{"__key__": "k0003", "json": json.dumps(text).encode()}]
        write_shards(rows, tmp_path / name, "s0", 1)
    data = ShardSet(shards / "s0*.tar", captions=[tmp_path / "one", tmp_path / "two"])
    assert data.captions(0, "k0003") == {"one": "one words", "two": "two words"}
    assert data.captions(0, "k0004") == {}


@pytest.mark.parametrize("data", [b"", b"[]", b'{"captions": 3}', b'{"captions": {"a": 3}}'])
def test_a_member_without_captions_gives_none(data):
    assert caption_names(data) == {}
