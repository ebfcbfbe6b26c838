"""What tests of the builder share: pictures, a source of given records, a build in one process."""

import io
import os
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dcar.data.build import Report, build
from dcar.data.build_unit import BuildTask
from dcar.data.distributors import Distributor, Outcome, Task, Tick
from dcar.data.filters import Filters
from dcar.data.index import read_shard
from dcar.data.members import Raw
from dcar.data.sources.source import Record, Unit
from dcar.errors import DataError


def picture(seed: int, size: tuple[int, int] = (40, 30), kind: str = "JPEG") -> bytes:
    """A file of soft noise, unlike that of any other seed. size: (width, height)."""
    noise = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(file, kind, quality=90)
    return file.getvalue()


def record(seed: int, **changes: Any) -> Record:
    fields = {"key": f"k{seed:03d}", "image": picture(seed), "caption": f"words {seed}"}
    return Record(**{**fields, **changes})


@dataclass
class GivenSource:
    """Units of given records. broken: (path, number): while the path is there, the unit of that
    number breaks off after its records."""

    records: list[list[Record]]
    split: str = "train"
    streamed: bool = False
    captioned: bool = True
    broken: dict[int, str] = field(default_factory=dict)

    def prepare(self, work: str) -> None:
        pass

    def units(self, samples_per_shard: int) -> list[Unit]:
        return [
            Unit(self.split, number, None if self.streamed else len(held), number)
            for number, held in enumerate(self.records)
        ]

    def read(self, unit: Unit) -> Iterator[Record]:
        yield from self.records[unit.number]
        if Path(self.broken.get(unit.number, "/nowhere")).exists():
            raise DataError(f"{self.broken[unit.number]}: breaks off")


@dataclass
class SlowSource(GivenSource):
    """Takes a while for each record and leaves a file in `started` whenever a unit is begun."""

    started: str = ""

    def read(self, unit: Unit) -> Iterator[Record]:
        (Path(self.started) / f"{unit.number}-{os.getpid()}").touch()
        for each in super().read(unit):
            time.sleep(0.4)
            yield each


class OneProcess:
    """A distributor that calls each task in turn."""

    def run(
        self, task: Task, arguments: Sequence[tuple[Any, ...]], tick: Tick
    ) -> Generator[Outcome, None, None]:
        for each in arguments:
            yield task(*each)


class Silent:
    """Progress that nobody sees; names: of the units that were finished, in order."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def begin(self, what: str, units: int, images: int | None) -> None:
        pass

    def tick(self, images: int, size: int) -> None:
        pass

    def finished(self, outcome: Outcome) -> None:
        self.names.append(outcome.name)


def task_of(source: Any, out: str | Path, **changes: Any) -> BuildTask:
    settings = {"samples_per_shard": 100, "max_shard_bytes": 10**9, "filters": Filters()}
    return BuildTask(source, str(out), **{"prefix": "toy", **settings, **changes})


def built(
    source: Any,
    out: str | Path,
    *,
    distributor: Distributor | None = None,
    near_duplicates: int | None = None,
    skip_broken: bool = False,
    progress: Silent | None = None,
    **changes: Any,
) -> Report:
    return build(
        task_of(source, out, **changes),
        described={"class": "Given"},
        distributor=distributor or OneProcess(),
        progress=progress or Silent(),
        near_duplicates=near_duplicates,
        skip_broken=skip_broken,
    )


def samples_of(folder: Path, pattern: str = "*.tar") -> dict[str, Raw]:
    """Samples of all shards by key, which must not repeat."""
    found = [raw for path in sorted(folder.glob(pattern)) for raw in read_shard(path)]
    by_key = {str(raw["__key__"]): raw for raw in found}
    assert len(by_key) == len(found)
    return by_key


def all_bytes(folder: Path) -> Mapping[str, bytes]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
