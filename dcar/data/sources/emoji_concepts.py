"""What an emoji shows, in words: its name, keywords and the caption that goes with a drawing."""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from dcar.data.sources.emoji_art import plain_code

CAPTION_BYTES = 96  # what a byte tokenizer with 96 tokens reads
CAPTION_KEYWORDS = 3
COMPONENTS = 2  # emojibase's group of skin tones and hair: parts, not pictures

_WITHOUT_ARTICLE = frozenset(
    """bread bacon popcorn butter salt garlic cooking camping ice cream sake candy custard rice
    sushi spaghetti oden fondue falafel food curry fire rain fog foggy coral broccoli yarn thread
    soap wood dna om luggage customs construction breast-feeding cinema money information
    music collision
    dizzy tennis badminton lacrosse bowling softball baseball basketball volleyball football hockey
    multiply plus minus divide infinity vibration wireless copyright registered sunrise sunset
    people men women prohibited radioactive biohazard warning locked unlocked water zzz claus fuji
    aries taurus gemini cancer leo virgo libra scorpio sagittarius capricorn aquarius pisces
    ophiuchus kaaba way""".split()
)
_EMPTY_WORDS = frozenset("not up you the over no on it of to and in is off".split())
_HEAD_ENDS = re.compile(
    r" (?:with|without|of|in|on|at|over|under|for|to|behind|showing|by|from|and|as|holding|"
    r"facing|tilted|pointing|pointed|curving|blowing|savoring|screaming)\b|[,(:]"
    r"|(?<=person) \w+ing\b|(?<=man) \w+ing\b"
)


@dataclass(frozen=True)
class Concept:
    """One emoji without skin tone. `slug` is its name in file names."""

    slug: str
    name: str
    phrase: str
    codes: str
    emoji: str
    category: str
    keywords: tuple[str, ...]

    def facts(self) -> dict:
        return asdict(self) | {"keywords": list(self.keywords)}


def plain_text(text: str) -> str:
    """ASCII letters only, curly quotes straightened: 'piñata' -> 'pinata'."""
    straight = text.translate({0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"'})
    return unicodedata.normalize("NFKD", straight).encode("ascii", "ignore").decode()


def slugify(name: str) -> str:
    """'keycap: #' -> 'keycap-hash'; unique over the emoji, so it serves as a file name."""
    words = plain_text(name).lower().replace("'", "").replace("&", " and ")
    words = words.replace("#", " hash ").replace("*", " asterisk ")
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-")


def phrase_of(name: str) -> str:
    """The name as a person would write it in a prompt, with an article where English wants one."""
    name = plain_text(name)
    kind, _, rest = name.partition(": ")
    if kind == "flag":
        return f"the flag of {rest}"
    if re.search(r"o'clock$|^\S+-thirty$", name):
        return f"a clock showing {name}"
    if rest.endswith(("hair", "beard")):
        name = f"{kind} with {'a ' if rest == 'beard' else ''}{rest}"
    elif rest == "bald":
        name = f"bald {kind}"
    elif rest:
        name = (
            f"{kind} {rest}" if rest.startswith("facing") or kind == "keycap" else f"{kind}, {rest}"
        )
    return _with_article(name)


def _with_article(name: str) -> str:
    head = _HEAD_ENDS.split(name)[0].split()[-1].lower() if name else ""
    plural = head.endswith("s") and not head.endswith(("ss", "us", "is", "as", "eros"))
    if plural or head in _WITHOUT_ARTICLE:
        return name
    first = name.lower()
    sounds_open = first[0] in "aeiou" or first.startswith(("hourglass", "x-ray", "ng ", "sos "))
    sounds_closed = first.startswith(("uni", "euro", "one ", "one-"))
    return f"{'an' if sounds_open and not sounds_closed else 'a'} {name}"


def read_concepts(folder: Path) -> dict[str, Concept]:
    """Code points -> concept, for every emoji of emojibase that is a picture of its own."""
    english = folder / "en"
    groups = json.loads((english / "messages.json").read_text())["groups"]
    category = {group["order"]: group["message"] for group in groups}
    concepts: dict[str, Concept] = {}
    for entry in json.loads((english / "data.json").read_text()):
        if entry.get("group", COMPONENTS) == COMPONENTS:
            continue
        code = plain_code(entry["hexcode"])
        concepts[code] = Concept(
            slug=slugify(entry["label"]),
            name=entry["label"],
            phrase=phrase_of(entry["label"]),
            codes=code,
            emoji=entry["emoji"],
            category=category[entry["group"]],
            keywords=tuple(entry.get("tags", ())),
        )
    if len({concept.slug for concept in concepts.values()}) != len(concepts):
        raise ValueError("two emoji have one slug")
    return concepts


def read_shortcodes(folder: Path, codes: Mapping[str, Concept]) -> dict[str, list[str]]:
    """Code points -> the short names that chat programs give the emoji."""
    found: dict[str, list[str]] = {}
    for path in sorted((folder / "en" / "shortcodes").glob("*.json")):
        for code, names in json.loads(path.read_text()).items():
            if plain_code(code) in codes:
                listed = [names] if isinstance(names, str) else names
                found.setdefault(plain_code(code), []).extend(listed)
    return found


def caption_of(concept: Concept, style_phrase: str, frequency: Counter[str]) -> str:
    """'a red apple, flat style, food, fruit, diet'.

    The style stands before the keywords, so that the short prompt a user types is the caption's
    own beginning and a cut at the tokenizer's length loses keywords first. Of the keywords, those
    shared by most concepts come first (ties by alphabet): they are what the words can teach.
    """
    told = set(re.findall(r"[a-z0-9]+", f"{concept.phrase} {style_phrase}".lower()))
    fresh = [
        word
        for word in map(plain_text, concept.keywords)
        if re.search(r"[A-Za-z]{2}", word)
        and not (told | _EMPTY_WORDS) & set(re.findall(r"[a-z0-9]+", word.lower()))
    ]
    caption = f"{concept.phrase}, {style_phrase}"
    for word in sorted(fresh, key=lambda word: (-frequency[word], word))[:CAPTION_KEYWORDS]:
        if len(caption) + 2 + len(word) <= CAPTION_BYTES:
            caption += f", {word}"
    return caption


def keyword_frequency(concepts: Mapping[str, Concept]) -> Counter[str]:
    """In how many concepts each keyword occurs."""
    return Counter(
        plain_text(word) for concept in concepts.values() for word in set(concept.keywords)
    )
