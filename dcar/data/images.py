"""Picture files to upright RGB pixels; the header is checked before any pixel is decoded.

JPEG goes through simplejpeg (libjpeg-turbo): 1.3 to 2 times as fast as Pillow, equal to it in every
bit (`benchmarks/jpeg_decoders.py`). Pillow reads what that does not: WebP, PNG, CMYK, pictures on
their side.
"""

import io
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image

try:
    import simplejpeg
except ImportError:  # slower, and less strict with damaged JPEGs
    simplejpeg = None

MAX_PIXELS = 64 * 2**20
REDUCED_AT_LEAST = 2.0  # a reduced JPEG stays this many times larger than what is wanted of it
_READABLE = ("WEBP", "PNG", "JPEG")
_TURNS = {  # EXIF orientation -> what makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageTooLarge(ValueError):
    """The header promises more pixels than allowed; nothing was decoded."""


@dataclass(frozen=True)
class Decoded:
    """A picture decoded at 1, 1/2, 1/4 or 1/8 of its size.

    pixels: uint8 (ceil(height / reduction), ceil(width / reduction), 3), contiguous.
    height, width: of the whole picture as shown. Where they are no multiple of `reduction` the
    picture fills height / reduction rows, a fraction less than `pixels` has; columns likewise.
    """

    pixels: np.ndarray
    height: int
    width: int
    reduction: int = 1


def image_size(data: bytes) -> tuple[int, int]:
    """(width, height) as shown, after EXIF rotation, from the header alone.

    Raises ImageTooLarge above Pillow's own limit, else ValueError for all but WebP, PNG and JPEG.
    """
    try:
        with _open(data) as image:
            width, height = image.size
            return (height, width) if _orientation(image) >= 5 else (width, height)
    except ImageTooLarge:
        raise
    except Exception as error:  # a hostile file may raise anything inside a parser
        raise ValueError(f"{len(data)} bytes that are no WebP, PNG or JPEG") from error


def covering(height: int, width: int, shape: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of the smallest picture of that aspect ratio with a `shape` in it."""
    scale = max(shape[0] / height, shape[1] / width)
    return round(height * scale), round(width * scale)


def read_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a WebP, PNG or JPEG to an upright RGB picture on white; first frame of an animation.

    Raises ImageTooLarge from the header alone, and ValueError or OSError for a broken file.
    """
    with _open(data, max_pixels) as image:
        image.load()
        return to_rgb(image)


def read_pixels(data: bytes, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The pixels of `read_image` by the fastest decoder: uint8 (height, width, 3), contiguous.

    Raises what `read_image` raises. Stricter in one point: a JPEG of which the decoder warns is
    broken. Pillow fills one that ends early with grey, and takes what follows flipped bits, or
    stray bytes, for pixels.
    """
    return decode(data, cover=None, max_pixels=max_pixels).pixels


def decode(data: bytes, *, cover: tuple[int, int] | None, max_pixels: int = MAX_PIXELS) -> Decoded:
    """`read_pixels` for a caller who will shrink the picture until it just covers `cover`.

    cover: (height, width). A large JPEG is decoded at 1/2, 1/4 or 1/8 of its size, which saves most
    of its inverse DCT, but never below twice the size wanted. Ten photos shrunk to a quarter are
    then 49 dB PSNR (at worst 45) from those decoded in full; JPEG of quality 90 had cost 47 dB (46)
    before. Were once the size enough, it would be 39 dB (34). Raises what `read_image` raises.
    """
    with _open(data, max_pixels) as image:
        width, height = image.size
        if _is_plain_jpeg(data, image):
            reduction = _reduction(height, width, cover) if cover else 1
            rows, columns = -(-height // reduction), -(-width // reduction)
            pixels = simplejpeg.decode_jpeg(  # strict: a warning of the decoder is an error
                data, min_height=rows, min_width=columns, min_factor=reduction
            )
            return Decoded(pixels, height, width, reduction)
        image.load()
        pixels = np.array(to_rgb(image))  # a copy, since PIL's own memory is read-only
        return Decoded(pixels, *pixels.shape[:2])


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode -> RGB: turned as EXIF says, 16 bits scaled to 8, alpha laid over white."""
    orientation = _orientation(image)
    if image.mode.startswith("I"):
        image = _to_8_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        ground.alpha_composite(image)
        image = ground
    image = image.convert("RGB")
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def _open(data: bytes, max_pixels: int | None = None) -> Image.Image:
    """Header read, pixels not."""
    try:
        image = Image.open(io.BytesIO(data), formats=_READABLE)
    except Image.DecompressionBombError as error:
        raise ImageTooLarge(str(error)) from error
    width, height = image.size
    if max_pixels is not None and width * height > max_pixels:
        raise ImageTooLarge(f"{width} x {height} pixels, more than the limit of {max_pixels}")
    return image


def _orientation(image: Image.Image) -> int:
    """1 to 8 as EXIF counts; 1 where there is none."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # PIL would decode the pixels to look for a chunk behind them
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    return orientation if orientation in _TURNS else 1


def _is_plain_jpeg(data: bytes, image: Image.Image) -> bool:
    """Whether simplejpeg reads it, upright and in no colours but RGB, YCbCr and grey."""
    if simplejpeg is None or not data.startswith(b"\xff\xd8") or _orientation(image) != 1:
        return False
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except ValueError:  # damaged, or sampled in an uncommon way: for Pillow to tell
        return False
    return colours in ("YCbCr", "RGB", "Gray") and (width, height) == image.size


def _reduction(height: int, width: int, cover: tuple[int, int]) -> int:
    # Not 1/3, 3/4, ...: only halvings have fast code in libjpeg-turbo; 3/4 takes twice the time.
    room = min(height / cover[0], width / cover[1]) / REDUCED_AT_LEAST
    return next((reduction for reduction in (8, 4, 2) if reduction <= room), 1)


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Grey pictures of 16 bits: PIL's own conversion would clip at 255 where it should scale."""
    levels = np.asarray(image, dtype=np.float64) * (255 / 65535)
    return Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))
