"""Averaged weights: of the network alone, lent to validation, saved and restored."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback
from torch import Tensor

from dcar.errors import DataError
from dcar.lit.averaging import AverageWeights
from dcar.lit.guard import NonFiniteGuard
from dcar.lit.last_checkpoint import LastCheckpoint
from tests.lit.nonfinite_run import Poison
from tests.toys import ToyData, toy_stage, toy_trainer


def fit(steps: int, decay: float, **settings):
    module, callback = toy_stage(2, adversarial=True), AverageWeights(decay=decay)
    trainer = toy_trainer(steps, callbacks=[callback], **settings)
    trainer.fit(module, datamodule=ToyData())
    return module, callback, trainer


def test_without_decay_the_average_is_the_live_network() -> None:
    module, callback, _ = fit(3, 0.0)
    for name, tensor in callback.average.state_dict().items():
        assert torch.equal(tensor, module.network.state_dict()[name]), name


def test_the_average_lags_behind_the_live_network() -> None:
    module, callback, _ = fit(3, 0.99)
    live = dict(module.network.named_parameters())
    assert callback.updates == 3
    assert any(not torch.equal(p, live[n]) for n, p in callback.average.named_parameters())
    for kept, buffer in zip(callback.average.buffers(), module.network.buffers(), strict=True):
        assert torch.equal(kept, buffer)


@pytest.mark.parametrize("decay", [0.15, 0.999])
def test_the_average_moves_by_its_decay_and_quicker_at_first(decay: float) -> None:
    """After n updates it keeps min(decay, (1 + n) / (10 + n)) of itself, as TensorFlow's does."""
    module, seen = toy_stage(1), []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *batch) -> None:
            seen.append([p.detach().clone() for p in pl_module.network.parameters()])

    average = AverageWeights(decay=decay)
    toy_trainer(5, callbacks=[average, Watch()]).fit(module, datamodule=ToyData())
    expected = seen[0]
    for updates, live in enumerate(seen[1:], start=1):
        kept = min(decay, (1 + updates) / (10 + updates))
        pairs = zip(expected, live, strict=True)
        expected = [kept * mine + (1 - kept) * theirs for mine, theirs in pairs]
    assert (decay < 2 / 11) == (kept == decay)  # the first is reached, the second is not
    for mine, theirs in zip(expected, average.average.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_average_of_a_revived_code_begins_anew_where_the_code_is() -> None:
    """It moves at once: a mean over steps would lie between unrelated latents."""
    module, callback = toy_stage(2), AverageWeights(decay=0.999)
    quantizer = module.network.quantizer
    quantizer.revival_decay = 0.9
    toy_trainer(4, callbacks=[callback]).fit(module, datamodule=ToyData())
    averaged, revived = callback.average.quantizer, quantizer.revived
    assert 0 < revived.sum() < len(revived)
    same = (averaged.codebook == quantizer.codebook).all(1)
    assert same[revived].all() and not same[~revived].any()


def test_only_the_trained_network_is_averaged() -> None:
    module, callback, _ = fit(1, 0.9)
    assert len(list(callback.average.parameters())) == len(list(module.network.parameters()))


def test_a_checkpoint_holds_both_and_resuming_restores_both(tmp_path: Path) -> None:
    module, callback, trainer = fit(3, 0.9)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    name = "decoder.project_in.weight"
    name = next(n for n, p in module.network.named_parameters() if p.requires_grad)
    assert torch.equal(saved["network"][name], callback.average.state_dict()[name])
    assert torch.equal(saved["state_dict"][f"network.{name}"], module.network.state_dict()[name])
    resumed, again = toy_stage(2, adversarial=True), AverageWeights(decay=0.9)
    toy_trainer(3, callbacks=[again]).fit(
        resumed, datamodule=ToyData(), ckpt_path=tmp_path / "a.ckpt"
    )
    assert torch.equal(again.average.state_dict()[name], callback.average.state_dict()[name])
    assert again.updates == 3


def test_validation_runs_on_the_average_and_gives_the_weights_back() -> None:
    seen = {}

    class Spy(AverageWeights):
        def on_validation_start(self, trainer, pl_module) -> None:
            seen["live"] = [p.clone() for p in pl_module.network.parameters()]
            super().on_validation_start(trainer, pl_module)
            seen["lent"] = [p.clone() for p in pl_module.network.parameters()]

        def on_validation_end(self, trainer, pl_module) -> None:
            super().on_validation_end(trainer, pl_module)
            seen["after"] = [p.clone() for p in pl_module.network.parameters()]

    toy_trainer(2, callbacks=[Spy(decay=0.9)], limit_val_batches=1, val_check_interval=2).fit(
        toy_stage(1), datamodule=ToyData()
    )
    assert all(torch.equal(a, b) for a, b in zip(seen["live"], seen["after"], strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(seen["live"], seen["lent"], strict=True))


def test_an_impossible_decay_is_refused() -> None:
    with pytest.raises(ValueError, match="decay=1.0"):
        AverageWeights(decay=1.0)


def test_a_step_that_was_not_taken_is_no_part_of_the_average() -> None:
    averages = []
    for batches in ([], [2]):  # the last of three
        module = toy_stage(1, guard=NonFiniteGuard(policy="skip"))
        callback = AverageWeights(decay=0.9)
        callbacks = [Poison("input", batches), callback]
        toy_trainer(3 if batches else 2, callbacks=callbacks).fit(module, datamodule=ToyData())
        averages.append(callback)
    undisturbed, disturbed = averages
    assert disturbed.updates == 2 and disturbed.step == 3
    for name, tensor in undisturbed.average.state_dict().items():
        assert torch.equal(tensor, disturbed.average.state_dict()[name]), name


def test_with_accumulation_the_average_moves_once_a_step() -> None:
    module, callback = toy_stage(1, accumulate=2), AverageWeights(decay=0.9)
    toy_trainer(2, callbacks=[callback]).fit(module, datamodule=ToyData())
    assert callback.updates == 2


class BrokenValidation(ToyData):
    """The second batch of the validation set cannot be read."""

    def val_dataloader(self) -> list[Iterator[Any]]:
        def batches() -> Iterator[Any]:
            yield next(iter(super(BrokenValidation, self).val_dataloader()[0]))
            raise DataError("a shard is damaged")

        return [batches()]


def test_a_validation_that_fails_leaves_live_and_averaged_weights_in_their_places(
    tmp_path: Path,
) -> None:
    live: dict[str, Tensor] = {}

    class Spy(AverageWeights):
        def on_validation_start(self, trainer, pl_module) -> None:
            live.update({k: v.clone() for k, v in pl_module.state_dict().items()})
            super().on_validation_start(trainer, pl_module)

    callbacks = [Spy(decay=0.9), LastCheckpoint(folder=tmp_path, every_steps=100)]
    trainer = toy_trainer(9, callbacks=callbacks, limit_val_batches=2, val_check_interval=3)
    with pytest.raises(DataError, match="a shard is damaged"):
        trainer.fit(toy_stage(1), datamodule=BrokenValidation())
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 3
    assert all(torch.equal(saved["state_dict"][name], value) for name, value in live.items())
    assert any(not torch.equal(v, live[f"network.{k}"]) for k, v in saved["network"].items())
