"""`--exp=sample`: prompts from the command line, a list or a file; PNGs that say what they are."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from dcar.errors import CheckpointError
from dcar.models.checkpoints import save_model
from experiments.config import ConfigError, load_config
from experiments.run import main
from experiments.sample import find_model, output_paths, read_prompts
from tests.toys import SIZE, ToyData, toy_masked_generator, toy_model, toy_stage, toy_trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_model(toy_model(), path / "model")
    return path


def test_one_prompt_gives_one_png_with_its_settings(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "apple.png"
    arguments = ["--exp=sample", f"ckpt={folder}", "prompt='a red apple, flat style'", "seed=3"]
    assert main([*arguments, "steps=2", "guidance=2", f"out={out}"]) == 0
    with Image.open(out) as picture:
        assert picture.size == (SIZE, SIZE)
        assert picture.text["prompt"] == "a red apple, flat style" and picture.text["seed"] == "3"
        assert picture.text["steps"] == "2" and picture.text["guidance"] == "2"


def test_the_model_s_own_sampler_is_used_and_told(tmp_path: Path) -> None:
    save_model(toy_model(), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["sampler"] |= {"steps": 3, "guidance": 0.5, "residual_temperature": 0.25}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    arguments = [f"ckpt={tmp_path}/model", "prompt=a", f"out={tmp_path}/a.png"]
    assert main(["--exp=sample", *arguments]) == 0
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.text["steps"] == "3" and picture.text["guidance"] == "0.5"
        assert picture.text["residual_temperature"] == "0.25"


def test_a_file_of_prompts_gives_a_png_each_and_a_grid(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n\na dog\n")
    out = tmp_path / "all.png"
    arguments = [f"ckpt={folder}", f"prompt={tmp_path}/prompts.txt", f"out={out}"]
    assert main(["--exp=sample", *arguments]) == 0
    names = sorted(path.name for path in tmp_path.glob("*.png"))
    assert names == ["all-000.png", "all-001.png", "all.png"]
    with Image.open(tmp_path / "all-001.png") as picture:
        assert picture.text["prompt"] == "a dog" and picture.text["seed"] == "1"
    with Image.open(out) as grid:
        assert grid.text["prompts"] == "a cat\na dog" and grid.text["first seed"] == "0"
        assert grid.text["steps"] == "3"


def test_a_dry_run_draws_and_writes_nothing(folder: Path, tmp_path: Path, capsys) -> None:
    arguments = [f"ckpt={folder}", "prompt=a cat", f"out={tmp_path}/a.png", "--dry-run"]
    assert main(["--exp=sample", *arguments]) == 0
    said = capsys.readouterr().out
    assert said == f"dry run: 1 drawn, {SIZE} x {SIZE} px; nothing is written\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prompt="], "prompt is empty"),
        (["prompt=  "], "prompt is empty"),
        (["prompt=[a dog"], "prompt=[a dog: no list or mapping"),
        (["prompt=a", "out={}/file/a.png"], "/file is no folder"),
        (["prompt=a", "out={}/folder.png"], "folder.png is a folder"),
        (["prompt=['']"], "prompt is empty"),
        (["prompt=a", "out=s3://bucket/a.png"], "give a folder or file of this machine"),
        (["prompt=a", "out={}/link/a.png"], "/link is no folder"),
        (["prompt=a", "ckpt=nini"], "no model that comes with the package (mini)"),
    ],
)
def test_what_cannot_be_drawn_is_said_before_drawing(
    arguments: list[str], message: str, folder: Path, tmp_path: Path, capsys
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    given = [f"ckpt={folder}", f"out={tmp_path}/a.png", *(a.format(tmp_path) for a in arguments)]
    assert main(["--exp=sample", *given]) == 2
    assert message.format(tmp_path) in capsys.readouterr().err


def test_models_within_a_recipe_s_folder_are_named_and_can_be_drawn_from(
    tmp_path: Path, capsys
) -> None:
    runs = tmp_path / "runs"
    for module, name in ((toy_stage(1), "stage1"), (toy_masked_generator(), "generator_32")):
        trainer = toy_trainer(1)
        trainer.fit(module, datamodule=ToyData())
        trainer.save_checkpoint(runs / name / "checkpoints" / "last.ckpt")
    save_model(toy_model(), runs / "generator_64" / "model")
    assert main(["--exp=sample", f"ckpt={runs}", "prompt=a"]) == 2
    told = capsys.readouterr().err
    unfinished, model = f"{runs}/generator_32/checkpoints/last.ckpt", f"{runs}/generator_64/model"
    assert f"there are {unfinished}, {model} in it" in told
    out = f"out={tmp_path}/a.png"
    assert main(["--exp=sample", f"ckpt={model}", "prompt=a", out]) == 0


def test_a_place_that_is_not_ours_is_refused_before_drawing(
    folder: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    out = f"out={tmp_path}/new/a.png"
    assert main(["--exp=sample", f"ckpt={folder}", "prompt=a", out]) == 2
    assert f"{tmp_path} cannot be written to" in capsys.readouterr().err


@pytest.mark.parametrize(
    "prompt",
    ["a red apple, flat style", "it's (very) {big}: 3 x 4 = 12, isn't it", '"quoted"', "7", "a=b"],
)
def test_a_prompt_is_taken_as_the_shell_gives_it(prompt: str, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    assert main(["--exp=sample", f"ckpt={folder}", f"prompt={prompt}", f"out={out}"]) == 0
    with Image.open(out) as picture:
        assert picture.text["prompt"] == prompt.strip('"')


def test_prompts_come_as_text_list_or_file(tmp_path: Path) -> None:
    assert read_prompts("a") == ["a"] and read_prompts(["a", "b"]) == ["a", "b"]
    (tmp_path / "p.txt").write_text("a\n b \n\n")
    assert read_prompts(str(tmp_path / "p.txt")) == ["a", "b"]


def test_any_setting_of_the_sampler_is_changed_for_once(folder: Path, tmp_path: Path) -> None:
    given = [
        f"ckpt={folder}",
        "prompt=a",
        "sampler.confidence=log_prob",
        "sampler.selection=halton",
    ]
    assert main(["--exp=sample", *given, f"out={tmp_path}/a.png"]) == 0
    assert main(["--exp=sample", f"ckpt={folder}", "prompt=a", f"out={tmp_path}/b.png"]) == 0
    with Image.open(tmp_path / "a.png") as ours, Image.open(tmp_path / "b.png") as model_s:
        assert (ours.text["confidence"], ours.text["selection"]) == ("log_prob", "halton")
        assert (model_s.text["confidence"], model_s.text["selection"]) != ("log_prob", "halton")
        assert ours.tobytes() != model_s.tobytes()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prompt=nowhere.txt", "nowhere.txt"),
        ("out=a.jpg", "out=a.jpg"),
        ("steps=0", "steps"),
        ("precision=int4", "precision"),
        ("height=13", "height=13"),
        ("prompt=[]", "no prompt"),
        ("height=0", "height=0"),
        ("images_per_prompt=0", "images_per_prompt=0"),
        ("sampler.selection=best", "selection 'best'"),
        ("sampler.selektion=random", "did you mean 'sampler.selection'"),
    ],
)
def test_a_bad_value_is_exit_2_and_named(override: str, message: str, folder, tmp_path, capsys):
    arguments = [f"ckpt={folder}", "prompt=a", f"out={tmp_path}/a.png"]
    arguments = [a for a in arguments if a.split("=")[0] != override.split("=")[0]]
    assert main(["--exp=sample", *arguments, override]) == 2
    assert message in capsys.readouterr().err


def test_an_experiment_s_name_finds_its_model(folder: Path) -> None:
    assert find_model(folder.name, str(folder.parent)).size == SIZE
    with pytest.raises(CheckpointError, match="ckpt=elsewhere"):
        find_model("elsewhere", str(folder.parent))


def test_several_images_are_numbered_beside_the_grid() -> None:
    assert [p.name for p in output_paths("x/a.png", 2)] == ["a-000.png", "a-001.png"]
    assert output_paths("x/a.png", 1) == [Path("x/a.png")]


def test_a_file_of_prompts_may_begin_with_a_mark_and_must_be_utf_8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffa cat\n".encode())
    assert read_prompts(str(tmp_path / "a.txt")) == ["a cat"]
    (tmp_path / "b.txt").write_bytes("a cat".encode("utf-16"))
    with pytest.raises(ConfigError, match=r"b\.txt is no UTF-8 text"):
        read_prompts(str(tmp_path / "b.txt"))


def test_a_prompt_that_is_read_in_part_is_said(folder: Path, tmp_path: Path, capsys) -> None:
    given = ["--exp=sample", f"ckpt={folder}", f"out={tmp_path}/a.png", "steps=1"]
    assert main([*given, "prompt=a cat"]) == 0 and capsys.readouterr().err == ""
    assert main([*given, f"prompt={'a cat ' * 9}"]) == 0
    assert "only the first 16 tokens are read of: a cat a cat" in capsys.readouterr().err


def test_a_prompt_may_have_dollars_and_braces() -> None:
    for prompt in ("it costs $5, ${x} or $(y)", "${oc.env:HOME}"):
        assert load_config("sample", [f"prompt={prompt}"]).prompt == prompt
