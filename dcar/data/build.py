"""Builds a folder of shards from a source: unit by unit, each on its own, stopped and gone on with.

A build killed at any moment goes on with the same settings to the same bytes. What it needs until
then lies in `.build` inside the folder; when it is gone, the build is finished.
"""

import importlib.metadata
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np

from dcar.data.build_folder import BuildFolder
from dcar.data.build_unit import (
    BuildTask,
    Part,
    build_unit,
    count,
    part_url,
    scan_unit,
    scan_url,
    show,
    unit_name,
)
from dcar.data.distributors import Distributor, Outcome, Task
from dcar.data.duplicates import check_distance, find_duplicates
from dcar.data.filters import DUPLICATE_KEY, NEAR_DUPLICATE
from dcar.data.shards import ShardEntry, write_manifest
from dcar.data.sources.source import Unit
from dcar.data.storage import exists, join
from dcar.data.wording import amount
from dcar.errors import DataError

log = logging.getLogger(__name__)
NAMED_FAILURES = 20
LOST = "lost with its archive"
Without = dict[int, str]  # position of a record in its unit -> why it is left out


class Progress(Protocol):
    """Told how a build goes on; images is None where the source cannot say how many there are."""

    def begin(self, what: str, units: int, images: int | None) -> None: ...

    def tick(self, images: int, size: int) -> None: ...

    def finished(self, outcome: Outcome) -> None: ...


@dataclass
class Tally:
    """What a split came to. dropped: number of samples left out, by reason; examples: some keys."""

    samples: int = 0
    shards: int = 0
    bytes: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, part: Part) -> None:
        self.shards += len(part.shards)
        for shard in part.shards:
            self.samples, self.bytes = self.samples + shard.samples, self.bytes + shard.bytes
        for reason, times in part.dropped.items():
            count(self.dropped, reason, times)
        for reason, keys in part.examples.items():
            show(self.examples, reason, keys)


@dataclass(frozen=True)
class Report:
    """What lies in the folder. found: it was there already, finished, and nothing was done."""

    splits: dict[str, Tally]
    found: bool = False


def left_out(parts: Sequence[Part], *, distance: int | None = None) -> list[Without]:
    """For each part of one split, in order: the kept records that repeat an earlier one.

    distance: in bits, of near-duplicates; for parts with hashes of pictures.
    """
    digests = _joined([part.digests for part in parts])
    why = np.zeros(len(digests), dtype=np.uint8)
    first = np.unique(digests, return_index=True)[1]
    why[np.setdiff1d(np.arange(len(digests)), first, assume_unique=True)] = 1
    if distance is not None:
        unheard = np.flatnonzero(why == 0)
        hashes = _joined([part.hashes for part in parts])[unheard]
        why[unheard[find_duplicates(hashes, distance=distance)]] = 2
    reasons = ("", DUPLICATE_KEY, NEAR_DUPLICATE)
    starts = np.cumsum([0, *(len(part.digests) for part in parts)])
    return [
        {
            part.positions[place]: reasons[why[start + place]]
            for place in np.flatnonzero(why[start:end]).tolist()
        }
        for part, start, end in zip(parts, starts, starts[1:], strict=False)
    ]


def _joined(arrays: Sequence[Any]) -> np.ndarray:
    return np.concatenate([np.array(each, dtype=np.uint64) for each in arrays])


def build(
    task: BuildTask,
    *,
    described: Mapping[str, Any],
    distributor: Distributor,
    progress: Progress,
    near_duplicates: int | None = None,
    skip_broken: bool = False,
) -> Report:
    """Build the folder `task.out`, or go on with it, or find it finished.

    described: name and settings of the source, plain values. near_duplicates: leave out pictures
    whose hash is within so many bits of an earlier one's of the split; the input is read twice.
    skip_broken: leave out the whole of a unit that cannot be read to its end, counted under LOST;
    a build that failed may go on with it.
    Raises ValueError where the folder holds other files or a build with other settings, DataError
    naming the units that failed, after the others were finished, and what the source raises.
    """
    settings = {
        "source": dict(described),
        "prefix": task.prefix,
        "samples_per_shard": task.samples_per_shard,
        "max_shard_bytes": task.max_shard_bytes,
        **asdict(task.filters),
        "near_duplicates": near_duplicates,
    }
    if near_duplicates is not None:
        check_distance(near_duplicates)
    folder = BuildFolder(task.out, task.prefix, settings=settings, versions=_versions())
    if folder.is_finished():
        splits = folder.finished_facts()["splits"]
        return Report({split: Tally(**tally) for split, tally in splits.items()}, found=True)
    with folder.locked():
        return _Build(task, folder, distributor, progress, near_duplicates, skip_broken).run()


@dataclass
class _Build:
    """The steps of a build, in the main process."""

    task: BuildTask
    folder: BuildFolder
    distributor: Distributor
    progress: Progress
    near_duplicates: int | None
    skip_broken: bool

    def run(self) -> Report:
        self.folder.open()
        try:
            self.task.source.prepare(join(self.task.work, "source"))
            units = self.task.source.units(self.task.samples_per_shard)
            self.folder.check_units(units)
            without = self._scan(units)
            todo = [(unit, without.get(unit_name(unit), {})) for unit in self.folder.unbuilt(units)]
            self._each("Building", build_unit, todo)
            if self.near_duplicates is None:  # otherwise the scans have told
                self._rebuild_repeated(units)
            self.folder.remove_unknown(units)
        finally:
            self.folder.sweep_partials()
        return self._finish(units)

    def _each(self, what: str, task: Task, arguments: Sequence[tuple[Any, ...]]) -> None:
        """Runs a task for each (unit, ...). Raises DataError naming those that failed."""
        if not arguments:
            return
        known = [unit.samples for unit, *_ in arguments]
        images = None if None in known else sum(samples or 0 for samples in known)
        self.progress.begin(what, len(arguments), images)
        items = [(self.task, *each) for each in arguments]
        failed: list[Outcome] = []
        with closing(self.distributor.run(task, items, self.progress.tick)) as outcomes:
            for outcome in outcomes:
                self.progress.finished(outcome)
                if outcome.error is not None:
                    failed.append(outcome)
        if self.skip_broken:
            units = {unit_name(unit): unit for unit, *_ in arguments}
            for outcome in (each for each in failed if each.broken):
                self._lose(units[outcome.name], outcome)
            failed = [outcome for outcome in failed if not outcome.broken]
        if failed:
            raise DataError(_failures(failed, len(items)))

    def _lose(self, unit: Unit, outcome: Outcome) -> None:
        """Goes on without a unit. Its length may be unknown: what was read of it is counted."""
        log.warning("%s is left out: %s", outcome.name, outcome.error)
        part = Part(dropped={LOST: unit.samples or max(outcome.images, 1)})
        part.save(part_url(self.task.work, unit))
        scan = scan_url(self.task.work, unit)
        if self.near_duplicates is not None and not exists(scan):
            part.save(scan)

    def _scan(self, units: Sequence[Unit]) -> dict[str, Without]:
        """What the pictures' hashes say is to be left out of each unit; nothing without them."""
        if self.near_duplicates is None:
            return {}
        todo = [(unit,) for unit in self.folder.unscanned(units)]
        self._each("Looking for duplicates", scan_unit, todo)
        return self._repeated(units, scan_url, self.near_duplicates)

    def _rebuild_repeated(self, units: Sequence[Unit]) -> None:
        """A key in two units shows only now; all but the first are built again without it."""
        without = self._repeated(units, part_url, None)
        again = [unit for unit in units if unit_name(unit) in without]
        self._each(
            "Leaving out repeated keys",
            build_unit,
            [(unit, without[unit_name(unit)]) for unit in again],
        )

    def _repeated(
        self, units: Sequence[Unit], url: Callable[[str, Unit], str], distance: int | None
    ) -> dict[str, Without]:
        without: dict[str, Without] = {}
        for split in {unit.split: None for unit in units}:
            these = [unit for unit in units if unit.split == split]
            parts = [Part.load(url(self.task.work, unit)) for unit in these]
            found = left_out(parts, distance=distance)
            without |= {unit_name(u): out for u, out in zip(these, found, strict=True) if out}
        return without

    def _finish(self, units: Sequence[Unit]) -> Report:
        """Writes the manifest and removes what only an unfinished build needs."""
        tallies: dict[str, Tally] = {unit.split: Tally() for unit in units}
        shards: dict[str, list[ShardEntry]] = {split: [] for split in tallies}
        sizes: dict[str, np.ndarray] = {}
        for unit in units:
            part = Part.load(part_url(self.task.work, unit))
            tallies[unit.split].add(part)
            shards[unit.split] += part.shards
            for shard, pixels in zip(part.shards, part.sizes, strict=True):
                sizes[shard.name] = np.array(pixels, dtype=np.uint16).reshape(-1, 2)
        if not sizes:
            dropped = ", ".join(
                f"{reason}: {count} of {split}"
                for split, tally in tallies.items()
                for reason, count in tally.dropped.items()
            )
            raise DataError(f"no sample is left to write; dropped: {dropped}")
        splits = {split: asdict(tally) for split, tally in tallies.items()}
        facts = {"build": self.folder.settings, "versions": self.folder.versions}
        write_manifest(self.task.out, shards, sizes=sizes, splits=splits, **facts)
        self.folder.close()
        return Report(tallies)


def _failures(failed: Sequence[Outcome], units: int) -> str:
    failed = sorted(failed, key=lambda outcome: outcome.name)
    named = [f"{outcome.name}: {outcome.error}" for outcome in failed[:NAMED_FAILURES]]
    more = [f"and {len(failed) - len(named)} more"] if len(failed) > len(named) else []
    broken = any(outcome.broken for outcome in failed)
    without = " (with skip_broken=true it goes on without those that are broken)" if broken else ""
    return (
        f"{len(failed)} of {amount(units, 'unit')} failed; the others are finished, and the same "
        f"command tries these again{without}: {'; '.join([*named, *more])}"
    )


def _versions() -> dict[str, str]:
    """Of what decides the bytes of pictures that are made anew."""
    packages = ("dcar-lightning", "pillow", "simplejpeg")
    return {package: importlib.metadata.version(package) for package in packages}
