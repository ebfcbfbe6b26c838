"""Tensors as a person sees them: tiles of images, and pictures of Pillow's.

B batch, S image side, R rows, K columns. Images are (3, S, S) in [-1, 1].
"""

from collections.abc import Sequence

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor


def to_uint8(image: Tensor) -> Tensor:
    """[-1, 1] to uint8: 255 x + 0.5 of x in [0, 1], clamped, cut to the integer below."""
    return (image.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def tile(columns: Sequence[Tensor]) -> Tensor:
    """Columns of (B, 3, S, S), side by side with one row an image -> (3, B*S, K*S)."""
    return rearrange(list(columns), "k b c h w -> c (b h) (k w)")


def reconstruction_columns(image: Tensor, discrete: Tensor, hybrid: Tensor) -> list[Tensor]:
    """Input, discrete path, hybrid path, and the hybrid path's error four times enlarged."""
    error = (image - hybrid).abs() * 4 - 1
    return [column.float().clamp(-1, 1) for column in (image, discrete, hybrid, error)]


def to_pil(image: Tensor) -> Image.Image:
    """One image (3, H, W) in [-1, 1] as an RGB picture."""
    pixels = to_uint8(image[None])[0]
    return Image.fromarray(np.ascontiguousarray(rearrange(pixels, "c h w -> h w c").cpu().numpy()))
