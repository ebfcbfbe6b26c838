"""Shards to batches (their keys: `batches.py`), in an order that is stopped and taken up exactly.

Samples are read one by one from where an index says they lie, so the order (`order.py`) is free:
no reader holds a buffer, skips what others read, or depends on how many others there are.
"""

import hashlib
import logging
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from dcar.data.batches import Batch, collate
from dcar.data.buckets import Buckets
from dcar.data.members import BadSample
from dcar.data.order import (
    BucketOrder,
    MixedOrder,
    Order,
    Place,
    SequentialOrder,
    Share,
    ShuffledOrder,
    Slice,
    Span,
)
from dcar.data.samples import OWN, Sample, cut_caption, decode
from dcar.data.shard_set import ShardSet
from dcar.data.storage import name_of
from dcar.data.transforms import ImageTransform
from dcar.data.wording import amount
from dcar.errors import DataError

SAMPLES_BEFORE_JUDGING = 100  # a rate of bad samples means nothing on fewer
MANY_SHARDS = 256  # open at once

log = logging.getLogger(__name__)


@dataclass
class Part:
    """One data set of a mixture; samples are drawn in proportion to the weights."""

    data: ShardSet
    weight: float = 1.0


class ShardStream(IterableDataset):
    """Batches of shards. The order is a function of (seed, epoch, lanes) alone (`order.py`).

    urls: paths, globs, brace patterns or URLs of shards (or a ShardSet, for its own options), or
    mixture: several sets by name, each with a weight.
    shuffle: training order. Every rank sees the same number of full batches; a sample that cannot
        be used is replaced by its neighbour, so the count and the order stand.
        Without it every sample comes once, over all ranks and workers, and bad ones are left out.
    buffer: samples that are shuffled together, besides the shuffling of the shards.
    captioned: whether a sample without words is a bad one.
    caption_weights: how often each caption of a picture is drawn, by name; "own" is the shard's.
    cut_captions: share of captions that end early, at one of their commas, so that a model learns
        short prompts too; anew every time. Nothing for shards that hold their text encoded.
    max_bad: share of bad samples above which iteration ends with DataError.
    cache: keep resized pixels in memory (size x size x 3 bytes or a little more each).
    buckets: batches of one aspect ratio each, in place of squares.
    samples_per_epoch: of a mixture; as many as its sets hold together by default.
    `skipped` counts the bad samples that a ShardLoader has met in this process, by reason.
    Raises FileNotFoundError for missing shards, ValueError for impossible settings.
    """

    def __init__(
        self,
        urls: ShardSet | str | Path | Iterable[str | Path] | None = None,
        *,
        transform: ImageTransform,
        batch_size: int,
        seed: int,
        shuffle: bool,
        mixture: Mapping[str, Part] | None = None,
        captioned: bool = True,
        caption_weights: Mapping[str, float] | None = None,
        cut_captions: float = 0.0,
        buffer: int = 1000,
        max_bad: float = 0.01,
        cache: bool = False,
        buckets: Buckets | None = None,
        samples_per_epoch: int | None = None,
        rank: int | None = None,
        world: int | None = None,
    ):
        if batch_size < 1 or buffer < 1:
            raise ValueError(f"batch_size {batch_size} and buffer {buffer} must be at least 1")
        if (rank is None) != (world is None):
            raise ValueError(f"give both or neither of rank ({rank}) and world ({world})")
        if rank is not None and world is not None and not 0 <= rank < world:
            raise ValueError(f"rank {rank} is not in [0, world={world})")
        if not 0 <= cut_captions <= 1:
            raise ValueError(f"cut_captions {cut_captions} must be in [0, 1]")
        self.parts = parts_of(urls, mixture)
        self._check_weights(caption_weights or {})
        if len(self.parts) > 1 and not shuffle:
            raise ValueError("a mixture is for training: without shuffle, give urls")
        if len(self.parts) == 1 and samples_per_epoch is not None:
            raise ValueError(f"samples_per_epoch {samples_per_epoch} is for a mixture of sets")
        self.transform, self.batch_size, self.seed = transform, batch_size, seed
        self.shuffle, self.captioned, self.buffer = shuffle, captioned, buffer
        self.caption_weights = None if caption_weights is None else dict(caption_weights)
        self.cut_captions = cut_captions
        self.max_bad, self.cache, self.buckets = max_bad, cache, buckets
        self.samples_per_epoch = samples_per_epoch
        self._place = None if rank is None or world is None else (rank, world)
        self.epoch, self.lanes, self.start, self.done = 0, 0, 0, 0  # where iteration starts
        self.skipped: Counter[str] = Counter()
        self.seen = 0
        self._orders: dict[int, Order] = {}
        self._samples: dict[tuple[Place, tuple[int, int] | None], Sample] = {}
        self._announced: dict[int, list[Span]] = {}  # by data set

    def _check_weights(self, weights: Mapping[str, float]) -> None:
        known = {OWN}.union(*(data.caption_names() for data in self.sets if weights))
        if unknown := sorted(set(weights) - known):
            raise ValueError(f"caption_weights names {unknown}; there is {sorted(known)}")

    @property
    def sets(self) -> list[ShardSet]:
        return [part.data for part in self.parts.values()]

    @property
    def counts(self) -> list[int]:
        """Samples of each shard, data set after data set."""
        return [count for data in self.sets for count in data.counts]

    @property
    def place(self) -> tuple[int, int]:
        """(rank, world): as given, else the process group's, else (0, 1)."""
        if self._place is not None:
            return self._place
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized():
            return distributed.get_rank(), distributed.get_world_size()
        return 0, 1

    def settle(self) -> None:
        """Keep rank and world as they are: a worker that is spawned, not forked, cannot ask."""
        self._place = self.place

    def order(self, lanes: int) -> Order:
        """Of a training with as many lanes (the ranks that began the epoch), or of validation."""
        if lanes not in self._orders:
            self._orders[lanes] = self._mixed(lanes) if self.shuffle else self._sequential()
            for data in self.sets:
                data.keep_open(self._shards_at_once(data, lanes))
        return self._orders[lanes]

    def _shards_at_once(self, data: ShardSet, lanes: int) -> int:
        """Shards that a window of each of this rank's lanes, and the next one, are spread over."""
        if self.buckets:
            return MANY_SHARDS  # a rare bucket's batch is gathered from far and wide
        each = max(1, sum(data.counts) // len(data.counts))
        return -(-lanes // self.place[1]) * (2 * self.buffer // each + 3)

    def signature(self) -> str:
        """Changes with all that the order of samples depends on."""
        sets = [
            (
                name,
                part.weight,
                list(zip(map(name_of, part.data.urls), part.data.counts, strict=True)),
            )
            for name, part in self.parts.items()
        ]
        shapes = (self.buckets.shapes, self.batch_size) if self.buckets else None
        facts = (self.seed, self.shuffle, self.buffer, self.samples_per_epoch, shapes, sets)
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    def _sequential(self) -> Order:
        if self.buckets:
            raise ValueError("buckets are for training: validate on squares")
        return SequentialOrder(self.counts)

    def _mixed(self, lanes: int) -> Order:
        orders = [self._shuffled(name, part.data, lanes) for name, part in self.parts.items()]
        if len(orders) == 1:
            return orders[0]
        size = sum(order.size for order in orders)
        if self.samples_per_epoch is not None:
            size = self.samples_per_epoch // orders[0].samples
        weights = [part.weight for part in self.parts.values()]
        return MixedOrder(orders, weights, lanes=lanes, size=size)

    def _shuffled(self, name: str, data: ShardSet, lanes: int) -> Order:
        seed = f"{self.seed}/{name}"
        if self.buckets is None:
            return ShuffledOrder(data.counts, seed=seed, window=self.buffer, lanes=lanes)
        assigned = [self.buckets.assign(sizes) for sizes in data.sizes()]
        return BucketOrder(
            assigned,
            self.buckets.shapes,
            batch_size=self.batch_size,
            seed=seed,
            window=self.buffer,
        )

    def share(self, taken: int = 0, lanes: int = 0) -> Share | Slice:
        """This rank's batches of an epoch of which `taken` units have been used.

        Raises ValueError where a training would have none in a whole epoch.
        """
        rank, world = self.place
        order = self.order(lanes or world)
        units = -(-self.batch_size // order.samples)
        if not self.shuffle:
            if 0 < order.size < world:
                held = amount(order.size, "validation sample")
                raise ValueError(f"{held} for {world} ranks: each needs at least one")
            return Slice(order.size, rank, world, units)
        if order.size < units * world:
            total = self.samples_per_epoch or sum(self.counts)
            raise ValueError(
                f"{total} samples cannot fill one batch of {self.batch_size} "
                f"on each of {amount(world, 'rank')}: give a smaller batch_size"
            )
        return Share(taken, order.size, rank, world, units)

    def __iter__(self) -> Iterator[Batch]:
        """Batches from (`epoch`, `start`, `done`) to the end of the epoch, shared out in turns.

        Besides its keys each batch holds `bad` (reasons and how often) and `slots` (samples tried),
        which ShardLoader takes out and counts.
        """
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        for data in self.sets:
            data.forget_losses()
        self._announced.clear()
        share, order = self.share(self.start, self.lanes), self.order(self.lanes or self.place[1])
        batches = range(self.done + worker, share.batches, workers)
        return self._batches(order, share, self.epoch, batches)

    def _batches(
        self, order: Order, share: Share | Slice, epoch: int, batches: range
    ) -> Iterator[Batch]:
        for batch in batches:
            self._announce(order.ahead(epoch, share.numbers(batch)[0]))
            yield self._batch(order, share, epoch, batch)

    def _announce(self, spans: list[Span]) -> None:
        """Let stores and the system fetch what comes after the window that is being read."""
        for span in spans:
            if span not in self._announced.get(span.data_set, []):
                self.sets[span.data_set].prepare(span.shard, span.first, span.stop)
        self._announced |= {span.data_set: spans for span in spans}

    def _batch(self, order: Order, share: Share | Slice, epoch: int, batch: int) -> Batch:
        units = [(number, order.unit(epoch, number)) for number in share.numbers(batch)]
        numbers = [number for number, unit in units for _ in unit.places]
        places, shape = [place for _, unit in units for place in unit.places], units[0][1].shape
        bad: Counter[str] = Counter()
        samples = [self._sample(place, shape, bad) for place in places]
        if isinstance(share, Share) and None in samples:
            others = (order.unit(epoch, number) for number in share.others(batch))
            samples[:] = self._replaced(
                samples, shape, (place for unit in others for place in unit.places)
            )
        drawn = [  # by number too: in a mixture's epoch a small set comes more than once
            (sample, random.Random(f"{self.seed}/{epoch}/{number}/{sample.key}"))
            for number, sample in zip(numbers, samples, strict=True)
            if sample is not None
        ]
        good = [sample for sample, _ in drawn]
        images = [self._cut(*pair, shape) for pair in drawn]
        captions = [self._caption(*pair) for pair in drawn]
        batch_of = collate(good, [image for image in images if image is not None], captions)
        return batch_of | {"bad": dict(bad), "slots": len(places)}

    def _replaced(
        self, samples: list[Sample | None], shape: tuple[int, int] | None, others: Iterable[Place]
    ) -> list[Sample]:
        """Bad samples replaced by good ones of the same batch, or else by one from near it."""
        spare = [sample for sample in samples if sample is not None]
        for place in others:
            if spare:
                break
            spare = [s for s in [self._sample(place, shape, Counter())] if s is not None]
        if not spare:
            raise DataError(f"not one of {len(samples)} samples in a row could be used")
        spares = cycle(spare)
        return [next(spares) if sample is None else sample for sample in samples]

    def _sample(
        self, place: Place, shape: tuple[int, int] | None, bad: Counter[str]
    ) -> Sample | None:
        if (place, shape) in self._samples:
            return self._samples[place, shape]
        data = self.sets[place.data_set]
        try:
            raw = data.read(place.shard, place.position)
            captions = data.captions(place.shard, str(raw["__key__"]))
            sample = decode(
                raw, self.transform, captioned=self.captioned, shape=shape, captions=captions
            )
        except BadSample as reason:
            bad[str(reason)] += 1
            return None
        sample = replace(sample, place="/".join(map(str, place)))
        if self.cache:
            self._samples[place, shape] = sample
        return sample

    def _cut(
        self, sample: Sample, rng: random.Random, shape: tuple[int, int] | None
    ) -> Tensor | None:
        """uint8 (3, S, S), or (3, height, width) of a bucket; None for tokens."""
        if sample.pixels is None:
            return None
        return self.transform.cut(sample.pixels, rng, shape)

    def _caption(self, sample: Sample, rng: random.Random) -> str:
        caption = sample.caption
        if sample.captions:
            weights = self.caption_weights or dict.fromkeys(sample.captions, 1.0)
            caption = sample.choose_caption(weights, rng)
        if self.cut_captions and rng.random() < self.cut_captions:
            return cut_caption(caption, rng)
        return caption

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


def parts_of(
    urls: ShardSet | str | Path | Iterable[str | Path] | None, mixture: Mapping[str, Part] | None
) -> dict[str, Part]:
    """The data sets of a stream by name. Raises ValueError unless there is one of the two."""
    if (urls is None) == (not mixture):
        raise ValueError("give one of urls and mixture")
    if urls is None:
        return dict(mixture or {})
    return {"": Part(urls if isinstance(urls, ShardSet) else ShardSet(urls))}
