"""Training of the judge: views to learn from, real drawings and composed scenes to be measured on.

B pictures of side S.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from torch import Tensor

from dcar.data.loader import ShardLoader
from dcar.data.stream import ShardStream
from dcar.data.views import LABELS, ViewLoader, ViewSet, read_names
from dcar.lit.base import BaseModule
from dcar.lit.stepping import Losses
from dcar.models.judge import IGNORED, Judge, Verdict, judge_losses
from dcar.models.precision import without_autocast


class JudgeData(LightningDataModule):
    """train: partial of a ViewSet. drawings, scenes: what is measured on, partials by name.

    drawings are streams of whole pictures, scenes are view sets of which the first `scene_views`
    are taken. The order of validation is drawings, then scenes.
    """

    def __init__(
        self,
        *,
        train: Callable[[], ViewSet],
        batch_size: int,
        drawings: Mapping[str, Callable[[], ShardStream]],
        scenes: Mapping[str, Callable[[], ViewSet]],
        scene_views: int,
    ):
        super().__init__()
        self.train, self.batch_size, self.scene_views = train, batch_size, scene_views
        self.drawings, self.scenes = dict(drawings), dict(scenes)
        self.views: ViewSet | None = None

    @property
    def val_streams(self) -> list[str]:
        """The names of the validation sets."""
        return [*self.drawings, *self.scenes]

    def train_stream(self) -> ViewSet:
        """The views, made when they are first asked for: the drawings stay in memory."""
        self.views = self.views or self.train()
        return self.views

    def train_dataloader(self) -> ViewLoader:
        views = self.train_stream()
        batches = max(1, len(views.pieces) // self.batch_size)
        return ViewLoader(views, batch_size=self.batch_size, batches=batches, goes_on=True)

    def val_dataloader(self) -> list[ShardLoader | ViewLoader]:
        views = self.scene_views
        size = max(size for size in range(1, self.batch_size + 1) if views % size == 0)
        return [
            *(ShardLoader(stream()) for stream in self.drawings.values()),
            *(
                ViewLoader(scenes(), batch_size=size, batches=views // size, goes_on=False)
                for scenes in self.scenes.values()
            ),
        ]


class JudgeTraining(BaseModule):
    """Trains a `Judge` on batches of views.

    judge: partial that takes `concepts` and `styles`. concepts: the json file of these names.
    keeps_levels: what the frozen network sees in a view is computed once, 13 KB a view: for views
        that come again.
    smoothing: of the concepts' labels. weights: of the losses of the three heads.
    Of each validation set it logs `concept_top1`, `concept_top5`, `style_top1` and `count`, shares
    of the pictures that have such a label in [0, 1]; what no picture has a label for is left out.
    """

    network: Judge

    def __init__(
        self,
        *,
        judge: Callable[..., Judge],
        concepts: str | Path,
        smoothing: float,
        weights: Mapping[str, float],
        val_names: Sequence[str],
        keeps_levels: bool = False,
        **training: Any,
    ):
        super().__init__(**training)
        self.names = read_names(concepts)
        self.network = judge(concepts=self.names.concepts, styles=self.names.styles)
        self.smoothing, self.weights = smoothing, dict(weights)
        self.val_names = tuple(val_names)
        self.keeps_levels = keeps_levels
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.hits: dict[tuple[str, str], list[Tensor]] = {}  # by set and metric

    def losses(self, batch: dict[str, Any], batch_idx: int) -> Iterator[Losses]:
        verdict = self.network.judge(batch["image"], *self.levels(batch))
        labels = {name: batch[name] for name in LABELS}
        terms = judge_losses(verdict, labels, smoothing=self.smoothing, weights=self.weights)
        yield Losses(0, terms["loss"], terms)

    def levels(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Of the frozen network, kept in half precision on the CPU where views come again."""
        if not self.keeps_levels:
            return self.network.levels(batch["image"])
        numbers = batch["number"]
        if rows := [row for row, number in enumerate(numbers) if number not in self.kept]:
            pooled, placed = self.network.levels(batch["image"][rows])
            found = zip(pooled.half().cpu(), placed.half().cpu(), strict=True)
            self.kept.update(zip([numbers[row] for row in rows], found, strict=True))
        known = [self.kept[number] for number in numbers]
        with without_autocast(known[0][0]):  # on a CPU in bf16 it stacks no fp16
            pooled, placed = (torch.stack(part) for part in zip(*known, strict=True))
        return pooled.to(self.device).float(), placed.to(self.device).float()

    def labels_of(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Of views their own; of whole drawings what their keys say, one object each."""
        if "concept" in batch:
            return {name: batch[name] for name in LABELS}
        pairs = torch.tensor([self.names.labels(key) for key in batch["key"]], device=self.device)
        return {
            "concept": pairs[:, 0],
            "style": pairs[:, 1],
            "count": torch.zeros_like(pairs[:, 0]),
        }

    def validation_step(
        self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        name = self.val_names[dataloader_idx]
        for metric, hit in hits(self.network(batch["image"]), self.labels_of(batch)).items():
            self.hits.setdefault((name, metric), []).append(hit)

    def on_validation_epoch_end(self) -> None:
        for (name, metric), parts in self.hits.items():
            if len(found := torch.cat(parts)):
                self.log_terms(name, {metric: found.float().mean()})
        self.hits.clear()


def hits(verdict: Verdict, labels: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whether each picture that has a label was told right: bool, as many as have one."""
    tops = {
        "concept_top1": (verdict.concept, "concept", 1),
        "concept_top5": (verdict.concept, "concept", 5),
        "style_top1": (verdict.style, "style", 1),
        "count": (verdict.count, "count", 1),
    }
    found = {}
    for metric, (logits, name, best) in tops.items():
        label = labels[name]
        guesses = logits.topk(min(best, logits.shape[1])).indices  # (B, best)
        right = (guesses == label[:, None]).any(1)  # (B,)
        found[metric] = right[label != IGNORED]
    return found
