"""The same rows for FLASC's published script and for FedSieve, client by client.

    python benchmarks/published/rows.py --scripts DIR [--seed 0] [--length 64] [--test 2000]

DIR holds the published script (README.md, here). Its own function divides the first four fifths of
the posts over the clients. Written into DIR: 20newsgroups/*.pt, the tokens as it wants them, and
seed-N/{train,test}.jsonl, the same posts as texts, each with its client.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from fedsieve.data import fetch, sources

CLIENTS, ALPHA = 350, 0.1


def main() -> None:
    asked = argparse.ArgumentParser()
    asked.add_argument("--scripts", type=Path, required=True)
    asked.add_argument("--seed", type=int, default=0)
    asked.add_argument("--length", type=int, default=64, help="tokens of a post")
    asked.add_argument("--test", type=int, default=2000, help="posts to evaluate on")
    given = asked.parse_args()
    train, test = (_posts(split, given.length) for split in ("train", "test"))
    test = {name: each[: given.test] for name, each in test.items()}
    classes = sorted(set(train["label"]))
    folder = given.scripts / "20newsgroups"
    folder.mkdir(exist_ok=True)
    for split, rows in (("train", train), ("test", test)):
        labels = torch.tensor([classes.index(label) for label in rows["label"]])
        tokens = torch.tensor(rows["tokens"])
        torch.save({"X": tokens, "Y": labels}, folder / f"20newsgroups_{split}.pt")

    sys.path.insert(0, str(given.scripts))
    published = importlib.import_module("data_utils")
    first = int(len(train["text"]) * 0.8)
    numbers = np.array([classes.index(label) for label in train["label"][:first]])
    parts = published.partition_dirichlet(numbers, CLIENTS, ALPHA, given.seed)
    out = given.scripts / f"seed-{given.seed}"
    out.mkdir(exist_ok=True)
    owned = [(f"c{n:03}", int(row)) for n, part in enumerate(parts) for row in part]
    _write(out / "train.jsonl", [(train, row, {"client": name}) for name, row in owned])
    _write(out / "test.jsonl", [(test, row, {}) for row in range(len(test["text"]))])
    sizes = [len(part) for part in parts]
    print(f"{len(owned):,} posts of {CLIENTS} clients, {min(sizes)} to {max(sizes)} each")


def _posts(split: str, length: int) -> dict[str, Any]:
    """Texts, labels and tokens in an order of no meaning: the script takes the first of them."""
    rows = sources.load("20newsgroups", split)
    order = np.random.default_rng(0).permutation(len(rows)).tolist()
    texts = [rows["Text"][row] for row in order]
    tokenizer = AutoTokenizer.from_pretrained(fetch.cache_folder() / "minilm-l6")
    tokens = tokenizer(texts, max_length=length, padding="max_length", truncation=True)
    labels = [rows["Category"][row] for row in order]
    return {"text": texts, "label": labels, "tokens": tokens["input_ids"]}


def _write(path: Path, rows: list[tuple[dict[str, Any], int, dict[str, str]]]) -> None:
    lines = [
        json.dumps({"text": of["text"][row], "label": of["label"][row], **more}) + "\n"
        for of, row, more in rows
    ]
    path.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
