"""last.ckpt stays current; a signal ends a run cleanly and the next one goes on."""

import os
import signal
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from dcar.errors import DataError, Interrupted
from dcar.lit.last_checkpoint import LastCheckpoint, step_files
from dcar.models.checkpoints import file_digest, known_digests
from tests.stopping import Signal, SignalAtBatch, fit, step_of
from tests.toys import ToyData, toy_stage, toy_trainer


def assert_equal(one, other) -> None:
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


class Saved(Callback):
    """Remembers the step of each checkpoint."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_save_checkpoint(self, trainer, *args, **kwargs) -> None:
        self.steps.append(trainer.global_step)


def test_it_saves_at_intervals_and_at_the_last_step(tmp_path: Path) -> None:
    saved, previous = Saved(), signal.getsignal(signal.SIGINT)
    fit(5, LastCheckpoint(folder=tmp_path, every_steps=2), saved)
    assert saved.steps == [2, 4, 5] and step_of(tmp_path) == 5
    assert signal.getsignal(signal.SIGINT) is previous


def test_the_last_step_files_stay_and_last_is_the_newest_of_them(tmp_path: Path) -> None:
    (tmp_path / "best.ckpt").write_bytes(b"another's")
    fit(5, LastCheckpoint(folder=tmp_path, every_steps=1, keep=3))
    names = [f"step_{step:08d}.ckpt" for step in (3, 4, 5)]
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {
        "best.ckpt",
        *(f"{name}{end}" for name in ("last.ckpt", *names) for end in ("", ".sha256")),
    }
    assert (tmp_path / "last.ckpt").samefile(tmp_path / names[-1])
    for name in ("last.ckpt", *names):
        assert known_digests(tmp_path / name) == [file_digest(tmp_path / name)]


def test_checkpoints_of_later_steps_of_an_earlier_run_go_once_there_is_a_new_one(
    tmp_path: Path,
) -> None:
    fit(6, LastCheckpoint(folder=tmp_path, every_steps=1))
    fit(3, LastCheckpoint(folder=tmp_path, every_steps=1))
    assert list(step_files(tmp_path)) == [2, 3] and step_of(tmp_path) == 3


@pytest.mark.parametrize("keep", [0, -1])
def test_to_keep_less_than_one_checkpoint_is_refused(keep: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"keep={keep}"):
        LastCheckpoint(folder=tmp_path, every_steps=1, keep=keep)


def test_a_folder_that_is_a_url_is_refused() -> None:
    with pytest.raises(ValueError, match="folder=s3://bucket/run: .* local folder"):
        LastCheckpoint(folder="s3://bucket/run", every_steps=1)


def test_nothing_is_saved_between_the_batches_of_one_step(tmp_path: Path) -> None:
    """Half of a gradient is in no checkpoint; a signal waits for the other half."""
    saved = Saved()
    last = LastCheckpoint(folder=tmp_path, every_steps=1)
    with pytest.raises(Interrupted):
        fit(9, last, SignalAtBatch(signal.SIGTERM, 2), saved, accumulate=2)
    assert saved.steps == [1, 2]
    straight = fit(4, accumulate=2)
    resumed = fit(4, accumulate=2, ckpt_path=tmp_path / "last.ckpt")
    assert_equal(straight, resumed)


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


def test_after_a_signal_a_second_one_ends_the_process_at_once(tmp_path: Path) -> None:
    previous, seen = signal.getsignal(signal.SIGINT), []

    class Watch(Callback):
        def on_before_optimizer_step(self, *args) -> None:
            seen.append(signal.getsignal(signal.SIGINT))

    last = LastCheckpoint(folder=tmp_path, every_steps=100)
    with pytest.raises(Interrupted):
        fit(9, last, Signal(signal.SIGINT, 1), Watch())
    assert seen[0] not in (previous, signal.SIG_DFL) and seen[1] is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is previous


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


class NoData(ToyData):
    """There is no loader, or its first batch cannot be read."""

    def __init__(self, has_loader: bool):
        super().__init__()
        self.has_loader = has_loader

    def train_dataloader(self):
        if not self.has_loader:
            raise DataError("fewer shards than processes")
        loader = super().train_dataloader()

        class Failing(type(loader)):
            def __iter__(self):
                raise DataError("a process that reads data has died")
                yield

        loader.__class__ = Failing
        return loader


@pytest.mark.parametrize("has_loader", [False, True])
def test_data_that_fail_before_the_first_step_leave_the_checkpoints_of_an_earlier_run(
    has_loader: bool, tmp_path: Path
) -> None:
    fit(1, LastCheckpoint(folder=tmp_path, every_steps=1))
    last = LastCheckpoint(folder=tmp_path, every_steps=1)
    with pytest.raises(DataError):
        toy_trainer(9, callbacks=[last]).fit(toy_stage(1), datamodule=NoData(has_loader))
    assert step_of(tmp_path) == 1 and list(step_files(tmp_path)) == [1]


def test_a_signal_in_a_validation_between_two_batches_waits_for_the_step(tmp_path: Path) -> None:
    callbacks = [LastCheckpoint(folder=tmp_path, every_steps=100), SignalInValidation()]
    validating = {"val_check_interval": 3, "limit_val_batches": 1}
    with pytest.raises(Interrupted):
        toy_trainer(9, callbacks=callbacks, **validating).fit(
            toy_stage(1, accumulate=2), datamodule=ToyData()
        )
    assert step_of(tmp_path) == 2
