"""A frozen module is used, never trained, saved or averaged."""

from copy import deepcopy

import torch
from torch import nn

from dcar.lit.frozen import Frozen


def test_its_output_carries_no_gradient() -> None:
    layer = Frozen(nn.Linear(2, 2))
    assert not layer(torch.ones(1, 2, requires_grad=True)).requires_grad


def test_it_is_not_registered_with_its_owner() -> None:
    owner = nn.Module()
    owner.part = Frozen(nn.BatchNorm1d(2))
    assert owner.state_dict() == {} and list(owner.modules()) == [owner]


def test_batch_statistics_do_not_move() -> None:
    norm = Frozen(nn.BatchNorm1d(2))
    norm(torch.randn(8, 2) + 5)
    assert torch.equal(norm.module.running_mean, torch.zeros(2))


def test_a_deep_copy_of_the_owner_shares_it() -> None:
    frozen = Frozen(nn.Linear(2, 2))
    assert deepcopy([frozen])[0] is frozen


def test_attributes_are_read_through() -> None:
    assert Frozen(nn.Linear(3, 2)).in_features == 3
