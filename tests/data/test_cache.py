"""The cache: whole shards or none, one download a machine, bounded in tries, time and bytes."""

import hashlib
import multiprocessing
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dcar.data.cache import ShardCache, check_content, file_name
from dcar.data.shards import ShardEntry
from dcar.data.storage import write_atomically
from dcar.errors import DataError
from tests.servers import ALWAYS, Fault, FaultyServer, shared_s3_server

SHARD = os.urandom(300_000)
FORK = multiprocessing.get_context("fork")


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def entry_of(data: bytes, name: str = "a.tar") -> ShardEntry:
    return ShardEntry(name, 1, len(data), digest(data))


def copies(cache: ShardCache) -> list[str]:
    """Names of all files in the cache but its locks, partial ones too."""
    return sorted(path.name for path in cache.folder.glob("*") if path.is_file())


def fetched(cache: ShardCache, url: str, results: multiprocessing.SimpleQueue) -> None:
    """Runs in another process or thread: puts a digest, as a queue holds only so many bytes."""
    try:
        results.put(digest(cache.fetch(url).read_bytes()))
    except Exception as error:
        results.put(repr(error))


def s3_keys(server: FaultyServer) -> dict[str, str]:
    """What makes the faulty server an S3 store."""
    keys = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any"}
    return {**keys, "AWS_ENDPOINT_URL": server.endpoint, "AWS_DEFAULT_REGION": "us-east-1"}


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "this never came true"
        time.sleep(0.01)


@pytest.fixture
def server(tmp_path) -> Iterator[FaultyServer]:
    """Serves a.tar, and the same as s3://bucket/a.tar."""
    (tmp_path / "www" / "bucket").mkdir(parents=True)
    (tmp_path / "www" / "a.tar").write_bytes(SHARD)
    (tmp_path / "www" / "bucket" / "a.tar").write_bytes(SHARD)
    with FaultyServer(tmp_path / "www") as server:
        yield server


@pytest.fixture
def cache(tmp_path) -> ShardCache:
    return ShardCache(tmp_path / "cache", attempts=3, backoff=0.01)


@pytest.fixture
def bucket(monkeypatch, tmp_path) -> str:
    """A folder of a real S3 store that holds a.tar, with the right keys in the environment."""
    server = shared_s3_server()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    with write_atomically(f"s3://{server.bucket}/{tmp_path.name}/a.tar") as file:
        file.write(SHARD)
    return f"s3://{server.bucket}/{tmp_path.name}"


def test_a_local_shard_is_its_own_copy(cache, tmp_path):
    assert cache.fetch(f"{tmp_path}/a.tar") == tmp_path / "a.tar"
    assert cache.fetch(f"file://{tmp_path}/a.tar") == tmp_path / "a.tar"


def test_a_remote_shard_is_downloaded_once(cache, server):
    first = cache.fetch(server.url("a.tar"), entry_of(SHARD))
    again = ShardCache(cache.folder).fetch(server.url("a.tar"), entry_of(SHARD))
    assert first == again and first.read_bytes() == SHARD
    assert first.name.startswith("a.tar.") and copies(cache) == [first.name]
    assert server.gets["a.tar"] == 1


def test_a_shard_comes_from_a_store_that_checks_keys(cache, bucket):
    assert cache.fetch(f"{bucket}/a.tar", entry_of(SHARD)).read_bytes() == SHARD


def test_a_wrong_key_is_refused_at_once(tmp_path, bucket, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    cache = ShardCache(tmp_path / "cache", attempts=9, backoff=60)
    with pytest.raises(DataError, match=f"^{bucket}/a.tar: access refused"):
        cache.fetch(f"{bucket}/a.tar")
    assert copies(cache) == []


def test_a_missing_shard_is_named_at_once(cache, server):
    with pytest.raises(DataError, match=f"^no file at {server.url('none.tar')}$"):
        cache.fetch(server.url("none.tar"))
    assert server.gets["none.tar"] == 1


def test_a_good_answer_after_two_bad_ones_is_taken(cache, server):
    server.faults["a.tar"] = Fault(unavailable=2)
    assert cache.fetch(server.url("a.tar")).read_bytes() == SHARD
    server.faults["bucket/a.tar"] = Fault(unavailable=1, cut=2)
    assert cache.fetch(server.url("bucket/a.tar")).read_bytes() == SHARD
    assert server.gets == {"a.tar": 3, "bucket/a.tar": 3}


@pytest.mark.parametrize("scheme", ["http", "s3"])
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault(unavailable=ALWAYS), "Service Unavailable"),
        (Fault(stalled=ALWAYS), "TimeoutError: nothing came in time"),
        (Fault(latency=1), "[Tt]imeout"),
        (Fault(cut=ALWAYS), "Not enough data|bytes came"),
    ],
    ids=["unavailable", "stalled", "slow", "cut"],
)
def test_a_bad_server_is_given_up_after_so_many_tries(
    cache, server, monkeypatch, scheme, fault, reason
):
    for name, value in s3_keys(server).items():
        monkeypatch.setenv(name, value)
    name = "a.tar" if scheme == "http" else "bucket/a.tar"
    url = server.url(name) if scheme == "http" else f"s3://{name}"
    server.faults[name] = fault
    cache.timeout = 0.3 if fault.stalled or fault.latency else 60.0
    with pytest.raises(DataError, match=f"^{url}: given up after 3 attempts: .*({reason})"):
        cache.fetch(url)
    assert server.gets[name] == 3  # no library tries again on its own
    assert copies(cache) == []


def test_a_download_killed_in_the_middle_leaves_no_torn_shard(cache, server):
    server.faults["a.tar"] = Fault(stalled=1)
    child = FORK.Process(target=cache.fetch, args=(server.url("a.tar"),))
    child.start()
    wait_until(lambda: any(path.stat().st_size for path in cache.folder.glob(".*.partial")))
    child.kill()
    child.join()
    assert [name for name in copies(cache) if not name.endswith(".partial")] == []
    assert cache.fetch(server.url("a.tar")).read_bytes() == SHARD
    assert server.gets["a.tar"] == 2


def test_what_a_killed_download_left_is_swept_when_it_is_old(cache):
    cache.folder.mkdir()
    orphans = [cache.folder / f".{file_name(f's3://b/{i}.tar')}.7.00c0ffee.partial" for i in (1, 2)]
    others = cache.folder / ".mine.partial"
    for path in (*orphans, others):
        path.touch()
    for path in (orphans[0], others):
        os.utime(path, (0, 0))
    ShardCache(cache.folder)
    assert not orphans[0].exists()
    assert orphans[1].exists() and others.exists()


def test_four_processes_download_a_shard_once(cache, server):
    server.faults["a.tar"] = Fault(latency=0.2)
    results = FORK.SimpleQueue()
    url = server.url("a.tar")
    children = [FORK.Process(target=fetched, args=(cache, url, results)) for _ in range(4)]
    for child in children:
        child.start()
    assert [results.get() for _ in children] == [digest(SHARD)] * 4
    for child in children:
        child.join()
    assert server.gets["a.tar"] == 1
    assert copies(cache) == [file_name(url)]


def test_threads_of_a_process_download_a_shard_once(cache, server):
    server.faults["a.tar"] = Fault(latency=0.2)
    results = FORK.SimpleQueue()
    threads = [
        threading.Thread(target=fetched, args=(cache, server.url("a.tar"), results))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    assert [results.get() for _ in threads] == [digest(SHARD)] * 3
    assert server.gets["a.tar"] == 1


@pytest.mark.parametrize("scheme", ["http", "s3"])
def test_a_forked_worker_fetches_after_its_parent_has(cache, server, monkeypatch, scheme):
    for name, value in s3_keys(server).items():
        monkeypatch.setenv(name, value)
    (server.folder / "bucket" / "b.tar").write_bytes(SHARD[::-1])
    root = server.endpoint if scheme == "http" else "s3:/"
    cache.fetch(f"{root}/bucket/a.tar")
    results = FORK.SimpleQueue()
    child = FORK.Process(target=fetched, args=(cache, f"{root}/bucket/b.tar", results))
    child.start()
    child.join(timeout=20)
    child.kill()
    assert child.exitcode == 0 and results.get() == digest(SHARD[::-1])


def test_the_least_recently_used_make_room(server, tmp_path):
    for name in "bcd":
        (server.folder / f"{name}.tar").write_bytes(SHARD)
    cache = ShardCache(tmp_path / "cache", max_bytes=2 * len(SHARD))
    for name in "abacd":
        cache.fetch(server.url(f"{name}.tar"))
        assert sum(path.stat().st_size for path in cache.folder.glob("*.shard")) <= cache.max_bytes
        if name == "c":
            assert copies(cache) == sorted(file_name(server.url(f"{n}.tar")) for n in "ac")
    assert copies(cache) == sorted(file_name(server.url(f"{name}.tar")) for name in "cd")


def test_a_shard_larger_than_the_cache_is_the_only_one_in_it(server, tmp_path):
    (server.folder / "b.tar").write_bytes(SHARD)
    cache = ShardCache(tmp_path / "cache", max_bytes=10)
    for name in "ab":
        assert cache.fetch(server.url(f"{name}.tar")).read_bytes() == SHARD
        assert copies(cache) == [file_name(server.url(f"{name}.tar"))]


def test_a_shard_that_was_deleted_stays_readable_where_it_is_open(server, tmp_path):
    (server.folder / "b.tar").write_bytes(b"b")
    cache = ShardCache(tmp_path / "cache", max_bytes=10)
    with open(cache.fetch(server.url("a.tar")), "rb") as file:
        cache.fetch(server.url("b.tar"))
        assert file.read() == SHARD


def test_only_copies_of_the_cache_are_deleted(server, tmp_path):
    names = ["mine.tar", "mine.shard", ".mine.partial"]
    for name in names:
        (tmp_path / name).write_bytes(SHARD)
    cache = ShardCache(tmp_path, max_bytes=10)
    cache.fetch(server.url("a.tar"))
    assert set(names) <= set(copies(cache))


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (entry_of(SHARD[::-1]), "sha256 [0-9a-f]{64} is not the manifest's [0-9a-f]{64}"),
        (entry_of(SHARD[1:]), "300000 bytes came, the manifest says 299999"),
    ],
    ids=["sha256", "size"],
)
def test_a_shard_that_is_not_the_manifests_is_refused(cache, server, entry, reason):
    with pytest.raises(DataError, match=f"^{server.url('a.tar')}: given up after 3 .*: {reason}"):
        cache.fetch(server.url("a.tar"), entry)
    assert copies(cache) == []


def test_what_is_shorter_than_the_store_promised_is_refused(tmp_path):
    (tmp_path / "a.partial").write_bytes(b"half")
    check_content(tmp_path / "a.partial", 4, None)
    with pytest.raises(OSError, match="4 bytes came, the store promised 8"):
        check_content(tmp_path / "a.partial", 8, None)


def test_a_shard_that_was_built_anew_is_downloaded_anew(cache, server):
    cache.fetch(server.url("a.tar"), entry_of(SHARD))
    (server.folder / "a.tar").write_bytes(SHARD[::-1])
    assert cache.fetch(server.url("a.tar"), entry_of(SHARD[::-1])).read_bytes() == SHARD[::-1]


def test_a_copy_of_the_wrong_size_is_downloaded_again(cache, server):
    path = cache.fetch(server.url("a.tar"), entry_of(SHARD))
    path.write_bytes(SHARD[:100])
    assert cache.fetch(server.url("a.tar"), entry_of(SHARD)).read_bytes() == SHARD


def test_a_command_runs_only_where_pipe_is_named(cache, tmp_path):
    (tmp_path / "a.tar").write_bytes(SHARD)
    command = f"pipe:cat {tmp_path}/a.tar"
    with pytest.raises(ValueError, match="runs a shell"):
        cache.fetch(command)
    allowed = ShardCache(cache.folder, schemes=("pipe",))
    assert allowed.fetch(command).read_bytes() == SHARD
    with pytest.raises(ValueError, match="'http' is none of pipe"):
        allowed.fetch("http://host/a.tar")


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("echo half; echo no such disk >&2; exit 3", "exit code is 3: no such disk"),
        ("echo half; sleep 60", "printed nothing for 0.2 s"),
    ],
    ids=["fails", "stalls"],
)
def test_what_a_failing_command_printed_is_no_shard(tmp_path, command, reason):
    cache = ShardCache(tmp_path, attempts=2, backoff=0.01, timeout=0.2, schemes=("pipe",))
    with pytest.raises(DataError, match=f"^pipe:echo half.*given up after 2 attempts: .*{reason}"):
        cache.fetch(f"pipe:{command}")
    assert copies(cache) == []


def test_a_prefetched_shard_is_there_when_it_is_needed(cache, server):
    server.faults["a.tar"] = Fault(latency=0.1)
    cache.prefetch(server.url("a.tar"))
    wait_until(lambda: copies(cache) == [file_name(server.url("a.tar"))])
    assert cache.fetch(server.url("a.tar")).read_bytes() == SHARD
    assert server.gets["a.tar"] == 1


def test_a_prefetch_never_raises_and_the_fetch_tells(cache, server):
    for url in ("ftp://host/a.tar", server.url("none.tar"), server.url("a.tar")):
        cache.prefetch(url)
    wait_until(lambda: copies(cache) == [file_name(server.url("a.tar"))])
    with pytest.raises(DataError, match="no file at"):
        cache.fetch(server.url("none.tar"))


def prefetched(cache: ShardCache, url: str) -> None:
    cache.prefetch(url)
    wait_until(lambda: (cache.folder / file_name(url)).exists(), seconds=10)


def test_a_forked_worker_prefetches_on_its_own(cache, server):
    (server.folder / "b.tar").write_bytes(SHARD)
    prefetched(cache, server.url("a.tar"))
    child = FORK.Process(target=prefetched, args=(cache, server.url("b.tar")))
    child.start()
    child.join()
    assert child.exitcode == 0


def test_a_cache_travels_to_a_spawned_worker(cache, server):
    prefetched(cache, server.url("a.tar"))
    copy = pickle.loads(pickle.dumps(cache))
    assert (copy.folder, copy.timeout) == (cache.folder, cache.timeout)
    prefetched(copy, server.url("bucket/a.tar"))


def test_names_are_readable_and_hold_no_secret(cache, server):
    url = server.url("a.tar").replace("//", "//ann:pass@") + "?X-Amz-Signature=abc"
    server.faults["a.tar"] = Fault(cut=ALWAYS)
    with pytest.raises(DataError) as caught:
        cache.fetch(url)
    for text in (str(caught.value), file_name(url)):
        assert not any(secret in text for secret in ("ann", "pass", "abc"))
    assert "a.tar?***" in str(caught.value)
    assert file_name(url) != file_name(url + "d")
    assert file_name("pipe:curl -u ann:pass https://h/a.tar").startswith("pipe.")
    assert file_name("s3://b/täglich 1.tar").startswith("t_glich_1.tar.")


@pytest.mark.parametrize(
    "settings", [{"max_bytes": 0}, {"attempts": 0}, {"backoff": -1.0}, {"timeout": 0.0}]
)
def test_impossible_settings_are_refused(tmp_path: Path, settings):
    with pytest.raises(ValueError, match="=".join(map(str, *settings.items()))):
        ShardCache(tmp_path, **settings)
