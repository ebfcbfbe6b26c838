"""The command of the judge: it trains, writes a file that loads, and writes it again."""

from pathlib import Path

import pytest

from dcar.models.judge import load_judge
from experiments.run import main
from tests.toys import ROOT


@pytest.mark.slow
def test_the_command_leaves_a_judge_with_its_figures(tmp_path: Path) -> None:
    shards = f"{ROOT}/assets/emoji/val-000000.tar"
    command = [
        "--exp=judge",
        f"outputs={tmp_path}",
        f"data.train.urls={shards}",
        f"data.scenes.scenes.urls=[{shards}]",
        "data.scene_views=8",
        "module.judge.side=32",
        "module.judge.hidden={concept: 8, style: 8, count: 8}",
        "batch_size=8",
        "warmup_steps=1",
        "cooldown_steps=1",
        "max_steps=3",
        "accumulate=2",
        "val_every=3",
    ]
    assert main([*command, "--dry-run"]) == 0 and not list(tmp_path.iterdir())
    assert main(command) == 0
    path = tmp_path / "judge" / "judge.safetensors"
    figures = load_judge(path).figures
    assert (figures["steps"], figures["images"]) == (3, 48)
    assert {"val/concept_top1", "heldout/concept_top5", "heldout/style_top1"} < set(figures)
    assert "scenes/count" in figures and not any(name.startswith("train/") for name in figures)
    first = path.read_bytes()
    path.unlink()
    assert main([*command, "--ckpt=auto"]) == 0
    assert path.read_bytes() == first


def test_a_place_where_no_weights_can_lie_is_refused_before_training(
    tmp_path: Path, capsys
) -> None:
    (tmp_path / "file").touch()
    place = f"weights={tmp_path}/file/judge.safetensors"
    assert main(["--exp=judge", f"outputs={tmp_path}/new", place]) == 2
    assert f"{tmp_path}/file is no folder" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_several_processes_are_refused(tmp_path: Path, capsys) -> None:
    """They would all see the same views."""
    assert main(["--exp=judge", f"outputs={tmp_path}", "trainer.devices=2"]) == 2
    assert "trainer.devices=2" in capsys.readouterr().err and not list(tmp_path.iterdir())
