"""The nearest caption is the one with the rare words, whatever its common ones are."""

from dcar.evaluation.retrieval import Retrieval, words_of

CAPTIONS = [
    "a red apple, flat style",
    "a red apple, 3d style",
    "a blue whale, flat style",
    "an alarm clock, noto style",
]


def test_a_caption_is_nearest_to_itself() -> None:
    assert Retrieval(CAPTIONS).nearest(CAPTIONS) == [0, 1, 2, 3]


def test_a_rare_word_weighs_more_than_common_ones() -> None:
    """Words of two captions lead away from the one that alone has "whale" or "clock"."""
    found = Retrieval(CAPTIONS).nearest(["a whale in flat style", "a red clock"])
    assert found == [2, 3]


def test_words_that_no_caption_has_change_nothing() -> None:
    found = Retrieval(CAPTIONS).nearest(["purple unicorn", "purple unicorn whale"])
    assert found == [0, 2]


def test_commas_and_capitals_are_no_part_of_a_word() -> None:
    assert words_of("A red Apple, flat") == {"a", "red", "apple", "flat"}
