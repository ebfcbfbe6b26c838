"""Raw tar members to checked samples: which member is the picture, which words go with it."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dcar.data.shards import IMAGE_TYPES, Raw, expand, read_shard
from dcar.data.transforms import ImageTooLarge, ImageTransform, read_image

MAX_CAPTION_BYTES = 16 * 1024


class BadSample(ValueError):
    """A sample that training goes on without; the message is the reason it is counted under."""


@dataclass(frozen=True)
class Sample:
    """pixels: uint8 (height, width, 3), prepared by the transform but not yet cropped at random."""

    key: str
    caption: str
    pixels: np.ndarray


def decode(raw: Raw, transform: ImageTransform, *, captioned: bool) -> Sample:
    """Raises BadSample with one of a few fixed reasons. `captioned`: whether words are required."""
    caption = read_caption(raw, required=captioned)
    image = image_bytes(raw)
    try:
        pixels = transform.read(image)
    except (ImageTooLarge, Image.DecompressionBombError) as error:
        raise BadSample("image too large") from error
    except Exception as error:  # a hostile file may raise anything inside a decoder
        raise BadSample("broken image") from error
    return Sample(str(raw["__key__"]), caption, pixels)


def image_bytes(raw: Raw) -> bytes:
    """The picture file of a sample."""
    image = next((raw[kind] for kind in IMAGE_TYPES if kind in raw), None)
    if not isinstance(image, bytes):
        raise BadSample("no image")
    return image


def read_caption(raw: Raw, *, required: bool) -> str:
    """The `txt` member, else the entry "caption" of the `json` member; "" where none is needed."""
    text = raw.get("txt")
    try:
        if text is None and "json" in raw:
            described = json.loads(raw["json"])
            text = described.get("caption") if isinstance(described, dict) else None
        caption = text.decode() if isinstance(text, bytes) else (text or "")
    except UnicodeDecodeError as error:
        raise BadSample("caption is not UTF-8") from error
    except ValueError as error:
        raise BadSample("broken json") from error
    if not isinstance(caption, str) or (required and not caption.strip()):
        raise BadSample("no caption")
    if len(caption.encode(errors="replace")) > MAX_CAPTION_BYTES:
        raise BadSample("caption too long")
    return caption.strip()


def find(
    urls: str | Path | Iterable[str | Path], keys: Iterable[str]
) -> dict[str, tuple[Image.Image, str]]:
    """Pictures (RGB, as stored) and captions of the named samples.

    Raises KeyError naming the keys that no shard holds. For reports that show the real picture.
    """
    wanted = list(dict.fromkeys(keys))
    found: dict[str, tuple[Image.Image, str]] = {}
    for path in expand(urls):
        if len(found) == len(wanted):
            break
        for raw in read_shard(path):
            key = str(raw["__key__"])
            if key in wanted and key not in found:
                picture = read_image(image_bytes(raw))
                found[key] = (picture, read_caption(raw, required=False))
    if missing := [key for key in wanted if key not in found]:
        raise KeyError(f"no sample {missing} in {urls}")
    return {key: found[key] for key in wanted}
