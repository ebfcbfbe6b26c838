"""Shards to batches, in an order that can be stopped and taken up again exactly.

Batch keys, used by every module (S: image side in pixels, B: images in the batch):
  key      list[str]                   name of the sample, unique in its data set
  image    (B, 3, S, S) float32        in [-1, 1]
  caption  list[str]
Shards of tokens will carry `ids`, `residual`, `text` and `text_mask` in place of `image`.
"""

import logging
import random
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, cycle, islice, repeat
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dcar.data.order import Plan, plan_train, plan_validation, shard_order, shuffled, spans
from dcar.data.samples import BadSample, Sample, decode
from dcar.data.shards import DataError, Raw, count_samples, expand, read_shard
from dcar.data.transforms import ImageTransform

Batch = dict[str, Any]

SAMPLES_BEFORE_JUDGING = 100  # a rate of bad samples means nothing on fewer
REPLACEMENTS = 64  # earlier samples kept at hand for a batch that is bad as a whole

log = logging.getLogger(__name__)


class Slot(NamedTuple):
    """A place in an epoch's line; `raw` is None where the shard should have had a sample."""

    shard: int
    position: int
    raw: Raw | None


class ShardStream(IterableDataset):
    """Batches of shards. The order is a function of (seed, epoch, rank, worker) alone.

    urls: paths, globs or brace patterns of local tar shards; counts come from their manifest.
    shuffle: training order. Every rank sees the same number of full batches; a sample that cannot
        be used is replaced by its neighbour, so the count and the order stand.
        Without it every sample comes once, over all ranks and workers, and bad ones are left out.
    captioned: whether a sample without words is a bad one.
    max_bad: share of bad samples above which iteration ends with DataError.
    cache: keep resized pixels in memory (size x size x 3 bytes or a little more each).
    `skipped` counts the bad samples that a ShardLoader has met in this process, by reason.
    Raises FileNotFoundError for missing shards, ValueError for impossible settings.
    """

    def __init__(
        self,
        urls: str | Path | Iterable[str | Path],
        *,
        transform: ImageTransform,
        batch_size: int,
        seed: int,
        shuffle: bool,
        captioned: bool = True,
        buffer: int = 1000,
        max_bad: float = 0.01,
        cache: bool = False,
        rank: int | None = None,
        world: int | None = None,
    ):
        if batch_size < 1 or buffer < 1:
            raise ValueError(f"batch_size {batch_size} and buffer {buffer} must be at least 1")
        if (rank is None) != (world is None):
            raise ValueError(f"give both or neither of rank ({rank}) and world ({world})")
        if rank is not None and world is not None and not 0 <= rank < world:
            raise ValueError(f"rank {rank} is not in [0, world={world})")
        self.paths = expand(urls)
        self.counts = count_samples(self.paths)
        self.transform, self.batch_size, self.seed = transform, batch_size, seed
        self.shuffle, self.captioned, self.buffer = shuffle, captioned, buffer
        self.max_bad, self.cache = max_bad, cache
        self._place = None if rank is None or world is None else (rank, world)
        self.epoch, self.done = 0, 0  # where iteration starts: epoch, batches already taken
        self.skipped: Counter[str] = Counter()
        self.seen = 0
        self._raws: dict[int, list[Raw]] = {}
        self._samples: dict[tuple[int, int], Sample] = {}

    @property
    def place(self) -> tuple[int, int]:
        """(rank, world): as given, else the process group's, else (0, 1)."""
        if self._place is not None:
            return self._place
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized():
            return distributed.get_rank(), distributed.get_world_size()
        return 0, 1

    def plan(self, workers: int = 1) -> Plan:
        """This rank's piece of an epoch. Raises ValueError for fewer shards than readers."""
        rank, world = self.place
        readers = world * max(workers, 1)
        if len(self.paths) < readers:
            raise ValueError(
                f"{len(self.paths)} shards are fewer than {world} ranks x {max(workers, 1)} "
                "workers: use fewer workers or more shards"
            )
        make = plan_train if self.shuffle else plan_validation
        return make(sum(self.counts), self.batch_size, rank, world)

    def __iter__(self) -> Iterator[Batch]:
        """Batches from (`epoch`, `done`) to the end of the epoch, of this worker's lane.

        Besides its keys each batch holds `bad` (reasons and how often) and `slots` (samples tried),
        which ShardLoader takes out and counts.
        """
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        return self._batches(self.epoch, self.done, worker, workers)

    def _batches(self, epoch: int, done: int, worker: int, workers: int) -> Iterator[Batch]:
        # Worker 0 is asked first: after a resume it takes the lane whose turn it is.
        lane = (worker + done) % workers
        skip = len(range(lane, done, workers))
        slots = self._slots(epoch, lane, workers)
        recent: deque[Slot] = deque(maxlen=REPLACEMENTS)
        recent.extend(islice(slots, skip * self.batch_size))
        while group := list(islice(slots, self.batch_size)):
            yield self._batch(group, recent, epoch)
            recent.extend(group)

    def _slots(self, epoch: int, lane: int, lanes: int) -> Iterator[Slot]:
        first, stop = self.plan(lanes).lane(lane, lanes)
        if not self.shuffle:
            return self._read(range(len(self.paths)), first, stop)
        order = shard_order(len(self.paths), seed=self.seed, epoch=epoch)
        rng = random.Random(f"{self.seed}/{epoch}/{self.place[0]}/{lane}/buffer")
        return shuffled(self._read(order, first, stop), self.buffer, rng)

    def _read(self, order: Sequence[int], first: int, stop: int) -> Iterator[Slot]:
        """Exactly the slots [first, stop) of the line, whatever the shards really hold."""
        for span in spans(order, self.counts, first, stop):
            raws = islice(chain(self._shard(span.shard), repeat(None)), span.first, span.stop)
            for position, raw in enumerate(raws, span.first):
                yield Slot(span.shard, position, raw)

    def _shard(self, shard: int) -> Iterable[Raw]:
        if not self.cache:
            return self._stored(shard)
        if shard not in self._raws:
            self._raws[shard] = list(self._stored(shard))
        return self._raws[shard]

    def _stored(self, shard: int) -> Iterator[Raw]:
        """Samples of a shard up to where it breaks off, if it does."""
        try:
            yield from read_shard(self.paths[shard])
        except (DataError, OSError) as error:
            log.warning("the rest of a shard is lost: %s", error)

    def _batch(self, group: list[Slot], recent: Iterable[Slot], epoch: int) -> Batch:
        bad: Counter[str] = Counter()
        samples = [self._sample(slot, bad) for slot in group]
        good = [sample for sample in samples if sample is not None]
        if self.shuffle and len(good) < len(samples):
            good = self._replaced(samples, recent)
        images = [self._finish(sample, epoch) for sample in good]
        return {
            "key": [sample.key for sample in good],
            "image": torch.stack(images) if images else torch.empty(0),  # (B, 3, S, S)
            "caption": [sample.caption for sample in good],
            "bad": dict(bad),
            "slots": len(group),
        }

    def _replaced(self, samples: list[Sample | None], recent: Iterable[Slot]) -> list[Sample]:
        """Bad samples replaced by good ones of the same batch, or else by those just before it."""
        spare = [sample for sample in samples if sample is not None]
        for slot in reversed(list(recent)):
            if spare:
                break
            spare = [sample for sample in [self._sample(slot, Counter())] if sample is not None]
        if not spare:
            raise DataError(f"not one of {len(samples)} samples in a row could be used")
        spares = cycle(spare)
        return [next(spares) if sample is None else sample for sample in samples]

    def _sample(self, slot: Slot, bad: Counter[str]) -> Sample | None:
        place = (slot.shard, slot.position)
        if place in self._samples:
            return self._samples[place]
        try:
            if slot.raw is None:
                raise BadSample("lost with its shard")
            sample = decode(slot.raw, self.transform, captioned=self.captioned)
        except BadSample as reason:
            bad[str(reason)] += 1
            return None
        if self.cache:
            self._samples[place] = sample
        return sample

    def _finish(self, sample: Sample, epoch: int) -> Tensor:
        rng = random.Random(f"{self.seed}/{epoch}/{sample.key}")
        return self.transform.finish(sample.pixels, rng)  # (3, S, S)

    def count(self, batch: Batch) -> Batch:
        """Take `bad` and `slots` out of a batch. Raises DataError above `max_bad` of bad."""
        self.skipped.update(batch.pop("bad"))
        self.seen += batch.pop("slots")
        lost = sum(self.skipped.values())
        if self.seen >= SAMPLES_BEFORE_JUDGING and lost > self.max_bad * self.seen:
            reasons = ", ".join(f"{reason}: {times}" for reason, times in self.skipped.items())
            raise DataError(
                f"{lost} of {self.seen} samples could not be used, more than the limit of "
                f"{self.max_bad:.1%} ({reasons})"
            )
        return batch


class ShardLoader(DataLoader):
    """A DataLoader of a ShardStream that knows how far it has got.

    An iteration goes on where the last one stopped (validation streams start over) and ends with
    the epoch; the next one is the next epoch, so nobody has to set it. `state_dict` counts the
    batches handed out, not those that workers hold ready: after `load_state_dict` the next batch is
    the very one that would have come, whatever `num_workers` was ready to give. A state saved with
    other ranks, workers or batch size cannot be placed in the epoch: the rest of that epoch is left
    out, so no sample comes twice in it.
    """

    def __init__(self, stream: ShardStream, *, num_workers: int = 0, **options: Any):
        if stream.cache and num_workers > 0:
            raise ValueError(f"cache keeps images in this process: num_workers {num_workers} not 0")
        super().__init__(stream, batch_size=None, num_workers=num_workers, **options)
        self.stream = stream
        self._epoch, self._done, self._resumed = 0, 0, False

    def __len__(self) -> int:
        """Batches an epoch on this rank."""
        return self.stream.plan(self.num_workers).batches

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # a generator around theirs
        batches = len(self)
        if not (self.stream.shuffle or self._resumed):
            self._done = 0
        self._resumed = False
        self.stream.epoch, self.stream.done = self._epoch, self._done
        return self._count_out(super().__iter__(), batches)

    def _count_out(self, batches: Iterator[Batch], total: int) -> Iterator[Batch]:
        for batch in batches:
            self._done += 1
            if self._done == total:
                self._epoch, self._done = self._epoch + self.stream.shuffle, 0
            batch = self.stream.count(batch)
            if batch["key"]:
                yield batch

    def state_dict(self) -> dict[str, Any]:
        """{"epoch", "batches" handed out in it, "layout": [ranks, workers, batch size]}."""
        return {"epoch": self._epoch, "batches": self._done, "layout": self._layout()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._epoch, self._done = int(state["epoch"]), int(state["batches"])
        self._resumed = True
        layout = state.get("layout", self._layout())
        if self._done and layout != self._layout():
            log.warning(
                "data state of ranks, workers, batch size %s met with %s: the rest of epoch %d "
                "is left out",
                *(layout, self._layout(), self._epoch),
            )
            self._epoch, self._done = self._epoch + 1, 0

    def _layout(self) -> list[int]:
        return [self.stream.place[1], max(self.num_workers, 1), self.stream.batch_size]
