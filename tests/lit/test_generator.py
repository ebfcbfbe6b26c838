"""MaskedARGenerator: what moves, what is saved, tokens made once, exact resume, two resolutions."""

from functools import partial
from pathlib import Path

import pytest
import torch

from dcar.evaluation.metrics import GenerationMetrics
from dcar.lit.averaging import AverageWeights
from dcar.lit.last_checkpoint import LastCheckpoint
from dcar.models.checkpoints import CheckpointError
from tests.toys import (
    ToyData,
    ToyImages,
    collate,
    toy_generator,
    toy_masked_generator,
    toy_stage,
    toy_trainer,
    weights,
)


def test_generator_and_text_encoder_move_and_the_tokenizer_does_not() -> None:
    module = toy_masked_generator()
    before, tokenizer = weights(module), weights(module.tokenizer.module)
    toy_trainer(3).fit(module, datamodule=ToyData())
    moved = {
        k.split(".")[1] for k, v in module.state_dict().items() if not torch.equal(v, before[k])
    }
    assert moved == {"generator", "text_encoder"}
    for name, tensor in module.tokenizer.module.state_dict().items():
        assert torch.equal(tensor, tokenizer[name]), name


def test_no_frozen_weight_is_in_the_checkpoint(tmp_path: Path) -> None:
    trainer = toy_trainer(1)
    trainer.fit(toy_masked_generator(), datamodule=ToyData())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    parts = {tuple(name.split(".")[:2]) for name in saved["state_dict"]}
    assert parts == {("network", "generator"), ("network", "text_encoder")}


def test_the_scale_is_the_standard_deviation_of_training_residuals() -> None:
    module = toy_masked_generator(generator=toy_generator(scale=None), scale_batches=2)
    toy_trainer(1).fit(module, datamodule=ToyData())
    images = collate([ToyImages(8)[index] for index in range(8)])["image"]
    residual = module.tokenizer.encode(images).residual
    expected = residual.square().mean().sqrt().item()
    assert module.generator.residual_head.scale.item() == pytest.approx(expected, rel=1e-5)


def test_cached_tokens_are_those_of_the_tokenizer() -> None:
    module = toy_masked_generator(cache_tokens=True)
    module._trainer = toy_trainer(1)
    batch = collate([ToyImages(4)[index] for index in range(4)])
    first = module.on_after_batch_transfer(dict(batch), 0)
    module.tokenizer.module.encoder = None  # from now on only the cache can answer
    second = module.on_after_batch_transfer(dict(batch), 0)
    assert torch.equal(first["ids"], second["ids"])
    assert torch.equal(first["residual"], second["residual"])


def test_shards_that_hold_tokens_are_not_tokenised_again() -> None:
    module = toy_masked_generator()
    batch = {"ids": torch.zeros(1, 4, 4), "residual": torch.zeros(1, 4, 4, 4)}
    assert module.on_after_batch_transfer(batch, 0) is batch


def test_validation_compares_right_and_shuffled_captions_and_reports_gfid() -> None:
    module = toy_masked_generator(fid_images=8, metrics=partial(GenerationMetrics))
    trainer = toy_trainer(4, limit_val_batches=1.0, val_check_interval=4)
    trainer.fit(module, datamodule=ToyData())
    names = set(trainer.callback_metrics)
    assert {"val/token", "val/token_shuffled", "val/residual"} <= names
    assert any(name.startswith("val/gfid_") for name in names)
    right, shuffled = (trainer.callback_metrics[f"val/token{s}"] for s in ("", "_shuffled"))
    assert right != shuffled


def test_the_wrong_number_of_codes_is_refused_with_both_numbers() -> None:
    generator = toy_generator()
    generator.transformer.num_codes = 99
    with pytest.raises(ValueError, match="99 codes, the tokenizer has 16"):
        toy_masked_generator(generator=generator)


def test_a_stage_1_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    trainer = toy_trainer(1)
    trainer.fit(toy_stage(1), datamodule=ToyData())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="written by TokenizerStage1"):
        toy_masked_generator(tokenizer_from=tmp_path / "a.ckpt")


def test_weights_of_one_resolution_start_another(tmp_path: Path) -> None:
    trainer = toy_trainer(1)
    low = toy_masked_generator()
    trainer.fit(low, datamodule=ToyData())
    trainer.save_checkpoint(tmp_path / "low.ckpt")
    high = toy_masked_generator(size=64, init_from=tmp_path / "low.ckpt")
    for name, tensor in low.network.state_dict().items():
        assert torch.equal(tensor, high.network.state_dict()[name]), name
    text, mask = high.text_encoder(["a"])
    assert high.sample(text, mask, seeds=[0]).ids.shape == (1, 16, 16)


def test_stopping_and_resuming_is_bit_equal(tmp_path: Path) -> None:
    """6 straight against 3, mid-epoch, then 3 more: caption drop, masks, noise, averages."""

    def run(steps: int, ckpt: Path | None = None):
        torch.manual_seed(0)
        module = toy_masked_generator(generator=toy_generator(scale=None, caption_drop=0.5))
        average = AverageWeights(decay=0.9)
        last = LastCheckpoint(folder=tmp_path / str(steps), every_steps=100)
        trainer = toy_trainer(steps, callbacks=[average, last])
        trainer.fit(module, datamodule=ToyData(count=16), ckpt_path=ckpt)
        return module, average, trainer

    straight, straight_average, _ = run(6)
    run(3)
    resumed, resumed_average, _ = run(6, tmp_path / "3" / "last.ckpt")
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    for name, tensor in straight_average.average.state_dict().items():
        assert torch.equal(tensor, resumed_average.average.state_dict()[name]), name
