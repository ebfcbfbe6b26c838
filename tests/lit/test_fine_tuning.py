"""LoraGenerator: only adapters move and are saved, exact resume, bases that do not fit, export."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback

from dcar.errors import CheckpointError
from dcar.lit.averaging import AverageWeights
from dcar.lit.fine_tuning import LoraGenerator, adapter_of
from dcar.lit.last_checkpoint import LastCheckpoint
from dcar.lit.random_states import RandomStates
from dcar.models.checkpoints import Model, read_checkpoint
from dcar.models.lora import LoraSettings, adapted_layers
from tests.toys import SIZE, ToyData, toy_masked_generator, toy_model, toy_trainer, weights


def lora_module(base: Model | None = None, **options: Any) -> LoraGenerator:
    torch.manual_seed(1)
    settings: dict[str, Any] = {
        "base": base or toy_model(),
        "base_name": "the toy model",
        "lora": LoraSettings(rank=4, alpha=4.0),
        "optimizer": partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.0),
    }
    return LoraGenerator(**settings | options)


def everything(model: Model) -> dict[str, torch.Tensor]:
    parts = {"tokenizer": model.tokenizer, "text": model.text_encoder, "g": model.generator}
    return {
        f"{part}.{name.replace('.base_layer', '')}": tensor.clone()
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
        if "lora_" not in name
    }


def test_adapters_move_and_nothing_of_the_base_does() -> None:
    base = toy_model()
    before, module = everything(base), lora_module(base)
    adapters = weights(module)
    toy_trainer(4).fit(module, datamodule=ToyData())
    after = everything(base)
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    moved = {k for k, v in module.state_dict().items() if not torch.equal(v, adapters[k])}
    assert moved == set(adapters) and all("lora_" in name for name in moved)


def test_optimizer_average_and_checkpoint_hold_adapters_alone(tmp_path: Path) -> None:
    module, average = lora_module(), AverageWeights(decay=0.9)
    trainer = toy_trainer(3, callbacks=[average])
    trainer.fit(module, datamodule=ToyData())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = read_checkpoint(tmp_path / "a.ckpt")
    size = sum(p.numel() for p in module.network.parameters())
    groups = trainer.optimizers[0].param_groups
    assert sum(p.numel() for group in groups for p in group["params"]) == size
    assert average.average is not None
    assert sum(p.numel() for p in average.average.parameters()) == size
    for key in ("network", "state_dict"):
        assert sum(tensor.numel() for tensor in saved[key].values()) == size
    assert saved["dcar"]["config"]["generator"] and saved["dcar"]["base"]["name"] == "the toy model"


@pytest.mark.slow
@pytest.mark.parametrize("stop", [3, 5])
def test_resuming_is_exact_with_averages_dropout_and_accumulation(
    stop: int, tmp_path: Path
) -> None:
    def run(folder: Path, steps: int, ckpt: Path | None = None) -> dict[str, Any]:
        lora = LoraSettings(rank=4, alpha=4.0, dropout=0.5)
        module = lora_module(lora=lora, accumulate=2, seed=3)
        torch.manual_seed(len(folder.name))  # the global generator decides nothing
        keep = LastCheckpoint(folder=folder, every_steps=100)
        trainer = toy_trainer(steps, callbacks=[AverageWeights(decay=0.9), RandomStates(), keep])
        data = ToyData(batch_size=2)
        trainer.fit(module, datamodule=data, ckpt_path=ckpt, weights_only=True)
        return read_checkpoint(folder / "last.ckpt")

    straight = run(tmp_path / "straight", 8)
    run(tmp_path / "first", stop)
    resumed = run(tmp_path / "resumed", 8, tmp_path / "first/last.ckpt")
    for key in ("state_dict", "network"):
        for name, tensor in straight[key].items():
            assert torch.equal(tensor, resumed[key][name]), (key, name)


def test_going_on_with_another_base_is_refused_by_name(tmp_path: Path) -> None:
    trainer = toy_trainer(1)
    trainer.fit(lora_module(), datamodule=ToyData())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    other = toy_model()
    other.generator.transformer.output.bias.data.add_(1e-3)
    module = lora_module(other, base_name="another model")
    with pytest.raises(CheckpointError, match="base the toy model .* not to another model"):
        toy_trainer(2).fit(
            module, datamodule=ToyData(), ckpt_path=tmp_path / "a.ckpt", weights_only=True
        )


class Modes(Callback):
    """Notes whether the generator is in training mode."""

    def __init__(self) -> None:
        self.seen: dict[str, set[bool]] = {"train": set(), "val": set()}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.seen["train"].add(pl_module.generator.training)

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.seen["val"].add(pl_module.generator.training)


def test_the_generator_trains_in_training_mode_and_is_validated_without_dropout() -> None:
    modes = Modes()
    trainer = toy_trainer(4, callbacks=[modes], val_check_interval=2, limit_val_batches=1)
    trainer.fit(lora_module(), datamodule=ToyData())
    assert modes.seen == {"train": {True}, "val": {False}}


def test_the_exported_model_draws_what_the_adapted_one_draws() -> None:
    module = lora_module()
    toy_trainer(4).fit(module, datamodule=ToyData())
    module.generator.eval()
    merged = module.model()
    assert not adapted_layers(merged.generator)
    text, mask = module.text_encoder(["a toy", "another"])
    ids = torch.full((2, 8, 8), module.generator.transformer.mask_id)
    with torch.no_grad():
        ours = module.generator.transformer(ids, text, mask).logits
        theirs = merged.generator.transformer(ids, text, mask).logits
        untrained = toy_model().generator.transformer(ids, text, mask).logits
    assert (ours - theirs).abs().max() < 1e-5 < 1e-2 < (ours - untrained).abs().max()


def test_the_resolution_may_be_another_than_the_base_s() -> None:
    module = lora_module(size=2 * SIZE)
    assert module.model().size == 2 * SIZE and lora_module().size == SIZE
    text, mask = module.text_encoder(["a toy"])
    assert module.decode(module.sample(text, mask, seeds=[0])).shape == (1, 3, 64, 64)


def test_adapters_are_taken_from_lora_checkpoints_alone(tmp_path: Path) -> None:
    trainer = toy_trainer(1)
    trainer.fit(toy_masked_generator(), datamodule=ToyData())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"a.ckpt was written by MaskedARGenerator"):
        adapter_of(read_checkpoint(tmp_path / "a.ckpt"), source="a.ckpt")
