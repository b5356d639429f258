"""A figure's picture, from what its runs have measured: what stands where, and by which name."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

from fedsieve.report import figure as drawing
from fedsieve.report.read import Run
from fedsieve.report.series import Curve, Spread, curve, shown_measure, spread
from fedsieve.study import claims
from fedsieve.study.figures import FRONT, IN_ALL, Figure, PlaceTable
from fedsieve.study.front import Point
from fedsieve.study.measured import Measured, scores
from fedsieve.tasks.words import spoken

_UNITS = {
    "megabytes": "traffic, MB",
    "megabytes down": "sent down, MB",
    "megabytes up": "sent up, MB",
    "seconds": "time on the wire, s",
    "memory megabytes": "memory of a client, MB",
}
_X = {
    IN_ALL: "Traffic of the whole run, MB",
    "round": "Round",
    "megabytes": "Traffic, MB",
    "megabytes up": "Sent up, MB",
}


def _along(figure: Figure, measured: Iterable[Measured]) -> list[PlaceTable]:
    """The places that some panel has, as they stand along the axis."""
    there = [place for of in measured for place in of.places]
    return [place for place in figure.place if place in there]


def picture(
    figure: Figure,
    measured: Mapping[str, Measured],
    panels: Mapping[str, claims.Numbers],
    fronts: Mapping[str, Sequence[Point]],
) -> bytes | None:
    """As PNG; None where there is nothing to draw. panels, fronts: by the name of the panel"""
    along = _along(figure, measured.values())
    drawn = [
        _drawn_front(of, panels[name], fronts[name])
        if figure.x == IN_ALL
        else _drawn(figure, along, of, panels[name][figure.y])
        for name, of in measured.items()
    ]
    if not any(panel.curves for panel in drawn):
        return None
    leading = [
        shown_measure([one])
        for of in measured.values()
        for place in of.runs.values()
        for one in place.values()
    ]
    score = spoken(leading[0]) if leading and leading[0] else "score"
    y = score if figure.y == "score" or figure.x != "place" else _UNITS[figure.y]
    if figure.relative_to and figure.x == "place":
        y = f"{y.partition(',')[0]}, {figure.relative_to} = 1"
    if figure.x in ("place", IN_ALL):
        entries = [entry.name for entry in figure.entry]
        entries = [name for name in entries if any(name in panel.curves for panel in drawn)]
    else:
        entries = list(dict.fromkeys(label for panel in drawn for label in panel.curves))
    places = [p.name for p in along] if figure.x == "place" and _named(along) else []
    x_label = figure.x_label or _X.get(figure.x, "")
    cost = figure.x == "place" and figure.y != "score"
    return drawing.png(drawn, entries, places, x_label, y, figure.log, cost)


def _drawn(
    figure: Figure, along: Sequence[PlaceTable], of: Measured, values: claims.Values
) -> drawing.Panel:
    curves: dict[str, Curve] = {}
    if figure.x == "place":
        for entry in of.entries:
            found = values[entry]
            points = [(_x(along, p), spread([*found[p.name].values()])) for p in of.places]
            if (line := _through(points)) is not None:
                curves[entry] = line
        return drawing.Panel(of.name, curves)
    for place in of.places:
        for entry, one in of.runs.get(place.name, {}).items():
            label = entry if len(figure.place) == 1 else f"{entry}, {place.name}"
            if all(scores(place, of.panel)(run) for run in one.runs):
                curves[label] = curve(one, scores(place, of.panel), _passed(figure.x))
    return drawing.Panel(of.name, curves)


def _through(points: Iterable[tuple[float, Spread | None]]) -> Curve | None:
    """A line with its band; None where no point has a mean that can be drawn."""
    told = [(x, y) for x, y in points if y is not None and math.isfinite(y.mean)]
    if not told:
        return None
    xs, ys = zip(*told, strict=True)
    return Curve([*xs], [y.mean for y in ys], [y.low for y in ys], [y.high for y in ys])


def _x(along: Sequence[PlaceTable], place: PlaceTable) -> float:
    return float(along.index(place)) if _named(along) else float(place.x or 0.0)


def _named(along: Iterable[PlaceTable]) -> bool:
    """Whether the places along the axis are names, and not numbers."""
    return any(place.x is None for place in along)


def _passed(x: str) -> Callable[[Run], dict[int, float]] | None:
    """How far a run had come by each round."""
    if x == "round":
        return None

    def sent(run: Run) -> dict[int, float]:
        passed, told = 0.0, {0: 0.0}
        for each in run.rounds:
            passed += each.up_bytes + (each.down_bytes if x == "megabytes" else 0)
            told[each.round] = passed / 1e6
        return told

    return sent


def _drawn_front(of: Measured, numbers: claims.Numbers, best: Sequence[Point]) -> drawing.Panel:
    curves: dict[str, Curve] = {}
    for entry in of.entries:
        told = ([numbers[m][entry][place.name] for m in FRONT] for place in of.places)
        points = [(statistics.fmean(s.values()), spread([*y.values()])) for s, y in told if s and y]
        if (line := _through(points)) is not None:
            curves[entry] = line
    marks = [drawing.Mark(p.megabytes, p.score, f"{p.entry}, {p.place}") for p in best]
    return drawing.Panel(of.name, curves, tuple(marks))
