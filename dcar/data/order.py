"""Which samples, in which order, each reader of an epoch gets: pure functions of whole numbers.

An epoch is one long line of samples: the shards in that epoch's order, laid end to end. Every rank
takes an equal piece of the line, and every worker (lane) of the rank a piece of that in whole
batches. So ranks agree on the number of batches however uneven the shards are, and no sample is
taken twice.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class Span:
    """Samples [first, stop) of one shard."""

    shard: int
    first: int
    stop: int


@dataclass(frozen=True)
class Plan:
    """One rank's piece of an epoch: samples [first, stop) of the line, in batches."""

    first: int
    stop: int
    batch_size: int

    @property
    def batches(self) -> int:
        return -(-(self.stop - self.first) // self.batch_size)

    def lane(self, worker: int, workers: int) -> tuple[int, int]:
        """The worker's own samples [first, stop). It makes batches worker, worker + workers, ...

        Earlier workers never have fewer batches than later ones, so taking one batch from each in
        turn never waits on a worker that has run out.
        """
        before = sum(len(range(other, self.batches, workers)) for other in range(worker))
        own = len(range(worker, self.batches, workers))
        first = self.first + before * self.batch_size
        return min(first, self.stop), min(first + own * self.batch_size, self.stop)


def plan_train(samples: int, batch_size: int, rank: int, world: int) -> Plan:
    """Full batches only, equally many on every rank. Raises ValueError if that is none."""
    batches = samples // (batch_size * world)
    if batches == 0:
        raise ValueError(
            f"{samples} samples cannot fill one batch of {batch_size} on each of {world} ranks"
        )
    share = batches * batch_size
    return Plan(rank * share, (rank + 1) * share, batch_size)


def plan_validation(samples: int, batch_size: int, rank: int, world: int) -> Plan:
    """Every sample once over all ranks; the last batch of a rank may be short."""
    return Plan(samples * rank // world, samples * (rank + 1) // world, batch_size)


def shard_order(shards: int, *, seed: int, epoch: int) -> list[int]:
    """The epoch's permutation of the shards, the same on every rank and worker."""
    order = list(range(shards))
    random.Random(f"{seed}/{epoch}/shards").shuffle(order)
    return order


def spans(order: Sequence[int], counts: Sequence[int], first: int, stop: int) -> Iterator[Span]:
    """The pieces of shards that make samples [first, stop) of the line."""
    start = 0
    for shard in order:
        low, high = max(first - start, 0), min(stop - start, counts[shard])
        if low < high:
            yield Span(shard, low, high)
        start += counts[shard]


def shuffled(items: Iterable[Item], size: int, rng: random.Random) -> Iterator[Item]:
    """Shuffle a stream through a buffer of `size` items."""
    buffer: list[Item] = []
    for item in items:
        if len(buffer) < size:
            buffer.append(item)
            continue
        place = rng.randrange(size)
        buffer[place], item = item, buffer[place]
        yield item
    rng.shuffle(buffer)
    yield from buffer
