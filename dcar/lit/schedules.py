"""Learning-rate schedules as functions of an optimizer, for partials in configs."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def constant(optimizer: Optimizer) -> LambdaLR:
    """The optimizer's own learning rate, for ever."""
    return LambdaLR(optimizer, lambda step: 1.0)


def warmup_cosine(
    optimizer: Optimizer, *, warmup_steps: int, total_steps: int, final_ratio: float = 0.0
) -> LambdaLR:
    """Linear warm-up over `warmup_steps`, then a half cosine to `final_ratio` of the peak.

    Raises ValueError unless 0 <= warmup_steps < total_steps and 0 <= final_ratio <= 1.
    """
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"warmup_steps={warmup_steps} must be in [0, total_steps={total_steps}): "
            "a shorter training needs a shorter warm-up"
        )
    if not 0 <= final_ratio <= 1:
        raise ValueError(f"final_ratio={final_ratio} must be in [0, 1]")

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
        return final_ratio + (1 - final_ratio) * (1 + math.cos(math.pi * progress)) / 2

    return LambdaLR(optimizer, factor)


def warmup_cooldown(
    optimizer: Optimizer,
    *,
    warmup_steps: int,
    cooldown_steps: int,
    total_steps: int,
    final_ratio: float = 0.0,
) -> LambdaLR:
    """Linear warm-up, the peak, then a straight line to `final_ratio` of it over the last steps.

    Up to the cool-down it does not depend on `total_steps`, so that a run may be made longer.
    Raises ValueError unless warm-up and cool-down fit into `total_steps` and
    0 <= final_ratio <= 1.
    """
    if min(warmup_steps, cooldown_steps) < 0 or warmup_steps + cooldown_steps > total_steps:
        raise ValueError(
            f"warmup_steps={warmup_steps} and cooldown_steps={cooldown_steps} must fit into "
            f"total_steps={total_steps}"
        )
    if not 0 <= final_ratio <= 1:
        raise ValueError(f"final_ratio={final_ratio} must be in [0, 1]")

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        left = min(1.0, max(0, total_steps - step) / max(1, cooldown_steps))
        return final_ratio + (1 - final_ratio) * left

    return LambdaLR(optimizer, factor)
