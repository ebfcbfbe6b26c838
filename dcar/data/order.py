"""Which samples come when: pure functions of whole numbers, of seeds and of counts.

An epoch is a line of samples: the shards in that epoch's order, laid end to end. The line is cut
into equal lanes, one a rank, and in each lane a window of samples at a time is shuffled. Number i
of the epoch is the next sample of lane i % lanes: the order knows of no ranks and no workers, so
whoever takes it up at number i, with however many ranks, repeats nothing and leaves nothing out.
"""

import random
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple, Protocol

import numpy as np


class Place(NamedTuple):
    """Where a sample lies: data set of a mixture, shard of the set, position in the shard."""

    shard: int
    position: int
    data_set: int = 0


class Span(NamedTuple):
    """Samples [first, stop) of a shard of a data set of a mixture."""

    shard: int
    first: int
    stop: int
    data_set: int = 0


class Unit(NamedTuple):
    """What an order counts: one sample, or a batch of pictures of one (height, width)."""

    places: list[Place]
    shape: tuple[int, int] | None = None


class Order(Protocol):
    """size: units an epoch. samples: in each unit."""

    size: int
    samples: int

    def unit(self, epoch: int, number: int) -> Unit:
        """Unit `number` of the epoch."""

    def ahead(self, epoch: int, number: int) -> list[Span]:
        """What comes after the window that this unit is in."""


def permutation(count: int, key: str) -> "array[int]":
    """Of range(count); the same for the same key on every machine and Python version."""
    order = array("I", range(count))
    random.Random(key).shuffle(order)
    return order


class Line:
    """Shards in some order, laid end to end."""

    def __init__(self, counts: Sequence[int], order: Sequence[int]):
        self.order = order
        self.starts = list(accumulate((counts[shard] for shard in order), initial=0))

    def place(self, number: int) -> Place:
        at = bisect_right(self.starts, number) - 1
        return Place(self.order[at], number - self.starts[at])

    def spans(self, first: int, stop: int) -> list[Span]:
        """The pieces of shards that make numbers [first, stop)."""
        found, stop = [], min(stop, self.starts[-1])
        while first < stop:
            shard, position = self.place(first)[:2]
            length = min(stop, self.starts[bisect_right(self.starts, first)]) - first
            found.append(Span(shard, position, position + length))
            first += length
        return found


class SequentialOrder:
    """Every sample once, as the shards lie: for validation."""

    samples = 1

    def __init__(self, counts: Sequence[int]):
        self.line = Line(counts, range(len(counts)))
        self.size = sum(counts)

    def unit(self, epoch: int, number: int) -> Unit:
        return Unit([self.line.place(number)])

    def ahead(self, epoch: int, number: int) -> list[Span]:
        here = self.line.place(number)
        stop = self.line.starts[here.shard + 1]
        return self.line.spans(stop, stop + 1)


class ShuffledOrder:
    """Lanes of a line, shuffled a window at a time (see the head of this file).

    Up to lanes - 1 samples of an epoch are left out, others each time.
    """

    samples = 1

    def __init__(self, counts: Sequence[int], *, seed: str, window: int, lanes: int):
        self.counts, self.seed, self.window, self.lanes = list(counts), seed, window, lanes
        self.lane_size = sum(counts) // lanes
        self.size = self.lane_size * lanes
        self._epoch, self._line = -1, Line([], [])
        self._windows: dict[int, tuple[str, array[int]]] = {}  # the latest of each lane

    def line(self, epoch: int) -> Line:
        if epoch != self._epoch:
            order = permutation(len(self.counts), f"{self.seed}/{epoch}/shards")
            self._epoch, self._line = epoch, Line(self.counts, order)
        return self._line

    def unit(self, epoch: int, number: int) -> Unit:
        step, lane = divmod(number, self.lanes)
        window, within = divmod(step, self.window)
        first = window * self.window
        moved = self._moved(lane, f"{epoch}/{lane}/{window}", first)[within]
        return Unit([self.line(epoch).place(lane * self.lane_size + first + moved)])

    def _moved(self, lane: int, key: str, first: int) -> "array[int]":
        """How the window that begins at `first` in its lane is shuffled."""
        if self._windows.get(lane, ("",))[0] != key:
            length = min(self.window, self.lane_size - first)
            self._windows[lane] = key, permutation(length, f"{self.seed}/{key}")
        return self._windows[lane][1]

    def ahead(self, epoch: int, number: int) -> list[Span]:
        step, lane = divmod(number, self.lanes)
        first = (step // self.window + 1) * self.window
        stop, start = min(first + self.window, self.lane_size), lane * self.lane_size
        return self.line(epoch).spans(start + first, start + stop)


class BucketOrder:
    """Units are batches of pictures of one shape, in the order in which a batch gets full.

    The samples come as ShuffledOrder with one lane gives them. The last ones of each bucket, too
    few for a batch, are left out of an epoch, others each time.
    buckets: of each shard, the bucket of each sample. shapes: (height, width) of each bucket.
    """

    def __init__(
        self,
        buckets: Sequence[np.ndarray],
        shapes: Sequence[tuple[int, int]],
        *,
        batch_size: int,
        seed: str,
        window: int,
    ):
        self.buckets, self.shapes, self.samples = buckets, shapes, batch_size
        counts = [len(shard) for shard in buckets]
        self.inner = ShuffledOrder(counts, seed=seed, window=window, lanes=1)
        filled = np.zeros(len(shapes), np.int64)
        for shard in buckets:
            filled += np.bincount(shard, minlength=len(shapes))
        self.size = int((filled // batch_size).sum())
        self._epoch, self._batches = -1, np.zeros((0, batch_size), np.int64)

    def unit(self, epoch: int, number: int) -> Unit:
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._make(epoch)
        line = self.inner.line(epoch)
        places = [line.place(int(at)) for at in self._batches[number]]
        bucket = self.buckets[places[0].shard][places[0].position]
        return Unit(places, self.shapes[int(bucket)])

    def ahead(self, epoch: int, number: int) -> list[Span]:
        return self.inner.ahead(epoch, number * self.samples)

    def _make(self, epoch: int) -> np.ndarray:
        """Numbers on the epoch's line, (batches, batch_size)."""
        order = self._moved(epoch)  # (samples,)
        line = self.inner.line(epoch)
        bucket = np.concatenate([self.buckets[shard] for shard in line.order])[order]
        batches: list[tuple[int, np.ndarray]] = []
        for which in range(len(self.shapes)):
            own = np.flatnonzero(bucket == which)
            full = own[: len(own) // self.samples * self.samples].reshape(-1, self.samples)
            batches += [(int(batch[-1]), order[batch]) for batch in full]  # full with its last one
        batches.sort(key=lambda pair: pair[0])
        return np.stack([batch for _, batch in batches])

    def _moved(self, epoch: int) -> np.ndarray:
        size, window, parts = self.inner.size, self.inner.window, []
        for number, first in enumerate(range(0, size, window)):
            length = min(window, size - first)
            key = f"{self.inner.seed}/{epoch}/0/{number}"
            parts.append(first + np.array(permutation(length, key), np.int64))
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)


PATTERN = 1024  # groups after which the choice of data sets repeats


def turns(shares: np.ndarray) -> np.ndarray:
    """Whose turn it is, (PATTERN,): always of the set that is furthest behind its share."""
    taken, chosen = np.zeros(len(shares), np.int64), []
    for turn in range(1, PATTERN + 1):
        which = int(np.argmax(shares * turn - taken))
        taken[which] += 1
        chosen.append(which)
    return np.array(chosen)


class MixedOrder:
    """Several orders taken in turns by weight, each going through epochs of its own.

    The choice is made for a group of one unit a lane, so lane and rank stay together. size: units
    in an epoch of the mixture. Raises ValueError for a weight too small to be chosen.
    """

    def __init__(self, orders: Sequence[Order], weights: Sequence[float], *, lanes: int, size: int):
        if min(weights) <= 0 or min(weights) / sum(weights) < 1 / PATTERN:
            raise ValueError(f"weights {list(weights)}: each must be more than 1/{PATTERN} of all")
        if min(order.size for order in orders) == 0:
            raise ValueError(
                f"a data set of the mixture is too small for {lanes} ranks: "
                f"{[order.size for order in orders]} of each can be used"
            )
        if len({order.samples for order in orders}) != 1:
            raise ValueError("a mixture has buckets in all of its data sets or in none")
        self.orders, self.lanes = orders, lanes
        self.samples, self.size = orders[0].samples, size // lanes * lanes
        self.choice = turns(np.array(weights) / sum(weights))
        taken = np.eye(len(orders), dtype=np.int64)[self.choice]  # (PATTERN, data sets)
        self.before = np.cumsum(taken, axis=0) - taken
        self.period = taken.sum(axis=0)

    def unit(self, epoch: int, number: int) -> Unit:
        which, own_epoch, own_number = self._own(epoch, number)
        unit = self.orders[which].unit(own_epoch, own_number)
        return unit._replace(places=[place._replace(data_set=which) for place in unit.places])

    def ahead(self, epoch: int, number: int) -> list[Span]:
        which, own_epoch, own_number = self._own(epoch, number)
        spans = self.orders[which].ahead(own_epoch, own_number)
        return [span._replace(data_set=which) for span in spans]

    def _own(self, epoch: int, number: int) -> tuple[int, int, int]:
        """(data set, its own epoch, number in it)."""
        group, lane = divmod(epoch * self.size + number, self.lanes)
        cycle, turn = divmod(group, PATTERN)
        which = int(self.choice[turn])
        own = int(cycle * self.period[which] + self.before[turn, which]) * self.lanes + lane
        return which, *divmod(own, self.orders[which].size)


@dataclass(frozen=True)
class Share:
    """One rank's batches of the units [start, stop): batch b takes the next of every rank's turn.

    Raises ValueError for a training that is left without a batch.
    """

    start: int
    stop: int
    rank: int
    world: int
    units: int  # in a batch

    @property
    def batches(self) -> int:
        """Full ones, equally many on every rank."""
        return max(self.stop - self.start, 0) // (self.units * self.world)

    def numbers(self, batch: int) -> list[int]:
        """The units of this rank's batch number `batch`."""
        first = self.start + batch * self.units * self.world + self.rank
        return list(range(first, first + self.units * self.world, self.world))

    def others(self, batch: int) -> Iterator[int]:
        """Units of this rank's turn around that batch, to put in the place of bad ones.

        First its neighbours, then ever further away: a lost shard is thousands of units long.
        """
        first, last = self.numbers(batch)[0], self.numbers(batch)[-1]
        distance = 1
        while distance * self.world <= self.stop:
            before, after = first - distance * self.world, last + distance * self.world
            yield from (number for number in (before, after) if 0 <= number < self.stop)
            distance += 1 + distance // 32 * 16


@dataclass(frozen=True)
class Slice:
    """One rank's batches in validation: a connected piece, every unit once over all ranks."""

    total: int
    rank: int
    world: int
    units: int

    @property
    def first(self) -> int:
        return self.total * self.rank // self.world

    @property
    def last(self) -> int:
        return self.total * (self.rank + 1) // self.world

    @property
    def batches(self) -> int:
        return -(-(self.last - self.first) // self.units)

    def numbers(self, batch: int) -> list[int]:
        first = self.first + batch * self.units
        return list(range(first, min(first + self.units, self.last)))
