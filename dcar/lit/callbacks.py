"""What a person watches: picture grids, codebook histogram, throughput, the config as text."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, RichProgressBar
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from dcar.evaluation.pictures import reconstruction_columns, tile, to_pil
from dcar.evaluation.sheets import captioned_grid
from dcar.lit.stepping import READ_EVERY


def writer(trainer: Trainer) -> SummaryWriter | None:
    """TensorBoard's writer on the first rank, None elsewhere and without a logger."""
    experiment = getattr(trainer.logger, "experiment", None)
    return experiment if isinstance(experiment, SummaryWriter) else None


SHOWN = (
    "train/loss",
    "train/l1",
    "train/lpips",
    "train/token",
    "train/residual",
    "perf/images_per_second",
)


BAR_WIDTH = 98  # columns of a terminal that the bar, its counts and times take in a long run


def fitting(metrics: dict[str, Any], columns: int) -> dict[str, Any]:
    """The first of them that fit into so many columns as Lightning writes them, at least one."""
    fits: dict[str, Any] = {}
    for name, value in metrics.items():
        columns -= len(f"{name}: {value:.3f} " if isinstance(value, float) else f"{name}: {value} ")
        if fits and columns < -1:  # no space after the last
            break
        fits[name] = value
    return fits


class StepProgressBar(RichProgressBar):
    """Lightning's bar for trainings that are told how many steps, not how many epochs, to run.

    shown: names of logged training metrics beside the bar, as many of them as the line has room
    for; looked at every `every_batches` only, since to read a value waits for the GPU.
    """

    def __init__(
        self, *, shown: Sequence[str] = SHOWN, every_batches: int = READ_EVERY, **bar: Any
    ):
        super().__init__(**bar)
        self.shown, self.every_batches = tuple(shown), every_batches
        self.read: dict[str, float] = {}

    @property
    def total_train_batches(self) -> int | float:
        """Of this epoch, those before a resumption counted in, as the bar counts them too."""
        trainer: Any = self.trainer
        if trainer.max_steps <= 0:
            return super().total_train_batches
        batches, accumulate = trainer.num_training_batches, trainer.lightning_module.accumulate
        progress = trainer.fit_loop.epoch_loop.batch_progress.current
        is_over = progress.completed >= batches  # the epoch before, when the next one begins
        done = 0 if is_over else progress.processed - progress.processed % accumulate
        return min(batches, done + (trainer.max_steps - trainer.global_step) * accumulate)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        if trainer.training and trainer.fit_loop.total_batch_idx % self.every_batches == 0:
            logged = trainer.callback_metrics
            self.read = {name: float(logged[name]) for name in self.shown if name in logged}
        metrics = self.read | super().get_metrics(trainer, pl_module)
        width = self._console.width if self._console is not None else 80
        return fitting(metrics, width - BAR_WIDTH)

    def _get_train_description(self, current_epoch: int) -> str:
        return f"Epoch {current_epoch}"


class ReconstructionGrid(Callback):
    """One row an image of the first validation set: input | discrete | hybrid | error x4."""

    def __init__(self, *, images: int = 8):
        self.images = images
        self.fixed: Tensor | None = None

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        if self.fixed is None:
            self.fixed = batch["image"][: self.images].clone()  # not the whole batch

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        board = writer(trainer)
        if board is None or self.fixed is None:
            return
        with trainer.precision_plugin.forward_context():
            latents = pl_module.network.encode(self.fixed)
            discrete = pl_module.network.decode(latents.discrete).float()
            hybrid = pl_module.network.decode(latents.continuous).float()
        grid = tile(reconstruction_columns(self.fixed, discrete, hybrid))
        board.add_image("val/reconstruction", (grid + 1) / 2, trainer.global_step)


class SampleGrid(Callback):
    """The same prompts with the same seeds, drawn at every validation."""

    def __init__(self, *, prompts: Sequence[str], columns: int = 4):
        if not prompts:
            raise ValueError("SampleGrid needs at least one prompt")
        self.prompts, self.columns = list(prompts), columns

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        board = writer(trainer)
        if board is None:
            return
        with trainer.precision_plugin.forward_context():
            text, text_mask = pl_module.text_encoder(self.prompts)
            tokens = pl_module.sample(text, text_mask, seeds=range(len(self.prompts)))
            pictures = [to_pil(image) for image in pl_module.decode(tokens)]
        grid = captioned_grid(pictures, self.prompts, columns=self.columns)
        board.add_image("val/samples", np.asarray(grid), trainer.global_step, dataformats="HWC")


class CodebookHistogram(Callback):
    """How many codes are used how often over the validation sets."""

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        board = writer(trainer)
        if board is None:
            return
        for name, counts in pl_module.last_counts.items():
            board.add_histogram(f"codebook/{name}_counts", counts, trainer.global_step)


class Throughput(Callback):
    """`perf/images_per_second` and `data/wait_share`, the part of the time spent waiting for data.

    Averaged over `every_steps` batches; the first few, which compile and warm caches, are left out.
    Saving a checkpoint is no waiting for data.
    """

    def __init__(self, *, every_steps: int = 20, warmup: int = 3):
        self.every_steps, self.warmup = every_steps, warmup
        self.batches = 0
        self.has_saved = False  # since the last batch
        self._restart()

    def _restart(self) -> None:
        self.images, self.counted, self.waited = 0, 0, 0.0
        self.begun = self.ended = time.perf_counter()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restart()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restart()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        if not self.has_saved:
            self.waited += time.perf_counter() - self.ended
        self.has_saved = False

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, _: Any) -> None:
        self.has_saved = True

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self.ended = time.perf_counter()
        self.batches += 1
        if self.batches <= self.warmup:
            self._restart()
            return
        self.images += len(batch["key"]) * trainer.world_size
        self.counted += 1
        if self.counted == self.every_steps:
            elapsed = self.ended - self.begun
            pl_module.log("perf/images_per_second", self.images / elapsed)
            pl_module.log("data/wait_share", self.waited / elapsed)
            self._restart()


class SkippedSamples(Callback):
    """`data/skipped`: training samples that could not be used so far on this rank, also by reason.

    every_steps: batches between two looks at the counts.
    """

    def __init__(self, *, every_steps: int = 20):
        self.every_steps = every_steps

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        stream = getattr(trainer.train_dataloader, "stream", None)
        if stream is None or batch_idx % self.every_steps:
            return
        pl_module.log("data/skipped", float(sum(stream.skipped.values())))
        for reason, count in stream.skipped.items():
            pl_module.log(f"data/skipped_{reason.replace(' ', '_')}", float(count))


class ConfigText(Callback):
    """The resolved configuration, in TensorBoard's text page."""

    def __init__(self, *, text: str = ""):
        self.text = text

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (board := writer(trainer)) is not None and self.text:
            indented = "\n".join(f"    {line}" for line in self.text.splitlines())
            board.add_text("config", indented, trainer.global_step)
