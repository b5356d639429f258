"""The README's figure: accuracy against bytes for the methods, on the demo's setting.

Each method runs the demo's recipe, same seed and same rounds, into a directory of its own; a run
that is there already is resumed, so the script can be stopped at any time. Learning rates are the
demo's for all, chosen on validation data for `fslora_flasc` alone: the figure shows bytes, not
which method learns best. Needs `fedsieve fetch minilm-l6 20newsgroups`; takes 2 to 3 minutes a
method.

    python benchmarks/figure.py [--runs runs/figure] [--plot docs/bytes.png] [--seed 0] \
        [--methods fedit fslora_flasc]
"""

import argparse
import json
import shutil
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console
from rich.table import Table

from fedsieve import report
from fedsieve.engine.loop import Receipt, Round
from fedsieve.errors import FedSieveError
from fedsieve.recipe import read as recipes
from fedsieve.recipe import schema
from fedsieve.report.words import fewer
from fedsieve.run import rundir, runner

# What of the demo's settings each method makes use of; dense methods send float32, as is usual.
DENSE = {"down_values": "float32", "up_values": "float32"}
INT8 = {"down_values": "int8", "up_values": "int8"}
METHODS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "fedit": (DENSE, ()),
    "fslora": (DENSE, ("ratio",)),
    "flasc": ({**INT8, "head": "whole"}, ("down", "up")),
    "fslora_flasc": ({**INT8, "head": "whole"}, ("ratio", "down", "up")),
}


def recipe_for(method: str, seed: int) -> schema.Recipe:
    """The demo's recipe with another method."""
    table = tomllib.loads(recipes.shipped()["demo"])
    options, knobs = METHODS[method]
    table |= {"name": method, "seed": seed, "method": {"name": method, **options}}
    table["budgets"] = [
        {key: tier[key] for key in ("share", *knobs) if key in tier} for tier in table["budgets"]
    ]
    return recipes.check(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy against bytes.")
    parser.add_argument("--runs", type=Path, default=Path("runs/figure"))
    parser.add_argument("--plot", type=Path, default=Path("docs/bytes.png"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    console = Console(highlight=False)
    folders = [given.runs / method for method in given.methods]

    def show(summary: Round, receipts: Sequence[Receipt]) -> None:
        if summary.accuracy is not None:
            megabytes = summary.total_bytes / 1e6
            console.print(f"  round {summary.round}: {summary.accuracy:.4f}, {megabytes:.2f} MB")

    for method, folder in zip(given.methods, folders, strict=True):
        console.print(method)
        try:
            if (folder / rundir.RECIPE).exists():
                runner.resume(folder, show)
            else:
                runner.start(recipe_for(method, given.seed), folder, show)
        except FedSieveError as error:
            sys.exit(f"skipped: {error}")

    written = report.write(folders, given.runs / "report.html")
    (plot,) = [path for path in written if path.name.endswith("accuracy-bytes.png")]
    shutil.copyfile(plot, given.plot)
    table = Table(
        "method", "accuracy", "MB down", "MB up", "MB in all", "against dense LoRA", box=None
    )
    for method, folder in zip(given.methods, folders, strict=True):
        lines = (folder / rundir.METRICS).read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        down, up = (sum(row[f"{way}_bytes"] for row in rows) / 1e6 for way in ("down", "up"))
        last = rows[-1]
        numbers = [f"{value:.2f}" for value in (down, up, down + up)]
        table.add_row(
            method,
            f"{last['accuracy']:.4f}",
            *numbers,
            fewer(last["total_bytes"], last["dense_bytes"]),
        )
    console.print(table)
    console.print(f"{given.plot}; {written[0]}")


if __name__ == "__main__":
    main()
