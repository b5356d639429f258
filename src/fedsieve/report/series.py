"""Runs that differ only in their seed, taken as one: curves with a band, and the table's numbers.

A report draws series, not runs. A run on its own is a series of one, so that one way of drawing
serves both. Over several runs a curve is their mean at each round, and its band reaches from the
lowest to the highest: with the three or so seeds of a study, that shows all there is, and claims
nothing about seeds that were not run. Tables give the mean and the standard deviation.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedsieve.clients.network import REFERENCE, Conditions, clock, first_round
from fedsieve.errors import FedSieveError, count
from fedsieve.recipe.overrides import flat
from fedsieve.report.read import (
    LOSS,
    Budget,
    Run,
    best,
    dearest_first,
    evaluations,
    load_all,
    mean_shares,
)
from fedsieve.report.words import plain
from fedsieve.tasks.words import spoken


class Series(NamedTuple):
    """What is drawn as one line: runs of different seeds, or one run."""

    label: str
    runs: tuple[Run, ...]


class Spread(NamedTuple):
    """One number of several runs. deviation: of the sample (n - 1); None for a single run."""

    mean: float
    deviation: float | None
    low: float
    high: float


class Curve(NamedTuple):
    """Over the rounds that all runs of a series have; x is a mean over them too."""

    x: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


class Target(NamedTuple):
    """The score that the runs are compared at."""

    measure: str  # "eval_loss" or a metric
    value: float
    given: bool  # by the user; else what all runs reach


class Row(NamedTuple):
    """One line of the table: a series in numbers. None where no run of it tells.

    final, best:       of the target's measure
    total_bytes:       both ways, all rounds
    target:            what was to be reached, and `reached`: how many runs did
    bytes_to_target, seconds_to_target: of the runs that reached it; seconds are simulated, one
                       entry for each of the conditions
    memory_bytes:      the most that a client needed
    """

    label: str
    runs: int
    final: Spread | None
    best: Spread | None
    total_bytes: Spread
    target: Target | None
    reached: int
    bytes_to_target: Spread | None
    seconds_to_target: tuple[Spread | None, ...]
    memory_bytes: Spread | None


def gather(runs: Sequence[Path], groups: Mapping[str, Sequence[Path]]) -> list[Series]:
    """Load the groups, each as a series under its label, and after them the runs in none of them.

    Raises FedSieveError as `load_all` does, and for a group without runs.
    """
    series = []
    for label, paths in groups.items():
        if not paths:
            raise FedSieveError(f"The group {label!r} has no runs: give it at least one.")
        series.append(Series(label, _named_by_seed(label, load_all(paths))))
    grouped = {path.resolve() for paths in groups.values() for path in paths}
    single = [path for path in runs if path.resolve() not in grouped]
    if single or not groups:
        series += [Series(run.name, (run,)) for run in load_all(single)]
    return series


def _named_by_seed(label: str, runs: Sequence[Run]) -> tuple[Run, ...]:
    if len(runs) == 1:
        return (runs[0]._replace(name=label),)
    names = [f"seed {run.recipe.get('seed')}" for run in runs]
    if len(set(names)) < len(runs):
        names = [run.name for run in runs]  # told apart by load_all
    return tuple(
        run._replace(name=f"{label}, {name}") for run, name in zip(runs, names, strict=True)
    )


def every_run(series: Iterable[Series]) -> list[Run]:
    return [run for one in series for run in one.runs]


def shown_measure(series: Sequence[Series]) -> str | None:
    """The leading metric of the first run that has one, else the evaluation loss if any has it."""
    runs = every_run(series)
    leading = [next(iter(row.metrics)) for run in runs for row in run.rounds if row.metrics]
    found = any(evaluations(run, LOSS) for run in runs)
    return leading[0] if leading else LOSS if found else None


def spread(values: Sequence[float]) -> Spread | None:
    """Over runs; None for no values. One that is not finite makes the mean so too."""
    if not values:
        return None
    mean = sum(values) / len(values)
    deviation = None
    if len(values) > 1:
        deviation = statistics.stdev(values) if math.isfinite(mean) else math.nan
    return Spread(mean, deviation, min(values), max(values))


def curve(
    series: Series,
    values: Callable[[Run], Mapping[int, float]],
    x: Callable[[Run], Mapping[int, float]] | None = None,
) -> Curve:
    """What `values` tells of each run by round, against `x`, or against the round itself."""
    told = [values(run) for run in series.runs]
    common = sorted(set.intersection(*(set(of_run) for of_run in told)))
    points = [[of_run[number] for of_run in told] for number in common]
    if x is None:
        places = [float(number) for number in common]
    else:
        by_run = [x(run) for run in series.runs]
        places = [_mean([of_run[number] for of_run in by_run]) for number in common]
    # min and max of a NaN depend on the order: where a run has none, there is no band.
    whole = [point if all(map(math.isfinite, point)) else [math.nan] for point in points]
    return Curve(places, [*map(_mean, points)], [*map(min, whole)], [*map(max, whole)])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def find_target(series: Sequence[Series], given: float | None) -> Target | None:
    """The given score, or the best that every run reaches; runs without any score are left out.

    Raises FedSieveError for a target that no score can be, or where nothing was evaluated.
    """
    measure = shown_measure(series)
    if given is not None:
        if measure is None:
            raise FedSieveError(f"A target of {given:g} was given, but no run was evaluated.")
        if not (0 < given < math.inf if measure == LOSS else 0 < given <= 1):
            allowed = "finite and above 0" if measure == LOSS else "in (0, 1]"
            raise FedSieveError(
                f"A target of {given} was given: the runs tell {spoken(measure)}, "
                f"so it must be {allowed}."
            )
        return Target(measure, given, True)
    if measure is None:
        return None
    tops = [best(evaluations(run, measure), measure) for run in every_run(series)]
    values = [top.value for top in tops if top]
    if not values:
        return None
    return Target(measure, (max if measure == LOSS else min)(values), False)


def table(
    groups: Mapping[str, Sequence[Path]],
    target: float | None = None,
    *,
    conditions: Sequence[Conditions] = REFERENCE,
) -> list[Row]:
    """The numbers of the report's table: a row a group (label -> run directories of its seeds).

    target: the leading metric (or, where no run has any, the evaluation loss) to reach; None takes
        the best that every run of every group reaches
    conditions: of the network, one for each entry of `seconds_to_target`

    Raises FedSieveError as `report.write` does.
    """
    series = gather([], groups)
    return rows(series, find_target(series, target), conditions)


def rows(
    series: Sequence[Series], target: Target | None, conditions: Sequence[Conditions]
) -> list[Row]:
    return [_row(one, target, conditions) for one in series]


def _row(series: Series, target: Target | None, conditions: Sequence[Conditions]) -> Row:
    final, top, prices = [], [], []
    seconds: list[list[float]] = [[] for _ in conditions]
    for run in series.runs:
        found = evaluations(run, target.measure) if target else []
        if not target or not found:
            continue
        final.append(found[-1].value)
        if best_found := best(found, target.measure):
            top.append(best_found.value)
        sign = -1 if target.measure == LOSS else 1
        number = first_round(sign * target.value, {e.round: sign * e.value for e in found})
        if number is None:
            continue
        prices.append(next(e.total_bytes for e in found if e.round == number))
        if run.clients:
            for passed, world in zip(seconds, conditions, strict=True):
                passed.append(clock(run.clients.parts, world)[number])
    memory = [r.clients.memory_bytes for r in series.runs if r.clients and r.clients.memory_bytes]
    total = spread([run.rounds[-1].total_bytes for run in series.runs])
    assert total is not None  # a series has at least one run, and a run at least one round
    return Row(
        label=series.label,
        runs=len(series.runs),
        final=spread(final),
        best=spread(top),
        total_bytes=total,
        target=target,
        reached=len(prices),
        bytes_to_target=spread(prices),
        seconds_to_target=tuple(spread(passed) for passed in seconds),
        memory_bytes=spread(memory),
    )


def budgets(series: Series) -> list[Budget]:
    """What the clients of one budget sent, over all runs of the series; the dearest first."""
    told: dict[str, list[Budget]] = {}
    for run in series.runs:
        for budget in run.clients.budgets if run.clients else ():
            told.setdefault(budget.label, []).append(budget)
    joined = []
    for label, parts in told.items():
        n = sum(part.client_rounds for part in parts)
        down = sum(part.client_rounds * part.down_bytes for part in parts) / n
        up = sum(part.client_rounds * part.up_bytes for part in parts) / n
        shares = (
            mean_shares(part.down_kept for part in parts),
            mean_shares(part.up_kept for part in parts),
        )
        joined.append(Budget(label, n, down, up, *shares))
    return sorted(joined, key=dearest_first)


def doubts(series: Series) -> list[str]:
    """Why a band of these runs might not be what it seems."""
    told = []
    each = [keys_of(run.recipe) for run in series.runs]
    keys = dict.fromkeys(key for of_run in each for key in of_run)
    mixed = [key for key in keys if not _of_seed(key) and len({e.get(key) for e in each}) > 1]
    if mixed:
        told.append(
            f"Its runs differ in more than the seed ({', '.join(mixed)}): the band shows that too."
        )
    ends = sorted({run.rounds[-1].round for run in series.runs})
    if len(ends) > 1:
        told.append(
            f"Its runs ended after {ends[0]:,} to {count(ends[-1], 'round')}: lines show the "
            "rounds that all have, tables the last round of each."
        )
    return told


def _of_seed(key: str) -> bool:
    """Whether a recipe's key may differ between runs of one group."""
    return key.split(".")[-1] == "seed" or key == "name"


def keys_of(recipe: Mapping[str, Any]) -> dict[str, str]:
    """A recipe's keys, dotted, and their values in words; what it ran on left out."""
    return {key: plain(value) for key, value in flat(recipe) if not key.startswith("environment.")}
