"""Composing experiments: every file composes and builds; what is wrong is named in one line."""

import re

import pytest
from omegaconf import OmegaConf

from experiments.config import (
    CONFIGS,
    ConfigError,
    experiment_names,
    first_comment,
    load_config,
)
from experiments.fine_tune import start_with_new_head

REQUIRED = {"sample": ["prompt=x"]}


def test_every_experiment_of_the_readme_s_kinds_is_there() -> None:
    names = set(experiment_names())
    stages = {"stage1", "stage2", "stage3"}
    assert {"quickstart", "sample"} <= names
    assert {f"tokenizer/{s}" for s in stages} <= names
    assert {f"smoke/{s}" for s in stages | {"pretrain_256", "finetune_512"}} <= names
    assert {"generator/pretrain_256", "generator/finetune_512"} <= names


@pytest.mark.parametrize("name", experiment_names())
def test_a_file_opens_with_what_it_reproduces_what_it_costs_and_its_command(name: str) -> None:
    text = (CONFIGS / "experiment" / f"{name}.yaml").read_text()
    assert len(first_comment(name)) > 20
    for heading in ("# Reproduces:", "# Cost:", "# Command:"):
        assert heading in text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("max_step=3", "unknown key 'max_step'; did you mean 'max_steps'"),
        ("module.gradient_clp=3", "did you mean 'module.gradient_clip'"),
        ("tokenizer/quantizer=simv", "did you mean 'simvq'"),
        ("data=imagenett", "did you mean 'imagenet'"),
        (
            "tokenizer/quantiser=simvq",
            "no group 'tokenizer/quantiser'; did you mean 'tokenizer/quan",
        ),
        ("max_steps=many", "max_steps=many: expected integer"),
        ("trainer=3", "trainer"),
        ("module.per_image.x=1", "module.per_image"),
        ("size=${sise}", "sise"),
        ("max_steps=???", "max_steps must be given"),
        ("max_steps=[", "max_steps"),
        ("train_urls=a", "train_urls is not read by the data of quickstart/stage3; data=mixture"),
        ("data_root=a", "data=imagenet or data=journeydb"),
        ("cut_captions=0.5", "cut_captions is not read by the data of quickstart/stage3"),
    ],
)
def test_a_wrong_override_is_one_line_that_names_the_key(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config("quickstart/stage3", [override])
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("finetune/lora", ["init_from=mini", "data=emoji", "data_root=a"], "data_root is not read"),
        ("mini/decoder", ["data_root=a"], "data_root is not read by the data of mini/decoder"),
        ("quickstart/stage1", ["lpips_vgg=a"], "; criterion=reconstruction reads it"),
        ("smoke/stage1", ["tokenizer/quantizer=simvq", "revival_decay=0.9"], "quantizer=vq reads"),
        ("mini/generator", ["generator/residual_head=none", "residual_width=8"], "=flow reads it"),
    ],
)
def test_a_key_that_nothing_reads_is_refused(name: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(name, overrides)


def test_a_key_that_the_data_read_through_another_is_taken() -> None:
    config = load_config("finetune/lora", ["init_from=mini", "data_root=mine"])
    assert config.train_urls.startswith("mine/")


def test_shards_of_one_s_own_must_be_named() -> None:
    with pytest.raises(ConfigError, match="^train_urls must be given: add train_urls=VALUE$"):
        load_config("smoke/pretrain_256", ["data=shards", "val_urls=x"])


@pytest.mark.parametrize(
    "name",
    [f"finetune/{part}" for part in ("lora", "generator", "residual_head", "decoder", "tokenizer")],
)
def test_a_key_that_an_experiment_leaves_open_must_be_given(name: str) -> None:
    with pytest.raises(ConfigError, match="init_from must be given: add init_from=VALUE"):
        load_config(name, ["data_root=x"])


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("smoke/stage1", "ckpt=auto", "unknown key 'ckpt'; did you mean --ckpt?"),
        ("data/build", "val_share=0.1", "did you mean 'source.val_share'?"),
    ],
)
def test_a_key_of_another_place_is_recognised(name: str, override: str, message: str) -> None:
    given = ["source=folder", "in=x", "out=y"] if name == "data/build" else []
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(name, [*given, override])


@pytest.mark.parametrize("devices", ["8", "[0,1]", "auto"])
def test_devices_are_a_number_a_list_or_auto(devices: str) -> None:
    config = load_config("generator/pretrain_256", [f"trainer.devices={devices}"])
    assert str(config.trainer.devices).replace(" ", "") == devices


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("data.train.max_bad=0.1", 0.1),
        ("shard_cache.schemes=[file,pipe]", ["file", "pipe"]),
        ("guard.records=5", 5),
        ("callbacks.health.wait_share=0.8", 0.8),
        ("compile=aot_eager", "aot_eager"),
        ("trainer.limit_val_batches=2", 2),
    ],
)
def test_what_a_class_takes_may_be_given_though_no_file_has_it(override: str, value) -> None:
    key = override.split("=")[0]
    assert OmegaConf.select(load_config("smoke/stage1", [override]), key) == value


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("data/stats", "samples=ten", "samples=ten: expected integer"),
        ("data/stats", "processes=1.5", "processes=1.5: expected integer"),
        ("plan", "memory_gib=much", "memory_gib=much: expected number"),
        ("eval/generate", "guidance=high", "guidance=high: expected number"),
    ],
)
def test_keys_that_are_null_by_default_have_a_kind_too(name, override, message) -> None:
    given = {"data/stats": ["in=x"], "plan": ["exp=smoke/stage1"]}.get(name, ["in=x", "out=x"])
    with pytest.raises(ConfigError, match=message):
        load_config(name, [*given, override])


def test_such_a_key_may_come_with_another_choice_of_its_group() -> None:
    more = ["data=shards", "train_urls=a", "val_urls=b", "data.train.transform.crop=center"]
    assert load_config("quickstart/stage1", more).data.train.transform.crop == "center"


def test_such_a_key_may_be_of_the_other_choice_alone() -> None:
    more = ["discriminator=patch_small", "discriminator.norm=group", "criterion.pixel_weight=2"]
    config = load_config("finetune/decoder", ["init_from=mini", "data_root=x", *more])
    assert (config.discriminator.width, config.discriminator.norm) == (32, "group")
    with pytest.raises(ConfigError, match="discriminator.nrm"):
        load_config("finetune/decoder", ["init_from=mini", "data_root=x", "discriminator.nrm=1"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("callbacks.health.wait_shaer=1", "did you mean 'callbacks.health.wait_share'"),
        ("guard.polcy=skip", "did you mean 'guard.policy'"),
    ],
)
def test_a_key_that_no_class_takes_gets_the_nearest_one_it_does(override, message) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("smoke/stage1", [override])


def test_an_unknown_experiment_gets_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="did you mean 'quickstart'"):
        load_config("quikstart")


def test_a_missing_value_is_named() -> None:
    with pytest.raises(ConfigError, match="prompt must be given: add prompt=VALUE"):
        load_config("sample", ["ckpt=x"])


def test_an_unreadable_file_is_an_error_of_its_own(monkeypatch, tmp_path) -> None:
    folder = tmp_path / "experiment"
    folder.mkdir()
    (folder / "broken.yaml").write_text("# broken\na: [1,\n")
    monkeypatch.setattr("experiments.config.CONFIGS", tmp_path)
    monkeypatch.setattr("experiments.config.EXPERIMENTS", folder)
    with pytest.raises(ConfigError, match="broken"):
        load_config("broken")


def test_swapping_a_component_leaves_no_key_of_the_old_one() -> None:
    config = load_config("tokenizer/stage2", ["tokenizer/quantizer=simvq", "data_root=x"])
    assert set(config.tokenizer.quantizer) == {"_target_", "num_codes", "dim"}


def test_the_best_of_stage_2_is_the_best_at_what_it_trains() -> None:
    for name in ("tokenizer/stage2", "mini/stage2", "quickstart/stage2", "finetune/tokenizer"):
        config = load_config(name, ["init_from=x"])
        assert config.callbacks.best.monitor == "val/psnr_discrete", name
    assert load_config("mini/stage3").callbacks.best.monitor == "val/psnr_hybrid"


def test_validation_comes_every_so_many_steps_whatever_is_accumulated() -> None:
    trainer = load_config("generator/pretrain_256", ["val_every=7", "accumulate=3"]).trainer
    assert trainer.val_check_interval == 21  # Lightning counts batches


@pytest.mark.parametrize(
    ("name", "override"),
    [
        ("finetune/generator", "sampler=paper"),
        ("finetune/generator", "generator/residual_head=flow"),
        ("finetune/lora", "sampler=paper"),
    ],
)
def test_a_part_of_what_is_fine_tuned_cannot_be_chosen(name: str, override: str) -> None:
    with pytest.raises(ConfigError, match="takes its .* from|has no choice of sampler"):
        load_config(name, ["init_from=mini", "data_root=x", override])


@pytest.mark.parametrize("override", ["generator.transformer.dim=64", "num_codes=9"])
def test_of_a_finished_generator_the_residual_head_alone_can_be_chosen(override: str) -> None:
    config = load_config("finetune/residual_head", ["init_from=mini", "data_root=x", override])
    with pytest.raises(ConfigError, match="is that of what is fine-tuned and cannot be given"):
        start_with_new_head(config)
