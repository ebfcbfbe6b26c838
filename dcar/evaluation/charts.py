"""Charts of training runs as PNG bytes, in a light and a dark theme. K codebook size."""

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dcar.evaluation.run_record import Curve, RunRecord

PANEL_SIZE = 4.6, 2.9  # inches
DPI = 150
SMOOTHING = 0.75  # of the exponential average drawn over a dense curve
DENSE = 25  # points from which a curve is smoothed


@dataclass(frozen=True)
class Theme:
    """Colours that can be told apart by most colour-blind readers (Okabe and Ito)."""

    ink: str
    paper: str
    rule: str
    lines: tuple[str, ...]


LIGHT = Theme("#23272f", "#ffffff", "#dfe3e8", ("#0072b2", "#d55e00", "#009e73", "#b0619a"))
DARK = Theme("#e4e7ec", "#1b1f27", "#39404c", ("#56b4e9", "#f0924a", "#35c79c", "#dc94c6"))


@dataclass(frozen=True)
class Panel:
    """One pair of axes: logged names with the words that stand for them."""

    title: str
    unit: str
    tags: Mapping[str, str]
    dashed: frozenset[str] = frozenset()  # those that repeat the colours of the solid ones

    def has_data(self, runs: Iterable[RunRecord]) -> bool:
        return any(tag in run.curves for run in runs for tag in self.tags)


def smooth(values: Sequence[float], weight: float = SMOOTHING) -> np.ndarray:
    """Exponential average without the pull towards zero at the start."""
    smoothed, total, mass = [], 0.0, 0.0
    for value in values:
        total, mass = weight * total + (1 - weight) * value, weight * mass + (1 - weight)
        smoothed.append(total / mass)
    return np.array(smoothed)


def draw_panel(axes: Axes, panel: Panel, runs: Sequence[RunRecord], theme: Theme) -> None:
    """The runs one after another along the steps, with a line between them."""
    dress(axes, theme, title=panel.title, x_label="optimizer steps", y_label=panel.unit)
    start, colors = 0, max(len(panel.tags) - len(panel.dashed), 1)
    for run in runs:
        for index, (tag, label) in enumerate(panel.tags.items()):
            if tag in run.curves:
                style = "--" if tag in panel.dashed else "-"
                color = theme.lines[index % colors % len(theme.lines)]
                _draw_curve(axes, run.curves[tag], start, label, color, style)
        _name_run(axes, run.name, start, theme)
        start += run.steps
    axes.set_xlim(0, max(start, 1))
    handles, labels = axes.get_legend_handles_labels()
    first = {label: handle for handle, label in reversed(list(zip(handles, labels, strict=True)))}
    shown = [label for label in panel.tags.values() if label in first]
    if len(panel.tags) > 1:
        axes.legend(
            [first[label] for label in shown],
            shown,
            fontsize=8,
            frameon=False,
            labelcolor=theme.ink,
        )


def dress(axes: Axes, theme: Theme, *, title: str, x_label: str, y_label: str) -> None:
    """Titles, a quiet grid, no box."""
    axes.set_facecolor(theme.paper)
    axes.set_title(title, fontsize=10, color=theme.ink, loc="left", pad=14)
    axes.set_xlabel(x_label, fontsize=8, color=theme.ink)
    axes.set_ylabel(y_label, fontsize=8, color=theme.ink)
    axes.tick_params(labelsize=8, colors=theme.ink, length=0)
    axes.grid(color=theme.rule, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw_curve(axes: Axes, curve: Curve, start: int, label: str, color: str, style: str) -> None:
    steps = np.array(curve.steps) + start
    if len(steps) < DENSE:
        axes.plot(
            steps,
            curve.values,
            style,
            color=color,
            label=label,
            marker="o",
            markersize=4,
            markerfacecolor="none" if style == "--" else color,
            clip_on=False,  # one validation of a training is a point at its end
        )
        return
    axes.plot(steps, curve.values, color=color, alpha=0.25, linewidth=0.7)
    axes.plot(steps, smooth(curve.values), style, color=color, label=label, linewidth=1.6)


def _name_run(axes: Axes, name: str, start: int, theme: Theme) -> None:
    if start:
        axes.axvline(start, color=theme.ink, linewidth=0.6, linestyle=":")
    place = axes.get_xaxis_transform()
    axes.text(start, 1.01, f" {name}", fontsize=7, color=theme.ink, transform=place, alpha=0.75)


def to_png(figure: Figure) -> bytes:
    """Rendered by Agg, whatever display the machine has."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def curves_png(
    panels: Sequence[tuple[Panel, Sequence[RunRecord]]], theme: Theme, *, columns: int = 1
) -> bytes:
    """Panels in rows, each over its own runs."""
    rows = -(-len(panels) // columns)
    size = PANEL_SIZE[0] * columns, PANEL_SIZE[1] * rows
    figure = Figure(figsize=size, dpi=DPI, layout="constrained", facecolor=theme.paper)
    for index, (panel, runs) in enumerate(panels, start=1):
        draw_panel(figure.add_subplot(rows, columns, index), panel, runs, theme)
    return to_png(figure)


def usage_png(counts: Sequence[int], theme: Theme) -> bytes:
    """How often each of K codes occurs, most frequent first."""
    figure = Figure(figsize=(8, 2.9), dpi=DPI, layout="constrained", facecolor=theme.paper)
    axes = figure.add_subplot()
    title = "How often each code is used, most used first"
    dress(axes, theme, title=title, x_label="codes, sorted", y_label="uses (log scale)")
    ordered = np.sort(np.asarray(counts))[::-1]
    used = int((ordered > 0).sum())
    axes.stairs(ordered[:used], range(used + 1), baseline=0.5, fill=True, color=theme.lines[0])
    if used < len(ordered):
        axes.axvspan(
            used, len(ordered), color=theme.rule, label=f"{len(ordered) - used} never used"
        )
        axes.legend(fontsize=8, frameon=False, labelcolor=theme.ink, loc="upper right")
    axes.set_yscale("log")
    axes.minorticks_off()
    axes.set_xlim(0, len(ordered))
    axes.set_ylim(bottom=0.5)
    return to_png(figure)
