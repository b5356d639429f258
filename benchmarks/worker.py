"""What a resident worker saves a site: rounds over one worker, against a fresh process each round.

MiniLM-L6 on a tenth of 20 Newsgroups' training rows, FSLoRA + FLASC as in the demo. The worker
is `fedsieve worker` in a process of its own, asked over its socket as Flower's client process does.
"Fresh" starts it anew for each round: what a round would cost if the model lived in the process
that Flower starts for each message. Needs `fedsieve fetch minilm-l6 20newsgroups`.

    python benchmarks/worker.py [--rounds 5] [--json FILE]
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tomli_w
from rich.console import Console

from fedsieve.algebra.budget import Budget, Client
from fedsieve.algebra.keys import Key
from fedsieve.console import quiet
from fedsieve.data import sources
from fedsieve.frame import Frame
from fedsieve.recipe import read as recipes
from fedsieve.recipe.experiment import locate, set_up_resident
from fedsieve.recipe.method import build_method
from fedsieve.sites.worker import SOCKET, ask
from fedsieve.train.model import pick_device
from fedsieve.train.reader import load_tokenizer
from fedsieve.wire import encode

NAME = "north"
AFFORDS = Budget(0.5, 0.25, 0.0625)


def site(folder: Path) -> tuple[Path, tuple[str, ...]]:
    """A site's file with a tenth of the training rows, and the labels of all rows."""
    rows = sources.load("20newsgroups", "train")
    labels = tuple(sorted(set(map(str, sources.column(rows, "Category")))))
    tenth = rows.select(range(0, len(rows), 10)).to_pandas()
    tenth.to_csv(folder / "train.csv", index=False)
    table = {
        "name": NAME,
        "model": "minilm-l6",
        "device": "cpu",
        "data": {"train": "train.csv", "text": "Text", "label": "Category"},
        "budget": AFFORDS._asdict(),
    }
    path = folder / "site.toml"
    path.write_text(tomli_w.dumps(table), encoding="utf-8")
    return path, labels


@contextmanager
def worker(path: Path) -> Iterator[Path]:
    """`fedsieve worker` in a process of its own; gives its socket's path once it is there."""
    address = path.parent / "worker" / SOCKET
    with (path.parent / "log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "fedsieve", "worker", str(path)], stdout=log, stderr=log
        )
    try:
        until = time.monotonic() + 300
        while not address.exists():
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit((path.parent / "log").read_text(encoding="utf-8"))
            time.sleep(0.02)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=60)


def messages(text: str, rounds: int) -> list[bytes]:
    """What the server would send in each round, if nothing moved the adapter."""
    recipe = recipes.check(tomllib.loads(text))
    tokenizer = load_tokenizer(locate(recipe.model.source))
    resident = set_up_resident(recipe, tokenizer, pick_device("cpu"))
    method = build_method(recipe)
    state = method.init(resident.adapter())
    client = Client(NAME, 1, AFFORDS)
    keys = [Key(recipe.seed, number, NAME) for number in range(1, rounds + 1)]
    return [encode(method.publish(method.plan(state, key), client, key)) for key in keys]


def told(address: Path, request: Frame) -> float:
    """Seconds until the worker's answer is there."""
    began = time.perf_counter()
    answer = ask(address, request, 600)
    if not answer.header["ok"]:
        raise SystemExit(str(answer.header["error"]))
    return time.perf_counter() - began


def measure(rounds: int) -> dict[str, list[float]]:
    """Seconds of each part, and of each round in both ways."""
    found: dict[str, list[float]] = {"resident": [], "fresh": [], "load": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path, labels = site(folder)
        table = recipes.read("demo", [f"rounds={2 * rounds}"])
        table["data"]["classes"] = list(labels)
        text = tomli_w.dumps(table)
        digest = hashlib.sha256(text.encode()).hexdigest()
        bodies = messages(text, 2 * rounds)

        def train(number: int) -> Frame:
            head = {"do": "train", "recipe": digest, "seed": 0, "round": number}
            return Frame(head, bodies[number - 1])

        tell = Frame({"do": "recipe"}, text.encode())
        with worker(path) as address:
            found["load"].append(told(address, tell))
            for number in range(1, rounds + 1):
                found["resident"].append(told(address, train(number)))
        for number in range(rounds + 1, 2 * rounds + 1):
            began = time.perf_counter()
            with worker(path) as address:
                told(address, tell)
                told(address, train(number))
                found["fresh"].append(time.perf_counter() - began)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    quiet()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    found = measure(given.rounds)
    console = Console()
    for what, seconds in found.items():
        console.print(
            f"{what:9} median {statistics.median(seconds):6.2f} s "
            f"({min(seconds):.2f} to {max(seconds):.2f}, {len(seconds)} times)"
        )
    ratio = statistics.median(found["fresh"]) / statistics.median(found["resident"])
    console.print(f"a round with a fresh process takes {ratio:.1f} times as long")
    if given.json:
        given.json.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
