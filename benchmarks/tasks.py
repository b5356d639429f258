"""How well tasks are learned over clients, on real rows: FLASC at 1/4 beside dense FedIT.

    python benchmarks/tasks.py [--data FOLDER] [--tasks sst2 cola] [--seeds 0 1] [--out rows.json]

MiniLM-L6 over sentences, SmolLM2-135M-Instruct over questions, a small ViT over images: the real
rows of each task, in the files in which they were published, for 20 clients, 5 of them a round.
Each row is printed as it comes; at the end the file has all of them, and the table of docs/tasks.md
is printed. The folder is --data, or what FEDSIEVE_DATA names, or ../shared/data; a task whose files
are not there is left out, and that is said. Needs `fedsieve fetch minilm-l6 smollm2`. A run over
sentences or images takes 3 to 7 minutes on one busy core (OMP_NUM_THREADS=1); those over questions
are for a GPU.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import derived
from fedsieve.console import quiet
from fedsieve.engine.loop import begin, rounds
from fedsieve.recipe import read as recipes
from fedsieve.recipe.experiment import from_recipe

HERE = Path(__file__).resolve().parent.parent
METHODS: Mapping[str, Mapping[str, Any]] = {
    "fedit": {"method": {"name": "fedit"}, "budgets": [{}]},
    "flasc": {
        "method": {"name": "flasc", "head": "whole", "ranked": "change"},
        "budgets": [{"down": 0.25, "up": 0.25}],
    },
}


class Task(NamedTuple):
    """A task's rows as they were published.

    metrics: those that are told, the leading one first
    files:   of train and test, below the folder of all data
    data:    the recipe's [data], less where the rows are
    made:    writes the rows that are read, where they are not the files' own
    more:    the tables of the recipe in which it differs from the others
    """

    metrics: tuple[str, ...]
    files: tuple[str, str]
    data: Mapping[str, Any]
    task: str = "classification"
    more: Mapping[str, Mapping[str, Any]] = {}
    made: Callable[[Path, Path], tuple[Path, Path]] | None = None


LISTED = ("answer1", "answer2", "answer3", "answer4", "answer5")
# Clients train as FSLoRA's do, AdamW at 3e-4, and the server takes their mean.
LANGUAGE: Mapping[str, Mapping[str, Any]] = {
    "model": {"source": "smollm2", "settings": {}},
    "lora": {"targets": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]},
    "partition": {"kind": "iid", "clients": 20},
    "server": {"optimizer": "sgd", "lr": 1.0},
    "training": {"optimizer": "adamw", "lr": 3e-4, "steps": 10, "batch": 8, "momentum": 0.0},
    "evaluation": {"batch": 64},
}


PICTURES: Mapping[str, Mapping[str, Any]] = {
    "model": {"source": "vit-cifar100", "settings": {}},
    "lora": {"targets": ["q_proj", "v_proj"]},
    "training": {
        "optimizer": "sgd",
        "lr": 0.02,
        "momentum": 0.9,
        "steps": 10,
        "batch": 16,
        "augment": "crop-flip",
    },
}
# Where most outputs say no: their bias must go far, and the server's Adam goes 0.003 a round.
MANY: Mapping[str, Mapping[str, Any]] = {
    "partition": {"kind": "iid", "clients": 20},
    "server": {"optimizer": "sgd", "lr": 1.0},
    "training": {"optimizer": "adamw", "lr": 3e-3, "momentum": 0.0, "steps": 5, "batch": 16},
}
CIFAR = ("cifar10/train.parquet", "cifar10/test.parquet")


def choice(folder: str, options: Sequence[str]) -> Task:
    """Questions in FSLoRA's form, of which the options are part."""
    return Task(
        ("accuracy", "accuracy_written", "answered"),
        (f"commonsense/{folder}/train.json", f"commonsense/{folder}/test.json"),
        {
            "text": "{instruction}\n",
            "label": "answer",
            "classes": list(options),
            "answer": "the correct answer is {option}",
            "max_length": 256,
            "new_tokens": 12,
        },
        "multiple-choice",
        LANGUAGE,
    )


def glue(folder: str) -> tuple[str, str]:
    return f"glue/{folder}/train.tsv", f"glue/{folder}/dev.tsv"


TASKS: Mapping[str, Task] = {
    "sst2": Task(("accuracy",), glue("SST-2"), {"text": "sentence", "label": "label"}),
    "cola": Task(
        ("matthews", "accuracy"),
        glue("CoLA"),
        {
            "names": ["source", "label", "mark", "text"],
            "text": "text",
            "label": "label",
            "max_length": 32,  # of sentences of 11 words
        },
        more={
            "training": {"optimizer": "sgd", "lr": 0.02, "momentum": 0.9, "steps": 5, "batch": 16}
        },
    ),
    "mrpc": Task(
        ("f1", "accuracy"),
        glue("MRPC"),
        {"text": "#1 String", "text_b": "#2 String", "label": "Quality"},
    ),
    "mrpc, as a number": Task(
        ("pearson", "spearman", "mse"),
        glue("MRPC"),
        {"text": "#1 String", "text_b": "#2 String", "label": "Quality"},
        "regression",
        {"partition": {"kind": "iid", "clients": 20}},
    ),
    "rte": Task(
        ("accuracy",),
        glue("RTE"),
        {"text": "sentence1", "text_b": "sentence2", "label": "label"},
    ),
    "cifar10": Task(
        ("accuracy", "macro_f1"),
        CIFAR,
        {"image": "image", "label": "label"},
        "image-classification",
        PICTURES,
    ),
    "cifar10, traits": Task(
        ("micro_f1", "macro_f1", "map"),
        CIFAR,
        {"image": "image", "label": "traits"},
        "image-multi-label",
        {**PICTURES, "partition": {"kind": "iid", "clients": 20}},
        derived.traits,
    ),
    "20 newsgroups, parts of names": Task(
        ("micro_f1", "macro_f1", "map"),
        ("20newsgroups/train.jsonl.gz", "20newsgroups/test.jsonl.gz"),
        {"text": "text", "label": "parts", "max_length": 128},
        "multi-label",
        MANY,
        derived.groups,
    ),
    "mrpc, capitals": Task(
        ("entity_f1", "entity_precision", "entity_recall", "token_accuracy"),
        glue("MRPC"),
        {"text": "words", "label": "tags"},
        "token-classification",
        MANY,
        derived.capitals,
    ),
    "shakespeare, by role": Task(
        ("token_accuracy", "perplexity"),
        ("shakespeare/shakespeare.zip", "shakespeare/shakespeare.zip"),
        {"text": "text", "max_length": 128},
        "causal-lm",
        {**LANGUAGE, "partition": {"kind": "column", "column": "role"}},
        derived.speeches,
    ),
    "arc-easy": choice("ARC-Easy", LISTED),
    "openbookqa": choice("openbookqa", LISTED[:4]),
    "boolq": choice("boolq", ("true", "false")),
    "openbookqa, written": Task(
        ("token_f1", "exact_match", "rouge_l", "chrf"),
        ("commonsense/openbookqa/train.json", "commonsense/openbookqa/test.json"),
        {
            "prompt": "{instruction}\n",
            "completion": "output",
            "max_length": 256,
            "new_tokens": 12,
        },
        "generation",
        LANGUAGE,
    ),
}


def table(
    task: Task, method: str, folder: Path, files: Sequence[Path], seed: int
) -> dict[str, Any]:
    """The recipe of one run over the rows of two files."""
    train, test = map(str, files)
    made: dict[str, Any] = {
        "seed": seed,
        "rounds": 40,
        "cohort": 5,
        "model": {
            "source": "minilm-l6",
            "task": task.task,
            # Each example is seen about once: dropout in the frozen base would only add noise.
            "settings": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        },
        "lora": {"rank": 16, "alpha": 16, "targets": ["query", "value"]},
        "data": {"train": train, "test": test, "max_length": 64, **task.data},
        "partition": {"kind": "dirichlet", "clients": 20, "alpha": 1.0},
        "server": {"optimizer": "adam", "lr": 3e-3},
        "training": {"optimizer": "sgd", "lr": 0.02, "momentum": 0.9, "steps": 1, "batch": 16},
        "evaluation": {"every": 1000, "limit": 500, "metric": task.metrics[0]},
        **METHODS[method],
    }
    for name, changes in task.more.items():
        # Another kind of partition or of optimizer has other keys.
        whole = name in ("partition", "training")
        made[name] = {**({} if whole else made.get(name, {})), **changes}
    here = folder / made["model"]["source"]
    if here.is_dir():  # a model that lies beside the rows
        made["model"] = {**made["model"], "source": str(here)}
    return made


def measured(given: Mapping[str, Any]) -> dict[str, Any]:
    """What became of one run: scores before and after, bytes, seconds."""
    started = time.perf_counter()
    experiment = from_recipe(recipes.check(given))
    first, progress = begin(experiment.federation, experiment.start)
    *_, (last, _, _) = rounds(experiment.federation, progress, int(given["rounds"]))
    return {
        "before": first.metrics,
        "after": last.metrics,
        "total_bytes": last.total_bytes,
        "dense_bytes": last.dense_bytes,
        "seconds": round(time.perf_counter() - started, 1),
    }


def lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table of docs/tasks.md: means over seeds."""
    made = ["| task | metric | before | `fedit` | `flasc` 1/4 | MB, `fedit` | MB, `flasc` |"]
    made.append("|---|---|---|---|---|---|---|")
    for name, task in TASKS.items():
        own = {m: [r for r in rows if r["task"] == name and r["method"] == m] for m in METHODS}
        if not all(own.values()):
            continue
        for metric in task.metrics:
            before = _told(own["fedit"], "before", metric)
            after = [_told(own[m], "after", metric) for m in METHODS]
            sent = [f"{statistics.fmean(r['total_bytes'] for r in own[m]) / 1e6:.1f}" for m in own]
            made.append(f"| {name} | {metric} | {' | '.join([before, *after, *sent])} |")
    return made


def _told(rows: Sequence[Mapping[str, Any]], when: str, metric: str) -> str:
    return " / ".join(f"{row[when][metric]:.3f}" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Named tasks, learned over clients.")
    default = os.environ.get("FEDSIEVE_DATA", HERE.parent / "shared" / "data")
    parser.add_argument("--data", type=Path, default=Path(default))
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--set", nargs="*", default=[], help="changes to every recipe: key=value")
    args = parser.parse_args()
    quiet()
    print(f"{platform.machine()}, torch {torch.__version__}", flush=True)
    done = []
    for name in args.tasks:
        missing = [f for f in TASKS[name].files if not (args.data / f).is_file()]
        if missing:
            print(f"  {name}: left out: there is no {args.data / missing[0]}", flush=True)
            continue
        with tempfile.TemporaryDirectory() as into:
            files = [args.data / f for f in TASKS[name].files]
            if made := TASKS[name].made:
                files = list(made(args.data, Path(into)))
            for seed, method in itertools.product(args.seeds, args.methods):
                given = table(TASKS[name], method, args.data, files, seed)
                for change in args.set:
                    recipes.override(given, change)
                row = {"task": name, "method": method, "seed": seed, **measured(given)}
                done.append(row)
                print(json.dumps(row), flush=True)
                if args.out is not None:
                    args.out.write_text(json.dumps(done, indent=1) + "\n")
    if not done:
        print(f"none of the tasks has its files in {args.data}: name the folder with --data")
        return
    print("\n".join(lines(done)))


if __name__ == "__main__":
    main()
