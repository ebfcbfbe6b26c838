"""Draws are functions of seed, call, image and element, however the images are split."""

import pytest
import torch

from dcar.models.draws import Draws


def all_kinds(draws: Draws, batch: int) -> list[torch.Tensor]:
    return [draws.rand(batch, 3), draws.randn(batch, 2, 5), draws.randint(100, batch, 4)]


@pytest.mark.parametrize(("world", "parts"), [(2, 1), (4, 1), (1, 2), (2, 2), (2, 4)])
def test_ranks_and_parts_together_hold_what_one_process_draws(world: int, parts: int) -> None:
    whole, each = all_kinds(Draws(7), 16), 16 // (world * parts)
    for part in range(parts):
        for rank in range(world):
            draws = Draws(7, rank=rank, world=world, part=part, parts=parts)
            for mine, drawn in zip(all_kinds(draws, each), whole, strict=True):
                ours = drawn[part * each * world : (part + 1) * each * world]
                assert torch.equal(mine, ours[rank::world])


def test_every_part_is_drawn_from_its_first_call_on() -> None:
    draws = Draws(5, rank=1, world=2, part=1, parts=3)
    draws.rand(4)
    parts = [part.rand(4, 2) for part in draws.of_every_part()]
    for number, drawn in enumerate(parts):
        place = {"rank": 1, "world": 2, "part": number, "parts": 3}
        assert torch.equal(drawn, Draws(5, **place).rand(4, 2))


def test_the_seed_alone_decides_and_not_the_global_generator() -> None:
    first = all_kinds(Draws(3), 2)
    torch.rand(10)
    again, other = all_kinds(Draws(3), 2), all_kinds(Draws(4), 2)
    for one, two, three in zip(first, again, other, strict=True):
        assert torch.equal(one, two)
        assert not torch.equal(one, three)


def test_known_numbers_stay_the_same_in_every_release() -> None:
    """A resumed training goes on with them: reference values of SplitMix64 in 64-bit arithmetic."""
    draws = Draws(2024, rank=1, world=3)
    assert draws.randint(1000, 2, 2).tolist() == reference(2024, call=0, images=(1, 4), high=1000)
    assert draws.randint(1000, 2, 2).tolist() == reference(2024, call=1, images=(1, 4), high=1000)


def reference(seed: int, *, call: int, images: tuple[int, ...], high: int) -> list[list[int]]:
    """The same integers in plain Python."""
    mask = 2**64 - 1

    def scramble(value: int) -> int:
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
        return value ^ (value >> 31)

    golden = 0x9E3779B97F4A7C15
    key = scramble((scramble(seed * golden & mask) + call) & mask)
    return [
        [(scramble((((i << 32) + e) * golden + key) & mask) >> 33) * high >> 31 for e in (0, 1)]
        for i in images
    ]


def test_draws_lie_in_the_ranges_they_promise() -> None:
    uniform, normal, integers = all_kinds(Draws(0), 4096)
    assert uniform.min() >= 0 and uniform.max() < 1 and abs(uniform.mean() - 0.5) < 0.01
    assert abs(normal.mean()) < 0.02 and abs(normal.std() - 1) < 0.02
    assert integers.min() == 0 and integers.max() == 99


def test_normal_numbers_follow_the_normal_distribution() -> None:
    drawn = Draws(1).randn(256, 1024).flatten().double().sort().values
    exact = torch.special.ndtr(drawn)
    steps = torch.arange(1, len(drawn) + 1, dtype=torch.float64) / len(drawn)
    assert (exact - steps).abs().max() < 1.63 / len(drawn) ** 0.5  # Kolmogorov-Smirnov at 1 %


def test_neighbours_are_independent() -> None:
    """Images, elements, calls and seeds next to each other have nothing in common."""
    draws = Draws(9)
    first, second, other = draws.randn(512, 512), draws.randn(512, 512), Draws(10).randn(512, 512)
    pairs = [(first[1:], first[:-1]), (first[:, 1:], first[:, :-1]), (first, second)]
    for left, right in [*pairs, (first, other), (first.square(), second.square())]:
        correlation = torch.corrcoef(torch.stack([left.flatten(), right.flatten()]))[0, 1]
        assert abs(correlation) < 4 / left.numel() ** 0.5


def test_one_number_belongs_to_the_whole_step() -> None:
    drawn = {
        float(Draws(3, rank=rank, world=2, part=part, parts=2).rand_of_step())
        for rank in (0, 1)
        for part in (0, 1)
    }
    assert len(drawn) == 1 and 0 <= drawn.pop() < 1
    draws = Draws(3)
    assert draws.rand_of_step() != draws.rand_of_step()


@pytest.mark.parametrize(("rank", "world"), [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_outside_the_world_is_refused(rank: int, world: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank}"):
        Draws(0, rank=rank, world=world)


@pytest.mark.parametrize(("part", "parts"), [(2, 2), (-1, 2), (0, 0)])
def test_a_part_outside_the_parts_is_refused(part: int, parts: int) -> None:
    with pytest.raises(ValueError, match=f"part {part}"):
        Draws(0, part=part, parts=parts)
