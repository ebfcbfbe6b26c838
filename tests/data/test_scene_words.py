"""What is said of a scene is true of it."""

import json
import random
import re

import pytest

from dcar.data import scene_words as words
from dcar.data.scene_words import Subject, plural
from tests.toys import ROOT

APPLE = Subject("a red apple", "flat style", "food & drink", ("fruit", "diet", "food"))
WHALE = Subject("a blue whale", "flat style", "animals & nature")
RAIN = Subject("rain", "3d style", "travel & places")


@pytest.mark.parametrize(
    "noun, several",
    [
        ("red apple", "red apples"),
        ("glass", "glasses"),
        ("bus", "buses"),
        ("tropical fish", "tropical fish"),
        ("kitchen knife", "kitchen knives"),
        ("strawberry", "strawberries"),
        ("toy", "toys"),
        ("peach", "peaches"),
        ("skis", None),
        ("camping", None),
        ("pool 8", None),
        ("ping pong", None),
        ("magnifying glass tilted left", None),
    ],
)
def test_plurals(noun: str, several: str | None) -> None:
    assert plural(noun) == several


@pytest.mark.parametrize(
    "phrase, category",
    [
        ("popcorn", "food & drink"),
        ("a cat with tears of joy", "animals & nature"),
        ("a family, man, woman, girl", "objects"),
        ("a green circle", "symbols"),
        ("the flag of Malta", "flags"),
        ("a woman vampire", "people & body"),
    ],
)
def test_what_is_not_counted_has_no_plural(phrase: str, category: str) -> None:
    assert Subject(phrase, "flat style", category).plural is None


def test_most_things_of_the_embedded_data_are_counted_and_no_plural_is_odd() -> None:
    concepts = json.loads((ROOT / "assets/emoji/concepts.json").read_text())
    subjects = [Subject(c["phrase"], "flat style", c["category"]) for c in concepts]
    plurals = [subject.plural for subject in subjects if subject.plural]
    assert len(plurals) > 500 and len(set(plurals)) == len(plurals)
    odd = r"[^aeiou]ys$|mans$|ess$| with |(left|right|up|volume|voltage|pong)s$"
    assert [word for word in plurals if re.search(odd, word)] == []


def test_what_has_a_side_or_letters_is_not_mirrored() -> None:
    assert WHALE.may_be_mirrored
    for phrase in ("a magnifying glass tilted left", "an alarm clock", "a newspaper"):
        assert not Subject(phrase, "flat style", "objects").may_be_mirrored
    assert not Subject("the flag of Malta", "flat style", "flags").may_be_mirrored


def test_nothing_of_the_embedded_data_is_mirrored_that_says_where_it_points() -> None:
    concepts = json.loads((ROOT / "assets/emoji/concepts.json").read_text())
    side = re.compile(r"(left|right)(ward|wards)?|(in|de)creasing|clockwise")
    for concept in concepts:
        subject = Subject(concept["phrase"], "flat style", concept["category"])
        said = [*concept["phrase"].split(), *concept["keywords"]]
        if any(side.fullmatch(word) for word in said):
            assert not subject.may_be_mirrored, concept["phrase"]


def test_a_single_object_is_named_with_its_background_in_several_ways() -> None:
    rng = random.Random(0)
    plain = {words.single(APPLE, None, rng) for _ in range(200)}
    assert {"a red apple, flat style", "a red apple in flat style", "a red apple"} <= plain
    assert all(caption.startswith(("a red apple", "a picture of a red apple")) for caption in plain)
    coloured = {words.single(APPLE, "orange", rng) for _ in range(50)}
    assert all("a red apple on an orange background" in caption for caption in coloured)


@pytest.mark.parametrize("relation", list(words.RELATIONS))
def test_a_relation_is_told_from_either_side(relation: str) -> None:
    told = {words.related(APPLE, relation, WHALE, random.Random(n)) for n in range(100)}
    for caption in told:
        first, second = sorted((APPLE, WHALE), key=lambda s: caption.index(s.phrase))
        here = relation if first is APPLE else words.OPPOSITES[relation]
        middle = caption.removeprefix(first.phrase).partition(second.phrase)[0].strip()
        assert middle in words.RELATIONS[here]
        assert caption.endswith(", flat style")
    assert {caption.startswith("a red apple") for caption in told} == {True, False}


def test_numbers_and_colours() -> None:
    assert words.counted(APPLE, 3) == "three red apples, flat style"
    assert (
        words.coloured([APPLE, RAIN], ["blue", "white"]) == "a red apple on blue and rain on white"
    )
    assert words.coloured([APPLE, WHALE], ["red", "black"]).endswith("on black, flat style")
