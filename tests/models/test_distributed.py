from pathlib import Path

import torch
import torch.distributed as dist

from dcar.models.distributed import first_rank_value, mean_over_ranks
from tests.ranks import join, run_on_two_ranks


def mean_on_rank(rank: int, folder: Path) -> None:
    join(rank, folder)
    value = torch.tensor([1.0, 10.0]) * (rank + 1)
    torch.save((mean_over_ranks(value), value), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_ranks_agree_on_the_mean_and_keep_their_own_value(tmp_path: Path) -> None:
    run_on_two_ranks(mean_on_rank, tmp_path)
    for rank in range(2):
        mean, value = torch.load(tmp_path / f"{rank}.pt")
        assert mean.tolist() == [1.5, 15.0]
        assert value.tolist() == [1.0 + rank, 10.0 + 10 * rank]


def test_one_process_keeps_the_value_without_its_gradient() -> None:
    value = torch.ones(2, requires_grad=True)
    mean = mean_over_ranks(value)
    assert torch.equal(mean, value)
    assert not mean.requires_grad


def first_on_rank(rank: int, folder: Path) -> None:
    join(rank, folder)
    torch.save(first_rank_value(torch.tensor([1.0, 10.0]) * (rank + 1)), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_ranks_take_what_the_first_one_has(tmp_path: Path) -> None:
    run_on_two_ranks(first_on_rank, tmp_path)
    assert [torch.load(tmp_path / f"{rank}.pt").tolist() for rank in range(2)] == [[1.0, 10.0]] * 2


def test_one_process_is_the_first() -> None:
    assert first_rank_value(torch.tensor([3.0])).tolist() == [3.0]
