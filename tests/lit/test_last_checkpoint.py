"""last.ckpt stays current; a signal ends a run cleanly and the next one goes on."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dcar.data.members import DataError
from dcar.lit.checkpoint_io import DurableCheckpointIO
from dcar.lit.last_checkpoint import Interrupted, LastCheckpoint, step_files
from dcar.models.checkpoints import CheckpointError, file_digest, known_digests
from experiments.resume import first_logged_step
from tests.toys import ToyData, toy_stage, toy_trainer

SCRIPT = Path(__file__).with_name("kill_run.py")


class Signal(Callback):
    """Sends this process a signal in the middle of a step."""

    def __init__(self, number: int, at_step: int):
        self.number, self.at_step = number, at_step

    def on_train_batch_start(self, trainer, *args, **kwargs) -> None:
        if trainer.global_step == self.at_step:
            os.kill(os.getpid(), self.number)


class SignalAtBatch(Callback):
    """Sends this process a signal in the middle of a batch of the epoch."""

    def __init__(self, number: int, batch_idx: int):
        self.number, self.batch_idx = number, batch_idx

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if batch_idx == self.batch_idx:
            os.kill(os.getpid(), self.number)


def fit(steps: int, *callbacks: Callback, ckpt_path: Path | None = None, **options):
    """A toy stage trained to `steps`, on 8 batches an epoch."""
    module = toy_stage(1, **options)
    trainer = toy_trainer(steps, callbacks=list(callbacks), plugins=[DurableCheckpointIO()])
    trainer.fit(module, datamodule=ToyData(2), ckpt_path=ckpt_path)
    return module


def assert_equal(one, other) -> None:
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def step_of(folder: Path) -> int:
    return torch.load(folder / "last.ckpt", weights_only=True)["global_step"]


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


class Full:
    """A disk on which no file grows beyond a size, from a step on."""

    def __init__(self, size: int):
        self.size = size

    def __enter__(self) -> None:
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *args) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


class FullFrom(Callback):
    """The disk is full while this step and those after it are saved."""

    def __init__(self, step: int, until: int = 100):
        self.step, self.until, self.disk = step, until, Full(50_000)

    def on_train_batch_start(self, trainer, *args, **kwargs) -> None:
        if trainer.global_step + 1 == self.step:
            self.disk.__enter__()
        if trainer.global_step == self.until:
            self.disk.__exit__()

    def on_exception(self, *args) -> None:
        self.disk.__exit__()


def test_a_full_disk_is_reported_and_training_goes_on(tmp_path: Path, caplog) -> None:
    fit(5, LastCheckpoint(folder=tmp_path, every_steps=1), FullFrom(2, until=3))
    assert list(step_files(tmp_path)) == [4, 5] and step_of(tmp_path) == 5
    errors = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert len(errors) == 2  # of steps 2 and 3; last.ckpt was not tried
    assert "step_00000002.ckpt could not be written: File too large" in errors[0]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("told", [False, True])
def test_a_full_disk_at_the_end_is_an_error_and_the_last_good_checkpoint_stays(
    told: bool, tmp_path: Path
) -> None:
    last = LastCheckpoint(folder=tmp_path, every_steps=1)
    others = [SignalAtBatch(signal.SIGTERM, 3)] if told else []
    with pytest.raises(CheckpointError, match=r"step_0000000\d.ckpt is not saved: File too large"):
        fit(9 if told else 4, last, FullFrom(4), *others)
    assert step_of(tmp_path) == 3
    assert known_digests(tmp_path / "last.ckpt") == [file_digest(tmp_path / "last.ckpt")]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("answer", [0, 1])
def test_in_a_slurm_job_sigusr1_saves_and_queues_the_job_again(
    answer: int, tmp_path: Path, monkeypatch
) -> None:
    asked, scontrol = tmp_path / "asked", tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {asked}\nexit {answer}\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    previous = signal.getsignal(signal.SIGUSR1)
    last = LastCheckpoint(folder=tmp_path, every_steps=100)
    with pytest.raises(Interrupted) as stopped:
        fit(9, last, Signal(signal.SIGUSR1, 2))
    assert asked.read_text() == "requeue 4711\n" and step_of(tmp_path) == 3
    assert stopped.value.exit_code == (0 if answer == 0 else 128 + signal.SIGUSR1)
    assert signal.getsignal(signal.SIGUSR1) is previous


def test_outside_slurm_sigusr1_is_left_alone(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    previous, seen = signal.getsignal(signal.SIGUSR1), []

    class Watch(Callback):
        def on_train_batch_start(self, *args) -> None:
            seen.append(signal.getsignal(signal.SIGUSR1))

    fit(1, LastCheckpoint(folder=tmp_path, every_steps=1), Watch())
    assert seen == [previous]


def test_lightning_s_own_requeueing_stands_aside_where_it_is_told_to(
    tmp_path: Path, monkeypatch
) -> None:
    """As a SLURM job has it; the two would otherwise both handle the signal before the loop."""
    slurm = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train"}
    ranks = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    for name, value in (slurm | ranks).items():
        monkeypatch.setenv(name, value)
    seen = []

    class Watch(Callback):
        def on_train_start(self, *args) -> None:  # comes before LastCheckpoint's
            seen.append(signal.getsignal(signal.SIGUSR1))

    last = LastCheckpoint(folder=tmp_path, every_steps=1)
    environment = SLURMEnvironment(auto_requeue=False)
    previous = signal.getsignal(signal.SIGUSR1)
    trainer = toy_trainer(1, callbacks=[Watch(), last], plugins=[environment])
    trainer.fit(toy_stage(1), datamodule=ToyData())
    assert seen == [previous] and step_of(tmp_path) == 1


def logged_steps(folder: Path) -> list[int]:
    events = EventAccumulator(str(folder)).Reload()
    return [event.step for event in events.Scalars("train/loss")]


def test_tensorboard_after_a_resume_has_each_step_once(tmp_path: Path) -> None:
    """Steps 5 to 7 are logged by a run that is killed after its checkpoint of step 5."""

    def run(steps: int, ckpt_path: Path | None = None) -> None:
        purge = None
        if ckpt_path is not None:
            purge = first_logged_step(torch.load(ckpt_path, weights_only=True))
        logger = TensorBoardLogger(
            tmp_path, name="tensorboard", version="", purge_step=purge, max_queue=1
        )
        last = LastCheckpoint(folder=tmp_path / f"to_{steps}", every_steps=5)
        trainer = toy_trainer(steps, callbacks=[last], logger=logger, log_every_n_steps=1)
        trainer.fit(toy_stage(1), datamodule=ToyData(), ckpt_path=ckpt_path)

    run(8)
    assert logged_steps(tmp_path / "tensorboard") == list(range(8))
    run(10, tmp_path / "to_8" / "step_00000005.ckpt")
    assert logged_steps(tmp_path / "tensorboard") == list(range(10))


@pytest.mark.slow
def test_what_ends_one_of_two_processes_ends_both_with_a_checkpoint_and_the_right_code(
    tmp_path: Path,
) -> None:
    """SIGTERM to one, data that one cannot read, a disk that is full: nobody waits for nobody."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "ranks", str(tmp_path), "terminate", "data", "disk"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["terminate"]["codes"] == [143, 143] and found["terminate"]["step"] == 3
    # the first process had read the fourth batch, which the second could not: nobody trained on it
    assert found["data"]["codes"] == [3, 3] and found["data"]["step"] == 3
    assert found["data"]["position"] == [{"position": 3}]
    assert found["disk"]["codes"] == [2, 2] and "step" not in found["disk"]
    assert found["terminate"]["ranks"] == found["data"]["ranks"] == 2
    assert all(event["seconds"] < 60 for event in found.values())
