"""The quickstart's order and its going on where it stopped (its figures: tests/test_readme.py)."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.config import load_config
from experiments.recipe import settings_of
from experiments.run import main
from tests.toys import ROOT

RUNS = ("stage1", "stage2", "stage3", "generator_32", "generator_64")


def test_each_run_starts_from_the_one_before() -> None:
    configs = {run: load_config(f"quickstart/{run}") for run in RUNS}
    assert configs["stage2"].init_from == "quickstart/stage1"
    assert configs["stage3"].init_from == "quickstart/stage2"
    assert configs["generator_64"].init_from == "quickstart/generator_32"
    for run in ("generator_32", "generator_64"):
        assert configs[run].tokenizer_from == "quickstart/stage3"
    assert (configs["generator_32"].size, configs["generator_64"].size) == (32, 64)


def test_what_the_recipe_says_goes_before_what_a_training_s_own_file_says() -> None:
    recipe = load_config("quickstart")
    assert tuple(recipe.steps) == RUNS
    own = load_config("quickstart/stage2")
    assert settings_of(recipe, "stage2").max_steps == own.max_steps
    more = ["steps.stage2=40", "seed=3", "outputs=there", "overrides=batch_size=2 size=32"]
    settings = settings_of(load_config("quickstart", more), "stage2")
    warmup_steps = own.warmup_steps * 40 // own.max_steps
    assert (settings.max_steps, settings.warmup_steps, settings.seed) == (40, warmup_steps, 3)
    assert (settings.outputs, settings.batch_size, settings.size) == ("there", 2, 32)
    assert settings_of(recipe, "stage1").max_steps != 40


def test_what_a_later_training_cannot_take_is_told_before_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    swap = "overrides=tokenizer/quantizer=simvq"  # not for mini/decoder, the last
    assert main(["--exp=mini", f"outputs={tmp_path}/out", swap]) == 2
    assert (
        "error: mini/decoder: this experiment has no choice of tokenizer/quantizer"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()


def start(folder: Path, *steps: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "experiments.run", "--exp=quickstart", f"outputs={folder}"]
    command.append("overrides=trainer.limit_val_batches=1 save_every=1")
    return subprocess.Popen(
        [*command, *steps], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def interrupt_in(run: str, process: subprocess.Popen, folder: Path) -> None:
    """Ctrl-C once `run` has taken a step, which ends the process with 130."""
    deadline = time.monotonic() + 240
    while not (folder / f"quickstart/{run}/checkpoints/last.ckpt").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()[-2000:]
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=240)
    assert process.returncode == 130, error[-2000:]


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    """Interrupted in stage 2; the second call leaves stage 1 alone and goes on to stage 3."""
    stage1, stage2 = (
        tmp_path / f"quickstart/{run}/checkpoints/last.ckpt" for run in ("stage1", "stage2")
    )
    first = start(tmp_path, "steps.stage1=4", "steps.stage2=4000")
    interrupt_in("stage2", first, tmp_path)
    assert stage2.exists()
    before = stage1.stat().st_mtime_ns
    second = start(tmp_path, *(f"steps.{run}={4000 if run == 'stage3' else 4}" for run in RUNS))
    interrupt_in("stage3", second, tmp_path)
    assert stage1.stat().st_mtime_ns == before
    assert (tmp_path / "quickstart/stage2/metrics.json").is_file()
