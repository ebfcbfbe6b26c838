"""Sources run as a build runs them: records of all units, shards, a first training batch."""

import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dcar.data.batches import Batch
from dcar.data.build import Report, build
from dcar.data.build_unit import BuildTask
from dcar.data.distributors import Outcome, Task, Tick
from dcar.data.filters import Filters
from dcar.data.loader import ShardLoader
from dcar.data.sources.source import Record, Source
from dcar.data.stream import ShardStream
from dcar.data.transforms import ImageTransform


def records(source: Source, work: Path, samples_per_shard: int = 5) -> dict[str, list[Record]]:
    """All records by split, read as a build reads them: prepared, pickled, unit by unit."""
    source.prepare(str(work))
    found: dict[str, list[Record]] = {}
    for unit in source.units(samples_per_shard):
        copy: Source = pickle.loads(pickle.dumps(source))
        read = list(copy.read(pickle.loads(pickle.dumps(unit))))
        assert unit.samples is None or len(read) == unit.samples <= samples_per_shard
        found.setdefault(unit.split, []).extend(read)
    return found


class InThisProcess:
    """A distributor of builds for tests: one task after the other."""

    def run(
        self, task: Task, arguments: Sequence[tuple[Any, ...]], tick: Tick
    ) -> Iterator[Outcome]:
        return (task(*each) for each in arguments)


class Quiet:
    """Progress of builds for tests."""

    def begin(self, what: str, units: int, images: int | None) -> None: ...

    def tick(self, images: int, size: int) -> None: ...

    def finished(self, outcome: Outcome) -> None: ...


def build_shards(source: Source, out: Path) -> Report:
    """Shards `set-<split>-*.tar` of at most 5 samples."""
    task = BuildTask(
        source,
        str(out),
        prefix="set",
        samples_per_shard=5,
        max_shard_bytes=2**30,
        filters=Filters(),
    )
    return build(task, described={}, distributor=InThisProcess(), progress=Quiet())


def first_batch(out: Path, *, captioned: bool) -> Batch:
    """Four training samples of 32 x 32 pixels from built shards."""
    stream = ShardStream(
        out / "set-train-*.tar",
        transform=ImageTransform(32, crop="random"),
        batch_size=4,
        seed=0,
        shuffle=True,
        captioned=captioned,
        max_bad=0.0,
    )
    return next(iter(ShardLoader(stream)))
