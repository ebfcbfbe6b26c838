import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dcar.models.masking import (
    SCHEDULES,
    halton_rank,
    mask_ratio,
    masked_after,
    next_masked,
    training_mask,
)
from tests.toys import fixed_per_step


def test_twelve_steps_fix_the_published_numbers_of_tokens() -> None:
    assert fixed_per_step(256, 12) == [14, 14, 14, 14, 15, 15, 16, 17, 20, 22, 28, 67]
    assert fixed_per_step(64, 12) == [4, 3, 4, 3, 4, 4, 4, 4, 5, 6, 7, 16]


@given(
    tokens=st.integers(1, 300),
    steps=st.integers(1, 400),
    schedule=st.sampled_from(sorted(SCHEDULES)),
)
def test_every_step_fixes_at_least_one_token_and_the_last_none_is_left(
    tokens: int, steps: int, schedule: str
) -> None:
    fixed = fixed_per_step(tokens, steps, schedule)
    assert len(fixed) == min(tokens, steps)
    assert min(fixed) >= 1
    assert sum(fixed) == tokens


def test_the_arccos_ratio_has_its_mean_and_quantiles() -> None:
    ratio = mask_ratio((torch.arange(100_000) + 0.5) / 100_000)
    assert ratio.mean().item() == pytest.approx(2 / math.pi, abs=1e-4)
    quantiles = ratio.quantile(torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95]))
    expected = torch.tensor([0.20, 0.46, 0.67, 0.84, 0.97])
    assert torch.allclose(quantiles, expected, atol=0.006)


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_schedules_fall_from_all_masked_to_none(schedule: str) -> None:
    ratio = mask_ratio(torch.linspace(0, 1, 101, dtype=torch.float64), schedule)
    assert ratio[0] == pytest.approx(1)
    assert ratio[-1] == pytest.approx(1e-6)
    assert bool((ratio.diff() < 0).all())


def test_an_unknown_schedule_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="arcos"):
        mask_ratio(torch.rand(2), "arcos")


def test_a_training_mask_covers_the_rounded_ratio_and_at_least_one_token() -> None:
    ratio = torch.tensor([1e-6, 0.26, 0.5, 1.0])
    draws = torch.rand(4, 10)
    mask = training_mask(ratio, draws)
    assert mask.sum(1).tolist() == [1, 3, 5, 10]
    chosen = draws.masked_fill(~mask, -1).max(1).values
    spared = draws.masked_fill(mask, 2).min(1).values
    assert bool((chosen < spared).all())


def test_training_masks_put_every_position_equally_often() -> None:
    mask = training_mask(torch.full((4000,), 0.25), torch.rand(4000, 8))
    assert torch.allclose(mask.float().mean(0), torch.full((8,), 0.25), atol=0.03)


def test_the_count_of_masked_tokens_is_clamped_to_fix_one_and_leave_one() -> None:
    planned, masked = torch.tensor([0, 5, 9, 9]), torch.tensor([4, 4, 20, 1])
    assert next_masked(planned, masked).tolist() == [1, 3, 9, 1]


def test_two_thirds_of_the_tokens_remain_at_half_the_steps() -> None:
    assert masked_after(torch.tensor(0.5), 6).item() == 4


@pytest.mark.parametrize(("height", "width"), [(1, 1), (8, 8), (5, 12), (16, 16)])
def test_the_halton_order_visits_every_cell_once(height: int, width: int) -> None:
    assert sorted(halton_rank(height, width).tolist()) == list(range(height * width))


def test_the_halton_order_spreads_its_first_tokens_over_the_image() -> None:
    early = (halton_rank(8, 8) < 16).view(2, 4, 2, 4).sum((1, 3))
    assert early.min() >= 3
