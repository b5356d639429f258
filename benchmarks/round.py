"""Where a round's time goes: what FedSieve adds to training and evaluation, on the demo's setting.

Runs the demo's recipe for a few rounds as `fedsieve run` does, logs and checkpoints included, and
takes the wall clock from the end of round 1 (a warm-up) to the end of the last. What is neither
forward, backward, optimizer step nor evaluation is overhead. A client's decode and encode are
compared with its training time, and so are those of both ends together, for which no limit is set.
Needs `fedsieve fetch minilm-l6 20newsgroups`.

    python benchmarks/round.py [--rounds 7] [--json FILE] [key=value ...]
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table

from fedsieve.engine.loop import Receipt, Round
from fedsieve.errors import FedSieveError
from fedsieve.recipe import read as recipes
from fedsieve.run import runner

REACH = {"outside": 0.03, "client": 0.01}


def measure(rounds: int, overrides: Sequence[str]) -> list[dict[str, float]]:
    """Of each round after the first, the seconds that went where, and the bytes."""
    recipe = recipes.load("demo", [f"rounds={rounds}", *overrides])
    ends: list[float] = []
    summaries: list[Round] = []
    at_clients: list[float] = []

    def show(summary: Round, receipts: Sequence[Receipt]) -> None:
        ends.append(time.perf_counter())
        summaries.append(summary)
        at_clients.append(sum(receipt.wire for receipt in receipts))

    with tempfile.TemporaryDirectory() as folder:
        runner.start(recipe, Path(folder) / "run", show)
    return [
        {
            "wall": ends[i] - ends[i - 1],
            "compute": summaries[i].compute_seconds,
            "evaluation": summaries[i].evaluation_seconds,
            "client": at_clients[i],
            "wire": summaries[i].wire_seconds,
            "bytes": summaries[i].down_bytes + summaries[i].up_bytes,
        }
        for i in range(2, len(ends))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Where a round's time goes.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", help="key=value, changes to the demo's recipe")
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        rows = measure(given.rounds, given.overrides)
    except FedSieveError as error:
        sys.exit(f"skipped: {error}")
    total = {key: sum(row[key] for row in rows) for key in rows[0]}
    outside = [1 - (row["compute"] + row["evaluation"]) / row["wall"] for row in rows]
    spread = {"outside": outside}
    shares = {"outside": 1 - (total["compute"] + total["evaluation"]) / total["wall"]}
    for key in ("client", "wire"):
        shares[key] = total[key] / total["compute"]
        spread[key] = [row[key] / row["compute"] for row in rows]

    console = Console(highlight=False, soft_wrap=True)
    table = Table("seconds a round", "min", "median", "max", box=None)
    for key in ("wall", "compute", "evaluation", "client", "wire"):
        values = sorted(row[key] for row in rows)
        middle = values[len(values) // 2]
        table.add_row(key, f"{values[0]:.3f}", f"{middle:.3f}", f"{values[-1]:.3f}")
    console.print(table)
    for name, what in (
        ("outside", "of a round outside forward, backward, optimizer and evaluation"),
        ("client", "of training time for a client's decode and encode"),
        ("wire", "of training time for encode and decode at both ends"),
    ):
        limit = f"; to stay under {REACH[name]:.0%}" if name in REACH else ""
        rounds = f"rounds {min(spread[name]):.2%} to {max(spread[name]):.2%}"
        console.print(f"{shares[name]:.2%} {what} ({rounds}{limit})")
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    console.print(f"{len(rows)} rounds after a warm-up; {machine}")
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        result = {"shares": shares, "reach": REACH, "rounds": rows, "machine": machine}
        given.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
