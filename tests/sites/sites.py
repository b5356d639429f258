"""Sites for tests: files that a worker needs, and ways to ask one."""

import csv
import hashlib
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tomli_w

from fedsieve.algebra.budget import Client
from fedsieve.algebra.keys import Key
from fedsieve.engine.client import Reply
from fedsieve.engine.loop import Exchange
from fedsieve.frame import Frame
from fedsieve.sites import resident
from fedsieve.sites import site as sites
from fedsieve.sites.resident import Resident
from fedsieve.sites.worker import SOCKET
from tests.conftest import LABELS, Tiny, write_rows

Ask = Callable[[Frame], Frame]
NAMES = ("north", "south")
WORKER = ("-m", "fedsieve", "worker")


def quiet(text: str) -> None:
    """Say nothing."""


def pooled(folder: Path, name: str, count: int, seed: int) -> Path:
    """Rows of all sites in one file; the column `author` says whose each is."""
    folder.mkdir(parents=True, exist_ok=True)
    return write_rows(folder / f"{name}.csv", count, seed, NAMES)


def part(pool: Path, name: str) -> Path:
    """The rows of one site in a file of its own, in their order."""
    with pool.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["author"] == name]
    path = pool.with_name(f"{pool.stem}-{name}.csv")
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.DictWriter(file, ["text", "label", "author"])
        out.writeheader()
        out.writerows(rows)
    return path


def write_site(tiny: Tiny, folder: Path, name: str = "north", **more: Any) -> Path:
    """A site's folder and file: some rows of its own, the tiny model, a folder for the worker."""
    home = folder / name
    home.mkdir(parents=True)
    data = {"train": "train.csv", "test": "test.csv", "text": "text", "label": "label"}
    table = {"name": name, "device": "cpu", "model": str(tiny.bert), "data": data, **more}
    for kind, count in (("train", 48), ("test", 20)):
        pool = pooled(folder, kind, count, seed=len(kind))
        (home / f"{kind}.csv").write_bytes(part(pool, name).read_bytes())
    (home / "site.toml").write_text(tomli_w.dumps(table), encoding="utf-8")
    return home / "site.toml"


def recipe_text(tiny: Tiny, **changes: Any) -> bytes:
    """What a server would tell: the tiny recipe, its files not there, its classes listed."""
    changes = {
        "model__source": "no-such-model",
        "data__train": "no-such-file.csv",
        "data__test": "no-such-file.csv",
        "data__classes": list(LABELS),
        "training__steps": 2,
        **changes,
    }
    absent = [key for key in ("data__classes", "training__steps") if changes[key] is None]
    for key in absent:
        del changes[key]  # tiny's own table has none
    return tomli_w.dumps(tiny.table(**changes)).encode()


def settled(path: Path) -> Resident:
    """A worker's state, as after a start, in this process."""
    return resident.start(sites.load(path), quiet)


def asking(path: Path, *, restart: bool = False) -> Ask:
    """A function that asks a site, in this process; with `restart`, a new worker every time."""
    state = settled(path)

    def ask(request: Frame) -> Frame:
        worker = settled(path) if restart else state
        return resident.about(worker, request) or resident.answer(worker, request)

    return ask


def train(text: bytes, number: int, message: bytes, **more: Any) -> Frame:
    run = hashlib.sha256(text).hexdigest()
    return Frame({"do": "train", "recipe": run, "seed": 0, "round": number, **more}, message)


def rate(do: str, text: bytes, number: int, message: bytes) -> Frame:
    run = hashlib.sha256(text).hexdigest()
    return Frame({"do": do, "recipe": run, "round": number}, message)


def exchange(asks: Mapping[str, Ask], text: bytes) -> Exchange:
    """The engine's exchange over sites: each is asked in its turn."""

    def carry(messages: Iterable[tuple[Client, bytes]], key: Key) -> Iterator[Reply]:
        for client, message in messages:
            answer = asks[client.id](train(text, key.round, message))
            assert answer.header["ok"], answer.header
            said = dict(answer.header)
            del said["ok"], said["round"], said["tag"]
            loss = math.nan if said["loss"] is None else said["loss"]
            yield Reply(client, answer.body or None, **{**said, "loss": loss})

    return Exchange(carry, lambda merged: None)


@contextmanager
def process(
    path: Path, *more: str | Path, ready: bool = True, program: Sequence[str | Path] = WORKER
) -> Iterator["subprocess.Popen[str]"]:
    """`fedsieve worker` in a process of its own, killed at the end if it still runs.

    program, more: what stands in for it, a Python program, and what it is told beside the file
    """
    with (path.parent / "log").open("a") as log:
        worker = subprocess.Popen(
            [sys.executable, *map(str, (*program, path, *more))],
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    try:
        if ready:
            until_ready(path, worker)
        yield worker
    finally:
        if worker.poll() is None:
            worker.kill()
        worker.wait(timeout=30)


def until_ready(path: Path, worker: "subprocess.Popen[str]") -> None:
    """Wait until the worker that was started last takes requests."""
    text = path.with_name("log")
    until = time.monotonic() + 120
    while "ready at" not in text.read_text().rpartition("\0")[2]:
        assert worker.poll() is None, text.read_text()
        assert time.monotonic() < until, "the worker does not start"
        time.sleep(0.1)
    assert (sites.load(path).folder / SOCKET).exists()
    with text.open("a") as log:
        log.write("\0")  # what a later worker writes begins here
