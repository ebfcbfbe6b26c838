"""Where the tasks of a build run: in processes of this machine, or on a Ray cluster.

A task is a function of an importable module and its arguments; it returns an Outcome. Results come
back in the order in which they are finished.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.context import SpawnProcess
from typing import Any, Protocol

from dcar.errors import DataError, import_extra

RAY_RETRIES = 4  # of a task whose node or process died


@dataclass(frozen=True)
class Outcome:
    """What a task did. images, bytes: read by it. error: why it failed, naming the file.

    broken: it failed because its input is broken, and not while it wrote.
    """

    name: str
    images: int = 0
    bytes: int = 0
    error: str | None = None
    broken: bool = False


Task = Callable[..., Outcome]
Tick = Callable[[int, int], None]  # called about twice a second with images and bytes so far


class WorkerDied(DataError):
    """A process that worked on the data was killed, by the kernel for its memory or by hand."""


class Distributor(Protocol):
    """Runs `task(*arguments)` for each of `arguments`; closing the iterator stops what runs."""

    def run(
        self, task: Task, arguments: Sequence[tuple[Any, ...]], tick: Tick
    ) -> Generator[Outcome, None, None]: ...


_counts: Any = None  # images and bytes of all workers, shared memory; set in each worker


def advance(images: int, size: int) -> None:
    """Called by a task as it goes on, so that progress shows before it is finished."""
    if _counts is not None:
        with _counts.get_lock():
            _counts[0] += images
            _counts[1] += size


def _start_worker(counts: Any) -> None:
    global _counts
    _counts = counts
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the main process decides
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose main process was killed would wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def _lean_workers() -> Iterator[None]:
    """Processes started inside import what their task needs, not the main module of the command
    (torch, Lightning, ...), and do not share out their one core among threads."""
    main, threads = sys.modules["__main__"], os.environ.get("OMP_NUM_THREADS")
    sys.modules["__main__"] = types.ModuleType("__main__")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        if threads is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = threads


def cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Processes:
    """Runs tasks in `workers` processes, started afresh for each run (default: one a core)."""

    def __init__(self, workers: int | None = None):
        self.workers = cores() if workers is None else workers
        if self.workers < 1:
            raise ValueError(f"processes={workers}; it must be at least 1")

    def run(
        self, task: Task, arguments: Sequence[tuple[Any, ...]], tick: Tick
    ) -> Generator[Outcome, None, None]:
        """Raises WorkerDied as soon as a process is killed, and what a task raises."""
        context = multiprocessing.get_context("spawn")
        counts = context.Array("q", 2)
        seen: Any = counts.get_obj()  # without the lock, which a worker that dies may hold
        executor = ProcessPoolExecutor(
            self.workers, mp_context=context, initializer=_start_worker, initargs=(counts,)
        )
        others = set(multiprocessing.active_children())
        workers: list[SpawnProcess] = []
        try:
            with _lean_workers():
                waiting = {executor.submit(task, *each) for each in arguments}
            workers = [each for each in multiprocessing.active_children() if each not in others]  # type: ignore[misc]
            while waiting:
                done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                tick(seen[0], seen[1])
                for future in done:
                    yield future.result()
        except BrokenProcessPool as error:
            raise WorkerDied(_obituary(workers)) from error
        finally:
            for worker in workers:
                worker.terminate()
                worker.join()
            # The pool's thread must be over: left behind, it closes a pipe that Python's exit uses.
            executor.shutdown(wait=True, cancel_futures=True)


def _exit_code(worker: SpawnProcess) -> int | None:
    """None where it does not end. The pool's thread may have asked the system first, which tells
    only one: the code is known to this thread a moment later."""
    worker.join(5)
    for _ in range(100):
        if worker.exitcode is not None:
            break
        time.sleep(0.01)
    return worker.exitcode


def _obituary(workers: Sequence[SpawnProcess]) -> str:
    ends = [(worker.pid, _exit_code(worker)) for worker in workers]  # the pool ends the others: -15
    ends = [(pid, code) for pid, code in ends if code not in (None, 0, -signal.SIGTERM)] or ends
    pid, code = ends[0]
    how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
    return (
        f"process {pid} ended with {how} while it worked (out of memory?); fewer processes need "
        "less memory"
    )


class RayCluster:
    """Runs tasks on a Ray cluster, one core each; a task whose node dies runs again elsewhere.

    address: of the cluster, as `ray.init` takes it; None joins the one of RAY_ADDRESS or starts
    one on this machine. Input and output must be reachable under the same paths from all nodes.
    """

    def __init__(self, address: str | None = None):
        ray = import_extra("ray", extra="ray", needs="distributor=ray needs Ray")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
        self.ray, self.address = ray, address

    def run(
        self, task: Task, arguments: Sequence[tuple[Any, ...]], tick: Tick
    ) -> Generator[Outcome, None, None]:
        """Raises WorkerDied for a task that died RAY_RETRIES times over, and what a task raises."""
        ray, lost = self.ray, self.ray.exceptions
        started = not ray.is_initialized()
        if started:
            ray.init(self.address, log_to_driver=False, include_dashboard=False)
        remote = ray.remote(num_cpus=1, max_retries=RAY_RETRIES)(task)
        waiting: list[Any] = []
        images = size = 0
        try:
            waiting = [remote.remote(*each) for each in arguments]
            while waiting:
                done, waiting = ray.wait(waiting, num_returns=1, timeout=0.5)
                tick(images, size)
                for outcome in map(ray.get, done):
                    images, size = images + outcome.images, size + outcome.bytes
                    yield outcome
        except (lost.WorkerCrashedError, lost.NodeDiedError, lost.OutOfMemoryError) as error:
            raise WorkerDied(f"a Ray worker died {RAY_RETRIES + 1} times: {error}") from error
        finally:
            for reference in waiting:
                ray.cancel(reference, force=True)
            if started:
                ray.shutdown()
