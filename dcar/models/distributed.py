"""What is made equal over ranks: normalisers of losses, and codes that each rank has computed."""

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Whether this process is one of a group."""
    return dist.is_available() and dist.is_initialized()


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of `value` over all ranks, detached; `value` itself, detached, in one process.

    Dividing a local sum by the mean over ranks of a normaliser makes the average of the ranks'
    gradients equal to the gradient of the global sum over the global normaliser.
    """
    value = value.detach()
    if not is_distributed() or dist.get_world_size() == 1:
        return value
    total = value.to(torch.float32, copy=True)
    dist.all_reduce(total)
    return total / dist.get_world_size()


def first_rank_value(value: Tensor) -> Tensor:
    """`value` of the first rank, in place on the others; `value` itself in one process."""
    if is_distributed():
        dist.broadcast(value, src=0)
    return value
