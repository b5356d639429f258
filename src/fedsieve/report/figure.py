"""A figure in a paper's form: panels below each other, a line or a mark for each entry.

Where the places along the axis are numbers, entries are lines over them, with a band from the
lowest seed to the highest; where they are names, marks side by side, with a bar for the same.
"""

import io
import math
from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes

from fedsieve.report.canvas import INK, legend, log_scale, look, new_figure, points, style
from fedsieve.report.series import Curve

_WIDTH = 0.7  # of a place's width, over which its marks are spread
_LINE = 9.0  # points, from one of a front's names to the next


class Mark(NamedTuple):
    """A point of a front, and what stands beside it."""

    x: float
    y: float
    name: str


class Panel(NamedTuple):
    """curves: entry -> its line; one that has none is left out, and keeps its colour elsewhere.

    front: points from left to right, each above those before, drawn as steps
    """

    title: str
    curves: dict[str, Curve]
    front: tuple[Mark, ...] = ()


def png(
    panels: Sequence[Panel],
    entries: Sequence[str],
    places: Sequence[str],
    x_label: str,
    y_label: str,
    log: bool,
    from_zero: bool,
) -> bytes:
    """The figure on white.

    places: names of the places 0, 1, 2, ... of every curve's x; empty where x is a number
    log: whether the horizontal axis is logarithmic; from_zero: whether the vertical begins at 0
    """
    with style():
        figure = new_figure(0.8 + 2.9 * len(panels))
        column = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
        for ax, panel in zip(column, panels, strict=True):
            if len(panels) > 1:
                ax.set_title(panel.title, loc="left", fontsize=10, parse_math=False)
            for i, entry in enumerate(entries):
                if entry not in panel.curves:
                    continue
                if places:
                    _marks(ax, panel.curves[entry], i, len(entries))
                else:
                    points(ax, panel.curves[entry], look(i))
            if places:
                turn = 30 if sum(map(len, places)) > 50 else 0
                ax.set_xticks(range(len(places)), places, rotation=turn, parse_math=False)
                ax.grid(False, axis="x")
            elif log:
                log_scale(ax, "x")
            if panel.front:
                _steps(ax, panel.front)
            ax.set_ylabel(y_label, parse_math=False)
            if from_zero:
                ax.set_ylim(bottom=0)
        column[-1].set_xlabel(x_label, parse_math=False)
        legend(figure, entries)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=160, facecolor="white")
        return buffer.getvalue()


def _steps(ax: Axes, front: Sequence[Mark]) -> None:
    """The front, and the names of its points above it and to the left, where nothing else is."""
    xs, ys = [mark.x for mark in front], [mark.y for mark in front]
    ax.plot(xs, ys, drawstyle="steps-post", color=INK, linewidth=1.0, zorder=1)
    ax.margins(y=0.12)
    left, right = ax.get_xlim()
    room = 0.4  # of the width, for the first point's name
    log = ax.get_xscale() == "log"
    ax.set_xlim(left * (left / right) ** room if log else left - room * (right - left), right)
    last = -math.inf
    for mark in front:
        _, at = ax.transData.transform((mark.x, mark.y)) * 72 / ax.figure.dpi
        last = max(at + 3, last + _LINE)  # each above the one before it
        ax.annotate(
            mark.name,
            (mark.x, mark.y),
            xytext=(-4, last - at),
            textcoords="offset points",
            ha="right",
            fontsize=7.5,
            parse_math=False,
        )


def _marks(ax: Axes, found: Curve, number: int, of: int) -> None:
    """An entry's marks beside those of the others, each from its lowest to its highest."""
    shift = _WIDTH * ((number + 0.5) / of - 0.5)
    own = look(number)
    for x, mean, low, high in zip(found.x, found.mean, found.low, found.high, strict=True):
        if math.isfinite(low) and math.isfinite(high):
            ax.plot([x + shift] * 2, [low, high], color=own.colour, linewidth=1.4, alpha=0.6)
        if math.isfinite(mean):
            ax.plot([x + shift], [mean], color=own.colour, marker=own.marker, markersize=6)
