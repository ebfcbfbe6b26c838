"""The model in the package: small enough, whole, found by name, and as good as its card says."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from dcar.data.samples import image_bytes
from dcar.data.shard_set import ShardSet
from dcar.data.transforms import to_unit_range
from dcar.errors import CheckpointError
from dcar.evaluation.compositional import Examiner, as_pixels, scores
from dcar.models.checkpoints import PARTS, load_model, save_model, shipped_models
from dcar.models.judge import load_judge
from dcar.models.weights_io import SHIPPED
from dcar.pipeline import DCARPipeline
from experiments.components import build
from experiments.compositional import (
    draw,
    markdown_table,
    open_pipeline,
    places_of,
    read_asked,
    resized,
    score_rows,
)
from experiments.config import load_config
from experiments.run import main
from experiments.train import model_config
from tests.toys import ROOT, SIZE, toy_model

FOLDER = SHIPPED / "mini"
MINI = (ROOT / "docs/mini.md").read_text()


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.S)


def test_it_is_shipped_and_takes_at_most_forty_megabytes() -> None:
    assert shipped_models() == ["mini"]
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 40e6


def test_its_weights_are_stored_in_half_precision() -> None:
    for part in PARTS:
        with safe_open(FOLDER / f"{part}.safetensors", framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                stored = file.get_slice(name)
                is_scale = stored.get_shape() == []  # of the residual, which stays exact
                assert is_scale or stored.get_dtype() in ("F16", "I64", "BOOL"), name


def test_its_recipe_trains_that_very_model() -> None:
    shipped = json.loads((FOLDER / "config.json").read_text())
    recipe = model_config(load_config("mini/generator"))
    for part in (*PARTS, "sampler", "size"):
        assert recipe[part] == shipped[part], part


def test_its_config_names_no_place_of_a_machine() -> None:
    text = (FOLDER / "config.json").read_text()
    assert not re.search(r'"/|[A-Z]:\\\\', text)


def test_it_draws_wherever_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pipeline = DCARPipeline.from_pretrained("mini")
    (whale,) = pipeline("a blue whale, 3d style", seeds=0)
    (again,) = pipeline("a blue whale, 3d style", seeds=0)
    (other,) = pipeline("a red apple, 3d style", seeds=0)
    assert whale.size == (64, 64) and whale.tobytes() == again.tobytes() != other.tobytes()


def test_a_folder_of_that_name_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_model(toy_model(), "mini")
    assert load_model("mini").size == SIZE


def test_a_damaged_copy_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path / "copy")
    path = tmp_path / "copy" / "tokenizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"tokenizer\.safetensors cannot be read"):
        load_model(tmp_path / "copy")


def test_the_python_of_its_card_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = blocks(FOLDER / "README.md", "python")
    exec(block, {})
    assert Path("sunflower.png").is_file()


@pytest.mark.parametrize("page", [FOLDER / "README.md", ROOT / "docs/mini.md"])
def test_its_pages_carry_the_results_that_come_with_it(page: Path) -> None:
    results = json.loads((FOLDER / "results.json").read_text())
    assert results["checkpoint"] == "mini" and results["images"] == 200 + 489 + 6 * 40
    assert results["judge"] == load_judge().figures
    assert markdown_table(score_rows(results)) in page.read_text()


@pytest.mark.slow
def test_its_pictures_are_as_good_as_its_card_says() -> None:
    """Some of the prompts: the first held-out ones are of styles that are easier than the rest."""
    published = json.loads((FOLDER / "results.json").read_text())["scores"]["hybrid"]
    config = load_config("eval/compositional", ["known=80", "heldout=200", "scenes=0"])
    pipeline, examiner = open_pipeline(config), Examiner(load_judge())
    asked = read_asked(config, pipeline.model.size)
    drawn = draw(pipeline, asked, pipeline.settings(), seed=0, batch_size=32)
    found = scores(asked, examiner.findings(asked, drawn.hybrid))
    for group in ("known", "heldout"):
        for share in ("concept_top1", "concept_top5", "style_top1"):
            assert found[group][share] == pytest.approx(published[group][share], abs=0.15)


@pytest.mark.slow
def test_its_tokenizer_is_as_good_as_its_page_says() -> None:
    told = re.findall(r"\| (?:codes alone|codes and residual) \| ([\d.]+) dB", MINI)
    shards = ShardSet(str(ROOT / "assets/emoji/val-*.tar"))
    pictures = [resized(image_bytes(shards.read(*place)), 64) for place in places_of(shards)]
    image = to_unit_range(as_pixels(pictures))
    tokenizer, errors = load_model("mini").tokenizer, []
    for part in image.split(64):
        latents = tokenizer.encode(part)
        paths = [tokenizer.decode(each) for each in (latents.discrete, latents.continuous)]
        made = torch.stack(paths).clamp(-1, 1)
        errors.append((made - part).square().flatten(2).mean(2))  # (2, B)
    psnr = (10 * (4 / torch.cat(errors, 1)).log10()).mean(1)
    assert psnr.tolist() == pytest.approx([float(figure) for figure in told], abs=0.4)


@pytest.mark.slow
def test_the_commands_of_its_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "".join(blocks(ROOT / "docs/mini.md", "bash")).splitlines()
    make, sheet, train = map(shlex.split, lines)  # what make does: below, and tests of the recipe
    assert (make[:2], train) == (["make", "sample"], ["make", "train-mini"])
    monkeypatch.chdir(ROOT)
    assert main([*sheet[3:-1], f"out={tmp_path}/sheet.png", "steps=2"]) == 0
    assert len(list(tmp_path.glob("sheet-*.png"))) == 48


@pytest.mark.slow
def test_make_sample_writes_a_picture_of_the_prompt(tmp_path: Path) -> None:
    prompt = 'it\'s "a" $HOME of {3} cats, 3d style'
    command = ["make", "-C", str(ROOT), "sample", f"OUTPUTS={tmp_path}", f"PROMPT={prompt}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    with Image.open(tmp_path / "sample.png") as picture:
        assert picture.size == (64, 64) and picture.text["prompt"] == prompt


def test_a_finished_model_is_trained_further(tmp_path: Path) -> None:
    options = ["tokenizer_from=mini", "init_from=mini", "module.fid_images=0"]
    module = build(load_config("mini/generator", [*options, f"outputs={tmp_path}"]).module)
    model = load_model("mini")
    for mine, theirs in (
        (module.generator, model.generator),
        (module.text_encoder, model.text_encoder),
        (module.tokenizer.module, model.tokenizer),
    ):
        for name, tensor in theirs.state_dict().items():
            assert torch.equal(tensor, mine.state_dict()[name]), name
    assert all(p.requires_grad for p in module.network.parameters())
