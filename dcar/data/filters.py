"""Which records a build keeps, and as what picture: checks under fixed reasons, and resizing."""

import io
from dataclasses import dataclass

from PIL import Image

from dcar.data.images import MAX_PIXELS, Decoded, covering, decode, image_size
from dcar.data.members import BadSample
from dcar.data.samples import BROKEN, MAX_CAPTION_BYTES, TOO_LARGE, decoding
from dcar.data.sources.source import Record

CHECKS = ("decode", "header")
FORMATS = ("jpg", "webp")
MAX_EDGE = 65_535  # what `sizes.npz` can hold
MAX_WEBP_EDGE = 16_383

TOO_SMALL = "image too small"
TOO_ELONGATED = "image too elongated"
NO_CAPTION = "no caption"
CAPTION_TOO_LONG = "caption too long"
NOT_UTF8 = "caption is not UTF-8"
DUPLICATE_KEY = "duplicate key"
NEAR_DUPLICATE = "near duplicate"


@dataclass(frozen=True)
class Picture:
    """A picture file to be written. kind: its member type; width, height: as it is shown."""

    data: bytes
    kind: str
    width: int
    height: int


def image_kind(data: bytes) -> str:
    """Member type by content: ImageNet has a PNG named .JPEG. Raises BadSample."""
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    raise BadSample(BROKEN)


@dataclass(frozen=True)
class Filters:
    """What is kept and how it is stored.

    max_pixels: of a picture, known from its header. min_size: of the shorter edge, in pixels.
    max_aspect: longer edge over shorter edge. max_caption_bytes: of UTF-8.
    check: "decode" reads all pixels of each picture that is stored as it was found, so that a
        picture cut short is left out; "header" takes its word for it. Decoding takes most of the
        time of a build without `resize`; with it, it is done anyway.
    resize: length of the shorter edge, for pictures that are larger; others keep their bytes.
    format, quality: of the pictures that are resized.
    """

    max_pixels: int = MAX_PIXELS
    min_size: int = 1
    max_aspect: float | None = None
    max_caption_bytes: int = MAX_CAPTION_BYTES
    check: str = "decode"
    resize: int | None = None
    format: str = "jpg"
    quality: int = 95

    def __post_init__(self) -> None:
        if self.check not in CHECKS:
            raise ValueError(f"check={self.check} is not one of {CHECKS}")
        if self.format not in FORMATS:
            raise ValueError(f"format={self.format} is not one of {FORMATS}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality={self.quality}; from 1 to 100")
        if self.max_aspect is not None and self.max_aspect < 1:
            raise ValueError(f"max_aspect={self.max_aspect}: longer over shorter edge, at least 1")
        for name in ("max_pixels", "min_size", "max_caption_bytes", "resize"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}; it must be at least 1")

    def caption(self, record: Record, *, required: bool) -> bytes | None:
        """The words as UTF-8, None where there are none and none are needed. Raises BadSample."""
        words = (record.caption or "").strip()
        if not words:
            if required:
                raise BadSample(NO_CAPTION)
            return None
        try:
            encoded = words.encode()
        except UnicodeEncodeError as error:  # sources read text with errors="surrogateescape"
            raise BadSample(NOT_UTF8) from error
        if len(encoded) > self.max_caption_bytes:
            raise BadSample(CAPTION_TOO_LONG)
        return encoded

    def header(self, data: bytes) -> tuple[int, int]:
        """(width, height) of a picture that may be kept, from its header. Raises BadSample."""
        image_kind(data)
        with decoding():
            width, height = image_size(data)
        shorter, longer = sorted((width, height))
        if width * height > self.max_pixels or longer > MAX_EDGE:
            raise BadSample(TOO_LARGE)
        if shorter < self.min_size:
            raise BadSample(TOO_SMALL)
        if self.max_aspect is not None and longer > self.max_aspect * shorter:
            raise BadSample(TOO_ELONGATED)
        return width, height

    def picture(self, data: bytes) -> Picture:
        """What is stored of a picture file. Raises BadSample."""
        width, height = self.header(data)
        if self.resize is not None and min(width, height) > self.resize:
            size = covering(height, width, (self.resize, self.resize))
            if self.format == "webp" and max(size) > MAX_WEBP_EDGE:
                raise BadSample(TOO_LARGE)
            return self._resized(data, size)
        if self.check == "decode":
            self.decoded(data)
        return Picture(data, image_kind(data), width, height)

    def decoded(self, data: bytes, *, cover: tuple[int, int] | None = None) -> Decoded:
        """Pixels for a caller who will shrink them until they just cover `cover` (height, width).

        Raises BadSample.
        """
        with decoding():
            return decode(data, cover=cover, max_pixels=self.max_pixels)

    def _resized(self, data: bytes, size: tuple[int, int]) -> Picture:
        from dcar.data.transforms import resize  # imports torch, which only resizing needs

        pixels = resize(self.decoded(data, cover=size), size)  # (height, width, 3)
        # Plane by plane: `resize` leaves them so, and to interleave them here costs ten times more.
        planes = [Image.fromarray(pixels[:, :, channel]) for channel in range(3)]
        image, file = Image.merge("RGB", planes), io.BytesIO()
        if self.format == "jpg":  # colours at full resolution: at these sizes half of it shows
            image.save(file, "JPEG", quality=self.quality, subsampling=0)
        else:
            image.save(file, "WEBP", quality=self.quality)
        return Picture(file.getvalue(), self.format, image.width, image.height)
