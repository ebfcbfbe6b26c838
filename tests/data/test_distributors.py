"""Distributors: results of every task, a killed worker named, nothing left running."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import process
from contextlib import closing
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import psutil
import pytest

from dcar.data.distributors import Outcome, Processes, RayCluster, WorkerDied
from tests.builds import GivenSource, Silent, SlowSource, all_bytes, built, record
from tests.tasks import count_up, die_while_counting, fail, sleep_long, surroundings

ROOT = Path(__file__).parents[2]


def no_tick(images: int, size: int) -> None:
    pass


def wait_until(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def children() -> list[psutil.Process]:
    """Processes of a pool; not the resource tracker, which stays, nor the dead."""
    alive = [p for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE]
    return [p for p in alive if "spawn_main" in " ".join(p.cmdline())]


@pytest.mark.slow
def test_every_task_gives_its_outcome_and_what_it_counts_is_seen_on_the_way() -> None:
    ticks: list[tuple[int, int]] = []
    tasks = [(f"task {number}", number) for number in range(5)]
    with closing(Processes(2).run(count_up, tasks, lambda *seen: ticks.append(seen))) as outcomes:
        found = sorted(outcome.name for outcome in outcomes)
    assert found == [name for name, _ in tasks]
    assert ticks[-1] == (10, 1000) and ticks == sorted(ticks)
    assert children() == []


@pytest.mark.slow
def test_workers_import_no_main_module_and_do_not_share_their_core_among_threads(
    monkeypatch,
) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", ModuleSpec("tests.toys", None))
    with closing(Processes(1).run(surroundings, [()], no_tick)) as outcomes:
        (outcome,) = outcomes
    assert outcome == Outcome("networks imported: False", images=1)


@pytest.mark.slow
def test_what_a_task_raises_is_raised_here_and_ends_the_workers() -> None:
    tasks = [("broken", 0), ("slow", 1)]
    with pytest.raises(ZeroDivisionError), closing(Processes(2).run(fail, tasks, no_tick)) as all_:
        list(all_)
    assert children() == []


def test_a_killed_worker_is_named_and_the_others_are_ended() -> None:
    tasks = [(600.0,), (600.0,)]
    with closing(Processes(2).run(sleep_long, tasks, lambda *_: kill_one())) as outcomes:
        with pytest.raises(WorkerDied, match=r"process \d+ ended with SIGKILL"):
            list(outcomes)
    assert children() == []


@pytest.mark.slow
def test_a_worker_that_dies_while_it_counts_holds_up_nobody() -> None:
    with closing(Processes(1).run(die_while_counting, [("a",), ("b",)], no_tick)) as outcomes:
        with pytest.raises(WorkerDied, match=r"process \d+ ended with SIGKILL"):
            list(outcomes)
    assert children() == []


def kill_one() -> None:
    for child in children()[:1]:
        os.kill(child.pid, signal.SIGKILL)


@pytest.mark.slow
def test_closing_early_ends_tasks_that_run() -> None:
    begun = time.monotonic()
    outcomes = Processes(2).run(sleep_long, [(0.0,), (600.0,), (600.0,)], no_tick)
    assert next(outcomes).name == "slept 0.0"
    outcomes.close()
    assert time.monotonic() - begun < 300 and children() == []


@pytest.mark.slow
def test_a_run_waits_for_the_pool_s_thread_which_the_end_of_python_must_not_meet(
    monkeypatch,
) -> None:
    def end_late(thread: Any, run=process._ExecutorManagerThread.run) -> None:
        run(thread)
        time.sleep(1)

    monkeypatch.setattr(process._ExecutorManagerThread, "run", end_late)
    threads = set(threading.enumerate())
    with closing(Processes(2).run(sleep_long, [(0.0,), (600.0,)], no_tick)) as run:
        next(run)
    assert set(threading.enumerate()) <= threads


@pytest.mark.slow
def test_workers_do_not_outlive_a_main_process_that_is_killed(tmp_path: Path) -> None:
    code = (
        "from dcar.data.distributors import Processes\nfrom tests.tasks import write_then_sleep\n"
        f"tasks = [({str(tmp_path)!r}, n) for n in range(2)]\n"
        "list(Processes(2).run(write_then_sleep, tasks, print))"
    )
    main = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
    wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
    workers = [int(path.name) for path in tmp_path.iterdir()]
    main.kill()
    main.wait()
    wait_until(lambda: not any(map(psutil.pid_exists, workers)), 10)


def test_less_than_one_process_is_refused() -> None:
    with pytest.raises(ValueError, match="processes=0"):
        Processes(0)
    assert Processes().workers == len(os.sched_getaffinity(0))


@pytest.mark.slow
def test_other_processes_of_the_caller_are_left_alone() -> None:
    other = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
    other.start()
    try:
        list(Processes(1).run(count_up, [("one", 1)], no_tick))
        assert other.is_alive()
    finally:
        other.kill()
        other.join()


@pytest.fixture
def two_nodes(monkeypatch) -> Iterator[Any]:
    """A Ray cluster of two nodes on this machine, one core each; the second may be killed."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        second = cluster.add_node(**node)
        cluster.wait_for_nodes()
        yield cluster, second
    finally:
        ray.shutdown()
        cluster.shutdown()


class Killing(Silent):
    """Kills a node, workers and all, as soon as one of its processes has begun a unit."""

    def __init__(self, node: Any, started: Path):
        super().__init__()
        (raylet,) = node.all_processes["raylet"]
        self.raylet, self.started = psutil.Process(raylet.process.pid), started
        self.has_killed = False

    def tick(self, images: int, size: int) -> None:
        begun = {int(path.name.split("-")[1]) for path in self.started.iterdir()}
        tree = [] if self.has_killed else self.raylet.children(recursive=True)
        if begun & {process.pid for process in tree}:
            for process in [self.raylet, *tree]:
                process.kill()
            self.has_killed = True


@pytest.mark.slow
def test_a_ray_cluster_that_loses_a_node_builds_the_bytes_that_processes_build(
    two_nodes: Any, tmp_path: Path
) -> None:
    cluster, second = two_nodes
    started = tmp_path / "started"
    started.mkdir()
    records = [[record(5 * unit + n) for n in range(5)] for unit in range(8)]
    records[6][2] = record(99, key="k000")
    source, progress = SlowSource(records, started=str(started)), Killing(second, started)
    report = built(
        source, tmp_path / "ray", distributor=RayCluster(cluster.address), progress=progress
    )
    assert progress.has_killed
    assert len(list(started.iterdir())) == 8 + 2  # one died with its node, one has a repeated key
    assert report == built(GivenSource(records), tmp_path / "processes", distributor=Processes(2))
    assert all_bytes(tmp_path / "ray") == all_bytes(tmp_path / "processes")


@pytest.mark.slow
def test_ray_passes_on_what_a_task_raises_and_what_it_counts(two_nodes: Any) -> None:
    cluster, _ = two_nodes
    ticks: list[tuple[int, int]] = []
    distributor = RayCluster(cluster.address)
    tasks = [(f"task {number}", number) for number in range(3)]
    found = list(distributor.run(count_up, tasks, lambda *seen: ticks.append(seen)))
    assert sorted(outcome.name for outcome in found) == [name for name, _ in tasks]
    assert ticks[-1][0] >= 1
    with pytest.raises(ZeroDivisionError):
        list(distributor.run(fail, [("broken", 0)], no_tick))
