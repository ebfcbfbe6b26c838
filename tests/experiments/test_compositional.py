"""`--exp=eval/compositional`: figures and pictures of every source, from one command."""

import json
from pathlib import Path

import pytest
from omegaconf import DictConfig
from PIL import Image

from dcar.data.shard_set import ShardSet
from dcar.evaluation.compositional import PAIRS, SCENES
from dcar.models.checkpoints import save_model
from experiments.components import build
from experiments.compositional import (
    SOURCES,
    draw,
    open_pipeline,
    places_of,
    read_asked,
    retrieved,
)
from experiments.config import load_config
from experiments.run import main
from tests.toys import toy_model

SMALL = ["known=3", "heldout=2", "scenes=1", "pictures=1", "steps=2", "guidance=1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_model(toy_model(), path)
    return path


@pytest.fixture(scope="module")
def out(folder: Path, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("out")
    assert main(["--exp=eval/compositional", f"ckpt={folder}", f"out={path}", *SMALL]) == 0
    return path


@pytest.mark.slow
def test_results_say_what_was_measured_and_how(out: Path, folder: Path) -> None:
    results = json.loads((out / "results.json").read_text())
    assert results["checkpoint"] == str(folder) and results["images"] == 3 + 2 + 6
    assert results["seed"] == 0 and results["settings"]["steps"] == 2
    assert results["settings"]["guidance"] == 1
    assert set(results["scores"]) == set(results["overall"]) == set(SOURCES)
    for groups in results["scores"].values():
        assert set(groups) == {*PAIRS, *SCENES}
        assert groups["known"]["images"] == 3 and groups["position"]["images"] == 1
    assert results["fid_mobilenetv2"]["images"] == 5
    assert results["fid_mobilenetv2"]["hybrid"] > 0 and results["judge"]


def test_what_cannot_be_judged_is_said_before_anything_is_drawn(
    folder: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr("experiments.compositional.draw", None)
    for given, message in (
        (["data.scenes.coloured=0"], "found 0 of colours"),
        ([f"out={folder}/config.json"], "config.json is no folder"),
    ):
        arguments = [f"ckpt={folder}", f"out={tmp_path}/new", *SMALL, *given]
        assert main(["--exp=eval/compositional", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_the_table_says_what_the_results_say(out: Path) -> None:
    results = json.loads((out / "results.json").read_text())
    lines = (out / "table.md").read_text().splitlines()
    assert lines[0] == "|  | images | real | tokenizer | retrieval | discrete | hybrid |"
    shares = [results["scores"][source]["known"]["concept_top5"] for source in SOURCES]
    told = " | ".join(f"{share:.1%}" for share in shares)
    assert f"| known: concept top-5 | 3 | {told} |" in lines
    assert lines[-1].startswith("| FID on MobileNetV2 features, single drawings | 5 | – | – | – |")
    assert {line.count("|") for line in lines} == {8}


@pytest.mark.slow
def test_the_judge_is_better_on_true_pictures_than_on_a_random_model(out: Path) -> None:
    overall = json.loads((out / "results.json").read_text())["overall"]
    assert overall["real"] >= 0.5 and overall["hybrid"] == 0


@pytest.mark.slow
def test_the_page_shows_every_group_and_needs_nothing_else(out: Path) -> None:
    page = (out / "index.html").read_text()
    for group in (*PAIRS, *SCENES):
        assert f"<h2>{group.capitalize()}</h2>" in page
    assert page.count("<img") == 3 * (2 + 6) and "http://" not in page
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.text["steps"] == "2"
    with Image.open(out / "residual.png") as sheet, Image.open(out / "sheet.png") as other:
        assert sheet.width / other.width == (3 + 2) / 8 and sheet.text == other.text


@pytest.mark.parametrize("bad", ["known=-1", "heldout=-2", "scenes=-1", "pictures=-1"])
def test_a_number_there_cannot_be_is_named(bad: str, folder, tmp_path, capsys) -> None:
    assert main(["--exp=eval/compositional", f"ckpt={folder}", f"out={tmp_path}/out", bad]) == 2
    assert f"{bad} must be at least 0" in capsys.readouterr().err


def test_too_few_single_drawings_for_fid_is_said_before_any_is_drawn(folder, tmp_path, capsys):
    arguments = [f"ckpt={folder}", f"out={tmp_path}/out", *SMALL, "known=1", "heldout=0"]
    assert main(["--exp=eval/compositional", *arguments]) == 2
    assert "known=1 and heldout=0" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_retrieval_of_a_known_caption_is_its_own_picture(folder: Path) -> None:
    config = load_config("eval/compositional", ["heldout=0", "scenes=0", "known=5"])
    asked = read_asked(config, 32)
    found = retrieved(config, asked, 32)
    assert [picture.tobytes() for picture in found] == [one.real.tobytes() for one in asked]


def test_prompts_are_the_same_every_time_and_of_the_right_split(folder: Path) -> None:
    config = load_config("eval/compositional", ["heldout=4", "scenes=0", "known=4"])
    first, second = read_asked(config, 32), read_asked(config, 32)
    assert [one.caption for one in first] == [one.caption for one in second]
    assert [one.group for one in first] == ["known"] * 4 + ["heldout"] * 4
    assert all(f"{one.style} style" in one.caption for one in first)
    keys = {name: set(keys_of(config.data[name])) for name in ("train", "heldout")}
    assert not keys["train"] & keys["heldout"]
    for one in first:
        split = "train" if one.group == "known" else "heldout"
        assert f"{one.style}/{one.concepts[0]}" in keys[split]


def keys_of(node: DictConfig) -> list[str]:
    """Of every drawing in the shards, `style/slug`."""
    shards: ShardSet = build(node)
    return [str(shards.read(*place)["__key__"]) for place in places_of(shards)]


def test_a_picture_does_not_depend_on_its_batch(folder: Path) -> None:
    config = load_config("eval/compositional", [f"ckpt={folder}", "known=3", "scenes=0"])
    config.heldout = 0
    pipeline, asked = open_pipeline(config), read_asked(config, 32)
    settings = pipeline.model.sampler
    alone, together = (draw(pipeline, asked, settings, seed=5, batch_size=size) for size in (1, 3))
    for one, other in zip(alone.hybrid, together.hybrid, strict=True):
        assert one.tobytes() == other.tobytes()


@pytest.mark.slow
def test_a_dry_run_writes_nothing(folder: Path, tmp_path: Path) -> None:
    arguments = [f"ckpt={folder}", f"out={tmp_path / 'out'}", *SMALL]
    assert main(["--exp=eval/compositional", *arguments, "--dry-run"]) == 0
    assert not (tmp_path / "out").exists()


def test_a_missing_model_or_judge_is_named(folder: Path, tmp_path: Path, capsys) -> None:
    assert main(["--exp=eval/compositional", "ckpt=nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err
    arguments = [f"ckpt={folder}", f"judge={tmp_path}/j.safetensors"]
    assert main(["--exp=eval/compositional", *arguments]) == 3
    assert "j.safetensors" in capsys.readouterr().err
