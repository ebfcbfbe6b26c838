"""Images as a person sees them: tiles, grids with captions, PNG files with their settings.

B batch, S image side, R rows, K columns. Images are (3, S, S) in [-1, 1].
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from dcar.evaluation.metrics import to_uint8


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


def save_png(picture: Image.Image, path: str | Path, facts: Mapping[str, object]) -> None:
    """Write a PNG that carries `facts` as text chunks (prompt, seed, settings)."""
    info = PngInfo()
    for key, value in facts.items():
        info.add_itxt(key, str(value))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, pnginfo=info)


def captioned_grid(
    pictures: Sequence[Image.Image], captions: Sequence[str], *, columns: int, side: int = 160
) -> Image.Image:
    """Pictures of one size in rows, each enlarged to `side` pixels with its caption beneath."""
    font, band = ImageFont.load_default(size=11), 34
    rows = -(-len(pictures) // columns)
    page = Image.new("RGB", (columns * side, rows * (side + band)), "white")
    draw = ImageDraw.Draw(page)
    for index, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left, top = index % columns * side, index // columns * (side + band)
        page.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (left, top))
        draw.text((left + 4, top + side + 2), _wrap(caption, font, side - 8), "black", font)
    return page


def _wrap(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    """At most two lines that fit `width` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines[:2])
