"""How far apart the norms of honest clients' updates are: what server.norm_bound must let pass.

    python benchmarks/norms.py [--methods fedit flasc ...] [--rounds 3] [--seed 0]

MiniLM-L6 on 20 Newsgroups as in studies/newsgroups.toml (100 clients, Dirichlet(0.1), 10 a round,
ranks of 1/8 to 3/4, densities of 1/64 to 1), but each client makes one pass over all of its rows
instead of two steps: clients that differ in rank, density, labels and number of steps. For each
method it says the largest norm of a round over that round's lower median, and over how many steps
the clients differ. Needs `fedsieve fetch minilm-l6 20newsgroups`.
"""

import argparse
import platform
import statistics

import torch

from fedsieve import methods
from fedsieve.engine.loop import Receipt, begin, rounds
from fedsieve.recipe import read as recipes
from fedsieve.recipe.experiment import from_recipe
from fedsieve.recipe.method import options_of

SHARES = ((0.125, 0.015625), (0.25, 0.0625), (0.5, 0.25), (0.75, 1.0))
# These put new factors in the place of the old, so the learning is local: AdamW there.
LOCAL = (
    "hetlora",
    "flexlora",
    "raflora",
    "flora",
    "florist",
    "fedex_lora",
    "lora_fair",
    "fed_plora",
)


def table(name: str, seed: int) -> dict[str, object]:
    """The recipe of one method; budgets say what it uses."""
    build = methods.load(name)
    knobs = build().knobs
    tiers = []
    for ratio, density in SHARES:
        tier = {"ratio": ratio, "down": density, "up": density}
        tiers.append({knob: share for knob, share in tier.items() if knob in knobs})
    overrides = [
        f"seed={seed}",
        f"method.name={name}",
        "data.max_length=32",
        "training.epochs=1",
        "evaluation.limit=8",
        *(f"method.{way}_values=float32" for way in ("down", "up")),
    ]
    given = recipes.read("demo", overrides)
    given["training"].pop("steps", None)
    given["budgets"] = tiers
    if "head" not in options_of(build):
        given["method"].pop("head", None)
    if name in LOCAL:
        given["server"] = {"optimizer": "sgd"}
        given["training"] |= {"optimizer": "adamw", "lr": 0.003}
        given["training"].pop("momentum", None)
    return given


def receipts_of(name: str, number: int, seed: int) -> list[Receipt]:
    experiment = from_recipe(recipes.check(table(name, seed)))
    _, progress = begin(experiment.federation, experiment.start)
    return [r for _, part, _ in rounds(experiment.federation, progress, number) for r in part]


def main() -> None:
    parser = argparse.ArgumentParser(description="Norms of honest updates, and their median.")
    parser.add_argument("--methods", nargs="*", default=methods.names())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(f"{platform.machine()}, torch {torch.__version__}, seed {args.seed}", flush=True)
    for name in args.methods:
        receipts = receipts_of(name, args.rounds, args.seed)
        ratios = []
        for number in range(1, args.rounds + 1):
            norms = [r.norm for r in receipts if r.round == number and r.norm is not None]
            ratios.append(max(norms) / statistics.median_low(norms))
        steps = sorted(r.steps for r in receipts)
        left_out = sum(r.dropped is not None for r in receipts)
        print(
            f"  {name:<16}largest norm / median {max(ratios):7.2f}   steps {steps[0]} to "
            f"{steps[-1]}   left out {left_out}",
            flush=True,
        )


if __name__ == "__main__":
    main()
