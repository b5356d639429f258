"""What a base in 8 or 4 bits costs a language model in loss, and what it saves in memory.

    python benchmarks/quantised.py [--seeds 0 1] [--forms bfloat16 nf4] [--topics] [--out rows.json]

SmolLM2-135M-Instruct goes on with posts of 20 Newsgroups, cut after 32 tokens: 8 clients, 2 of
them a round, 3 rounds of 4 steps of 4 rows, FedIT with LoRA of rank 8 on attention, AdamW. Each run
is a process of its own, told how the base is held and nothing else; the seed draws rows, clients,
batches and the adapter. Loss is that of 32 test posts, before the first round and after the last.
"Held" is what the base's parameters and buffers take, with the scales of those that are quantised;
"peak" the largest resident memory of the process less what it had with all libraries imported;
seconds are the processor's. With --topics the model tells a post's group instead, one of 20: 20
rounds of rows of 8, and 400 test posts, of which accuracy is told. Needs `fedsieve fetch smollm2
20newsgroups` and the extra [quant]; a run takes a minute of one core, with --topics some
(OMP_NUM_THREADS=1).
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
from typing import Any, NamedTuple

import torch

from fedsieve.console import quiet
from fedsieve.data import sources
from fedsieve.engine.loop import Round, begin, rounds
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
MEGA = 10**6


class Work(NamedTuple):
    """What is learned: rows to train and to test on, rounds, rows of a batch, the leading score."""

    task: str
    train: int
    test: int
    rounds: int
    batch: int
    leads: str


POSTS = Work("causal-lm", 512, 32, 3, 4, "loss")
TOPICS = Work("classification", 2048, 400, 20, 8, "accuracy")


def table(work: Work, form: str, seed: int, folder: Path) -> dict[str, Any]:
    return {
        "name": "quantised",
        "seed": seed,
        "rounds": work.rounds,
        "cohort": 2,
        "device": "cpu",
        "model": {"source": "smollm2", "task": work.task, **FORMS[form]},
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
            **({"label": "Category"} if work is TOPICS else {}),
        },
        "partition": {"kind": "iid", "clients": 8},
        "method": {"name": "fedit"},
        "training": {
            "optimizer": "adamw",
            "lr": 1e-3,
            "steps": 4,
            "batch": work.batch,
            "precision": "fp32",
        },
        "evaluation": {"every": work.rounds, "batch": 8},
    }


def posts(work: Work, folder: Path, seed: int) -> None:
    """Posts to train on, by the seed, and those to evaluate on, which are the same for all."""
    train, test = (sources.load("20newsgroups", split) for split in ("train", "test"))
    train = train.shuffle(seed=seed).select(range(work.train))
    test = test.shuffle(seed=0).select(range(work.test))
    for name, rows in (("train", train), ("test", test)):
        rows.to_pandas().to_csv(folder / f"{name}.csv", index=False)


def peak() -> int:
    """Bytes: the largest resident memory of this process so far."""
    times = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * times


def one(work: Work, form: str, seed: int) -> dict[str, Any]:
    """A run, in this process."""
    quiet()
    quantise.ready()  # for all forms, so that all begin with as much
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        posts(work, folder, seed)
        before = peak()
        experiment = from_recipe(recipes.check(table(work, form, seed, folder)))
        held = quantise.held_bytes(experiment.resident.model) - sum(
            p.nbytes for _, p in experiment.resident.parameters()
        )
        first, progress = begin(experiment.federation, experiment.start)
        began = time.process_time()
        last = [summary for summary, _, _ in rounds(experiment.federation, progress, work.rounds)][
            -1
        ]
        seconds = time.process_time() - began
    return {
        "form": form,
        "seed": seed,
        "before": _score(work, first),
        "after": _score(work, last),
        "held": held,
        "peak": peak() - before,
        "seconds": seconds,
    }


def _score(work: Work, summary: Round) -> float | None:
    return summary.eval_loss if work is POSTS else (summary.metrics or {})[work.leads]


def in_turn(work: Work, seeds: Sequence[int], forms: Sequence[str]) -> list[dict[str, Any]]:
    """Each run in a process of its own; the forms in turn, as the machine's speed drifts."""
    found = []
    for seed in seeds:
        for form in forms:
            command = [sys.executable, __file__, "--one", form, "--seeds", str(seed)]
            command += ["--topics"] if work is TOPICS else []
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
            print(json.dumps(found[-1]), flush=True)
    return found


def shown(work: Work, found: Sequence[Mapping[str, Any]]) -> str:
    """The table of docs/benchmarks.md: means over seeds, and least to most where they differ."""
    lines = [
        f"| base | held (MB) | peak (MB) | {work.leads} before | {work.leads} after | seconds |",
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
    parser.add_argument("--topics", action="store_true", help="tell groups, and not go on")
    given = parser.parse_args()
    work = TOPICS if given.topics else POSTS
    if given.one:
        print(json.dumps(one(work, given.one, given.seeds[0])))
        return
    print(f"{platform.platform()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    found = in_turn(work, given.seeds, given.forms)
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(shown(work, found))


if __name__ == "__main__":
    main()
