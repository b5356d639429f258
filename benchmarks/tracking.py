"""What a tracker costs a round: python benchmarks/tracking.py [--rounds 100] [--pause 0.2]

For every tracker that is installed, in a folder of its own on this machine (W&B offline, MLflow in
SQLite): how long the round loop waits for it, and the processor time that all its threads take of
this process. What its own service process takes, where it has one, is not counted.
"""

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from fedsieve.engine.loop import Round
from fedsieve.errors import FedSieveError
from fedsieve.recipe import read as recipes
from fedsieve.run import tracking


def measured(kind: str, rounds: int, pause: float, folder: Path) -> dict[str, float] | str:
    """Milliseconds of a tracker, or why it was not measured.

    waited: by the round loop, a round (median); most: the longest; processor: time of all
    threads, a round; begin, end: once
    """
    table = recipes.read("demo", [f"tracking.kind={kind}", f"rounds={rounds}"])
    recipe = recipes.parse(table)
    try:
        tracking.check(recipe.tracking)
    except FedSieveError as error:
        return str(error)
    folder.mkdir()
    began = time.perf_counter()
    with tracking.tracked(recipe, folder, -1) as on_round:
        on_round(of(0))
        begun = time.perf_counter() - began
        cpu, waited = time.process_time(), []
        for number in range(1, rounds + 1):
            time.sleep(pause)
            start = time.perf_counter()
            on_round(of(number))
            waited.append(time.perf_counter() - start)
        cpu = time.process_time() - cpu
        ended = time.perf_counter()
    return {
        "waited": 1e3 * statistics.median(waited),
        "most": 1e3 * max(waited),
        "processor": 1e3 * cpu / rounds,
        "begin": 1e3 * begun,
        "end": 1e3 * (time.perf_counter() - ended),
    }


def of(number: int) -> Round:
    """A round as a recipe's would be, with an evaluation."""
    figures: dict[str, Any] = dict.fromkeys(Round._fields, None)
    counts = ("down_bytes", "up_bytes", "total_bytes", "dense_bytes", "clients", "dropped")
    figures |= dict.fromkeys(counts, number * 1000)
    figures |= {"round": number, "loss": 1 / (1 + number), "eval_loss": 1 / (1 + number)}
    figures |= {"seconds": 1.0, "epsilon": 0.1 * number}
    figures["metrics"] = {"accuracy": 0.5, "macro_f1": 0.5, "matthews": 0.5}
    return Round(**figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--pause", type=float, default=0.2, help="seconds, in a round's place")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    os.environ["WANDB_MODE"] = "offline"
    logging.disable(logging.INFO)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{name}/mlflow.db"
        os.environ["TRACKIO_DIR"] = f"{name}/trackio"
        for kind in tracking.TRACKERS:
            one = measured(kind, given.rounds, given.pause, Path(name) / kind)
            found[kind] = one
            if isinstance(one, str):
                print(f"{kind:<12} {one}", flush=True)
                continue
            told = "  ".join(f"{what} {value:.2f} ms" for what, value in one.items())
            print(f"{kind:<12} {told}", flush=True)
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
