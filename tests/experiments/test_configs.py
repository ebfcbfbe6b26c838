"""Every YAML composes, its parts build (full sizes on the meta device), sizes are right."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from dcar.data.shards import write_shards
from dcar.lit.stepping import parameter_groups
from experiments.components import build
from experiments.config import CONFIGS, experiment_names, load_config
from tests.shards import row

GIVEN = {
    "sample": ["prompt=x"],
    "export": ["ckpt=x", "out=x"],
    "data/build": ["source=folder", "in=x", "out=x"],
    "finetune/lora": ["init_from=x"],
    "finetune/decoder": ["init_from=x"],
    "finetune/tokenizer": ["init_from=x"],
    "finetune/retokenize": ["init_from=x", "tokenizer_from=y"],
    "finetune/generator": ["init_from=x"],
    "finetune/residual_head": ["init_from=x"],
    "finetune/merge": ["init_from=x", "adapter=x", "out=x"],
    "lineage": ["ckpt=x"],
    "debug/replay": ["record=x"],
    "eval/generate": ["in=x", "out=x"],
    "eval/fid": ["generated=x", "real=x"],
    "eval/geneval": ["in=x"],
    "data/verify": ["in=x"],
    "data/stats": ["in=x"],
    "data/peek": ["in=x"],
    "data/precompute": ["in=x", "out=x", "tokenizer_from=x"],
    "data/caption": ["in=x", "out=x", "model=x"],
}
GROUPS = [p.relative_to(CONFIGS) for p in CONFIGS.rglob("*.yaml") if "experiment" not in p.parts]


def load(name: str, *overrides: str):
    from experiments.config import _compose, _text_of_data

    given = ["data_root=x"] if "${data_root}" in _text_of_data(_compose(name, [])) else []
    return load_config(name, [*GIVEN.get(name, []), *given, *overrides])


def _text(name: str, *overrides: str) -> str:
    from experiments.config import _compose

    return OmegaConf.to_yaml(_compose(name, list(overrides)))


@pytest.mark.parametrize("name", experiment_names())
def test_every_experiment_composes(name: str) -> None:
    assert load(name).task.startswith("experiments.")


def count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# the architectures of these come with the model or the record that they start from
NO_NETWORKS = (
    "eval/",
    "data/",
    "finetune/",
    "debug/",
    "mini/decoder",
    "smoke/lora",
    "smoke/decoder",
)


@pytest.mark.parametrize(
    "name", [n for n in experiment_names() if "/" in n and not n.startswith(NO_NETWORKS)]
)
def test_its_networks_build(name: str) -> None:
    config = load(name)
    parts = [part for part in ("tokenizer", "generator", "discriminator") if part in config]
    with torch.device("meta"):
        built = {part: build(config[part]) for part in parts}
    assert count(built["tokenizer"]) > 0 and built["tokenizer"].num_codes == config.num_codes
    if "sampler" in config:
        assert build(config.sampler).steps == 12
        assert built["generator"].transformer.num_codes == config.num_codes


def test_the_paper_s_sizes_are_exact() -> None:
    with torch.device("meta"):
        assert count(build(load("tokenizer/stage2").tokenizer)) == 323_880_748
        for name in ("generator/pretrain_256", "generator/finetune_512"):
            generator = build(load(name).generator)
            assert count(generator.transformer) == 635_071_360
            assert count(generator.residual_head) == 36_192_320


@pytest.mark.parametrize(
    ("name", "override"),
    [
        ("smoke/stage2", "tokenizer/quantizer=simvq"),
        ("smoke/pretrain_256", "generator/residual_head=flow"),
        ("smoke/pretrain_256", "generator/residual_head=none"),
        ("smoke/stage2", "tokenizer=dc_ht_f32c32"),
    ],
)
def test_a_component_is_swapped_by_one_word(name: str, override: str) -> None:
    before, after = load(name), load(name, override)
    key = override.split("=")[0].replace("/", ".")
    assert OmegaConf.select(before, key) != OmegaConf.select(after, key)
    with torch.device("meta"):
        build(after[key.split(".")[0]])


@pytest.mark.parametrize(
    ("name", "aside"),
    [
        ("generator/pretrain_256", set()),
        (
            "mini/generator",
            {
                "generator.residual_head.code_embedding.weight",
                "text_encoder.model.embed_tokens.weight",
                "text_encoder.model.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
                "text_encoder.words.table.weight",
            },
        ),
    ],
)
def test_muon_trains_every_matrix_but_the_ends(name: str, aside: set[str]) -> None:
    config = load(name, "optimizer=muon")
    with torch.device("meta"):
        parts = {"generator": build(config.generator)}
        if name == "mini/generator":
            parts["text_encoder"] = build(config.text_encoder)
    network = torch.nn.ModuleDict(parts)
    muon, adamw, plain = build(config.optimizer)(parameter_groups([network])).param_groups
    assert set(adamw["param_names"]) == aside | {
        "generator.transformer.token_embedding.weight",
        "generator.transformer.output.weight",
        "generator.residual_head.denoiser.output.weight",
    }
    matrices = {key for key, value in network.named_parameters() if value.ndim == 2}
    assert set(muon["param_names"]) == matrices - set(adamw["param_names"])
    assert muon["lr"] == adamw["lr"] == config.learning_rate
    assert muon["weight_decay"] == config.optimizer.weight_decay and plain["weight_decay"] == 0


@pytest.mark.parametrize("choice", ["journeydb", "journeydb_buckets", "mixture", "shards"])
def test_captioned_data_are_swapped_by_one_word(choice: str, tmp_path: Path) -> None:
    """Real shards behind each choice, and a batch of what it promises."""
    rows = [row(f"k{number:04d}") for number in range(40)]
    for split in ("journeydb-train", "journeydb-val", "own"):
        write_shards(rows, tmp_path, split, 40)
    read = _text("smoke/pretrain_256", f"data={choice}")
    given = {key: f"{tmp_path}/own-*.tar" for key in ("train_urls", "val_urls")}
    given["data_root"] = str(tmp_path)
    places = [f"{key}={value}" for key, value in given.items() if f"${{{key}}}" in read]
    sizes = ["size=128", "batch_size=2", "data.num_workers=0"]
    config = load("smoke/pretrain_256", f"data={choice}", *places, *sizes)
    batch = next(iter(build(config.data).train_dataloader()))
    shape = (96, 160) if choice == "journeydb_buckets" else (128, 128)
    assert tuple(batch["image"].shape) == (2, 3, *shape)


def test_scenes_are_mixed_with_the_embedded_drawings() -> None:
    config = load("smoke/pretrain_256", "data=emoji_scenes", "batch_size=16", "size=32")
    batch = next(iter(build(config.data).train_dataloader()))
    assert tuple(batch["image"].shape) == (16, 3, 32, 32)
    assert 3 <= sum(key.startswith("scene/") for key in batch["key"]) <= 13


@pytest.mark.parametrize("path", GROUPS, ids=str)
def test_a_component_file_opens_with_a_sentence(path) -> None:
    assert (CONFIGS / path).read_text().startswith("# ")
