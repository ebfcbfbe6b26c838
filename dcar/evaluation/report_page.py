"""A report as one HTML file that needs nothing else: text, tables and pictures inside the page.

Every builder escapes what it is given unless it is `Html`, which only builders make.
"""

import base64
import html
import io
import math
from collections.abc import Iterable, Sequence

from PIL import Image

STYLE = """
:root { --ink: #1c2026; --faint: #5b6472; --paper: #f6f7f9; --card: #ffffff; --rule: #dfe3e8;
  --accent: #0072b2; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ec; --faint: #a1aab8; --paper: #12151a;
  --card: #1b1f27; --rule: #39404c; --accent: #56b4e9; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 1rem 0 .6rem; }
h2 { font-size: 1.3rem; margin: 0 0 .4rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .5rem; }
p { margin: .4rem 0 .8rem; max-width: 48rem; }
p.note, figcaption, th, .card span { color: var(--faint); }
p.note { font-size: .92rem; }
section { background: var(--card); border: 1px solid var(--rule); border-radius: 12px;
  padding: 1.2rem; margin: 1.2rem 0; }
img { display: block; max-width: 100%; height: auto; border-radius: 6px; }
.cards, .tiles { display: grid; gap: .8rem; }
.cards { grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); margin: .8rem 0; }
.card { border: 1px solid var(--rule); border-radius: 10px; padding: .8rem; }
.card b { display: block; font-size: 1.45rem; line-height: 1.25; margin: .1rem 0; }
.card span { display: block; font-size: .85rem; line-height: 1.4; }
.tiles figure { margin: 0; min-width: 0; }
.tiles img { width: 100%; }
.strip { display: grid; grid-auto-flow: column; grid-auto-columns: 1fr; gap: 3px; }
figcaption { font-size: .8rem; line-height: 1.3; margin-top: .3rem; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .8rem .35rem 0; text-align: right; border-bottom: 1px solid var(--rule);
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
"""
# No source of any kind but the page itself: a browser then refuses every request.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


class Html(str):
    """Markup that a builder made; everything else is text."""


def text(value: object) -> Html:
    """Escaped, unless it is markup already."""
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def join(parts: Iterable[object]) -> Html:
    return Html("\n".join(map(text, parts)))


def element(name: str, *content: object, css: str = "") -> Html:
    """`<name class="css">content</name>`."""
    attributes = f' class="{text(css)}"' if css else ""
    return Html(f"<{name}{attributes}>{join(content)}</{name}>")


def data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def png_bytes(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "png", optimize=True)
    return buffer.getvalue()


def image(picture: Image.Image, *, alt: str) -> Html:
    size = f'width="{picture.width}" height="{picture.height}"'
    return Html(f'<img src="{data_url(png_bytes(picture))}" {size} alt="{text(alt)}">')


def chart(light: bytes, dark: bytes, *, alt: str) -> Html:
    """The PNG that suits the reader's theme."""
    return Html(
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{data_url(dark)}">'
        f'<img src="{data_url(light)}" alt="{text(alt)}"></picture>'
    )


def figure(pictures: Sequence[Html], caption: object = "") -> Html:
    """Pictures side by side with one caption beneath."""
    strip = element("div", *pictures, css="strip")
    return element("figure", strip, *([element("figcaption", caption)] if caption else []))


def tiles(figures: Iterable[Html], *, width: float) -> Html:
    """As many in a row as fit, each at least `width` rem wide."""
    style = f"grid-template-columns: repeat(auto-fill, minmax(min({width}rem, 100%), 1fr))"
    return Html(f'<div class="tiles" style="{style}">{join(figures)}</div>')


def cards(entries: Iterable[tuple[str, str, str]]) -> Html:
    """(name, figure, what it means) each."""
    return element(
        "div",
        *(
            element(
                "div",
                element("span", name),
                element("b", value),
                element("span", meaning),
                css="card",
            )
            for name, value, meaning in entries
        ),
        css="cards",
    )


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> Html:
    head = element("tr", *(element("th", cell) for cell in header))
    body = [element("tr", *(element("td", cell) for cell in row)) for row in rows]
    return element("div", element("table", head, *body), css="wide")


def section(title: str, explanation: str, *content: Html) -> Html:
    return element("section", element("h2", title), element("p", explanation), *content)


def page(title: str, *content: Html) -> str:
    """The whole file."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"{element('h1', title)}\n{join(content)}\n</main>\n</body>\n</html>\n"
    )


def number(value: float | int | None, digits: int = 2) -> str:
    """With thousands separated; a dash for what was not measured or is not finite."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:,.{digits}f}"
