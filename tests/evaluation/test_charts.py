"""Charts: smoothing, runs one after another, themes."""

import io

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from dcar.evaluation.charts import DARK, LIGHT, Panel, curves_png, draw_panel, smooth, usage_png
from dcar.evaluation.run_record import Curve, RunRecord

PANEL = Panel("Loss", "nats", {"train/loss": "loss", "val/loss": "validation", "gone": "gone"})


def run(name: str, steps: int, **curves: Curve) -> RunRecord:
    return RunRecord(
        name, {"steps": steps}, {}, {k.replace("__", "/"): v for k, v in curves.items()}
    )


def drawn(*runs: RunRecord):
    axes = Figure().add_subplot()
    draw_panel(axes, PANEL, runs, LIGHT)
    return axes


def opened(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def test_smoothing_leaves_a_constant_alone_from_its_first_value_on() -> None:
    assert smooth([3.0] * 5) == pytest.approx([3.0] * 5)
    assert smooth([0.0, 1.0], weight=0.5) == pytest.approx([0.0, 2 / 3])


def test_a_run_begins_where_the_one_before_ended() -> None:
    curve = Curve([1, 9], [2.0, 1.0])
    axes = drawn(run("a", 10, train__loss=curve), run("b", 20, train__loss=curve))
    lines = [line.get_xdata() for line in axes.get_lines() if line.get_label() == "loss"]
    assert [list(line) for line in lines] == [[1, 9], [11, 19]]
    assert axes.get_xlim() == (0, 30)


def test_the_legend_names_each_curve_once_and_no_missing_one() -> None:
    curve = Curve([1, 9], [2.0, 1.0])
    axes = drawn(run("a", 10, train__loss=curve), run("b", 20, train__loss=curve, val__loss=curve))
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["loss", "validation"]


def test_a_dense_curve_is_drawn_with_its_average() -> None:
    noisy = [float(value) for value in np.random.default_rng(0).normal(size=100)]
    axes = drawn(run("a", 100, train__loss=Curve(range(100), noisy)))
    raw, strong = axes.get_lines()
    assert list(raw.get_ydata()) == noisy
    assert np.std(strong.get_ydata()[20:]) < 0.6 * np.std(noisy[20:])


def test_a_panel_knows_whether_any_run_logged_it() -> None:
    assert PANEL.has_data([run("a", 1), run("b", 1, val__loss=Curve([1], [1.0]))])
    assert not PANEL.has_data([run("a", 1, other=Curve([1], [1.0]))])


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_a_chart_has_its_theme_s_paper(theme) -> None:
    paper = [int(theme.paper[place : place + 2], 16) for place in (1, 3, 5)]
    curve = run("a", 10, train__loss=Curve([1, 9], [2.0, 1.0]))
    for png in (curves_png([(PANEL, [curve])], theme), usage_png([5, 0, 3], theme)):
        assert opened(png)[0, 0].tolist() == paper


def test_panels_fill_rows_of_columns() -> None:
    entry = PANEL, [run("a", 10, train__loss=Curve([1, 9], [2.0, 1.0]))]
    one, three = (
        opened(curves_png([entry], LIGHT)),
        opened(curves_png([entry] * 3, LIGHT, columns=2)),
    )
    assert three.shape == (2 * one.shape[0], 2 * one.shape[1], 3)


def test_the_order_of_the_codes_does_not_matter() -> None:
    assert np.array_equal(
        opened(usage_png([9, 1, 4, 0], LIGHT)), opened(usage_png([0, 4, 9, 1], LIGHT))
    )
    assert not np.array_equal(
        opened(usage_png([9, 1, 4, 0], LIGHT)), opened(usage_png([9, 1, 4, 2], LIGHT))
    )


def test_a_dashed_curve_has_the_colour_of_its_solid_one() -> None:
    names = {"val/a": "a", "val/b": "b", "heldout/a": "a'", "heldout/b": "b'"}
    panel = Panel("Both", "", names, frozenset({"heldout/a", "heldout/b"}))
    curve, axes = Curve([1, 9], [2.0, 1.0]), Figure().add_subplot()
    draw_panel(axes, panel, [RunRecord("a", {"steps": 9}, {}, dict.fromkeys(names, curve))], LIGHT)
    lines = {str(line.get_label()): line for line in axes.get_lines()}
    colors = {name: line.get_color() for name, line in lines.items()}
    assert colors["a"] == colors["a'"] != colors["b"] == colors["b'"]
    assert [lines[name].get_linestyle() for name in ("a", "a'")] == ["-", "--"]
