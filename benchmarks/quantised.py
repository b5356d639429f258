"""What a base in 8 or 4 bits costs a language model in loss, and what it saves in memory.

    python benchmarks/quantised.py [--seeds 0 1] [--forms bfloat16 nf4] [--out rows.json]

SmolLM2-135M-Instruct goes on with posts of 20 Newsgroups, cut after 32 tokens: 8 clients, 2 of
them a round, 3 rounds of 4 steps of 4 rows, FedIT with LoRA of rank 8 on attention, AdamW. Each run
is a process of its own, told how the base is held and nothing else; the seed draws rows, clients,
batches and the adapter. Loss is that of 32 test posts, before the first round and after the last.
"Held" is what the base's parameters and buffers take, with the scales of those that are quantised;
"peak" the largest resident memory of the process less what it had with all libraries imported;
seconds are the processor's. Needs `fedsieve fetch smollm2 20newsgroups` and the extra [quant]; a
run takes a minute of one core (OMP_NUM_THREADS=1).
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fedsieve.console import quiet
from fedsieve.data import sources
from fedsieve.engine.loop import begin, rounds
from fedsieve.recipe import read as recipes
from fedsieve.recipe.experiment import from_recipe
from fedsieve.train import quantise

FORMS: Mapping[str, Mapping[str, Any]] = {
    "bfloat16": {"dtype": "bfloat16"},
    "nf4": {"dtype": "bfloat16", "quantization": "nf4"},
    "int8": {"dtype": "bfloat16", "quantization": "int8"},
    "nf4, double": {"dtype": "bfloat16", "quantization": "nf4", "double_quantization": True},
    "float32": {"dtype": "float32"},
}
TRAIN, TEST, ROUNDS, MEGA = 512, 32, 3, 10**6


def table(form: str, seed: int, folder: Path) -> dict[str, Any]:
    return {
        "name": "quantised",
        "seed": seed,
        "rounds": ROUNDS,
        "cohort": 2,
        "device": "cpu",
        "model": {"source": "smollm2", "task": "causal-lm", **FORMS[form]},
        "lora": {
            "rank": 8,
            "alpha": 16.0,
            "dropout": 0.0,
            "targets": ["q_proj", "k_proj", "v_proj", "o_proj"],
        },
        "data": {
            "train": str(folder / "train.csv"),
            "test": str(folder / "test.csv"),
            "text": "Text",
            "max_length": 32,
        },
        "partition": {"kind": "iid", "clients": 8},
        "method": {"name": "fedit"},
        "training": {"optimizer": "adamw", "lr": 1e-3, "steps": 4, "batch": 4, "precision": "fp32"},
        "evaluation": {"every": ROUNDS, "batch": 8},
    }


def posts(folder: Path, seed: int) -> None:
    """Posts to train on, by the seed, and those to evaluate on, which are the same for all."""
    train, test = (sources.load("20newsgroups", split) for split in ("train", "test"))
    train = train.shuffle(seed=seed).select(range(TRAIN))
    test = test.shuffle(seed=0).select(range(TEST))
    for name, rows in (("train", train), ("test", test)):
        rows.to_pandas().to_csv(folder / f"{name}.csv", index=False)


def peak() -> int:
    """Bytes: the largest resident memory of this process so far."""
    times = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * times


def one(form: str, seed: int) -> dict[str, Any]:
    """A run, in this process."""
    quiet()
    quantise.ready()  # for all forms, so that all begin with as much
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        posts(folder, seed)
        before = peak()
        experiment = from_recipe(recipes.check(table(form, seed, folder)))
        held = quantise.held_bytes(experiment.resident.model) - sum(
            p.nbytes for _, p in experiment.resident.parameters()
        )
        first, progress = begin(experiment.federation, experiment.start)
        began = time.process_time()
        last = [summary for summary, _, _ in rounds(experiment.federation, progress, ROUNDS)][-1]
        seconds = time.process_time() - began
    return {
        "form": form,
        "seed": seed,
        "before": first.eval_loss,
        "after": last.eval_loss,
        "held": held,
        "peak": peak() - before,
        "seconds": seconds,
    }


def in_turn(seeds: Sequence[int], forms: Sequence[str]) -> list[dict[str, Any]]:
    """Each run in a process of its own; the forms in turn, as the machine's speed drifts."""
    found = []
    for seed in seeds:
        for form in forms:
            command = [sys.executable, __file__, "--one", form, "--seeds", str(seed)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
            print(json.dumps(found[-1]), flush=True)
    return found


def shown(found: Sequence[Mapping[str, Any]]) -> str:
    """The table of docs/benchmarks.md: means over seeds, and least to most where they differ."""
    lines = [
        "| base | held (MB) | peak (MB) | loss before | loss after | seconds |",
        "|---|---|---|---|---|---|",
    ]
    there = [form for form in FORMS if any(row["form"] == form for row in found)]
    for form in there:
        own = [row for row in found if row["form"] == form]

        def over(key: str, digits: int, scale: float = 1, own: Any = own) -> str:
            values = [row[key] / scale for row in own]
            spread = f" ({min(values):.{digits}f} to {max(values):.{digits}f})"
            return f"{statistics.fmean(values):.{digits}f}{spread}"

        lines.append(
            f"| {form} | {own[0]['held'] / MEGA:.0f} | {over('peak', 0, MEGA)} | "
            f"{own[0]['before']:.3f} | {over('after', 3)} | {over('seconds', 0)} |"
        )
    pairs = {
        seed: {row["form"]: row["after"] for row in found if row["seed"] == seed}
        for seed in sorted({row["seed"] for row in found})
    }
    for form in there[1:] if there[0] == "bfloat16" else []:
        worse = [own[form] - own["bfloat16"] for own in pairs.values()]
        lines.append(
            f"\n{form} less bfloat16, seed by seed: {', '.join(f'{each:+.3f}' for each in worse)}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--forms", nargs="+", default=[*FORMS], choices=FORMS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", choices=FORMS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(one(given.one, given.seeds[0])))
        return
    print(f"{platform.platform()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    found = in_turn(given.seeds, given.forms)
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(shown(found))


if __name__ == "__main__":
    main()
