"""What every training module shares: optimizers, steps, logging, weights from another run."""

import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dcar.data.batches import in_unit_range
from dcar.lit.schedules import constant
from dcar.models.checkpoints import CheckpointError, load_strictly, read_checkpoint
from dcar.models.draws import Draws


class NonFiniteError(RuntimeError):
    """A gradient is NaN or infinite; the optimizer step was not taken."""


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


def train_only(network: nn.Module, parts: Iterable[str]) -> None:
    """Freeze every child of `network` but `parts`; frozen children also leave training mode.

    Raises ValueError for a part that `network` does not have.
    """
    children = dict(network.named_children())
    unknown = sorted(set(parts) - set(children))
    if unknown:
        raise ValueError(f"trainable names {unknown}, but the network has {sorted(children)}")
    for name, child in children.items():
        child.requires_grad_(name in parts).train(name in parts)


class BaseModule(LightningModule):
    """Manual optimisation that counts batches, whatever the number of optimizers.

    optimizer, schedule: partials, called with parameter groups and with an optimizer.
    gradient_clip: largest norm of the gradient, None for no clipping.
    accumulate: batches per optimizer step; the loss is their mean.
    seed: of every random draw in training steps (together with epoch and batch index).
    """

    network: nn.Module  # what is trained, averaged and saved

    def __init__(
        self,
        *,
        optimizer: Callable[..., Optimizer],
        schedule: Callable[[Optimizer], LRScheduler] = constant,
        gradient_clip: float | None = 1.0,
        accumulate: int = 1,
        seed: int = 0,
    ):
        super().__init__()
        if accumulate < 1:
            raise ValueError(f"accumulate={accumulate} must be at least 1")
        self.automatic_optimization = False
        self.optimizer_partial, self.schedule_partial = optimizer, schedule
        self.gradient_clip, self.accumulate, self.seed = gradient_clip, accumulate, seed
        self.plain_config: dict[str, Any] = {}  # set by the experiment, saved with the weights
        self.validated_step = -1

    def optimized(self) -> list[list[nn.Module]]:
        """One list of modules per optimizer; the first is the network's."""
        return [[self.network]]

    def frozen(self) -> list[Any]:
        """Unregistered modules that must follow this one's device."""
        return []

    def setup(self, stage: str) -> None:
        for module in self.frozen():
            module.to(self.device)

    def on_validation_epoch_start(self) -> None:
        self.validated_step = self.global_step

    def configure_optimizers(self) -> Any:
        optimizers = [self.optimizer_partial(parameter_groups(part)) for part in self.optimized()]
        return optimizers, [self.schedule_partial(optimizer) for optimizer in optimizers]

    def draws(self, batch_idx: int, epoch: int | None = None) -> Draws:
        """The random numbers of one batch: a function of seed, epoch and batch index alone."""
        epoch = self.current_epoch if epoch is None else epoch
        seed = random.Random(f"{self.seed}/{epoch}/{batch_idx}").getrandbits(63)
        return Draws(seed, self.device, rank=self.global_rank, world=self.trainer.world_size)

    @property
    def is_dry_run(self) -> bool:
        """One batch to see that everything fits together: what takes long is left out."""
        return bool(self.trainer.fast_dev_run)  # type: ignore[attr-defined]

    def on_train_epoch_start(self) -> None:
        """Gradients of an epoch that ended between two steps do not go into the next one's."""
        for optimizer in self._as_list(self.optimizers()):
            optimizer.zero_grad(set_to_none=True)

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Pictures come to the device as bytes; from here on they are in [-1, 1]."""
        return in_unit_range(batch)

    def preview_batches(self) -> Iterator[dict[str, Any]]:
        """Training batches from the start of the stream; the trainer's own position stays."""
        return self.trainer.datamodule.preview_batches()  # type: ignore[attr-defined]

    def optimize(self, index: int, loss: Tensor, batch_idx: int) -> None:
        """Back-propagate `loss` and, every `accumulate` batches, step optimizer `index`.

        Only optimizer 0 advances `global_step`: the others step through the strategy, which scales
        and unscales fp16 gradients just the same.
        """
        self.manual_backward(loss / self.accumulate)
        if (batch_idx + 1) % self.accumulate and not self.trainer.is_last_batch:
            return
        optimizer = self._as_list(self.optimizers())[index]
        if index == 0:
            optimizer.step()
        else:
            self.trainer.strategy.optimizer_step(optimizer.optimizer, lambda: None)
        optimizer.zero_grad(set_to_none=True)
        self._as_list(self.lr_schedulers())[index].step()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        limit = float("inf") if self.gradient_clip is None else self.gradient_clip
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is None and not torch.isfinite(norm):  # a scaler skips such a step by itself
            raise NonFiniteError(f"the gradient norm is {norm.item()} at step {self.global_step}")
        index = [o.optimizer for o in self._as_list(self.optimizers())].index(optimizer)
        name = ("", "discriminator_")[index]
        self.log(f"opt/{name}gradient_norm", norm)
        self.log(f"opt/{name}learning_rate", optimizer.param_groups[0]["lr"])

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

    def load_network(self, path: str | Path, *, expected: tuple[str, ...]) -> dict[str, Tensor]:
        """Start from the (averaged) network of a checkpoint that one of `expected` modules wrote.

        Returns the checkpoint's whole state dict. Raises CheckpointError naming both modules where
        another one wrote it, and the differing keys where the architecture is another.
        """
        checkpoint = read_checkpoint(path)
        if checkpoint["dcar"]["module"] not in expected:
            raise CheckpointError(
                f"{path} was written by {checkpoint['dcar']['module']}; "
                f"{type(self).__name__} starts from {' or '.join(expected)}"
            )
        load_strictly(self.network, checkpoint["network"], source=path)
        return checkpoint["state_dict"]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["dcar"] = {"module": type(self).__name__, "config": self.plain_config}
        checkpoint.setdefault(
            "network", self.network.state_dict()
        )  # averaged, where averages exist

    @staticmethod
    def _as_list(value: Any) -> list[Any]:
        return value if isinstance(value, list) else [value]
