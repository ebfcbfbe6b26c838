"""Adapters: what they touch, merging, folders that peft reads too, bases that do not fit."""

import json
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

from dcar.errors import CheckpointError
from dcar.models.checkpoints import Model, load_model, save_model
from dcar.models.lora import (
    TARGETS,
    Adapter,
    LoraSettings,
    adapted_layers,
    add_adapters,
    describe_base,
    merge_adapters,
)
from dcar.models.transformer import MaskedTransformer
from tests.toys import CODES, toy_model

SETTINGS = LoraSettings(rank=4, alpha=8.0)


def logits(transformer: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(CODES + 1, (2, 4, 6), generator=generator)
    text, mask = torch.randn(2, 5, 8, generator=generator), torch.ones(2, 5, dtype=torch.bool)
    with torch.no_grad():
        return transformer(ids, text, mask).logits


def randomized(adapters: nn.Module) -> nn.Module:
    """As after a training: a fresh adapter's second matrix is zero."""
    for parameter in adapters.parameters():
        nn.init.normal_(parameter, std=0.2)
    return adapters


def adapted(settings: LoraSettings = SETTINGS) -> tuple[Model, Adapter]:
    """A model with adapters in it, and these as they are saved."""
    model = toy_model()
    base = describe_base(model, "toy")
    adapters = randomized(add_adapters(model.generator.transformer, settings))
    return model, Adapter(settings, base, adapters.state_dict())


def test_new_adapters_change_nothing_and_are_all_that_trains() -> None:
    transformer = toy_model().generator.transformer
    before = logits(transformer)
    adapters = add_adapters(transformer, SETTINGS)
    assert torch.equal(logits(transformer), before)
    trainable = {id(p) for p in transformer.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in adapters.parameters()}
    assert all(p.requires_grad for p in adapters.parameters())


def test_every_linear_layer_of_the_blocks_gets_one_and_no_other() -> None:
    transformer = toy_model().generator.transformer
    linear = {n for n, part in transformer.named_modules() if isinstance(part, nn.Linear)}
    add_adapters(transformer, LoraSettings(rank=2))
    assert set(adapted_layers(transformer)) == {n for n in linear if n.startswith("blocks.")}


def test_only_the_named_targets_get_one() -> None:
    transformer = toy_model().generator.transformer
    adapters = add_adapters(transformer, LoraSettings(rank=2, targets=("attention.output",)))
    names = [f"blocks.{block}.attention.output" for block in range(2)]
    assert sorted(adapted_layers(transformer)) == names
    kept = [f"{name}.{part}.weight" for name in names for part in ("lora_A", "lora_B")]
    assert list(adapters.state_dict()) == kept


def test_merged_weights_give_the_same_logits_in_plain_layers() -> None:
    model, _ = adapted()
    transformer, plain = model.generator.transformer, toy_model().generator.transformer
    merged = merge_adapters(transformer)
    assert (logits(merged) - logits(transformer)).abs().max() < 1e-5
    assert (logits(merged) - logits(plain)).abs().max() > 0.1
    assert not adapted_layers(merged) and adapted_layers(transformer)
    assert list(merged.state_dict()) == list(plain.state_dict())


def test_alpha_over_rank_is_the_weight_of_the_update() -> None:
    name = "blocks.0.attention.qkv.weight"

    def update(alpha: float) -> Tensor:
        model, _ = adapted(LoraSettings(rank=4, alpha=alpha))  # the same adapters each time
        merged = merge_adapters(model.generator.transformer).get_parameter(name)
        return merged - toy_model().generator.transformer.get_parameter(name)

    torch.testing.assert_close(update(8.0), 2 * update(4.0), atol=1e-5, rtol=1e-4)
    assert update(8.0).abs().mean() > 0.01


def test_a_saved_adapter_comes_back_and_merges_to_the_same_model(tmp_path: Path) -> None:
    model, adapter = adapted()
    adapter.save(tmp_path)
    loaded = Adapter.load(tmp_path)
    assert loaded.settings == SETTINGS and loaded.base == adapter.base
    merged = loaded.merge_into(toy_model(), name="toy", source=tmp_path)
    expected = merge_adapters(model.generator).state_dict()
    for name, tensor in merged.generator.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_peft_reads_the_folder_by_itself(tmp_path: Path) -> None:
    model, adapter = adapted()
    adapter.save(tmp_path)
    theirs = PeftModel.from_pretrained(toy_model().generator.transformer, str(tmp_path))
    assert torch.equal(logits(theirs), logits(model.generator.transformer))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "toy" and config["r"] == 4


def test_a_merged_model_folder_needs_no_peft(tmp_path: Path, monkeypatch) -> None:
    model, adapter = adapted()
    merged = adapter.merge_into(toy_model(), name="toy", source="memory")
    save_model(merged, tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    loaded = load_model(tmp_path)
    difference = logits(loaded.generator.transformer) - logits(model.generator.transformer)
    assert difference.abs().max() < 1e-5


def test_without_peft_the_extra_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'dcar-lightning\[lora\]'"):
        add_adapters(toy_model().generator.transformer, SETTINGS)


@pytest.mark.parametrize("part", ["generator", "text_encoder", "encoder", "quantizer"])
def test_another_base_is_refused_by_name(part: str) -> None:
    _, adapter = adapted()
    other = toy_model()
    changed = getattr(other, part, None) or getattr(other.tokenizer, part)
    next(changed.parameters()).data.add_(1e-3)
    with pytest.raises(CheckpointError, match=r"mine belongs to the base toy .* not to yours"):
        adapter.merge_into(other, name="yours", source="mine")


def test_a_base_with_another_decoder_is_the_same_base() -> None:
    _, adapter = adapted()
    other = toy_model()
    next(other.tokenizer.decoder.parameters()).data.add_(1.0)
    merged = adapter.merge_into(other, name="other", source="mine")
    assert merged.tokenizer is other.tokenizer


def test_unknown_targets_are_named_with_those_there_are() -> None:
    transformer = toy_model().generator.transformer
    before = deepcopy(transformer.state_dict())
    with pytest.raises(ValueError, match=r"\['mlp.outer'\].*attention.qkv.*mlp.output"):
        add_adapters(transformer, LoraSettings(rank=2, targets=("mlp.inner", "mlp.outer")))
    assert list(transformer.state_dict()) == list(before)


@pytest.mark.parametrize(("name", "value"), [("rank", 0), ("dropout", 1.0), ("dropout", -0.1)])
def test_impossible_settings_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}={value}"):
        LoraSettings(**{name: value})


def test_a_folder_that_is_no_adapter_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.safetensors"
    with pytest.raises(CheckpointError, match="cannot be read"):
        Adapter.load(tmp_path)
    path.write_bytes(b"not a file of weights")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Adapter.load(tmp_path)
    save_file({"base_model.model.a": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="which base"):
        Adapter.load(tmp_path)


@pytest.mark.slow
def test_the_paper_s_size_gets_adapters_of_every_block() -> None:
    with torch.device("meta"):
        transformer = MaskedTransformer(
            num_codes=16384, dim=1152, depth=28, heads=16, text_dim=768, text_tokens=300
        )
        adapters = add_adapters(transformer, LoraSettings(rank=32))
    assert len(adapted_layers(transformer)) == 28 * len(TARGETS)
    width = 1152
    sums = (4 + 2 + 2 + 3 + 2 + 5 + 5) * width  # in + out of qkv, output, query, ..., mlp
    assert sum(p.numel() for p in adapters.parameters()) == 28 * 32 * sums
