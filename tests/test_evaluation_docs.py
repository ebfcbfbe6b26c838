"""docs/evaluation.md: its commands run (on a toy model, with few prompts), its columns are all."""

import json
import re
import shlex
from pathlib import Path

import pytest

from dcar.evaluation.compositional import PAIRS, PRESENT, SCENES
from dcar.models.checkpoints import save_model
from experiments.compositional import SOURCES
from experiments.run import main
from tests.layouts import mjhq
from tests.toys import ROOT, toy_model

PAGE = (ROOT / "docs/evaluation.md").read_text()
COMMANDS = [
    shlex.split(line)[3:]
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S)
    for line in block.splitlines()
]
FEW = ["known=2", "heldout=2", "steps=2", "pictures=2"]
NO_MORE = ["vary.steps=[1,2]", "vary.guidance=null", "vary.guidance_decay=null"]
NO_MORE += ["vary.randomize_temperature=null", "vary.selection=null"]
NO_MORE += ["vary.residual_temperature=null", "vary.residual_guidance=null"]
NO_MORE += ["vary.residual_clip=null"]


JUDGED = [
    words for words in COMMANDS if words[0] in ("--exp=eval/compositional", "--exp=eval/sweep")
]


@pytest.mark.slow
@pytest.mark.parametrize("words", JUDGED, ids=" ".join)
def test_a_command_runs(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_model(toy_model(), tmp_path / "outputs" / "quickstart" / "model")
    more = NO_MORE if "--exp=eval/sweep" in words else ["scenes=1"]
    assert main([*words, *FEW, *more]) == 0
    folder = tmp_path / "outputs" / words[0].removeprefix("--exp=")
    assert (folder / "results.json").is_file()
    for name in ("index.html", "sheet.png") if "scenes=1" in more else ("table.md",):
        assert (folder / name).is_file()


@pytest.mark.slow
def test_the_commands_of_the_paper_s_figures_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_model(toy_model(), tmp_path / "outputs" / "quickstart" / "model")
    mjhq(tmp_path / "downloads" / "mjhq")
    prompts = [f'{{"tag": "colors", "prompt": "a {colour} cow"}}' for colour in ("red", "blue")]
    (tmp_path / "evaluation_metadata.jsonl").write_text("\n".join(prompts))
    commands = [words for words in COMMANDS if words not in JUDGED]
    names = [words[0].removeprefix("--exp=") for words in commands]
    assert names == ["data/build", "eval/generate", "eval/fid", "eval/geneval"]
    few: dict[str, list[str]] = {
        "data/build": ["min_size=8"],
        "eval/generate": ["steps=2", "trainer.accelerator=cpu", "trainer.devices=1"],
        "eval/fid": ["fid_features=mobilenetv2"],
        "eval/geneval": ["steps=2"],
    }
    for name, words in zip(names, commands, strict=True):
        assert main([*words, *few[name]]) == 0
    found = json.loads((tmp_path / "outputs/eval/fid.json").read_text())
    assert found["generated"]["images"] == found["real"]["images"] == 12
    (facts,) = found["generated"]["made"].values()
    assert (facts["kind"], facts["sampler"]["steps"]) == ("pictures", 2)
    assert len(list((tmp_path / "outputs/eval/geneval").glob("0*/samples/*.png"))) == 8


def test_every_group_and_column_has_its_row() -> None:
    rows = re.findall(r"^\| ([a-z ]+) \|", PAGE, re.M)
    assert [row for row in rows if row in (*PAIRS, *SCENES)] == [*PAIRS, *SCENES]
    assert [row for row in rows if row in SOURCES] == list(SOURCES)
    assert PRESENT == 5 and "five\nlikeliest of 1,898" in PAGE
