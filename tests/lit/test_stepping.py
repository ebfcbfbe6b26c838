"""Optimizer steps: counted by batches, clipped, accumulated, judged, all optimizers at once."""

from functools import partial

import pytest
import torch
from torch import nn

from dcar.lit.guard import NonFiniteError
from dcar.lit.stepping import parameter_groups
from tests.toys import ToyData, toy_stage, toy_trainer, weights


def test_decay_falls_on_matrices_alone_and_every_parameter_has_one_group() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Conv2d(1, 1, 1))
    decayed, plain = parameter_groups([network, network])
    assert {p.ndim for p in decayed["params"]} == {2, 4}
    assert plain["weight_decay"] == 0.0 and {p.ndim for p in plain["params"]} == {1}
    assert len(decayed["params"]) + len(plain["params"]) == len(list(network.parameters()))


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
