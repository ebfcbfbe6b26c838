"""The page's building blocks: escaping, embedded pictures, numbers."""

import base64
import io
import re

import pytest
from PIL import Image

from dcar.evaluation import report_page as html
from dcar.evaluation.report_page import Html

MARKUP = "<b onclick=\"x('&')\">"
ESCAPED = "&lt;b onclick=&quot;x(&#x27;&amp;&#x27;)&quot;&gt;"


@pytest.mark.parametrize(
    "built",
    [
        html.text(MARKUP),
        html.element("p", MARKUP),
        html.figure([], MARKUP),
        html.cards([(MARKUP, "", "")]),
        html.cards([("", MARKUP, "")]),
        html.cards([("", "", MARKUP)]),
        html.table([MARKUP], []),
        html.table([], [[MARKUP]]),
        html.section(MARKUP, ""),
        html.section("", MARKUP),
        html.image(Image.new("RGB", (1, 1)), alt=MARKUP),
        html.chart(b"", b"", alt=MARKUP),
        Html(html.page(MARKUP)),
    ],
)
def test_text_is_escaped_wherever_it_goes(built: Html) -> None:
    assert ESCAPED in built and MARKUP not in built


def test_markup_that_a_builder_made_is_not_escaped_again() -> None:
    inner = html.element("b", "&")
    assert html.element("p", inner) == "<p><b>&amp;</b></p>"


def test_a_picture_comes_back_from_the_page_pixel_by_pixel() -> None:
    picture = Image.effect_noise((5, 7), 90).convert("RGB")
    found = re.search(r'src="data:image/png;base64,([^"]+)"', html.image(picture, alt="noise"))
    assert found is not None
    again = Image.open(io.BytesIO(base64.b64decode(found[1])))
    assert again.tobytes() == picture.tobytes() and again.size == (5, 7)


def test_a_chart_changes_with_the_reader_s_theme() -> None:
    chart = html.chart(b"light", b"dark", alt="chart")
    dark = chart.index(base64.b64encode(b"dark").decode())
    light = chart.index(base64.b64encode(b"light").decode())
    assert chart.index("prefers-color-scheme: dark") < dark < chart.index("<img") < light


def test_a_browser_is_told_to_fetch_nothing() -> None:
    page = html.page("title")
    assert "default-src 'none'; img-src data:" in page
    assert 'name="viewport"' in page and "prefers-color-scheme: dark" in page


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (float("inf"), "–"),
        (float("nan"), "–"),
        (1234.567, "1,234.57"),
        (0, "0.00"),
        (-0.5, "-0.50"),
    ],
)
def test_numbers_are_short_and_unknown_ones_a_dash(value: float | None, shown: str) -> None:
    assert html.number(value) == shown
    assert html.number(12.5, 0) in ("12", "13")
