import math
from typing import Any

import pytest
import torch

from dcar.models.sampler import sample
from dcar.models.transformer import TransformerOutput
from dcar.models.unmasking import (
    SamplerSettings,
    guidance_at,
    gumbel,
    make_plan,
    sample_ids,
    select_masked,
    unmask_step,
)
from tests.toys import toy_model


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("steps", -1),
        ("steps", 10**6),
        ("steps", 2.5),
        ("steps", True),
        ("residual_steps", 0),
        ("guidance", math.nan),
        ("guidance", -1.0),
        ("guidance", math.inf),
        ("guidance_power", math.nan),
        ("randomize_temperature", -0.5),
        ("residual_guidance", math.nan),
        ("residual_temperature", -1.0),
        ("residual_clip", -1.0),
        ("schedule", "sine"),
        ("guidance_decay", "cosine"),
        ("guidance", "high"),
        ("guidance", True),
        ("confidence", "logit"),
        ("selection", "best"),
        ("count_from", "rows"),
        ("residual_condition", "none"),
        ("null_mask", "all"),
    ],
)
def test_impossible_settings_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} "):
        SamplerSettings(**{name: value})


def test_power_cosine_guidance_starts_at_one_in_its_own_convention() -> None:
    with pytest.raises(ValueError, match="guidance 0.5"):
        SamplerSettings(guidance=0.5, guidance_decay="power-cosine")
    assert SamplerSettings(guidance=0.0, guidance_decay="power-cosine").guidance == 0


def test_the_residual_takes_the_guidance_of_the_tokens_unless_given_its_own() -> None:
    assert SamplerSettings(guidance=2.0).guidance_of_residual == 2.0
    assert SamplerSettings(guidance=2.0, residual_guidance=0.0).guidance_of_residual == 0.0


def test_guidance_decays_as_named() -> None:
    progress = torch.arange(4, dtype=torch.float64) / 4

    def weights(decay: str, **more: float) -> list[float]:
        settings = SamplerSettings(guidance=4.0, guidance_decay=decay, **more)
        return guidance_at(progress, settings).tolist()

    assert weights("constant") == [4, 4, 4, 4]
    assert weights("linear") == [0, 1, 2, 3]
    rise = [3 * (1 - math.cos(math.pi * (step / 4) ** 2)) / 2 for step in range(4)]
    assert weights("power-cosine", guidance_power=2.0) == pytest.approx(rise)


def test_ids_follow_the_law_of_gumbel_noise_on_the_logits() -> None:
    logits = torch.tensor([2.0, 0.0, 1.0, -3.0, 1.5])
    draws = 40_000
    temperature = torch.full((draws, 1), 0.7)
    ids = sample_ids(logits.expand(draws, 1, 5), temperature, torch.rand(draws, 1))
    noisy = logits + 0.7 * gumbel(torch.rand(draws, 5))
    expected = (logits / 0.7).softmax(0)
    for drawn in (ids.flatten(), noisy.argmax(1)):
        frequency = drawn.bincount(minlength=5) / draws
        assert torch.allclose(frequency, expected, atol=0.01)


def test_temperature_zero_is_greedy_image_by_image() -> None:
    logits = torch.randn(2, 50, 9)
    ids = sample_ids(logits, torch.tensor([[0.0], [5.0]]), torch.rand(2, 50))
    assert torch.equal(ids[0], logits[0].argmax(1))
    tied = sample_ids(torch.zeros(1, 50, 9), torch.zeros(1, 1), torch.rand(1, 50))
    assert not tied.any()
    assert not torch.equal(ids[1], logits[1].argmax(1))


def test_the_extreme_uniform_draws_give_ids_that_exist() -> None:
    logits = torch.tensor([-math.inf, 0.0, 1.0]).expand(2, 1, 3)
    almost_one = 1 - 2**-24
    ids = sample_ids(logits, torch.ones(2, 1), torch.tensor([[0.0], [almost_one]]))
    assert ids.flatten().tolist() == [1, 2]


def test_gumbel_noise_has_its_mean_and_is_finite_at_zero() -> None:
    assert gumbel(torch.rand(100_000)).mean().item() == pytest.approx(0.5772, abs=0.02)
    assert gumbel(torch.tensor([0.0, 1 - 2**-24])).isfinite().all()


def test_the_least_confident_stay_masked_and_known_tokens_stay_known() -> None:
    confidence = torch.tensor([[5.0, 1.0, 3.0, -9.0, 2.0]])
    masked = torch.tensor([[True, True, True, False, True]])
    for ties in (True, False):
        left = select_masked(confidence, masked, torch.tensor([2]), ties=ties)
        assert left.tolist() == [[False, True, False, False, True]]


def test_ties_at_the_cut_off_are_masked_together_or_broken() -> None:
    confidence, masked = torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool)
    counts = [
        select_masked(confidence, masked, torch.tensor([2]), ties=ties).sum().item()
        for ties in (True, False)
    ]
    assert counts == [4, 2]


@pytest.mark.parametrize("ties", [True, False])
def test_a_count_of_zero_leaves_nothing_masked(ties: bool) -> None:
    masked = torch.ones(1, 4, dtype=torch.bool)
    assert not select_masked(torch.randn(1, 4), masked, torch.tensor([0]), ties=ties).any()


def test_the_plan_cools_down_to_greedy_in_the_steps_of_each_image() -> None:
    masked = torch.tensor([[True] * 4, [True, False, False, False]])
    plan = make_plan(masked, SamplerSettings(steps=4))
    assert plan.steps == [4, 1]
    assert plan.temperature[:, 0].tolist() == pytest.approx([1.5 * x for x in (0.75, 0.5, 0.25, 0)])
    assert plan.temperature[:, 1].tolist() == [0, 0, 0, 0]
    assert plan.softness[:, 0].tolist() == pytest.approx([1.1, 0.9, 0.7, 0.5])
    assert plan.is_last == [[False, True], [False, False], [False, False], [True, False]]


def test_without_annealing_logits_keep_their_softness() -> None:
    settings = SamplerSettings(softmax_annealing=False)
    plan = make_plan(torch.ones(1, 16, dtype=torch.bool), settings)
    assert bool((plan.softness == 1).all())


def first_fixed(logits: torch.Tensor, uniform: torch.Tensor, **settings: Any) -> list[bool]:
    """Which of the N tokens of one image the first of two steps fixes."""
    options = SamplerSettings(steps=2, guidance=0.0, schedule="linear", **settings)
    masked = torch.ones(1, logits.shape[1], dtype=torch.bool)
    plan, ids = make_plan(masked, options), torch.full((1, logits.shape[1]), logits.shape[2])
    output = TransformerOutput(torch.zeros(1, logits.shape[1], 1), logits)
    _, left = unmask_step(output, ids, masked, plan, 0, uniform, (1, logits.shape[1]), options)
    return (~left[0]).tolist()


def test_the_most_confident_tokens_are_fixed_first() -> None:
    """By the logit of the code that was drawn, or by its probability: these two disagree."""
    logits = torch.tensor([[[1.0, -9, -9], [4, 4, 4], [3, 2, 2], [0, -9, -9]]])
    uniform = torch.full((1, 2, 4), 0.5)
    by_logit = first_fixed(logits, uniform, randomize_temperature=0.0)
    assert by_logit == [False, True, True, False]
    by_probability = first_fixed(logits, uniform, randomize_temperature=0.0, confidence="log_prob")
    assert by_probability == [True, False, False, True]


def test_noise_on_the_confidence_is_gumbel_s_at_the_step_s_temperature() -> None:
    logits = torch.randn(1, 64, 1)  # one code: nothing but the order is drawn
    uniform = torch.rand(1, 2, 64)
    fixed = first_fixed(logits, uniform, randomize_temperature=1.4)
    softness, temperature = 0.5 + 0.8 * 0.5, 1.4 * 0.5  # half of the steps are left
    order = logits[0, :, 0] / softness + temperature * gumbel(uniform[0, 1])
    assert fixed == (order > order.sort().values[31]).tolist()


@pytest.mark.parametrize(("refinement", "passes"), [(True, 4), (False, 3)])
def test_no_pass_is_spent_on_a_residual_that_is_not_drawn(refinement: bool, passes: int) -> None:
    model, taken = toy_model(), []
    model.generator.transformer.blocks[0].register_forward_hook(lambda *_: taken.append(1))
    settings = SamplerSettings(
        steps=3, residual_condition="extra_forward", residual_refinement=refinement
    )
    text, mask = model.text_encoder(["a cat"])
    sample(model.generator, text, mask, grid=(4, 4), seeds=[0], settings=settings)
    assert len(taken) == passes
