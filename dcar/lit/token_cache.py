"""Tokens of pictures that come again, kept from one epoch to the next."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dcar.models.precision import without_autocast


class TokenCache:
    """Ids and residuals of images already tokenised, by key, in half precision on the CPU."""

    def __init__(self) -> None:
        self.entries: dict[str, tuple[Tensor, Tensor]] = {}

    def missing(self, keys: Sequence[str]) -> list[int]:
        """Rows of a batch whose keys are not known yet."""
        return [row for row, key in enumerate(keys) if key not in self.entries]

    def get(self, keys: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """The batch's ids and residuals; every key is known."""
        ids, residual = zip(*(self.entries[key] for key in keys), strict=True)
        with without_autocast(residual[0]):  # on a CPU in bf16 it stacks no fp16
            return torch.stack(ids).to(device), torch.stack(residual).to(device).float()

    def put(self, keys: Sequence[str], ids: Tensor, residual: Tensor) -> None:
        half = residual.half().cpu()
        self.entries.update(zip(keys, zip(ids.cpu(), half, strict=True), strict=True))
