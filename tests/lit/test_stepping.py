"""Optimizer steps: counted by batches, clipped, accumulated, judged, all optimizers at once."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from dcar.errors import NonFiniteError
from dcar.lit.stepping import parameter_groups
from tests.lit.nonfinite_run import Poison, Watch, precise_trainer, toy_module
from tests.toys import ToyData, toy_masked_generator, toy_stage, toy_trainer, weights


def test_decay_falls_on_matrices_alone_and_every_parameter_has_one_group() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Conv2d(1, 1, 1))
    decayed, plain = parameter_groups([network, network])
    assert dict(decayed["params"]).keys() == {"0.weight", "2.weight"}
    assert plain["weight_decay"] == 0.0
    assert {p.ndim for p in dict(plain["params"]).values()} == {1}
    both = {**dict(decayed["params"]), **dict(plain["params"])}
    assert all(both[name] is parameter for name, parameter in network.named_parameters())
    assert len(decayed["params"]) + len(plain["params"]) == len(both)


def test_two_optimizers_count_each_batch_once() -> None:
    module = toy_stage(2, adversarial=True)
    before = weights(module)
    trainer = toy_trainer(3)
    trainer.fit(module, datamodule=ToyData())
    assert trainer.global_step == 3 and trainer.fit_loop.epoch_loop.total_batch_idx == 2
    moved = {k for k, v in module.state_dict().items() if not torch.equal(v, before[k])}
    assert any(name.startswith("discriminator") for name in moved)
    steps = [int(o.state[o.param_groups[0]["params"][0]]["step"]) for o in trainer.optimizers]
    assert steps == [3, 3]


def test_gradients_are_clipped_to_the_norm() -> None:
    module = toy_stage(1, optimizer=partial(torch.optim.SGD, lr=1.0), gradient_clip=1e-3)
    before = weights(module)
    toy_trainer(1).fit(module, datamodule=ToyData())
    names = [name for name, _ in module.named_parameters()]
    after = module.state_dict()
    moved = torch.stack([(after[n] - before[n]).square().sum() for n in names]).sum().sqrt()
    assert 0.9e-3 < float(moved) <= 1.001e-3


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_accumulating_two_halves_equals_the_whole_batch(stage: int) -> None:
    whole, halves = (
        toy_stage(stage, norm="ln2d", accumulate=n, optimizer=partial(torch.optim.SGD, lr=0.1))
        for n in (1, 2)
    )
    toy_trainer(2).fit(whole, datamodule=ToyData(8))
    trainer = toy_trainer(2)
    trainer.fit(halves, datamodule=ToyData(4))
    assert trainer.global_step == 2
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(tensor, halves.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_a_non_finite_gradient_stops_before_the_weights_are_touched() -> None:
    module = toy_stage(1)
    before = weights(module)
    module.network.decoder.register_forward_hook(lambda m, i, out: out * float("nan"))
    with pytest.raises(NonFiniteError, match="the loss is not finite at step 0"):
        toy_trainer(2).fit(module, datamodule=ToyData())
    assert all(torch.equal(v, before[k]) for k, v in module.named_parameters())


def adam_steps(trainer: Trainer) -> list[int]:
    """How often each optimizer has moved its first parameter."""
    optimizers = [(o, o.param_groups[0]["params"][0]) for o in trainer.optimizers]
    return [int(o.state[p]["step"]) for o, p in optimizers]


@pytest.mark.parametrize("accumulate", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("what", ["gradient", "discriminator"])
def test_an_overflow_of_either_optimizer_holds_both_back_and_halves_the_scale_once(
    what: str, accumulate: int
) -> None:
    """In fp16: one step, then one with an infinite gradient, in its last batch."""
    module = toy_module("2", accumulate=accumulate)
    bad, states = 2 * accumulate - 1, {}

    class Before(Poison):
        def on_train_batch_start(self, trainer, pl_module, *args) -> None:
            super().on_train_batch_start(trainer, pl_module, *args)
            if self.is_now(trainer):
                states["before"] = weights(pl_module)

    watch = Watch()
    poison = Before(what, [bad], value=float("inf"))
    trainer = precise_trainer(2, "16-mixed", callbacks=[poison, watch])
    trainer.fit(module, datamodule=ToyData())
    assert watch.verdicts[-1] == "overflow" and module.guard.overflowed == 1
    assert trainer.global_step == 2 and adam_steps(trainer) == [1, 1]
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, states["before"][name]), name
    good, overflowed = watch.scalers[accumulate - 1], watch.scalers[-1]
    assert overflowed["scale"] == good["scale"] / 2
    assert good["_growth_tracker"] == 1 and overflowed["_growth_tracker"] == 0
    logged = trainer.callback_metrics
    assert logged["opt/skipped_steps"] == 1 and logged["opt/loss_scale"] == good["scale"]
    assert logged["opt/discriminator_learning_rate"] == 1e-2


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_in_fp16_are_clipped_in_the_unit_of_fp32(fused: bool) -> None:
    """Of both optimizers, be they of the kind that unscales gradients by itself."""
    moves, norms = [], []
    for precision in ("32-true", "16-mixed"):
        sgd = partial(torch.optim.SGD, lr=1.0, fused=fused)
        module = toy_stage(2, adversarial=True, optimizer=sgd, gradient_clip=1e-3)
        before = weights(module)
        trainer = precise_trainer(1, precision)
        trainer.fit(module, datamodule=ToyData())
        moves.append({name: p.detach() - before[name] for name, p in module.named_parameters()})
        for part in ("network", "discriminator"):
            own = [moved.flatten() for name, moved in moves[-1].items() if name.startswith(part)]
            assert 0.9e-3 < float(torch.cat(own).norm()) < 1.01e-3, part
        names = ("opt/gradient_norm", "opt/discriminator_gradient_norm")
        norms.append([float(trainer.callback_metrics[name]) for name in names])
    assert norms[0] == pytest.approx(norms[1], rel=0.02)
    one, other = (torch.cat([moved.flatten() for moved in move.values()]) for move in moves)
    assert torch.cosine_similarity(one, other, dim=0) > 0.99


def test_the_gradient_of_a_step_cut_short_by_the_epoch_is_used_once() -> None:
    """Three batches an epoch in steps of two: the third is a step of its own."""
    module = toy_stage(1, norm="ln2d", accumulate=2)
    watch = Watch()
    trainer = toy_trainer(4, callbacks=[watch])
    trainer.fit(module, datamodule=ToyData(4, count=12))
    assert trainer.current_epoch == 2 and len(watch.verdicts) == 6 and trainer.global_step == 4
    assert module.window == [] and all(p.grad is None for p in module.parameters())


MOVES = {
    "1": {"network.encoder", "network.decoder", "discriminator"},
    "2": {"network.encoder", "network.quantizer", "network.decoder", "discriminator"},
    "3": {"network.decoder", "discriminator"},
    "generator": {"network.generator", "network.text_encoder"},
}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("kind", MOVES)
def test_a_step_of_two_batches_moves_what_it_should_in_every_precision(
    kind: str, precision: str
) -> None:
    """All trainable parts and no other, GAN and revival included; buffers of frozen parts too."""
    module = toy_module(kind, accumulate=2)
    before = weights(module)
    trainer = precise_trainer(2, precision)
    trainer.fit(module, datamodule=ToyData())
    assert module.guard.skipped <= 1 and module.verdict == "take"
    after = module.state_dict()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    parts = {".".join(name.split(".")[: 1 + name.startswith("network")]) for name in moved}
    assert parts == MOVES[kind]


@pytest.mark.slow
def test_a_validation_between_two_batches_of_a_step_takes_nothing_from_it() -> None:
    """After the third batch, which is half of the second step."""
    left_alone, interrupted = (toy_stage(1, norm="ln2d", accumulate=2) for _ in range(2))
    toy_trainer(3).fit(left_alone, datamodule=ToyData(4))
    validating = {"val_check_interval": 3, "limit_val_batches": 1}
    trainer = toy_trainer(3, **validating)
    trainer.fit(interrupted, datamodule=ToyData(4))
    assert interrupted.validated_step > 0
    for name, tensor in left_alone.state_dict().items():
        assert torch.equal(tensor, interrupted.state_dict()[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 3])
def test_values_that_nobody_reads_are_not_logged_and_the_log_is_the_same(
    accumulate: int, tmp_path: Path
) -> None:
    tables, last, calls = [], [], []
    for reads_all in (True, False):
        module = toy_stage(2, adversarial=True, accumulate=accumulate)
        if reads_all:
            module.is_read = lambda: True
        logged = Counted(module.log)
        module.log = logged
        logger = CSVLogger(tmp_path, name=str(reads_all), flush_logs_every_n_steps=1)
        trainer = toy_trainer(14, logger=logger, log_every_n_steps=5)
        trainer.fit(module, datamodule=ToyData(2))
        tables.append((Path(logger.log_dir) / "metrics.csv").read_text())
        last.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        calls.append(logged.names["train/loss"])
    assert tables[0] == tables[1] and last[0] == last[1]
    assert "opt/gradient_norm" in tables[0] and tables[0].count("\n") > 2
    assert calls[1] < calls[0]


class Counted:
    """Calls `log` and counts the names."""

    def __init__(self, log: Callable[..., None]):
        self.log, self.names = log, Counter[str]()

    def __call__(self, name: str, *args: Any, **kwargs: Any) -> None:
        self.names[name] += 1
        self.log(name, *args, **kwargs)


def test_a_step_at_the_end_of_an_epoch_takes_the_mean_of_the_batches_it_has() -> None:
    """One batch an epoch: a step of up to four is a step of this one."""
    steps = partial(torch.optim.SGD, lr=0.1)
    modules = []
    for accumulate in (1, 4):
        module = toy_stage(
            1, norm="ln2d", accumulate=accumulate, optimizer=steps, gradient_clip=None
        )
        toy_trainer(2).fit(module, datamodule=ToyData(count=4))
        modules.append(module)
    for name, tensor in modules[0].state_dict().items():
        torch.testing.assert_close(modules[1].state_dict()[name], tensor, msg=name)


class Gradients(Callback):
    """Of the residual head, as the step has them, and from a backward pass outside autocast."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            (part,) = pl_module.losses(batch, batch_idx)
        part.loss.backward()
        self.expected = self.of_head(pl_module)
        pl_module.zero_grad(set_to_none=True)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.found = self.of_head(pl_module)

    def of_head(self, pl_module: Any) -> list[torch.Tensor]:
        return [p.grad.clone() for p in pl_module.generator.residual_head.parameters()]


def test_what_is_computed_in_fp32_has_its_gradients_computed_in_fp32() -> None:
    """The residual head is kept out of autocast, in its backward pass too."""
    gradients = Gradients()
    trainer = toy_trainer(1, precision="bf16-mixed", callbacks=[gradients])
    trainer.fit(toy_masked_generator(gradient_clip=None), datamodule=ToyData())
    assert any(found.abs().max() > 0 for found in gradients.found)
    for found, expected in zip(gradients.found, gradients.expected, strict=True):
        assert torch.equal(found, expected)


def test_a_window_of_batches_keeps_no_pictures_beside_their_tokens() -> None:
    module = toy_masked_generator(accumulate=2)
    kept: list[set[str]] = []

    class Look(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            kept.extend(set(part.batch) for part in pl_module.window)

    toy_trainer(1, callbacks=[Look()]).fit(module, datamodule=ToyData())
    assert kept == [{"key", "caption", "ids", "residual"}] * 2
