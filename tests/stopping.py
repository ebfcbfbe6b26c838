"""Toy trainings that save and that get signals, for the tests of the last checkpoint."""

import os
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback

from dcar.lit.checkpoint_io import DurableCheckpointIO
from tests.toys import ToyData, toy_stage, toy_trainer


class Signal(Callback):
    """Sends this process a signal in the middle of a step."""

    def __init__(self, number: int, at_step: int):
        self.number, self.at_step = number, at_step

    def on_train_batch_start(self, trainer, *args, **kwargs) -> None:
        if trainer.global_step == self.at_step:
            os.kill(os.getpid(), self.number)


class SignalAtBatch(Callback):
    """Sends this process a signal in the middle of a batch of the epoch."""

    def __init__(self, number: int, batch_idx: int):
        self.number, self.batch_idx = number, batch_idx

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if batch_idx == self.batch_idx:
            os.kill(os.getpid(), self.number)


def fit(steps: int, *callbacks: Callback, ckpt_path: Path | None = None, **options):
    """A toy stage trained to `steps`, on 8 batches an epoch."""
    module = toy_stage(1, **options)
    trainer = toy_trainer(steps, callbacks=list(callbacks), plugins=[DurableCheckpointIO()])
    trainer.fit(module, datamodule=ToyData(2), ckpt_path=ckpt_path)
    return module


def step_of(folder: Path) -> int:
    return torch.load(folder / "last.ckpt", weights_only=True)["global_step"]
