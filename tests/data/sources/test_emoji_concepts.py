"""Names and captions of emoji."""

import json
from collections import Counter

import pytest

from dcar.data.sources.emoji_concepts import (
    Concept,
    caption_of,
    keyword_frequency,
    phrase_of,
    read_concepts,
    read_shortcodes,
    slugify,
)


@pytest.mark.parametrize(
    "name, phrase",
    [
        ("red apple", "a red apple"),
        ("avocado", "an avocado"),
        ("unicorn", "a unicorn"),
        ("hourglass done", "an hourglass done"),
        ("euro banknote", "a euro banknote"),
        ("french fries", "french fries"),
        ("dress", "a dress"),
        ("octopus", "an octopus"),
        ("glass of milk", "a glass of milk"),
        ("people with bunny ears", "people with bunny ears"),
        ("person lifting weights", "a person lifting weights"),
        ("water buffalo", "a water buffalo"),
        ("bread", "bread"),
        ("flag: Côte d’Ivoire", "the flag of Cote d'Ivoire"),
        ("keycap: 3", "a keycap 3"),
        ("three o’clock", "a clock showing three o'clock"),
        ("two-thirty", "a clock showing two-thirty"),
        ("woman: red hair", "a woman with red hair"),
        ("man: beard", "a man with a beard"),
        ("person: bald", "a bald person"),
        ("man running: facing right", "a man running facing right"),
        ("family: man, boy", "a family, man, boy"),
        ("SOS button", "an SOS button"),
        ("piñata", "a pinata"),
    ],
)
def test_a_name_becomes_what_a_person_would_write(name, phrase):
    assert phrase_of(name) == phrase


@pytest.mark.parametrize(
    "name, slug",
    [
        ("keycap: #", "keycap-hash"),
        ("keycap: *", "keycap-asterisk"),
        ("Japanese “here” button", "japanese-here-button"),
        ("woman’s hat", "womans-hat"),
        ("flag: St. Kitts & Nevis", "flag-st-kitts-and-nevis"),
    ],
)
def test_a_slug_is_letters_digits_and_hyphens(name, slug):
    assert slugify(name) == slug


def apple(*keywords: str) -> Concept:
    return Concept("red-apple", "red apple", "a red apple", "1f34e", "", "food & drink", keywords)


def test_a_caption_tells_name_style_and_the_commonest_new_keywords():
    frequency = Counter(food=9, fruit=5, diet=1, health=1, red=7)
    concept = apple("red", "health", "diet", "food", "fruit")
    assert (
        caption_of(concept, "flat style", frequency) == "a red apple, flat style, food, fruit, diet"
    )


def test_a_caption_leaves_out_keywords_that_say_nothing():
    concept = apple("143", "<3", "the", "up", "apple", "snack")
    assert caption_of(concept, "flat style", Counter()) == "a red apple, flat style, snack"


def test_a_caption_never_outgrows_its_bytes():
    concept = apple("x" * 40, "y" * 40, "z" * 5)
    caption = caption_of(concept, "flat style", Counter())
    assert len(caption) <= 96 and caption.endswith(", " + "z" * 5)


def test_frequency_counts_concepts_not_mentions():
    assert keyword_frequency({"a": apple("x", "x", "y"), "b": apple("x")}) == Counter(x=2, y=1)


def emojibase(folder, labels: dict[str, str]) -> None:
    (folder / "en" / "shortcodes").mkdir(parents=True)
    groups = [{"order": 0, "message": "smileys"}, {"order": 2, "message": "components"}]
    (folder / "en" / "messages.json").write_text(json.dumps({"groups": groups}))
    entries = [
        {
            "label": label,
            "hexcode": code,
            "emoji": "*",
            "tags": ["t"],
            "group": 2 if "skin" in label else 0,
        }
        for code, label in labels.items()
    ]
    (folder / "en" / "data.json").write_text(json.dumps(entries))
    short = {"1F600": ["grin", "smile"], "9999": "other"}
    (folder / "en" / "shortcodes" / "chat.json").write_text(json.dumps(short))


def test_concepts_are_read_without_components(tmp_path):
    emojibase(tmp_path, {"1F600": "grinning face", "1F3FB": "light skin tone"})
    concepts = read_concepts(tmp_path)
    assert {code: concept.slug for code, concept in concepts.items()} == {"1f600": "grinning-face"}
    assert concepts["1f600"].facts()["category"] == "smileys"
    assert read_shortcodes(tmp_path, concepts) == {"1f600": ["grin", "smile"]}


def test_two_emoji_of_one_slug_are_refused(tmp_path):
    emojibase(tmp_path, {"1F600": "grinning face", "1F601": "grinning: face"})
    with pytest.raises(ValueError, match="one slug"):
        read_concepts(tmp_path)
