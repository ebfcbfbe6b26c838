"""A module that is used but never trained, saved or averaged."""

from typing import Any

import torch
from torch import nn


class Frozen:
    """Holds a module outside the registry of the Lightning module that owns it.

    So its weights are in no checkpoint, no optimizer, no DDP bucket and no averaged copy. The owner
    calls `to(device)` when its own device is known. Calls run without gradients; attributes are
    read through, and methods among them do as they do.
    """

    def __init__(self, module: nn.Module):
        self.module: Any = module.eval().requires_grad_(False)

    def to(self, device: torch.device | str) -> "Frozen":
        self.module.to(device)
        return self

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "module":  # not there yet while unpickling
            raise AttributeError(name)
        return getattr(self.module, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Frozen":
        return self
