"""What all plots share: style, colours and markers, axes, lines with their bands, the legend.

Figures are made as objects, without pyplot and its global state, so that a notebook's own plots
are left alone. Colours are Okabe and Ito's (2008), which colour-blind readers tell apart; markers
tell series apart in print.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from fedsieve.report.series import Curve

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")  # 8 and 7 share no factor: 56 pairs
INK, GRID = "#24292f", "#d8dde3"


class Look(NamedTuple):
    """How a series looks in every plot."""

    colour: str
    marker: str


def look(index: int) -> Look:
    return Look(COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)])


@contextmanager
def style() -> Iterator[None]:
    settings: dict[str, Any] = {
        "font.family": "DejaVu Sans",
        "font.size": 10.5,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": GRID,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.7,
        "xtick.color": INK,
        "ytick.color": INK,
        "xtick.labelsize": 9.5,
        "ytick.labelsize": 9.5,
        "legend.frameon": False,
        "legend.fontsize": 9.5,
        "lines.linewidth": 1.8,
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "fedsieve",  # the same run gives the same bytes
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():  # type: ignore[arg-type]
        # A run may be named in any script: the page then shows it in the reader's font.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def new_figure(height: float) -> Figure:
    """5.4 inches wide: on a phone the page shrinks it to two thirds, and its text stays legible."""
    return Figure(figsize=(5.4, height), layout="constrained")


def one_axes(y_label: str, x_label: str) -> tuple[Figure, Axes]:
    figure = new_figure(3.9)
    ax = figure.subplots()
    ax.set_xlabel(x_label)
    ax.set_ylabel(y_label)
    return figure, ax


def points(ax: Axes, found: Curve, style: Look) -> None:
    """Few values that are all worth seeing: a line through markers, and its band."""
    size = 5 if len(found.x) <= 40 else 0
    band(ax, found, style)
    ax.plot(
        found.x,
        found.mean,
        color=style.colour,
        marker=style.marker,
        markersize=size,
        markeredgewidth=0,
    )


def band(ax: Axes, found: Curve, style: Look) -> None:
    if found.low != found.high:  # NaN included: those leave a gap
        ax.fill_between(found.x, found.low, found.high, color=style.colour, alpha=0.22, linewidth=0)


def log_scale(ax: Axes, which: str) -> None:
    axis = ax.xaxis if which == "x" else ax.yaxis
    (ax.set_xscale if which == "x" else ax.set_yscale)("log", nonpositive="mask")
    low, high = axis.get_view_interval()
    steps = (1.0,) if high > 2000 * low else (1.0, 3.0) if high > 50 * low else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.10g}"))
    axis.set_minor_formatter(NullFormatter())


def short(name: str, length: int) -> str:
    return name if len(name) <= length else f"{name[: length // 2]}…{name[-(length // 2) :]}"


def legend(figure: Figure, labels: Sequence[str]) -> None:
    """Name the series below the plot, and grow the figure so that the plot keeps its height."""
    if len(labels) == 1:
        return
    names = [short(label, 40) for label in labels]
    lines = [
        Line2D([], [], color=look(i).colour, marker=look(i).marker, markersize=5)
        for i in range(len(labels))
    ]
    columns = max(1, min(len(labels), 4, 70 // (max(map(len, names)) + 8)))
    rows = math.ceil(len(labels) / columns)
    columns = math.ceil(len(labels) / rows)
    legend = figure.legend(
        lines, ["series"] * len(labels), loc="outside lower center", ncols=columns
    )
    figure.set_figheight(figure.get_figheight() + 0.21 * (rows - 1))
    # A name is set late so that one with $ or a leading underscore is taken as it stands.
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_parse_math(False)
        text.set_text(name)
