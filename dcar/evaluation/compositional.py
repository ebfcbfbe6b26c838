"""What prompts ask for, and whether a judge finds it in the pictures. B pictures of side S.

The six groups of scenes are GenEval's (arXiv 2310.11513), asked of the embedded drawings.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from dcar.data.scene_words import COLOURS
from dcar.data.scenes import Scene, SceneSet
from dcar.data.transforms import to_unit_range
from dcar.models.judge import Judge, Verdict

PATIENCE = 1000  # scenes drawn for each one of a group, until one without any is given up
PRESENT = 5  # an object is there if it is among as many likeliest concepts
# Squares of the picture: left, top and side, in shares of its side
SQUARES = {
    "whole": (0.0, 0.0, 1.0),
    "left": (0.0, 0.25, 0.5),
    "right": (0.5, 0.25, 0.5),
    "top": (0.25, 0.0, 0.5),
    "bottom": (0.25, 0.5, 0.5),
}
CORNERS = {  # where the background is looked at: rows and columns of corners
    "whole": [(0, 0), (0, -1), (-1, 0), (-1, -1)],
    "left": [(0, 0), (-1, 0)],
    "right": [(0, -1), (-1, -1)],
}
CORNER = 1 / 16  # side of a corner, in shares of the picture's
PLACES = {"left": ("left", "right"), "right": ("right", "left")} | {
    "above": ("top", "bottom"),
    "below": ("bottom", "top"),
    "beside": ("left", "right"),
}
PAIRS = ("known", "heldout")  # groups of single drawings, which are looked at for their style too
SCENES = ("single object", "two objects", "counting", "colours", "position", "colour attribution")


@dataclass(frozen=True)
class Asked:
    """A prompt and what a picture of it must show.

    group: of PAIRS or SCENES. concepts: slugs, one a place; places: keys of SQUARES. count: of
    equal objects. ground: the background's colour at each place, where it is asked for.
    is_either_way: the two places may be exchanged. real: a true picture of it.
    """

    group: str
    caption: str
    concepts: tuple[str, ...]
    style: str
    real: Image
    places: tuple[str, ...] = ("whole",)
    count: int | None = None
    ground: tuple[str, ...] = ()
    is_either_way: bool = False


def group_of(scene: Scene) -> str:
    if scene.kind == "single":
        return "single object" if scene.ground == ("white",) else "colours"
    if scene.kind == "position":
        return "two objects" if scene.relation == "beside" else "position"
    return {"counting": "counting", "two_colours": "colour attribution"}[scene.kind]


def asked_of(scene: Scene) -> Asked:
    """A scene's caption, and what is in the scene."""
    styles, slugs = zip(*(one.drawing.key.split("/", 1) for one in scene.placed), strict=True)
    group, count = group_of(scene), None
    if scene.kind == "counting":
        slugs, count = slugs[:1], len(scene.placed)
    is_pair = len(slugs) == 2
    return Asked(
        group,
        scene.caption,
        slugs,
        styles[0],  # all drawings of a scene are of one
        scene.picture,
        places=PLACES[scene.relation or "beside"] if is_pair else ("whole",),
        count=count,
        ground=scene.ground if group in ("colours", "colour attribution") else (),
        is_either_way=group in ("two objects", "colour attribution"),
    )


def scenes_of(scenes: SceneSet, each: int) -> list[Asked]:
    """The first `each` of every group of SCENES, in the order of the set's numbers.

    Raises ValueError where a set of that kind does not have so many.
    """
    found: dict[str, list[Asked]] = {group: [] for group in SCENES}
    for number in range(sum(scenes.counts)):
        if all(len(group) == each for group in found.values()):
            break
        if number == max(1, each) * PATIENCE and not all(found.values()):
            break
        asked = asked_of(scenes.scene(number))
        if len(found[asked.group]) < each:
            found[asked.group].append(asked)
    if short := [f"{len(asked)} of {group}" for group, asked in found.items() if len(asked) < each]:
        raise ValueError(f"scenes={each} of each group are asked for; found {', '.join(short)}")
    return [asked for group in found.values() for asked in group]


@dataclass(frozen=True)
class Finding:
    """What a judge sees. ranks: of the concepts asked for at their places, 0 the likeliest."""

    ranks: tuple[int, ...]
    style: str
    count: int
    ground: tuple[str, ...]


def has_all(asked: Asked, finding: Finding) -> bool:
    """Whether every object is there, and number and backgrounds are those asked for.

    An object is there if its concept is among the PRESENT likeliest; the style does not matter.
    """
    return (
        all(rank < PRESENT for rank in finding.ranks)
        and asked.count in (None, finding.count)
        and asked.ground in ((), finding.ground)
    )


def nearest_colour(pixels: Tensor) -> str:
    """The name in COLOURS of the median of pixels (3, N) in [0, 255]."""
    middle = pixels.float().median(1).values
    distance = (torch.tensor(list(COLOURS.values())) - middle).square().sum(1)
    return list(COLOURS)[int(distance.argmin())]


def ground_at(pixels: Tensor, place: str) -> str:
    """The colour behind the objects of a picture (3, S, S) uint8, by its corners."""
    edge = max(1, round(CORNER * pixels.shape[-1]))
    parts = {0: slice(None, edge), -1: slice(-edge, None)}
    corners = [pixels[:, parts[row], parts[column]] for row, column in CORNERS[place]]
    return nearest_colour(torch.cat([corner.flatten(1) for corner in corners], dim=1))


def square(images: Tensor, place: str) -> Tensor:
    """That square of images (B, 3, S, S)."""
    left, top, side = (round(share * images.shape[-1]) for share in SQUARES[place])
    return images[..., top : top + side, left : left + side]


def rank_of(logits: Tensor, label: int) -> int:
    """How many others are likelier."""
    return int((logits > logits[label]).sum())


class Examiner:
    """Asks a judge about pictures. Raises ValueError for concepts that the judge does not know."""

    def __init__(self, judge: Judge, *, batch_size: int = 64):
        self.judge, self.batch_size = judge, batch_size
        self.label = {slug: index for index, slug in enumerate(judge.concepts)}

    @torch.no_grad()
    def verdicts(self, images: Tensor) -> Verdict:
        parts = [self.judge(part) for part in images.split(self.batch_size)]
        return Verdict(*map(torch.cat, zip(*parts, strict=True)))

    def findings(self, asked: Sequence[Asked], pictures: Sequence[Image]) -> list[Finding]:
        """One a picture; of two ways to take the places, the one that fits better."""
        self.check(asked)
        pixels = as_pixels(pictures)
        images = to_unit_range(pixels)
        whole = self.verdicts(images)
        logits = {"whole": dict(enumerate(whole.concept))}
        for place in {place for one in asked for place in one.places} - {"whole"}:
            rows = [row for row, one in enumerate(asked) if place in one.places]
            seen = self.verdicts(square(images[rows], place))
            logits[place] = dict(zip(rows, seen.concept, strict=True))
        return [
            self._finding(one, row, pixels[row], whole, logits) for row, one in enumerate(asked)
        ]

    def check(self, asked: Sequence[Asked]) -> None:
        """Raises ValueError for concepts that the judge does not know."""
        if unknown := {slug for one in asked for slug in one.concepts} - self.label.keys():
            raise ValueError(f"the judge does not know {sorted(unknown)[:5]}")

    def _finding(
        self,
        asked: Asked,
        row: int,
        pixels: Tensor,
        whole: Verdict,
        logits: Mapping[str, Mapping[int, Tensor]],  # of each place, by row
    ) -> Finding:
        def seen(places: tuple[str, ...]) -> Finding:
            ranks = (
                rank_of(logits[place][row], self.label[slug])
                for place, slug in zip(places, asked.concepts, strict=True)
            )
            return Finding(
                tuple(ranks),
                self.judge.styles[int(whole.style[row].argmax())],
                int(whole.count[row].argmax()) + 1,
                tuple(ground_at(pixels, place) for place in places) if asked.ground else (),
            )

        ways = [seen(asked.places)]
        if asked.is_either_way:
            ways.append(seen(asked.places[::-1]))
        return min(ways, key=lambda way: (not has_all(asked, way), sum(way.ranks)))


def as_pixels(pictures: Sequence[Image]) -> Tensor:
    """Pictures of one size to uint8 (B, 3, S, S)."""
    arrays = [np.asarray(picture.convert("RGB")) for picture in pictures]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def scores(asked: Sequence[Asked], findings: Sequence[Finding]) -> dict[str, dict[str, float]]:
    """By group: `images`; for PAIRS shares concept_top1, concept_top5 and style_top1; for SCENES
    `right`, the share of pictures that have all that was asked for."""
    groups: dict[str, list[tuple[Asked, Finding]]] = {}
    for pair in zip(asked, findings, strict=True):
        groups.setdefault(pair[0].group, []).append(pair)
    return {name: dict(_shares(name, pairs)) for name, pairs in groups.items()}


def _shares(group: str, pairs: Sequence[tuple[Asked, Finding]]) -> Iterator[tuple[str, float]]:
    yield "images", len(pairs)
    if group not in PAIRS:
        yield "right", fmean(has_all(*pair) for pair in pairs)
        return
    yield "concept_top1", fmean(found.ranks[0] < 1 for _, found in pairs)
    yield "concept_top5", fmean(found.ranks[0] < PRESENT for _, found in pairs)
    yield "style_top1", fmean(found.style == asked.style for asked, found in pairs)


def named(share: str) -> str:
    """`concept_top1` in words: "concept top-1"."""
    return share.replace("_top", " top-")


def overall(scored: Mapping[str, Mapping[str, float]]) -> float:
    """GenEval's score: the mean over the six groups of scenes."""
    return fmean(scored[group]["right"] for group in SCENES)
