"""`--exp=lineage` and what trainings write for it: printed chains, found checkpoints."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningDataModule
from omegaconf import OmegaConf

from dcar.lit.checkpoint_io import save_durably
from dcar.lit.lineage import chain, digest_of_files, model_lineage
from experiments.components import build
from experiments.config import load_config
from experiments.lineage import describe, lineage_of
from experiments.run import main


def begin(name: str = "smoke/stage1", *overrides: str, resumed: Path | None = None) -> dict:
    config = load_config(name, overrides)
    settings: dict[str, Any] = {"precision": "32-true", "world_size": 1}
    return lineage_of(config, resumed=resumed, datamodule=build(config.data), **settings)


def save(path: Path, lineage: dict | None, step: int, module: str = "TokenizerStage1") -> Path:
    facts = {"module": module, "config": {}} | ({"lineage": lineage} if lineage else {})
    save_durably({"global_step": step, "dcar": facts, "weights": torch.full((8,), step)}, path)
    return path


def checkpoint_of(outputs: Path, name: str) -> Path:
    return outputs / name / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage 1 that was resumed once, and a stage 2 that started from it."""
    tmp_path = tmp_path_factory.mktemp("outputs")
    here = f"outputs={tmp_path}"
    first = save(checkpoint_of(tmp_path, "smoke/stage1"), begin("smoke/stage1", here), 4)
    os.link(first, first.with_name("step_00000004.ckpt"))
    goes_on = begin("smoke/stage1", here, "max_steps=9", resumed=first)
    save(first, goes_on, 9)
    second = begin("smoke/stage2", here)
    save(checkpoint_of(tmp_path, "smoke/stage2"), second, 6, "TokenizerStage2")
    return tmp_path


def printed(outputs: Path, reference: str | Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["--exp=lineage", f"ckpt={reference}", f"outputs={outputs}"]) == 0
    return capsys.readouterr().out


def test_the_whole_chain_is_printed_from_an_experiment_s_name(
    outputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = printed(outputs, "smoke/stage2", capsys).split("\n\n")
    stage1 = checkpoint_of(outputs, "smoke/stage1")
    assert blocks[0].startswith(str(checkpoint_of(outputs, "smoke/stage2")))
    assert blocks[1].startswith(f"started with the weights of {stage1}")
    assert blocks[2].startswith(f"resumed from {stage1}")
    assert blocks[3].strip() == "started from random weights"
    wanted = [
        ("step", "6 of TokenizerStage2"),
        ("exp", "smoke/stage2"),
        ("run", "seed 0, 1 process, 32-true, torch "),
        ("when", "run started 20"),
        ("data", "(7,953 samples, shards: "),
        ("code", "version "),
    ]
    for label, words in wanted:
        assert any(
            line.split()[0] == label and words in line for line in blocks[0].splitlines()[1:]
        )


def test_changes_and_what_became_of_files_are_printed(
    outputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(outputs, checkpoint_of(outputs, "smoke/stage2"), capsys)
    _, resumed, first, _ = text.split("\n\n")
    assert "since its parent: max_steps: 6 -> 9;" in resumed and " here" in resumed
    kept = checkpoint_of(outputs, "smoke/stage1").with_name("step_00000004.ckpt")
    assert f"kept as {kept}" in first
    kept.unlink()
    assert "overwritten since" in printed(outputs, "smoke/stage2", capsys)


def test_a_checkpoint_without_lineage_is_said_to_be_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(tmp_path / "old.ckpt", None, 4)
    text = printed(tmp_path, path, capsys)
    assert "4 of TokenizerStage1" in text and "what came before is not known" in text
    assert "random weights" not in text


def test_a_run_without_data_or_repository_is_printed_too(tmp_path: Path) -> None:
    lineage = begin() | {"data": None, "code": {"version": "1", "commit": None, "dirty": None}}
    lineage |= {"saved": "2026-01-02T03:04:05+00:00", "world_size": 8}
    text = "\n".join(describe(chain(save(tmp_path / "a.ckpt", lineage, 4))))
    assert "not of shards" in text and "version 1, in no repository" in text
    assert "8 processes" in text and "2026-01-02 03:04:05 UTC (run started 20" in text


def test_a_generator_names_its_tokenizer(tmp_path: Path) -> None:
    tokenizer = checkpoint_of(tmp_path, "smoke/stage3")
    save(tokenizer, None, 6, "TokenizerStage3")
    lineage = begin("smoke/pretrain_256", f"outputs={tmp_path}")
    assert lineage["inputs"]["tokenizer_from"]["sha256"] == digest_of_files(tokenizer)
    assert lineage["parent"] is None


def test_a_run_that_goes_on_need_not_have_what_it_once_started_from(tmp_path: Path) -> None:
    last = save(checkpoint_of(tmp_path, "smoke/stage2"), None, 3)
    lineage = begin("smoke/stage2", f"outputs={tmp_path}", resumed=last)
    assert (lineage["parent"]["how"], lineage["parent"]["path"]) == ("resumed", str(last))


def test_a_fine_tuning_descends_from_the_model_that_its_experiment_names(tmp_path: Path) -> None:
    model = tmp_path / "base" / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    config = OmegaConf.create({"outputs": str(tmp_path), "init_from": "base", "module": {}})
    settings: dict[str, Any] = {"datamodule": LightningDataModule(), "world_size": 1}
    settings["precision"] = "32-true"
    lineage = lineage_of(config, resumed=None, **settings)
    assert (lineage["parent"]["how"], lineage["parent"]["path"]) == ("init_from", str(model))
    last = save(tmp_path / "last.ckpt", lineage, 3)
    shutil.rmtree(model)
    assert lineage_of(config, resumed=last, **settings)["parent"]["path"] == str(last)


def test_what_is_not_there_ends_as_a_wrong_setting(tmp_path: Path) -> None:
    assert main(["--exp=lineage", "ckpt=nothing", f"outputs={tmp_path}"]) == 2


def test_a_model_folder_is_printed_with_the_checkpoint_it_was_made_of(
    outputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = checkpoint_of(outputs, "smoke/stage2")
    (tmp_path / "config.json").write_text(json.dumps({"lineage": model_lineage(last)}))
    text = printed(outputs, tmp_path, capsys)
    assert "6 as a model folder" in text and f"made of {last}" in text


@pytest.mark.slow
def test_real_trainings_tell_where_they_come_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = f"outputs={tmp_path}"
    assert main(["--exp=smoke/stage1", here, "max_steps=3"]) == 0
    assert main(["--exp=smoke/stage1", here, "--ckpt=auto"]) == 0
    assert main(["--exp=smoke/stage2", here]) == 0
    capsys.readouterr()
    text = printed(tmp_path, "smoke/stage2", capsys)
    blocks = text.split("\n\n")
    steps = [block.splitlines()[1].split(maxsplit=1)[1] for block in blocks[:3]]
    assert steps == ["6 of TokenizerStage2", "6 of TokenizerStage1", "3 of TokenizerStage1"]
    assert "max_steps: 3 -> 6" in blocks[1] and "started from random weights" in text
