"""Pictures on paper: sheets of them with captions, and PNG files that carry their settings."""

import io
from bisect import bisect
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

from dcar.data.storage import write_atomically

LANCZOS = Image.Resampling.LANCZOS
CAPTION_LINES = 2


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
        lines = wrap(caption, font, side - 8, CAPTION_LINES)
        draw.text((left + 4, top + side + 2), "\n".join(lines), "black", font)
    return page


def sans(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu, which comes with matplotlib, has Greek, Cyrillic and the like; PIL's own has not."""
    import matplotlib  # which a picture alone does without

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", size)


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int, most: int) -> list[str]:
    """Lines of at most `width` pixels, the last of `most` ending in "…" where more would follow."""
    lines: list[str] = []
    line = ""
    for word in text.split():
        if len(lines) > most:  # the rest will not be shown
            break
        longer = f"{line} {word}".lstrip()
        if line and font.getlength(longer) > width:
            lines.append(line)
            longer = word
        while len(lines) <= most and font.getlength(longer) > width:  # a word wider than the line
            widths = range(1, len(longer) + 1)
            fits = max(1, bisect(widths, float(width), key=lambda n: font.getlength(longer[:n])))
            lines.append(longer[:fits])
            longer = longer[fits:]
        line = longer
    lines += [line] if line else []
    if len(lines) > most:
        last = f"{lines[most - 1]} …"
        while font.getlength(last) > width:
            last = f"{last[:-2].rstrip()}…"
        lines = [*lines[: most - 1], last]
    return lines
