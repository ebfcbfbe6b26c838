"""Every command of docs/data.md, in its order, on small true copies of the layouts it is about."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from experiments.run import main
from tests import layouts
from tests.prediction_toys import write_captioner
from tests.toys import ROOT

PAGE = (ROOT / "docs/data.md").read_text()
LINES = [
    line
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S)
    for line in block.split("\n")
    if line
]
# Trainings are the same code at toy size; what they read is what the page's commands have made.
SMALL = {
    "quickstart/stage1": ["smoke/stage1", "data=shards"],
    "tokenizer/stage1": ["smoke/stage1", "data=imagenet"],
    "generator/pretrain_256": ["smoke/pretrain_256", "data=journeydb"],
}
SHORT = ["max_steps=2", "val_every=2", "save_every=2", "warmup_steps=1"]
TOY = [*SHORT, "batch_size=2", "data.num_workers=0"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """/downloads with a copy of each layout."""
    folder = tmp_path_factory.mktemp("home")
    downloads = folder / "downloads"
    layouts.imagenet_tars(downloads / "imagenet")
    layouts.kaggle_val_labels(downloads / "imagenet")
    layouts.journeydb(downloads / "journeydb")
    layouts.mjhq(downloads / "mjhq")
    layouts.img2dataset_shards(downloads / "img2dataset")
    for number in range(60):
        path = downloads / "pictures" / f"{number % 3}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(layouts.picture(str(number)))
        path.with_suffix(".txt").write_text(f"a picture of {number}")
    return folder


def test_the_page_has_a_command_for_every_source_and_task() -> None:
    for word in ("imagenet", "journeydb", "mjhq", "folder", "webdataset"):
        assert any(f"source={word} " in line for line in LINES), word
    for task in ("verify", "stats", "peek", "precompute", "caption"):
        assert any(f"--exp=data/{task} " in line for line in LINES), task


def adapted(line: str, home: Path, captioner: Path) -> list[str]:
    """The page's command with this test's folders, and at this test's size."""
    words = [re.sub(r"/(downloads|data)/", rf"{home}/\1/", w) for w in shlex.split(line)[3:]]
    exp = words[0].removeprefix("--exp=")
    words = [word for word in words if not word.startswith("lpips_vgg=")]
    if exp in SMALL:
        small, data = SMALL[exp]
        more = [] if any(word.startswith("data=") for word in words) else [data]
        words = [f"--exp={small}", *more, *words[1:], *TOY]
    elif "source=folder" in words:
        words.append("source.val_share=0.2")
    elif exp == "data/precompute":
        words = [w.replace("tokenizer/stage3", "smoke/stage3") for w in words if w[:5] != "size="]
        words += ["size=32", "batch_size=4", "num_workers=0", "trainer.accelerator=cpu"]
    elif exp == "data/caption":
        words = [w.replace("Qwen/Qwen2.5-VL-7B-Instruct", str(captioner)) for w in words]
        words += ["dtype=float32", "batch_size=8", "num_workers=0", "trainer.accelerator=cpu"]
        words += ["prompts.long.max_new_tokens=4", "prompts.short.max_new_tokens=2"]
    if exp in SMALL or exp in ("data/precompute", "data/caption"):
        words.append(f"outputs={home}/outputs")
    return words


@pytest.mark.slow
def test_the_page_is_followed_from_top_to_bottom(home: Path, tmp_path: Path) -> None:
    captioner = write_captioner(tmp_path / "captioner")
    for stage in (1, 2, 3):
        words = [f"--exp=smoke/stage{stage}", *SHORT, f"outputs={home}/outputs"]
        assert main(words) == 0
    for line in LINES:
        assert line.startswith("python -m experiments.run --exp="), line
        words = adapted(line, home, captioner)
        words += ["--ckpt=new"] if words[0].startswith("--exp=smoke/") else []
        assert main(words) == 0, (line, words)
        shutil.rmtree(home / "outputs/smoke/pretrain_256", ignore_errors=True)
    for folder in ("imagenet", "journeydb", "mjhq", "pictures", "web", "tokens", "captions"):
        assert (home / "data" / folder / "manifest.json").is_file(), folder
    assert (home / "data/contact.png").is_file()
