"""Every YAML composes, its parts build (full sizes on the meta device), sizes are right."""

import pytest
import torch
from omegaconf import OmegaConf

from experiments.config import CONFIGS, experiment_names, load_config
from experiments.train import build

GIVEN = {"sample": ["ckpt=x", "prompt=x"]}
GROUPS = [p.relative_to(CONFIGS) for p in CONFIGS.rglob("*.yaml") if "experiment" not in p.parts]


def load(name: str, *overrides: str):
    given = ["data_root=x"] if "data_root" in _text(name) else []
    return load_config(name, [*GIVEN.get(name, []), *given, *overrides])


def _text(name: str) -> str:
    from experiments.config import _compose

    return OmegaConf.to_yaml(_compose(name, []))


@pytest.mark.parametrize("name", experiment_names())
def test_every_experiment_composes(name: str) -> None:
    assert load(name).task.startswith("experiments.")


def count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", [n for n in experiment_names() if "/" in n])
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


@pytest.mark.parametrize("path", GROUPS, ids=str)
def test_a_component_file_opens_with_a_sentence(path) -> None:
    assert (CONFIGS / path).read_text().startswith("# ")
