"""Whether figures that were drawn again give the numbers that docs/papers.md has.

    fedsieve reproduce flasc/fig2 --seeds 0 --jobs 2
    python benchmarks/again.py flasc/fig2

compares `runs/papers/flasc-fig2-small/figure.json` with `docs/papers/flasc-fig2.json`, seed by
seed: how many numbers are the same to the last digit, and how far the others are off, beside the
standard deviation over the published seeds where there are several. Seeds that are in one of them
alone are left out. Exit code 1 where a number is further off than that spread or missing, or where
nothing could be compared.
"""

import argparse
import json
import math
import statistics
import sys
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

PUBLISHED = Path(__file__).parents[1] / "docs" / "papers"


class Pair(NamedTuple):
    """A number as it is published, and as it came out again.

    spread: standard deviation over the published seeds; NaN of one
    """

    where: str
    published: float
    again: float
    spread: float


def pairs(published: dict[str, Any], again: dict[str, Any]) -> Iterator[Pair]:
    """Of every measure, entry, place and seed that both have."""
    for panel, measures in published["values"].items():
        for measure, entries in measures.items():
            for entry, places in entries.items():
                for place, seeds in places.items():
                    spread = _spread(seeds.values())
                    of = again["values"].get(panel, {}).get(measure, {}).get(entry, {})
                    for seed, value in of.get(place, {}).items():
                        if seed in seeds:
                            where = f"{panel}, {entry}, {place}, seed {seed}: {measure}"
                            yield Pair(where, _number(seeds[seed]), _number(value), spread)


def _number(value: float | str) -> float:
    """A target that is never reached has words in the place of a number."""
    return math.inf if isinstance(value, str) else value


def _spread(values: Collection[float | str]) -> float:
    reached = [value for value in values if not isinstance(value, str)]
    return statistics.stdev(reached) if len(reached) > 1 else math.nan


def _read(path: Path, otherwise: str) -> dict[str, Any]:
    if not path.is_file():
        sys.exit(f"{path} is not there: {otherwise}")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _seeds(figure: dict[str, Any]) -> Counter[str]:
    """How many numbers there are of each seed."""
    return Counter(
        seed
        for measures in figure["values"].values()
        for entries in measures.values()
        for places in entries.values()
        for seeds in places.values()
        for seed in seeds
    )


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    asked.add_argument("figures", nargs="+", metavar="FIGURE", help="flasc/fig2, for one")
    asked.add_argument(
        "--out", type=Path, default=Path("runs/papers"), help="where the figures' folders are"
    )
    given = asked.parse_args()
    beyond = False
    for figure in given.figures:
        slug = figure.lower().replace("/", "-")
        published = _read(PUBLISHED / f"{slug}.json", "no numbers of such a figure are published")
        folder = given.out / f"{slug}-small"
        again = _read(folder / "figure.json", f"draw it first, by `fedsieve reproduce {figure}`")
        there, drawn = _seeds(published), _seeds(again)
        most = sum(count for seed, count in there.items() if seed in drawn)
        found = list(pairs(published, again))
        same = [pair for pair in found if pair.again == pair.published]
        print(
            f"{figure}: {len(found)} of the {most} numbers that are published of these seeds "
            f"({', '.join(sorted(drawn))}) compared, {len(same)} the same to the last digit"
        )
        off = [pair for pair in found if pair.again != pair.published]
        for pair in off:
            print(
                f"    {pair.where}: {pair.again:.4g}, published {pair.published:.4g}"
                f" (spread over seeds {pair.spread:.2g})"
            )
        far = [pair for pair in off if not abs(pair.again - pair.published) <= pair.spread]
        beyond |= bool(far) or not found or len(found) < most
    return int(beyond)


if __name__ == "__main__":
    sys.exit(main())
