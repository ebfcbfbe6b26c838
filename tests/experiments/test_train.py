"""The training task on the embedded data: smoke experiments end to end, resume, dry run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dcar.errors import CheckpointError
from dcar.models.checkpoints import load_model
from experiments.config import load_config
from experiments.resume import find_resume, finished
from experiments.run import RunOptions, main
from experiments.sample import find_model
from experiments.train import resolve_precision, train
from tests.toys import ROOT

CHAIN = ("stage1", "stage2", "stage3", "pretrain_256", "finetune_512")


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """All five smoke trainings in order, as a user would run them."""
    outputs = tmp_path_factory.mktemp("outputs")
    for name in CHAIN:
        assert main([f"--exp=smoke/{name}", f"outputs={outputs}"]) == 0, name
    return outputs


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAIN)
def test_a_run_leaves_checkpoint_config_metrics_and_events(name: str, trained: Path) -> None:
    folder = trained / "smoke" / name
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 6
    assert (folder / "config.yaml").is_file() and (folder / "checkpoints" / "best.ckpt").is_file()
    facts = json.loads((folder / "metrics.json").read_text())
    assert facts["steps"] == 6 and facts["seconds"] > 0
    assert any(key.startswith("val/") for key in facts["metrics"])
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert any(tag.startswith("config") for tag in events.Tags()["tensors"])
    assert any(tag.startswith("train/") for tag in events.Tags()["scalars"])


@pytest.mark.slow
def test_metrics_hold_the_last_step_s_where_a_validation_comes_after_it(tmp_path: Path) -> None:
    given = [f"outputs={tmp_path}", "data.num_workers=0", "max_steps=3", "val_every=2"]
    assert main(["--exp=smoke/stage1", *given]) == 0
    facts = json.loads((tmp_path / "smoke/stage1/metrics.json").read_text())
    assert {"train/loss", "val/psnr_hybrid"} <= set(facts["metrics"])


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAIN)
def test_stopping_and_resuming_on_shards_is_bit_equal(
    name: str, trained: Path, tmp_path: Path
) -> None:
    """The same command with 3 of 6 steps, then --ckpt=auto with all 6."""
    sources = [
        f"{key}={trained}/smoke/{value}/checkpoints/last.ckpt"
        for key, value in _sources(name).items()
    ]
    command = [f"--exp=smoke/{name}", f"outputs={tmp_path}", *sources]
    schedule = ["module.schedule.total_steps=6"]
    assert main([*command, *schedule, "max_steps=3"]) == 0
    assert main([*command, *schedule, "--ckpt=auto"]) == 0
    straight, resumed = (
        torch.load(root / "smoke" / name / "checkpoints" / "last.ckpt", weights_only=True)
        for root in (trained, tmp_path)
    )
    for key in ("state_dict", "network"):
        for tensor_name, tensor in straight[key].items():
            assert torch.equal(tensor, resumed[key][tensor_name]), tensor_name


def _sources(name: str) -> dict[str, str]:
    config = load_config(f"smoke/{name}")
    keys = ("init_from", "tokenizer_from")
    return {k: config[k].removeprefix("smoke/") for k in keys if config.get(k) is not None}


@pytest.mark.slow
def test_a_finished_run_is_not_trained_again(trained: Path, capsys) -> None:
    path = trained / "smoke" / "stage1" / "checkpoints" / "last.ckpt"
    before = path.stat().st_mtime_ns
    assert main(["--exp=smoke/stage1", f"outputs={trained}", "--ckpt=auto"]) == 0
    assert path.stat().st_mtime_ns == before


@pytest.mark.slow
def test_resuming_another_architecture_is_refused_with_its_keys(trained: Path, capsys) -> None:
    arguments = [f"outputs={trained}", "num_codes=32", "max_steps=8", "--ckpt=last"]
    assert main(["--exp=smoke/stage1", *arguments]) == 2
    assert "network.quantizer" in capsys.readouterr().err


@pytest.mark.slow
def test_the_exported_folder_and_the_checkpoint_are_one_model(trained: Path) -> None:
    run = trained / "smoke" / "finetune_512"
    folder = load_model(run / "model")
    checkpoint = find_model(str(run / "checkpoints" / "last.ckpt"), str(trained))
    for part in ("tokenizer", "generator", "text_encoder"):
        ours, theirs = getattr(folder, part).state_dict(), getattr(checkpoint, part).state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_a_dry_run_writes_no_file(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--exp=smoke/stage2", "--dry-run"]) == 0
    assert list(tmp_path.iterdir()) == []


def test_auto_starts_fresh_and_a_named_checkpoint_must_exist(tmp_path: Path) -> None:
    config = load_config("smoke/stage1", [f"outputs={tmp_path}"])
    assert find_resume(config, None) is None and find_resume(config, "auto") is None
    for ckpt in ("last", "best", "there.ckpt"):
        with pytest.raises(CheckpointError, match=f"--ckpt {ckpt}"):
            find_resume(config, ckpt)


@pytest.mark.slow
def test_a_run_says_where_it_starts_and_what_it_leaves(tmp_path: Path, caplog) -> None:
    run = ["--exp=smoke/stage1", f"outputs={tmp_path}", "max_steps=4", "--ckpt=auto"]
    folder = tmp_path / "smoke/stage1"
    assert main([*run, "module.schedule.total_steps=6"]) == 0
    assert f"starts afresh; what it leaves is in {folder}" in caplog.text
    assert main([*run, "max_steps=6"]) == 0
    assert f"goes on from {folder}/checkpoints/last.ckpt, step 4;" in caplog.text


def test_a_named_precision_is_kept() -> None:
    assert resolve_precision("16-mixed", "auto") == "16-mixed"
    assert resolve_precision("auto", "auto") in ("16-mixed", "bf16-mixed", "32-true")


def test_a_missing_stage_names_the_checkpoint_it_looked_for(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="smoke/stage1/checkpoints/last.ckpt"):
        train(load_config("smoke/stage2", [f"outputs={tmp_path}"]), RunOptions())


def wait_for(found, process: subprocess.Popen, seconds: float = 120.0):
    """What `found` gives once it gives something."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        if result := found():
            return result
        time.sleep(0.1)
    raise AssertionError(f"nothing came; exit {process.poll()}")


def endless(outputs: Path, *overrides: str) -> subprocess.Popen:
    """A training of stage 1 with two data workers, in a process group of its own."""
    command = [sys.executable, "-m", "experiments.run", "--exp=smoke/stage1", "max_steps=1000000"]
    data = ["data.num_workers=2", "data.train.cache=false", "data.val.val.cache=false"]
    return subprocess.Popen(
        [*command, *overrides, *data, f"outputs={outputs}"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


@pytest.mark.slow
def test_a_killed_data_worker_ends_the_run_with_a_checkpoint_and_no_process_left(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "smoke/stage1/checkpoints"
    process = endless(tmp_path, "val_every=3", "save_every=1000000")
    try:
        itself = psutil.Process(process.pid)

        def workers() -> list[psutil.Process]:
            found = [c for c in itself.children() if "experiments.run" in " ".join(c.cmdline())]
            return found if len(found) == 2 else []

        children = wait_for(workers, process)
        wait_for((folder / "best.ckpt").exists, process)  # the third step is taken
        os.kill(children[0].pid, signal.SIGKILL)
        begun = time.monotonic()
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 3 and time.monotonic() - begun < 60
    assert f"a process that reads data has died: DataLoader worker (pid(s) {children[0].pid})" in (
        errors
    )
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] >= 3
    assert not psutil.wait_procs(children, timeout=10)[1]


class FailAtTheEnd(Callback):
    """Breaks after the last step, before what comes after it."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        raise OSError("no room for the export")


class FailAtStep(Callback):
    def __init__(self, step: int):
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise ValueError("shapes do not match")


@pytest.mark.slow
def test_an_error_amid_a_training_is_no_wrong_setting(tmp_path: Path, capsys) -> None:
    """Before the first step it is one line and exit 2, after it a traceback."""
    command = ["--exp=smoke/stage1", f"outputs={tmp_path}", "data.num_workers=0", "max_steps=2"]
    command += ["warmup_steps=0", "save_every=1"]
    command += [f"+callbacks.fault._target_={__name__}.FailAtStep"]
    assert main([*command, "+callbacks.fault.step=0"]) == 2
    assert "error: shapes do not match" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="after step 1: shapes do not match"):
        main([*command, "+callbacks.fault.step=1"])
    assert main([*command, "--ckpt=auto", "+callbacks.fault.step=1"]) == 2  # its first, resumed


@pytest.mark.slow
def test_a_longer_run_that_did_not_come_to_its_end_is_not_taken_for_finished(
    tmp_path: Path,
) -> None:
    command = ["--exp=smoke/stage1", f"outputs={tmp_path}", "data.num_workers=0", "val_every=9"]
    command += ["warmup_steps=0"]
    folder = tmp_path / "smoke/stage1"
    assert main([*command, "max_steps=1"]) == 0
    short = load_config("smoke/stage1", [*command[1:], "max_steps=1"])
    assert finished(folder / "checkpoints/last.ckpt", short)
    fault = f"+callbacks.fault._target_={__name__}.FailAtTheEnd"
    with pytest.raises(OSError, match="no room"):
        main([*command, "max_steps=2", "--ckpt=auto", fault])
    config = load_config("smoke/stage1", [*command[1:], "max_steps=2"])
    assert not finished(folder / "checkpoints/last.ckpt", config)


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_all_processes_of_a_run_leaves_its_workers_the_step(
    signum: int, code: int, tmp_path: Path
) -> None:
    """As a terminal and SLURM send it; the step in progress still needs most of its batches."""
    process = endless(tmp_path, "val_every=1000000", "save_every=1", "accumulate=40")
    last = tmp_path / "smoke/stage1/checkpoints/last.ckpt"
    try:
        wait_for(last.exists, process)  # the first step is taken
        os.killpg(process.pid, signum)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == code and "the same command goes on" in errors, errors[-2000:]
    assert torch.load(last, weights_only=True)["global_step"] >= 1


@pytest.mark.parametrize(
    "given, message",
    [("max_steps=-4", "max_steps"), ("trainer.devices=0", "devices=0")]
    + [("trainer.accelerator=gpu", "gpu")] * (not torch.cuda.is_available()),
)
def test_what_lightning_has_no_use_for_is_said_in_a_line(
    given: str, message: str, tmp_path: Path, capsys
) -> None:
    assert main(["--exp=smoke/stage1", given, f"outputs={tmp_path}", "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: trainer: ") and message in error


@pytest.mark.parametrize("setting", ["seed=-1", "learning_rate=-0.1"])
def test_a_number_below_nothing_is_named_by_its_key(setting: str, tmp_path: Path, capsys) -> None:
    assert main(["--exp=smoke/stage1", setting, f"outputs={tmp_path}"]) == 2
    assert capsys.readouterr().err == f"error: {setting} must be at least 0\n"


def test_a_deeper_generator_needs_one_to_start_from(tmp_path: Path, capsys) -> None:
    given = [f"outputs={tmp_path}", "module.deepen=true", "tokenizer_from=null"]
    assert main(["--exp=smoke/pretrain_256", *given]) == 2
    assert "module.deepen=true needs init_from" in capsys.readouterr().err
