"""Words about a build: sizes, reasons, rates and the time left."""

import io
import time

import pytest
from rich.console import Console

from dcar.data.build import Tally
from dcar.data.distributors import Outcome
from experiments.build_progress import ProgressLine, reasons_text, size_text, tally_text


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1 kB"), (2_346_000, "2.35 MB"), (5e15, "5000 TB")],
)
def test_sizes_are_in_units_of_a_thousand(size: float, text: str) -> None:
    assert size_text(size) == text


def test_a_tally_names_the_commonest_reason_first() -> None:
    tally = Tally(12_000, 2, 10**9, {"no caption": 3, "broken image": 1200, "a": 3})
    assert tally_text("train", tally) == (
        "train: 12,000 samples in 2 shards, 1 GB; left out: 1,200 broken image, 3 a, 3 no caption"
    )
    assert reasons_text({}) == "none"


def test_samples_left_out_are_told_by_name_where_they_are_few() -> None:
    dropped, examples = {"no caption": 2, "broken image": 1200}, {"no caption": ["cat", "dog"]}
    examples["broken image"] = ["a", "b", "c"]
    told = "1,200 broken image (a, b, c, ...), 2 no caption (cat, dog)"
    assert reasons_text(dropped, examples) == told


def console(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=200)


def said(progress: ProgressLine) -> str:
    return progress.console.file.getvalue()


def begun(progress: ProgressLine, seconds: float, images: int | None) -> None:
    """As if the work had begun so many seconds ago."""
    progress.begin("Building", 4, images)
    progress._begun = progress._said = time.monotonic() - seconds


def test_without_a_terminal_a_line_is_said_now_and_then_with_rates_and_time_left() -> None:
    progress = ProgressLine(console(terminal=False))
    begun(progress, 20.0, images=400)
    progress.tick(50, 10**6)
    assert said(progress) == ""
    begun(progress, 50.0, images=400)
    progress.finished(Outcome("train-000000", 100, 10**8))
    progress.tick(100, 10**8)
    progress.tick(101, 10**8)
    expected = "Building: 1 of 4 units, 100 images, 2 images/s, 2.0 MB/s, 0:02:30 left\n"
    assert said(progress) == expected


def test_where_the_number_of_images_is_unknown_units_tell_the_time_left() -> None:
    progress = ProgressLine(console(terminal=False))
    begun(progress, 60.0, images=None)
    progress.finished(Outcome("train-000000"))
    progress.tick(10, 10**6)
    assert "0:03:00 left" in said(progress)


def test_a_terminal_shows_a_bar_that_is_closed_at_the_end() -> None:
    progress = ProgressLine(console(terminal=True))
    progress.begin("Looking", 1, 10)
    progress.begin("Building", 2, 10)
    progress.tick(5, 100)
    progress.close()
    assert "Looking" in said(progress) and "5 images" in said(progress)
    assert "━" in said(progress) and "0 of 2 units" in said(progress)


def test_a_unit_that_failed_is_told_at_once() -> None:
    progress = ProgressLine(console(terminal=False))
    progress.begin("Building", 1, None)
    progress.finished(Outcome("train-000007", error="a/[b].tgz: breaks off"))
    assert said(progress) == "train-000007 failed: a/[b].tgz: breaks off\n"
