"""What is asked of a scene is in it, and the rules by which a judge finds it."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from dcar.data.scene_words import COLOURS
from dcar.data.scenes import SceneSet
from dcar.evaluation.compositional import (
    PRESENT,
    SCENES,
    Asked,
    Examiner,
    Finding,
    as_pixels,
    asked_of,
    ground_at,
    has_all,
    nearest_colour,
    overall,
    rank_of,
    scenes_of,
    scores,
    square,
)
from dcar.models.judge import Judge, Verdict, load_judge
from tests.toys import ROOT

EMOJI = ROOT / "assets" / "emoji"
EACH = 25


@pytest.fixture(scope="module")
def scene_set() -> SceneSet:
    return SceneSet(
        f"{EMOJI}/train-00000[01].tar",
        concepts=EMOJI / "concepts.json",
        scenes=4000,
        side=64,
        seed=7,
    )


@pytest.fixture(scope="module")
def asked(scene_set: SceneSet) -> list[Asked]:
    return scenes_of(scene_set, EACH)


@pytest.fixture(scope="module")
def examiner() -> Examiner:
    return Examiner(load_judge())


def test_every_group_has_as_many_scenes_as_asked_for(asked: list[Asked]) -> None:
    assert [one.group for one in asked] == [group for group in SCENES for _ in range(EACH)]


def test_what_is_asked_is_what_the_scene_holds(scene_set: SceneSet) -> None:
    groups = set()
    for number in range(200):
        scene = scene_set.scene(number)
        asked = asked_of(scene)
        groups.add(asked.group)
        drawn = [one.drawing.key.split("/")[1] for one in scene.placed]
        assert asked.caption == scene.caption and set(asked.concepts) == set(drawn)
        assert len(asked.places) == len(asked.concepts) == (2 if len(set(drawn)) == 2 else 1)
        assert asked.count == (len(drawn) if asked.group == "counting" else None)
        for placed, place in zip(scene.placed, asked.places, strict=False):
            left, top, right, bottom = placed.box
            middle = (left + right) / 2, (top + bottom) / 2
            if place in ("left", "right"):
                assert (middle[0] < 32) == (place == "left")
            if place in ("top", "bottom"):
                assert (middle[1] < 32) == (place == "top")
    assert groups == set(SCENES)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"coloured": 0.0}, "found 0 of colours"),
        ({"kinds": {"single": 1.0}}, "0 of two objects, 0 of counting"),
        ({"scenes": 20}, "scenes=25 of each group are asked for; found "),
    ],
)
def test_a_group_without_enough_scenes_is_named(options: dict, message: str) -> None:
    given = {"concepts": EMOJI / "concepts.json", "scenes": 4000, "side": 16} | options
    with pytest.raises(ValueError, match=message):
        scenes_of(SceneSet(f"{EMOJI}/val-*.tar", **given), EACH)


class Counting(Judge):
    """How many pictures were looked at."""

    looked = 0

    def forward(self, image: torch.Tensor) -> Verdict:
        self.looked += len(image)
        return super().forward(image)


def test_a_picture_is_looked_at_where_something_is_asked_of_it_alone(asked: list[Asked]) -> None:
    some = asked[:3] + [one for one in asked if one.group == "position"][:4]
    shipped = load_judge()
    expected = Examiner(shipped).findings(some, [one.real for one in some])
    counting = load_judge()
    counting.__class__ = Counting
    found = Examiner(counting, batch_size=2).findings(some, [one.real for one in some])
    assert found == expected
    assert counting.looked == len(some) + sum(len(one.places) for one in some[3:])


def test_a_caption_that_says_no_order_may_be_drawn_in_either(asked: list[Asked]) -> None:
    for one in asked:
        words = one.caption
        has_order = any(f" {w} " in words for w in ("left of", "right of", "above", "below"))
        if one.group in ("two objects", "position"):
            assert one.is_either_way != has_order, words


@pytest.mark.parametrize("name", COLOURS)
def test_a_colour_is_told_by_its_name_through_noise(name: str) -> None:
    pixels = torch.tensor(COLOURS[name])[:, None].expand(3, 50).clone()
    pixels[:, :20] = 128  # less than half of them something else
    assert nearest_colour(pixels.to(torch.uint8)) == name


def test_the_ground_is_looked_at_in_the_corners_of_each_half() -> None:
    picture = Image.new("RGB", (64, 64), COLOURS["red"])
    picture.paste(COLOURS["blue"], (32, 0, 64, 64))
    picture.paste(COLOURS["green"], (6, 6, 58, 58))
    pixels = as_pixels([picture])[0]
    assert ground_at(pixels, "left") == "red" and ground_at(pixels, "right") == "blue"


def test_squares_lie_where_their_names_say() -> None:
    image = torch.arange(64.0)[:, None] * 100 + torch.arange(64.0)  # row * 100 + column
    image = image.expand(1, 3, 64, 64)
    corners = {place: square(image, place)[0, 0, 0, 0].item() for place in ("left", "right")}
    assert corners == {"left": 1600, "right": 1632}
    assert square(image, "top")[0, 0, 0, 0] == 16 and square(image, "bottom")[0, 0, 0, 0] == 3216
    assert square(image, "whole").shape == (1, 3, 64, 64)


def test_a_rank_counts_those_that_are_likelier() -> None:
    logits = torch.tensor([0.1, 0.9, 0.5])
    assert [rank_of(logits, label) for label in range(3)] == [2, 0, 1]


def ask(**changes) -> Asked:
    picture = Image.new("RGB", (8, 8))
    given = Asked("counting", "two cats", ("cat",), "flat", picture, count=2)
    return replace(given, **changes)


@pytest.mark.parametrize(
    ("changes", "finding", "is_right"),
    [
        ({}, Finding((0,), "3d", 2, ()), True),  # the style does not matter
        ({}, Finding((PRESENT - 1,), "flat", 2, ()), True),
        ({}, Finding((PRESENT,), "flat", 2, ()), False),
        ({}, Finding((0,), "flat", 3, ()), False),
        ({"count": None, "ground": ("red",)}, Finding((0,), "flat", 1, ("red",)), True),
        ({"count": None, "ground": ("red",)}, Finding((0,), "flat", 1, ("pink",)), False),
    ],
)
def test_all_that_is_asked_for_must_be_there(changes, finding: Finding, is_right: bool) -> None:
    assert has_all(ask(**changes), finding) == is_right


def test_scores_are_shares_of_each_group() -> None:
    known = ask(group="known", count=None)
    asked = [known, known, ask(), ask()]
    findings = [Finding((0,), "flat", 1, ()), Finding((3,), "3d", 1, ())]
    findings += [Finding((0,), "flat", 2, ()), Finding((0,), "flat", 1, ())]
    assert scores(asked, findings) == {
        "known": {"images": 2, "concept_top1": 0.5, "concept_top5": 1.0, "style_top1": 0.5},
        "counting": {"images": 2, "right": 0.5},
    }
    assert overall({group: {"right": 0.1 * n} for n, group in enumerate(SCENES)}) == pytest.approx(
        0.25
    )


@pytest.mark.slow
def test_true_scenes_are_mostly_found_right(asked: list[Asked], examiner: Examiner) -> None:
    found = scores(asked, examiner.findings(asked, [one.real for one in asked]))
    assert overall(found) >= 0.6
    assert found["single object"]["right"] >= 0.8 and found["colours"]["right"] >= 0.6


@pytest.mark.slow
def test_pictures_of_other_prompts_are_found_wrong(asked: list[Asked], examiner: Examiner) -> None:
    others = [one.real for one in asked]
    others = others[EACH // 2 :] + others[: EACH // 2]
    assert overall(scores(asked, examiner.findings(asked, others))) <= 0.05


@pytest.mark.slow
def test_the_places_of_a_position_are_not_exchanged(examiner: Examiner, asked: list[Asked]) -> None:
    """The same objects the other way round are wrong where an order is said, else right."""
    either_way = ("two objects", "colour attribution")
    pairs = [one for one in asked if one.group in ("position", *either_way)]
    turned = [exchanged(one) for one in pairs]
    found = scores(pairs, examiner.findings(pairs, turned))
    straight = scores(pairs, examiner.findings(pairs, [one.real for one in pairs]))
    assert found["position"]["right"] <= 0.1 < straight["position"]["right"]
    for group in either_way:
        assert found[group] == straight[group] and found[group]["right"] > 0.5


def exchanged(asked: Asked) -> Image.Image:
    """The two halves of a scene in each other's place."""
    picture, side = asked.real, asked.real.width
    swapped = picture.copy()
    is_stacked = asked.places[0] in ("top", "bottom")
    half = (side, side // 2) if is_stacked else (side // 2, side)
    far = (0, side // 2) if is_stacked else (side // 2, 0)
    swapped.paste(picture.crop((0, 0, *half)), far)
    swapped.paste(picture.crop((*far, side, side)), (0, 0))
    return swapped


def test_a_concept_that_the_judge_never_saw_is_named(examiner: Examiner) -> None:
    with pytest.raises(ValueError, match="unicorn-of-glass"):
        examiner.findings([ask(concepts=("unicorn-of-glass",))], [Image.new("RGB", (64, 64))])


def test_the_judge_of_any_size_of_batch_says_the_same(asked: list[Asked]) -> None:
    judge: Judge = load_judge()
    pictures = [one.real for one in asked[:10]]
    alone, together = (
        Examiner(judge, batch_size=size).findings(asked[:10], pictures) for size in (3, 64)
    )
    assert alone == together
