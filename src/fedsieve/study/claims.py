"""What came out of a figure as numbers, and whether it is what the paper claims.

A number is told of each seed. A claim is asked of the mean over the seeds that both of its sides
have, and of each of them alone: it *holds* where it does in the mean and in every seed, *does not
hold* where it does not in the mean, and is *not clear* between the two. With the three seeds that
papers run, that says what there is to say. Two scores of which neither rose above where its runs
began show nothing of each other: such a claim is *not clear* at best.
"""

import math
import statistics
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

from fedsieve.report.words import significant
from fedsieve.study.figures import MEAN, CheckTable, Figure, Measure

Verdict = Literal["holds", "not clear", "does not hold", "not measured"]
WORST_FIRST: tuple[Verdict, ...] = ("does not hold", "not measured", "not clear", "holds")
Values = Mapping[str, Mapping[str, Mapping[int, float]]]  # entry -> place -> seed -> number
# Of a panel: measure -> its values. A cost that never came to its target is infinite.
Numbers = Mapping[Measure, Values]


class Finding(NamedTuple):
    """What became of one claim.

    measured: the numbers, in words; seeds: in how many of them it holds, and of how many
    """

    says: str
    measured: str
    seeds: tuple[int, int]
    verdict: Verdict


class _Comparison(NamedTuple):
    """One place of one panel: seed -> the number of the left side, of the right side."""

    where: str
    left: dict[int, float]
    right: dict[int, float]

    @property
    def means(self) -> tuple[float, float]:
        return statistics.fmean(self.left.values()), statistics.fmean(self.right.values())


def judged(
    check: CheckTable,
    figure: Figure,
    panels: Mapping[str, Numbers],
    rises: Mapping[str, Values] | None = None,
) -> Finding:
    """panels: name -> what was measured there; only of entries and places that were to be run.
    rises: name -> how far each score there rose above where its run began, where that is known

    A number that is missing makes the claim "not measured"; the others are told all the same.
    """
    several = len(figure.place) * len(panels) > 1
    found = [
        _Comparison(where if several else "", *_common(left, right))
        for name, numbers in panels.items()
        if check.panel in (None, name)
        for where, left, right in _sides(check, figure, name, numbers)
    ]
    if not found or any(not each.left for each in found):
        gone = "; ".join(each.where for each in found if not each.left and each.where)
        there = _said(check, [each for each in found if each.left])
        told = [f"missing: {gone}"] if gone else []
        told += [f"of the others, {there}"] if there else []
        return Finding(check.says, "; ".join(told), (0, 0), "not measured")
    seeds = set.intersection(*(set(each.left) for each in found))
    holding = [
        seed for seed in seeds if all(_holds(check, e.left[seed], e.right[seed]) for e in found)
    ]
    verdict: Verdict = "does not hold"
    if all(_holds(check, *each.means) for each in found):
        verdict = "holds" if len(holding) == len(seeds) else "not clear"
    said = _said(check, found)
    still = _still(check, figure, rises or {})
    if still and verdict == "holds":
        verdict = "not clear"
        where = f", in {'; '.join(still)}" if several else ""
        said = f"neither rose above where it began{where}; {said}"
    return Finding(check.says, said, (len(holding), len(seeds)), verdict)


def _still(check: CheckTable, figure: Figure, rises: Mapping[str, Values]) -> list[str]:
    """The places of a claim of scores where neither side's has risen, in the mean."""
    if (check.measure or figure.y) != "score":
        return []
    return [
        where
        for name, of_panel in rises.items()
        if check.panel in (None, name)
        for where, left, right in _sides(check, figure, name, {"score": of_panel})
        if left and right and max(map(statistics.fmean, (left.values(), right.values()))) <= 0
    ]


def _said(check: CheckTable, found: list[_Comparison]) -> str:
    """The numbers of each place, in words."""
    return "; ".join(
        f"{each.where + ': ' if each.where else ''}{_against(check, *each.means)}" for each in found
    )


def of_all(findings: list[Finding]) -> Verdict:
    """The verdict of a figure: that of its worst claim."""
    return min((each.verdict for each in findings), key=WORST_FIRST.index, default="not measured")


def over_places(of_entry: Mapping[str, Mapping[int, float]], places: list[str]) -> dict[int, float]:
    """The mean over places, of the seeds that all have; empty where one has none."""
    told = [of_entry.get(place, {}) for place in places]
    seeds = set.intersection(*map(set, told)) if told else set()
    return {seed: statistics.fmean(each[seed] for each in told) for seed in sorted(seeds)}


def _sides(
    check: CheckTable, figure: Figure, panel: str, numbers: Numbers
) -> Iterator[tuple[str, dict[int, float], dict[int, float]]]:
    values = numbers.get(check.measure or figure.y, {})
    left, right = (values.get(name) for name in (check.left, check.right or check.left))
    if left is None or right is None:
        return  # entries that this panel is without
    places = list(left)

    def at(of_entry: Mapping[str, Mapping[int, float]], place: str) -> dict[int, float]:
        return over_places(of_entry, places) if place == MEAN else dict(of_entry.get(place, {}))

    if check.left_at is not None and check.right_at is not None:
        yield panel, at(left, check.left_at), at(right, check.right_at)
        return
    for place in [check.at] if check.at else places:
        if place in (*left, MEAN):
            yield f"{panel}, {place}", at(left, place), at(right, place)


def _common(
    left: dict[int, float], right: dict[int, float]
) -> tuple[dict[int, float], dict[int, float]]:
    seeds = sorted(left.keys() & right.keys())
    return {seed: left[seed] for seed in seeds}, {seed: right[seed] for seed in seeds}


def _holds(check: CheckTable, left: float, right: float) -> bool:
    if (math.isinf(left) and math.isinf(right)) or math.isnan(left) or math.isnan(right):
        return False  # neither came to its target: nothing is shown
    return (
        (check.least is None or left >= check.least * right)
        and (check.most is None or left <= check.most * right)
        and (check.above is None or left - right > check.above)
    )


def _against(check: CheckTable, left: float, right: float) -> str:
    """Both numbers, how they compare, and how they should."""
    said = f"{number(left)} against {number(right)}"
    if check.least is not None or check.most is not None:
        if right and math.isfinite(left) and math.isfinite(right):
            said += f", {left / right:.3g} times"
        bounds = {"at least": check.least, "at most": check.most}
        claimed = [f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None]
        return f"{said} ({' and '.join(claimed)})"
    return f"{said}, {left - right:+.3g} (more than {check.above:+g})"


def number(value: float) -> str:
    if math.isinf(value):
        return "not reached"
    return "-" if math.isnan(value) else significant(value)
