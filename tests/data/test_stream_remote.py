"""Streams over a store that stumbles: the same batches, or what is lost skipped and counted."""

from pathlib import Path

import pytest

from dcar.data.cache import ShardCache
from dcar.data.loader import ShardLoader
from dcar.data.shard_set import ShardSet
from dcar.errors import DataError
from tests.servers import ALWAYS, Fault, FaultyServer
from tests.shards import build, same, stream


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("uneven"))


def remote(server: FaultyServer, cache: Path, **options) -> ShardSet:
    store = ShardCache(cache, attempts=3, backoff=0.01, timeout=3.0)
    urls = [server.url(f"s{shard}-000000.tar") for shard in range(4)]
    return ShardSet(urls, cache=store, **options)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_store_that_stumbles_gives_the_same_batches_as_local_shards(shards, tmp_path, workers):
    faults = {
        "s0-000000.tar": Fault(unavailable=2),
        "s1-000000.tar": Fault(cut=1),
        "s2-000000.tar": Fault(latency=0.3),
        "s3-000000.tar": Fault(stalled=1),
    }
    with FaultyServer(shards) as server:
        server.faults.update(faults)
        loader = ShardLoader(stream(remote(server, tmp_path)), num_workers=workers)
        far = list(loader)
        once = {f"s{n}-000000.tar": tries for n, tries in enumerate((3, 2, 1, 2))}
        assert {name: server.gets[name] for name in once} == once
    assert all(same(*pair) for pair in zip(far, ShardLoader(stream(shards)), strict=True))
    assert not loader.stream.skipped


def test_a_shard_that_never_comes_is_tried_so_often_then_skipped_and_counted(shards, tmp_path):
    with FaultyServer(shards) as server:
        server.faults["s2-000000.tar"] = Fault(unavailable=ALWAYS)
        loader = ShardLoader(stream(remote(server, tmp_path), max_bad=1.0))
        assert len(list(loader)) == 13
        tries = server.gets["s2-000000.tar"]
    assert loader.stream.skipped == {"lost with its shard": 10}
    assert 3 <= tries <= 6  # three by the read, and some by the thread that reads ahead


def test_a_store_that_is_gone_ends_the_run(shards, tmp_path):
    with FaultyServer(shards) as server:
        data = remote(server, tmp_path)
    with pytest.raises(DataError, match="not one of 3 samples"):
        list(ShardLoader(stream(data)))
