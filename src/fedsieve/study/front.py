"""The Pareto front: of all that was run, what nothing beats that sends as few bytes.

A point is an entry at a place, in the means over its seeds: what it sent, and what it scored.
"""

from collections.abc import Iterable
from typing import NamedTuple


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
