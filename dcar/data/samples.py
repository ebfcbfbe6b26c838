"""Raw members to checked samples: which member is the picture, which words go with it."""

import io
import json
import math
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from dcar.data.images import ImageTooLarge
from dcar.data.members import IMAGE_TYPES, BadSample, Raw

if TYPE_CHECKING:  # imports torch, which those who only look at samples do without
    from dcar.data.transforms import ImageTransform

BROKEN = "broken image"
TOO_LARGE = "image too large"
MAX_CAPTION_BYTES = 16 * 1024
OWN = "own"  # the name, among captions, of the one that the shard itself holds


@dataclass(frozen=True)
class Sample:
    """A picture or its tokens, with words.

    pixels: uint8 (height, width, 3), prepared by the transform but not yet cropped at random; None
        for a sample of tokens.
    tokens: ids (H, W), residual (C, H, W) and perhaps text (rows, E), as stored.
    captions: further ones by name, from caption shards.
    place: where it lies in the data set of a stream, "" where nobody said; two shards may have one
        key, but not one place.
    """

    key: str
    caption: str
    pixels: np.ndarray | None
    tokens: dict[str, np.ndarray] = field(default_factory=dict)
    captions: dict[str, str] = field(default_factory=dict)
    place: str = ""

    def choose_caption(self, weights: Mapping[str, float], rng: random.Random) -> str:
        """One of the captions by weight; the shard's own where none of the names is there."""
        known = {OWN: self.caption, **self.captions} if self.caption else self.captions
        names = [name for name in weights if known.get(name) and weights[name] > 0]
        if not names:
            return self.caption or next(iter(self.captions.values()), "")
        return known[rng.choices(names, [weights[name] for name in names])[0]]


def cut_caption(caption: str, rng: random.Random) -> str:
    """The caption up to one of its commas or its end, each as likely: its first words always."""
    parts = caption.split(", ")
    return ", ".join(parts[: rng.randint(1, len(parts))])


@contextmanager
def decoding() -> Iterator[None]:
    """Raises BadSample for whatever a decoder raises within it."""
    try:
        yield
    except (ImageTooLarge, Image.DecompressionBombError) as error:
        raise BadSample(TOO_LARGE) from error
    except Exception as error:  # a hostile file may raise anything inside a decoder
        raise BadSample(BROKEN) from error


def decode(
    raw: Raw,
    transform: "ImageTransform",
    *,
    captioned: bool,
    shape: tuple[int, int] | None = None,
    captions: dict[str, str] | None = None,
) -> Sample:
    """Raises BadSample with one of a few fixed reasons.

    captioned: whether words are required. shape: (height, width) where it is not the transform's
    own square. captions: by name, from caption shards; they count as words.
    """
    captions = captions or {}
    caption = read_caption(raw, required=captioned and not captions)
    key = str(raw["__key__"])
    if "ids.npy" in raw:
        return Sample(key, caption, None, read_tokens(raw), captions)
    return Sample(key, caption, read_pixels(raw, transform, shape), {}, captions)


def read_pixels(
    raw: Raw, transform: "ImageTransform", shape: tuple[int, int] | None = None
) -> np.ndarray:
    """The picture as the transform prepares it, uint8 (height, width, 3)."""
    image = image_bytes(raw)
    with decoding():
        return transform.read(image, shape)


def is_whole_array(data: bytes) -> bool:
    """Whether a .npy file holds what its header promises, which numpy would reserve first."""
    file = io.BytesIO(data)
    try:
        first = np.lib.format.read_magic(file) == (1, 0)
        read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    except ValueError:
        return False
    promised = math.prod(shape) * dtype.itemsize
    return not dtype.hasobject and file.tell() + promised == len(data)


def read_tokens(raw: Raw) -> dict[str, np.ndarray]:
    """ids (H, W) uint16, residual (C, H, W) and, where stored, text (rows, E) float16."""
    try:
        tokens = {
            kind.removesuffix(".npy"): np.load(io.BytesIO(data), allow_pickle=False)
            for kind, data in raw.items()
            if kind.endswith(".npy") and isinstance(data, bytes) and is_whole_array(data)
        }
        fits = _fit(**tokens)
    except Exception as error:  # numpy parses headers with Python's own parser
        raise BadSample("broken tokens") from error
    if not fits:
        raise BadSample("broken tokens")
    return tokens


def _fit(ids: np.ndarray, residual: np.ndarray, text: np.ndarray | None = None) -> bool:
    """Whether arrays of a sample are what they should be."""
    grid = ids.ndim == 2 and ids.dtype == np.uint16
    numbers = [array for array in (residual, text) if array is not None]
    finite = all(array.dtype.kind == "f" and np.isfinite(array).all() for array in numbers)
    rows = text is None or text.ndim == 2
    return grid and finite and rows and residual.ndim == 3 and residual.shape[1:] == ids.shape


def image_bytes(raw: Raw) -> bytes:
    """The picture file of a sample."""
    image = next((raw[kind] for kind in IMAGE_TYPES if kind in raw), None)
    if not isinstance(image, bytes):
        raise BadSample("no image")
    return image


def is_text(words: str) -> bool:
    """Whether the words can be written down: json lets halves of characters through."""
    try:
        words.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_caption(raw: Raw, *, required: bool) -> str:
    """The `txt` member, else the entry "caption" of the `json` member; "" where none is needed."""
    text = raw.get("txt")
    try:
        if text is None and "json" in raw:
            described = json.loads(raw["json"])
            text = described.get("caption") if isinstance(described, dict) else None
            if not (required or isinstance(text, str)):
                return ""  # several captions, say, which nobody will read
        caption = text.decode() if isinstance(text, bytes) else (text or "")
    except UnicodeDecodeError as error:
        raise BadSample("caption is not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise BadSample("broken json") from error
    if not isinstance(caption, str) or (required and not caption.strip()):
        raise BadSample("no caption")
    if not is_text(caption):
        raise BadSample("caption is not UTF-8")
    if len(caption.encode()) > MAX_CAPTION_BYTES:
        raise BadSample("caption too long")
    return caption.strip()
