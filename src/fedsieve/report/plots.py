"""The plots: one colour and one marker a run, the same in every plot.

Figures are made as objects, without pyplot and its global state, so that a notebook's own plots
are left alone. Each figure is drawn twice: as PNG on white, and as SVG whose text is text and
whose colours are CSS variables, so that in the page it takes the reader's font and dark mode.
Colours are Okabe and Ito's (2008), which colour-blind readers tell apart; markers tell runs apart
in print.
"""

import io
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from fedsieve.report.read import Evaluation, Run, best, evaluations
from fedsieve.report.words import megabytes, score, significant

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")  # 8 and 7 share no factor: 56 pairs
INK, GRID = "#24292f", "#d8dde3"
CSS_VARIABLES = {INK: "--ink", GRID: "--grid"} | {c: f"--run-{i}" for i, c in enumerate(COLOURS)}
SHOWN_BUDGETS = 12  # bars per run; clients with a budget each would make an endless plot
SHOWN_NAMES = 6  # runs named in one caption; the summary has them all
MEASURES = {"accuracy": "Accuracy", "eval_loss": "Evaluation loss"}


class Plot(NamedTuple):
    key: str  # in file names and ids
    title: str
    caption: str  # says the key number, so that the plot need not be seen
    figure: Figure


class Look(NamedTuple):
    """How a run looks in every plot."""

    colour: str
    marker: str


def look(index: int) -> Look:
    return Look(COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)])


def draw(runs: Sequence[Run]) -> list[Plot]:
    """All plots for which the runs have numbers."""
    with _style():
        plots = []
        measure = shown_measure(runs)
        if measure:
            plots += [_score_by_bytes(runs, measure), _score_by_rounds(runs, measure)]
        plots += [_train_loss(runs), _bytes_by_round(runs)]
        if any(run.clients and run.clients.budgets for run in runs):
            plots.append(_bytes_by_budget(runs))
        return plots


def shown_measure(runs: Sequence[Run]) -> str | None:
    """Accuracy if any run has it, else the evaluation loss if any run has that."""
    return next((m for m in MEASURES if any(evaluations(run, m) for run in runs)), None)


def save_png(plot: Plot, path: Path) -> None:
    """Write the plot on white at twice the screen's resolution."""
    with _style():
        plot.figure.savefig(path, format="png", dpi=192, facecolor="white")


def to_svg(plot: Plot) -> str:
    """The plot as an SVG element to stand in HTML: its ids are its own, nothing is linked."""
    buffer = io.StringIO()
    with _style():
        plot.figure.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href=", "href=")
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{plot.key}-", svg)
    return re.sub(r'style="[^"]*"', _use_variables, svg)


def _use_variables(style: re.Match[str]) -> str:
    text = style.group()
    for colour, variable in CSS_VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return text


def _score_by_bytes(runs: Sequence[Run], measure: str) -> Plot:
    figure, ax = _one_axes(MEASURES[measure], "Total traffic, down and up (MB)")
    for i, run in enumerate(runs):
        found = evaluations(run, measure)
        _points(ax, [e.total_bytes / 1e6 for e in found], [e.value for e in found], look(i))
    ends = [run.rounds[-1].total_bytes for run in runs]
    if min(ends) > 0 and max(ends) >= 4 * min(ends):
        _log_scale(ax, "x")
    _legend(figure, runs)
    return Plot(
        "accuracy-bytes" if measure == "accuracy" else "eval-loss-bytes",
        f"{MEASURES[measure]} against traffic",
        _price(runs, measure),
        figure,
    )


def _price(runs: Sequence[Run], measure: str) -> str:
    """What the score that every run reaches costs each: the fair comparison of the papers."""
    found = {run.name: evaluations(run, measure) for run in runs}
    tops = {name: top for name, rows in found.items() if (top := best(rows, measure))}
    if not tops:
        return "No evaluation gave a finite number."
    name = MEASURES[measure].lower()
    if len(tops) == 1:
        top = next(iter(tops.values()))
        return f"Best {name}: {score(top.value)}, after {megabytes(top.total_bytes)}."
    weakest = (min if measure == "accuracy" else max)(top.value for top in tops.values())
    prices = [f"{n} {megabytes(_first(found[n], measure, weakest).total_bytes)}" for n in tops]
    return f"To reach {name} {score(weakest)}, which all do: {_said(prices)}."


def _first(rows: Iterable[Evaluation], measure: str, target: float) -> Evaluation:
    sign = 1 if measure == "accuracy" else -1
    return next(row for row in rows if sign * row.value >= sign * target)


def _score_by_rounds(runs: Sequence[Run], measure: str) -> Plot:
    figure, ax = _one_axes(MEASURES[measure], "Round")
    ax.xaxis.set_major_locator(_whole_numbers())
    ends = []
    for i, run in enumerate(runs):
        found = evaluations(run, measure)
        _points(ax, [e.round for e in found], [e.value for e in found], look(i))
        if found:
            ends.append(f"{_named(run, runs)}{score(found[-1].value)} in round {found[-1].round}")
    _legend(figure, runs)
    return Plot(
        "accuracy-rounds" if measure == "accuracy" else "eval-loss-rounds",
        f"{MEASURES[measure]} against rounds",
        f"At the end: {_said(ends)}.",
        figure,
    )


def _train_loss(runs: Sequence[Run]) -> Plot:
    figure, ax = _one_axes("Training loss", "Round")
    ax.xaxis.set_major_locator(_whole_numbers())
    for i, run in enumerate(runs):
        _trend(ax, [r.round for r in run.rounds], [r.loss for r in run.rounds], look(i))
    _legend(figure, runs)
    falls = [
        f"{_named(run, runs)}from {score(run.rounds[0].loss)} to {score(run.rounds[-1].loss)}"
        for run in runs
    ]
    return Plot(
        "train-loss",
        "Training loss against rounds",
        f"First to last round: {_said(falls)}. {_thin(runs)}",
        figure,
    )


def _bytes_by_round(runs: Sequence[Run]) -> Plot:
    figure = _figure(3.9)
    down, up = figure.subplots(2, 1, sharex=True)
    for ax, way in ((down, "down_bytes"), (up, "up_bytes")):
        means = []
        for i, run in enumerate(runs):
            sent = [getattr(row, way) / 1e6 for row in run.rounds]
            _trend(ax, [row.round for row in run.rounds], sent, look(i))
            means.append(_mean(sent))
        if min(means) > 0 and max(means) >= 10 * min(means):
            _log_scale(ax, "y")
        else:
            ax.set_ylim(bottom=0)
            ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    down.set_ylabel("Down (MB)")
    up.set_ylabel("Up (MB)")
    up.set_xlabel("Round")
    up.xaxis.set_major_locator(_whole_numbers())
    _legend(figure, runs)
    said = [
        f"{_named(run, runs)}{megabytes(_mean([r.down_bytes for r in run.rounds]))} down "
        f"and {megabytes(_mean([r.up_bytes for r in run.rounds]))} up"
        for run in runs
    ]
    return Plot(
        "bytes-round",
        "Traffic of a round",
        f"All clients of the round together. Mean: {_said(said)}. {_thin(runs)}",
        figure,
    )


def _bytes_by_budget(runs: Sequence[Run]) -> Plot:
    shown = [
        (i, run, run.clients.budgets[:SHOWN_BUDGETS])
        for i, run in enumerate(runs)
        if run.clients and run.clients.budgets
    ]
    rows = sum(len(budgets) for _, _, budgets in shown)
    figure = _figure(1.2 + 0.52 * rows + 0.35 * len(shown))
    heights = [len(budgets) for _, _, budgets in shown]
    column = figure.subplots(len(shown), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    longest = max(max(b.down_bytes, b.up_bytes) for _, _, budgets in shown for b in budgets) / 1e6
    for ax, (i, run, budgets) in zip(column, shown, strict=True):
        colour = look(i).colour
        for y, budget in enumerate(budgets):
            _bar(ax, y - 0.2, budget.down_bytes / 1e6, colour, 1.0)
            _bar(ax, y + 0.2, budget.up_bytes / 1e6, colour, 0.5)
        labels = [_short(budget.label, 34) for budget in budgets]
        ax.set_yticks(range(len(budgets)), labels, parse_math=False)
        ax.set_ylim(len(budgets) - 0.4, -0.6)
        ax.grid(False)
        ax.tick_params(axis="y", length=0)
        if len(runs) > 1:
            title = ax.set_title("", loc="left", fontsize=10, color=colour, fontweight="bold")
            title.set_parse_math(False)
            title.set_text(_short(run.name, 40))
    column[-1].set_xlim(0, 1.16 * longest or 1)
    column[-1].set_xlabel("Mean traffic of one client in one round (MB)")
    bars = [Patch(color=INK, label="Down"), Patch(color=INK, alpha=0.5, linewidth=0, label="Up")]
    figure.legend(handles=bars, loc="outside lower center", ncols=2)
    every = [b for run in runs if run.clients for b in run.clients.budgets]
    dear = max(every, key=lambda b: b.down_bytes + b.up_bytes)
    cheap = min(every, key=lambda b: b.down_bytes + b.up_bytes)
    caption = (
        f"The dearest budget ({dear.label}) costs a client "
        f"{megabytes(dear.down_bytes + dear.up_bytes)} a round, both ways together"
    )
    if cheap is not dear:
        caption += f"; the cheapest ({cheap.label}) {megabytes(cheap.down_bytes + cheap.up_bytes)}"
    if rows < len(every):
        caption += f". Drawn: the {SHOWN_BUDGETS} dearest of a run"
    return Plot("bytes-budget", "Traffic by client budget", f"{caption}.", figure)


def _bar(ax: Axes, y: float, sent: float, colour: str, alpha: float) -> None:
    ax.barh(y, sent, 0.36, color=colour, alpha=alpha)
    ax.annotate(
        significant(sent), (sent, y), (4, 0), textcoords="offset points", va="center", fontsize=9
    )


@contextmanager
def _style() -> Iterator[None]:
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


def _figure(height: float) -> Figure:
    """5.4 inches wide: on a phone the page shrinks it to two thirds, and its text stays legible."""
    return Figure(figsize=(5.4, height), layout="constrained")


def _one_axes(y_label: str, x_label: str) -> tuple[Figure, Axes]:
    figure = _figure(3.9)
    ax = figure.subplots()
    ax.set_xlabel(x_label)
    ax.set_ylabel(y_label)
    return figure, ax


def _whole_numbers() -> MaxNLocator:
    return MaxNLocator(integer=True, steps=[1, 2, 5, 10])


def _points(ax: Axes, x: Sequence[float], y: Sequence[float], style: Look) -> None:
    """Few values that are all worth seeing: a line through markers."""
    size = 5 if len(x) <= 40 else 0
    ax.plot(x, y, color=style.colour, marker=style.marker, markersize=size, markeredgewidth=0)


def _trend(ax: Axes, x: Sequence[int], y: Sequence[float], style: Look) -> None:
    """Values that jump from cohort to cohort: pale, under the mean of the rounds around each."""
    reach = _reach(len(x))
    if reach:
        ax.plot(x, y, color=style.colour, alpha=0.3, linewidth=0.9)
    mean = [_mean(y[max(0, i - reach) : i + reach + 1]) for i in range(len(y))]
    ax.plot(x, mean, color=style.colour, marker=style.marker, markevery=[len(x) - 1], markersize=5)


def _reach(rounds: int) -> int:
    """How many rounds to each side are averaged."""
    return min(50, rounds // 20)


def _mean(values: Sequence[float]) -> float:
    finite = [v for v in values if math.isfinite(v)]
    return sum(finite) / len(finite) if finite else math.nan


def _thin(runs: Sequence[Run]) -> str:
    if not any(_reach(len(run.rounds)) for run in runs):
        return ""
    return "Pale: each round; strong: the mean of the rounds around it."


def _log_scale(ax: Axes, which: str) -> None:
    axis = ax.xaxis if which == "x" else ax.yaxis
    (ax.set_xscale if which == "x" else ax.set_yscale)("log", nonpositive="mask")
    low, high = axis.get_view_interval()
    steps = (1.0,) if high > 2000 * low else (1.0, 3.0) if high > 50 * low else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.10g}"))
    axis.set_minor_formatter(NullFormatter())


def _named(run: Run, runs: Sequence[Run]) -> str:
    """A caption names its runs only where there are several."""
    return f"{run.name} " if len(runs) > 1 else ""


def _short(name: str, length: int) -> str:
    return name if len(name) <= length else f"{name[: length // 2]}…{name[-(length // 2) :]}"


def _said(parts: Sequence[str]) -> str:
    """A list for a caption, cut before it becomes a wall of numbers."""
    if len(parts) <= SHOWN_NAMES:
        return ", ".join(parts)
    return f"{', '.join(parts[:SHOWN_NAMES])} and {len(parts) - SHOWN_NAMES} more"


def _legend(figure: Figure, runs: Sequence[Run]) -> None:
    """Name the runs below the plot, and grow the figure so that the plot keeps its height."""
    if len(runs) == 1:
        return
    names = [_short(run.name, 40) for run in runs]
    lines = [
        Line2D([], [], color=look(i).colour, marker=look(i).marker, markersize=5)
        for i in range(len(runs))
    ]
    columns = max(1, min(len(runs), 4, 70 // (max(map(len, names)) + 8)))
    legend = figure.legend(lines, ["run"] * len(runs), loc="outside lower center", ncols=columns)
    rows = math.ceil(len(runs) / columns)
    figure.set_figheight(figure.get_figheight() + 0.21 * (rows - 1))
    # A name is set late so that one with $ or a leading underscore is taken as it stands.
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_parse_math(False)
        text.set_text(name)
