"""Splits: what is held out is really new, and nothing gets lost."""

from collections import Counter

import pytest
from PIL import Image, ImageDraw

from dcar.data.sources.emoji_splits import is_blank, near_copies, split_pairs

PAIRS = [(f"c{number:03d}", style) for number in range(200) for style in ("a", "b", "c", "d")]


def drawing(colour: str, kind: str = "ellipse", *, margin: int = 10) -> Image.Image:
    picture = Image.new("RGBA", (64, 64))
    getattr(ImageDraw.Draw(picture), kind)((margin, margin, 64 - margin, 64 - margin), fill=colour)
    return picture


def test_empty_and_white_pictures_are_blank_and_small_marks_are_not():
    assert is_blank(Image.new("RGBA", (64, 64)))
    assert is_blank(drawing("white"))
    assert not is_blank(drawing("black", margin=26))


def test_a_copy_with_another_margin_is_found_whatever_it_is_called():
    pictures = {
        ("apple", "a"): drawing("red", margin=10),
        ("tomato", "b"): drawing("red", margin=14),
        ("sky", "a"): drawing("blue", "rectangle"),
    }
    assert near_copies(pictures) == {("apple", "a"), ("tomato", "b")}


def test_one_concept_is_judged_more_strictly_than_two():
    shades = {("c", "a"): drawing("#c80000"), ("c", "b"): drawing("#ff2828")}
    assert near_copies(shades) == set(shades)
    apart = {("c", "a"): drawing("#c80000"), ("d", "b"): drawing("#ff2828")}
    assert near_copies(apart) == set()


@pytest.mark.parametrize("seed", [0, 1])
def test_the_splits_share_out_all_pairs_once(seed):
    splits = split_pairs(PAIRS, set(), seed=seed, val=0.05, heldout=0.06)
    assert Counter(pair for pairs in splits.values() for pair in pairs) == Counter(PAIRS)
    assert [len(splits[name]) for name in ("val", "heldout")] == [40, 48]


def test_held_out_concepts_stay_in_train_twice_and_copies_never_are_held_out():
    copies = {pair for pair in PAIRS if pair[1] in "ab"}
    splits = split_pairs(PAIRS, copies, seed=0, val=0.05, heldout=0.2)
    train = Counter(code for code, _ in splits["train"])
    assert splits["heldout"] and not copies & set(splits["heldout"])
    assert all(train[code] >= 2 for code, _ in splits["heldout"])
    assert len({code for code, _ in splits["heldout"]}) == len(splits["heldout"])
    assert all(train[code] >= 1 for code, _ in splits["val"])


def test_the_seed_alone_decides_and_the_order_given_does_not():
    settings = {"val": 0.05, "heldout": 0.05}
    one = split_pairs(PAIRS, set(), seed=3, **settings)
    assert one == split_pairs(PAIRS[::-1], set(), seed=3, **settings)
    assert one != split_pairs(PAIRS, set(), seed=4, **settings)
