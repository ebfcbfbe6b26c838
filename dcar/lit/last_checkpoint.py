"""Keeps `last.ckpt` current, and ends a run cleanly when it is told to stop."""

import signal
from pathlib import Path
from types import FrameType
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from dcar.data.members import DataError

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """Training stopped on a signal, after its state was saved. signum: the signal."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class LastCheckpoint(Checkpoint):
    """Saves `folder/last.ckpt` every `every_steps` steps, at the last one, on Ctrl-C and SIGTERM.

    Also when the data fail (a process that reads them is killed, too many samples are bad), unless
    other ranks would have to take part, which are then waiting in another place.

    On a signal the step in progress is finished (and validation, if it is running), the checkpoint
    is written and `Interrupted` is raised. A second signal ends the process at once.
    """

    def __init__(self, *, folder: str | Path, every_steps: int):
        if every_steps < 1:
            raise ValueError(f"every_steps={every_steps} must be at least 1")
        self.path, self.every_steps = Path(folder) / "last.ckpt", every_steps
        self.signum: int | None = None
        self.saved_step = -1
        self.handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.saved_step = trainer.global_step if self.path.exists() else -1
        for number in STOP_SIGNALS:
            self.handlers[number] = signal.signal(number, self._remember)

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        self._restore_handlers()
        rank_zero_info("\nfinishing this step and saving; press Ctrl-C again to stop at once")

    def _restore_handlers(self) -> None:
        while self.handlers:
            number, handler = self.handlers.popitem()
            signal.signal(number, handler)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        step = trainer.global_step
        if step % self.every_steps == 0 or step == trainer.max_steps:
            self._save(trainer)
        self._stop_if_told(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_if_told(trainer)

    def _stop_if_told(self, trainer: Trainer) -> None:
        told = self.signum is not None
        if trainer.world_size > 1:
            told = trainer.strategy.reduce_boolean_decision(told, all=False)
        if told:
            self._save(trainer)
            raise Interrupted(self.signum or signal.SIGTERM)

    def _save(self, trainer: Trainer) -> None:
        if trainer.global_step != self.saved_step:
            trainer.save_checkpoint(self.path)
            self.saved_step = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore_handlers()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._restore_handlers()
        is_fitting = trainer.state.fn == TrainerFn.FITTING
        if isinstance(exception, DataError) and trainer.world_size == 1 and is_fitting:
            self._save(trainer)
