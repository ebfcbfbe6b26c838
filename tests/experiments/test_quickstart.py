"""The quickstart's order and its going on where it stopped (its figures: tests/test_readme.py)."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.config import load_config
from experiments.quickstart import RUNS
from tests.toys import ROOT

FEW = [f"steps.{run}=4" for run in RUNS]


def test_each_run_starts_from_the_one_before() -> None:
    configs = {run: load_config(f"quickstart/{run}") for run in RUNS}
    assert configs["stage2"].init_from == "quickstart/stage1"
    assert configs["stage3"].init_from == "quickstart/stage2"
    assert configs["generator_64"].init_from == "quickstart/generator_32"
    for run in ("generator_32", "generator_64"):
        assert configs[run].tokenizer_from == "quickstart/stage3"
    assert (configs["generator_32"].size, configs["generator_64"].size) == (32, 64)


def test_it_has_a_number_of_steps_for_each_run() -> None:
    assert set(load_config("quickstart").steps) == set(RUNS)


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    """Interrupted in stage 2; the second call leaves stage 1 alone and finishes."""
    last = tmp_path / "quickstart/stage2/checkpoints/last.ckpt"
    command = [sys.executable, "-m", "experiments.run", "--exp=quickstart", f"outputs={tmp_path}"]
    first = subprocess.Popen(
        [*command, "steps.stage1=4", "steps.stage2=4000"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 240
    while not (tmp_path / "quickstart/stage2/config.yaml").exists():
        assert first.poll() is None and time.monotonic() < deadline, first.stderr.read()[-2000:]
        time.sleep(0.5)
    time.sleep(15)
    os.kill(first.pid, signal.SIGINT)
    _, error = first.communicate(timeout=240)
    assert first.returncode == 130, error[-2000:]
    assert last.exists()
    stage1 = (tmp_path / "quickstart/stage1/checkpoints/last.ckpt").stat().st_mtime_ns
    second = subprocess.run([*command, *FEW], cwd=ROOT, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr[-3000:]
    assert (tmp_path / "quickstart/report.html").is_file()
    now = (tmp_path / "quickstart/stage1/checkpoints/last.ckpt").stat().st_mtime_ns
    assert now == stage1
