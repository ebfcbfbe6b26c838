"""Puts NaN and infinity into trainings, here or on two ranks; the script tells what became of it.

python tests/lit/nonfinite_run.py FOLDER '{"NAME": {"kind": "2", "what": "input", ...}, ...}'
"""

import json
import sys
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import Strategy

from dcar.errors import NonFiniteError
from dcar.lit.averaging import AverageWeights
from dcar.lit.base import BaseModule
from dcar.lit.guard import NonFiniteGuard
from dcar.lit.last_checkpoint import LastCheckpoint
from dcar.lit.precision import precision_plugin
from dcar.lit.sharding import ShardedStrategy, own_piece, whole_state
from dcar.models.losses import TokenizerCriterion
from experiments.strategy import DataParallelStrategy
from tests.lit.ddp_run import run_forked
from tests.toys import ToyData, toy_masked_generator, toy_stage, toy_trainer

NAN, INF = float("nan"), float("inf")
PATIENCE = timedelta(minutes=1)


def toy_module(kind: str, **options: Any) -> BaseModule:
    """The generator, or a stage by its number with a GAN, a BatchNorm decoder and revival."""
    if kind == "generator":
        return toy_masked_generator(**options)
    return toy_stage(int(kind), adversarial=True, revival_decay=0.9, **options)


def precise_trainer(max_steps: int, precision: str, **settings: Any) -> Trainer:
    """A toy trainer whose 16-mixed is float16 with a gradient scaler, on the CPU."""
    plugin = precision_plugin(precision, "cpu")
    chosen = {"precision": precision} if plugin is None else {"plugins": [plugin]}
    return toy_trainer(max_steps, **chosen | settings)


class SickCriterion(TokenizerCriterion):
    """Gives NaN at its fourth call."""

    calls = 0

    def forward(self, *args: Any) -> dict[str, Any]:
        self.calls += 1
        terms = super().forward(*args)
        return terms | {"loss": terms["loss"] * (NAN if self.calls == 4 else 1.0)}


class Poison(Callback):
    """Makes one value of one rank NaN or infinite at the batches with the given numbers.

    what: "input", "weight", "gradient" (before ranks average it), "reduced" (after that),
        "discriminator" (its gradient, after that) or "nothing".
    """

    def __init__(self, what: str, batches: Sequence[int], *, rank: int = 0, value: float = NAN):
        self.what, self.batches, self.rank, self.value = what, batches, rank, value

    def is_now(self, trainer: Trainer) -> bool:
        number = trainer.fit_loop.epoch_loop.total_batch_idx
        return trainer.global_rank == self.rank and number in self.batches

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, *args: Any
    ) -> None:
        if not self.is_now(trainer):
            return
        named = pl_module.network.named_parameters()
        weight = next(p for n, p in named if p.requires_grad and "token_embedding" not in n)
        if self.what == "input":
            batch["residual" if "residual" in batch else "image"][0, 0, 0, 0] = self.value
        elif self.what == "weight":
            weight.data.view(-1)[0] = self.value
        elif self.what == "gradient":
            self.handle = weight.register_hook(lambda gradient: gradient * self.value)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if self.what == "gradient" and hasattr(self, "handle"):
            self.handle.remove()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        parts = {"reduced": "network", "discriminator": "discriminator"}
        if self.what in parts and self.is_now(trainer):
            part = getattr(pl_module, parts[self.what])
            gradient = next(p.grad for p in part.parameters() if p.grad is not None)
            own_piece(gradient).view(-1)[0] = self.value


class Watch(Callback):
    """After each batch: what is not finite, the verdict, and the scaler's state."""

    def __init__(self) -> None:
        self.broken: list[str] = []
        self.verdicts: list[str] = []
        self.scalers: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        self.verdicts.append(pl_module.verdict)
        self.scalers.append(trainer.precision_plugin.state_dict())
        averages = [c.average for c in trainer.callbacks if isinstance(c, AverageWeights)]
        states = [s for o in trainer.optimizers for s in o.state.values()]
        tensors = {f"average.{n}": t for a in averages for n, t in a.state_dict().items()}
        tensors |= {f"{i}.{n}": t for i, state in enumerate(states) for n, t in state.items()}
        tensors |= pl_module.state_dict()
        self.broken += [n for n, t in tensors.items() if not torch.isfinite(own_piece(t)).all()]


def fit_poisoned(
    folder: Path,
    *,
    kind: str,
    what: str,
    policy: str,
    batches: Sequence[int] = (2,),
    value: float = NAN,
    rank: int = 0,
    strategy: str = "auto",
    precision: str = "32-true",
    steps: int = 4,
    limit: int = 10,
    record: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Train with averages and a last.ckpt each step; what happened, as plain data and tensors."""
    flight = folder / "flight" if record else None
    guard = NonFiniteGuard(policy=policy, limit=limit, folder=flight)
    module = toy_module(kind, guard=guard, **options)
    watch, average = Watch(), AverageWeights(decay=0.9)
    last = LastCheckpoint(folder=folder / "checkpoints", every_steps=1)
    callbacks = [Poison(what, batches, rank=rank, value=value), average, last, watch]
    ranks = 1 if strategy == "auto" else 2
    spread: dict[str, Strategy] = {
        "ddp": DataParallelStrategy(alternates=len(module.optimized()) > 1, timeout=PATIENCE),
        "fsdp2": ShardedStrategy(ranks=2, timeout=PATIENCE),
    }
    settings: dict[str, Any] = {"devices": ranks, "strategy": spread.get(strategy, "auto")}
    trainer, error = precise_trainer(steps, precision, callbacks=callbacks, **settings), ""
    try:
        trainer.fit(module, datamodule=ToyData(4 * ranks, count=16 * ranks, world=ranks))
    except NonFiniteError as raised:
        error = str(raised)
    return {
        "error": error,
        "step": trainer.global_step,
        "verdicts": watch.verdicts,
        "broken": watch.broken,
        "scalers": watch.scalers,
        "skipped": guard.skipped,
        "records": sorted(map(str, (folder / "flight").glob("*.pt"))),
        "weights": {name: t.clone() for name, t in whole_state(module).items()},
    }


def main(folder: Path, cases: dict[str, dict[str, Any]], ranks: int) -> None:
    """On each of two ranks one training after the other; each saves what it found."""
    if ranks == 2:
        found = {name: fit_poisoned(folder / name, **case) for name, case in cases.items()}
        torch.save(found, folder / f"found_{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    run_forked(partial(main, Path(sys.argv[1]), json.loads(sys.argv[2])))
