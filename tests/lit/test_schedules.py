"""Learning-rate schedules."""

import pytest
import torch

from dcar.lit.schedules import constant, warmup_cooldown, warmup_cosine


def rates(schedule, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    scheduler = schedule(optimizer)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_constant_never_changes() -> None:
    assert set(rates(constant, 5)) == {2.0}


def test_warmup_rises_linearly_then_falls_to_the_final_ratio() -> None:
    seen = rates(lambda o: warmup_cosine(o, warmup_steps=4, total_steps=10, final_ratio=0.1), 12)
    assert seen[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert seen[4] == pytest.approx(2.0)
    assert seen[7] == pytest.approx(1.1)  # half way down the cosine
    assert seen[10] == seen[11] == pytest.approx(0.2)


@pytest.mark.parametrize("bad", [{"warmup_steps": 10}, {"warmup_steps": -1}, {"final_ratio": 2}])
def test_impossible_settings_are_refused_by_name(bad: dict[str, float]) -> None:
    settings = {"warmup_steps": 1, "total_steps": 10} | bad
    with pytest.raises(ValueError, match=next(iter(bad))):
        rates(lambda o: warmup_cosine(o, **settings), 1)


def test_the_cool_down_is_a_straight_line_at_the_end() -> None:
    def cooled(total: int):
        return lambda o: warmup_cooldown(o, warmup_steps=2, cooldown_steps=4, total_steps=total)

    seen = rates(cooled(10), 12)
    assert seen == pytest.approx([1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.5, 1.0, 0.5, 0.0, 0.0])
    assert rates(cooled(20), 7) == pytest.approx(seen[:7])  # a longer run begins alike


@pytest.mark.parametrize("bad", [{"warmup_steps": 8}, {"cooldown_steps": -1}, {"total_steps": 3}])
def test_a_cool_down_that_does_not_fit_is_refused(bad: dict[str, int]) -> None:
    settings = {"warmup_steps": 1, "cooldown_steps": 3, "total_steps": 10} | bad
    with pytest.raises(ValueError, match="must fit into total_steps"):
        rates(lambda o: warmup_cooldown(o, **settings), 1)
