"""Optimizer steps of every training: one for each optimizer together, or none of them."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dcar.lit.flight_record import write_flight_record
from dcar.lit.guard import KeptBuffers, NonFiniteError, NonFiniteGuard, check_over_ranks
from dcar.lit.rollback import roll_back
from dcar.lit.schedules import constant


@dataclass(frozen=True)
class Losses:
    """What one optimizer minimises on one batch, and what is logged of it."""

    optimizer: int  # 0 is the network's
    loss: Tensor  # scalar
    terms: dict[str, Tensor]  # scalars


def parameter_groups(modules: Iterable[nn.Module]) -> list[dict[str, Any]]:
    """Trainable parameters, decayed where they are matrices or convolutions, each exactly once."""
    parameters = {id(p): p for m in modules for p in m.parameters() if p.requires_grad}.values()
    decayed = [p for p in parameters if p.ndim >= 2]
    plain = [p for p in parameters if p.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": decayed},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class SteppingModule(LightningModule):
    """Manual optimisation that counts batches, whatever the number of optimizers.

    optimizer, schedule: partials, called with parameter groups and with an optimizer.
    gradient_clip: largest norm of the gradient, None for no clipping.
    accumulate: batches per optimizer step; the loss is their mean.
    guard: what is done about losses and gradients that are not finite.
    """

    network: nn.Module  # what is trained, averaged and saved

    def __init__(
        self,
        *,
        optimizer: Callable[..., Optimizer],
        schedule: Callable[[Optimizer], LRScheduler] = constant,
        gradient_clip: float | None = 1.0,
        accumulate: int = 1,
        guard: NonFiniteGuard | None = None,
    ):
        super().__init__()
        if accumulate < 1:
            raise ValueError(f"accumulate={accumulate} must be at least 1")
        self.automatic_optimization = False
        self.optimizer_partial, self.schedule_partial = optimizer, schedule
        self.gradient_clip, self.accumulate = gradient_clip, accumulate
        self.guard = NonFiniteGuard() if guard is None else guard
        self.run_config: dict[str, Any] = {}  # the whole experiment, for flight records
        self.verdict = "take"  # what became of the last step
        self.window: list[tuple[dict[str, Any], int]] = []  # batches since the last step
        self.window_losses: list[Tensor] = []
        self.stepping: list[Optimizer] = []
        self.buffers_before: KeptBuffers | None = None

    def optimized(self) -> list[list[nn.Module]]:
        """One list of modules per optimizer; the first is the network's."""
        return [[self.network]]

    @abstractmethod
    def losses(self, batch: dict[str, Any], batch_idx: int) -> Iterator[Losses]:
        """One for each optimizer that takes part, computed after the one before was used."""

    def after_step(self) -> None:
        """What is learned other than by gradients, after a step that was taken."""

    def forget_batches(self) -> None:
        """The step was not taken: nothing is learned from its batches."""

    def configure_optimizers(self) -> Any:
        optimizers = [self.optimizer_partial(parameter_groups(part)) for part in self.optimized()]
        return optimizers, [self.schedule_partial(optimizer) for optimizer in optimizers]

    def on_train_epoch_start(self) -> None:
        """Gradients of an epoch that ended between two steps do not go into the next one's."""
        self._start_window()
        self.forget_batches()

    def _start_window(self) -> None:
        self.window.clear()
        self.window_losses.clear()
        for optimizer in self._as_list(self.optimizers()):
            optimizer.zero_grad(set_to_none=True)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        if not self.window:
            self._keep_buffers()
        self.window.append((batch, batch_idx))
        is_step = (batch_idx + 1) % self.accumulate == 0 or self.trainer.is_last_batch
        active = []
        for part in self.losses(batch, batch_idx):
            with self._reduced_over_ranks(is_step):
                self.manual_backward(part.loss / self.accumulate)
            self.window_losses.append(part.loss.detach())
            self.log_terms("train", part.terms, show=("loss", "l1", "lpips", "token", "residual"))
            active.append(part.optimizer)
        if is_step:
            self._step(active)

    def _keep_buffers(self) -> None:
        if self.buffers_before is None:
            modules = [module for part in self.optimized() for module in part]
            self.buffers_before = KeptBuffers(modules)
        self.buffers_before.keep()

    def _reduced_over_ranks(self, is_step: bool) -> AbstractContextManager[None]:
        """Only the last backward pass of a step sends gradients to the other ranks."""
        model = self.trainer.strategy.model
        if isinstance(model, DistributedDataParallel) and not is_step:
            return model.no_sync()
        return nullcontext()

    def _step(self, active: Sequence[int]) -> None:
        """Unscale, judge, clip and step all optimizers that took part, or none of them.

        Only the first advances `global_step`; its step calls `on_before_optimizer_step`.
        """
        optimizers = self._as_list(self.optimizers())
        self.stepping = [optimizers[index].optimizer for index in active]
        scale = self.loss_scale()
        optimizers[0].step()
        if self.verdict == "take":
            for optimizer in self.stepping[1:]:
                optimizer.step()
            self.after_step()
        else:
            self._recover(scale)
        for index in active:
            self._as_list(self.lr_schedulers())[index].step()
        self._start_window()

    def _recover(self, scale: float | None) -> None:
        """Leave no trace of a step that was not taken, on all ranks alike."""
        self.forget_batches()
        assert self.buffers_before is not None
        self.buffers_before.restore()
        if scale is not None:  # a rank whose own gradients were finite has not lowered its scale
            self._set_scale(scale / 2 if self.verdict == "overflow" else scale)
        if self.verdict == "rollback":
            roll_back(self.trainer, self)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if optimizer is not self.stepping[0]:
            return
        norms = torch.stack([self._unscaled_norm(one) for one in self.stepping])
        check = check_over_ranks(torch.stack(self.window_losses), norms)
        scale = self.loss_scale()
        self.verdict = self.guard.judge(check, step=self.global_step, scale=scale)
        self._log_step(norms, scale)
        if self.verdict != "take":
            self._report(self.guard.describe(check, step=self.global_step), check.finite_losses)
            for one in self.stepping:
                one.zero_grad(set_to_none=True)  # a step without gradients moves nothing

    def _unscaled_norm(self, optimizer: Optimizer) -> Tensor:
        """Norm of the optimizer's gradients, which are clipped to `gradient_clip`."""
        scaler = self._scaler()
        if scaler is not None and optimizer is not self.stepping[0]:  # Lightning unscales that one
            scaler.unscale_(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        limit = float("inf") if self.gradient_clip is None else self.gradient_clip
        return torch.nn.utils.clip_grad_norm_(parameters, limit)

    def _report(self, sentence: str, finite_losses: bool) -> None:
        """A flight record, then an error or a warning; an overflow in fp16 is only counted."""
        if self.verdict == "overflow":
            return
        path = write_flight_record(self, sentence, finite_losses=finite_losses)
        sentence += f"; the record of it is {path}" if path is not None else ""
        if self.verdict == "raise":
            raise NonFiniteError(f"{sentence} (module.guard.policy says what is done)")
        rank_zero_warn(f"{sentence}; {self.verdict}: the step is not taken", stacklevel=2)

    def _log_step(self, norms: Tensor, scale: float | None) -> None:
        self.log("opt/skipped_steps", float(self.guard.skipped))
        if scale is not None:
            self.log("opt/loss_scale", scale)
        for name, norm, optimizer in zip(
            ("", "discriminator_"), norms, self.stepping, strict=False
        ):
            if self.verdict == "take":
                self.log(f"opt/{name}gradient_norm", norm)
            self.log(f"opt/{name}learning_rate", optimizer.param_groups[0]["lr"])

    def _scaler(self) -> Any:
        """The gradient scaler of fp16, None in any other precision."""
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def loss_scale(self) -> float | None:
        """What fp16 losses are multiplied by before the backward pass, None in other precisions."""
        scaler = self._scaler()
        return None if scaler is None else scaler.get_scale()

    def _set_scale(self, scale: float) -> None:
        scaler = self._scaler()
        scaler.load_state_dict(scaler.state_dict() | {"scale": scale, "_growth_tracker": 0})

    def log_terms(
        self, split: str, terms: dict[str, Tensor], *, show: tuple[str, ...] = ()
    ) -> None:
        """Log `{name: scalar}` as `split/name`; the names in `show` appear in the progress bar."""
        for name, value in terms.items():
            self.log(
                f"{split}/{name}",
                value.detach(),
                prog_bar=name in show,
                sync_dist=split != "train",
                add_dataloader_idx=False,
            )

    @staticmethod
    def _as_list(value: Any) -> list[Any]:
        return value if isinstance(value, list) else [value]
