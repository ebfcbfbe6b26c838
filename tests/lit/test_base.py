"""What trainings share beside their steps: frozen parts, weights from another run, draws."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dcar.errors import CheckpointError
from dcar.lit.base import train_only
from dcar.lit.last_checkpoint import LastCheckpoint
from dcar.lit.schedules import warmup_cosine
from dcar.models.quantizer import VectorQuantizer
from tests.toys import (
    CODES,
    ToyData,
    toy_masked_generator,
    toy_stage,
    toy_tokenizer,
    toy_trainer,
)


def test_train_only_freezes_and_evaluates_the_rest() -> None:
    network = nn.ModuleDict({"a": nn.BatchNorm1d(2), "b": nn.Linear(2, 2)})
    train_only(network, ["b"])
    assert not network["a"].training and not network["a"].weight.requires_grad
    assert network["b"].training and network["b"].weight.requires_grad


def test_train_only_refuses_an_unknown_part() -> None:
    with pytest.raises(ValueError, match="decodr"):
        train_only(nn.ModuleDict({"decoder": nn.Linear(1, 1)}), ["decodr"])


def test_the_wrong_stage_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "stage1.ckpt"
    trainer = toy_trainer(1)
    trainer.fit(toy_stage(1), datamodule=ToyData())
    trainer.save_checkpoint(path)
    with pytest.raises(CheckpointError, match="TokenizerStage1; TokenizerStage3 starts from"):
        toy_stage(3, init_from=path)
    assert toy_stage(2, init_from=path)


def test_another_architecture_is_refused_with_its_keys(tmp_path: Path) -> None:
    path = tmp_path / "stage1.ckpt"
    trainer = toy_trainer(1)
    trainer.fit(toy_stage(1, norm="ln2d"), datamodule=ToyData())
    trainer.save_checkpoint(path)
    with pytest.raises(CheckpointError, match="running_mean"):
        toy_stage(2, init_from=path)


@pytest.mark.parametrize("codes", [CODES, 2 * CODES])
def test_a_codebook_of_any_size_starts_from_one_stage_1(tmp_path: Path, codes: int) -> None:
    path = tmp_path / "stage1.ckpt"
    trainer, first = toy_trainer(1), toy_stage(1)
    trainer.fit(first, datamodule=ToyData())
    trainer.save_checkpoint(path)
    tokenizer = toy_tokenizer()
    tokenizer.quantizer = VectorQuantizer(num_codes=codes, dim=tokenizer.latent_channels)
    codebook = tokenizer.quantizer.codebook.detach().clone()
    second = toy_stage(2, init_from=path, tokenizer=tokenizer)
    assert torch.equal(second.network.quantizer.codebook, codebook)
    for name, tensor in first.network.encoder.state_dict().items():
        assert torch.equal(second.network.encoder.state_dict()[name], tensor), name


def test_draws_depend_on_seed_epoch_and_batch_alone() -> None:
    module = toy_masked_generator()
    module._trainer = toy_trainer(1)
    first = module.draws(3, epoch=1).rand(4)
    assert torch.equal(first, module.draws(3, epoch=1).rand(4))
    assert not torch.equal(first, module.draws(4, epoch=1).rand(4))
    assert not torch.equal(first, module.draws(3, epoch=2).rand(4))


@pytest.mark.parametrize("make", [lambda: toy_stage(1), toy_masked_generator])
def test_a_validation_set_without_a_name_is_refused_before_the_first_step(make) -> None:
    data = ToyData()
    data.val_streams = {"val": None, "heldout": None}
    with pytest.raises(
        ValueError, match="\\['val', 'heldout'\\], and module.val_names \\['val'\\]"
    ):
        toy_trainer(1).fit(make(), datamodule=data)


def test_settings_of_the_optimizer_are_those_that_the_resumed_run_is_given(tmp_path: Path) -> None:
    """Its schedule goes on where it was, to the new peak."""

    def run(steps: int, rate: float, decay: float, ckpt: Path | None = None) -> dict[str, Any]:
        module = toy_stage(
            1,
            optimizer=partial(torch.optim.AdamW, lr=rate, weight_decay=decay),
            schedule=partial(warmup_cosine, warmup_steps=2, total_steps=10),
        )
        trainer = toy_trainer(steps, callbacks=[LastCheckpoint(folder=tmp_path, every_steps=4)])
        trainer.fit(module, datamodule=ToyData(), ckpt_path=ckpt)
        return trainer.optimizers[0].param_groups[0]

    fresh = run(6, 1e-3, 0.5)
    run(4, 1e-2, 0.1)
    resumed = run(6, 1e-3, 0.5, tmp_path / "last.ckpt")
    assert resumed["lr"] == pytest.approx(fresh["lr"], rel=1e-6)
    assert resumed["weight_decay"] == 0.5 and resumed["initial_lr"] == 1e-3
