"""Labelled pictures of cut-out drawings to train a judge on: one object, a half, several.

B views, S side in pixels. View number n is a function of the drawings, the seed and n alone.
"""

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from dcar.data.batches import Batch
from dcar.data.scene_words import COLOURS
from dcar.data.scenes import (
    BESIDE,
    GROUPS,
    STACKED,
    Box,
    cut_out,
    lay,
    read_drawings,
    shade,
    weighed,
)
from dcar.data.shard_set import ShardSet
from dcar.data.softening import soften

SIDE = 64  # of a view
STORED = 72  # side of the drawings in memory
IGNORED = -100  # a label that is not known; cross-entropy leaves it out
LABELS = ("concept", "style", "count")
KINDS = {"plain": 10.0, "single": 6.0, "half": 2.5, "equal": 1.0, "different": 1.0}
LAYOUTS: dict[int, list[list[Box]]] = {**GROUPS, 2: [*GROUPS[2], list(STACKED)]}
OVERHANG = 0.12  # share of an object that may be cut off by the border
SLIVER = 0.18  # of the side: what may be seen of a neighbour


class Names(NamedTuple):
    """What labels are places in."""

    concepts: tuple[str, ...]
    styles: tuple[str, ...]

    def labels(self, key: str) -> tuple[int, int]:
        """(concept, style) of a drawing `style/slug`. Raises ValueError for an unknown one."""
        style, _, slug = key.partition("/")
        return self.concepts.index(slug), self.styles.index(style)


def read_names(concepts: str | Path) -> Names:
    """Slugs and styles, both sorted, of a json list with `slug` and `styles` of each concept."""
    known = json.loads(Path(concepts).read_text())
    slugs = sorted(concept["slug"] for concept in known)
    return Names(tuple(slugs), tuple(sorted({s for concept in known for s in concept["styles"]})))


@dataclass(frozen=True)
class Piece:
    """A drawing in memory; image: STORED x STORED, RGBa, that is premultiplied."""

    key: str
    concept: int
    style: int
    may_be_mirrored: bool
    image: Image.Image

    def lay(self, canvas: Image.Image, box: tuple[int, int, int, int], rng: random.Random) -> None:
        """Into a box of pixels, mirrored half of the time where that changes nothing."""
        is_mirrored = self.may_be_mirrored and rng.random() < 0.5
        lay(ImageOps.mirror(self.image) if is_mirrored else self.image, canvas, box)


@dataclass(frozen=True)
class View:
    """A picture, and what is true of it. key: of the drawing that is spoken of.

    concept, style: places in the names; count: objects less one. IGNORED: not one thing, or not
    asked for.
    """

    key: str
    picture: Image.Image
    concept: int
    style: int
    count: int


def ground(rng: random.Random) -> Image.Image:
    """A canvas: white, of one colour, or of two side by side or one above the other."""
    chance, colours = rng.random(), rng.sample(list(COLOURS), 2)
    if chance < 0.55:
        return Image.new("RGB", (SIDE, SIDE), "white")
    canvas = Image.new("RGB", (SIDE, SIDE), shade(colours[0], rng))
    if chance > 0.85:
        corner = (SIDE // 2, 0) if rng.random() < 0.5 else (0, SIDE // 2)
        canvas.paste(shade(colours[1], rng), (*corner, SIDE, SIDE))
    return canvas


def near(box: Box, rng: random.Random) -> tuple[int, int, int, int]:
    """Pixels of a box moved, shrunk and stretched a little: left, top, right, bottom."""
    x, y = ((centre + rng.uniform(-0.05, 0.05)) * SIDE for centre in box[:2])
    size = box[2] * SIDE * rng.uniform(0.85, 1.05)
    wide, tall = (max(2, round(size * rng.uniform(0.95, 1.05))) for _ in range(2))
    left, top = round(x - wide / 2), round(y - tall / 2)
    return left, top, left + wide, top + tall


def anywhere(rng: random.Random) -> tuple[int, int, int, int]:
    """A box of 0.35 to 1.02 of the side, half of the time a large one, perhaps a little cut off."""
    share = rng.uniform(0.85, 1.02) if rng.random() < 0.5 else rng.uniform(0.35, 0.85)
    wide, tall = (round(share * SIDE * rng.uniform(0.94, 1.06)) for _ in range(2))
    left, top = (
        round(rng.uniform(-OVERHANG * edge, SIDE - edge + OVERHANG * edge)) for edge in (wide, tall)
    )
    return left, top, left + wide, top + tall


def at_an_edge(rng: random.Random) -> tuple[int, int, int, int]:
    """A box of which a sliver is inside."""
    size = round(rng.uniform(0.4, 1.0) * SIDE)
    seen = max(1, round(rng.uniform(0.02, SLIVER) * SIDE))
    across = rng.choice((seen - size, SIDE - seen))
    along = rng.randint(-size // 4, SIDE - 3 * size // 4)
    left, top = (across, along) if rng.random() < 0.5 else (along, across)
    return left, top, left + size, top + size


class ViewSet:
    """Views of the drawings in shards; every drawing is the subject equally often.

    urls: shards of pictures with alpha under keys `style/slug`. concepts: the json of
        `read_names` with `phrase`, `category` and `keywords` of each.
    kinds: weights of KINDS. plain: one object as large as the picture, on white, as the drawings
        are. single: one object, perhaps with a sliver of another. half: one half of
        a scene of two, cut to a square or stretched to one. equal: two to four of one drawing.
        different: two to four drawings of one style, so without a concept.
    softened: whether they look like generated pictures (`soften`).
    distinct: how many there are before they come again, from memory; None: they never do.
    Raises ValueError for an unknown kind and for a drawing that `concepts` does not know.
    """

    def __init__(
        self,
        urls: str | Path | Sequence[str],
        *,
        concepts: str | Path,
        seed: int,
        kinds: Mapping[str, float] = KINDS,
        softened: bool = True,
        distinct: int | None = None,
    ):
        self.shards, self.names = ShardSet(urls), read_names(concepts)
        self.seed, self.softened, self.distinct = seed, softened, distinct
        self._kept: dict[int, View] = {}
        self.kinds = weighed(kinds, known=KINDS)
        self.pieces = list(self._pieces(concepts))
        self.by_style: dict[int, list[Piece]] = {}
        for piece in self.pieces:
            self.by_style.setdefault(piece.style, []).append(piece)
        self._order: tuple[int, list[int]] = (-1, [])  # of the epoch that is being drawn

    @property
    def sets(self) -> list[ShardSet]:
        """What the views are made of, as a stream has it."""
        return [self.shards]

    def _pieces(self, concepts: str | Path) -> Iterator[Piece]:
        for drawing in read_drawings(self.shards, concepts):
            small = cut_out(drawing).resize((STORED, STORED), Image.Resampling.BICUBIC)
            labels = self.names.labels(drawing.key)
            yield Piece(drawing.key, *labels, drawing.subject.may_be_mirrored, small)

    def view(self, number: int) -> View:
        """View `number`, the same every time."""
        if self.distinct is None:
            return self._drawn(number)
        number = self.number(number)
        if number not in self._kept:
            self._kept[number] = self._drawn(number)
        return self._kept[number]

    def number(self, number: int) -> int:
        """The first number whose view is that of `number`."""
        return number if self.distinct is None else number % self.distinct

    def _drawn(self, number: int) -> View:
        rng = random.Random(f"{self.seed}/{number}")
        piece = self.pieces[self._turn(number)]
        kind = rng.choices(list(self.kinds), list(self.kinds.values()))[0]
        draw: Callable[[Piece, random.Random], View] = getattr(self, f"_{kind}")
        view = draw(piece, rng)
        if not self.softened:
            return view
        return replace(view, picture=soften(view.picture, rng))

    def _turn(self, number: int) -> int:
        """Whose turn it is: in every epoch each drawing comes once, in an order of its own."""
        epoch, place = divmod(number, len(self.pieces))
        if self._order[0] != epoch:
            rng, size = random.Random(f"{self.seed}/order/{epoch}"), len(self.pieces)
            self._order = epoch, rng.sample(range(size), size)
        return self._order[1][place]

    def _plain(self, piece: Piece, rng: random.Random) -> View:
        canvas = Image.new("RGB", (SIDE, SIDE), "white")
        piece.lay(canvas, (0, 0, SIDE, SIDE), rng)
        return View(piece.key, canvas, piece.concept, piece.style, 0)

    def _single(self, piece: Piece, rng: random.Random) -> View:
        canvas, has_sliver = ground(rng), rng.random() < 0.3
        if has_sliver:
            rng.choice(self.pieces).lay(canvas, at_an_edge(rng), rng)
        piece.lay(canvas, anywhere(rng), rng)
        count = IGNORED if has_sliver else 0
        return View(piece.key, canvas, piece.concept, piece.style, count)

    def _half(self, piece: Piece, rng: random.Random) -> View:
        canvas, number = ground(rng), rng.randrange(2)
        boxes = rng.choice((BESIDE, STACKED))
        self._other(piece, rng).lay(canvas, near(boxes[1 - number], rng), rng)
        piece.lay(canvas, near(boxes[number], rng), rng)
        crop = half_box(number, is_beside=boxes is BESIDE, border=rng.randint(-3, 3))
        half = canvas.crop(crop)
        if rng.random() < 0.8:
            half = ImageOps.fit(half, (min(half.size),) * 2)
        picture = half.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        return View(piece.key, picture, piece.concept, piece.style, IGNORED)

    def _equal(self, piece: Piece, rng: random.Random) -> View:
        canvas, number = ground(rng), rng.choice(list(LAYOUTS))
        for box in rng.choice(LAYOUTS[number]):
            piece.lay(canvas, near(box, rng), rng)
        return View(piece.key, canvas, piece.concept, piece.style, number - 1)

    def _different(self, piece: Piece, rng: random.Random) -> View:
        canvas, number = ground(rng), rng.choice((2, 2, 3, 4))
        pieces = [piece, *(self._other(piece, rng) for _ in range(number - 1))]
        for one, box in zip(pieces, rng.choice(LAYOUTS[number]), strict=True):
            one.lay(canvas, near(box, rng), rng)
        return View(piece.key, canvas, IGNORED, piece.style, number - 1)

    def _other(self, piece: Piece, rng: random.Random) -> Piece:
        """Of the same style, another concept. Raises ValueError where the style has no other."""
        others = self.by_style[piece.style]
        if all(one.concept == piece.concept for one in others):
            raise ValueError(f"{piece.key} is the only concept of its style: no pairs of it")
        while (other := rng.choice(others)).concept == piece.concept:
            pass
        return other


def half_box(number: int, *, is_beside: bool, border: int = 0) -> tuple[int, int, int, int]:
    """The first or second half of a scene, up to `border` pixels beyond its middle."""
    middle = SIDE // 2
    first, last = (0, middle + border) if number == 0 else (middle - border, SIDE)
    return (first, 0, last, SIDE) if is_beside else (0, first, SIDE, last)


class ViewLoader:
    """Batches of views: number 0 on, an epoch after the other; it knows how far it has got.

    batches: of an epoch. goes_on: an epoch takes up where the last one ended, as training wants;
    else each is the same. A batch holds `key`, `number` (list of int), `image` (B, 3, S, S) uint8
    and the LABELS, (B,) int64.
    """

    def __init__(self, views: ViewSet, *, batch_size: int, batches: int, goes_on: bool):
        if batch_size < 1 or batches < 1:
            raise ValueError(f"batch_size {batch_size} and batches {batches} must be at least 1")
        self.views, self.batch_size, self.batches = views, batch_size, batches
        self.goes_on, self.done = goes_on, 0

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Batch]:
        if not self.goes_on:
            self.done = 0
        last = (self.done // self.batches + 1) * self.batches
        while self.done < last:
            self.done += 1  # before it is handed out: whoever saves a state has it then
            yield self._batch(self.done - 1)

    def _batch(self, number: int) -> Batch:
        first = number * self.batch_size
        numbers = [self.views.number(first + place) for place in range(self.batch_size)]
        views = [self.views.view(number) for number in numbers]
        pixels = np.stack([np.asarray(view.picture) for view in views])  # (B, S, S, 3)
        image = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()  # (B, 3, S, S)
        labels = {name: torch.tensor([getattr(view, name) for view in views]) for name in LABELS}
        return {"key": [v.key for v in views], "number": numbers, "image": image, **labels}

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = int(state["done"])
