"""The task of `--exp=data/build`: the pictures of a source to shards, or what that would give."""

import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dcar.data.build import Report
from dcar.data.build import build as build_shards
from dcar.data.build_unit import BuildTask, UnitReader, make_sample, unit_name
from dcar.data.distributors import Distributor, Processes, RayCluster
from dcar.data.filters import Filters
from dcar.data.sources.source import Record, Source, Unit
from dcar.data.storage import is_remote
from dcar.data.wording import amount
from dcar.errors import DataError
from experiments.build_progress import ProgressLine, reasons_text, size_text, tally_text
from experiments.components import build as instantiate
from experiments.config import ConfigError, check_local, nearest
from experiments.run import RunOptions

DISTRIBUTORS = ("processes", "ray")
NUMBERS: dict[str, type | tuple[type, ...]] = {
    "resize": int,
    "near_duplicates": int,
    "processes": int,
    "max_aspect": (int, float),
}
LOOKED_AT = 64  # records that an estimate rests on


def absolute(path: str) -> str:
    return path if is_remote(path) else str(Path(path).absolute())


def make_distributor(config: DictConfig) -> Distributor:
    if config.distributor not in DISTRIBUTORS:
        near = nearest(config.distributor, DISTRIBUTORS)
        raise ConfigError(f"distributor={config.distributor} is none of {DISTRIBUTORS}{near}")
    if config.distributor == "ray":
        return RayCluster(config.ray_address)
    return Processes(config.processes)


def make_task(config: DictConfig) -> BuildTask:
    """Raises ConfigError for values that are impossible."""
    for key, kind in NUMBERS.items():
        value = config[key]
        if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
            raise ConfigError(f"{key}={value}: expected a number")
    if not isinstance(config.skip_broken, bool):
        raise ConfigError(f"skip_broken={config.skip_broken}: expected true or false")
    source = config.source._target_.split(".")[-2].removesuffix("_shards")  # by its module
    prefix = source if config.prefix is None else str(config.prefix)
    if not prefix.replace("-", "").replace("_", "").isalnum():
        raise ConfigError(f"prefix={prefix}: letters, digits, '-' and '_'")
    return BuildTask(
        source=instantiate(config.source),
        out=absolute(str(config.out)),
        prefix=prefix,
        samples_per_shard=config.samples_per_shard,
        max_shard_bytes=config.max_shard_bytes,
        filters=Filters(**{field.name: config[field.name] for field in fields(Filters)}),
    )


def check_places(config: DictConfig) -> None:
    """Raises ConfigError for an `out` that is read too, or that cannot be written."""
    if absolute(str(config.out)).rstrip("/") == config["in"].rstrip("/"):
        raise ConfigError(f"out={config.out} is the folder that is read: give another one")
    is_within = absolute(str(config.out)).startswith(config["in"].rstrip("/") + "/")
    if is_within and config.source._target_.endswith(".WebDatasetShards"):
        raise ConfigError(
            f"out={config.out} lies within the folder that is read, and what is written there "
            "would be read the next time: give another one"
        )
    check_local(str(config.out), is_folder=True)


def build(config: DictConfig, options: RunOptions) -> Report | None:
    """Build shards, go on with a build, or (dry run) say what would be built.

    Raises ConfigError and ValueError for impossible settings and for a folder with another build,
    FileNotFoundError and DataError for input that is missing or cannot be read.
    """
    config["in"] = absolute(str(config["in"]))
    check_places(config)
    try:
        task, distributor = make_task(config), make_distributor(config)
        if options.dry_run:
            estimate(task)
            return None
        progress = ProgressLine()
        try:
            report = build_shards(
                task,
                described=describe(config.source),
                distributor=distributor,
                progress=progress,
                near_duplicates=config.near_duplicates,
                skip_broken=config.skip_broken,
            )
        finally:
            progress.close()
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        raise
    print_report(task, report)
    return report


def describe(source: DictConfig) -> dict[str, Any]:
    """Class and settings of a source as plain values."""
    settings: Any = OmegaConf.to_container(source, resolve=True)
    return {"class": settings.pop("_target_").rpartition(".")[2], **settings}


def print_report(task: BuildTask, report: Report) -> None:
    done = "was finished already, with these settings" if report.found else "is finished"
    print(f"{task.out} {done}")
    if report.found:
        print("pictures that changed since are not looked at: for these give another folder as out")
    for split, tally in report.splits.items():
        print(tally_text(split, tally))
    share = getattr(task.source, "val_share", 0.0)
    if share and set(report.splits) == {"train"}:
        print(
            f"no val: none of the captions or keys fell into source.val_share={share:g} of them; "
            "a larger share, into a new folder, gives some"
        )


@dataclass
class Look:
    """What the first records of a unit come to. bytes: of those that are kept."""

    records: int = 0
    kept: int = 0
    bytes: int = 0
    seconds: float = 0.0
    dropped: dict[str, int] = field(default_factory=dict)


def look(task: BuildTask, unit: Unit) -> Look:
    """Runs the first records of a unit through the build's own steps."""
    looked, begun = Look(), time.perf_counter()
    reader = UnitReader(replace(task, source=_First(task.source)), unit, {})
    for record, words, picture in reader.kept(task.filters.picture):
        sample = make_sample(record, words, picture)
        looked.kept += 1
        looked.bytes += sum(len(data) for data in sample.values())
    looked.records, looked.dropped = reader.images, reader.part.dropped
    looked.seconds = time.perf_counter() - begun
    return looked


class _First:
    """A source of which each unit has but the first LOOKED_AT records."""

    def __init__(self, source: Source):
        self.source, self.captioned = source, source.captioned

    def prepare(self, work: str) -> None:
        self.source.prepare(work)

    def units(self, samples_per_shard: int) -> list[Unit]:
        return self.source.units(samples_per_shard)

    def read(self, unit: Unit) -> Iterator[Record]:
        yield from islice(self.source.read(unit), LOOKED_AT)


def units_text(prefix: str, units: Sequence[Unit]) -> str:
    """One line on the units of a split."""
    first, last = units[0], units[-1]
    known = [unit.samples for unit in units if unit.samples is not None]
    pictures = (
        amount(sum(known), "picture") if len(known) == len(units) else "archives of any length"
    )
    return (
        f"{first.split}: {amount(len(units), 'unit')}, {pictures}: {prefix}-{unit_name(first)} to "
        f"{prefix}-{unit_name(last)}"
    )


def estimate(task: BuildTask) -> None:
    """Says what a build would give, from the units and a look at the first pictures."""
    with tempfile.TemporaryDirectory() as work:
        task.source.prepare(work)
        units = task.source.units(task.samples_per_shard)
        for split in dict.fromkeys(unit.split for unit in units):
            print(units_text(task.prefix, [u for u in units if u.split == split]))
        looks = (look(task, unit) for unit in units)
        looked = next((each for each in looks if each.records), None)
    if looked is None:
        held = amount(len(units), "unit")
        raise DataError(f"the source holds nothing to build from: {held}, no picture")
    each, seconds = looked.bytes / looked.records, looked.seconds / looked.records
    print(
        f"of the first {amount(looked.records, 'picture')} {looked.kept} are kept (left out: "
        f"{reasons_text(looked.dropped)}); each one read takes {seconds * 1e3:.1f} ms and "
        f"{size_text(each)} of the shards"
    )
    known = sum(unit.samples or 0 for unit in units)
    if known:
        hours = timedelta(seconds=round(known * seconds))
        print(f"all {known:,}: about {size_text(known * each)}, {hours} in one process")
    print("nothing was written")
