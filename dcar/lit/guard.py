"""Steps with a NaN or an infinity: never taken, on no rank, and what comes then is a choice."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dcar.models.distributed import is_distributed

POLICIES = ("raise", "skip", "rollback")
SMALLEST_SCALE = 1.0  # below it gradients do not overflow because they were scaled


class KeptBuffers:
    """Buffers that a forward pass moves (running statistics), to be put back after a bad one."""

    @torch.no_grad()
    def __init__(self, modules: Iterable[nn.Module]):
        self.kept = [
            (module, {name: buffer.clone() for name, buffer in module.named_buffers()})
            for module in modules
        ]

    @torch.no_grad()
    def restore(self) -> None:
        for module, kept in self.kept:
            for name, buffer in module.named_buffers():
                buffer.copy_(kept[name])


@dataclass(frozen=True)
class StepCheck:
    """Whether a step may be taken: all ranks have the same, but for what is their own."""

    finite_losses: bool
    finite_gradients: bool
    own_losses: bool = True  # are those of this rank finite?
    own_gradients: bool = True
    scale: float | None = None  # that fp16 losses were multiplied by

    @property
    def passes(self) -> bool:
        return self.finite_losses and self.finite_gradients

    @property
    def is_mine(self) -> bool:
        """Whether this rank has what is at fault: a loss, or a gradient where losses are finite."""
        return not (self.own_gradients if self.finite_losses else self.own_losses)


def check_over_ranks(losses: Tensor, norms: Tensor, scale: Tensor | None = None) -> StepCheck:
    """Judge a step by its losses and the norms of its gradients, both (n,), of every rank.

    scale: the loss scale of fp16, a scalar on the device.
    """
    own = torch.stack([losses.isfinite().all(), norms.isfinite().all()]).float()
    flags = own.clone()
    if is_distributed():
        dist.all_reduce(flags, op=dist.ReduceOp.MIN)
    # the one wait for the device in a step
    facts = torch.cat([flags, own, *([] if scale is None else [scale.view(1)])]).tolist()
    all_losses, all_gradients, losses_here, gradients_here = map(bool, facts[:4])
    last = None if scale is None else facts[4]
    return StepCheck(all_losses, all_gradients, losses_here, gradients_here, last)


def gather_over_ranks(value: Any) -> list[Any]:
    """`value` of each rank, on every rank."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


class NonFiniteGuard:
    """What is done about a step whose loss or gradient is NaN or infinite.

    policy: "raise" ends the training with NonFiniteError, "skip" goes on with the next batches,
        "rollback" also takes weights, optimizers and averages from the last checkpoint.
    limit: bad steps in a row that end the training under every policy.
    folder: where flight records are written, None for none. records: at most so many a run.

    In fp16 a gradient may overflow because of the loss scale alone. Such a step is skipped and the
    scale halved, whatever the policy, as long as the losses are finite and the scale is above 1.
    """

    def __init__(
        self,
        *,
        policy: str = "raise",
        limit: int = 10,
        folder: str | Path | None = None,
        records: int = 3,
    ):
        if policy not in POLICIES:
            raise ValueError(f"policy={policy!r} is not one of {', '.join(POLICIES)}")
        if limit < 1:
            raise ValueError(f"limit={limit} must be at least 1")
        if records < 0:
            raise ValueError(f"records={records} must be at least 0")
        self.policy, self.limit = policy, limit
        self.folder = None if folder is None else Path(folder)
        self.records = records
        self.skipped = self.overflowed = self.in_a_row = 0
        self.scales: deque[dict[str, Any]] = deque(maxlen=200)  # loss scale of the last steps

    def judge(self, check: StepCheck, *, step: int) -> str:
        """What becomes of a step: "take", "overflow" (skip, the scale is at fault) or a policy."""
        verdict = self._verdict(check)
        if check.scale is not None:
            self.scales.append({"step": step, "scale": check.scale, "verdict": verdict})
        if verdict == "take":
            self.in_a_row = 0
            return verdict
        self.skipped += 1
        self.overflowed += verdict == "overflow"
        self.in_a_row += verdict != "overflow"
        return "raise" if self.in_a_row >= self.limit else verdict

    def _verdict(self, check: StepCheck) -> str:
        if check.passes:
            return "take"
        has_room = check.scale is not None and check.scale > SMALLEST_SCALE
        if check.finite_losses and has_room:
            return "overflow"
        return self.policy

    def describe(self, check: StepCheck, *, step: int) -> str:
        """The sentence of an error or a warning."""
        what = "a gradient" if check.finite_losses else "the loss"
        row = f", {self.in_a_row} steps in a row" if self.in_a_row > 1 else ""
        return f"{what} is not finite at step {step}{row}"

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped, "overflowed": self.overflowed, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skipped, self.overflowed = state["skipped"], state["overflowed"]
        self.in_a_row = state["in_a_row"]
