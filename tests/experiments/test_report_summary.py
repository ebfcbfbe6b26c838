"""The headline figures and what is said of them."""

import math
from typing import Any

import pytest

from experiments.report_summary import both_paths, generator_cards, introduction, tokenizer_cards


@pytest.fixture
def figures() -> dict[str, Any]:
    return {
        "tokenizer": {
            "psnr_hybrid": 31.256,
            "psnr_discrete": 25.5,
            "rfid_mobilenetv2_hybrid": 4.0,
            "rfid_mobilenetv2_discrete": 8.0,
            "codebook_usage": 0.987,
            "codebook_perplexity": 700.4,
        },
        "generator": {
            "token": 4.1,
            "token_shuffled": 4.9,
            "heldout_token": 4.3,
            "heldout_token_shuffled": 5.0,
            "gfid_mobilenetv2": 60.0,
        },
        "runs": {"a": {}, "b": {}},
        "seconds": {"total": 750.0},
        "model": {"size": 64, "downsample": 8, "num_codes": 1024},
        "images": {"val": 440, "heldout": 480},
        "splits": ["val", "heldout"],
    }


def test_the_tokenizer_s_cards_give_hybrid_before_discrete(figures) -> None:
    values = [value for _, value, _ in tokenizer_cards(figures)]
    assert values == ["31.26 | 25.50 dB", "4.00 | 8.00", "98.7 %"]


def test_the_generator_s_cards_have_a_pair_a_split_and_the_price_of_guessing(figures) -> None:
    entries = generator_cards(figures)
    assert [value for _, value, _ in entries[:2]] == ["4.100 | 4.900", "4.300 | 5.000"]
    assert f"{math.log(1024):.2f}" in entries[0][2]
    assert ["60.0", "12.5 min"] == [value for _, value, _ in entries[2:]]


def test_figures_of_a_frechet_distance_warn_of_their_network(figures) -> None:
    assert "comparable only with itself" in tokenizer_cards(figures)[1][2]
    found = figures["tokenizer"]
    for path in ("hybrid", "discrete"):
        found[f"rfid_inception_{path}"] = found.pop(f"rfid_mobilenetv2_{path}")
    assert "440 pictures only" in tokenizer_cards(figures)[1][2]


def test_without_frechet_distances_there_is_no_card_for_them(figures) -> None:
    del figures["generator"]["gfid_mobilenetv2"]
    assert not [name for name, _, _ in generator_cards(figures) if "gFID" in name]


def test_a_figure_that_is_not_known_is_a_dash(figures) -> None:
    figures["tokenizer"]["psnr_hybrid"] = None
    assert tokenizer_cards(figures)[0][1] == "– | 25.50 dB"
    assert both_paths({}, "psnr", 2) == "–"


def test_the_introduction_tells_sizes_and_time(figures) -> None:
    for words in ("2 trainings", "12 minutes", "64 px", "8 x 8 codes", "1,024"):
        assert words in introduction(figures)
