"""The tasks that look at shards: `--exp=data/verify`, `data/stats` and `data/peek`."""

import json
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from dcar.data import stats as data_stats
from dcar.data import verify as data_verify
from dcar.data.distributors import Tick
from dcar.data.images import read_image
from dcar.data.members import BadSample
from dcar.data.samples import image_bytes, read_caption
from dcar.data.shard_set import ShardSet
from dcar.data.shards import WORK, is_unfinished, read_manifest
from dcar.data.storage import exists, join, name_of, write_atomically
from dcar.errors import DataError
from dcar.evaluation.data_charts import Cell, contact_sheet, stats_png
from dcar.evaluation.sheets import save_png
from experiments.build_progress import size_text
from experiments.config import ConfigError, at_least, check_local
from experiments.run import RunOptions

NAMED_SHARDS = 5  # in the one line of an error


@contextmanager
def progress(folder: str, samples: int | None = None) -> Iterator[Tick]:
    """A bar of samples looked at, out of those the manifest lists, gone when the work is done."""
    total = sum(entry.samples for entry in read_manifest(folder).values())
    columns = (
        TextColumn("{task.description}", markup=False),  # a folder may have brackets in its name
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("samples"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    is_file = not console.is_terminal  # where a bar would leave an empty line
    with Progress(*columns, console=console, transient=True, disable=is_file) as bar:
        task = bar.add_task(folder, total=None if samples else total or None)
        yield lambda done, size: bar.update(task, completed=done)


def verify(config: DictConfig, options: RunOptions) -> data_verify.Report:
    """Name every shard with a problem. Raises DataError when there is one."""
    folder = str(config["in"])
    if exists(join(folder, WORK)):
        raise DataError(f"{folder} holds an unfinished build: run the same data/build again")
    if is_unfinished(folder):
        raise DataError(f"{folder} is not finished: run what makes it again")
    check_local(config.out)
    with progress(folder) as tick:
        report = data_verify.verify(
            folder,
            deep=config.deep,
            captioned=config.captioned,
            processes=config.processes,
            tick=tick,
        )
    print_lines(report.lines(config.show))
    if not report.has_manifest:
        print(f"{folder} has no manifest.json: bytes changed in silence cannot be found without")
    if config.out and not options.dry_run:
        with write_atomically(config.out) as file:
            file.writelines(f"{line}\n".encode() for line in report.lines())
    if altered := report.altered:
        named = ", ".join(altered[:NAMED_SHARDS])
        more = f" and {len(altered) - NAMED_SHARDS} more" if len(altered) > NAMED_SHARDS else ""
        raise DataError(f"{report.summary}: {named}{more}")
    print(report.summary)
    return report


def print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)


def stats(config: DictConfig, options: RunOptions) -> data_stats.Stats:
    """Print a table of what the shards hold; write it as stats.json and stats.png."""
    folder = str(config["in"])
    check_local(config.out, is_folder=True)
    with progress(folder, config.samples) as tick:
        found = data_stats.collect(
            folder,
            samples=config.samples,
            captioned=config.captioned,
            processes=config.processes,
            tick=tick,
        )
    summary = found.summary()
    Console().print(stats_table(summary))
    if not options.dry_run:
        for name, data in {
            "stats.json": json.dumps(summary, indent=1).encode(),
            "stats.png": stats_png(found),
        }.items():
            path = join(str(config.out), name)
            with write_atomically(path) as file:
                file.write(data)
            print(path)
    return found


ROWS = {
    "width": "width in pixels",
    "height": "height in pixels",
    "shorter": "shorter edge",
    "aspect": "width / height",
    "words": "words of a caption",
    "caption_bytes": "bytes of a caption",
}


def _spread(values: Mapping[str, float]) -> str:
    return f"{values['median']:,g} ({values['min']:,g}-{values['max']:,g})"


def stats_table(summary: Mapping[str, Any]) -> Table:
    """A column for each split."""
    splits = summary["splits"]
    table = Table(title=summary["folder"], caption="median (smallest-largest)")
    table.add_column()
    for name in splits:
        table.add_column(name, justify="right", no_wrap=True)
    for row in {row: None for split in splits.values() for row in stats_rows(split)}:
        table.add_row(row, *(stats_rows(split).get(row, "") for split in splits.values()))
    return table


def stats_rows(split: Mapping[str, Any]) -> dict[str, str]:
    """What the table says of one split: row -> words."""
    rows = {"shards": f"{split['shards']:,}", "samples": "not counted"}
    if split["samples"] is not None:
        rows["samples"] = f"{split['samples']:,}"
    if split["looked"] != split["samples"]:
        rows["looked at"] = f"{split['looked']:,}"
    rows["size"] = size_text(split["bytes"])
    rows |= {f"{kind} files": f"{count:,}" for kind, count in split["formats"].items()}
    for what, label in ROWS.items():
        if values := split["quantiles"][what]:
            rows[label] = _spread(values)
    if "classes" in split:
        rows["classes"] = f"{split['classes']['number']:,}"
        rows["samples of a class"] = _spread(split["classes"]["samples"])
    for kind in ("dropped", "skipped"):
        rows |= {f"{kind}: {reason}": f"{count:,}" for reason, count in split[kind].items()}
    return rows


def peek(config: DictConfig, options: RunOptions) -> list[Cell]:
    """Draw samples and write the sheet. Raises DataError where the shards hold no pictures."""
    if not str(config.out).lower().endswith(".png"):
        raise ConfigError(f"out={config.out} must end in .png")
    check_local(config.out)
    at_least(config, 1, "samples", "columns")
    cells = drawn(str(config["in"]), config.samples, seed=config.seed, split=config.split)
    sheet = contact_sheet(cells, columns=config.columns)
    if not options.dry_run:
        facts = {key: config[key] for key in ("in", "samples", "seed", "split")}
        save_png(sheet, config.out, facts)
        print(f"{config.out}: {len(cells)} samples of {config['in']}")
    return cells


def drawn(folder: str, samples: int, *, seed: int, split: str | None) -> list[Cell]:
    """So many different samples, each as likely as any other, in the order of the shards."""
    urls = data_verify.shard_urls(folder)
    if not urls:
        raise FileNotFoundError(f"no shard (*.tar) in {folder}")
    splits = data_verify.splits_of(folder)
    urls = [url for url in urls if split in (None, splits[name_of(url)])]
    if not urls:
        raise ConfigError(f"split={split}: {folder} has {sorted(set(splits.values()))}")
    shards = ShardSet(urls)
    ends = list(accumulate(shards.counts))
    if not ends[-1]:
        raise DataError(f"the shards in {folder} hold no sample")
    places = random.Random(f"{seed}/peek").sample(range(ends[-1]), min(samples, ends[-1]))
    return [_cell(shards, ends, place) for place in sorted(places)]


def _cell(shards: ShardSet, ends: list[int], place: int) -> Cell:
    shard = next(number for number, end in enumerate(ends) if place < end)
    position = place - ends[shard] + shards.counts[shard]
    try:
        raw = shards.read(shard, position)
    except BadSample as fault:
        return Cell(f"{name_of(shards.urls[shard])} #{position}", fault=str(fault))
    key = str(raw["__key__"])
    if "ids.npy" in raw:
        raise DataError(f"{shards.urls[shard]} holds tokens, no pictures: look at their source")
    try:
        return Cell(key, read_caption(raw, required=False), read_image(image_bytes(raw)))
    except BadSample as fault:
        return Cell(key, fault=str(fault))
    except Exception:  # a hostile file may raise anything inside a decoder
        return Cell(key, fault="broken image")
