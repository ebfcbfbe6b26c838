"""Muon for the matrices between a network's ends, AdamW for all else, as one optimizer.

Sources: Muon (Jordan et al., 2024), its step scaled to AdamW's (arXiv 2502.16982).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.optim import AdamW, Muon, Optimizer


def _split(group: Mapping[str, Any], aside: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The group's matrices, without those whose names hold a word of `aside`, and its others."""
    parts: tuple[list[Any], list[Any]] = ([], [])
    for name, parameter in group["params"]:
        is_inner = parameter.ndim == 2 and not any(word in name for word in aside)
        parts[not is_inner].append((name, parameter))
    inner, others = ({**group, "params": part} for part in parts)
    return inner, others


class MuonAdamW(Optimizer):
    """`torch.optim.Muon` and `torch.optim.AdamW` with one learning rate, weight decay and schedule.

    groups: parameter groups whose `params` are pairs of name and parameter. aside: parts of names
    of matrices that AdamW takes too: embeddings and output projections. Steps of both have about
    the same root mean square, so AdamW's learning rate serves both. Raises ValueError where no
    matrix is left for Muon.
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
        inner, others = ([g for g in part if g["params"]] for part in (inner, others))
        if not inner:
            raise ValueError(f"aside {list(aside)} leaves no matrix for Muon: take AdamW")
        self.parts: tuple[Optimizer, ...] = (
            Muon(
                inner,
                lr=lr,
                weight_decay=weight_decay,
                momentum=momentum,
                adjust_lr_fn="match_rms_adamw",
            ),
        )
        if others:
            adamw = AdamW(others, lr=lr, betas=betas, weight_decay=weight_decay, fused=fused)
            self.parts += (adamw,)
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """The parts step what others save and schedule: these groups, this state."""
        count = len(self.parts[0].param_groups)
        self.parts[0].param_groups = self.param_groups[:count]
        for part in self.parts[1:]:
            part.param_groups = self.param_groups[count:]
        for part in self.parts:
            part.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss
