"""Rolling back: everything as `last.ckpt` has it, while the data and the steps go on."""

from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.optim.lr_scheduler import ExponentialLR

from dcar.errors import NonFiniteError
from dcar.lit.averaging import AverageWeights
from dcar.lit.guard import NonFiniteGuard
from dcar.lit.last_checkpoint import LastCheckpoint
from dcar.lit.schedules import warmup_cosine
from tests.lit.nonfinite_run import Poison, precise_trainer, toy_module
from tests.toys import ToyData, weights

WARM = partial(warmup_cosine, warmup_steps=4, total_steps=8)
PRECISIONS = ["32-true", pytest.param("16-mixed", marks=pytest.mark.slow)]


class AfterBatch(Callback):
    """The state after the batch with this number."""

    def __init__(self, number: int):
        self.number = number
        self.seen: dict[str, Any] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.number:
            self.seen = {
                "verdict": pl_module.verdict,
                "step": trainer.global_step,
                "weights": weights(pl_module),
                "states": [deepcopy(o.state_dict()["state"]) for o in trainer.optimizers],
                "rate": trainer.optimizers[0].param_groups[0]["lr"],
                "scaler": trainer.precision_plugin.state_dict(),
            }


def fit(
    folder: Path,
    poison: Poison,
    *,
    every_steps: int,
    precision: str = "32-true",
    schedule: Any = WARM,
) -> Any:
    module = toy_module("2", guard=NonFiniteGuard(policy="rollback"), schedule=schedule)
    average, after = AverageWeights(decay=0.9), AfterBatch(3)
    last = LastCheckpoint(folder=folder, every_steps=every_steps, keep=9)
    trainer = precise_trainer(5, precision, callbacks=[poison, average, last, after])
    trainer.fit(module, datamodule=ToyData())
    return trainer, average, after.seen


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("what", ["weight", "input"])
def test_everything_learned_is_that_of_the_last_checkpoint(
    what: str, precision: str, tmp_path: Path
) -> None:
    """Saved at step 2, two steps taken; the fourth is bad, and its state is that of step 2."""
    trainer, average, seen = fit(tmp_path, Poison(what, [3]), every_steps=2, precision=precision)
    saved = torch.load(tmp_path / "step_00000002.ckpt", weights_only=True)
    assert seen["verdict"] == "rollback"
    for name, tensor in saved["state_dict"].items():
        assert torch.equal(seen["weights"][name], tensor), name
    for ours, theirs in zip(seen["states"], saved["optimizer_states"], strict=True):
        for key, state in theirs["state"].items():
            assert all(torch.equal(ours[key][name], state[name]) for name in state)
    assert seen["scaler"] == saved.get("MixedPrecision", {})
    # one more step was taken since, from the average of step 2
    assert trainer.global_step == 5 and average.updates == 3


@pytest.mark.slow
def test_the_count_of_steps_and_the_learning_rate_go_on(tmp_path: Path) -> None:
    """With a schedule that goes by the rate of the step before, and counts the steps taken."""
    schedule = partial(ExponentialLR, gamma=0.5)
    _, _, seen = fit(tmp_path, Poison("input", [3]), every_steps=2, schedule=schedule)
    assert seen["step"] == 4 and seen["rate"] == pytest.approx(1e-2 * 0.5**3)


def test_settings_given_on_a_resume_outlive_a_rollback(tmp_path: Path) -> None:
    """To the checkpoint that was resumed, which holds those of before."""

    def run(steps: int, decay: float, ckpt: Path | None, *faults: Callback) -> Any:
        optimizer = partial(torch.optim.AdamW, lr=1e-2, weight_decay=decay)
        module = toy_module("1", guard=NonFiniteGuard(policy="rollback"), optimizer=optimizer)
        callbacks = [*faults, LastCheckpoint(folder=tmp_path, every_steps=2, keep=9)]
        trainer = precise_trainer(steps, "32-true", callbacks=callbacks)
        trainer.fit(module, datamodule=ToyData(), ckpt_path=ckpt)
        return trainer

    run(2, 0.1, None)
    trainer = run(3, 0.5, tmp_path / "last.ckpt", Poison("input", [2]))
    assert trainer.optimizers[0].param_groups[0]["weight_decay"] == 0.5


def test_an_average_of_a_bad_step_is_the_saved_one(tmp_path: Path) -> None:
    module = toy_module("1", guard=NonFiniteGuard(policy="rollback"))
    average = AverageWeights(decay=0.9)
    last = LastCheckpoint(folder=tmp_path, every_steps=2, keep=9)
    trainer = precise_trainer(4, "32-true", callbacks=[Poison("weight", [3]), average, last])
    trainer.fit(module, datamodule=ToyData())
    saved = torch.load(tmp_path / "step_00000002.ckpt", weights_only=True)["network"]
    assert average.updates == 2 and average.step == 4
    for name, tensor in average.average.state_dict().items():
        assert torch.equal(tensor, saved[name]), name


def test_without_a_checkpoint_the_error_says_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="there is no checkpoint at .*policy=skip"):
        fit(tmp_path, Poison("input", [1]), every_steps=100)


def test_a_damaged_checkpoint_is_not_gone_back_to(tmp_path: Path) -> None:
    class Damage(Poison):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            super().on_train_batch_start(trainer, *args)
            if self.is_now(trainer):
                (tmp_path / "last.ckpt").write_bytes(b"not a checkpoint")

    with pytest.raises(NonFiniteError, match="cannot be rolled back: .*last.ckpt is damaged"):
        fit(tmp_path, Damage("input", [3]), every_steps=2)


def test_a_checkpoint_of_another_run_is_not_gone_back_to(tmp_path: Path) -> None:
    """A fresh start in a folder that was used before."""
    fit(tmp_path, Poison("input", []), every_steps=5)
    with pytest.raises(NonFiniteError, match="last.ckpt is of another run"):
        fit(tmp_path, Poison("input", [1]), every_steps=100)
