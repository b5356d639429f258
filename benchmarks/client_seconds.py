"""What a client's k of r ranks take in seconds, against FSLoRA's Table A.3.

    python benchmarks/client_seconds.py [--rounds 8] [--json FILE]

The paper has O(H k (m + n)) for H local steps of every method's client, so that what the adapter
adds to a step grows with k in proportion, and for FedStack's clients (sum k + 1) m n more a round,
since each adds the stack of all clients to its base. Four clients of one federation hold an eighth,
a quarter, half and all of 64 ranks on every linear layer of MiniLM-L6 and train in turns, so that
whatever else the machine does slows all alike; the shortest of the rounds counts for each. Of a
step the model's own part is not in the formula: t(k) = base + slope * k is fitted to the four, and
said is how far the four lie from that line. Needs `fedsieve fetch minilm-l6 20newsgroups`.
"""

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import linear_regression
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from fedsieve.engine.loop import Receipt, Round
from fedsieve.errors import FedSieveError
from fedsieve.recipe import read as recipes
from fedsieve.run import runner
from measured import machine

RANK, RATIOS = 64, (0.125, 0.25, 0.5, 1.0)
METHODS = ("fedit", "hetlora", "flexlora", "flora", "fslora")
SETTINGS = (
    "cohort=4",
    "partition={ kind = 'iid', clients = 4 }",
    f"lora={{ rank = {RANK}, alpha = {RANK}, targets = ['query', 'key', 'value', 'dense'] }}",
    "server={ optimizer = 'sgd', lr = 1.0 }",
    "training={ optimizer = 'sgd', lr = 1e-3, steps = 4, batch = 4 }",
    "evaluation.limit=20",
    "evaluation.every=1000",
)


def measure(method: str, rounds: int) -> dict[str, Any]:
    """Of a client at each rank: milliseconds a step, and seconds a round beside steps and wire."""
    tiers = ", ".join("{}" if method == "fedit" else f"{{ ratio = {r} }}" for r in RATIOS)
    changes = [f"rounds={rounds}", f"method={{ name = '{method}' }}", f"budgets=[{tiers}]"]
    recipe = recipes.load("demo", [*SETTINGS, *changes])
    steps: dict[int, list[float]] = defaultdict(list)
    beside: dict[int, list[float]] = defaultdict(list)

    def show(summary: Round, receipts: Sequence[Receipt]) -> None:
        for each in receipts if summary.round > 1 else ():  # the first is a warm-up
            steps[each.rank].append(1e3 * each.compute / each.steps)
            beside[each.rank].append(each.seconds - each.compute - each.wire)

    with tempfile.TemporaryDirectory() as folder:
        runner.start(recipe, Path(folder) / "run", show)
    return {
        "step_ms": {rank: min(found) for rank, found in sorted(steps.items())},
        "beside_s": {rank: min(found) for rank, found in sorted(beside.items())},
    }


def line(step_ms: dict[int, float]) -> dict[str, float]:
    """The fit: milliseconds at k = 0, those that r ranks add, and the largest distance from it."""
    slope, base = linear_regression(list(step_ms), list(step_ms.values()))
    off = max(abs(ms - base - slope * rank) for rank, ms in step_ms.items())
    return {"base_ms": base, "whole_ms": slope * RANK, "off_ms": off}


def main() -> None:
    parser = argparse.ArgumentParser(description="What ranks take in seconds.")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    try:
        found = {method: measure(method, given.rounds) for method in METHODS}
    except FedSieveError as error:
        sys.exit(f"skipped: {error}")
    ranks = [round(RANK * ratio) for ratio in RATIOS]
    console = Console(highlight=False, soft_wrap=True)
    table = Table("ms a step at k =", *map(str, ranks), "at k = 0", "of r ranks", "off", box=None)
    for method, each in found.items():
        told = [f"{each['step_ms'][r]:.1f}" if r in each["step_ms"] else "" for r in ranks]
        if len(each["step_ms"]) > 1:
            each["line"] = line(each["step_ms"])
            told += [f"{each['line'][key]:.1f}" for key in ("base_ms", "whole_ms", "off_ms")]
        table.add_row(method, *told)
    console.print(table)
    table = Table("s a round beside steps and wire, at k =", *map(str, ranks), box=None)
    for method, each in found.items():
        told = [f"{each['beside_s'][r]:.4f}" if r in each["beside_s"] else "" for r in ranks]
        table.add_row(method, *told)
    console.print(table)
    console.print(f"the shortest of {given.rounds - 1} rounds; {machine(torch.device('cpu'))}")
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        result = {"methods": found, "machine": machine(torch.device("cpu"))}
        given.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
