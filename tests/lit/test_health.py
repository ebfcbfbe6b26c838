"""Trainings that are really ill: each is told once, with its number and the setting to change."""

import ast
import inspect
import logging
import re
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dcar.lit.callbacks import Throughput
from dcar.lit.health import HealthWatch
from dcar.lit.health_rules import Rule
from dcar.lit.last_checkpoint import LastCheckpoint
from dcar.lit.schedules import warmup_cosine
from dcar.models.losses import TokenizerCriterion
from dcar.models.sampler import SamplerSettings
from experiments.config import flat_keys, load_config
from tests.toys import (
    ToyData,
    ToyImages,
    ToyLoader,
    toy_criterion,
    toy_generator,
    toy_masked_generator,
    toy_stage,
    toy_trainer,
)


class Told:
    """What was said, as (step, words), and that is over again as (step, rule)."""

    def __init__(self, caplog: pytest.LogCaptureFixture):
        self.caplog = caplog

    def _lines(self, level: int) -> list[tuple[int, str]]:
        start = "health, step "
        said = [r.getMessage() for r in self.caplog.records if r.levelno == level]
        pairs = [line.removeprefix(start).split(": ", 1) for line in said if start in line]
        return [(int(step), words) for step, words in pairs]

    @property
    def ill(self) -> list[tuple[int, str]]:
        return self._lines(logging.WARNING)

    @property
    def well(self) -> list[tuple[int, str]]:
        return self._lines(logging.INFO)


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Told:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "propagate", True)
    return Told(caplog)


def watch(**settings) -> HealthWatch:
    return HealthWatch(**{"every_steps": 1, "codebook_after": 5} | settings)


def fit(module: LightningModule, steps: int, watch: HealthWatch, data=None, **settings) -> None:
    callbacks = [Throughput(every_steps=1, warmup=0), watch, *settings.pop("callbacks", [])]
    settings = {"log_every_n_steps": 1} | settings
    toy_trainer(steps, callbacks=callbacks, **settings).fit(module, datamodule=data or ToyData())


def adamw(rate: float) -> partial:
    return partial(torch.optim.AdamW, lr=rate)


def one_line(told: Told, *words: str) -> int:
    """The step of the only thing told, which says all of `words`."""
    assert len(told.ill) == 1, told.ill
    step, line = told.ill[0]
    for word in words:
        assert word in line, line
    return step


@pytest.mark.parametrize(
    "module",
    [
        partial(toy_stage, 1),
        partial(toy_stage, 2, adversarial=True, kmeans_vectors=128, optimizer=adamw(1e-4)),
        partial(toy_stage, 3),
        toy_masked_generator,
    ],
)
def test_a_healthy_training_says_nothing(module: partial, told: Told) -> None:
    schedule = partial(warmup_cosine, warmup_steps=4, total_steps=12)
    settings = {"limit_val_batches": 1, "val_check_interval": 4}
    fit(module(schedule=schedule), 12, watch(wait_share=0.9), **settings)
    assert told.ill == told.well == []


def test_a_learning_rate_of_zero_is_told_once(told: Told) -> None:
    fit(toy_stage(1, optimizer=adamw(0.0)), 6, watch())
    assert one_line(told, "opt/learning_rate is 0", "Set learning_rate") == 1


def test_a_schedule_that_ends_too_early_is_told_when_it_has_ended(told: Told) -> None:
    schedule = partial(warmup_cosine, warmup_steps=0, total_steps=4)
    fit(toy_stage(1, schedule=schedule), 8, watch())
    assert one_line(told, "opt/learning_rate is 0", "max_steps") == 5


def test_a_schedule_that_ends_with_the_training_is_not_told(told: Told) -> None:
    schedule = partial(warmup_cosine, warmup_steps=0, total_steps=7)
    fit(toy_stage(1, schedule=schedule), 8, watch())
    assert told.ill == []


def collapsing() -> LightningModule:
    """All latents are drawn to one code: nothing but commitment is learned."""
    criterion = TokenizerCriterion(
        pixel="l1",
        pixel_weight=1e-3,
        perceptual=None,
        perceptual_weight=0.0,
        codebook_weight=10.0,
        adversarial_weight=0.0,
    )
    return toy_stage(2, criterion=criterion)


def test_a_collapsing_codebook_is_told_with_how_to_revive_it(told: Told) -> None:
    fit(collapsing(), 14, watch())
    step = one_line(told, "codebook usage is falling", "alarm below", "revival_decay=0.99")
    assert step >= 5


def test_codes_that_are_revived_already_call_for_smaller_steps(told: Told) -> None:
    module = collapsing()
    quantizer = module.network.quantizer
    quantizer.initialize(quantizer.codebook)
    quantizer.revival_decay = 0.999999  # too slow to be of use here
    fit(module, 14, watch())
    one_line(told, "codebook usage is falling", "Lower learning_rate")


def test_few_codes_from_the_start_are_told_after_a_while(told: Told) -> None:
    module = toy_stage(2, optimizer=adamw(1e-6))
    with torch.no_grad():
        module.network.quantizer.codebook[1:] = -module.network.quantizer.codebook[0]
    fit(module, 12, watch(codebook_floor=0.3, codebook_after=6))
    assert one_line(told, "alarm below 30.0%") == 8  # the third look at it


def test_codes_falling_over_validation_sets_are_told(told: Told) -> None:
    settings = {"limit_val_batches": 2, "val_check_interval": 2}
    fit(collapsing(), 12, watch(every_steps=2, codebook_fall=0.7), **settings)
    assert any(line.startswith("codebook/val_usage has fallen to") for _, line in told.ill)


def test_a_codebook_that_does_not_train_is_left_alone(told: Told) -> None:
    fit(toy_stage(1), 10, watch(codebook_floor=1.0, codebook_after=0))
    assert told.ill == []


def test_a_discriminator_that_wins_is_told_with_its_loss_and_logits(told: Told) -> None:
    rates = iter([1e-5, 3e-2])  # the network's, the discriminator's
    module = toy_stage(
        2,
        adversarial=True,
        revival_decay=0.99,
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=next(rates)),
    )
    fit(module, 14, watch(discriminator_floor=0.2))
    words = ("discriminator is winning", "alarm below 0.2", "module.discriminator_start")
    one_line(told, *words, "criterion.adversarial_weight")


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_a_loss_scale_that_collapses_is_told(told: Told) -> None:
    criterion = toy_criterion(1)
    criterion.weights["l1"] = 1e9  # gradients beyond what fp16 holds
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    precision = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    fit(toy_stage(1, criterion=criterion), 5, watch(), plugins=[precision])
    lines = [line for _, line in told.ill]
    assert any("loss scale of fp16 is collapsing: 8" in line for line in lines), lines
    assert all("trainer.precision=bf16-mixed" in line for line in lines)
    assert any("100% of the last 1 steps were not taken" in line for line in lines), lines


def test_guidance_without_condition_dropout_is_told_before_the_first_step(told: Told) -> None:
    fit(toy_masked_generator(generator=toy_generator(caption_drop=0.0)), 3, watch())
    assert one_line(told, "generator.caption_drop is 0", "guidance of 1", "caption_drop=0.1") == 0


def test_no_guidance_needs_no_condition_dropout(told: Told) -> None:
    generator = toy_generator(caption_drop=0.0)
    fit(toy_masked_generator(generator=generator, sampler=SamplerSettings(guidance=0)), 3, watch())
    assert told.ill == []


def test_captions_without_effect_are_told_after_some_steps(told: Told) -> None:
    module = toy_masked_generator(generator=toy_generator(caption_drop=1.0))
    settings = {"limit_val_batches": 1, "val_check_interval": 2}
    fit(module, 8, watch(captions_after=5), **settings)
    step = one_line(told, "captions have no effect", "val/token is", "generator.caption_drop (1)")
    assert step == 5


class SlowImages(ToyImages):
    def __getitem__(self, index: int) -> dict:
        time.sleep(0.15)
        return super().__getitem__(index)


class SlowThenQuick(ToyData):
    """Five batches that take long to read, then quick ones."""

    def train_dataloader(self) -> ToyLoader:
        slow, quick = SlowImages(20), ToyImages(60, offset=20)
        return ToyLoader(torch.utils.data.ConcatDataset([slow, quick]), 4)


@pytest.mark.slow
def test_data_that_wait_are_told_and_that_they_wait_no_more(told: Told) -> None:
    fit(toy_stage(1), 13, watch(wait_share=0.6), SlowThenQuick())
    step = one_line(told, "steps wait for data", "alarm above 60%", "data.num_workers")
    assert step == 3
    assert [(6 <= step <= 12, words) for step, words in told.well] == [(True, "data is well again")]


def test_tensorboard_shows_the_words_with_their_step(told: Told, tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    fit(toy_stage(1, optimizer=adamw(0.0)), 4, watch(every_steps=2), logger=logger)
    logger.finalize("success")
    shown = EventAccumulator(str(tmp_path)).Reload()
    (event,) = shown.Tensors("health/learning_rate/text_summary")
    assert event.step == 2 and b"Set learning_rate" in event.tensor_proto.string_val[0]
    assert not any("health/data" in tag for tag in shown.Tags()["tensors"])


def test_what_was_told_is_not_told_again_after_a_resumption(told: Told, tmp_path: Path) -> None:
    for steps, path in ((4, None), (8, tmp_path / "last.ckpt")):
        module = toy_stage(1, optimizer=adamw(0.0))
        last = LastCheckpoint(folder=tmp_path, every_steps=4)
        trainer = toy_trainer(steps, callbacks=[watch(), last])
        trainer.fit(module, datamodule=ToyData(), ckpt_path=path, weights_only=True)
    assert [step for step, _ in told.ill] == [1]


@pytest.mark.slow
def test_a_run_that_is_stopped_at_every_step_is_told_the_same(told: Told, tmp_path: Path) -> None:
    """Rules that wait for several looks in a row, and look back at several, are not set back."""

    def run(folder: Path, stops: Sequence[int]) -> tuple[list[tuple[int, str]], dict[str, Any]]:
        told.caplog.clear()
        for steps in stops:
            module = toy_stage(2, adversarial=True, revival_decay=0.99)
            mine = watch(discriminator_floor=100.0)
            callbacks = [mine, LastCheckpoint(folder=folder, every_steps=1)]
            trainer = toy_trainer(steps, callbacks=callbacks, log_every_n_steps=1)
            path = folder / "last.ckpt"
            path = path if path.exists() else None
            trainer.fit(module, datamodule=ToyData(), ckpt_path=path, weights_only=True)
            fresh = {rule.name: vars(rule) for rule in watch(discriminator_floor=100.0).rules}
            for rule in mine.rules:
                moved = {key for key, value in vars(rule).items() if value != fresh[rule.name][key]}
                assert moved <= set(rule.memory), rule.name
        return told.ill, mine.state_dict()

    whole = run(tmp_path / "whole", [10])
    assert whole == run(tmp_path / "stopped", range(1, 11))
    assert [step for step, _ in whole[0]] == [7]  # five losses to look at, three looks in a row


def test_a_codebook_falls_from_what_it_was_before_a_resumption(tmp_path: Path) -> None:
    first = watch()
    last = LastCheckpoint(folder=tmp_path, every_steps=6)
    fit(toy_stage(2, revival_decay=0.99), 6, first, callbacks=[last])
    second = watch(every_steps=100)
    trainer = toy_trainer(7, callbacks=[second])
    path = tmp_path / "last.ckpt"
    module = toy_stage(2, revival_decay=0.99)
    trainer.fit(module, datamodule=ToyData(), ckpt_path=path, weights_only=True)
    assert second.state_dict() == first.state_dict()
    assert second.state_dict()["memories"]["codebook_usage"]["best"] > 0


def test_every_setting_that_is_named_exists() -> None:
    source = ast.parse(Path(inspect.getfile(Rule)).read_text())
    texts = [n.value for n in ast.walk(source) if isinstance(n, ast.Constant)]
    words = " ".join(text for text in texts if isinstance(text, str))
    groups = "module|criterion|discriminator|trainer|generator|sampler|data|shard_cache"
    named = set(re.findall(rf"\b(?:{groups})\.[a-z_]+", words))
    given = ["data_root=x"]
    configs = [load_config(name, given) for name in ("tokenizer/stage2", "generator/pretrain_256")]
    known = {key for config in configs for key in flat_keys(config)}
    assert len(named) >= 8 and named <= known


def test_metrics_are_read_every_so_many_steps_alone() -> None:
    class Counting(HealthWatch):
        looks: list[int] = []

        def _look(self, trainer, look) -> None:
            self.looks.append(look.step)

    fit(toy_stage(1, accumulate=2), 6, Counting(every_steps=3), ToyData(count=64))
    assert Counting.looks == [0, 3, 6]


def test_looking_at_no_step_is_refused() -> None:
    with pytest.raises(ValueError, match="every_steps=0"):
        HealthWatch(every_steps=0)
