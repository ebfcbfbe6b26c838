"""Distributors: results of every task, a killed worker named, nothing left running."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from dcar.data.distributors import Outcome, Processes, WorkerDied
from tests.tasks import count_up, fail, sleep_long, torch_threads

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


def test_every_task_gives_its_outcome_and_what_it_counts_is_seen_on_the_way() -> None:
    ticks: list[tuple[int, int]] = []
    tasks = [(f"task {number}", number) for number in range(5)]
    with closing(Processes(2).run(count_up, tasks, lambda *seen: ticks.append(seen))) as outcomes:
        found = sorted(outcome.name for outcome in outcomes)
    assert found == [name for name, _ in tasks]
    assert ticks[-1] == (10, 1000) and ticks == sorted(ticks)
    assert children() == []


@pytest.mark.slow
def test_workers_import_neither_the_main_module_nor_share_their_core_among_threads() -> None:
    with closing(Processes(1).run(torch_threads, [()], no_tick)) as outcomes:
        (outcome,) = outcomes
    assert outcome == Outcome("lightning: False", images=1)


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
