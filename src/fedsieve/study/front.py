"""The Pareto front: of all that was run, what nothing beats that sends as few bytes.

A point is an entry at a place, in the means over its seeds: what it sent, and what it scored.
"""

import statistics
from collections.abc import Iterable
from typing import NamedTuple

from fedsieve.study import claims
from fedsieve.study.figures import FRONT, IN_ALL, Figure
from fedsieve.study.measured import Measured


class Point(NamedTuple):
    """megabytes: both ways, all rounds; score: where more is better."""

    entry: str
    place: str
    megabytes: float
    score: float


def front(points: Iterable[Point]) -> list[Point]:
    """Those than which no other has at least the score with at most the bytes, fewest bytes first.

    Of points that are equal in both, the first.
    """
    found: list[Point] = []
    for point in sorted(points, key=lambda each: (each.megabytes, -each.score)):
        if not found or point.score > found[-1].score:
            found.append(point)
    return found


def front_of(figure: Figure, of: Measured, numbers: claims.Numbers) -> list[Point]:
    """What of a panel's runs nothing beats; empty where the figure is no front."""
    if figure.x != IN_ALL:
        return []
    return front(
        Point(entry, place.name, *(statistics.fmean(each.values()) for each in told))
        for entry in of.entries
        for place in of.places
        if all(told := [numbers[measure][entry][place.name] for measure in FRONT])
    )
