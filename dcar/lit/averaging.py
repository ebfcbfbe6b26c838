"""Exponential moving average of the trained network alone."""

from copy import deepcopy
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dcar.lit.sharding import (
    hold_pieces,
    is_sharded,
    load_whole,
    own_piece,
    shard_network,
    whole_state,
)
from dcar.models.quantizer import VectorQuantizer


class AverageWeights(Callback):
    """Averages `module.network` after each optimizer step and lends the average to validation.

    Lightning's own averaging copies the whole module, discriminator and all. Here checkpoints hold
    the average under `network` and the live weights in `state_dict`. Buffers are copied exactly.

    decay: of the average, in [0, 1); it grows as (1 + n) / (10 + n) over the first n steps, so that
        a short run is averaged over its last part only.
    """

    def __init__(self, *, decay: float):
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay} must be in [0, 1)")
        self.decay = decay
        self.average: nn.Module | None = None
        self.step = self.updates = 0
        self.is_lent = False  # the network holds the average, and `average` the live weights

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._network_copy(pl_module)  # a sharded network, as it may be later, has no copy

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        average = self._network_copy(pl_module).to(pl_module.device)
        if is_sharded(pl_module.network) and not is_sharded(average):
            mesh = pl_module.device_mesh["data_parallel"]
            shard_network(average, mesh, module_name=type(pl_module).__name__)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        load_whole(self._network_copy(pl_module), checkpoint["network"])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, *args: Any, **kwargs: Any
    ) -> None:
        if trainer.global_step > self.step:
            if pl_module.verdict == "take":
                self._update(pl_module)
            self.step = trainer.global_step

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap(pl_module)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """A validation that fails gives the average back, before a checkpoint is written."""
        if self.is_lent:
            self._swap(pl_module)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.updates:
            checkpoint["network"] = whole_state(
                self._network_copy(pl_module), on_this_rank=trainer.is_global_zero
            )

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step, self.updates = state_dict["step"], state_dict["updates"]

    def _network_copy(self, pl_module: Any) -> nn.Module:
        if self.average is None:
            self.average = deepcopy(pl_module.network).requires_grad_(False)
        return self.average

    @torch.no_grad()
    def _update(self, pl_module: Any) -> None:
        average, live = self._network_copy(pl_module), pl_module.network
        warm = (1 + self.updates) / (10 + self.updates) if self.updates else 0.0
        update = get_ema_multi_avg_fn(min(self.decay, warm))
        ours, theirs = ([own_piece(p) for p in part.parameters()] for part in (average, live))
        update(ours, theirs, self.updates)
        for averaged, module in zip(average.modules(), live.modules(), strict=True):
            if isinstance(module, VectorQuantizer) and isinstance(averaged, VectorQuantizer):
                module.carry_over(averaged)
        for kept, buffer in zip(average.buffers(), live.buffers(), strict=True):
            kept.copy_(buffer)
        self.updates += 1

    @torch.no_grad()
    def _swap(self, pl_module: Any) -> None:
        """Exchange live and averaged values; before the first step there is nothing to lend."""
        if not self.updates:
            return
        average = self._network_copy(pl_module)
        hold_pieces(pl_module.network)  # the average is in such ones too
        for ours, theirs in zip(average.parameters(), pl_module.network.parameters(), strict=True):
            kept = theirs.clone()
            theirs.copy_(ours)
            ours.copy_(kept)
        self.is_lent = not self.is_lent
