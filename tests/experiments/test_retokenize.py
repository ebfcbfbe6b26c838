"""Tokenizers fine-tuned by command, and a generator that is moved to the tokens of another one."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from dcar.data.batches import in_unit_range
from dcar.data.loader import ShardLoader
from dcar.data.stream import ShardStream
from dcar.data.transforms import ImageTransform
from dcar.errors import CheckpointError
from dcar.models.checkpoints import Model, load_model, load_tokenizer, read_checkpoint, save_model
from dcar.models.fingerprint import fingerprint, tokenizer_fingerprint
from experiments.fine_tune import find_tokenizer
from experiments.run import main
from tests.toys import ROOT, SIZE, stage_checkpoint, toy_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of random weights."""
    folder = tmp_path_factory.mktemp("base")
    save_model(toy_model(), folder)
    return folder


@pytest.mark.slow
def test_a_new_decoder_keeps_the_tokens_and_draws_the_pictures_better(
    base: Path, tmp_path: Path
) -> None:
    run = ["--exp=smoke/decoder", f"init_from={base}", f"outputs={tmp_path}"]
    assert main([*run, "max_steps=30", "val_every=30", "learning_rate=5e-3"]) == 0
    folder = tmp_path / "smoke/decoder"
    before, after = load_model(base), load_model(folder / "model")
    assert tokenizer_fingerprint(before.tokenizer) == tokenizer_fingerprint(after.tokenizer)
    assert fingerprint(before.tokenizer.decoder) != fingerprint(after.tokenizer.decoder)
    assert fingerprint(before.generator) == fingerprint(after.generator)
    tokenizer, module = load_tokenizer(folder / "checkpoints/last.ckpt")  # as a generator's start
    assert module == "TokenizerStage3"
    assert fingerprint(tokenizer) == fingerprint(after.tokenizer)
    assert squared_error(after) < 0.7 * squared_error(before)


QUICK = ["fid_features=null", "batch_size=8", "warmup_steps=2"]
QUICK += ["trainer.precision=32-true", "+trainer.limit_val_batches=2", "module.val_names=[val]"]


@pytest.mark.slow
def test_a_decoder_learns_from_the_model_s_own_residuals_too(
    base: Path, tmp_path: Path, capsys
) -> None:
    run = ["--exp=smoke/decoder", f"outputs={tmp_path}", "drawn_share=0.5"]
    assert main([*run, f"init_from={base}"]) == 0
    before, after = load_model(base), load_model(tmp_path / "smoke/decoder/model")
    assert tokenizer_fingerprint(before.tokenizer) == tokenizer_fingerprint(after.tokenizer)
    assert fingerprint(before.tokenizer.decoder) != fingerprint(after.tokenizer.decoder)
    ckpt = stage_checkpoint(3, tmp_path / "stage.ckpt")
    assert main([*run, f"init_from={ckpt}", "--ckpt=new"]) == 2
    assert "drawn_share=0.5 needs the model: add model=FOLDER" in capsys.readouterr().err


@pytest.mark.slow
def test_a_whole_tokenizer_is_fine_tuned_and_a_generator_learns_its_tokens(
    base: Path, tmp_path: Path
) -> None:
    """As docs/finetuning.md does it: stage 2 further, stage 3, and the generator on new tokens."""
    base = without_scale(shutil.copytree(base, tmp_path / "base"))
    data = ["data=emoji", "data.num_workers=0", f"outputs={tmp_path}"]
    run = [*data, *QUICK, "max_steps=30", "val_every=30", "learning_rate=5e-3"]
    assert main(["--exp=finetune/tokenizer", f"init_from={base}", *run]) == 0
    assert main(["--exp=finetune/decoder", "init_from=finetune/tokenizer", *run]) == 0
    given = [f"init_from={base}", "tokenizer_from=finetune/decoder", "images=256"]
    given.append("batch_size=8")  # the pictures that the generator measures its scale on
    assert main(["--exp=finetune/retokenize", *given, *data]) == 0
    run += ["max_steps=4", "val_every=4", "init_from=finetune/retokenize"]
    assert main(["--exp=finetune/generator", *run]) == 0
    before, matched, after = (
        load_model(path)
        for path in (
            base,
            tmp_path / "finetune/retokenize/model",
            tmp_path / "finetune/generator/model",
        )
    )
    wholes = [
        load_tokenizer(tmp_path / f"finetune/{name}/checkpoints/last.ckpt")[0]
        for name in ("tokenizer", "decoder")
    ]
    for part in ("encoder", "quantizer"):
        first = fingerprint(getattr(before.tokenizer, part))
        assert fingerprint(getattr(wholes[0], part)) != first, part
    tokens = {tokenizer_fingerprint(each) for each in (*wholes, matched.tokenizer)}
    assert len(tokens) == 1 and tokens != {tokenizer_fingerprint(before.tokenizer)}
    assert fingerprint(after.tokenizer) == fingerprint(matched.tokenizer) == fingerprint(wholes[1])
    assert squared_error(after, "discrete") < 0.7 * squared_error(before, "discrete")
    scales = [float(each.generator.residual_head.scale) for each in (before, matched, after)]
    assert scales[0] != scales[1] == pytest.approx(scales[2])  # of the new residuals
    kept, moved = (each.generator.transformer.state_dict() for each in (before, matched))
    changed = {name for name in kept if not torch.equal(kept[name], moved[name])}
    assert changed == {"token_embedding.weight", "output.weight", "output.bias"}


def without_scale(folder: Path) -> Path:
    """A model whose head measures the residuals before it learns them, as the real ones do."""
    about = json.loads((folder / "config.json").read_text())
    about["generator"]["residual_head"]["scale"] = None
    (folder / "config.json").write_text(json.dumps(about))
    return folder


def test_a_generator_takes_no_tokens_that_do_not_fit_it(base: Path, tmp_path: Path, capsys) -> None:
    """mini has other codes than the toy's."""
    run = ["init_from=mini", "data=emoji", f"outputs={tmp_path}"]
    retokenize = ["--exp=finetune/retokenize", *run]
    assert main([*retokenize, f"tokenizer_from={base}"]) == 2
    assert f"tokenizer_from={base} has num_codes" in capsys.readouterr().err
    assert main([*retokenize, "tokenizer_from=nowhere"]) == 2
    assert "tokenizer_from=nowhere is no checkpoint" in capsys.readouterr().err
    assert main(["--exp=finetune/generator", *run, f"tokenizer_from={base}"]) == 2
    assert "--exp=finetune/retokenize gives it another one" in capsys.readouterr().err


@torch.no_grad()
def squared_error(model: Model, path: str = "continuous") -> float:
    """Of some validation pictures, decoded from their continuous latents or their codes."""
    stream = ShardStream(
        ROOT / "assets/emoji/val-*.tar",
        transform=ImageTransform(size=SIZE),
        batch_size=64,
        seed=0,
        shuffle=False,
    )
    image = in_unit_range(next(iter(ShardLoader(stream))))["image"]
    decoded = model.tokenizer.decode(getattr(model.tokenizer.encode(image), path))
    return float((decoded - image).square().mean())


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_decoder_is_fine_tuned_from_a_stage_s_checkpoint(stage: int, tmp_path: Path) -> None:
    """Alone, or for a model that is built on the same tokens; another model is refused."""
    ckpt = stage_checkpoint(stage, tmp_path / "stage.ckpt")
    short = ["max_steps=2", "val_every=2", "module.schedule.warmup_steps=1"]
    run = ["--exp=smoke/decoder", f"init_from={ckpt}", f"outputs={tmp_path}", *short]
    assert main(run) == 0
    saved = read_checkpoint(tmp_path / "smoke/decoder/checkpoints/last.ckpt")
    tokenizer = load_tokenizer(ckpt)[0]
    for name, tensor in tokenizer.encoder.state_dict().items():
        assert torch.equal(saved["network"][f"encoder.{name}"], tensor)
    assert not (tmp_path / "smoke/decoder/model").exists()
    model = toy_model()
    next(model.tokenizer.encoder.parameters()).data.add_(1e-3)
    save_model(model, tmp_path / "other")
    run.append("--ckpt=new")
    assert main([*run, f"model={tmp_path}/other"]) == 2
    model.tokenizer = tokenizer
    save_model(model, tmp_path / "same")
    assert main([*run, f"model={tmp_path}/same"]) == 0
    exported = load_model(tmp_path / "smoke/decoder/model").tokenizer
    assert tokenizer_fingerprint(exported) == tokenizer_fingerprint(tokenizer)


def test_a_stage_1_checkpoint_has_no_tokens_to_keep(tmp_path: Path) -> None:
    ckpt = stage_checkpoint(1, tmp_path / "stage.ckpt")
    with pytest.raises(CheckpointError, match="written by TokenizerStage1"):
        find_tokenizer(str(ckpt), str(tmp_path))
