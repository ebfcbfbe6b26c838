"""Which emoji pictures train, validate, or are held out to test composition.

A pair is (code points of the concept, style). P pictures, F features of each.
"""

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

Pair = tuple[str, str]

FEATURE_SIDE = 16
SAME_CONCEPT_RMSE = 40.0  # below it two drawings of one concept look traced from one another
ANY_PICTURE_RMSE = 24.0  # below it two pictures look alike whatever they are called
VISIBLE_LEVEL = 16


def over_white(picture: Image.Image) -> Image.Image:
    """RGBA -> RGB on a white ground."""
    ground = Image.new("RGBA", picture.size, "white")
    ground.alpha_composite(picture)
    return ground.convert("RGB")


def is_blank(picture: Image.Image, *, ink: float = 0.01) -> bool:
    """Whether less than a share `ink` of the picture can be told from white paper."""
    pixels = np.asarray(over_white(picture), dtype=np.int16)
    return bool(((255 - pixels).max(axis=-1) > VISIBLE_LEVEL).mean() < ink)


def features(picture: Image.Image) -> np.ndarray:
    """The drawing cut to its own outline and shrunk, (F,) whole numbers 0..255.

    Cutting first makes the measure blind to how much margin a set leaves.
    """
    outline = picture.getchannel("A").point(lambda level: 255 * (level > VISIBLE_LEVEL)).getbbox()
    small = over_white(picture.crop(outline)).resize(
        (FEATURE_SIDE, FEATURE_SIDE), Image.Resampling.BOX
    )
    return np.asarray(small, dtype=np.float64).reshape(-1)


def near_copies(pictures: Mapping[Pair, Image.Image]) -> set[Pair]:
    """Pairs that have a near copy among all other pictures.

    Products and sums of whole numbers below 2^53 are exact, so the answer is the same everywhere.
    """
    pairs = sorted(pictures)
    matrix = np.stack([features(pictures[pair]) for pair in pairs])  # (P, F)
    squares = (matrix**2).sum(axis=1)  # (P,)
    codes = np.unique([code for code, _ in pairs], return_inverse=True)[1]
    found: set[Pair] = set()
    for start in range(0, len(pairs), 1024):
        rows = slice(start, start + 1024)
        distance = squares[rows, None] + squares - 2 * matrix[rows] @ matrix.T  # (1024, P)
        same = codes[rows, None] == codes
        limit = np.where(same, SAME_CONCEPT_RMSE, ANY_PICTURE_RMSE) ** 2 * matrix.shape[1]
        itself = np.arange(len(distance)), np.arange(start, start + len(distance))
        distance[itself] = math.inf
        found.update(pairs[start + row] for row in np.flatnonzero((distance < limit).any(axis=1)))
    return found


def split_pairs(
    pairs: Sequence[Pair], copies: set[Pair], *, seed: int, val: float, heldout: float
) -> dict[str, list[Pair]]:
    """`train`, `val`, `heldout`, each in its shuffled shard order.

    val: a plain draw of pairs, so it looks like train; its concept stays in train in another style.
    heldout: at most one pair of a concept, which train shows in at least two other styles; no
    near copy of any picture. The style is in train on other concepts by the sheer numbers.
    """
    rng = random.Random(seed)
    order = sorted(pairs)
    rng.shuffle(order)
    left = Counter(code for code, _ in order)  # drawings of the concept that are still in train
    splits: dict[str, list[Pair]] = {"val": [], "heldout": []}
    for pair in order:
        if len(splits["val"]) < math.ceil(val * len(order)) and left[pair[0]] > 1:
            splits["val"].append(pair)
            left[pair[0]] -= 1
    taken, used = set(splits["val"]), set()
    for pair in order:
        enough = len(splits["heldout"]) >= math.ceil(heldout * len(order))
        if enough or pair in taken or pair in copies or pair[0] in used or left[pair[0]] < 3:
            continue
        splits["heldout"].append(pair)
        used.add(pair[0])
        left[pair[0]] -= 1
    taken.update(splits["heldout"])
    return {"train": [pair for pair in order if pair not in taken], **splits}
