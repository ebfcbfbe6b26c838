"""Which prompts count as the same words."""

import numpy as np
import pytest

from dcar.data.sources.journeydb_prompts import in_share, normalised, prompt_hash


@pytest.mark.parametrize(
    "prompt",
    [
        "A red fox, in the snow",
        "a red fox,  in the\nsnow --ar 16:9 --v 5",
        "a red fox, in the snow, --no people, text --q 2",
        "a red fox, in the snow \u2014ar 3:2",
        "<https://s.mj.run/Ab_c> a red fox, in the snow",
        "https://a.example/1.png https://a.example/2.png A red fox, in the snow. --iw 2",
    ],
)
def test_links_parameters_case_and_space_make_no_other_prompt(prompt: str) -> None:
    assert normalised(prompt) == "a red fox, in the snow"
    assert prompt_hash(prompt) == prompt_hash("a red fox, in the snow")


@pytest.mark.parametrize(
    "prompt",
    [
        "a red fox in the snow",
        "a red fox, in the snow -- tired",
        "a red fox, in the snow \u2014 art",
    ],
)
def test_other_words_make_another_prompt(prompt: str) -> None:
    assert prompt_hash(prompt) != prompt_hash("a red fox, in the snow")


def test_a_prompt_of_links_alone_is_told_from_others() -> None:
    first, second = "https://s.mj.run/a --v 4", "https://s.mj.run/b --v 4"
    assert prompt_hash(first) != prompt_hash(second)
    assert normalised(first) == first


def test_a_prompt_that_is_no_unicode_has_a_hash() -> None:
    assert 0 <= prompt_hash("broken \ud800 text") < 2**64


def test_a_share_of_hashes_is_a_share_of_prompts() -> None:
    hashes = [prompt_hash(f"prompt {number}") for number in range(4000)]
    assert np.mean([in_share(number, 0.25) for number in hashes]) == pytest.approx(0.25, abs=0.03)
    assert not any(in_share(number, 0.0) for number in hashes)
    assert in_share(2**63 - 1, 0.5) and not in_share(2**63, 0.5)
