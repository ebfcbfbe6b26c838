"""The plan's arithmetic: parts that add up, batches that fit, hours of a schedule."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from dcar.evaluation.cost_devices import Device
from dcar.evaluation.cost_meter import BACKWARD, Flops, Meter
from dcar.evaluation.cost_steps import BytePass, GeneratorStep, TokenizerStep, UnloadedLPIPS
from dcar.evaluation.costs import (
    GIB,
    Assumptions,
    Schedule,
    Standing,
    flops_per_sample,
    hours,
    largest_batch,
    memory,
    parameter_counts,
    plan,
    rates_per_sample,
    seconds_per_sample,
)
from dcar.models.discriminator import PatchDiscriminator
from tests.toys import SIZE, toy_criterion, toy_generator, toy_text_encoder, toy_tokenizer

DEVICE = Device(memory_gib=0.05, half=100.0, convolution=50.0, single=10.0)
ASSUMED = Assumptions(half=None, mfu=0.5, reserve=0.1, optimizer_values=2.0, averages=True)
SCHEDULE = Schedule(steps=100, batch=8, accumulate=1, devices=1)
STANDING = Standing(weights=100, frozen=40, gradients=90, optimizer=180, averages=100)


class KeptOnly(GeneratorStep):
    """A step whose network has no switch to recompute activations."""

    def checkpointing(self) -> list[Any]:
        return []


def generator_step(kind: type[GeneratorStep] = GeneratorStep) -> GeneratorStep:
    with torch.device("meta"):
        tokenizer = toy_tokenizer().eval().requires_grad_(False)
        text = BytePass(toy_text_encoder())
        return kind(SIZE, toy_generator(), tokenizer, text, encodes=False, reads=False)


def kept_only() -> GeneratorStep:
    step = generator_step(KeptOnly)
    step.generator.residual_head = None
    return step


def tokenizer_step(*, with_gan: bool = True) -> TokenizerStep:
    with torch.device("meta"):
        discriminator = PatchDiscriminator(width=16, layers=1, norm="group") if with_gan else None
        criterion = toy_criterion(2, adversarial=0.5)
        return TokenizerStep(SIZE, toy_tokenizer(), criterion, discriminator, discrete_prob=1.0)


@cache
def planned(make: Callable[[], Any] = kept_only, **options: Any) -> dict[str, Any]:
    arguments = {"schedule": SCHEDULE, "device": DEVICE, "assumptions": ASSUMED} | options
    return plan(make(), **arguments)


def metered(**peak: int) -> Meter:
    return Meter(peak=peak, _peak_total=sum(peak.values()))


@pytest.mark.slow
@pytest.mark.parametrize("make", [generator_step, tokenizer_step])
def test_parts_of_memory_add_up(make) -> None:
    for way in planned(make)["ways"].values():
        parts = dict(way["memory"])
        assert parts.pop("total") == sum(parts.values()) and min(parts.values()) >= 0
        assert sum(way["activations"].values()) == parts["activations"]


def test_gradients_held_before_the_pass_come_on_top_of_its_peak() -> None:
    meter = metered(decoder=500, backward=30)
    kept, _ = memory(STANDING, meter, holds_gradients=True)
    assert kept["total"] == STANDING.always + 90 + 530 and kept["gradients"] == 90
    freed, details = memory(STANDING, meter, holds_gradients=False)
    assert freed["total"] == STANDING.always + 530 and freed["gradients"] == 30
    assert details == {"decoder": 500}


def test_what_the_backward_pass_holds_beyond_gradients_is_an_activation() -> None:
    parts, details = memory(STANDING, metered(decoder=5, backward=300), holds_gradients=False)
    assert parts["gradients"] == 90 and details == {"decoder": 5, BACKWARD: 210}


def test_the_optimizer_s_step_counts_where_it_takes_more_than_the_passes() -> None:
    parts, details = memory(STANDING, metered(decoder=10), holds_gradients=True)
    assert parts["total"] == STANDING.always + 180
    assert details == {"optimizer step": 90} and parts["activations"] == 90


def test_standing_bytes_follow_parameters() -> None:
    step = generator_step()
    values = sum(p.numel() for network in step.networks() for p in network.parameters())
    standing = Standing.of(step, SCHEDULE, ASSUMED)
    assert standing.gradients == 4 * values and standing.optimizer == 8 * values
    assert standing.averages == standing.weights > standing.gradients  # buffers
    assert Standing.of(step, SCHEDULE, replace(ASSUMED, averages=False)).averages == 0
    pieces = Standing.of(step, replace(SCHEDULE, devices=4, sharded=True), ASSUMED)
    assert pieces.gradients == values and pieces.frozen == standing.frozen
    assert pieces.weights == standing.weights // 4


def peak_in_pieces(batch: int) -> int:
    """One moment of the step leads for small batches, another one for large ones."""
    return max(1000 + 10 * batch, 100 * batch)


@pytest.mark.parametrize("limit", [1020, 1170, 1700, 5000, 123_456])
def test_the_largest_batch_fits_and_one_a_little_larger_does_not(limit: int) -> None:
    largest = largest_batch(peak_in_pieces, lambda peak: limit - peak, 8)
    assert peak_in_pieces(largest) <= limit < peak_in_pieces(largest + 2)


def test_few_batches_are_tried() -> None:
    tried: list[int] = []
    peak = lambda batch: tried.append(batch) or 100 * batch  # noqa: E731
    assert largest_batch(peak, lambda peak: 5050 - peak, 8) == 50 and tried == [8, 16, 50]


def test_no_batch_fits_where_there_is_no_room_for_one() -> None:
    assert largest_batch(peak_in_pieces, lambda peak: 900 - peak, 8) == 0


@pytest.mark.slow
def test_the_plan_s_largest_batch_is_the_one_that_fits() -> None:
    largest = planned()["ways"]["kept"]["largest_batch"]
    fits = {}
    for batch in (largest, largest + 2):
        way = planned(schedule=replace(SCHEDULE, batch=batch))["ways"]["kept"]
        fits[batch] = way["fits"]
    assert largest > 8 and list(fits.values()) == [True, False]


def test_nothing_fits_on_a_device_too_small_for_the_weights() -> None:
    way = planned(device=replace(DEVICE, memory_gib=0.0001))["ways"]["kept"]
    assert way["largest_batch"] == 0 and not way["fits"]


@pytest.mark.slow
def test_recomputing_trades_work_for_memory() -> None:
    ways = planned(generator_step)["ways"]
    assert ways["recomputed"]["memory"]["total"] < ways["kept"]["memory"]["total"]
    assert ways["recomputed"]["hours"] > ways["kept"]["hours"]
    assert ways["recomputed"]["largest_batch"] > ways["kept"]["largest_batch"]


def test_seconds_divide_each_sort_of_work_by_its_own_rate() -> None:
    rates = {"half": 50e12, "convolution": 25e12, "single": 5e12}
    assert seconds_per_sample(rates, DEVICE, 0.5) == pytest.approx(3.0)


def test_work_is_that_of_one_sample() -> None:
    meter = Meter()
    meter.flops["decoder", "half"] = Flops(forward=80, backward=160)
    meter.flops["decoder", "single"] = Flops(forward=8, recompute=4)
    assert rates_per_sample(meter, 4) == {"half": 60, "single": 3}
    parts = flops_per_sample(meter, 4)
    assert parts == {"decoder": {"forward": 22, "backward": 40, "recompute": 1}}


def test_hours_are_those_of_all_samples_of_one_device() -> None:
    schedule = Schedule(steps=1000, batch=4, accumulate=3, devices=8)
    assert hours(0.6, 0.0, schedule) == pytest.approx(1000 * 12 * 0.6 / 3600)
    assert schedule.global_batch == 96


@pytest.mark.parametrize(("late", "share"), [(250, 0.25), (5000, 1.0)])
def test_steps_before_the_discriminator_joins_take_their_own_time(late, share) -> None:
    schedule = Schedule(steps=1000, batch=1, accumulate=1, devices=1, late=late)
    assert hours(3.6, 1.8, schedule) == pytest.approx(1.0 - share / 2)


@pytest.mark.slow
def test_a_late_discriminator_saves_hours() -> None:
    late, early = replace(SCHEDULE, late=50), tokenizer_step(with_gan=False)
    whole = planned(tokenizer_step)["ways"]["kept"]["hours"]
    saved = planned.__wrapped__(tokenizer_step, schedule=late, early_step=early)
    assert 0.5 * whole < saved["ways"]["kept"]["hours"] < whole


@pytest.mark.slow
def test_more_devices_share_gradients_and_multiply_images() -> None:
    one, four = (planned(schedule=replace(SCHEDULE, devices=n)) for n in (1, 4))
    assert one["gradient_bytes"] == one["ring_bytes"] == 0
    assert four["ring_bytes"] == pytest.approx(1.5 * four["gradient_bytes"])
    a, b = one["ways"]["kept"], four["ways"]["kept"]
    assert b["images_per_second"] == 4 * a["images_per_second"] and a["hours"] == b["hours"]
    assert b["device_hours"] == 4 * b["hours"]


def test_trained_and_frozen_parameters_are_told_apart() -> None:
    counts = parameter_counts(generator_step())
    assert counts["transformer"]["frozen"] == 0 < counts["transformer"]["trained"]
    assert counts["tokenizer"]["trained"] == 0 < counts["tokenizer"]["frozen"]


def test_a_part_of_constants_counts_its_buffers() -> None:
    step = tokenizer_step()
    step.criterion.perceptual = UnloadedLPIPS("alex")
    assert parameter_counts(step)["perceptual"]["frozen"] > 2_400_000


@pytest.mark.parametrize("wrong", [{"mfu": 0.0}, {"mfu": 1.5}, {"reserve": 1.0}, {"reserve": -0.1}])
def test_shares_that_are_none_are_named(wrong) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(ASSUMED, **wrong)


def test_the_limit_leaves_the_reserve() -> None:
    limit = planned()["ways"]["kept"]["memory_limit"]
    assert limit == pytest.approx(0.9 * DEVICE.memory_gib * GIB, abs=1)
