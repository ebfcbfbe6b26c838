"""The task of `--exp=eval/sweep`: a setting of the sampler after another, over its values."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from matplotlib.figure import Figure
from omegaconf import DictConfig, ListConfig
from PIL import Image

from dcar.evaluation.charts import DPI, LIGHT, dress, to_png
from dcar.evaluation.compositional import Asked, Examiner, named, scores
from dcar.evaluation.fid import FrechetDistances
from dcar.evaluation.sheets import captioned_grid, save_png
from dcar.models.judge import load_judge
from dcar.models.sampler import SamplerSettings
from dcar.pipeline import DCARPipeline
from experiments.compositional import (
    check_counts,
    distance_metric,
    distances,
    draw,
    markdown_table,
    open_pipeline,
    read_asked,
)
from experiments.config import ConfigError, at_least, check_writable
from experiments.run import RunOptions

SHARES = ("concept_top1", "concept_top5", "style_top1")


def sweep(config: DictConfig, options: RunOptions) -> list[dict[str, Any]]:
    """Draw and judge the same prompts under each value; write results.json, table.md, pictures.

    Returns a row a value. Raises ConfigError for a setting or value that the sampler does not have.
    """
    check_counts(config)
    at_least(config, 1, "pictures")
    check_writable(config.out, is_folder=True)
    pipeline, examiner = open_pipeline(config), Examiner(load_judge(config.judge))
    base = pipeline.settings(steps=config.steps, guidance=config.guidance)
    if config.scenes:
        raise ConfigError(f"scenes={config.scenes}: a sweep draws single drawings alone")
    tried = {
        name: [varied(base, name, value) for value in values_of(config, name)]
        for name in config.vary
        if config.vary[name] is not None
    }
    if not tried:
        raise ConfigError("vary has no setting, so that there is nothing to compare")
    asked = read_asked(config, pipeline.model.size)
    if options.dry_run:
        tried, asked = {name: values[:1] for name, values in tried.items()}, asked[:2]
    folder, rows = Path(config.out), []
    facts = {"checkpoint": config.ckpt, "seed": config.seed, "base": asdict(base)}
    measured = cache(  # the base comes again
        partial(measure, config, pipeline, examiner, distance_metric(), asked)
    )
    for name, values in tried.items():
        strips = []
        for settings in values:
            figures, shown = measured(settings)
            row = {"setting": name, "value": getattr(settings, name), **figures}
            rank_zero_info(line_of(row))
            rows.append(row)
            strips.append(shown)
        if not options.dry_run:
            captions = [asked[row].caption for row in shown_rows(len(asked), config.pictures)]
            save_strips(folder, name, values, captions, strips)
            write(folder, rows, facts)  # after each setting: it takes long, and may be stopped
            (folder / f"{name}_curve.png").write_bytes(curve_png(name, rows[-len(values) :]))
    return rows


def values_of(config: DictConfig, name: str) -> ListConfig:
    values = config.vary[name]
    if not isinstance(values, ListConfig) or not values:
        raise ConfigError(f"vary.{name}={values} must be a list of values, or null")
    return values


def varied(base: SamplerSettings, name: str, value: Any) -> SamplerSettings:
    try:
        return replace(base, **{name: value})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"vary.{name}: {error}") from error


def measure(
    config: DictConfig,
    pipeline: DCARPipeline,
    examiner: Examiner,
    metric: FrechetDistances,
    asked: Sequence[Asked],
    settings: SamplerSettings,
) -> tuple[dict[str, Any], list[Image.Image]]:
    """The figures of a row, and the pictures that are shown of it."""
    drawn = draw(pipeline, asked, settings, seed=config.seed, batch_size=config.batch_size)
    scored = scores(asked, examiner.findings(asked, drawn.hybrid))
    row = {
        "images": len(asked),
        "scores": scored,
        "fid_mobilenetv2": distances(metric, asked, drawn),
        "seconds_per_image": drawn.seconds / len(asked),
    }
    return row, [drawn.hybrid[row] for row in shown_rows(len(asked), config.pictures)]


def shown_rows(total: int, shown: int) -> list[int]:
    """Which of `total` pictures are shown, spread over all."""
    shown = min(shown, total)
    return [number * total // shown for number in range(shown)]


def cells(row: Mapping[str, Any]) -> list[str]:
    """The figures of one value, in words."""
    shares = [f"{row['scores'][group][share]:.1%}" for group in row["scores"] for share in SHARES]
    return [*shares, f"{row['fid_mobilenetv2']['hybrid']:.1f}", f"{row['seconds_per_image']:.2f}"]


def header(row: Mapping[str, Any]) -> list[str]:
    shares = [f"{group} {named(share)}" for group in row["scores"] for share in SHARES]
    return ["setting", "value", *shares, "FID (MobileNetV2)", "s/image"]


def line_of(row: Mapping[str, Any]) -> str:
    figures = zip(header(row)[2:], cells(row), strict=True)
    return f"{row['setting']}={row['value']}: " + ", ".join(f"{k} {v}" for k, v in figures)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    values = ([row["setting"], str(row["value"]), *cells(row)] for row in rows)
    return markdown_table([header(rows[0]), *values])


def save_strips(
    folder: Path,
    name: str,
    values: Sequence[SamplerSettings],
    captions: Sequence[str],
    strips: Sequence[Sequence[Image.Image]],
) -> None:
    """The same prompts under every value: a row a value."""
    pictures = [picture for strip in strips for picture in strip]
    named = [f"{name} {getattr(one, name)}: {caption}" for one in values for caption in captions]
    sheet = captioned_grid(pictures, named, columns=len(captions))
    save_png(sheet, folder / f"{name}.png", {"setting": name})


def write(folder: Path, rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")
    (folder / "table.md").write_text(markdown(rows))
    rank_zero_info(f"{folder / 'table.md'}")


def curve_png(name: str, rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Concepts found among the judge's five likeliest, and FID, over the values of a setting."""
    figure = Figure(figsize=(9.2, 2.9), dpi=DPI, layout="constrained", facecolor=LIGHT.paper)
    label = name.replace("_", " ")
    values = [row["value"] for row in rows]
    is_number = all(isinstance(value, int | float) for value in values)
    places = values if is_number else range(len(values))  # names come side by side
    shares, fid = figure.subplots(1, 2)
    dress(shares, LIGHT, title="Concept among the five likeliest", x_label=label, y_label="share")
    for color, group in zip(LIGHT.lines, rows[0]["scores"], strict=False):
        top5 = [row["scores"][group]["concept_top5"] for row in rows]
        shares.plot(places, top5, marker=".", color=color, label=group)
    shares.set_ylim(0, 1)
    shares.legend(fontsize=8, frameon=False, labelcolor=LIGHT.ink)
    dress(fid, LIGHT, title="FID, MobileNetV2 features", x_label=label, y_label="FID")
    for color, source in zip(LIGHT.lines, ("hybrid", "discrete"), strict=False):
        found = [row["fid_mobilenetv2"][source] for row in rows]
        fid.plot(places, found, marker=".", color=color, label=source)
    fid.legend(fontsize=8, frameon=False, labelcolor=LIGHT.ink)
    for axes in (shares, fid):
        axes.set_xticks(places, [str(value) for value in values])
    return to_png(figure)
