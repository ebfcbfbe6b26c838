"""`--exp=eval/geneval`: the folders that GenEval's scorer reads, drawn in pieces."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dcar.models.checkpoints import save_model
from dcar.pipeline import DCARPipeline
from experiments.run import main
from tests.toys import toy_model

LINES = [
    '{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a bench"}',
    '{"tag":"counting","include":[{"class":"cow","count":2}],"prompt":"two cows"}',
    '{"tag": "colors", "prompt": "a blue caf\\u00e9"}',
]


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("toys")
    save_model(toy_model(), root / "model")
    (root / "metadata.jsonl").write_text("\n".join(LINES) + "\n")
    return root


def geneval(toys: Path, out: Path, *overrides: str) -> int:
    arguments = [
        "--exp=eval/geneval",
        f"ckpt={toys}/model",
        f"in={toys}/metadata.jsonl",
        f"out={out}",
        "images_per_prompt=2",
        "steps=2",
        "batch_size=4",
        "device=cpu",
        *overrides,
    ]
    return main(arguments)


def bytes_of(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def test_each_prompt_has_its_folder(toys: Path, tmp_path: Path) -> None:
    assert geneval(toys, tmp_path / "out") == 0
    pipeline = DCARPipeline.from_pretrained(toys / "model")
    folders = sorted(path for path in (tmp_path / "out").iterdir() if path.is_dir())
    assert [folder.name for folder in folders] == ["00000", "00001", "00002"]
    for line, folder in zip(LINES, folders, strict=True):
        assert (folder / "metadata.jsonl").read_text() == line + "\n"
        samples = sorted((folder / "samples").iterdir())
        assert [path.name for path in samples] == ["0000.png", "0001.png"]
        alone = pipeline([json.loads(line)["prompt"]] * 2, seeds=42, steps=2)
        for path, expected in zip(samples, alone, strict=True):
            with Image.open(path) as picture:
                difference = np.asarray(picture, int) - np.asarray(expected, int)
            assert abs(difference).max() <= 2


def test_what_is_missing_is_drawn_and_the_rest_is_left(toys: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert geneval(toys, out) == 0
    whole, kept = bytes_of(out), out / "00000/samples/0001.png"
    before = kept.stat().st_mtime_ns
    for gone in ("00001/samples/0000.png", "00002/metadata.jsonl"):
        (out / gone).unlink()
    assert geneval(toys, out) == 0
    assert bytes_of(out).keys() == whole.keys() and kept.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("override", "told"), [("steps=3", "sampler.steps: 3 here"), ("seed=1", "seed: 1 here")]
)
def test_other_settings_need_another_folder(
    toys: Path, tmp_path: Path, override: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert geneval(toys, tmp_path / "out") == 0
    assert geneval(toys, tmp_path / "out", override) == 2
    assert told in capsys.readouterr().err


def test_pictures_of_unknown_settings_are_not_mixed_with(
    toys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out" / "00000" / "samples" / "0000.png"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    assert geneval(toys, tmp_path / "out") == 2
    assert "holds pictures, and no settings.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}\n{"tag": 1}\n', "metadata.jsonl:2 is no object with a prompt"),
        ("[1]\n", "metadata.jsonl:1 is no object with a prompt"),
        ('{"prompt": 3}\n', "metadata.jsonl:1: its prompt is no text"),
        ("\n", "holds no prompt"),
    ],
)
def test_a_broken_line_is_named(
    toys: Path, tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metadata.jsonl"
    path.write_text(text)
    assert geneval(toys, tmp_path / "out", f"in={path}") == 3
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_dry_run_writes_nothing(toys: Path, tmp_path: Path) -> None:
    assert geneval(toys, tmp_path / "out", "--dry-run") == 0
    assert not (tmp_path / "out").exists()
