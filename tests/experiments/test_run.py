"""The command: arguments, exit codes, one-line errors."""

import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import Callback

from dcar.errors import Interrupted
from dcar.lit.checkpoint_io import DurableCheckpointIO
from dcar.lit.last_checkpoint import LastCheckpoint
from experiments.run import main, parse
from tests.toys import ROOT, ToyData, toy_stage, toy_trainer


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--exp=quickstart/stage1", "max_step=3"], 2, "did you mean 'max_steps'"),
        (["--exp=quickstart/stag1"], 2, "did you mean 'quickstart/stage1'"),
        ([], 2, "--exp=NAME"),
        (["--exp=quickstart/stage1", "--ckpt=last", "outputs=nowhere"], 2, "no checkpoint at"),
        (
            ["--exp=quickstart/stage3", "outputs=nowhere"],
            2,
            "init_from=quickstart/stage2: there is no checkpoint at nowhere/quickstart/stage2/",
        ),
        (["--exp=smoke/stage1", "module.gradient_clip=a"], 2, "expected number"),
        (["--exp=smoke/stage1", "+module.colour=a"], 2, "colour"),
        (["--exp=smoke/stage1", "data.train.urls=nowhere/*.tar", "outputs=no"], 3, "nowhere"),
        (["--exp=sample", "ckpt=nowhere", "prompt=x"], 2, "ckpt=nowhere"),
        (["--exp=sample", "--ckpt=nowhere", "prompt=x"], 2, "did you mean ckpt=nowhere?"),
        (["--exp=data/stats", "--ckpt=a", "in=b"], 2, "--ckpt=a is for trainings"),
        (["--exp=quickstart", "--ckpt=best"], 2, "from its own last checkpoint"),
        (["--exp=sample", "prompt=null"], 2, "prompt must be given"),
        (["--exp=sample", "prompt=x", "device=gpu"], 2, "device=gpu: "),
        (["--exp=sample", "prompt=x", "seed=null"], 2, "seed=None must be at least 0"),
        (["--exp=sample", "prompt=x", "out=/dev/null/x.png"], 2, "/dev/null is no folder"),
    ],
)
def test_bad_input_gives_its_exit_code_and_one_line(
    arguments: list[str], code: int, message: str, capsys, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == code
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert len([line for line in error.splitlines() if line.startswith("error:")]) == 1


def test_overrides_may_stand_anywhere() -> None:
    options = parse(["a=1", "--exp=x", "b=2", "--dry-run", "c=3"])
    assert options.overrides == ["a=1", "b=2", "c=3"] and options.dry_run


def test_list_shows_every_experiment_with_its_first_line(capsys) -> None:
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("quickstart ") and "emoji" in line for line in lines)


def test_print_config_is_complete(capsys) -> None:
    assert main(["--exp=quickstart/stage1", "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert "${" not in printed and "dcar.lit.tokenizer.TokenizerStage1" in printed


def test_an_unknown_option_is_a_usage_error(capsys) -> None:
    for options in (["--dryrun", "--exp=sample"], ["--exp=sample", "steps=2", "--dryrun"]):
        assert main(options) == 2
        assert "'--dryrun'; did you mean '--dry-run'?" in capsys.readouterr().err
    for option in ("--steps=4", "-5", "--prompt"):
        assert main(["--exp=sample", option, "prompt=a"]) == 2
        error = capsys.readouterr().err
        assert f"unknown option '{option.partition('=')[0]}'" in error
        assert ("settings have no dashes: steps=4" in error) == (option == "--steps=4")


def test_help_says_what_each_option_does(capsys) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "usage: python -m experiments.run --exp=NAME [key=value ...]"
    for option in ("--exp NAME", "--list", "--print-config", "--dry-run"):
        line = next(line for line in lines if line.strip().startswith(option))
        assert len(line.split(maxsplit=1)[1]) > 20, option
    assert any(line.startswith("Exit codes: 0 done") for line in lines)


COMMAND = ["--exp=smoke/stage1", "task=a_task.task"]


def as_task(monkeypatch, task) -> None:
    """COMMAND calls `task`, whatever it does."""
    monkeypatch.setitem(sys.modules, "a_task", types.SimpleNamespace(task=task))


class SignalIn(Callback):
    """Sends this process a signal in one of Lightning's hooks."""

    def __init__(self, hook: str, number: int):
        setattr(self, hook, lambda *_, **__: os.kill(os.getpid(), number))


@pytest.mark.parametrize(
    ("hook", "saved"),
    [("setup", False), ("on_fit_start", False), ("on_train_batch_start", True)]
    + [("on_train_end", True), ("on_fit_end", True)],
)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_gives_its_exit_code_before_during_and_after_training(
    hook: str, saved: bool, number: int, code: int, tmp_path: Path, monkeypatch, capsys
) -> None:
    def task(config, options) -> None:
        last = LastCheckpoint(folder=tmp_path, every_steps=1)
        callbacks = [SignalIn(hook, number), last]
        trainer = toy_trainer(2, callbacks=callbacks, plugins=[DurableCheckpointIO()])
        trainer.fit(toy_stage(1), datamodule=ToyData())

    as_task(monkeypatch, task)
    before = signal.getsignal(signal.SIGTERM)
    at_ctrl_c = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job has it ignored
    try:
        assert main(COMMAND) == code
        assert signal.getsignal(signal.SIGTERM) is before
    finally:  # Lightning ignores Ctrl-C from the first one on
        signal.signal(signal.SIGINT, at_ctrl_c)
    assert (tmp_path / "last.ckpt").exists() == saved
    assert "Traceback" not in capsys.readouterr().err


def test_a_signal_in_a_task_that_has_nothing_to_do_with_training_ends_it(monkeypatch) -> None:
    def task(config, options) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("it went on")

    as_task(monkeypatch, task)
    assert main(COMMAND) == 143


def test_a_job_that_is_queued_again_has_done_what_it_should(monkeypatch, capsys) -> None:
    def task(config, options) -> None:
        raise Interrupted(signal.SIGUSR1, requeued=True)

    as_task(monkeypatch, task)
    assert main(COMMAND) == 0
    assert "stopped by SIGUSR1; the job is queued again" in capsys.readouterr().err


def test_a_forked_child_that_is_terminated_ends_without_a_word(monkeypatch, capfd) -> None:
    def task(config, options) -> None:
        if (child := os.fork()) == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143

    as_task(monkeypatch, task)
    assert main(COMMAND) == 0
    assert capfd.readouterr().err == ""


def test_another_way_out_is_left_as_it_is(monkeypatch) -> None:
    as_task(monkeypatch, lambda config, options: sys.exit(7))
    with pytest.raises(SystemExit, match="7"):
        main(COMMAND)


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)  # before anything is written: `| head` may also end after the last line
    command = [sys.executable, "-m", "experiments.run", "--list"]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 141 and done.stderr == ""
