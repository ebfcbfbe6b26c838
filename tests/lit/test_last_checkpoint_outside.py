"""The last checkpoint against what comes from outside: full disks, SLURM, another rank."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.environments import SLURMEnvironment
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dcar.errors import CheckpointError, Interrupted
from dcar.lit.last_checkpoint import LastCheckpoint, step_files
from dcar.models.checkpoints import file_digest, known_digests
from experiments.train import build_logger
from tests.stopping import Signal, SignalAtBatch, fit, step_of
from tests.toys import ToyData, toy_stage, toy_trainer

SCRIPT = Path(__file__).with_name("kill_run.py")


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


@pytest.mark.slow
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


@pytest.mark.parametrize("accumulate", [1, 3])
def test_tensorboard_after_a_resume_has_each_step_once(tmp_path: Path, accumulate: int) -> None:
    """Steps 6 to 8 are logged by a run that is killed after its checkpoint of step 5.

    Steps are optimizer steps, and the last one of an epoch of four batches may have one alone.
    """

    def run(steps: int, ckpt_path: Path | None = None) -> None:
        node = OmegaConf.create(
            {
                "_target_": "dcar.lit.board.TensorBoardLogger",
                "save_dir": str(tmp_path),
                "name": "tensorboard",
                "version": "",
                "max_queue": 1,
            }
        )
        logger = build_logger(node, ckpt_path)
        last = LastCheckpoint(folder=tmp_path / f"to_{steps}", every_steps=5)
        module = toy_stage(1, accumulate=accumulate)
        trainer = toy_trainer(steps, callbacks=[last], logger=logger, log_every_n_steps=1)
        logger.trainer = trainer
        trainer.fit(module, datamodule=ToyData(count=16), ckpt_path=ckpt_path)

    run(8)
    assert {*logged_steps(tmp_path / "tensorboard")} - {0} == {*range(1, 9)}
    run(10, tmp_path / "to_8" / "step_00000005.ckpt")
    steps = logged_steps(tmp_path / "tensorboard")
    assert steps == sorted(steps) and {*steps} - {0} == {*range(1, 11)}
    assert accumulate > 1 or len(steps) == 10  # a step of several batches is logged after each


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
    assert found["data"]["batches"]["ready"] == found["data"]["batches"]["started"] == 3
    assert found["disk"]["codes"] == [2, 2] and "step" not in found["disk"]
    assert found["terminate"]["ranks"] == found["data"]["ranks"] == 2
    assert all(event["seconds"] < 60 for event in found.values())
