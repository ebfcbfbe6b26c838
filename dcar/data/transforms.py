"""Picture files to model input: (3, S, S) float in [-1, 1]. No other module knows that range.

`ImageTransform` works in two steps: `prepare` is the same every time (so it can be remembered),
`finish` draws crop and flip from the given generator.
"""

import io
import random

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

CROPS = ("center", "random", "adm")
MAX_PIXELS = 64 * 2**20
_READABLE = ("WEBP", "PNG", "JPEG")


class ImageTooLarge(ValueError):
    """The header promises more pixels than allowed; nothing was decoded."""


def read_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a WebP, PNG or JPEG to an upright RGB picture on white; first frame of an animation.

    Raises ImageTooLarge from the header alone, and ValueError or OSError for a broken file.
    """
    with Image.open(io.BytesIO(data), formats=_READABLE) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise ImageTooLarge(f"{width} x {height} pixels, more than the limit of {max_pixels}")
        image.load()
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode -> RGB: turned as EXIF says, 16 bits scaled to 8, alpha laid over white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = _to_8_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        ground.alpha_composite(image)
        image = ground
    return image.convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Grey pictures of 16 bits: PIL's own conversion would clip at 255 where it should scale."""
    levels = np.asarray(image, dtype=np.float64) * (255 / 65535)
    return Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))


def resize_shorter(image: Image.Image, size: int) -> Image.Image:
    """Shorter edge to `size`, bicubic with antialiasing, aspect ratio kept."""
    scale = size / min(image.size)
    if scale == 1:
        return image
    width, height = (round(edge * scale) for edge in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def resize_adm(image: Image.Image, size: int) -> Image.Image:
    """The resize of the ADM centre crop: halve with a box while twice too large, then bicubic.

    It is the protocol of the DC-AE evaluations that DC-AR's reconstruction numbers compare with.
    """
    while min(image.size) >= 2 * size:
        width, height = (edge // 2 for edge in image.size)
        image = image.resize((width, height), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = (round(edge * scale) for edge in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def to_unit_range(pixels: np.ndarray) -> Tensor:
    """uint8 (S, S, 3) -> float32 (3, S, S) in [-1, 1]."""
    channels = torch.from_numpy(pixels.transpose(2, 0, 1).copy())  # (3, S, S)
    return channels.to(torch.float32).mul_(2 / 255).sub_(1)


class ImageTransform:
    """Makes one picture a training or evaluation input.

    crop: "adm" is the centre crop of evaluations; "center" and "random" cut from a picture whose
    shorter edge was resized to `size`. flip: mirror left to right half of the time.
    """

    def __init__(
        self, size: int, *, crop: str = "center", flip: bool = False, max_pixels: int = MAX_PIXELS
    ):
        if size < 1:
            raise ValueError(f"size is {size}; it must be at least 1")
        if crop not in CROPS:
            raise ValueError(f"crop {crop!r} is not one of {CROPS}")
        self.size, self.crop, self.flip, self.max_pixels = size, crop, flip, max_pixels

    def __call__(self, image: Image.Image, rng: random.Random) -> Tensor:
        """PIL picture of any mode -> (3, S, S) float32 in [-1, 1]."""
        return self.finish(self.prepare(image), rng)

    def read(self, data: bytes) -> np.ndarray:
        """File bytes -> what `finish` takes, uint8 (height, width, 3)."""
        return self.prepare(read_image(data, max_pixels=self.max_pixels))

    def prepare(self, image: Image.Image) -> np.ndarray:
        """The part without chance: upright RGB, resized; uint8 (height, width, 3), both >= S."""
        width, height = image.size
        resized = self.size**2 * max(width, height) / min(width, height)
        if max(width * height, resized) > self.max_pixels:
            raise ImageTooLarge(
                f"{width} x {height} pixels, {resized:.0f} when its shorter edge is {self.size}: "
                f"more than the limit of {self.max_pixels}"
            )
        resize = resize_adm if self.crop == "adm" else resize_shorter
        image = resize(image if image.mode == "RGB" else to_rgb(image), self.size)
        if self.crop != "random":
            left, top = ((edge - self.size) // 2 for edge in image.size)
            image = image.crop((left, top, left + self.size, top + self.size))
        return np.asarray(image)

    def finish(self, pixels: np.ndarray, rng: random.Random) -> Tensor:
        """The part with chance: crop place and flip, then (3, S, S) in [-1, 1]."""
        height, width, _ = pixels.shape
        top, left = rng.randint(0, height - self.size), rng.randint(0, width - self.size)
        pixels = pixels[top : top + self.size, left : left + self.size]  # (S, S, 3)
        if self.flip and rng.random() < 0.5:
            pixels = pixels[:, ::-1]
        return to_unit_range(pixels)
