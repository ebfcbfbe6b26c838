"""Pictures of a data set: histograms of what its shards hold, and a contact sheet of samples."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    MaxNLocator,
    NullLocator,
    StrMethodFormatter,
)
from PIL import Image, ImageDraw, ImageOps

from dcar.data.stats import Stats, histogram
from dcar.evaluation.charts import DPI, LIGHT, PANEL_SIZE, Theme, dress, to_png
from dcar.evaluation.sheets import sans, wrap

COLUMNS = 3
MOST_BARS = 10  # of a bar chart; the longest ones
ASPECTS = {0.25: "1:4", 0.5: "1:2", 0.75: "3:4", 1.0: "1:1", 4 / 3: "4:3", 2.0: "2:1", 4.0: "4:1"}
HISTOGRAMS = {
    "shorter": ("Shorter edge", "pixels; the last bar holds all larger ones"),
    "aspect": ("Aspect ratio", "width : height"),
    "words": ("Caption length in words", "words; the last bar holds all longer ones"),
    "caption_bytes": ("Caption length in bytes", "bytes; the last bar holds all longer ones"),
}

MAX_LINES = 8  # of a caption on the contact sheet
MARGIN = 8  # pixels
GROUND, INK, QUIET, ALARM = "#eef0f3", "#23272f", "#5f6672", "#b42318"

Draw = Callable[[Axes, Theme], None]


def _histogram(axes: Axes, theme: Theme, *, stats: Stats, what: str) -> None:
    """Splits differ in size by orders of magnitude, so each is drawn in percent of itself."""
    title, unit = HISTOGRAMS[what]
    dress(axes, theme, title=title, x_label=unit, y_label="% of the split")
    edges = stats.edges(what)
    for index, split in enumerate(stats.splits):
        counts = histogram(getattr(split, what), edges)
        color = theme.lines[index % len(theme.lines)]
        share = 100 * counts / max(counts.sum(), 1)
        axes.stairs(share, edges, color=color, label=split.split, linewidth=1.4)
        axes.stairs(share, edges, color=color, fill=True, alpha=0.15)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.2)  # room for the legend
    if what == "aspect":
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(list(ASPECTS)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: ASPECTS.get(ratio, "")))
        axes.xaxis.set_minor_locator(NullLocator())
    if len(stats.splits) > 1:
        axes.legend(fontsize=8, frameon=False, labelcolor=theme.ink)


def _bars(
    axes: Axes, theme: Theme, *, title: str, unit: str, rows: Mapping[str, Mapping[str, int]]
) -> None:
    """{name: {split: count}} as bars, a piece for each split, the longest above."""
    dress(axes, theme, title=title, x_label=unit, y_label="")
    names = sorted(rows, key=lambda name: -sum(rows[name].values()))[:MOST_BARS][::-1]
    splits = list(dict.fromkeys(split for counts in rows.values() for split in counts))
    left = np.zeros(len(names))
    for index, split in enumerate(splits):
        counts = np.array([rows[name].get(split, 0) for name in names])
        color = theme.lines[index % len(theme.lines)]
        axes.barh(names, counts, left=left, color=color, height=0.6)
        left += counts
    for place, total in enumerate(left.astype(int).tolist()):
        axes.text(total, place, f" {total:,}", va="center", fontsize=8, color=theme.ink)
    axes.set_xlim(0, left.max() * 1.25)
    axes.set_ylim(len(names) - max(len(names), 4) - 0.5, len(names) - 0.5)  # bars never too broad
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.grid(visible=False, axis="y")


def _classes(axes: Axes, theme: Theme, *, stats: Stats) -> None:
    title, unit = "Samples of each class", "classes, largest first"
    dress(axes, theme, title=title, x_label=unit, y_label="samples")
    for index, split in enumerate(stats.splits):
        ordered = sorted(split.classes.values(), reverse=True)
        color = theme.lines[index % len(theme.lines)]
        axes.stairs(ordered, color=color, label=split.split, baseline=None, linewidth=1.4)
    axes.set_ylim(bottom=0)
    if len(stats.splits) > 1:
        axes.legend(fontsize=8, frameon=False, labelcolor=theme.ink)


def _by_reason(stats: Stats) -> dict[str, dict[str, int]]:
    """What the build dropped and what a stream would skip, by reason and split."""
    rows: dict[str, dict[str, int]] = {}
    for split in stats.splits:
        for prefix, reasons in (("dropped", split.dropped), ("skipped", split.skipped)):
            for reason, count in reasons.items():
                rows.setdefault(f"{prefix}: {reason}", {})[split.split] = count
    return rows


def panels(stats: Stats) -> list[Draw]:
    """What there is to draw: a set without captions has no panel of their lengths."""
    samples = {
        split.split: {split.split: split.looked if split.samples is None else split.samples}
        for split in stats.splits
    }
    formats: dict[str, dict[str, int]] = {}
    for split in stats.splits:
        for name, count in split.formats.items():
            formats.setdefault(name, {})[split.split] = count
    rows = {
        ("Samples of each split", "samples"): samples,
        ("Kinds of files", "samples"): formats,
        ("Left out: dropped by the build, skipped by a stream", "samples"): _by_reason(stats),
    }
    bars = [
        partial(_bars, title=title, unit=unit, rows=counts)
        for (title, unit), counts in rows.items()
        if counts
    ]
    histograms = [
        partial(_histogram, stats=stats, what=what)
        for what in HISTOGRAMS
        if any(len(getattr(split, what)) for split in stats.splits)
    ]
    classes = [partial(_classes, stats=stats)] if any(s.classes for s in stats.splits) else []
    return [*bars[:1], *histograms, *bars[1:], *classes]


def stats_png(stats: Stats, theme: Theme = LIGHT) -> bytes:
    """All panels in rows of three, as a PNG file."""
    draws = panels(stats)
    rows = -(-len(draws) // COLUMNS)
    size = PANEL_SIZE[0] * COLUMNS, PANEL_SIZE[1] * rows
    figure = Figure(figsize=size, dpi=DPI, layout="constrained", facecolor=theme.paper)
    for index, draw in enumerate(draws, start=1):
        draw(figure.add_subplot(rows, COLUMNS, index), theme)
    return to_png(figure)


@dataclass(frozen=True)
class Cell:
    """One sample on the contact sheet. fault: written in its place where it has no picture."""

    key: str
    caption: str = ""
    picture: Image.Image | None = None
    fault: str = ""


def contact_sheet(cells: Sequence[Cell], *, columns: int = 8, side: int = 224) -> Image.Image:
    """Pictures in squares of `side` pixels, whole, with key, size and caption beneath.

    A row is as high as its longest caption needs. Raises ValueError for no cells or no columns.
    """
    if not cells or columns < 1:
        raise ValueError(f"{len(cells)} cells in {columns} columns; both must be at least 1")
    columns = min(columns, len(cells))
    rows = [cells[first : first + columns] for first in range(0, len(cells), columns)]
    strips = [_strip(row, columns, side) for row in rows]
    page = Image.new("RGB", (strips[0].width, sum(strip.height for strip in strips)), "white")
    top = 0
    for strip in strips:
        page.paste(strip, (0, top))
        top += strip.height
    return page


def _strip(cells: Sequence[Cell], columns: int, side: int) -> Image.Image:
    """One row of the sheet."""
    key_font, font, leading = sans(10), sans(12), 16
    texts = [wrap(cell.caption, font, side, MAX_LINES) for cell in cells]
    band = 2 * leading + max(map(len, texts)) * leading
    size = columns * (side + MARGIN) + MARGIN, MARGIN + side + band + MARGIN
    strip = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(strip)
    for index, (cell, lines) in enumerate(zip(cells, texts, strict=True)):
        left, top = MARGIN + index * (side + MARGIN), MARGIN
        draw.rectangle((left, top, left + side - 1, top + side - 1), fill=GROUND)
        _place(strip, draw, cell, (left, top), side)
        top += side + 4
        for line in wrap(cell.key, key_font, side, 1):
            draw.text((left, top), line, QUIET, key_font)
        for number, line in enumerate(lines, start=1):
            draw.text((left, top + number * leading), line, INK, font)
    return strip


def _place(
    strip: Image.Image, draw: ImageDraw.ImageDraw, cell: Cell, place: tuple[int, int], side: int
) -> None:
    """The whole picture in the middle of its square; a small one is not enlarged beyond twice."""
    left, top = place
    if cell.picture is None:
        lines = wrap(cell.fault, sans(13), side - 2 * MARGIN, MAX_LINES)
        draw.text((left + MARGIN, top + MARGIN), "\n".join(lines), ALARM, sans(13))
        return
    largest = min(side, 2 * max(cell.picture.size))
    fitted = ImageOps.contain(cell.picture, (largest, largest), Image.Resampling.LANCZOS)
    x, y = ((side - edge) // 2 for edge in fitted.size)
    strip.paste(fitted, (left + x, top + y))
