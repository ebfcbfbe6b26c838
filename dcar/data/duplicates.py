"""Near-duplicates among perceptual hashes of 64 bits: which samples look like an earlier one.

No pair is compared that cannot be near: of `distance + 3` blocks of bits, two hashes that differ
in at most `distance` bits share three, so sorting by each three blocks brings them together. Among
very many hashes too many share three by chance: then it is four of `distance + 4` blocks.
"""

from collections.abc import Iterator
from itertools import combinations

import numpy as np
from PIL import Image

from dcar.errors import import_extra

BITS = 64
MAX_DISTANCE = 8  # 165 sorts, or 495; unlike pictures begin to look alike beyond it
CROWD = 16
BY_CHANCE = 4  # hashes that may share a key by chance, on average


def perceptual_hash(image: Image.Image) -> int:
    """64 bits of the signs of a picture's low frequencies: ImageHash's `phash`."""
    imagehash = import_extra("imagehash", extra="data", needs="near_duplicates needs ImageHash")
    bits = imagehash.phash(image, hash_size=8).hash
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def check_distance(distance: int) -> None:
    """Raises ValueError for a number of bits at which unlike pictures would count as alike."""
    if not 0 <= distance <= MAX_DISTANCE:
        raise ValueError(f"near_duplicates={distance} bits of {BITS}; from 0 to {MAX_DISTANCE}")


def find_duplicates(hashes: np.ndarray, *, distance: int) -> np.ndarray:
    """True for each of `hashes` (n,) uint64 within `distance` bits of an earlier one that is False.

    The first of its kind is kept; memory is a few times that of `hashes`, besides the pairs found.
    """
    check_distance(distance)
    unique, firsts, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    order = np.argsort(firsts)  # unique hashes, by where each is first seen
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    near = _dropped(unique[order], distance)
    duplicate = near[rank[inverse]]
    copies = np.ones(len(hashes), dtype=bool)
    copies[firsts] = False
    return duplicate | copies


def _dropped(hashes: np.ndarray, distance: int) -> np.ndarray:
    """True for those of `hashes`, all different, that are near an earlier one that stays."""
    pairs, crowds = _near_pairs(hashes, distance)
    crowded: dict[int, list[np.ndarray]] = {}
    for crowd in crowds:
        for place in crowd.tolist():
            crowded.setdefault(place, []).append(crowd)
    places = np.unique(np.concatenate([pairs[:, 0], *crowds]))
    begins, ends = (np.searchsorted(pairs[:, 0], places, side) for side in ("left", "right"))
    dropped = np.zeros(len(hashes), dtype=bool)
    for place, begin, end in zip(places.tolist(), begins.tolist(), ends.tolist(), strict=True):
        if dropped[place]:
            continue
        dropped[pairs[begin:end, 1]] = True
        for crowd in crowded.get(place, ()):
            later = crowd[np.searchsorted(crowd, place) + 1 :]
            dropped[later[np.bitwise_count(hashes[later] ^ hashes[place]) <= distance]] = True
    return dropped


def _near_pairs(hashes: np.ndarray, distance: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Places in `hashes` whose bits differ in up to `distance` places, as (m, 2) sorted pairs.

    Places of more than CROWD hashes that share three blocks come as they are, in order: of a
    crowd, only those that stay are to be compared, as their pairs would be too many.
    """
    found, crowds = [np.empty((0, 2), dtype=np.int64)], []
    for key in _keys(hashes, distance, shared_blocks(len(hashes), distance)):
        order = np.argsort(key, kind="stable")
        starts = np.flatnonzero(np.diff(key[order], prepend=~key[order[:1]]))
        lengths = np.diff(starts, append=len(key))
        for run in np.flatnonzero(lengths > CROWD).tolist():
            crowds.append(order[starts[run] : starts[run] + lengths[run]].copy())
        order = order[np.repeat(lengths <= CROWD, lengths)]
        found.extend(_near_neighbours(hashes[order], key[order], order, distance))
    return np.unique(np.concatenate(found), axis=0), crowds


def shared_blocks(count: int, distance: int) -> int:
    """How many blocks make a key: three, or four for so many hashes that three are too few bits."""
    return 3 if count <= BY_CHANCE << (3 * BITS // (distance + 3)) else 4


def _keys(hashes: np.ndarray, distance: int, shared: int) -> Iterator[np.ndarray]:
    """The bits of each `shared` of `distance + shared` blocks, other bits zero."""
    blocks = distance + shared
    edges = [BITS * block // blocks for block in range(blocks + 1)]
    masks = [(1 << high) - (1 << low) for low, high in zip(edges, edges[1:], strict=False)]
    for chosen in combinations(masks, shared):
        yield hashes & np.uint64(sum(chosen))


def _near_neighbours(
    hashes: np.ndarray, key: np.ndarray, places: np.ndarray, distance: int
) -> Iterator[np.ndarray]:
    """Near pairs among neighbours of one key; arrays are sorted by `key`."""
    left, step = np.arange(len(key)), 0
    while len(left):
        step += 1
        left = left[: np.searchsorted(left, len(key) - step)]
        left = left[key[left] == key[left + step]]
        near = left[np.bitwise_count(hashes[left] ^ hashes[left + step]) <= distance]
        yield np.sort(np.stack([places[near], places[near + step]], axis=1), axis=1)
