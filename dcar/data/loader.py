"""Batches of a stream, counted: where a training has got to, and how it goes on from there."""

import logging
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

from torch.utils.data import DataLoader

from dcar.data.batches import Batch
from dcar.data.order import Share, Slice
from dcar.data.stream import ShardStream
from dcar.errors import DataError

log = logging.getLogger(__name__)

GRACE = 30  # seconds


@contextmanager
def child_signals_left_alone() -> Iterator[None]:
    """Undo torch's handler for the death of a worker, which raises wherever the process then is.

    That may be half way through an optimizer step. The next batch tells of the death as well.
    """
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


def outlive_signals(worker: int) -> None:
    """Ctrl-C, SLURM's warning and SIGTERM may reach every process of a job; the main one decides.

    It needs more batches where a step in progress takes several. A worker that is told to end has
    half a minute left, and no time where it is told again.
    """

    def end_soon(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.alarm(GRACE)

    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, end_soon)


def death_of_worker(error: RuntimeError) -> DataError | None:
    """What torch means where it says that a data worker is gone; None for any other error."""
    if "DataLoader worker (pid" not in str(error):
        return None
    return DataError(f"a process that reads data has died: {' '.join(str(error).split())}")


@contextmanager
def told_plainly(workers: Sequence[BaseProcess] = ()) -> Iterator[None]:
    """Errors of data workers as DataError in their own words, without torch's traceback.

    workers: those that may die, where they are known.
    """
    try:
        yield
    except DataError as error:
        raise DataError(str(error).rpartition("DataError: ")[2].strip()) from error
    except RuntimeError as error:
        if (death := death_of_worker(error)) is None:
            raise
        raise death from error
    except (ConnectionError, EOFError) as error:  # it died while a batch was handed over
        raise DataError(name_the_dead(workers)) from error


def name_the_dead(workers: Sequence[BaseProcess]) -> str:
    """The sentence that tells which of the workers is gone, waiting a moment for its exit."""
    if not workers:
        return "a process that reads data has died"
    ended = wait([worker.sentinel for worker in workers], timeout=5)  # before it can be reaped
    dead = [w.pid for w in workers if w.sentinel in ended or not w.is_alive()]
    pids = ", ".join(map(str, dead or [worker.pid for worker in workers]))
    return f"a process that reads data has died: DataLoader worker (pid(s) {pids})"


class ShardLoader(DataLoader):
    """A DataLoader of a ShardStream that knows how far it has got.

    An iteration goes on where the last one stopped (validation streams start over) and ends with
    the epoch; the next one is the next epoch, so nobody has to set it. `state_dict` counts the
    batches handed out, not those that workers hold ready: after `load_state_dict` the next batch is
    the very one that would have come. With another number of ranks or workers, or another batch
    size, the epoch goes on with the samples that are left of it: none comes twice, none is lost.
    A batch of buckets cannot be taken up in another size: then the rest of the epoch is left out.
    Raises DataError naming the worker where a worker process is killed.
    """

    def __init__(self, stream: ShardStream, *, num_workers: int = 0, **options: Any):
        if stream.cache and num_workers > 0:
            raise ValueError(f"cache keeps images in this process: num_workers {num_workers} not 0")
        if num_workers > 0:
            options = {"worker_init_fn": outlive_signals, **options}
        super().__init__(stream, batch_size=None, num_workers=num_workers, **options)
        self.stream = stream
        self._epoch, self._resumed = 0, False
        self._start, self._lanes = 0, 0  # of the epoch, when the present layout took it up
        self._before, self._done = 0, 0  # batches until then and since

    def __len__(self) -> int:
        """Batches of the epoch on this rank, those before a resumption counted in."""
        return self._before + self._share().batches

    def _share(self) -> Share | Slice:
        return self.stream.share(self._start, self._lanes)

    def _begin(self, epoch: int) -> None:
        self._epoch, self._start, self._lanes = epoch, 0, 0
        self._before, self._done = 0, 0

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # a generator around theirs
        if not (self.stream.shuffle or self._resumed):
            self._begin(self._epoch)
        self._resumed = False
        share = self._share()
        if self._done == share.batches:
            self._begin(self._epoch + self.stream.shuffle)
            share = self._share()
        self._lanes = self._lanes or self.stream.place[1]
        stream = self.stream
        stream.epoch, stream.lanes = self._epoch, self._lanes
        stream.start, stream.done = self._start, self._done
        stream.settle()
        with child_signals_left_alone():
            batches = super().__iter__()
        return self._count_out(batches, share.batches)

    def _count_out(self, batches: Iterator[Batch], total: int) -> Iterator[Batch]:
        while (batch := self._next(batches)) is not None:
            batch = self.stream.count(batch)
            self._done += 1
            if self._done == total:
                self._begin(self._epoch + self.stream.shuffle)
            if batch["key"]:
                yield batch

    @staticmethod
    def _next(batches: Iterator[Batch]) -> Batch | None:
        with told_plainly(getattr(batches, "_workers", [])):
            return next(batches, None)

    def state_dict(self) -> dict[str, Any]:
        """Plain data. epoch, batches: handed out in it on this rank. units: taken by all ranks
        together, in as many `lanes`. order: signature of what the order depends on.
        """
        share = self._share()
        taken = self._done * share.units * self.stream.place[1]
        return {
            "epoch": self._epoch,
            "batches": self._before + self._done,
            "units": self._start + taken,
            "lanes": self._lanes or self.stream.place[1],
            "order": self.stream.signature(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._begin(int(state["epoch"]))
        self._resumed = True
        if not self.stream.shuffle:
            self._done = min(int(state["batches"]), self._share().batches)
            return
        if state["batches"] and state["order"] != self.stream.signature():
            log.warning(
                "the checkpoint was in the middle of an epoch of other shards, or of another seed, "
                "buffer, mixture or bucket size: the rest of epoch %d is left out",
                self._epoch,
            )
            return self._begin(self._epoch + 1)
        self._before, self._start = int(state["batches"]), int(state["units"])
        self._lanes = int(state["lanes"]) if self._before else 0
