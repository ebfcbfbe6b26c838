"""Pictures on paper: sheets of them with captions, and PNG files that carry their settings."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

from dcar.data.storage import write_atomically

LANCZOS = Image.Resampling.LANCZOS


def save_png(picture: Image.Image, path: str | Path, facts: Mapping[str, object]) -> None:
    """Write a PNG, local or remote, that carries `facts` (prompt, seed, settings) as text."""
    info, data = PngInfo(), io.BytesIO()
    for key, value in facts.items():
        info.add_itxt(key, str(value))
    picture.save(data, "PNG", pnginfo=info)
    with write_atomically(path) as file:
        file.write(data.getvalue())


def captioned_grid(
    pictures: Sequence[Image.Image], captions: Sequence[str], *, columns: int, side: int = 160
) -> Image.Image:
    """Pictures in rows, each as large as `side` pixels allow, with its caption beneath."""
    font, band = sans(11), 34
    rows = -(-len(pictures) // columns)
    page = Image.new("RGB", (columns * side, rows * (side + band)), "white")
    draw = ImageDraw.Draw(page)
    for index, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left, top = index % columns * side, index // columns * (side + band)
        page.paste(
            ImageOps.pad(picture.convert("RGB"), (side, side), LANCZOS, "white"), (left, top)
        )
        draw.text((left + 4, top + side + 2), wrapped(caption, font, side - 8), "black", font)
    return page


def sans(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu, which comes with matplotlib, has Greek, Cyrillic and the like; PIL's own has not."""
    import matplotlib  # which a picture alone does without

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", size)


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """At most two lines that fit `width` pixels; an ellipsis stands for what does not."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(_shortened(word, font, width))
    lines = [line for line in lines if line]
    if len(lines) > 2:
        lines[1] = _shortened(f"{lines[1]} …", font, width)
    return "\n".join(lines[:2])


def _shortened(line: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The line, or as much of its start as fits before an ellipsis."""
    if font.getlength(line) <= width:
        return line
    kept = line.removesuffix("…")
    while kept and font.getlength(f"{kept.rstrip()}…") > width:
        kept = kept[:-1]
    return f"{kept.rstrip()}…"
