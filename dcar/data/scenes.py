"""Scenes composed of cut-out drawings as they are read: one object, two, several, on colours.

A `SceneSet` takes the place of a `ShardSet`: `ShardStream` reads it, alone or in a mixture. Scene
number n is a function of the seed and n alone, so it comes back after a restart and on any worker.
The json member of a scene says what is where, for tests and judges.
"""

import io
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from dcar.data import scene_words as words
from dcar.data.members import BadSample, Raw
from dcar.data.samples import image_bytes
from dcar.data.scene_words import COLOURS, Subject
from dcar.data.shard_set import ShardSet

Box = tuple[float, float, float]  # centre x, centre y and side, in shares of the scene's side
KINDS = {"single": 6.0, "position": 2.0, "counting": 1.0, "two_colours": 1.0}
SHADE = 12  # colours vary by as much, of 255

# Where objects are put; each then moves by up to JITTER.
BESIDE: tuple[Box, Box] = ((0.26, 0.5, 0.46), (0.74, 0.5, 0.46))
STACKED: tuple[Box, Box] = ((0.5, 0.26, 0.46), (0.5, 0.74, 0.46))
GROUPS: dict[int, list[list[Box]]] = {
    2: [list(BESIDE), [(0.3, 0.3, 0.42), (0.7, 0.7, 0.42)], [(0.7, 0.3, 0.42), (0.3, 0.7, 0.42)]],
    3: [
        [(0.27, 0.28, 0.4), (0.73, 0.28, 0.4), (0.5, 0.73, 0.4)],
        [(0.5, 0.27, 0.4), (0.27, 0.72, 0.4), (0.73, 0.72, 0.4)],
    ],
    4: [[(0.27, 0.27, 0.4), (0.73, 0.27, 0.4), (0.27, 0.73, 0.4), (0.73, 0.73, 0.4)]],
}
JITTER = 0.03


@dataclass(frozen=True)
class Drawing:
    """A picture file with alpha, and what it shows."""

    key: str
    subject: Subject
    image: bytes


@dataclass(frozen=True)
class Placed:
    """A drawing in a scene; `box` in pixels: left, top, right, bottom."""

    drawing: Drawing
    box: tuple[int, int, int, int]
    is_mirrored: bool


@dataclass(frozen=True)
class Scene:
    """kind: a key of KINDS. ground: the colour's name, or two, left to right.

    relation: of the first object placed to the second, a key of RELATIONS, where one is told.
    """

    kind: str
    caption: str
    placed: tuple[Placed, ...]
    ground: tuple[str, ...]
    picture: Image.Image
    relation: str | None = None

    def facts(self) -> dict[str, Any]:
        objects = [
            {
                "key": placed.drawing.key,
                "phrase": placed.drawing.subject.phrase,
                "style": placed.drawing.subject.style,
                "box": placed.box,
            }
            for placed in self.placed
        ]
        return {
            "kind": self.kind,
            "objects": objects,
            "ground": self.ground,
            "relation": self.relation,
        }


def weighed(kinds: Mapping[str, float], *, known: Mapping[str, float]) -> dict[str, float]:
    """The kinds that come at all. Raises ValueError for unknown ones and impossible weights."""
    if unknown := sorted(set(kinds) - set(known)):
        raise ValueError(f"kinds names {unknown}; there is {sorted(known)}")
    if not any(kinds.values()) or min(kinds.values()) < 0:
        raise ValueError(f"kinds {dict(kinds)} must be weights of 0 and more, one above 0")
    return {name: weight for name, weight in kinds.items() if weight > 0}


def shade(name: str, rng: random.Random) -> tuple[int, ...]:
    """A colour a little off the usual one of its name; white and black stay."""
    colour = COLOURS[name]
    if name in ("white", "black"):
        return colour
    return tuple(max(0, min(255, value + rng.randint(-SHADE, SHADE))) for value in colour)


def place(drawing: Drawing, box: Box, side: int, rng: random.Random) -> Placed:
    """Near the box, mirrored half of the time where that changes nothing of what is said."""
    x, y = (centre + rng.uniform(-JITTER, JITTER) for centre in box[:2])
    size = max(1, round(box[2] * side * rng.uniform(0.9, 1.0)))
    left, top = round(x * side - size / 2), round(y * side - size / 2)
    left, top = (max(0, min(side - size, corner)) for corner in (left, top))
    is_mirrored = drawing.subject.may_be_mirrored and rng.random() < 0.5
    return Placed(drawing, (left, top, left + size, top + size), is_mirrored)


def cut_out(drawing: Drawing) -> Image.Image:
    """The drawing as RGBa: premultiplied, so that nothing shows from behind transparent pixels."""
    with Image.open(io.BytesIO(drawing.image)) as file:
        return file.convert("RGBA").convert("RGBa")


def lay(piece: Image.Image, canvas: Image.Image, box: tuple[int, int, int, int]) -> None:
    """An RGBa picture into a box of the canvas, by its alpha; what is outside is cut off."""
    left, top, right, bottom = box
    small = piece.resize((right - left, bottom - top), Image.Resampling.BICUBIC)
    canvas.paste(small.convert("RGBA"), (left, top), small.getchannel("a"))


def paint(placed: Sequence[Placed], canvas: Image.Image) -> Image.Image:
    """The drawings over the canvas, by their alpha."""
    for one in placed:
        piece = cut_out(one.drawing)
        lay(ImageOps.mirror(piece) if one.is_mirrored else piece, canvas, one.box)
    return canvas


def read_drawings(shards: ShardSet, concepts: str | Path) -> list[Drawing]:
    """All drawings of shards whose keys are `style/slug`, in the shards' order.

    concepts: a json list with `slug`, `phrase`, `category` and `keywords` of each.
    Raises ValueError for a drawing that it does not know, DataError for one that cannot be read.
    """
    known = {concept["slug"]: concept for concept in json.loads(Path(concepts).read_text())}
    found = []
    for shard, count in enumerate(shards.counts):
        for position in range(count):
            with shards.required(shard, position):
                raw = shards.read(shard, position)
                picture = image_bytes(raw)
            key = str(raw["__key__"])
            style, _, slug = key.partition("/")
            if slug not in known:
                raise ValueError(f"{shards.urls[shard]}: {key} is not in {concepts}")
            concept = known[slug]
            subject = Subject(
                concept["phrase"],
                f"{style} style",
                concept["category"],
                tuple(concept["keywords"]),
            )
            found.append(Drawing(key, subject, picture))
    return found


class SceneSet(ShardSet):
    """Scenes of the drawings in shards, as many as are asked for.

    urls: shards of pictures with alpha under keys `style/slug`. concepts: a json list with `slug`,
        `phrase`, `category` and `keywords` of each. Other samples of the shards are an error.
    scenes: how many there are; side: of a scene in pixels. kinds: weights of KINDS.
    coloured: share of single objects on a background that is not white.
    Raises ValueError for unknown kinds, for weights none of which is above 0, for drawings that a
    kind cannot be made of, and for one that `concepts` does not know.
    """

    def __init__(
        self,
        urls: str | Path,
        *,
        concepts: str | Path,
        scenes: int,
        side: int,
        seed: int = 0,
        kinds: Mapping[str, float] = KINDS,
        coloured: float = 0.3,
    ):
        super().__init__(urls)
        if scenes < len(self.urls):
            raise ValueError(f"scenes={scenes} must be at least the {len(self.urls)} shards")
        self.side, self.seed, self.coloured = side, seed, coloured
        self.kinds = weighed(kinds, known=KINDS)
        self.drawings = read_drawings(ShardSet(urls), concepts)
        self.countable = [d for d in self.drawings if d.subject.plural]
        by_style: dict[str, list[Drawing]] = {}
        for drawing in self.drawings:
            by_style.setdefault(drawing.subject.style, []).append(drawing)
        self.by_style = by_style
        self._check_drawings()
        shards = len(self.urls)
        self.counts = [(scenes + number) // shards for number in range(shards)]
        self.offsets = [sum(self.counts[:number]) for number in range(shards)]

    def _check_drawings(self) -> None:
        """Raises ValueError where the drawings have nothing for a kind that is asked for."""
        if "counting" in self.kinds and not self.countable:
            raise ValueError("kinds has counting, and no drawing's name has a plural")
        for kind in sorted({"position", "two_colours"} & set(self.kinds)):
            for style, drawings in self.by_style.items():
                if len({drawing.subject.phrase for drawing in drawings}) < 2:
                    raise ValueError(f"kinds has {kind}: {style} needs drawings of two things")

    def scene(self, number: int) -> Scene:
        """Scene `number` of the set, the same every time."""
        rng = random.Random(f"{self.seed}/{number}")
        kind = rng.choices(list(self.kinds), list(self.kinds.values()))[0]
        draw = {
            "single": self._single,
            "position": self._position,
            "counting": self._counting,
            "two_colours": self._two_colours,
        }[kind]
        return draw(rng)

    def _single(self, rng: random.Random) -> Scene:
        drawing = rng.choice(self.drawings)
        colour = rng.choice(list(COLOURS)) if rng.random() < self.coloured else "white"
        told = colour if colour != "white" else None
        caption = words.single(drawing.subject, told, rng)
        return self._scene("single", caption, [drawing], [(0.5, 0.5, 1.0)], (colour,), rng)

    def _position(self, rng: random.Random) -> Scene:
        pair = self._pair(rng)
        relation = rng.choice(list(words.RELATIONS))
        caption = words.related(pair[0].subject, relation, pair[1].subject, rng)
        boxes = STACKED if relation in ("above", "below") else BESIDE
        if relation in ("right", "below"):
            boxes = boxes[::-1]
        scene = self._scene("position", caption, pair, boxes, ("white",), rng)
        return replace(scene, relation=relation)

    def _counting(self, rng: random.Random) -> Scene:
        drawing, number = rng.choice(self.countable), rng.choice(list(words.NUMBERS))
        boxes = rng.choice(GROUPS[number])
        caption = words.counted(drawing.subject, number)
        return self._scene("counting", caption, [drawing] * number, boxes, ("white",), rng)

    def _two_colours(self, rng: random.Random) -> Scene:
        pair, colours = self._pair(rng), tuple(rng.sample(list(COLOURS), 2))
        caption = words.coloured([drawing.subject for drawing in pair], colours)
        return self._scene("two_colours", caption, pair, BESIDE, colours, rng)

    def _pair(self, rng: random.Random) -> list[Drawing]:
        """Two drawings of one hand that show different things."""
        first = rng.choice(self.drawings)
        others = self.by_style[first.subject.style]
        while (second := rng.choice(others)).subject.phrase == first.subject.phrase:
            pass
        return [first, second]

    def _scene(
        self,
        kind: str,
        caption: str,
        drawings: Sequence[Drawing],
        boxes: Sequence[Box],
        ground: tuple[str, ...],
        rng: random.Random,
    ) -> Scene:
        shades = [shade(name, rng) for name in ground]
        canvas = Image.new("RGB", (self.side, self.side), shades[0])
        if len(shades) == 2:
            canvas.paste(shades[1], (self.side // 2, 0, self.side, self.side))
        put = partial(place, side=self.side, rng=rng)
        placed = tuple(put(*one) for one in zip(drawings, boxes, strict=True))
        return Scene(kind, caption, placed, ground, paint(placed, canvas))

    def read(self, shard: int, position: int) -> Raw:
        """A scene as a sample of a shard would be."""
        if position >= self.counts[shard]:
            raise BadSample("lost with its shard")
        number = self.offsets[shard] + position
        scene = self.scene(number)
        file = io.BytesIO()
        scene.picture.save(file, "png", compress_level=1)
        return {
            "__key__": f"scene/{number:08d}",
            "png": file.getvalue(),
            "txt": scene.caption.encode(),
            "json": json.dumps(scene.facts()).encode(),
        }

    def prepare(self, shard: int, first: int, stop: int) -> None:
        """Nothing is fetched: the drawings are in memory."""

    def sizes(self) -> list[np.ndarray]:
        return [np.full((count, 2), self.side, np.uint16) for count in self.counts]
