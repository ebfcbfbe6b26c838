"""One training in blocks that take turns: a plain loop, `Trainer.fit` from memory, and from shards.

All three use the same module, weights and optimizers, so that nothing but the loop differs.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from cProfile import Profile
from itertools import islice
from typing import Any, NamedTuple

import torch
from lightning import LightningDataModule, Trainer
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.flop_counter import FlopCounterMode

from dcar.data.batches import Batch
from dcar.data.loader import ShardLoader
from dcar.lit.base import BaseModule
from dcar.models.precision import without_autocast

MEMORY, PLAIN, SHARDS, PRODUCT = "memory", "plain", "shards", "product"


class Cost(NamedTuple):
    """Seconds a batch: on the clock, and of all this process's threads on the processor."""

    wall: float
    cpu: float


class Measured(Exception):
    """Ends the fit once every block has had its turns, without a last checkpoint."""


@contextmanager
def silent(module: BaseModule) -> Iterator[None]:
    """What `module` logs goes nowhere."""
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.log


class PlainLoop:
    """Forward, backward, clipping and optimizer steps of the module, written out.

    No guard, averages, schedules, callbacks or logs; batches are on the device already.
    """

    def __init__(self, module: BaseModule, memory: Sequence[Batch]):
        self.module, self.trainer = module, module.trainer
        self.scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        self.memory = [move_data_to_device(batch, module.device) for batch in memory]

    def run(self, batches: int) -> None:
        active: list[int] = []
        with silent(self.module), self.trainer.precision_plugin.forward_context():
            for index in range(batches):
                batch = self.memory[index % len(self.memory)]
                active = self._backward(batch, index)
                if (index + 1) % self.module.accumulate == 0:
                    self._step(active)

    def _backward(self, batch: Batch, index: int) -> list[int]:
        batch, active = self.module.on_after_batch_transfer(batch, 0), []
        for part in self.module.losses(batch, index):
            loss = part.loss / self.module.accumulate
            with without_autocast(loss):
                (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            active.append(part.optimizer)
        return active

    def _step(self, active: Sequence[int]) -> None:
        for optimizer in (self.trainer.optimizers[index] for index in active):
            if self.scaler is not None:
                self.scaler.unscale_(optimizer)
            if self.module.gradient_clip is not None:
                parameters = [p for group in optimizer.param_groups for p in group["params"]]
                torch.nn.utils.clip_grad_norm_(parameters, self.module.gradient_clip)
            _ = optimizer.step() if self.scaler is None else self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        if self.scaler is not None:
            self.scaler.update()
        self.module.after_step()


def compute_dtype(trainer: Trainer) -> torch.dtype:
    """What the matrix products of a training are computed in."""
    plugin = trainer.precision_plugin
    if isinstance(plugin, MixedPrecision):
        with plugin.forward_context():
            return torch.get_autocast_dtype(trainer.strategy.root_device.type)
    return torch.get_default_dtype()


class MatrixProduct:
    """As many FLOP/s as the device can do in `dtype`, or nearly."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.side, repeats = (8192, 10) if device.type == "cuda" else (2048, 4)
        self.flops = 2 * self.side**3 * repeats
        self.repeats, self.matrix = repeats, torch.randn(self.side, self.side).to(device, dtype)

    def run(self) -> None:
        for _ in range(self.repeats):
            self.matrix @ self.matrix


class Turns:
    """An epoch for the trainer, with the clock in it: the time between two of its requests.

    The plain loop runs while the trainer waits for its next batch. Before each block from shards,
    as many batches as workers may hold ready pass without being counted.
    """

    def __init__(
        self,
        module: BaseModule,
        memory: Sequence[Batch],
        loader: ShardLoader,
        *,
        batches: int,
        rounds: int,
        profile: Profile | None = None,
    ):
        self.module, self.memory, self.loader = module, memory, loader
        self.stream = loader.stream  # a callback counts its bad samples
        self.batches, self.rounds, self.profile = batches, rounds, profile
        self.costs: dict[str, list[Cost]] = {MEMORY: [], PLAIN: [], SHARDS: [], PRODUCT: []}
        self.flops = {PLAIN: 0, PRODUCT: 0}  # of one batch, of one call

    def __len__(self) -> int:
        return 10**9  # known, so that the trainer asks for no batch ahead

    def __iter__(self) -> Iterator[Batch]:
        module, shards = self.module, self._endless()
        plain = PlainLoop(module, self.memory)
        product = MatrixProduct(module.device, compute_dtype(module.trainer))
        yield from self._repeated(2 * module.accumulate)  # warm-up
        with FlopCounterMode(display=False) as counter:
            plain.run(module.accumulate)
        self.flops[PLAIN] = counter.get_total_flops() // module.accumulate
        self.flops[PRODUCT] = product.flops
        ready = (self.loader.prefetch_factor or 0) * self.loader.num_workers
        ready += -ready % module.accumulate
        for _ in range(self.rounds):
            with self._timed(MEMORY, self.batches), self._profiled():
                yield from self._repeated(self.batches)
            with self._timed(PLAIN, self.batches):
                plain.run(self.batches)
            with self._timed(PRODUCT, 1):
                product.run()
            yield from islice(shards, ready)
            with self._timed(SHARDS, self.batches):
                yield from islice(shards, self.batches)
        raise Measured

    @contextmanager
    def _timed(self, name: str, count: int) -> Iterator[None]:
        wall, cpu = self._now()
        yield
        now = self._now()
        self.costs[name].append(Cost((now.wall - wall) / count, (now.cpu - cpu) / count))

    @contextmanager
    def _profiled(self) -> Iterator[None]:
        if self.profile is not None:
            self.profile.enable()
        yield
        if self.profile is not None:
            self.profile.disable()

    def _now(self) -> Cost:
        if self.module.device.type == "cuda":
            torch.cuda.synchronize()
        return Cost(time.perf_counter(), time.process_time())

    def _repeated(self, count: int) -> Iterator[Batch]:
        return (self.memory[index % len(self.memory)] for index in range(count))

    def _endless(self) -> Iterator[Batch]:
        while True:
            yield from self.loader


class MeasuredData(LightningDataModule):
    """Hands `turns` to the trainer; previews come from memory."""

    def __init__(self, turns: Turns):
        super().__init__()
        self.turns = turns

    def train_dataloader(self) -> Iterable[Batch]:
        return self.turns

    def preview_batches(self) -> Iterator[dict[str, Any]]:
        return (self.turns.module.on_after_batch_transfer(b, 0) for b in self.turns.memory[:1])


def measure(trainer: Trainer, turns: Turns) -> None:
    """Fit until every block has had its turns."""
    with suppress(Measured):
        trainer.fit(turns.module, datamodule=MeasuredData(turns))
