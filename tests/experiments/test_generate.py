"""`--exp=eval/generate`: pictures of the captions in shards, the same however they are made."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dcar.data.index import read_shard
from dcar.models.checkpoints import save_model
from dcar.pipeline import DCARPipeline
from experiments.generate import seed_of
from experiments.run import main
from tests.prediction_toys import UNEVEN, shard_bytes, write_pictures
from tests.toys import SIZE, toy_model


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("toys")
    write_pictures(root / "captions", UNEVEN, changed={6: {"txt": b" "}})
    save_model(toy_model(), root / "model")
    return root


def generate(toys: Path, out: Path, *overrides: str) -> int:
    arguments = [
        "--exp=eval/generate",
        f"ckpt={toys}/model",
        f"in={toys}/captions/*.tar",
        f"out={out}",
        f"outputs={toys}/outputs",
        "steps=2",
        "batch_size=3",
        "max_bad=0.1",
        "num_workers=0",
        "trainer.accelerator=cpu",
        *overrides,
    ]
    return main(arguments)


def test_each_caption_has_its_picture_and_the_seed_that_makes_it_again(
    toys: Path, tmp_path: Path
) -> None:
    assert generate(toys, tmp_path / "out", "guidance=2.0") == 0
    pipeline, drawn = DCARPipeline.from_pretrained(toys / "model"), 0
    for path in (toys / "captions").glob("*.tar"):
        asked = [raw for raw in read_shard(path) if raw["txt"] != b" "]
        for raw, made in zip(asked, read_shard(tmp_path / "out" / path.name), strict=True):
            assert set(made) == {"__key__", "png", "txt", "json"}
            assert (made["__key__"], made["txt"]) == (raw["__key__"], raw["txt"])
            seed = json.loads(made["json"])["seed"]
            assert seed == seed_of(str(raw["__key__"]), 0)
            prompt = made["txt"].decode()  # type: ignore[union-attr]
            (alone,) = pipeline(prompt, seeds=seed, steps=2, guidance=2.0)
            picture = Image.open(io.BytesIO(made["png"]))  # type: ignore[arg-type]
            difference = np.asarray(picture, int) - np.asarray(alone, int)
            assert picture.size == (SIZE, SIZE) and abs(difference).max() <= 2
            drawn += 1
    facts = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert drawn == sum(UNEVEN) - 1 and facts["dropped"] == {"no caption": 1}
    assert facts["kind"] == "pictures" and facts["shape"] == [SIZE, SIZE]
    assert (facts["sampler"]["steps"], facts["sampler"]["guidance"]) == (2, 2.0)


def test_seeds_are_of_the_key_and_of_the_set() -> None:
    seeds = {seed_of(key, seed) for key in ("a", "b", "1/a") for seed in (0, 1, 11)}
    assert len(seeds) == 9 and all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.slow
def test_a_run_with_workers_that_goes_on_gives_the_same_bytes(toys: Path, tmp_path: Path) -> None:
    assert generate(toys, tmp_path / "whole") == 0
    out = tmp_path / "parts"
    assert generate(toys, out, f"in={toys}/captions/train-2-*.tar", "max_bad=1") == 0
    assert generate(toys, out, "num_workers=2") == 0
    assert shard_bytes(out) == shard_bytes(tmp_path / "whole")


def test_other_settings_need_another_folder(
    toys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(toys, tmp_path / "out") == 0
    assert generate(toys, tmp_path / "out", "steps=3", "seed=1") == 2
    told = capsys.readouterr().err
    assert "sampler.steps: 3 here, 2 there" in told and "seed: 1 here, 0 there" in told


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=-1", "seed=-1 must be at least 0"),
        ("steps=0", "steps 0 is not an integer"),
        ("precision=half", "precision='half' must be one of"),
        ("trainer.precision=bf16-mixed", "here precision says it (precision=float32)"),
        ("ckpt=nothing", "ckpt=nothing is no checkpoint"),
        ("height=9", "height=9 must be a positive multiple"),
    ],
)
def test_what_cannot_be_used_is_named(
    toys: Path,
    tmp_path: Path,
    override: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert generate(toys, tmp_path / "out", override) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
