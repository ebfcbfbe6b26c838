"""The task of `--exp=eval/compositional`: prompts drawn, judged, and told as figures and a page."""

import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from omegaconf import DictConfig
from PIL import Image

from dcar.data.images import read_image
from dcar.data.samples import image_bytes, read_caption
from dcar.data.shard_set import ShardSet
from dcar.data.transforms import to_unit_range
from dcar.evaluation import report_page as html
from dcar.evaluation.compositional import (
    PAIRS,
    SCENES,
    Asked,
    Examiner,
    Finding,
    as_pixels,
    has_all,
    named,
    overall,
    scenes_of,
    scores,
)
from dcar.evaluation.fid import FrechetDistances
from dcar.evaluation.pictures import to_pil
from dcar.evaluation.report_page import Html
from dcar.evaluation.retrieval import Retrieval
from dcar.evaluation.sheets import captioned_grid, save_png
from dcar.models.features import fid_features
from dcar.models.judge import load_judge
from dcar.models.sampler import SamplerSettings, Tokens
from dcar.pipeline import DCARPipeline, chunks
from experiments.components import build
from experiments.config import ConfigError, at_least, check_writable
from experiments.run import RunOptions
from experiments.sample import chosen_device, open_model

SOURCES = {
    "real": "true pictures of the same prompts: how far the judge itself can be trusted",
    "tokenizer": "these, encoded and decoded: the most that a generator of its tokens could reach",
    "retrieval": "the training picture whose caption has most words in common with the prompt",
    "discrete": "the model's codes alone",
    "hybrid": "the model: codes and residual",
}


@dataclass(frozen=True)
class Drawn:
    """Pictures of prompts, from the same tokens with and without the residual.

    seconds: of drawing the hybrid ones.
    """

    hybrid: list[Image.Image]
    discrete: list[Image.Image]
    seconds: float


def resized(data: bytes, side: int) -> Image.Image:
    return read_image(data).resize((side, side), Image.Resampling.BICUBIC)


def places_of(folder: ShardSet) -> Iterator[tuple[int, int]]:
    """(shard, position) of every sample."""
    return ((shard, row) for shard, rows in enumerate(folder.counts) for row in range(rows))


def drawings(folder: ShardSet, group: str, count: int, side: int, seed: int) -> list[Asked]:
    """Single drawings of shards with keys `style/slug`, drawn at random and in a fixed order."""
    places = list(places_of(folder))
    chosen = random.Random(seed).sample(places, min(count, len(places)))
    asked = []
    for place in sorted(chosen):
        with folder.required(*place):
            raw = folder.read(*place)
            caption, picture = read_caption(raw, required=True), resized(image_bytes(raw), side)
        style, _, slug = str(raw["__key__"]).partition("/")
        asked.append(Asked(group, caption, (slug,), style, picture))
    return asked


def read_asked(config: DictConfig, side: int) -> list[Asked]:
    """All prompts: known captions, held-out pairs, and scenes of the six groups.

    Raises ConfigError where there are too few single drawings for FID.
    """
    data = build(config.data)
    asked = [
        one
        for group, folder, count in (
            ("known", data["train"], config.known),
            ("heldout", data["heldout"], config.heldout),
        )
        for one in drawings(folder, group, count, side, config.seed)
    ]
    if len(asked) < 2:
        raise ConfigError(
            f"known={config.known} and heldout={config.heldout}: FID needs two pictures at least"
        )
    if config.scenes:
        asked += scenes_of(data["scenes"](side=side), config.scenes)
    return asked


def retrieved(config: DictConfig, asked: Sequence[Asked], side: int) -> list[Image.Image]:
    """Of each prompt, the training picture with the nearest caption."""
    train: ShardSet = build(config.data.train)
    places = list(places_of(train))
    captions = []
    for place in places:
        with train.required(*place):
            captions.append(read_caption(train.read(*place), required=True))
    nearest = Retrieval(captions).nearest([one.caption for one in asked])
    return [resized(image_bytes(train.read(*places[row])), side) for row in nearest]


def draw(
    pipeline: DCARPipeline,
    asked: Sequence[Asked],
    settings: SamplerSettings,
    *,
    seed: int,
    batch_size: int,
) -> Drawn:
    """A picture a prompt; prompt n has seed `seed` + n, whatever is in its batch."""
    side = pipeline.model.size // pipeline.model.tokenizer.downsample
    hybrid, discrete, seconds = [], [], 0.0
    for part in chunks(len(asked), batch_size):
        prompts = [one.caption for one in asked[part]]
        seeds = [seed + number for number in range(len(asked))[part]]
        start = time.perf_counter()
        tokens = pipeline.tokens(prompts, seeds=seeds, grid=(side, side), settings=settings)
        hybrid += list(map(to_pil, pipeline.decode(tokens)))
        seconds += time.perf_counter() - start
        discrete += list(map(to_pil, pipeline.decode(Tokens(tokens.ids, None))))
    return Drawn(hybrid, discrete, seconds)


@torch.no_grad()
def reconstructed(
    pipeline: DCARPipeline, asked: Sequence[Asked], *, batch_size: int
) -> list[Image.Image]:
    """The true pictures through the tokenizer, codes and residual."""
    tokenizer, pictures = pipeline.model.tokenizer, []
    for part in chunks(len(asked), batch_size):
        pixels = as_pixels([one.real for one in asked[part]]).to(pipeline.device)
        latents = tokenizer.encode(to_unit_range(pixels))
        image = pipeline.decode(Tokens(latents.ids, latents.residual))
        pictures += list(map(to_pil, image))
    return pictures


def distance_metric() -> FrechetDistances:
    """On MobileNetV2 features; it remembers those of true pictures."""
    return FrechetDistances(fid_features("mobilenetv2"), ["hybrid", "discrete"])


def distances(metric: FrechetDistances, asked: Sequence[Asked], drawn: Drawn) -> dict[str, float]:
    """Frechet distances to the true pictures of the single drawings, by source."""
    rows = [row for row, one in enumerate(asked) if one.group in PAIRS]
    metric.reset()
    for part in chunks(len(rows), 64):
        metric.update_real(as_pixels([asked[row].real for row in rows[part]]))
        for source in metric.metrics:
            metric.update_fake(source, as_pixels([getattr(drawn, source)[r] for r in rows[part]]))
    return {source: float(value) for source, value in metric.compute().items()}


def open_pipeline(config: DictConfig) -> DCARPipeline:
    device = chosen_device(config.device)
    model = open_model(config)
    return DCARPipeline(model, device=device, precision=config.precision)


def check_counts(config: DictConfig) -> None:
    """Raises ConfigError for numbers of prompts and pictures that there cannot be."""
    at_least(config, 0, "known", "heldout", "scenes", "pictures")
    at_least(config, 1, "batch_size")


def compositional(config: DictConfig, options: RunOptions) -> dict[str, Any]:
    """Draw and judge all prompts; write results.json, table.md, index.html and two sheets.

    Returns the results. Raises CheckpointError and FileNotFoundError for a model or judge that
    cannot be read, ConfigError where fewer than two single drawings are asked for.
    """
    check_counts(config)
    check_writable(config.out, is_folder=True)
    pipeline, examiner = open_pipeline(config), Examiner(load_judge(config.judge))
    settings = pipeline.settings(steps=config.steps, guidance=config.guidance)
    side = pipeline.model.size
    asked = read_asked(config, side)
    examiner.check(asked)
    if options.dry_run:
        asked = asked[:: max(1, len(asked) // 4)]
    rank_zero_info(f"{len(asked)} prompts, {settings.steps} steps, guidance {settings.guidance}")
    drawn = draw(pipeline, asked, settings, seed=config.seed, batch_size=config.batch_size)
    pictures = {
        "real": [one.real for one in asked],
        "tokenizer": reconstructed(pipeline, asked, batch_size=config.batch_size),
        "retrieval": retrieved(config, asked, side),
        "discrete": drawn.discrete,
        "hybrid": drawn.hybrid,
    }
    findings = {source: examiner.findings(asked, seen) for source, seen in pictures.items()}
    if options.dry_run:
        return {}
    scored = {source: scores(asked, found) for source, found in findings.items()}
    results = {
        "checkpoint": config.ckpt,
        "images": len(asked),
        "seed": config.seed,
        "settings": asdict(settings),
        "scores": scored,
        "overall": {source: overall(groups) for source, groups in scored.items()}
        if config.scenes
        else None,
        "fid_mobilenetv2": distances(distance_metric(), asked, drawn) | {"images": pairs_in(asked)},
        "seconds_per_image": drawn.seconds / len(asked),
        "device": str(pipeline.device),
        "judge": examiner.judge.figures,
        "concepts": len(examiner.judge.concepts),
    }
    write(Path(config.out), results, asked, pictures, findings["hybrid"], config.pictures)
    return results


def pairs_in(asked: Sequence[Asked]) -> int:
    return sum(one.group in PAIRS for one in asked)


def write(
    folder: Path,
    results: Mapping[str, Any],
    asked: Sequence[Asked],
    pictures: Mapping[str, Sequence[Image.Image]],
    findings: Sequence[Finding],
    shown: int,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (folder / "table.md").write_text(markdown_table(score_rows(results)))
    content = [summary(results), *galleries(asked, pictures, findings, shown)]
    (folder / "index.html").write_text(html.page("What the pictures show", *content), "utf-8")
    rows = [row for group in (*PAIRS, *SCENES) for row in rows_of(asked, group)[:8]]
    sheet = captioned_grid(
        [pictures["hybrid"][row] for row in rows], [asked[row].caption for row in rows], columns=8
    )
    facts = {"checkpoint": results["checkpoint"], "seed": results["seed"]} | results["settings"]
    save_png(sheet, folder / "sheet.png", facts)
    save_png(side_by_side(asked, pictures), folder / "residual.png", facts)
    for source, groups in results["scores"].items():
        figures = ", ".join(f"{name}: {told(shares)}" for name, shares in groups.items())
        rank_zero_info(f"{source}: {figures}")
    rank_zero_info(f"{folder / 'index.html'}")


def side_by_side(
    asked: Sequence[Asked], pictures: Mapping[str, Sequence[Image.Image]]
) -> Image.Image:
    """The first single drawings: true, by the codes alone, with the residual; a row each."""
    rows = [row for group in PAIRS for row in rows_of(asked, group)[:4]]
    names = [asked[row].caption for row in rows]
    for path in ("codes alone", "codes and residual"):
        names += [path] * len(rows)
    shown = [pictures[source][row] for source in ("real", "discrete", "hybrid") for row in rows]
    return captioned_grid(shown, names, columns=len(rows))


def rows_of(asked: Sequence[Asked], group: str) -> list[int]:
    return [row for row, one in enumerate(asked) if one.group == group]


def told(shares: Mapping[str, float]) -> str:
    """`concept top-1 81.0%` and so on; numbers of images stay out."""
    figures = ((named(name), value) for name, value in shares.items() if name != "images")
    return ", ".join(f"{name} {value:.1%}" for name, value in figures)


def score_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """The scores of every source, side by side; the first row names the columns."""
    scored = results["scores"]
    rows = [["", "images", *SOURCES]] + [
        [f"{group}: {named(name)}", str(scored["real"][group]["images"])]
        + [f"{scored[source][group][name]:.1%}" for source in SOURCES]
        for group, shares in scored["real"].items()
        for name in shares
        if name != "images"
    ]
    if results["overall"]:
        total = [f"{results['overall'][source]:.1%}" for source in SOURCES]
        rows.append(["mean of the six groups of scenes", "", *total])
    fid = results["fid_mobilenetv2"]
    fids = ["–", "–", "–", f"{fid['discrete']:.1f}", f"{fid['hybrid']:.1f}"]
    return [*rows, ["FID on MobileNetV2 features, single drawings", str(fid["images"]), *fids]]


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """The first row names the columns."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def summary(results: Mapping[str, Any]) -> Html:
    settings, (columns, *rows) = results["settings"], score_rows(results)
    return html.section(
        "Scores",
        f"{results['checkpoint']}: {results['images']} prompts, {settings['steps']} steps, "
        f"guidance {settings['guidance']}, seeds from {results['seed']}; "
        f"{results['seconds_per_image']:.2f} s an image on {results['device']}. An object counts "
        f"as there if its concept is among the judge's five likeliest of {results['concepts']:,}.",
        html.table(columns, rows),
        html.join(
            html.element("p", f"{name}: {words}.", css="note") for name, words in SOURCES.items()
        ),
    )


def galleries(
    asked: Sequence[Asked],
    pictures: Mapping[str, Sequence[Image.Image]],
    findings: Sequence[Finding],
    shown: int,
) -> Iterator[Html]:
    """A section a group: true picture, codes alone, and the model's, with what the judge says."""
    for group in (*PAIRS, *SCENES):
        figures = [
            html.figure(
                [
                    html.image(pictures[source][row], alt=f"{source}: {asked[row].caption}")
                    for source in ("real", "discrete", "hybrid")
                ],
                asked[row].caption
                + (": found" if has_all(asked[row], findings[row]) else ": not found"),
            )
            for row in rows_of(asked, group)[:shown]
        ]
        if figures:
            yield html.section(
                group.capitalize(),
                "A true picture, then the model's by its codes alone, then with the residual. The "
                "first of the group, whatever they look like.",
                html.tiles(figures, width=15),
            )
