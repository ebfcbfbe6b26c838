"""Charts of a data set and the contact sheet: what is drawn, where, and in readable lines."""

import io
from collections import Counter

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from dcar.data.stats import SplitStats, Stats
from dcar.evaluation.charts import DARK, LIGHT
from dcar.evaluation.data_charts import (
    ALARM,
    GROUND,
    MARGIN,
    Cell,
    contact_sheet,
    panels,
    sans,
    stats_png,
    wrap,
)


def split(name: str, count: int, **changes) -> SplitStats:
    rng = np.random.default_rng(count)
    values = {
        "shards": 1,
        "samples": count,
        "looked": count,
        "bytes": 1000,
        "sizes": rng.integers(200, 900, (count, 2)),
        "words": rng.integers(3, 60, count),
        "caption_bytes": rng.integers(20, 400, count),
        "formats": Counter(jpg=count),
        "classes": Counter(),
        "skipped": Counter(),
        "dropped": Counter(),
    }
    return SplitStats(name, **(values | changes))


def draw(stats: Stats) -> dict[str, object]:
    """Title -> axes."""
    found = {}
    for panel in panels(stats):
        axes = Figure().add_subplot()
        panel(axes, LIGHT)
        found[axes.get_title(loc="left")] = axes
    return found


def colour(name: str) -> list[int]:
    return [int(name[place : place + 2], 16) for place in (1, 3, 5)]


def test_only_what_there_is_has_a_panel() -> None:
    full = split("train", 50, classes=Counter({1: 20, 2: 30}), dropped=Counter(small=3))
    assert list(draw(Stats("x", [full]))) == [
        "Samples of each split",
        "Shorter edge",
        "Aspect ratio",
        "Caption length in words",
        "Caption length in bytes",
        "Kinds of files",
        "Left out: dropped by the build, skipped by a stream",
        "Samples of each class",
    ]
    none = np.empty(0, np.int32)
    tokens = split("train", 9, sizes=none.reshape(0, 2), words=none, caption_bytes=none)
    assert list(draw(Stats("x", [tokens]))) == ["Samples of each split", "Kinds of files"]


def test_a_histogram_is_in_percent_of_each_split() -> None:
    axes = draw(Stats("x", [split("train", 5000), split("val", 50)]))["Caption length in words"]
    lines = [patch for patch in axes.patches if patch.get_label() in ("train", "val")]
    assert [line.get_data().values.sum() for line in lines] == pytest.approx([100, 100])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["train", "val"]


def test_reasons_are_summed_over_splits_and_the_longest_bar_is_on_top() -> None:
    stats = Stats(
        "x",
        [
            split("train", 9, dropped=Counter({"too small": 5}), skipped=Counter({"no image": 1})),
            split("val", 9, dropped=Counter({"too small": 2})),
        ],
    )
    axes = draw(stats)["Left out: dropped by the build, skipped by a stream"]
    assert [text.get_text() for text in axes.get_yticklabels()] == [
        "skipped: no image",
        "dropped: too small",
    ]
    assert [text.get_text() for text in axes.texts] == [" 1", " 7"]


def test_ratios_of_width_to_height_are_named_on_a_log_scale() -> None:
    axes = draw(Stats("x", [split("train", 50)]))["Aspect ratio"]
    names = [axes.xaxis.get_major_formatter()(place) for place in axes.get_xticks()]
    assert axes.get_xscale() == "log" and names == ["1:4", "1:2", "3:4", "1:1", "4:3", "2:1", "4:1"]


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_the_chart_is_a_png_on_the_theme_s_paper(theme) -> None:
    image = Image.open(io.BytesIO(stats_png(Stats("x", [split("train", 50)]), theme)))
    assert list(image.convert("RGB").getpixel((0, 0))) == colour(theme.paper)


def test_lines_fit_their_width_and_lose_no_word() -> None:
    font, text = sans(12), "a photograph of the very old lighthouse at dusk " * 3
    lines = wrap(text, font, 150, 20)
    assert max(map(font.getlength, lines)) <= 150 and " ".join(lines) == text.strip()
    assert len(lines) > 5


def test_a_long_text_ends_in_dots_and_a_long_word_is_broken() -> None:
    font = sans(12)
    lines = wrap("word " * 200, font, 150, 4)
    assert len(lines) == 4 and lines[-1].endswith("…") and font.getlength(lines[-1]) <= 150
    lines = wrap("x" * 100, font, 150, 20)
    assert "".join(lines) == "x" * 100 and max(map(font.getlength, lines)) <= 150
    assert wrap("", font, 150, 4) == []


def test_a_picture_lies_whole_in_the_middle_of_its_square() -> None:
    wide = Cell("a", picture=Image.new("RGB", (400, 200), (255, 0, 0)))
    small = Cell("b", picture=Image.new("RGB", (20, 20), (0, 0, 255)))
    page = np.asarray(contact_sheet([wide, small], side=200, columns=8))
    first = page[MARGIN : MARGIN + 200, MARGIN : MARGIN + 200]
    assert first[0, 100].tolist() == colour(GROUND) and first[100, 1].tolist() == [255, 0, 0]
    second = page[MARGIN : MARGIN + 200, 2 * MARGIN + 200 : 2 * MARGIN + 400]
    blue = (second == (0, 0, 255)).all(axis=2)
    assert blue.sum() == 40 * 40 and blue[80:120, 80:120].all()  # at most twice its size


def test_rows_grow_with_their_longest_caption() -> None:
    short, long = Cell("a", "a cat"), Cell("b", "a cat on a mat " * 9)
    one = contact_sheet([short] * 2, columns=2).height
    assert contact_sheet([short, long], columns=2).height > one
    assert contact_sheet([short] * 4, columns=2).height == 2 * one


def test_a_fault_is_written_where_the_picture_would_be() -> None:
    page = np.asarray(contact_sheet([Cell("a", fault="broken image")]))
    square = page[MARGIN : MARGIN + 224, MARGIN : MARGIN + 224]
    assert (square == colour(ALARM)).all(axis=2).any()


@pytest.mark.parametrize(("cells", "columns"), [([], 8), ([Cell("a")], 0)])
def test_an_empty_sheet_is_refused(cells, columns: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        contact_sheet(cells, columns=columns)


def test_a_long_caption_without_spaces_is_read_no_further_than_it_is_shown() -> None:
    font, text = sans(12), "猫" * 16_000
    lines = wrap(text, font, 200, 4)
    assert lines[:3] == wrap(text[:100], font, 200, 99)[:3] and lines[3].endswith("…")
    assert "".join(wrap("x" * 300, font, 150, 99)) == "x" * 300
