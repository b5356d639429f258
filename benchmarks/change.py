"""FLASC with its download ranked by value, as in the paper, and by the change since the start.

    python benchmarks/change.py [--parts lm readme newsgroups] [--runs runs/change] [--seed 0]
        [--rounds 40]

    lm          a tiny GPT-2 with random weights (2 layers of width 16), 4 clients of 24 pairs of
                prompt and reply, 3 rounds; downloads at 1/4 and dense, uploads dense
    readme      the README's example on 400 posts of four groups of 20 Newsgroups, cut to 32 tokens,
                and beside it the head alone; 20 clients, 5 rounds
    newsgroups  "FLASC at 0.25" of studies/newsgroups.toml in int8, and the same at 1/16, both ways
                and evaluated: 100 clients, 40 rounds

Of each it says the score, the bytes, which share of A, B and head the downloads' masks kept in the
last round, and in how many rounds some client got nothing of B. The last two need `fedsieve fetch
minilm-l6 20newsgroups`; newsgroups is four runs of 2 minutes on 2 idle cores, and goes on where it
was stopped.
"""

import argparse
import platform
import random
import tempfile
import tomllib
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import fedsieve
from fedsieve import Budget, Lora, Training
from fedsieve.algebra.method import Method
from fedsieve.data import sources
from fedsieve.recipe import read as recipes
from fedsieve.report import load
from fedsieve.run import rundir, runner

GROUPS = ("comp.graphics", "rec.autos", "sci.space", "talk.politics.guns")
FOUND = [f"{way}{number}" for way in ("cars", "space", "wine") for number in range(6)]
WORDS = ["<end>", *(f"word{number}" for number in range(16)), *FOUND, "cars", "space", "wine"]


def told(name: str, rounds: list[Any], score: str, sent: float) -> None:
    """A line of results. rounds: with `down_a`, `down_b`, `down_head` and `starved`."""
    last = rounds[-1]
    kept = [f"{x:.3f}" if x is not None else "-" for x in (last[0], last[1], last[2])]
    starved = sum(bool(each[3]) for each in rounds)
    print(
        f"  {name:<22}{score}  {sent / 1e6:6.2f} MB  kept of A {kept[0]} B {kept[1]} head {kept[2]}"
        f"  without B {starved} of {len(rounds)} rounds",
        flush=True,
    )


def of_run(name: str, run: fedsieve.Run) -> None:
    run.finish()
    last = run.metrics[-1]
    rounds = [(m.down_a, m.down_b, m.down_head, m.starved) for m in run.metrics[1:]]
    told(name, rounds, f"accuracy {last.accuracy:.3f} loss {last.eval_loss:.3f}", last.total_bytes)


def lm(seed: int) -> None:
    def replies(draws: int) -> Dataset:
        draw, asks, answers = random.Random(draws), [], []
        for number in range(24):
            word = ("cars", "space", "wine")[number % 3]
            words = draw.choices([f for f in FOUND if f.startswith(word)], k=3)
            words += draw.choices(WORDS[1:17], k=4)
            draw.shuffle(words)
            asks.append(" ".join(words) + " ")
            answers.append(word)
        return Dataset.from_dict({"ask": asks, "reply": answers})

    words = Tokenizer(WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<end>"))
    words.pre_tokenizer = Whitespace()
    end: dict[str, Any] = {"unk_token": "<end>", "eos_token": "<end>", "pad_token": "<end>"}
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=len(WORDS), n_embd=16, n_layer=2, n_head=2, n_positions=32,
        initializer_range=0.2, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        transformers.GPT2LMHeadModel(config).save_pretrained(folder)
        transformers.PreTrainedTokenizerFast(tokenizer_object=words, **end).save_pretrained(folder)
        for name, ranked, down in (
            ("values, 1/4", "values", 0.25),
            ("change, 1/4", "change", 0.25),
            ("dense downloads", "values", 1.0),
        ):
            run = fedsieve.finetune(
                folder,
                [replies(number) for number in range(4)],
                fedsieve.flasc(server=fedsieve.adam(0.02), ranked=ranked),  # type: ignore[arg-type]
                rounds=3,
                task="causal-lm",
                prompt="ask",
                completion="reply",
                test=replies(99),
                lora=Lora(rank=4, targets=("c_attn", "c_proj", "c_fc")),
                training=Training(optimizer="adamw", lr=0.03, batch=8, precision="fp32"),
                budgets=Budget(down=down),
                evaluate_every=3,
                seed=seed,
                device="cpu",
            )
            of_run(name, run)


def readme(seed: int) -> None:
    posts = sources.load("20newsgroups", "train", config=None, names=None, separator=None)
    posts = posts.filter(lambda row: str(row["Category"]) in GROUPS)
    posts = posts.shuffle(seed=seed).select(range(400))
    text, label = ([str(each) for each in posts[name]] for name in ("Text", "Category"))
    rows = Dataset.from_dict({"text": text, "label": label}).train_test_split(0.2, seed=seed)
    clients = [rows["train"].shard(20, number) for number in range(20)]
    server, budget = fedsieve.adam, Budget(down=1 / 4, up=1 / 16)
    made: dict[str, tuple[Callable[[], Method], Budget | None]] = {
        "head alone": (lambda: fedsieve.head(server=server(5e-3)), None),
        "values": (lambda: fedsieve.flasc(server=server(5e-3), up_values="int8"), budget),
        "change": (
            lambda: fedsieve.flasc(server=server(5e-3), ranked="change", up_values="int8"),
            budget,
        ),
    }
    for name, (build, budgets) in made.items():
        run = fedsieve.finetune(
            "minilm-l6", clients, build(), rounds=5, budgets=budgets, test=rows["test"],
            max_length=32, evaluate_every=5, seed=seed,
        )  # fmt: skip
        of_run(name, run)


def newsgroups(seed: int, folder: Path, rounds: int) -> None:
    for share, ranked in product((4, 16), ("values", "change")):
        table = tomllib.loads(recipes.shipped()["demo"])
        table |= {"name": f"{ranked} at 1/{share}", "seed": seed, "rounds": rounds}
        table["budgets"] = [{"down": 1 / share, "up": 1 / share}]
        table["method"] = {
            "name": "flasc", "ranked": ranked, "head": "whole", "evaluated": 1 / share,
            "down_values": "int8", "up_values": "int8",
        }  # fmt: skip
        table["data"] |= {"max_length": 32, "validation": 0.1}
        table["evaluation"] = {"every": rounds, "limit": 1000, "batch": 125}
        table["checkpoint"] = {"every": 5}
        place = folder / f"{ranked}-{share}-{seed}-{rounds}"
        if (place / rundir.RECIPE).exists():
            runner.resume(place, lambda *_: None)
        else:
            runner.start(recipes.check(table), place, lambda *_: None)
        run = load(place)
        kept = [(*row.down_kept, row.starved) for row in run.rounds]
        last = run.rounds[-1]
        score = f"accuracy {last.metrics['accuracy']:.3f} loss {last.eval_loss:.3f}"
        told(f"{ranked}, 1/{share}", kept, score, last.total_bytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parts = ("lm", "readme", "newsgroups")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--runs", type=Path, default=Path("runs/change"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=40, help="of newsgroups")
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    threads = torch.get_num_threads()
    print(f"{platform.machine()}, torch {torch.__version__}, {threads} threads, seed {given.seed}")
    for part in given.parts:
        print(part)
        if part == "lm":
            lm(given.seed)
        elif part == "readme":
            readme(given.seed)
        else:
            newsgroups(given.seed, given.runs, given.rounds)


if __name__ == "__main__":
    main()
