"""`--exp=eval/sweep`: a row of figures and a row of pictures for every value."""

import json
from pathlib import Path

import pytest
from PIL import Image

from dcar.models.checkpoints import save_model
from dcar.models.sampler import SamplerSettings
from experiments.run import main
from experiments.sampler_sweep import curve_png, markdown, save_strips, shown_rows
from tests.toys import toy_model

SMALL = ["known=2", "heldout=2", "pictures=2", "batch_size=4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_model(toy_model(), path)
    return path


@pytest.mark.slow
def test_the_values_that_come_with_it_are_possible_for_the_shipped_model(tmp_path: Path) -> None:
    assert main(["--exp=eval/sweep", *SMALL, f"out={tmp_path}/out", "--dry-run"]) == 0
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_each_value_gets_figures_and_pictures(folder: Path, tmp_path: Path) -> None:
    vary = ["vary.steps=[1,2,3]", "vary.selection=[confidence,halton]"]
    others = [f"vary.{name}_temperature=null" for name in ("randomize", "residual")]
    others += [
        f"vary.{name}=null"
        for name in ("guidance", "guidance_decay", "residual_guidance", "residual_clip")
    ]
    arguments = [f"ckpt={folder}", f"out={tmp_path}", *SMALL, *vary, *others]
    assert main(["--exp=eval/sweep", *arguments]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    tried = [(row["setting"], row["value"]) for row in results["rows"]]
    selection = [("selection", name) for name in ("confidence", "halton")]
    assert tried == [("steps", 1), ("steps", 2), ("steps", 3), *selection]
    for row in results["rows"]:
        assert row["images"] == 4 and set(row["scores"]) == {"known", "heldout"}
        assert row["fid_mobilenetv2"]["hybrid"] > 0 and row["seconds_per_image"] > 0
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert len(lines) == 2 + 5 and lines[2].startswith("| steps | 1 |")
    assert len({line.count("|") for line in lines}) == 1
    with Image.open(tmp_path / "steps.png") as strips:
        assert strips.height > strips.width  # three values, two prompts
    for name in ("steps", "selection"):
        with Image.open(tmp_path / f"{name}_curve.png") as curve:
            assert curve.width > 1000


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        ("vary.steps=[0]", "vary.steps: steps 0"),
        ("+vary.speed=[1]", "vary.speed"),
        ("vary.steps=[a]", "vary.steps"),
        ("scenes=1", "scenes=1"),
        ("vary.steps=[]", "vary.steps=[] must be a list"),
        ("vary.steps=3", "vary.steps"),
        ("pictures=0", "pictures=0 must be at least 1"),
        ("known=-1", "known=-1 must be at least 0"),
    ],
)
def test_a_setting_or_value_there_is_not_is_exit_2(vary, message, folder, tmp_path, capsys) -> None:
    arguments = [f"ckpt={folder}", f"out={tmp_path}/out", *SMALL, vary]
    assert main(["--exp=eval/sweep", *arguments]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("shown", "rows"), [(2, [0, 2]), (6, [0, 1, 2, 3])])
def test_strips_show_different_prompts(shown: int, rows: list[int], tmp_path: Path) -> None:
    assert shown_rows(4, shown) == rows
    pictures = [Image.new("RGB", (8, 8), (80 * row, 0, 0)) for row in rows]
    captions = [f"prompt {row}" for row in rows]
    save_strips(tmp_path, "steps", [SamplerSettings()], captions, [pictures])
    with Image.open(tmp_path / "steps.png") as sheet:
        colours = {colour for _, colour in sheet.convert("RGB").getcolors(1 << 20)}
    assert {(80 * row, 0, 0) for row in rows if row} <= colours
    assert len(rows) == 4 or (240, 0, 0) not in colours


@pytest.mark.parametrize("values", [[0.0, 0.5, 0.8], [None, 1.0], ["confidence", "halton"]])
def test_a_curve_marks_every_value_that_was_tried(values: list, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(
        "experiments.sampler_sweep.to_png", lambda figure: seen.extend(figure.axes) or b""
    )
    shares = {"images": 2, "concept_top1": 0.25, "concept_top5": 0.5, "style_top1": 1.0}
    fid = {"hybrid": 12.0, "discrete": 13.0}
    rows = [{"value": v, "scores": {"known": shares}, "fid_mobilenetv2": fid} for v in values]
    curve_png("residual_guidance", rows)
    for axes in seen:
        assert [tick.get_text() for tick in axes.get_xticklabels()] == [str(v) for v in values]
        assert all(len(set(line.get_xdata())) == len(values) for line in axes.lines)


def test_figures_of_a_row_stand_under_their_names() -> None:
    shares = {"images": 2, "concept_top1": 0.25, "concept_top5": 0.5, "style_top1": 1.0}
    row = {
        "setting": "steps",
        "value": 4,
        "scores": {"known": shares},
        "fid_mobilenetv2": {"hybrid": 12.34},
        "seconds_per_image": 0.5,
    }
    assert markdown([row]).splitlines()[0].startswith("| setting | value | known concept top-1 |")
    assert markdown([row]).splitlines()[2] == "| steps | 4 | 25.0% | 50.0% | 100.0% | 12.3 | 0.50 |"
