"""The four recipes of FlowerTune's contest: in small here, and what the full size sends.

    python benchmarks/flowertune.py [--seeds 0 1] [--out rows.json]

In small: SmolLM2-135M-Instruct in 4 bits in Mistral-7B's place, and 400 rows in Alpaca's form that
this script makes up for each domain (sums and orders of words, moods of sentences about companies,
doses, Python functions), 40 more to test on. All else is the recipe's but for 6 rounds, steps of 4
rows of up to 96 tokens, 3 of them a round, and learning rates ten times as large, as there are so
few steps. Told are the loss of the test rows before and after, and the bytes sent.

In full: `fedsieve costs` over the recipe itself with the sizes of Mistral-7B v0.3 (transformers'
defaults of a Mistral are its own), against the contest's 200,000 MB.

Needs `fedsieve fetch smollm2` and the extra [quant]; some ten minutes of one core.
"""

import argparse
import json
import platform
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import MistralConfig

from fedsieve.console import quiet
from fedsieve.costs.whole_run import of_recipe
from fedsieve.engine.loop import begin, rounds
from fedsieve.recipe import read as recipes
from fedsieve.recipe.experiment import from_recipe
from fedsieve.recipe.schema import Recipe

MB = 10**6
MOST = 200_000  # MB, both ways, of all clients
WORDS = [
    "river",
    "stone",
    "lamp",
    "green",
    "paper",
    "cloud",
    "seven",
    "garden",
    "window",
    "bread",
    "harbour",
    "pencil",
    "silver",
]
FIRMS = ("Norwind", "Alderton", "Kestrel", "Brightwell", "Marlow", "Tansy", "Quillon")
DRUGS = ("amoxicillin", "ibuprofen", "metformin", "paracetamol", "cetirizine")


def general(draw: random.Random) -> tuple[str, str, str]:
    words = draw.sample(WORDS, 4)
    a, b = draw.randrange(2, 60), draw.randrange(2, 60)
    return draw.choice(
        [
            (f"Put these words into alphabetical order: {', '.join(words)}.", "",
             ", ".join(sorted(words))),
            (f"What is {a} plus {b}?", "", f"{a} plus {b} is {a + b}."),
            (f"Write the word {words[0]} in capital letters.", "", words[0].upper()),
            (f"Which of {words[0]} and {words[1]} has more letters?", "",
             max(words[:2], key=len)),
        ]
    )  # fmt: skip


def finance(draw: random.Random) -> tuple[str, str, str]:
    firm, share = draw.choice(FIRMS), draw.randrange(2, 40)
    said, mood = draw.choice(
        [
            (f"{firm} raised its profit by {share} percent in the third quarter.", "positive"),
            (f"{firm} lost {share} percent of its orders after the recall.", "negative"),
            (
                f"{firm} will publish its figures on the {draw.randrange(1, 29)}th of May.",
                "neutral",
            ),
        ]
    )
    asked = "What is the sentiment of this news? Choose from negative, neutral and positive."
    return asked, said, mood


def medical(draw: random.Random) -> tuple[str, str, str]:
    drug, each, times = draw.choice(DRUGS), 50 * draw.randrange(1, 11), draw.randrange(1, 5)
    asked = f"A patient takes {each} mg of {drug} {times} times a day. How much is that in a day?"
    return "Answer this question truthfully.", asked, f"It is {each * times} mg of {drug} a day."


def code(draw: random.Random) -> tuple[str, str, str]:
    name, number = draw.choice(WORDS), draw.randrange(2, 30)
    what, sign = draw.choice([("adds", "+"), ("subtracts", "-"), ("multiplies by", "*")])
    asked = f"Write a Python function called {name} that {what} {number}."
    return asked, "", f"def {name}(x):\n    return x {sign} {number}"


MAKERS: dict[str, Callable[[random.Random], tuple[str, str, str]]] = {
    "flowertune-general": general,
    "flowertune-finance": finance,
    "flowertune-medical": medical,
    "flowertune-code": code,
}


def written(path: Path, name: str, count: int, seed: int) -> str:
    """A file of rows of a domain, no two alike by more than chance."""
    draw = random.Random(f"{name} {seed}")
    keys = ("instruction", "input", "output")
    lines = (
        json.dumps(dict(zip(keys, MAKERS[name](draw), strict=True))) + "\n" for _ in range(count)
    )
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


def small(name: str, folder: Path, seed: int) -> Recipe:
    """The recipe, with what differs in small."""
    train = written(folder / "train.jsonl", name, 400, seed)
    test = written(folder / "test.jsonl", name, 40, -1)
    return recipes.load(
        name,
        [
            f"seed={seed}", "device=cpu", "model.source=smollm2",
            f"data.train={train}", "data.train_split=", f"data.test={test}",
            "data.max_length=96", "rounds=6", "evaluation.every=6", "evaluation.batch=8",
            "training.batch=4", "training.steps=3", "training.lr=5e-4", "training.last_lr=1e-5",
        ],
    )  # fmt: skip


def in_small(name: str, seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        given = small(name, Path(place), seed)
        experiment = from_recipe(given)
        first, progress = begin(experiment.federation, experiment.start)
        *_, (last, _, _) = rounds(experiment.federation, progress, given.rounds)
    found = {"recipe": name, "seed": seed, "before": first.eval_loss, "after": last.eval_loss}
    return found | {"mb": last.total_bytes / MB}


def in_full() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as place:
        MistralConfig(vocab_size=32_768, architectures=["MistralForCausalLM"]).save_pretrained(
            place
        )
        for name in MAKERS:
            bill = of_recipe(recipes.load(name, [f"model.source={place}"]))
            sent = bill.total / MB
            yield (
                f"{name}: {sent:,.0f} MB of {MOST:,} ({sent / MOST:.1%}): {MOST - sent:,.0f} MB "
                "are left"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    quiet()
    print(f"{platform.platform()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    for line in in_full():
        print(line)
    found = [in_small(name, seed) for name in MAKERS for seed in given.seeds]
    print("| recipe | seed | loss before | loss after | MB |\n|---|---|---|---|---|")
    for row in found:
        losses = f"{row['before']:.3f} | {row['after']:.3f}"
        print(f"| `{row['recipe']}` | {row['seed']} | {losses} | {row['mb']:.1f} |")
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
