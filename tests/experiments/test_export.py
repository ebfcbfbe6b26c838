"""`--exp=export`: the same pictures from half the bytes, and the record of where they come from."""

import json
from pathlib import Path

import pytest
import torch

from dcar.models.checkpoints import save_model
from dcar.pipeline import DCARPipeline
from experiments.run import main
from tests.toys import toy_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(toy_model(), tmp_path / "model", lineage={"exp": "toy", "ancestors": []})
    return tmp_path / "model"


def export(folder: Path, out: Path, *more: str) -> int:
    return main(["--exp=export", f"ckpt={folder}", f"out={out}", *more])


def test_an_exported_model_draws_the_same_pictures(folder: Path, tmp_path: Path) -> None:
    assert export(folder, tmp_path / "out", "precision=float32") == 0
    ours, theirs = (
        DCARPipeline.from_pretrained(path)("a", seeds=1, steps=2)[0].tobytes()
        for path in (folder, tmp_path / "out")
    )
    assert ours == theirs


def test_weights_are_stored_in_half_precision_and_say_what_they_are_made_of(
    folder: Path, tmp_path: Path
) -> None:
    assert export(folder, tmp_path / "out") == 0
    exported = DCARPipeline.from_pretrained(tmp_path / "out").model.generator.state_dict()
    for name, tensor in exported.items():
        if tensor.is_floating_point() and tensor.ndim:  # the residual's scale stays exact
            assert torch.equal(tensor.half().to(tensor.dtype), tensor), name
    lineage = json.loads((tmp_path / "out" / "config.json").read_text())["lineage"]
    assert lineage["parent"]["how"] == "exported" and lineage["exp"] == "toy"


def test_a_dry_run_writes_nothing(folder: Path, tmp_path: Path) -> None:
    assert export(folder, tmp_path / "out", "--dry-run") == 0
    assert not (tmp_path / "out").exists()


def test_a_precision_there_is_not_is_exit_2_and_named(folder: Path, tmp_path: Path, capsys) -> None:
    assert export(folder, tmp_path / "out", "precision=int4") == 2
    assert "precision=int4 must be one of" in capsys.readouterr().err
