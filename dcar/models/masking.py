"""Which tokens are masked: in training, and after each step of sampling. B batch, N = H*W tokens.

Pure functions of tensors; the random numbers are arguments (docs/method.md).
"""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

# Fraction still masked when a fraction `progress` in [0, 1] of the work is done. All are concave
# and fall from 1 to 0, so that N >= steps always leaves at least one token for every step.
SCHEDULES: dict[str, Callable[[Tensor], Tensor]] = {
    "arccos": lambda progress: torch.arccos(progress) / (math.pi / 2),
    "cosine": lambda progress: torch.cos(progress * (math.pi / 2)),
    "linear": lambda progress: 1 - progress,
    "square": lambda progress: 1 - progress**2,
}


def mask_ratio(progress: Tensor, schedule: str = "arccos") -> Tensor:
    """Fraction of masked tokens, float of the same shape in [1e-6, 1], for progress in [0, 1].

    With a uniform draw as progress this is the training distribution; its mean is 2/pi for
    `arccos` and for `cosine`. Raises ValueError for a schedule that does not exist.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule {schedule!r} is not one of {', '.join(SCHEDULES)}")
    return SCHEDULES[schedule](progress).clamp(1e-6, 1.0)


def training_mask(ratio: Tensor, position_draws: Tensor) -> Tensor:
    """Mask (B, N), True = to predict: round(N * ratio) random positions, at least one per image.

    ratio (B,) from `mask_ratio`; position_draws (B, N) uniform: the lowest draws are masked.
    """
    tokens = position_draws.shape[1]
    count = (tokens * ratio).round().clamp(min=1)  # (B,)
    rank = position_draws.argsort(dim=1).argsort(dim=1)  # (B, N)
    return rank < count[:, None]


def masked_after(progress: Tensor, tokens: int, schedule: str = "arccos") -> Tensor:
    """How many of `tokens` the schedule leaves masked at `progress` (float64), before any clamp."""
    ratio = mask_ratio(progress.double(), schedule)
    return (tokens * ratio + 1e-9).floor().long()  # 0.999999... tokens left are one


def next_masked(planned: Tensor, masked: Tensor) -> Tensor:
    """The planned count of masked tokens, clamped to [1, masked - 1]: every step fixes one."""
    return torch.minimum(planned, masked - 1).clamp(min=1)


def _radical_inverse(index: Tensor, base: int) -> Tensor:
    """The digits of each index in `base`, mirrored at the point: float64 in [0, 1)."""
    value, weight = torch.zeros_like(index, dtype=torch.float64), 1.0 / base
    while bool((index > 0).any()):
        value += weight * (index % base)
        index, weight = index // base, weight / base
    return value


@lru_cache(maxsize=32)
def halton_rank(height: int, width: int) -> Tensor:
    """When each cell of a grid is first hit by the 2-D Halton sequence: ranks (H*W,), int64.

    Spreads the tokens of one step over the image (Halton scheduler, arXiv 2503.17076).
    """
    points = 4 * height * width
    while True:
        index = torch.arange(1, points + 1, device="cpu")
        row = (_radical_inverse(index, 2) * height).long()
        column = (_radical_inverse(index, 3) * width).long()
        cell = row * width + column
        first = torch.full((height * width,), points, device="cpu")
        first = first.scatter_reduce(0, cell, index - 1, reduce="amin")
        if bool((first < points).all()):
            return first.argsort().argsort()
        points *= 2
