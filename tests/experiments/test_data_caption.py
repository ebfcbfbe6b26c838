"""`--exp=data/caption`: shards of captions beside shards of pictures, resumed and refused."""

import json
from pathlib import Path

import pytest

from dcar.data.index import read_shard
from experiments.config import ConfigError
from experiments.data_caption import read_prompts
from experiments.run import main
from tests.prediction_toys import UNEVEN, shard_bytes, write_captioner, write_pictures


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("toys")
    write_pictures(root / "pictures", UNEVEN, changed={0: {"txt": b""}})
    write_captioner(root / "model")
    return root


def caption(toys: Path, out: Path, *overrides: str) -> int:
    arguments = [
        "--exp=data/caption",
        f"model={toys}/model",
        f"in={toys}/pictures/*.tar",
        f"out={out}",
        f"outputs={toys}/outputs",
        "dtype=float32",
        "batch_size=4",
        "num_workers=0",
        "trainer.accelerator=cpu",
        "prompts.long.text=What is it?",
        "prompts.long.max_new_tokens=12",
        "prompts.short.max_new_tokens=3",
        *overrides,
    ]
    return main(arguments)


def test_captions_come_under_the_names_and_keys_of_the_pictures(toys: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert caption(toys, out) == 0
    for path in (toys / "pictures").glob("*.tar"):
        pictures, captions = list(read_shard(path)), list(read_shard(out / path.name))
        assert [raw["__key__"] for raw in captions] == [raw["__key__"] for raw in pictures]
        for raw in captions:
            assert set(raw) == {"__key__", "json", "txt"}
            written = json.loads(raw["json"])["captions"]
            assert written["long"] == raw["txt"].decode()  # type: ignore[union-attr]
            assert set(written) <= {"long", "short"} and len(written.get("short", "")) <= 3
    facts = json.loads((out / "manifest.json").read_text())
    assert facts["kind"] == "captions" and facts["model"] == f"{toys}/model"
    assert facts["prompts"]["long"] == {"text": "What is it?", "max_new_tokens": 12}


@pytest.mark.slow
def test_a_run_with_workers_that_goes_on_gives_the_same_bytes(toys: Path, tmp_path: Path) -> None:
    assert caption(toys, tmp_path / "whole") == 0
    out = tmp_path / "parts"
    assert caption(toys, out, f"in={toys}/pictures/train-1-*.tar") == 0
    assert caption(toys, out, "num_workers=2") == 0
    assert shard_bytes(out) == shard_bytes(tmp_path / "whole")


def test_empty_captions_are_dropped_and_counted(toys: Path, tmp_path: Path) -> None:
    ends = "+generation.forced_eos_token_id=2"
    assert caption(toys, tmp_path / "out", ends, "prompts.long.max_new_tokens=1", "max_bad=1") == 0
    facts = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert facts["dropped"] == {"empty caption": sum(UNEVEN)}


def test_another_prompt_needs_another_folder(
    toys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert caption(toys, tmp_path / "out") == 0
    assert caption(toys, tmp_path / "out", "prompts.short.text=Where?") == 2
    assert "prompts.short.text: 'Where?' here" in capsys.readouterr().err


@pytest.mark.parametrize(
    "fields", [{"text": "What?"}, {"text": "", "max_new_tokens": 3}, {"words": "What?"}]
)
def test_a_wrong_prompt_is_named(fields: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"prompts\.mine: "):
        read_prompts({"mine": fields})


def test_a_model_that_is_not_there_is_named(
    toys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert caption(toys, tmp_path / "out", f"model={toys}/nothing") == 3
    assert f"no image-text-to-text model at '{toys}/nothing'" in capsys.readouterr().err
