"""The command: arguments, exit codes, one-line errors."""

import subprocess
import sys

import pytest

from experiments.run import main, parse
from tests.toys import ROOT


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--exp=quickstart/stage1", "max_step=3"], 2, "did you mean 'max_steps'"),
        (["--exp=quickstart/stag1"], 2, "did you mean 'quickstart/stage1'"),
        ([], 2, "--exp=NAME"),
        (["--exp=quickstart/stage1", "--ckpt=last", "outputs=nowhere"], 2, "no checkpoint at"),
        (["--exp=quickstart/stage3", "outputs=nowhere"], 2, "no checkpoint at nowhere"),
        (["--exp=smoke/stage1", "module.gradient_clip=a"], 2, "expected number"),
        (["--exp=smoke/stage1", "+module.colour=a"], 2, "colour"),
        (["--exp=smoke/stage1", "data.train.urls=nowhere/*.tar", "outputs=no"], 3, "nowhere"),
        (["--exp=sample", "ckpt=nowhere", "prompt=x"], 2, "ckpt=nowhere"),
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


def test_an_unknown_option_is_a_usage_error() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "experiments.run", "--expp=x"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "--expp" in done.stderr
