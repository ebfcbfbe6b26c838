"""`--exp=data/precompute`: the tokenizer of a checkpoint, text embeddings, what is refused."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from dcar.data.index import read_shard
from dcar.models.checkpoints import load_tokenizer
from dcar.models.fingerprint import tokenizer_fingerprint
from experiments.run import main
from tests.prediction_toys import tokenizer_checkpoint, write_pictures
from tests.toys import SIZE


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Path:
    """One shard of pictures, a stage 2 tokenizer, a small frozen T5."""
    root = tmp_path_factory.mktemp("toys")
    write_pictures(root / "pictures", (3,))
    tokenizer_checkpoint(root / "stage2.ckpt")
    torch.manual_seed(0)
    config = T5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    T5EncoderModel(config).save_pretrained(root / "t5")
    ByT5Tokenizer().save_pretrained(root / "t5")
    return root


def precompute(toys: Path, *overrides: str) -> int:
    arguments = [
        "--exp=data/precompute",
        f"in={toys}/pictures/*.tar",
        f"out={toys}/tokens",
        f"tokenizer_from={toys}/stage2.ckpt",
        f"outputs={toys}/outputs",
        f"size={SIZE}",
        "num_workers=0",
        "trainer.accelerator=cpu",
        *overrides,
    ]
    return main(arguments)


def test_the_manifest_says_what_made_the_tokens(toys: Path) -> None:
    assert precompute(toys) == 0
    manifest = json.loads((toys / "tokens" / "manifest.json").read_text())
    assert manifest["tokenizer"] == {
        "checkpoint": f"{toys}/stage2.ckpt",
        "module": "TokenizerStage2",
        "fingerprint": tokenizer_fingerprint(load_tokenizer(toys / "stage2.ckpt")[0]),
    }
    known = {key: manifest[key] for key in ("kind", "size", "downsample", "num_codes", "text")}
    assert known == {"kind": "tokens", "size": 32, "downsample": 4, "num_codes": 16, "text": None}
    assert (manifest["crop"], manifest["precision"]) == ("center", "32-true")


def test_text_embeddings_are_made_where_asked_for(toys: Path) -> None:
    encoder = [f"text_encoder.name={toys}/t5", "text_encoder.max_tokens=12"]
    assert precompute(toys, "text=true", f"out={toys}/text", *encoder) == 0
    text = json.loads((toys / "text" / "manifest.json").read_text())["text"]
    assert (text["name"], text["max_tokens"], text["attend_to_padding"]) == (f"{toys}/t5", 12, True)
    for raw in read_shard(toys / "text" / "train-0-000000.tar"):
        data = raw["text.npy"]
        assert isinstance(data, bytes)
        embedding = np.load(io.BytesIO(data), allow_pickle=False)
        assert embedding.shape == (len("picture 0") + 1, 16) and embedding.dtype == np.float16


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["crop=random"], "crop='random'"),
        (["text=true", "text_encoder=byte_t5"], "ByteT5TextEncoder is trained"),
        (["tokenizer_from=nowhere"], "no checkpoint at"),
        (["size=30"], "image side 30 is not a multiple of the downsampling 4"),
    ],
)
def test_impossible_settings_are_refused(
    toys: Path, overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert precompute(toys, f"out={toys}/refused", *overrides) == 2
    assert message in capsys.readouterr().err
    assert list((toys / "refused").rglob("*.tar")) == []
