"""Picture files to model input: (3, S, S) float in [-1, 1]. No other module knows that range.

`ImageTransform` works in steps: `read` is the same every time (so it can be remembered), `cut`
draws crop and flip from the given generator, `to_unit_range` makes floats of one or of a batch.
"""

import random
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from dcar.data.images import MAX_PIXELS, Decoded, ImageTooLarge, covering, decode

CROPS = ("center", "random", "adm")


def resize(picture: Decoded, size: tuple[int, int]) -> np.ndarray:
    """To uint8 (height, width, 3), bicubic with antialiasing; channels are planes in memory.

    PyTorch's own bicubic for bytes: 4 to 10 times as fast as Pillow's, and within 2 of 255 of it
    (71 dB PSNR or more; one value in 500 differs, nearly always by 1).
    """
    if picture.pixels.shape[:2] == size:
        return picture.pixels
    pixels = torch.from_numpy(picture.pixels).permute(2, 0, 1).unsqueeze(0)  # (1, 3, h, w)
    shrink = partial(functional.interpolate, mode="bicubic", antialias=True)
    if picture.reduction == 1:
        resized = shrink(pixels, size=size)  # (1, 3, height, width)
    else:
        # A scale and not a size: the last row and column of `pixels` may be partly beyond the
        # picture's edge. Stretched over them it would lose up to 13 dB. The little more than the
        # exact scale keeps rounding from costing a row.
        scales = [
            wanted * picture.reduction / edge * (1 + 1e-9)
            for wanted, edge in zip(size, (picture.height, picture.width), strict=True)
        ]
        resized = shrink(pixels, scale_factor=scales)  # (1, 3, >= height, >= width)
    return resized[0, :, : size[0], : size[1]].numpy().transpose(1, 2, 0)  # (height, width, 3)


def resize_adm(image: Image.Image, shape: tuple[int, int]) -> Image.Image:
    """The resize of the ADM centre crop: halve with a box while twice too large, then bicubic.

    It is the protocol of the DC-AE evaluations that DC-AR's reconstruction numbers compare with.
    """
    while image.height >= 2 * shape[0] and image.width >= 2 * shape[1]:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    height, width = covering(image.height, image.width, shape)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def to_unit_range(pixels: Tensor) -> Tensor:
    """uint8 of any shape -> float32 in [-1, 1]."""
    return pixels.to(torch.float32).mul_(2 / 255).sub_(1)


class ImageTransform:
    """Makes one picture a training or evaluation input.

    crop: "adm" is the centre crop of evaluations, done by Pillow alone and exact; "center" and
    "random" cut from a picture that was shrunk (or grown) until it just covers the shape, by faster
    means (see `resize` and `images.decode`). flip: mirror left to right half of the time.
    Every method takes a `shape` (height, width) for a picture that is no square; the default is
    (size, size).
    """

    def __init__(
        self, size: int, *, crop: str = "center", flip: bool = False, max_pixels: int = MAX_PIXELS
    ):
        if size < 1:
            raise ValueError(f"size is {size}; it must be at least 1")
        if crop not in CROPS:
            raise ValueError(f"crop {crop!r} is not one of {CROPS}")
        self.size, self.crop, self.flip, self.max_pixels = size, crop, flip, max_pixels

    @property
    def is_random(self) -> bool:
        """Whether one picture comes out differently each time."""
        return self.crop == "random" or self.flip

    def read(self, data: bytes, shape: tuple[int, int] | None = None) -> np.ndarray:
        """File bytes -> what `finish` takes: uint8 (height, width, 3), the same every time.

        Raises ImageTooLarge (before decoding where the file itself is too large), and ValueError or
        OSError for a broken file.
        """
        shape = shape or (self.size, self.size)
        cover = None if self.crop == "adm" else shape
        return self._fit(decode(data, cover=cover, max_pixels=self.max_pixels), shape)

    def _fit(self, picture: Decoded, shape: tuple[int, int]) -> np.ndarray:
        height, width = covering(picture.height, picture.width, shape)
        if max(picture.height * picture.width, height * width) > self.max_pixels:
            raise ImageTooLarge(
                f"{picture.width} x {picture.height} pixels, {width} x {height} when it covers "
                f"{shape[1]} x {shape[0]}: more than the limit of {self.max_pixels}"
            )
        if self.crop == "adm":
            pixels = np.asarray(resize_adm(Image.fromarray(picture.pixels), shape))
        else:
            pixels = resize(picture, (height, width))
        if self.crop == "random":
            return pixels
        top, left = (pixels.shape[0] - shape[0]) // 2, (pixels.shape[1] - shape[1]) // 2
        pixels = pixels[top : top + shape[0], left : left + shape[1]]
        planes = pixels.transpose(2, 0, 1).copy()  # a copy, so that no larger picture is kept
        return planes.transpose(1, 2, 0)

    def cut(
        self, pixels: np.ndarray, rng: random.Random, shape: tuple[int, int] | None = None
    ) -> Tensor:
        """The part with chance, crop place and flip: -> uint8 (3, height, width), contiguous."""
        height, width = shape or (self.size, self.size)
        top = rng.randint(0, pixels.shape[0] - height)
        left = rng.randint(0, pixels.shape[1] - width)
        pixels = pixels[top : top + height, left : left + width]
        planes = torch.from_numpy(pixels.transpose(2, 0, 1).copy())  # (3, height, width)
        return planes.flip(2) if self.flip and rng.random() < 0.5 else planes

    def finish(
        self, pixels: np.ndarray, rng: random.Random, shape: tuple[int, int] | None = None
    ) -> Tensor:
        """`cut`, then (3, height, width) float32 in [-1, 1]."""
        return to_unit_range(self.cut(pixels, rng, shape))
