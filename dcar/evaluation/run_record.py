"""What a training run left on disk: metrics.json and the curves in its TensorBoard event files."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

# 0 keeps every entry; pictures, histograms and texts are not read here.
SIZES = {"scalars": 0, "images": 1, "histograms": 1, "compressedHistograms": 1, "tensors": 1}


@dataclass(frozen=True)
class Curve:
    """One logged value over the optimizer steps of a run."""

    steps: Sequence[int]
    values: Sequence[float]


@dataclass(frozen=True)
class RunRecord:
    """facts: all of metrics.json; metrics: the last value of everything logged, by its name."""

    name: str
    facts: Mapping[str, object]
    metrics: Mapping[str, float]
    curves: Mapping[str, Curve]

    @property
    def is_tokenizer(self) -> bool:
        return "val/psnr_hybrid" in self.metrics

    @property
    def is_generator(self) -> bool:
        return "val/token" in self.metrics

    @property
    def steps(self) -> int:
        return int(str(self.facts["steps"]))

    @property
    def seconds(self) -> float | None:
        """Time spent training, validation included; None where no timer ran."""
        seconds = self.facts.get("seconds")
        return None if seconds is None else float(str(seconds))

    @property
    def images_per_second(self) -> float | None:
        curve = self.curves.get("perf/images_per_second")
        return statistics.median(curve.values) if curve else None

    def figures(self, splits: Sequence[str]) -> dict[str, float]:
        """Validation metrics under flat names: those of the first split bare, others prefixed.

        val/psnr_hybrid -> psnr_hybrid, heldout/token -> heldout_token,
        codebook/heldout_usage -> heldout_codebook_usage; training's own losses are left out.
        """
        found: dict[str, float] = {}
        for split in splits:
            prefix = "" if split == splits[0] else f"{split}_"
            for key, value in self.metrics.items():
                group, _, name = key.partition("/")
                if group == split:
                    found[f"{prefix}{name}"] = value
                elif group == "codebook" and name.startswith(f"{split}_"):
                    found[f"{prefix}codebook_{name.removeprefix(f'{split}_')}"] = value
        return found


def read_curves(folder: Path) -> dict[str, Curve]:
    """Every scalar of the event files in `folder`; a resumed run's files are read as one."""
    board = EventAccumulator(str(folder), size_guidance=SIZES).Reload()
    curves = {}
    for tag in board.Tags()["scalars"]:
        events = board.Scalars(tag)
        curves[tag] = Curve([event.step for event in events], [event.value for event in events])
    return curves


def read_run(folder: Path, *, name: str) -> RunRecord:
    """Raises FileNotFoundError, naming the run, where it has not been trained to its end."""
    path = folder / "metrics.json"
    if not path.is_file():
        raise FileNotFoundError(f"run {name!r} is not finished: there is no {path}")
    facts = json.loads(path.read_text())
    return RunRecord(name, facts, facts["metrics"], read_curves(folder / "tensorboard"))
