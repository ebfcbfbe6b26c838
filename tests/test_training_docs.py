"""Every command of docs/training.md, in its order."""

import re
import shlex
from pathlib import Path

import pytest

from benchmarks.training import SMALL, overrides, parse
from experiments.config import load_config
from experiments.run import main
from tests.toys import ROOT

PAGE = (ROOT / "docs/training.md").read_text()
COMMANDS = [
    shlex.split(command, comments=True)
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S)
    for command in re.sub(r"\\\n\s*", "", block).split("\n")
    if command and not command.startswith("#")
]
RUNS = [words[3:] for words in COMMANDS if words[:3] == ["python", "-m", "experiments.run"]]
BENCHMARKS = [
    words[3:] for words in COMMANDS if words[:3] == ["python", "-m", "benchmarks.training"]
]
(SRUN,) = [words for words in COMMANDS if words[0] == "srun"]


def test_no_command_of_the_page_is_left_out() -> None:
    assert len(RUNS) + len(BENCHMARKS) + 1 == len(COMMANDS)


@pytest.mark.slow
def test_the_page_is_followed_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("assets").symlink_to(ROOT / "assets")
    for words in RUNS:
        takes_hours = "--exp=mini/generator" in words
        assert main([*words, "--dry-run"] if takes_hours else words) == 0, words
    told = capsys.readouterr().out
    assert "resumed" in told  # by lineage
    assert "h100" in told.lower()  # by plan


def test_the_batch_script_composes(capsys: pytest.CaptureFixture[str]) -> None:
    words = SRUN[SRUN.index("experiments.run") + 1 :]
    assert main([*words, "--print-config"]) == 0
    assert "num_nodes: 8" in capsys.readouterr().out


@pytest.mark.parametrize("words", BENCHMARKS, ids=" ".join)
def test_a_benchmark_command_composes(words: list[str], tmp_path: Path) -> None:
    options = parse(words[: words.index("&&")] if "&&" in words else words)
    for name in options.exp:
        name = SMALL.get(name, name) if options.small else name
        assert load_config(name, overrides(name, options, str(tmp_path))).batch_size > 0
