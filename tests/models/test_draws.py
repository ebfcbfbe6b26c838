import pytest
import torch

from dcar.models.draws import Draws


def all_kinds(draws: Draws, batch: int) -> list[torch.Tensor]:
    return [draws.rand(batch, 3), draws.randn(batch, 2, 5), draws.randint(100, batch, 4)]


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_hold_the_rows_that_one_process_draws(world: int) -> None:
    whole = all_kinds(Draws(7), 8)
    parts = [all_kinds(Draws(7, rank=rank, world=world), 8 // world) for rank in range(world)]
    for kind, drawn in enumerate(whole):
        for rank in range(world):
            assert torch.equal(parts[rank][kind], drawn[rank::world])


def test_the_seed_alone_decides_and_not_the_global_generator() -> None:
    first = all_kinds(Draws(3), 2)
    torch.rand(10)
    again, other = all_kinds(Draws(3), 2), all_kinds(Draws(4), 2)
    for one, two, three in zip(first, again, other, strict=True):
        assert torch.equal(one, two)
        assert not torch.equal(one, three)


def test_draws_lie_in_the_ranges_they_promise() -> None:
    uniform, normal, integers = all_kinds(Draws(0), 4096)
    assert uniform.min() >= 0 and uniform.max() < 1 and abs(uniform.mean() - 0.5) < 0.01
    assert abs(normal.mean()) < 0.02 and abs(normal.std() - 1) < 0.02
    assert integers.min() == 0 and integers.max() == 99


@pytest.mark.parametrize(("rank", "world"), [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_outside_the_world_is_refused(rank: int, world: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank}"):
        Draws(0, rank=rank, world=world)
