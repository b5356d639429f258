"""The plots: one colour and one marker a series, the same in every plot.

Each figure is drawn twice: as PNG on white, and as SVG whose text is text and
whose colours are CSS variables, so that in the page it takes the reader's font and dark mode.
A series of several runs has a band from their lowest to their highest around their mean.
"""

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fedsieve.clients.network import Conditions, clock
from fedsieve.errors import count, few
from fedsieve.report.canvas import (
    COLOURS,
    GRID,
    INK,
    Look,
    band,
    legend,
    log_scale,
    look,
    new_figure,
    one_axes,
    points,
    short,
    style,
)
from fedsieve.report.read import Run, evaluations
from fedsieve.report.series import (
    Row,
    Series,
    Spread,
    Target,
    budgets,
    curve,
    every_run,
    shown_measure,
)
from fedsieve.report.words import megabytes, score, significant
from fedsieve.tasks.words import spoken, titled

CSS_VARIABLES = {INK: "--ink", GRID: "--grid"} | {c: f"--run-{i}" for i, c in enumerate(COLOURS)}
SHOWN_BUDGETS = 12  # bars per series; clients with a budget each would make an endless plot
SHOWN_NAMES = 6  # series named in one caption; the summary has them all


class Plot(NamedTuple):
    key: str  # in file names and ids
    title: str
    caption: str  # says the key number, so that the plot need not be seen
    figure: Figure


def draw(
    series: Sequence[Series], rows: Sequence[Row], conditions: Sequence[Conditions]
) -> list[Plot]:
    """All plots for which the runs have numbers. `rows`: the table of these series."""
    with style():
        plots = []
        measure = shown_measure(series)
        if measure:
            plots += [_score_by_bytes(series, rows, measure), _score_by_rounds(series, measure)]
        if measure and any(run.clients for run in every_run(series)):
            plots.append(_score_by_time(series, rows, conditions, measure))
        if any(map(_has_losses, series)):
            plots.append(_train_loss(series))
        plots.append(_bytes_by_round(series))
        if any(budgets(one) for one in series):
            plots.append(_bytes_by_budget(series))
        for plot in plots:  # laid out once, and not for each picture that is made of it
            plot.figure.draw_without_rendering()
            plot.figure.set_layout_engine("none")
        return plots


def to_png(plot: Plot) -> bytes:
    """The plot on white at twice the screen's resolution."""
    buffer = io.BytesIO()
    with style():
        plot.figure.savefig(buffer, format="png", dpi=192, facecolor="white")
    return buffer.getvalue()


def to_svg(plot: Plot) -> str:
    """The plot as an SVG element to stand in HTML: its ids are its own, nothing is linked."""
    buffer = io.StringIO()
    with style():
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


def _score_by_bytes(series: Sequence[Series], rows: Sequence[Row], measure: str) -> Plot:
    figure, ax = one_axes(titled(measure), "Total traffic, down and up (MB)")
    for i, one in enumerate(series):
        points(ax, curve(one, _scores(measure), _sent), look(i))
    ends = [run.rounds[-1].total_bytes for run in every_run(series)]
    if min(ends) > 0 and max(ends) >= 4 * min(ends):
        log_scale(ax, "x")
    _mark_target(ax, rows)
    legend(figure, [one.label for one in series])
    return Plot(
        f"{_dashes(measure)}-bytes",
        f"{titled(measure)} against traffic",
        f"{_price(rows)} {_bands(series)}".rstrip(),
        figure,
    )


def _dashes(measure: str) -> str:
    return measure.replace("_", "-")


def _scores(measure: str) -> Callable[[Run], dict[int, float]]:
    return lambda run: {e.round: e.value for e in evaluations(run, measure)}


def _sent(run: Run) -> dict[int, float]:
    return {0: 0.0} | {row.round: row.total_bytes / 1e6 for row in run.rounds}


def _price(rows: Sequence[Row]) -> str:
    """What the score that every run reaches costs each: the fair comparison of the papers."""
    target = rows[0].target
    if not target:
        return "No evaluation gave a finite number."
    if len(rows) == 1 and rows[0].runs == 1 and not target.given and rows[0].bytes_to_target:
        name = spoken(target.measure)
        cost = megabytes(rows[0].bytes_to_target.mean)
        return f"Best {name}: {score(target.value)}, after {cost}."
    prices = [
        f"{row.label} {reached(row, row.bytes_to_target, megabytes)}" for row in rows if row.final
    ]
    return f"{to_reach(target, rows)}: {_said(prices)}."


def to_reach(target: Target, rows: Sequence[Row]) -> str:
    """The target of the rows in words, as captions and tables name it."""
    why = "which all do" if sum(row.runs for row in rows) > 1 else "its best"
    if target.given:
        why = "the target asked for"
    return f"To reach {spoken(target.measure)} {score(target.value)}, {why}"


def reached(row: Row, cost: Spread | None, form: Callable[[float, float | None], str]) -> str:
    """A cost of the target in words, and how many runs reached it where not all did."""
    if cost is None:
        return "not reached" if row.reached == 0 else "not known"
    said = form(cost.mean, cost.deviation)
    return said if row.reached == row.runs else f"{said} ({row.reached} of {row.runs} runs)"


def _marked(rows: Sequence[Row]) -> bool:
    """Whether a line shows the target: not where it would mark nothing but one run's own best."""
    target = rows[0].target
    return target is not None and (len(rows) > 1 or rows[0].runs > 1 or target.given)


def _mark_target(ax: Axes, rows: Sequence[Row]) -> None:
    target = rows[0].target
    if target and _marked(rows):
        ax.axhline(target.value, color=INK, linewidth=0.9, linestyle=(0, (4, 4)), alpha=0.6)


def _dashed(rows: Sequence[Row]) -> str:
    """The last words of a caption: of one run a table follows."""
    if not rows[0].target:
        return ""
    if not _marked(rows):
        return f"{to_reach(rows[0].target, rows)}:"
    where = ":" if len(rows) == 1 and rows[0].runs == 1 else ": see the table of results."
    return f"{to_reach(rows[0].target, rows)} (dashed){where}"


def _score_by_time(
    series: Sequence[Series],
    rows: Sequence[Row],
    conditions: Sequence[Conditions],
    measure: str,
) -> Plot:
    figure = new_figure(0.7 + 2.2 * len(conditions))
    column = figure.subplots(len(conditions), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    curves = [
        (ax, i, curve(one, _scores(measure), _passed(world)))
        for ax, world in zip(column, conditions, strict=True)
        for i, one in enumerate(series)
        if all(run.clients for run in one.runs)
    ]
    ends = [found.x[-1] for _, _, found in curves if found.x]
    unit, seconds = _time_unit(max(ends, default=0.0))
    for ax, i, found in curves:
        points(ax, found._replace(x=[x / seconds for x in found.x]), look(i))
    for ax, world in zip(column, conditions, strict=True):
        ax.set_title(_uplink(world), loc="left", fontsize=10)
        _mark_target(ax, rows)
    if ends and min(ends) > 0 and max(ends) >= 4 * min(ends):
        log_scale(column[0], "x")
    column[-1].set_xlabel(f"Simulated time ({unit})")
    figure.supylabel(titled(measure), fontsize=10.5)
    legend(figure, [one.label for one in series])
    return Plot(
        f"{_dashes(measure)}-time",
        f"{titled(measure)} against simulated time",
        f"{_world(conditions)} {_bands(series)} {_dashed(rows)}".strip(),
        figure,
    )


def _passed(world: Conditions) -> Callable[[Run], dict[int, float]]:
    return lambda run: clock(run.clients.parts, world) if run.clients else {}


def _time_unit(longest: float) -> tuple[str, float]:
    if longest < 300:
        return "seconds", 1.0
    return ("minutes", 60.0) if longest < 3 * 3600 else ("hours", 3600.0)


def _uplink(world: Conditions) -> str:
    down, up = world.link.downlink, world.link.uplink
    said = f"Uplink {up:g} Mbit/s"
    if down == up:
        return f"{said}, as the downlink"
    if down > up and (down / up).is_integer():
        return f"{said}, 1/{down / up:.0f} of the downlink"
    return f"{said}, downlink {down:g} Mbit/s"


def _world(conditions: Sequence[Conditions]) -> str:
    """What the clock is made of, so that nobody takes it for one that was read."""
    first = conditions[0]
    downs = dict.fromkeys(f"{world.link.downlink:g}" for world in conditions)
    latencies = dict.fromkeys(f"{world.link.latency:g} s" for world in conditions)
    step = first.seconds_per_step
    work = "the seconds of work that were measured" if step is None else f"{step:g} s a step"
    lines = f"Simulated: every client has a downlink of {' or '.join(downs)} Mbit/s"
    if any(world.links for world in conditions):
        lines += " (some have a link of their own)"
    lag = f", {' or '.join(latencies)} of latency" if list(latencies) != ["0 s"] else ""
    slow = f", slowed down at random (spread {first.spread:g})" if first.spread else ""
    return (
        f"{lines} and the uplink shown{lag}, and takes {work}{slow}; a round lasts until the "
        "slowest client that was merged has answered."
    )


def _score_by_rounds(series: Sequence[Series], measure: str) -> Plot:
    figure, ax = one_axes(titled(measure), "Round")
    ax.xaxis.set_major_locator(_whole_numbers())
    ends = []
    for i, one in enumerate(series):
        found = curve(one, _scores(measure))
        points(ax, found, look(i))
        if found.x:
            ends.append(f"{_named(one, series)}{score(found.mean[-1])} in round {found.x[-1]:.0f}")
    legend(figure, [one.label for one in series])
    return Plot(
        f"{_dashes(measure)}-rounds",
        f"{titled(measure)} against rounds",
        f"At the end: {_said(ends)}. {_bands(series)}".rstrip(),
        figure,
    )


def _train_loss(series: Sequence[Series]) -> Plot:
    figure, ax = one_axes("Training loss", "Round")
    ax.xaxis.set_major_locator(_whole_numbers())
    falls = []
    told = [(i, one) for i, one in enumerate(series) if _has_losses(one)]
    for i, one in told:
        _trend(ax, one, _losses, look(i))
        loss = curve(one, _losses).mean
        falls.append(f"{_named(one, series)}from {score(loss[0])} to {score(loss[-1])}")
    legend(figure, [one.label for _, one in told])
    return Plot(
        "train-loss",
        "Training loss against rounds",
        f"First to last round: {_said(falls)}. {_thin(series)} {_bands(series)}".rstrip(),
        figure,
    )


def _has_losses(series: Series) -> bool:
    """Whether any round tells one. Private runs whose noise is fresh withhold theirs."""
    return any(math.isfinite(row.loss) for run in series.runs for row in run.rounds)


def _losses(run: Run) -> dict[int, float]:
    return {row.round: row.loss for row in run.rounds}


def _downs(run: Run) -> dict[int, float]:
    return {row.round: row.down_bytes / 1e6 for row in run.rounds}


def _ups(run: Run) -> dict[int, float]:
    return {row.round: row.up_bytes / 1e6 for row in run.rounds}


def _bytes_by_round(series: Sequence[Series]) -> Plot:
    figure = new_figure(3.9)
    down, up = figure.subplots(2, 1, sharex=True)
    means: list[list[float]] = []
    for ax, way in ((down, _downs), (up, _ups)):
        for i, one in enumerate(series):
            _trend(ax, one, way, look(i))
        means.append([_mean([n for run in one.runs for n in way(run).values()]) for one in series])
        if min(means[-1]) > 0 and max(means[-1]) >= 10 * min(means[-1]):
            log_scale(ax, "y")
        else:
            ax.set_ylim(bottom=0)
            ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    down.set_ylabel("Down (MB)")
    up.set_ylabel("Up (MB)")
    up.set_xlabel("Round")
    up.xaxis.set_major_locator(_whole_numbers())
    legend(figure, [one.label for one in series])
    said = [
        f"{_named(one, series)}{megabytes(1e6 * sent)} down and {megabytes(1e6 * back)} up"
        for one, sent, back in zip(series, *means, strict=True)
    ]
    return Plot(
        "bytes-round",
        "Traffic of a round",
        f"All clients of the round together. Mean: {_said(said)}. {_thin(series)} "
        f"{_bands(series)}".rstrip(),
        figure,
    )


def _bytes_by_budget(series: Sequence[Series]) -> Plot:
    every = [(i, one, budgets(one)) for i, one in enumerate(series)]
    shown = [(i, one, found[:SHOWN_BUDGETS]) for i, one, found in every if found]
    rows = sum(len(found) for _, _, found in shown)
    figure = new_figure(1.2 + 0.52 * rows + 0.35 * len(shown))
    heights = [len(found) for _, _, found in shown]
    column = figure.subplots(len(shown), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    longest = max(max(b.down_bytes, b.up_bytes) for _, _, found in shown for b in found) / 1e6
    for ax, (i, one, found) in zip(column, shown, strict=True):
        colour = look(i).colour
        for y, budget in enumerate(found):
            _bar(ax, y - 0.2, budget.down_bytes / 1e6, colour, 1.0)
            _bar(ax, y + 0.2, budget.up_bytes / 1e6, colour, 0.5)
        labels = [short(budget.label, 34) for budget in found]
        ax.set_yticks(range(len(found)), labels, parse_math=False)
        ax.set_ylim(len(found) - 0.4, -0.6)
        ax.grid(False)
        ax.tick_params(axis="y", length=0)
        if len(series) > 1:
            title = ax.set_title("", loc="left", fontsize=10, color=colour, fontweight="bold")
            title.set_parse_math(False)
            title.set_text(short(one.label, 40))
    column[-1].set_xlim(0, 1.16 * longest or 1)
    column[-1].set_xlabel("Mean traffic of one client in one round (MB)")
    ink = look(0).colour if len(series) == 1 else INK
    bars = [Patch(color=ink, label="Down"), Patch(color=ink, alpha=0.5, linewidth=0, label="Up")]
    figure.legend(handles=bars, loc="outside lower center", ncols=2)
    told = [b for _, _, found in every for b in found]
    dear = max(told, key=lambda b: b.down_bytes + b.up_bytes)
    cheap = min(told, key=lambda b: b.down_bytes + b.up_bytes)
    caption = (
        f"The dearest budget ({dear.label}) costs a client "
        f"{megabytes(dear.down_bytes + dear.up_bytes)} a round, both ways together"
    )
    if cheap is not dear:
        caption += f"; the cheapest ({cheap.label}) {megabytes(cheap.down_bytes + cheap.up_bytes)}"
    if rows < len(told):
        what = "run" if len(every_run(series)) == len(series) else "group"
        caption += f". Drawn: the {SHOWN_BUDGETS} dearest of a {what}"
    return Plot("bytes-budget", "Traffic by client budget", f"{caption}.", figure)


def _bar(ax: Axes, y: float, sent: float, colour: str, alpha: float) -> None:
    ax.barh(y, sent, 0.36, color=colour, alpha=alpha)
    ax.annotate(
        significant(sent), (sent, y), (4, 0), textcoords="offset points", va="center", fontsize=9
    )


def _whole_numbers() -> MaxNLocator:
    return MaxNLocator(integer=True, steps=[1, 2, 5, 10])


def _trend(
    ax: Axes, series: Series, values: Callable[[Run], dict[int, float]], style: Look
) -> None:
    """Values that jump from cohort to cohort: the mean of the rounds around each.

    One run's own values lie pale below; several runs have the band of their trends.
    """

    def smooth(run: Run) -> dict[int, float]:
        told = values(run)
        y, reach = list(told.values()), _reach(len(told))
        means = [_mean(y[max(0, i - reach) : i + reach + 1]) for i in range(len(y))]
        return dict(zip(told, means, strict=True))

    if len(series.runs) == 1 and _reach(len(series.runs[0].rounds)):
        raw = curve(series, values)
        ax.plot(raw.x, raw.mean, color=style.colour, alpha=0.3, linewidth=0.9)
    found = curve(series, smooth)
    band(ax, found, style)
    last = [len(found.x) - 1] if found.x else []
    ax.plot(
        found.x,
        found.mean,
        color=style.colour,
        marker=style.marker,
        markevery=last,
        markersize=5,
    )


def _reach(rounds: int) -> int:
    """How many rounds to each side are averaged."""
    return min(50, rounds // 20)


def _mean(values: Sequence[float]) -> float:
    finite = [v for v in values if math.isfinite(v)]
    return sum(finite) / len(finite) if finite else math.nan


def _thin(series: Sequence[Series]) -> str:
    reach = [len(one.runs) for one in series for run in one.runs if _reach(len(run.rounds))]
    if not reach:
        return ""
    if 1 in reach:
        return "Pale: each round; strong: the mean of the rounds around it."
    return "Lines are means of the rounds around each."


def _bands(series: Sequence[Series]) -> str:
    sizes = sorted({len(one.runs) for one in series if len(one.runs) > 1})
    if not sizes:
        return ""
    runs = f"{sizes[0]} to {sizes[-1]} runs" if len(sizes) > 1 else count(sizes[0], "run")
    return f"Lines with a band: the mean of {runs}, and their lowest to highest."


def _named(one: Series, series: Sequence[Series]) -> str:
    """A caption names its series only where there are several."""
    return f"{one.label} " if len(series) > 1 else ""


def _said(parts: Sequence[str]) -> str:
    """A list for a caption, cut before it becomes a wall of numbers."""
    return few(parts, SHOWN_NAMES)
