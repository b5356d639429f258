"""A round's clients one after another in one process, against worker processes side by side.

One process of all threads against as many workers of one thread: a round of 10 equal clients of the
demo's model and rows. Runs of both kinds take turns, because other work on the machine comes and
goes; what counts is the ratio of neighbours. The first round, in which workers start, is left out.
With `--ray ADDRESS` the same workers on a Ray cluster are measured too.
Needs `fedsieve fetch minilm-l6 20newsgroups`.

    python benchmarks/pool.py [--rounds 6] [--pairs 3] [--workers 2] [--ray ADDRESS] [--json FILE]
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REACH = 1.1
SAME = (
    'partition={ kind = "iid", clients = 40 }',
    "cohort=10",
    "training.steps=4",
    'method={ name = "fedit" }',
    "budgets=",
    "data.test_split=",
)


def seconds(engine: str, rounds: int, threads: int) -> list[float]:
    """Of each round after the first, in a fresh process: the wall clock of the whole round."""
    told = subprocess.run(
        [sys.executable, __file__, "--measure", engine, "--rounds", str(rounds)],
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        check=True,
        stdout=subprocess.PIPE,
    )
    found: list[float] = json.loads(told.stdout)
    return found


def measure(engine: str, rounds: int) -> list[float]:
    from fedsieve.recipe import read as recipes
    from fedsieve.run import runner

    recipe = recipes.load("demo", [f"rounds={rounds}", f"engine={engine}", *SAME])
    ends: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        runner.start(recipe, Path(folder) / "run", lambda *_: ends.append(time.perf_counter()))
    return [ends[i] - ends[i - 1] for i in range(2, len(ends))]


def main() -> None:
    parser = argparse.ArgumentParser(description="One process against worker processes.")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 2)
    parser.add_argument("--ray", metavar="ADDRESS")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.measure:
        out = sys.stdout
        sys.stdout = sys.stderr
        json.dump(measure(given.measure, given.rounds), out)
        return
    workers = f"workers = {given.workers}, threads = 1"
    kinds = {
        "one process": '{ kind = "process" }',
        "processes": f'{{ kind = "processes", {workers} }}',
    }
    if given.ray:
        kinds["ray"] = f'{{ kind = "ray", {workers}, address = "{given.ray}" }}'
    taken: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(given.pairs):
        for kind, engine in kinds.items():
            rounds = seconds(engine, given.rounds, given.workers)
            taken[kind].append(statistics.median(rounds))
            print(f"{kind}: {taken[kind][-1]:.2f} s a round", flush=True)
    result: dict[str, Any] = {"seconds a round": taken, "machine": platform.machine()}
    for kind, over in (("processes", "one process"), ("ray", "processes")):
        if kind in taken:
            ratios = [b / a for a, b in zip(taken[kind], taken[over], strict=True)]
            result[f"{kind}: times as fast as {over}"] = ratios
            middle = statistics.median(ratios)
            print(
                f"{kind}: {middle:.2f} times as fast as {over} ({min(ratios):.2f} to "
                f"{max(ratios):.2f}, {given.pairs} pairs of {given.rounds - 1} rounds)"
            )
    for kind, each in taken.items():
        print(f"{kind}: {min(each):.2f} to {max(each):.2f} s a round")
    print(f"to reach: {REACH:g} times; {given.workers} workers of 1 thread")
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
