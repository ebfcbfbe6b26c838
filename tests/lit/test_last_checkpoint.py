"""last.ckpt stays current; a signal ends a run cleanly and the next one goes on."""

import os
import signal
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from dcar.data.members import DataError
from dcar.lit.last_checkpoint import Interrupted, LastCheckpoint
from tests.toys import ToyData, toy_stage, toy_trainer


class Signal(Callback):
    """Sends this process a signal in the middle of a step."""

    def __init__(self, number: int, at_step: int):
        self.number, self.at_step = number, at_step

    def on_train_batch_start(self, trainer, *args, **kwargs) -> None:
        if trainer.global_step == self.at_step:
            os.kill(os.getpid(), self.number)


def step_of(folder: Path) -> int:
    return torch.load(folder / "last.ckpt", weights_only=True)["global_step"]


def test_it_saves_at_intervals_and_at_the_last_step(tmp_path: Path) -> None:
    seen, previous = [], signal.getsignal(signal.SIGINT)

    class Watch(LastCheckpoint):
        def _save(self, trainer) -> None:
            super()._save(trainer)
            seen.append(trainer.global_step)

    toy_trainer(5, callbacks=[Watch(folder=tmp_path, every_steps=2)]).fit(
        toy_stage(1), datamodule=ToyData()
    )
    assert seen == [2, 4, 5] and step_of(tmp_path) == 5
    assert signal.getsignal(signal.SIGINT) is previous


class Saved(Callback):
    """Remembers the step of each checkpoint."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_save_checkpoint(self, trainer, *args, **kwargs) -> None:
        self.steps.append(trainer.global_step)


def test_no_step_is_saved_twice(tmp_path: Path) -> None:
    saved = Saved()
    callbacks = [LastCheckpoint(folder=tmp_path, every_steps=1), Signal(signal.SIGINT, 1), saved]
    with pytest.raises(Interrupted):
        toy_trainer(9, callbacks=callbacks).fit(toy_stage(1), datamodule=ToyData())
    assert saved.steps == [1, 2]


class SignalInValidation(Callback):
    """Sends this process a signal in the middle of a validation."""

    def on_validation_batch_start(self, *args, **kwargs) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_ends_the_run_after_the_validation_that_is_running(tmp_path: Path) -> None:
    callbacks = [LastCheckpoint(folder=tmp_path, every_steps=100), SignalInValidation()]
    validating = {"val_check_interval": 2, "limit_val_batches": 1}
    with pytest.raises(Interrupted):
        toy_trainer(9, callbacks=callbacks, **validating).fit(toy_stage(1), datamodule=ToyData())
    assert step_of(tmp_path) == 2


class Fault(Callback):
    """Breaks in the middle of a step."""

    def on_before_optimizer_step(self, *args) -> None:
        raise ArithmeticError("not a number")


def test_what_no_checkpoint_would_be_sound_after_leaves_none(tmp_path: Path) -> None:
    previous = signal.getsignal(signal.SIGINT)
    callbacks = [LastCheckpoint(folder=tmp_path, every_steps=100), Fault()]
    with pytest.raises(ArithmeticError):
        toy_trainer(9, callbacks=callbacks).fit(toy_stage(1), datamodule=ToyData())
    assert not (tmp_path / "last.ckpt").exists()
    assert signal.getsignal(signal.SIGINT) is previous


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_tells_its_number(number: int, tmp_path: Path) -> None:
    previous = signal.getsignal(number)
    callbacks = [LastCheckpoint(folder=tmp_path, every_steps=100), Signal(number, at_step=2)]
    with pytest.raises(Interrupted) as stopped:
        toy_trainer(9, callbacks=callbacks).fit(toy_stage(1), datamodule=ToyData())
    assert stopped.value.signum == number
    assert step_of(tmp_path) == 3  # the step that ran when the signal came is in it
    assert signal.getsignal(number) is previous


def test_a_second_signal_meets_the_handler_that_was_there_before(tmp_path: Path) -> None:
    previous, seen = signal.getsignal(signal.SIGINT), []

    class Watch(Callback):
        def on_before_optimizer_step(self, *args) -> None:
            seen.append(signal.getsignal(signal.SIGINT))

    callbacks = [
        LastCheckpoint(folder=tmp_path, every_steps=100),
        Signal(signal.SIGINT, 1),
        Watch(),
    ]
    with pytest.raises(Interrupted):
        toy_trainer(9, callbacks=callbacks).fit(toy_stage(1), datamodule=ToyData())
    assert seen[0] != previous and seen[1] is previous


def test_an_interrupted_run_ends_where_an_undisturbed_one_does(tmp_path: Path) -> None:
    straight = toy_stage(2)
    toy_trainer(6).fit(straight, datamodule=ToyData())
    callbacks = [LastCheckpoint(folder=tmp_path, every_steps=100), Signal(signal.SIGINT, 2)]
    with pytest.raises(Interrupted):
        toy_trainer(6, callbacks=callbacks).fit(toy_stage(2), datamodule=ToyData())
    resumed = toy_stage(2)
    toy_trainer(6).fit(resumed, datamodule=ToyData(), ckpt_path=tmp_path / "last.ckpt")
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


class FailingData(ToyData):
    """Its training batches end with an error of the data."""

    def train_dataloader(self):
        loader = super().train_dataloader()
        batches = type(loader).__iter__

        class Failing(type(loader)):
            def __iter__(self):
                for number, batch in enumerate(batches(self)):
                    yield batch
                    if number == 2:
                        raise DataError("a process that reads data has died")

        loader.__class__ = Failing
        return loader


def test_data_that_fail_leave_a_checkpoint_of_every_step_taken(tmp_path: Path) -> None:
    callbacks = [LastCheckpoint(folder=tmp_path, every_steps=100)]
    with pytest.raises(DataError):
        toy_trainer(9, callbacks=callbacks).fit(toy_stage(1), datamodule=FailingData())
    assert step_of(tmp_path) == 3
    straight, resumed = toy_stage(1), toy_stage(1)
    toy_trainer(6).fit(straight, datamodule=ToyData())
    toy_trainer(6).fit(resumed, datamodule=ToyData(), ckpt_path=tmp_path / "last.ckpt")
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_an_interval_below_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every_steps=0"):
        LastCheckpoint(folder=tmp_path, every_steps=0)
