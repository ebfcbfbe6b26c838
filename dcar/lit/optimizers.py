"""Muon for the matrices between a network's ends, AdamW for all else, as one optimizer.

Sources: Muon (Jordan et al., 2024), its step scaled to AdamW's (arXiv 2502.16982).
n matrices of A rows and B columns.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from math import sqrt
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from dcar.lit.sharding import piece_like, whole
from dcar.models.precision import quick_dtype, without_autocast

ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic: steep at 0, so few iterations do
LIKE_ADAMW = 0.2  # root mean square of AdamW's steps, in learning rates
AT_ONCE = 2**24  # values that are orthogonalised together


def orthogonalized(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Matrices (n, A, B) with singular values drawn to about 1 (0.7 to 1.2), computed in `dtype`.

    By Newton-Schulz iterations. Singular values below some thousandths of the largest stay smaller.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrices.shape[1] > matrices.shape[2]
    found = matrices.mT if is_tall else matrices
    found = (found / found.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).to(dtype)
    for _ in range(ITERATIONS):
        gram = found @ found.mT
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        found = torch.baddbmm(found, factor, found, beta=a)
    return found.mT if is_tall else found


def _of_one_shape(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters with gradients in parts of one shape: AT_ONCE values at most, or one matrix."""
    shapes: dict[torch.Size, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            shapes.setdefault(parameter.shape, []).append(parameter)
    for shape, alike in shapes.items():
        count = max(1, AT_ONCE // shape.numel())
        yield from (alike[start : start + count] for start in range(0, len(alike), count))


def muon_step(group: Mapping[str, Any], state: MutableMapping[Tensor, dict[str, Any]]) -> None:
    """Move the matrices of a group by their (Nesterov's) momentum, orthogonalised.

    group: `params`, `lr`, `momentum` and `weight_decay`, which is decoupled. Where the hardware has
    no quick bf16 it computes in fp32. Sharded matrices are put together for it on every rank.
    """
    for parameters in _of_one_shape(group["params"]):
        directions = []
        for parameter in parameters:
            own, gradient = state[parameter], cast(Tensor, parameter.grad)
            if "momentum_buffer" not in own:
                own["momentum_buffer"] = torch.zeros_like(parameter)
            mean = own["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
            directions.append(whole(gradient.lerp(mean, group["momentum"])))
        stacked = torch.stack(directions)  # (n, A, B)
        with without_autocast(stacked):  # training steps run under it
            steps = orthogonalized(stacked, quick_dtype(stacked.device)).to(stacked.dtype)
        rate = group["lr"] * LIKE_ADAMW * sqrt(max(stacked.shape[1:]))
        for parameter, step in zip(parameters, steps, strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.sub_(piece_like(step, parameter), alpha=rate)


def _split(group: Mapping[str, Any], aside: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The group's matrices, without those whose names hold a word of `aside`, and its others."""
    inner: list[Any] = []
    others: list[Any] = []
    for name, parameter in group["params"]:
        is_inner = parameter.ndim == 2 and not any(word in name for word in aside)
        (inner if is_inner else others).append((name, parameter))
    return {**group, "params": inner}, {**group, "params": others}


class MuonAdamW(Optimizer):
    """Muon and `torch.optim.AdamW` with one learning rate, weight decay and schedule.

    groups: parameter groups whose `params` are pairs of name and parameter. aside: parts of names
    of matrices that AdamW takes too: embeddings and output projections. Steps of both have about
    the same root mean square, so AdamW's learning rate serves both. Raises ValueError where no
    matrix is left for Muon, and for groups that are added later.
    """

    def __init__(
        self,
        groups: Iterable[Mapping[str, Any]],
        *,
        lr: float,
        aside: Sequence[str] = (),
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.05,
        fused: bool | None = None,
    ):
        inner, others = zip(*(_split(group, aside) for group in groups), strict=True)
        settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        muon = [{**settings, **group} for group in inner if group["params"]]
        if not muon:
            raise ValueError(f"aside {list(aside)} leaves no matrix for Muon: take AdamW")
        rest = [group for group in others if group["params"]] or [{"params": []}]
        self.adamw = AdamW(rest, lr=lr, betas=betas, weight_decay=weight_decay, fused=fused)
        self.of_muon, self.is_whole = len(muon), False  # groups; whether all are there
        super().__init__([*muon, *(g for g in self.adamw.param_groups if g["params"])], {})
        self.is_whole = True
        self._share()

    def _share(self) -> None:
        """AdamW steps what others save and schedule: these groups, this state."""
        self.adamw.param_groups, self.adamw.state = self.param_groups[self.of_muon :], self.state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self.is_whole:
            raise ValueError("MuonAdamW trains the groups that it was built with, and no others")
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups[: self.of_muon]:
            muon_step(group, self.state)
        self.adamw.step()
        return loss

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("adamw", "of_muon", "is_whole")}
        return super().__getstate__() | own
