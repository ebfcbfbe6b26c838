"""Every command of docs/finetuning.md, in its order, from a model of the smallest size."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dcar.models.checkpoints import load_model, save_model
from dcar.models.fingerprint import fingerprint, tokenizer_fingerprint
from experiments.config import load_config
from experiments.run import main
from tests.toys import ROOT, toy_model

PAGE = (ROOT / "docs/finetuning.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", PAGE, re.S)
LINES = [
    line
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S)
    for line in block.split("\n")
    if line.startswith("python")
]
PARTS = ("decoder", "lora", "generator", "residual_head", "tokenizer")
TRAININGS = [f"finetune/{part}" for part in PARTS]
SHORT = ["max_steps=2", "warmup_steps=1", "batch_size=4", "val_every=2", "data.num_workers=0"]
SHORT += ["trainer.precision=32-true", "+trainer.limit_val_batches=2", "fid_features=null"]
FEW = ["images=32", "data.num_workers=0"]


@pytest.mark.slow
def test_the_page_is_followed_from_top_to_bottom(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("assets").symlink_to(ROOT / "assets")
    save_model(toy_model(), "outputs/quickstart/model")
    (block,) = PYTHON
    exec(compile(block, "docs/finetuning.md", "exec"), {})
    for line in LINES:
        words = shlex.split(line)[3:]
        exp = words[0].removeprefix("--exp=")
        more = SHORT if exp in TRAININGS else FEW if exp == "finetune/retokenize" else []
        assert main([*words, *more]) == 0, line
    night = np.asarray(Image.open(next(Path("pictures/train").rglob("*.png"))))
    assert night.shape == (128, 128, 3) and night[0, 0].max() == 0
    assert Path("outputs/pictures.png").is_file() and Path("night.png").is_file()
    start, new_decoder, merged = (
        load_model(f"outputs/{name}")
        for name in ("quickstart/model", "finetune/decoder/model", "merged")
    )
    assert fingerprint(start.generator) == fingerprint(new_decoder.generator)
    assert fingerprint(new_decoder.generator) != fingerprint(merged.generator)
    assert fingerprint(start.tokenizer) != fingerprint(new_decoder.tokenizer)
    assert fingerprint(new_decoder.tokenizer) == fingerprint(merged.tokenizer)
    whole = load_model("outputs/finetune/generator/model")
    assert fingerprint(whole.tokenizer) == fingerprint(new_decoder.tokenizer)
    assert fingerprint(whole.text_encoder) != fingerprint(new_decoder.text_encoder)
    new_tokens = load_model("outputs/whole/finetune/generator/model").tokenizer
    assert tokenizer_fingerprint(new_tokens) != tokenizer_fingerprint(start.tokenizer)
    assert fingerprint(load_model("outputs/finetune/lora/model").generator) == fingerprint(
        merged.generator
    )


def test_the_page_says_what_the_configs_say() -> None:
    lora = load_config("finetune/lora", ["init_from=x"])
    row = (
        f"| {lora.learning_rate:g}".replace("0.0005", "5e-4")
        + f", {lora.max_steps}, {lora.batch_size} |"
    )
    assert row in PAGE
    for key in ("rank", "alpha", "dropout"):
        assert f"| `lora.{key}` | {lora.lora[key]:g} |" in PAGE
    for target in lora.lora.targets:
        assert f"`{target}`" in PAGE
    for name in ("pretrain_256", "finetune_512", "scratch_512"):
        steps = load_config(f"generator/{name}", ["data_root=x"]).max_steps
        assert re.search(rf"`generator/{name}` \({steps:,}", PAGE), name
