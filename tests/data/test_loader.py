"""Loaders: how far they have got, taken up exactly, by as many ranks and workers as there are."""

import multiprocessing
import os
import signal
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data._utils import signal_handling

from dcar.data.buckets import Buckets
from dcar.data.loader import ShardLoader, death_of_worker, name_the_dead, told_plainly
from dcar.data.transforms import ImageTransform
from dcar.errors import DataError
from tests.shards import UNEVEN, build, everything, keys, loader_of, same, stream, take

BATCHES = sum(UNEVEN) // 3  # an epoch of one rank


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("uneven"))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_order_is_a_function_of_seed_and_epoch(shards, workers):
    def epochs(seed: int) -> list[list[str]]:
        loader = loader_of(shards, workers, seed=seed)
        return [keys(loader) for _ in range(2)]

    first = epochs(1)
    assert first == epochs(1)
    assert len({tuple(order) for order in first + epochs(2)}) == 4


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_number_of_workers_changes_no_batch(shards, workers):
    alone, helped = loader_of(shards), loader_of(shards, workers)
    assert all(same(*pair) for pair in zip(alone, helped, strict=True))


@pytest.mark.parametrize("world, workers", [(1, 0), (2, 0), (1, 2), (2, 2), (4, 0), (3, 1), (8, 0)])
def test_every_rank_has_the_same_number_of_full_batches_and_shares_no_sample(
    shards, world, workers
):
    """Also with more readers than shards: every one of them has its share."""
    seen: list[str] = []
    for rank in range(world):
        loader = loader_of(shards, workers, rank=rank, world=world)
        batches = list(loader)
        assert len(batches) == sum(UNEVEN) // world * world // (3 * world)
        assert all(len(batch["key"]) == 3 for batch in batches)
        seen += keys(batches)
    assert len(seen) == len(set(seen))


@pytest.mark.parametrize("world, workers", [(1, 0), (2, 0), (1, 2), (2, 2), (4, 0)])
def test_validation_visits_every_sample_once_over_ranks_and_workers(shards, world, workers):
    seen: Counter[str] = Counter()
    for rank in range(world):
        loader = loader_of(shards, workers, shuffle=False, batch_size=4, rank=rank, world=world)
        batches = list(loader)
        assert len(batches) == len(loader)
        seen.update(keys(batches))
    assert seen == Counter(everything())


def test_validation_starts_over_after_a_broken_off_iteration(shards):
    loader = loader_of(shards, shuffle=False)
    first = [batch["key"] for batch in islice(iter(loader), 2)]
    assert [batch["key"] for batch in islice(iter(loader), 2)] == first


def test_a_validation_is_taken_up_once_and_then_the_same_each_time(shards):
    whole, stopped = list(loader_of(shards, shuffle=False)), loader_of(shards, shuffle=False)
    list(islice(iter(stopped), 2))
    resumed = loader_of(shards, shuffle=False)
    resumed.load_state_dict(stopped.state_dict())
    for expected in (whole[2:], whole, whole):
        assert all(same(*pair) for pair in zip(resumed, expected, strict=True))
        list(islice(iter(resumed), 1))  # broken off: the next one starts over
    resumed.load_state_dict(stopped.state_dict() | {"batches": 99})  # of smaller batches, say
    assert keys(resumed) == keys(whole)


def test_a_cache_with_workers_is_refused(shards):
    with pytest.raises(ValueError, match="num_workers 2"):
        loader_of(shards, 2, cache=True)


STOPS = [(1, 0), (4, 0), (5, 0), (12, 0), (13, 0), (17, 0), (5, 2), (13, 2)]


@pytest.mark.parametrize(("stop", "workers"), STOPS)
def test_a_resumed_loader_gives_exactly_the_next_batches(shards, workers, stop):
    expected = take(loader_of(shards, workers), 2 * BATCHES)
    stopped = loader_of(shards, workers)
    take(stopped, stop)
    resumed = loader_of(shards, workers)
    resumed.load_state_dict(stopped.state_dict())
    rest = take(resumed, 2 * BATCHES - stop)
    assert all(same(*pair) for pair in zip(rest, expected[stop:], strict=True))


kills = st.lists(st.integers(1, 9), min_size=1, max_size=4)


def killed_at_random(shards: Path, stops: list[int], workers: int, world: int) -> None:
    """Each rank is stopped and taken up again after any number of batches, several times."""
    for rank in range(world):
        options = {"rank": rank, "world": world}
        expected = take(loader_of(shards, workers, **options), sum(stops) + 2)
        state, batches = None, []
        for stop in [*stops, 2]:
            loader = loader_of(shards, workers, **options)
            if state is not None:
                loader.load_state_dict(state)
            batches += take(loader, stop)
            state = loader.state_dict()
        assert all(same(*pair) for pair in zip(batches, expected, strict=True))


@settings(max_examples=20, deadline=None)
@given(stops=kills, world=st.sampled_from([1, 2]))
def test_random_kills_leave_the_series_of_batches_as_it_was(shards, stops, world):
    killed_at_random(shards, stops, 0, world)


@pytest.mark.slow  # each stop ends two processes
@settings(max_examples=6, deadline=None)
@given(stops=kills, world=st.sampled_from([1, 2]))
def test_random_kills_of_workers_do_neither(shards, stops, world):
    killed_at_random(shards, stops, 2, world)


@settings(max_examples=25, deadline=None)
@given(
    done=st.integers(0, 5),
    before=st.sampled_from([1, 2, 3]),
    after=st.sampled_from([1, 2, 4]),
    batch_size=st.sampled_from([2, 3]),
)
def test_other_ranks_and_batch_sizes_go_on_with_what_is_left(
    shards, done, before, after, batch_size
):
    """Saved with one number of ranks, resumed with another: no sample twice, none lost."""
    seen: list[str] = []
    done = min(done, len(loader_of(shards, rank=0, world=before)) - 1)
    for rank in range(before):
        loader = loader_of(shards, rank=rank, world=before)
        seen += keys(take(loader, done))
        state = loader.state_dict()
    for rank in range(after):
        loader = loader_of(shards, rank=rank, world=after, batch_size=batch_size)
        loader.load_state_dict(state)
        if len(loader) > state["batches"]:
            rest = list(loader)
            assert len(rest) == len(loader_of_state(shards, state, after, batch_size)) - done
            seen += keys(rest)
    assert len(seen) == len(set(seen))
    assert len(seen) > sum(UNEVEN) // before * before - after * batch_size


def loader_of_state(shards: Path, state: dict, world: int, batch_size: int) -> ShardLoader:
    loader = loader_of(shards, rank=0, world=world, batch_size=batch_size)
    loader.load_state_dict(state)
    return loader


def test_after_a_change_of_ranks_the_next_epoch_is_a_fresh_one(shards):
    loader = loader_of(shards, rank=0, world=2)
    take(loader, 2)
    resumed = loader_of(shards, rank=0, world=1)
    resumed.load_state_dict(loader.state_dict())
    list(resumed)
    fresh = loader_of(shards, rank=0, world=1)
    take(fresh, BATCHES)
    assert all(same(*pair) for pair in zip(resumed, fresh, strict=True))


def test_a_state_that_is_only_carried_on_stays_as_it_is(shards):
    loader = loader_of(shards, rank=0, world=2)
    take(loader, 2)
    state = loader.state_dict()
    for rank in range(3):
        resumed = loader_of(shards, rank=rank, world=3)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
    take(resumed, 1)
    assert resumed.state_dict() == state | {"batches": 3, "units": 2 * 2 * 3 + 3 * 3}


def test_a_state_between_epochs_is_none_of_so_many_ranks(shards):
    loader = loader_of(shards, rank=0, world=2)
    list(loader)
    resumed, fresh = (loader_of(shards, rank=0, world=1) for _ in range(2))
    resumed.load_state_dict(loader.state_dict())
    list(fresh)
    assert all(same(*pair) for pair in zip(resumed, fresh, strict=True))


@pytest.mark.parametrize("change", [{"seed": 8}, {"buffer": 9}, {}])
def test_a_state_of_another_order_leaves_out_the_rest_of_the_epoch(
    shards, tmp_path, caplog, change
):
    loader = loader_of(shards)
    take(loader, 3)
    resumed = loader_of(shards if change else build(tmp_path, sizes=(20, 19)), **change)
    resumed.load_state_dict(loader.state_dict())
    assert "the rest of epoch 0 is left out" in caplog.text
    assert resumed.state_dict()["epoch"] == 1


def test_a_batch_of_buckets_of_another_size_leaves_out_the_rest_of_the_epoch(shards):
    loaders = [
        loader_of(shards, buckets=Buckets(area=8, multiple=4), batch_size=batch_size)
        for batch_size in (3, 3, 2)
    ]
    take(loaders[0], 2)
    for loader in loaders[1:]:
        loader.load_state_dict(loaders[0].state_dict())
    assert [loader.state_dict()["epoch"] for loader in loaders] == [0, 0, 1]
    assert [len(loader) for loader in loaders] == [13, 13, 19]


def test_a_state_without_a_batch_fits_any_shards(shards, tmp_path, caplog):
    loader = loader_of(shards)
    list(loader)
    other = loader_of(build(tmp_path, sizes=(20, 20)))
    other.load_state_dict(loader.state_dict())
    assert other.state_dict()["epoch"] == 1 and not caplog.text


def test_resuming_reads_and_decodes_nothing_that_is_skipped(shards, monkeypatch):
    stopped = loader_of(shards)
    take(stopped, 10)
    loader = loader_of(shards)
    loader.load_state_dict(stopped.state_dict())
    decoded = []
    read = ImageTransform.read

    def counted(self: ImageTransform, *arguments):
        decoded.append(1)
        return read(self, *arguments)

    monkeypatch.setattr(ImageTransform, "read", counted)
    assert len(list(loader)) == 3 and len(decoded) == 9


def test_the_state_counts_batches_handed_out_not_those_that_workers_hold(shards):
    loader = ShardLoader(stream(shards), num_workers=2, prefetch_factor=3)
    batches = iter(loader)
    for taken in range(1, 5):
        next(batches)
        assert loader.state_dict()["batches"] == taken
    assert len(list(batches)) == 9
    assert (loader.state_dict()["epoch"], loader.state_dict()["batches"]) == (1, 0)


@pytest.mark.slow
def test_a_killed_worker_is_named(shards):
    loader = loader_of(shards, 2)
    batches = iter(loader)
    next(batches)
    worker = batches.gi_frame.f_locals["batches"]._workers[1]
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(DataError, match=f"reads data.*{worker.pid}"):
        list(batches)


def test_the_death_of_a_worker_interrupts_nothing(shards, monkeypatch):
    """The handler that torch installs once a process raises wherever the process then is."""
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)

    def ours(*_) -> None:
        pass

    before = signal.signal(signal.SIGCHLD, ours)
    try:
        batches = iter(loader_of(shards, 1))
        assert signal.getsignal(signal.SIGCHLD) is ours
        assert len(list(batches)) == BATCHES
    finally:
        signal.signal(signal.SIGCHLD, before)


@pytest.mark.slow  # torch takes seconds to let go of a worker that raised
def test_what_a_worker_cannot_read_reaches_the_training_process(tmp_path):
    folder = build(tmp_path, sizes=(6, 6), bad={f"k{n:04d}": {"txt": b""} for n in range(12)})
    with pytest.raises(DataError, match="^not one of 3 samples"):
        list(loader_of(folder, 1))


def test_only_the_death_of_a_worker_is_taken_for_one():
    death = death_of_worker(RuntimeError("DataLoader worker (pid(s) 7)\n exited unexpectedly"))
    assert str(death) == (
        "a process that reads data has died: DataLoader worker (pid(s) 7) exited unexpectedly"
    )
    for other in ("CUDA out of memory", "Caught RuntimeError in DataLoader worker process 0. ..."):
        assert death_of_worker(RuntimeError(other)) is None


@pytest.mark.parametrize("broken", [EOFError, ConnectionResetError])
def test_a_batch_that_breaks_off_is_a_dead_worker_s(broken):
    with pytest.raises(DataError, match="^a process that reads data has died$"), told_plainly():
        raise broken


def test_of_several_workers_the_dead_one_is_named():
    """As where the death breaks the pipe through which a batch comes."""
    workers = [multiprocessing.Process(target=time.sleep, args=(60,)) for _ in range(2)]
    for worker in workers:
        worker.start()
    try:
        os.kill(workers[1].pid, signal.SIGKILL)
        assert name_the_dead(workers) == (
            f"a process that reads data has died: DataLoader worker (pid(s) {workers[1].pid})"
        )
    finally:
        workers[0].kill()


@pytest.mark.slow
def test_workers_that_are_spawned_know_their_rank(shards, monkeypatch):
    """They have no process group to ask."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    spawned = ShardLoader(stream(shards), num_workers=1, multiprocessing_context="spawn")
    expected = loader_of(shards, rank=1, world=2)
    assert all(same(*pair) for pair in zip(spawned, expected, strict=True))


def test_a_validation_set_that_leaves_a_rank_without_a_sample_is_refused(shards):
    with pytest.raises(ValueError, match="samples for 99 ranks: each needs at least one"):
        len(loader_of(shards, shuffle=False, rank=0, world=99))
