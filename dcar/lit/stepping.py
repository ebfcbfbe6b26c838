"""Optimizer steps of every training: one for each optimizer together, or none of them."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dcar.errors import NonFiniteError
from dcar.lit.flight_record import StepBatch, write_flight_records
from dcar.lit.guard import KeptBuffers, NonFiniteGuard, StepCheck, check_over_ranks
from dcar.lit.random_states import random_states
from dcar.lit.rollback import roll_back
from dcar.lit.schedules import constant
from dcar.lit.sharding import whole
from dcar.models.precision import without_autocast

READ_EVERY = 10  # batches from one look of the progress bar at the logged values to the next


@dataclass(frozen=True)
class Losses:
    """What one optimizer minimises on one batch, and what is logged of it."""

    optimizer: int  # 0 is the network's
    loss: Tensor  # scalar
    terms: dict[str, Tensor]  # scalars


# Of optimizers, beside the learning rate, which a schedule moves.
SETTINGS = ("weight_decay", "betas", "momentum", "eps")


def parameter_groups(modules: Iterable[nn.Module]) -> list[dict[str, Any]]:
    """Named trainable parameters, decayed where they have two axes or more, each exactly once."""
    named = {id(p): (name, p) for m in modules for name, p in m.named_parameters()}.values()
    trained = [(name, p) for name, p in named if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [(name, p) for name, p in trained if p.ndim >= 2]},
        {"params": [(name, p) for name, p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def take_settings(
    given: Sequence[dict[str, Any]], saved: Sequence[dict[str, Any]], schedule: dict[str, Any]
) -> list[str]:
    """Write settings of optimizer groups over those of a checkpoint, and tell what has changed.

    schedule: the saved state of the groups' schedule, which goes on where it was.
    """
    changes = []
    for row, (mine, theirs) in enumerate(zip(given, saved, strict=True)):
        for name in SETTINGS:
            if name in mine and name in theirs and theirs[name] != mine[name]:
                changes.append(f"{name}={mine[name]}, after {theirs[name]}")
                theirs[name] = mine[name]
        before = theirs.get("initial_lr", theirs["lr"])
        if before == mine["lr"]:
            continue
        changes.append(f"a learning rate of {mine['lr']:g} at its peak, after {before:g}")
        theirs["lr"] = theirs["lr"] * mine["lr"] / before if before else mine["lr"]
        theirs["initial_lr"] = mine["lr"]
        for name, value in (("base_lrs", mine["lr"]), ("_last_lr", theirs["lr"])):
            if name in schedule:
                schedule[name][row] = value
    return list(dict.fromkeys(changes))


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _unscales_itself(optimizer: Optimizer) -> bool:
    return getattr(optimizer, "_step_supports_amp_scaling", False)


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
        self.window: list[StepBatch] = []  # batches since the last step
        self.window_losses: list[list[Tensor]] = []  # of each of them, one an optimizer
        self.stepping: list[Optimizer] = []
        self.scale_before: float | None = None  # the loss scale that the last step was taken with
        self.buffers_before = KeptBuffers([])
        self.is_repeating = False

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

    def on_validation_model_zero_grad(self) -> None:
        """Validation may come between two batches of a step, whose gradients stay."""
        if not self.window:
            super().on_validation_model_zero_grad()

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
            self.buffers_before = KeptBuffers(m for part in self.optimized() for m in part)
        # what the step needs of it: pictures only where there are no tokens
        kept = {k: v for k, v in batch.items() if k != "image" or "ids" not in batch}
        self.window.append(StepBatch(kept, batch_idx, random_states(self.device)))
        self.window_losses.append([])
        is_step = (batch_idx + 1) % self.accumulate == 0 or self.trainer.is_last_batch
        active = []
        for part in self.losses(batch, batch_idx):
            # autocast off: what was computed in fp32 has its gradients computed in fp32, too
            with self._reduced_over_ranks(is_step), without_autocast(part.loss):
                self.manual_backward(part.loss / self.accumulate)
            self.window_losses[-1].append(part.loss.detach())
            if self.is_read():
                self.log_terms("train", part.terms, over_ranks=False)
            active.append(part.optimizer)
        if is_step:
            self._step(active)

    def _reduced_over_ranks(self, is_step: bool) -> AbstractContextManager[None]:
        """With DDP only the last backward pass of a step sends gradients to the other ranks."""
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
        optimizers[0].step()
        if self.verdict == "take":
            for optimizer in self.stepping[1:]:
                optimizer.step()
            for index in active:
                self._as_list(self.lr_schedulers())[index].step()
            self.after_step()
        else:
            self._recover()
        self._start_window()

    def _recover(self) -> None:
        """One loss scale on all ranks, and the weights of before where the guard wants them."""
        scale = self.scale_before
        if scale is not None:  # a rank whose own gradients were finite has not lowered its scale
            factor = self._scaler().get_backoff_factor() if self.verdict == "overflow" else 1.0
            self._set_scale(scale * factor)
        if self.verdict == "rollback":
            roll_back(self.trainer, self)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if optimizer is not self.stepping[0]:
            return
        self._mean_over_window()
        own_norms = [self._unscaled_norm(one) for one in self.stepping]
        norms = torch.stack([whole(norm) for norm in own_norms])
        losses = torch.stack([loss for part in self.window_losses for loss in part])
        check = check_over_ranks(losses, norms, self._scale_on_device())
        self.scale_before = check.scale
        self.verdict = self.guard.judge(check, step=self.global_step)
        if self.is_read():
            self._log_step(norms, check.scale)
        if self.verdict == "take":
            for one, norm in zip(self.stepping, own_norms, strict=True):
                self._clip(one, norm)
            return
        self._forget_forward()
        if self.verdict != "overflow":  # which is a matter of course in fp16
            self._report(check)
        for one in self.stepping:
            one.zero_grad(set_to_none=True)  # a step without gradients moves nothing

    def _mean_over_window(self) -> None:
        """Each loss was divided by `accumulate`; an epoch may end, or go on, within a step."""
        if (parts := len(self.window)) == self.accumulate:
            return
        gradients = [p.grad for optimizer in self.stepping for p in _parameters(optimizer)]
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(self.accumulate / parts)

    def _forget_forward(self) -> None:
        """Undo what the forward passes of the step left behind."""
        self.forget_batches()
        self.buffers_before.restore()

    @contextmanager
    def repeating(self) -> Iterator[None]:
        """Forward passes in here are a second look: nothing is logged, learned or kept of them."""
        self.is_repeating = True
        try:
            yield
        finally:
            self.is_repeating = False
            self._forget_forward()

    def log(self, *args: Any, **kwargs: Any) -> None:
        if not self.is_repeating:
            super().log(*args, **kwargs)

    def is_read(self) -> bool:
        """Whether values of this batch are looked at before those of the next step replace them.

        By the logger, by the progress bar or at the end; others are not logged, which takes longer
        than a twentieth of a small step.
        """
        if self.is_repeating:
            return False
        trainer: Any = self.trainer
        if trainer.is_last_batch:
            return True
        batch = trainer.fit_loop.total_batch_idx
        turns = ((trainer.log_every_n_steps, batch + 1), (READ_EVERY, batch))
        is_last = 0 <= trainer.max_steps <= trainer.global_step + 1
        return is_last or any(every and -now % every < self.accumulate for every, now in turns)

    def _unscaled_norm(self, optimizer: Optimizer) -> Tensor:
        """Norm of the optimizer's gradients, from which the loss scale has been taken."""
        scaler = self._scaler()
        # Lightning unscales the first, unless it is fused and would do that by itself
        is_scaled = optimizer is not self.stepping[0] or _unscales_itself(optimizer)
        if scaler is not None and is_scaled:
            scaler.unscale_(optimizer)
        gradients = [p.grad for p in _parameters(optimizer) if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def _clip(self, optimizer: Optimizer, norm: Tensor) -> None:
        if self.gradient_clip is not None:
            parameters = _parameters(optimizer)
            torch.nn.utils.clip_grads_with_norm_(parameters, self.gradient_clip, norm)

    def _report(self, check: StepCheck) -> None:
        """Flight records, then an error or a warning."""
        sentence = self.guard.describe(check, step=self.global_step)
        if records := write_flight_records(self, sentence, check):
            sentence += f"; the record of it is {' and '.join(map(str, records))}"
        if self.verdict == "raise":
            raise NonFiniteError(f"{sentence} (guard.policy says what is done)")
        rank_zero_info(f"{sentence}; {self.verdict}: the step is not taken")

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

    def _scale_on_device(self) -> Tensor | None:
        """`scaler.get_scale()` as a tensor: to read it back would be one more wait for the GPU."""
        scaler = self._scaler()
        return None if scaler is None or scaler._scale is None else scaler._scale.float()

    def loss_scale(self) -> float | None:
        """What fp16 losses are multiplied by before the backward pass, None in other precisions."""
        scaler = self._scaler()
        return None if scaler is None else scaler.get_scale()

    def _set_scale(self, scale: float) -> None:
        scaler = self._scaler()
        scaler.load_state_dict(scaler.state_dict() | {"scale": scale, "_growth_tracker": 0})

    def log_terms(
        self,
        split: str,
        terms: dict[str, Tensor],
        *,
        show: tuple[str, ...] = (),
        over_ranks: bool = True,
    ) -> None:
        """Log `{name: scalar}` as `split/name`; the names in `show` appear in the progress bar.

        over_ranks: the mean of all ranks, which waits for them; else the value of the first.
        """
        for name, value in terms.items():
            self.log(
                f"{split}/{name}",
                value.detach(),
                prog_bar=name in show,
                sync_dist=over_ranks,
                add_dataloader_idx=False,
            )

    @staticmethod
    def _as_list(value: Any) -> list[Any]:
        return value if isinstance(value, list) else [value]
