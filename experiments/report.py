"""The report at the end of a recipe: figures, pictures and curves of its runs on one page."""

import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from dcar.data.distributors import cores
from dcar.evaluation.charts import LIGHT, curves_png
from dcar.evaluation.report_page import page
from dcar.evaluation.run_record import RunRecord, read_run
from dcar.pipeline import DCARPipeline
from experiments.components import build
from experiments.report_panels import panels_of
from experiments.report_pictures import (
    Examples,
    Pictures,
    count_codes,
    draw_samples,
    read_examples,
    reconstruct,
    save_pictures,
)
from experiments.report_sections import sections

ROWS = 8  # reconstructions, and prompts of each split
PACKAGES = ("torch", "lightning", "torchmetrics", "transformers")


@dataclass(frozen=True)
class Runs:
    """Finished runs in training order, sorted into the two halves of the method."""

    records: list[RunRecord]
    splits: tuple[str, ...]  # validation sets, the main one first

    @property
    def tokenizers(self) -> list[RunRecord]:
        return [record for record in self.records if record.is_tokenizer]

    @property
    def generators(self) -> list[RunRecord]:
        return [record for record in self.records if record.is_generator]


def write_report(folder: Path, *, runs: Sequence[str]) -> Path:
    """Write metrics.json, report.html and report/*.png into `folder`; returns the page's path.

    folder: holds one finished run a name in `runs`, in training order: tokenizer stages, then
    generators, perhaps a fine-tuned decoder. The last of each kind is the one that is measured, the
    model of the last run is shown.

    Raises FileNotFoundError naming the run that is not finished, ValueError where either kind of
    run is missing, CheckpointError for a last run without a model.
    """
    records = [read_run(folder / name, name=name) for name in runs]
    config = OmegaConf.load(folder / _last_generator(records).name / "config.yaml")
    assert isinstance(config, DictConfig)
    ordered = Runs(records, tuple(config.module.val_names))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model_folder = folder / runs[-1] / "model"
    pipeline = DCARPipeline.from_pretrained(model_folder, device=device)
    figures = collect_figures(ordered, pipeline)
    data = read_data(config)
    figures["images"] = {name: len(data[name]) for name in ordered.splits}
    pictures = make_pictures(pipeline, data)
    save_pictures(pictures, folder / "report", facts_of(pipeline, ordered))
    panels = panels_of(ordered.tokenizers, ordered.generators, ordered.splits)
    (folder / "report" / "curves.png").write_bytes(curves_png(panels, LIGHT, columns=2))
    (folder / "metrics.json").write_text(json.dumps(figures, indent=2, allow_nan=False) + "\n")
    content = sections(figures, pictures, panels)
    path = folder / "report.html"
    path.write_text(page(f"DC-AR {folder.name} report", *content), encoding="utf-8")
    return path


def _last_generator(records: Sequence[RunRecord]) -> RunRecord:
    """The run that the report is about. Raises ValueError where there is none or no tokenizer."""
    kinds = {
        "tokenizer": [record for record in records if record.is_tokenizer],
        "generator": [record for record in records if record.is_generator],
    }
    for kind, found in kinds.items():
        if not found:
            names = [record.name for record in records]
            raise ValueError(f"none of the runs {names} has the validation metrics of a {kind}")
    return kinds["generator"][-1]


def collect_figures(runs: Runs, pipeline: DCARPipeline) -> dict[str, Any]:
    """Everything that metrics.json holds; what is infinite or not a number becomes null."""
    seconds = {record.name: record.seconds for record in runs.records}
    models = {
        part: getattr(pipeline.model, part) for part in ("tokenizer", "generator", "text_encoder")
    }
    figures = {
        "tokenizer": runs.tokenizers[-1].figures(runs.splits),
        "generator": runs.generators[-1].figures(runs.splits),
        "runs": {record.name: run_facts(record, runs.splits) for record in runs.records},
        "seconds": seconds | {"total": sum(value or 0.0 for value in seconds.values())},
        "parameters": {
            part: sum(parameter.numel() for parameter in model.parameters())
            for part, model in models.items()
        },
        "sampler": {key: value for key, value in pipeline.model.config["sampler"].items()},
        "model": {
            "size": pipeline.model.size,
            "downsample": models["tokenizer"].downsample,
            "num_codes": models["tokenizer"].num_codes,
        },
        "splits": list(runs.splits),
        "versions": versions(),
    }
    return finite(figures)


def run_facts(record: RunRecord, splits: Sequence[str]) -> dict[str, Any]:
    facts = {key: value for key, value in record.facts.items() if key != "metrics"}
    rate = {"images_per_second": record.images_per_second}
    return facts | rate | {"figures": record.figures(splits)}


def finite(value: Any) -> Any:
    """The same nest of plain data with None where a number is not finite: JSON has no infinity."""
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def versions() -> dict[str, str]:
    """Of Python, the packages that decide the result, and the machine."""
    found = {"python": platform.python_version()}
    found |= {package: importlib.metadata.version(package) for package in PACKAGES}
    found |= {"dcar": importlib.metadata.version("dcar-lightning")}
    found |= {"system": platform.platform(), "processor": processor(), "cores": str(cores())}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def processor(path: Path = Path("/proc/cpuinfo")) -> str:
    """The CPU's name as Linux tells it, or what Python knows elsewhere."""
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def read_data(config: DictConfig) -> dict[str, Examples]:
    """The first training images, and each validation set whole, by the names of the splits."""
    data = build(config.data)
    found = {"train": read_examples(data.preview_batches(), limit=ROWS)}
    for name, loader in zip(config.module.val_names, data.val_dataloader(), strict=True):
        found[name] = read_examples(loader)
    return found


def make_pictures(pipeline: DCARPipeline, data: Mapping[str, Examples]) -> Pictures:
    """Reconstructions and codes of the main validation set, samples of every split."""
    tokenizer: Any = pipeline.model.tokenizer
    chosen = {name: examples.spread(ROWS) for name, examples in data.items()}
    main = next(name for name in data if name != "train")
    samples, frames = draw_samples(pipeline, chosen)
    return Pictures(
        rows=reconstruct(tokenizer, chosen[main].image),
        samples=samples,
        frames=frames,
        counts=count_codes(tokenizer, data[main].image).tolist(),
    )


def facts_of(pipeline: DCARPipeline, runs: Runs) -> dict[str, object]:
    """What the PNG files say of themselves."""
    settings = pipeline.model.config["sampler"].items()
    return {"run": runs.generators[-1].name} | {key: value for key, value in settings}
