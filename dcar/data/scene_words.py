"""What is said of a scene: plural nouns, places, colours, and which drawings may be mirrored."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

NUMBERS = {2: "two", 3: "three", 4: "four"}
COLOURS = {
    "red": (214, 69, 65),
    "orange": (240, 150, 60),
    "yellow": (246, 215, 88),
    "green": (96, 176, 96),
    "blue": (84, 134, 214),
    "purple": (148, 103, 189),
    "pink": (242, 167, 195),
    "brown": (150, 108, 76),
    "gray": (150, 150, 150),
    "black": (30, 30, 30),
    "white": (255, 255, 255),
}
COUNTED = ("animals & nature", "food & drink", "objects", "travel & places", "activities")
NOT_MIRRORED = ("flags", "symbols")
# Drawings with letters, digits or a side of their own.
SIDED = re.compile(
    r"\b(left|right|leftwards|rightwards|chart|facing|oncoming|pointing|clock|watch|calendar|"
    r"keyboard|keycap|book|books|"
    r"newspaper|abacus|ruler|receipt|dollar|euro|pound|yen|ticket|sign|medal|map|globe|die|"
    r"mahjong|card|joker|computer|atm|sos|thirty|o'clock|first|last|waxing|waning|quarter|"
    r"crescent|guitar|violin|e-mail|dvd|label|score|slot|store|8)\b"
)
# A noun with something after it: "a person with ...", where the end of the phrase has no plural.
JOINED = re.compile(r" (?:with|without|of|in|on|at|over|under|for|to|behind|showing|by|and|as) |,")
NO_PLURAL = (  # last words of "... tilted left", "a high voltage"
    "left",
    "right",
    "up",
    "volume",
    "voltage",
    "pong",
)
IRREGULAR = {
    "mouse": "mice",
    "goose": "geese",
    "ox": "oxen",
    "snowman": "snowmen",
    "knife": "knives",
    "leaf": "leaves",
    "wolf": "wolves",
    "shelf": "shelves",
    "scarf": "scarves",
    "potato": "potatoes",
    "tomato": "tomatoes",
    "mango": "mangoes",
    "volcano": "volcanoes",
    "mosquito": "mosquitoes",
    "tornado": "tornadoes",
    "fish": "fish",
    "blowfish": "blowfish",
    "jellyfish": "jellyfish",
    "sheep": "sheep",
    "deer": "deer",
    "moose": "moose",
    "bison": "bison",
    "squid": "squid",
    "shrimp": "shrimp",
}


@dataclass(frozen=True)
class Subject:
    """What a drawing shows and how. phrase: "a red apple"; style: "flat style"."""

    phrase: str
    style: str
    category: str
    keywords: tuple[str, ...] = ()

    @property
    def may_be_mirrored(self) -> bool:
        return self.category not in NOT_MIRRORED and not SIDED.search(self.phrase)

    @property
    def plural(self) -> str | None:
        """ "red apples"; None for what is not counted, or has no plain plural."""
        article, _, noun = self.phrase.partition(" ")
        if article not in ("a", "an") or self.category not in COUNTED or JOINED.search(self.phrase):
            return None
        return plural(noun)


def plural(noun: str) -> str | None:
    """Of a noun with words before it; None where the last word seems to be one already."""
    before, space, last = noun.rpartition(" ")
    if last in IRREGULAR:
        return f"{before}{space}{IRREGULAR[last]}"
    if not re.fullmatch(r"[a-z-]+", last) or re.search(r"[^su]s$|ing$|ese$|done$", last):
        return None
    if last in NO_PLURAL:
        return None
    if re.search(r"(s|x|z|ch|sh)$", last):
        return f"{noun}es"
    if re.search(r"[^aeiou]y$", last):
        return f"{noun[:-1]}ies"
    return f"{noun}s"


def single(subject: Subject, background: str | None, rng: random.Random) -> str:
    """One object; the background is told where it is not the usual white."""
    phrase, style = subject.phrase, subject.style
    if background is not None:
        article = "an" if background == "orange" else "a"
        phrase += f" on {article} {background} background"
    keywords = rng.sample(subject.keywords, min(len(subject.keywords), rng.randint(0, 3)))
    forms = (
        ", ".join([phrase, style, *keywords]),
        f"{phrase}, {style}",
        f"{phrase} in {style}",
        f"a picture of {phrase}, {style}",
        phrase,
    )
    return rng.choices(forms, weights=(4, 3, 1, 1, 1))[0]


def related(first: Subject, relation: str, second: Subject, rng: random.Random) -> str:
    """Two objects: "a cat above a pizza". relation: a key of RELATIONS, of the first to the second.

    The same is said the other way round half of the time.
    """
    if rng.random() < 0.5:
        first, relation, second = second, OPPOSITES[relation], first
    words = rng.choice(RELATIONS[relation])
    return in_style(f"{first.phrase} {words} {second.phrase}", first, second)


RELATIONS = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above",),
    "below": ("below",),
    "beside": ("and", "next to", "beside"),
}
OPPOSITES = {
    "left": "right",
    "right": "left",
    "above": "below",
    "below": "above",
    "beside": "beside",
}


def counted(subject: Subject, number: int) -> str:
    """ "three red apples, flat style"; the subject has a plural."""
    return in_style(f"{NUMBERS[number]} {subject.plural}", subject)


def coloured(subjects: Sequence[Subject], colours: Sequence[str]) -> str:
    """Two objects, each on its own colour."""
    parts = [
        f"{subject.phrase} on {colour}" for subject, colour in zip(subjects, colours, strict=True)
    ]
    return in_style(" and ".join(parts), *subjects)


def in_style(words: str, *subjects: Subject) -> str:
    """The style is told where all have the same."""
    styles = {subject.style for subject in subjects}
    return f"{words}, {styles.pop()}" if len(styles) == 1 else words
