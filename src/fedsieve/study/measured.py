"""What a figure's runs have measured, as numbers: of a panel, by entry, place and seed."""

import itertools
import math
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

from fedsieve.algebra.budget import Link
from fedsieve.clients.network import DOWNLINK, Conditions, clock, first_round
from fedsieve.report.read import LOSS, Run, evaluations
from fedsieve.report.series import Series, shown_measure
from fedsieve.study import claims
from fedsieve.study.figures import FRONT, IN_ALL, Figure, Measure, PanelTable, PlaceTable


class Measured(NamedTuple):
    """A panel: its runs by place and entry, and what its parts said of themselves.

    notes: what was said -> the place of each part that said it
    """

    name: str
    panel: PanelTable
    places: list[PlaceTable]
    runs: dict[str, dict[str, Series]]  # place -> entry -> its runs
    entries: list[str]
    notes: dict[str, list[str]]


def numbers_of(figure: Figure, of: Measured) -> claims.Numbers:
    """All that the figure tells of a panel: every measure that it draws or that a claim is of."""
    asked = dict.fromkeys([figure.y, *(check.measure or figure.y for check in figure.check)])
    if figure.x == IN_ALL:
        asked |= dict.fromkeys(FRONT)
    return {measure: _values(figure, of, measure) for measure in asked}


def _values(figure: Figure, of: Measured, measure: Measure) -> dict[str, Any]:
    found: dict[str, dict[str, dict[int, float]]] = {}
    for entry in of.entries:
        found[entry] = {}
        for place in of.places:
            one = of.runs.get(place.name, {}).get(entry)
            runs = one.runs if one else ()
            told = {int(r.recipe["seed"]): _value(r, measure, place, of.panel) for r in runs}
            there = {seed: value for seed, value in told.items() if not math.isnan(value)}
            found[entry][place.name] = dict(sorted(there.items()))
    if figure.relative_to is None or measure != figure.y:
        return found
    one_of = found.get(figure.relative_to, {})
    return {
        entry: {
            place: {
                seed: _ratio(value, one_of[place][seed])
                for seed, value in of_place.items()
                if seed in one_of.get(place, {})
            }
            for place, of_place in places.items()
        }
        for entry, places in found.items()
    }


def rises_of(of: Measured) -> claims.Values:
    """How far each score of a panel rose above that before the first round, where both are told.
    Of a loss nothing: it is no score, and does not rise.
    """
    found: dict[str, dict[str, dict[int, float]]] = {}
    for entry, place in itertools.product(of.entries, of.places):
        one = of.runs.get(place.name, {}).get(entry)
        there = found.setdefault(entry, {}).setdefault(place.name, {})
        for run in one.runs if one else ():
            told = scores(place, of.panel)(run)
            if 0 in told and LOSS not in _metrics(place, of.panel, run):
                there[int(run.recipe["seed"])] = told[max(told)] - told[0]
    return found


def untold(figure: Figure, of: Measured, numbers: claims.Numbers) -> list[str]:
    """What runs that are there do not tell, in words: a metric that their task has not, say."""
    asked = [m for m in numbers if m != figure.y or figure.relative_to is None]
    found = []
    for measure, place in itertools.product(asked, of.places):
        for entry, one in of.runs.get(place.name, {}).items():
            if one.runs and not numbers[measure].get(entry, {}).get(place.name):
                metrics = (place.metric,) if place.metric else of.panel.metrics or ()
                named = (
                    f" of {' and '.join(metrics)[:200]}" if measure == "score" and metrics else ""
                )
                found.append(f"{of.name}, {place.name}: {entry}: its runs tell no {measure}{named}")
    return found


def _ratio(value: float, one: float) -> float:
    return math.nan if math.isinf(one) or not one else value / one


def _value(run: Run, measure: Measure, place: PlaceTable, panel: PanelTable) -> float:
    """One number of one run. Costs are to the target, and infinite where it was not reached."""
    told, target = scores(place, panel)(run), panel.target
    if measure == "score":
        return told[max(told)] if told else math.nan
    if measure == "memory megabytes":
        memory = run.clients.memory_bytes if run.clients else None
        return math.nan if memory is None else memory / 1e6
    last: int | None = run.rounds[-1].round
    if target is not None:
        last = first_round(target, told)
    if last is None:
        return math.inf
    if measure == "seconds":
        line = Conditions(Link(DOWNLINK, DOWNLINK * place.uplink), seconds_per_step=0.0)
        return clock(run.clients.parts, line)[last] if run.clients else math.nan
    rounds = [each for each in run.rounds if each.round <= last]
    down = sum(each.down_bytes for each in rounds) if measure != "megabytes up" else 0
    up = sum(each.up_bytes for each in rounds) if measure != "megabytes down" else 0
    return (down + up) / 1e6


def scores(place: PlaceTable, panel: PanelTable) -> Callable[[Run], dict[int, float]]:
    """What is told of a run by round: a metric, or the mean of the panel's."""

    def told(run: Run) -> dict[int, float]:
        names = _metrics(place, panel, run)
        of = [{e.round: e.value for e in evaluations(run, name)} for name in names]
        rounds = set.intersection(*map(set, of)) if of else set()
        return {number: statistics.fmean(e[number] for e in of) for number in sorted(rounds)}

    return told


def _metrics(place: PlaceTable, panel: PanelTable, run: Run) -> tuple[str, ...]:
    """Whose mean a run's score is; by default its leading one, if it has any."""
    if place.metric:
        return (place.metric,)
    leading = shown_measure([Series("", (run,))])
    return panel.metrics or ((leading,) if leading else ())
