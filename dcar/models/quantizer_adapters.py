"""Quantisers of the vector-quantize-pytorch package behind our interface.

B batch, C latent channels, H W latent grid.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dcar.errors import import_extra
from dcar.models.precision import without_autocast
from dcar.models.quantizer import Quantized, Quantizer, straight_through


def import_package() -> Any:
    needs = "this quantizer comes from the vector-quantize-pytorch package"
    return import_extra("vector_quantize_pytorch", extra="vq", needs=needs)


class AdaptedQuantizer(Quantizer):
    """One of the package's modules. It must have `indices_to_codes` and return (codes, ids, ...).

    `quantize(module, latent)` returns (continuous, codes with gradient, ids, loss), all maps
    channel-first. Their values are then replaced by those of `lookup`, so that the two are equal.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        num_codes: int,
        dim: int,
        quantize: Callable[[Any, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]],
    ):
        super().__init__(num_codes=num_codes, dim=dim)
        self.module, self.quantize = module, quantize

    def forward(self, latent: Tensor) -> Quantized:
        with without_autocast(latent):
            continuous, codes, ids, loss = self.quantize(self.module, latent.float())
            ids = ids.long()  # (B, H, W)
            discrete = straight_through(codes, self.lookup(ids))  # (B, C, H, W)
        return Quantized(continuous=continuous, discrete=discrete, ids=ids, loss=loss)

    def lookup(self, ids: Tensor) -> Tensor:
        """Codes (B, C, H, W) of ids (B, H, W)."""
        with without_autocast(ids):
            return self.module.indices_to_codes(ids)  # type: ignore[operator]


def quantize_simvq(module: Any, latent: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    codes, ids, loss = module(latent)
    return latent, codes, ids, loss


def quantize_fsq(module: Any, latent: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    codes, ids = module(latent)
    return unrounded_fsq(module, latent), codes, ids, latent.new_zeros(())


def unrounded_fsq(module: Any, latent: Tensor) -> Tensor:
    """What FSQ gives before rounding (arXiv 2309.15505, section 3), so that the residual is small.

    The latent itself would not do: nothing in FSQ pulls it towards its code.
    """
    levels, margin = module._levels, 1e-3
    half = (levels - 1) * (1 + margin) / 2
    offset = torch.where(levels % 2 == 0, 0.5, 0.0)
    projected = module.project_in(latent.movedim(1, -1))  # (B, H, W, levels)
    bounded = torch.tanh(projected + torch.atanh(offset / half)) * half - offset
    return module.project_out(bounded / (levels // 2)).movedim(-1, 1)  # (B, C, H, W)


def simvq(*, num_codes: int, dim: int, commitment: float = 0.25) -> AdaptedQuantizer:
    """A frozen random codebook under one learned linear layer (arXiv 2411.02038)."""
    module = import_package().SimVQ(
        dim=dim,
        codebook_size=num_codes,
        channel_first=True,
        rotation_trick=False,
        input_to_quantize_commit_loss_weight=commitment,
    )
    return AdaptedQuantizer(module, num_codes=num_codes, dim=dim, quantize=quantize_simvq)


def fsq(*, levels: Sequence[int], dim: int) -> AdaptedQuantizer:
    """Rounding to a grid of prod(levels) codes, between two learned projections (arXiv 2309.15505).

    No codebook loss. Raises ValueError for fewer than three levels in a dimension.
    """
    if min(levels) < 3:
        raise ValueError(f"FSQ needs at least 3 levels per dimension, got {min(levels)}")
    module = import_package().FSQ(levels=list(levels), dim=dim)
    return AdaptedQuantizer(
        module, num_codes=int(module.codebook_size), dim=dim, quantize=quantize_fsq
    )
