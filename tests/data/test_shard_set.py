"""Shard sets: any sample of any shard, what manifests say, files that belong to one process."""

import gc
import json
import logging
import multiprocessing
import os
import pickle
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from dcar.data import shard_set
from dcar.data.cache import ShardCache
from dcar.data.index import ShardIndex
from dcar.data.members import BadSample
from dcar.data.shard_set import ShardSet, caption_names
from dcar.data.shards import ShardEntry, write_manifest, write_shards
from dcar.errors import DataError
from tests.layouts import tar_bytes
from tests.servers import ALWAYS, Fault, FaultyServer
from tests.shards import UNEVEN, build, row


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("uneven"))


def test_counts_come_from_the_manifest_or_from_the_shards(shards, tmp_path):
    for path in shards.glob("*.tar"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for folder in (shards, tmp_path):
        assert ShardSet(folder / "s*.tar").counts == list(UNEVEN)


def test_a_shard_is_counted_once_until_it_changes(shards, tmp_path):
    path = tmp_path / "s0-000000.tar"
    path.write_bytes((shards / "s0-000000.tar").read_bytes())
    assert ShardSet(path).counts == [13]
    before = shard_set._counted.cache_info().hits
    assert ShardSet(path).counts == [13]
    assert shard_set._counted.cache_info().hits == before + 1
    path.write_bytes((shards / "s1-000000.tar").read_bytes())
    assert ShardSet(path).counts == [7]


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


def test_a_shard_that_breaks_off_is_told_and_read_up_to_there(tmp_path, caplog):
    path = build(tmp_path) / "s2-000000.tar"
    path.write_bytes(path.read_bytes()[: 9 * 512])
    data = ShardSet(tmp_path / "s*.tar")
    assert [data.read(2, position)["__key__"] for position in range(2)] == ["k0020", "k0021"]
    for position in range(2, 10):
        with pytest.raises(BadSample, match="lost with its shard"):
            data.read(2, position)
    assert "the rest of a shard is lost" in caplog.text and path.name in caplog.text


def remote(server: FaultyServer, cache: Path) -> ShardSet:
    urls = [server.url(f"s{shard}-000000.tar") for shard in range(4)]
    return ShardSet(urls, cache=ShardCache(cache, attempts=2, backoff=0.01, timeout=5.0))


def wait_until(true: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def read_in_child(data: ShardSet, places: list[tuple[int, int]], queue) -> None:
    queue.put([data.read(*place)["__key__"] for place in places])


@pytest.mark.slow
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


def offsets(path: Path) -> list[int]:
    """How far this process has read in the files that it holds open at a path."""
    here = [int(fd) for fd in os.listdir("/proc/self/fd")]
    held = [fd for fd in here if os.path.realpath(f"/proc/self/fd/{fd}") == str(path.resolve())]
    return [os.lseek(fd, 0, os.SEEK_CUR) for fd in held]


def test_a_forked_process_moves_no_file_of_its_parent(shards):
    data = ShardSet(shards / "s*.tar")
    data.read(0, 0)
    before = offsets(shards / "s0-000000.tar")
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=read_in_child, args=(data, [(0, 12)], queue))
    child.start()
    assert queue.get(timeout=60) == ["k0012"]
    child.join()
    assert before and offsets(shards / "s0-000000.tar") == before


def test_no_more_shards_stay_open_than_a_reader_asks_for(tmp_path):
    folder = build(tmp_path, sizes=(1,) * 40)
    data = ShardSet(folder / "s*.tar")
    data.keep_open(10)
    before = len(os.listdir("/proc/self/fd"))
    keys = [data.read(shard, 0)["__key__"] for shard in range(40)]
    assert len(set(keys)) == 40
    assert len(os.listdir("/proc/self/fd")) - before == 10


@pytest.fixture
def no_more_files() -> Iterator[None]:
    """The process has as many files open as it may."""
    gc.collect()  # closes those of sets that are gone
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    held: list[int] = []
    try:
        while True:
            held.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        yield
    finally:
        for file in held:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_set_holds_no_more_files_than_a_quarter_of_what_the_system_allows(shards):
    data = ShardSet(shards / "s*.tar")
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    for asked in (2 * allowed, 2):
        data.keep_open(asked)
        assert data.shards.room == min(asked, allowed // 4)


def test_a_shard_is_not_lost_because_too_many_files_are_open(shards, request):
    data = ShardSet(shards / "s*.tar")
    request.getfixturevalue("no_more_files")
    with pytest.raises(DataError, match=r"s0-000000.tar cannot be opened.*Too many open files"):
        data.read(0, 0)


def test_a_file_that_can_no_longer_be_read_is_named(shards):
    data = ShardSet(shards / "s*.tar")
    data.read(1, 0)
    index = data.shards.get(data.urls[1], data.entries[1])
    assert index is not None
    os.close(index._file.fileno())  # the system gives an error, as for a file server that is away
    with pytest.raises(DataError, match=r"s1-000000.tar cannot be read: .*Bad file descriptor"):
        data.read(1, 1)
    with pytest.raises(OSError, match="Bad file"):
        index.close()


def test_caption_shards_that_can_no_longer_be_read_are_named(shards, tmp_path):
    """As pictures are: an error of the data, upon which a training saves a checkpoint."""
    shutil.copytree(shards, tmp_path / "long")
    data = ShardSet(shards / "s*.tar", captions=tmp_path / "long")
    key = data.read(1, 0)["__key__"]
    data.captions(1, key)
    url = str(tmp_path / "long" / "s1-000000.tar")
    index = data.shards.get(url, None)
    assert index is not None
    os.close(index._file.fileno())
    with pytest.raises(DataError, match=r"long/s1-000000.tar cannot be read: .*Bad file"):
        data.captions(1, key)
    with pytest.raises(OSError, match="Bad file"):
        index.close()


def test_the_shards_that_were_read_last_stay_open(shards):
    data = ShardSet(shards / "s*.tar")
    data.keep_open(2)
    for shard in (0, 1, 0, 2):
        data.read(shard, 0)
    assert [len(offsets(Path(url))) for url in data.urls] == [1, 0, 1, 0]


def test_shards_of_captions_stay_open_beside_those_of_pictures(shards, tmp_path):
    told = build(tmp_path)
    data = ShardSet(shards / "s*.tar", captions=told)
    data.keep_open(2)
    for shard in (0, 1):
        data.read(shard, 0)
        data.captions(shard, "k0000")
    names = [Path(url).name for url in data.urls[:2]]
    assert [len(offsets(folder / name)) for folder in (shards, told) for name in names] == [1] * 4


def test_what_is_read_soon_is_asked_of_the_system_or_downloaded(shards, tmp_path, monkeypatch):
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *request: asked.append(request[1:3]))
    ShardSet(shards / "s*.tar").prepare(2, 3, 5)
    assert asked == [ShardIndex(shards / "s2-000000.tar").span(3, 5)]
    with FaultyServer(shards) as server:
        data = remote(server, tmp_path)
        data.prepare(2, 3, 5)
        wait_until(lambda: any(tmp_path.glob("*.shard")))
        assert data.read(2, 4)["__key__"] == "k0024" and server.gets["s2-000000.tar"] == 1


def test_a_lost_shard_is_not_downloaded_ahead(shards, tmp_path):
    with FaultyServer(shards) as server:
        server.faults["s1-000000.tar"] = Fault(unavailable=ALWAYS)
        data = remote(server, tmp_path)
        with pytest.raises(BadSample):
            data.read(1, 0)
        data.prepare(1, 0, 5)
        data.prepare(0, 0, 5)
        wait_until(lambda: any(tmp_path.glob("*.shard")))  # of the next one in the line
        assert server.gets["s1-000000.tar"] == 2


def test_a_remote_shard_that_is_not_the_manifest_s_is_lost(shards, tmp_path, caplog):
    served = shutil.copytree(shards, tmp_path / "served")
    shutil.copy(served / "s0-000000.tar", served / "s1-000000.tar")
    with FaultyServer(served) as server:
        data = remote(server, tmp_path / "cache")
        with pytest.raises(BadSample, match="lost with its shard"):
            data.read(1, 0)
    assert "the manifest" in caplog.text


class Evicting(ShardCache):
    """Another process takes the room of each shard right after its first download."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.evicted: set[str] = set()

    def fetch(self, url: str, entry: ShardEntry | None = None) -> Path:
        path = super().fetch(url, entry)
        if url not in self.evicted:
            self.evicted.add(url)
            path.unlink()
        return path


def test_a_shard_that_leaves_the_cache_before_it_is_open_is_fetched_again(shards, tmp_path):
    with FaultyServer(shards) as server:
        data = ShardSet(server.url("s1-000000.tar"), cache=Evicting(tmp_path))
        assert data.read(0, 0)["__key__"] == "k0013" and server.gets["s1-000000.tar"] == 2


def test_a_command_gives_a_shard_only_where_it_is_allowed(shards, tmp_path):
    url = f"pipe:cat {shards}/s1-000000.tar"
    with pytest.raises(ValueError, match="pipe"):
        ShardSet(url)
    data = ShardSet(url, cache=ShardCache(tmp_path, schemes=("pipe",)))
    assert data.counts == [7] and data.read(0, 6)["__key__"] == "k0019"
    assert data.sizes()[0].tolist() == [[12, 8]] * 7


def test_each_folder_of_a_set_has_a_manifest_of_its_own(tmp_path):
    for name, count in (("a", 2), ("b", 3)):
        entries = write_shards([row(f"k{n:04d}") for n in range(count)], tmp_path / name, "s", 9)
        told = {entries[0].name: np.full((count, 2), 10 * count, np.uint16)}
        write_manifest(tmp_path / name, {"train": entries}, sizes=told, made=name)
    data = ShardSet([tmp_path / "a/s*.tar", tmp_path / "b/s*.tar"])
    assert data.counts == [2, 3]
    assert [sizes.tolist() for sizes in data.sizes()] == [[[20, 20]] * 2, [[30, 30]] * 3]
    assert [facts["made"] for facts in data.facts()] == ["a", "b"]


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
    write_manifest(tmp_path, {"train": entries}, sizes={entries[0].name: told[entries[0].name][1:]})
    assert ShardSet(tmp_path / "s*.tar").sizes()[0].tolist() == [[12, 8], [20, 30]]  # not of these


def test_sizes_are_those_of_wide_pictures_too_and_one_where_there_is_no_picture(tmp_path):
    write_shards([row("k0000", 300, 8), {"__key__": "k0001", "png": b"no"}], tmp_path, "s", 2)
    (tmp_path / "s-000001.tar").write_bytes(b"no tar")
    sizes = ShardSet(tmp_path / "s*.tar").sizes()
    assert sizes[0].tolist() == [[300, 8], [1, 1]] and sizes[1].shape == (0, 2)


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
    alone = ShardSet(shards / "s0*.tar", captions=str(tmp_path / "two"))
    assert alone.captions(0, "k0003") == {"two": "two words"}


def test_names_of_captions_are_those_of_the_first_samples_not_of_one_alone(shards, tmp_path):
    captions = [{"long": "words"}] * 2 + [{"long": "words", "short": "word"}]
    rows = [
        {"__key__": f"k{number:04d}", "json": json.dumps({"captions": each}).encode()}
        for number, each in enumerate(captions)
    ]
    write_shards(rows, tmp_path, "s0", 3)
    data = ShardSet(shards / "s0*.tar", captions=tmp_path)
    assert data.caption_names() == {"own", "long", "short"}


def test_a_caption_shard_with_a_bad_sample_still_has_names(shards, tmp_path):
    good = json.dumps({"captions": {"long": "words"}}).encode()
    members = [(f"{key}.json", good) for key in ("k0000", "k0000", "k0001")]
    (tmp_path / "s0-000000.tar").write_bytes(tar_bytes(members))
    assert ShardSet(shards / "s0*.tar", captions=tmp_path).caption_names() == {"own", "long"}


HALF = b'{"captions": {"a": "\\ud83d cat"}}'  # a character


@pytest.mark.parametrize("data", [b"", b"[]", b'{"captions": 3}', b'{"captions": {"a": 3}}', HALF])
def test_a_member_without_captions_gives_none(data):
    assert caption_names(data) == {}


def test_caption_shards_that_are_not_there_are_named(shards, tmp_path):
    write_shards([{"__key__": "k0003", "json": b"{}"}], tmp_path, "s0", 1)
    with pytest.raises(FileNotFoundError, match=r"no s1-000000.tar \(3 of 4 shards are missing\)"):
        ShardSet(shards / "s*.tar", captions=tmp_path)


def test_captions_of_two_shards_of_one_name_cannot_be_told_apart(tmp_path):
    for folder in ("a", "b", "captions"):
        write_shards([row("k0000")], tmp_path / folder, "s", 1)
    with pytest.raises(ValueError, match=r"captions: .*a/s-000000.tar and .*b/s-000000.tar have"):
        ShardSet(tmp_path / "{a,b}/s-*.tar", captions=tmp_path / "captions")


def test_a_page_in_place_of_a_shard_does_not_stay_in_the_cache(shards, tmp_path):
    copy = tmp_path / "served"
    copy.mkdir()
    (copy / "s0-000000.tar").write_text("<html>please log in</html>")
    with FaultyServer(copy) as server:
        data = ShardSet(server.url("s0-000000.tar"), cache=ShardCache(tmp_path / "cache"))
        assert data.counts == [0]
        (copy / "s0-000000.tar").write_bytes((shards / "s0-000000.tar").read_bytes())
        with pytest.raises(BadSample):
            data.read(0, 0)
        data.forget_losses()
        assert data.read(0, 0)["__key__"] == "k0000"


def test_pictures_too_wide_for_the_table_count_as_as_wide_as_it_holds(tmp_path):
    rows = [{"__key__": "k", "png": row("k0000", 70_000, 1)["png"]}]
    write_shards(rows, tmp_path, "s", 1)
    assert ShardSet(tmp_path / "s*.tar").sizes()[0].tolist() == [[65_535, 1]]
