"""Texts that are hard to read, or that do something to who reads what is said about them.

A recipe, a site's file and a frame's header are small, whoever wrote them; what is said about them
is smaller still, and steers no terminal.
"""

import io
import json
import os
import subprocess
import sys
import threading
import tomllib
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from fedsieve.errors import FedSieveError, WireError
from fedsieve.recipe import read as recipes
from fedsieve.sites import worker
from fedsieve.sites.resident import run as run_worker
from tests.conftest import Command, Tiny
from tests.sites.sites import recipe_text, write_site

MANY = 5000
STEERS = "\x1b]0;owned\x07\nerror: all is well\x1b[2J"
LARGE: dict[str, str] = {
    "a long key above many values": f'"{"k" * 20_000}" = [{"1," * MANY}]',
    "long keys above many values": f"[{'.'.join(['k' * 900] * 20)}]\na = [{'1,' * MANY}]",
    "a long key above many keys": tomli_w.dumps(
        {"model": {"source": "x", "settings": {"k" * 20_000: {f"k{n}": 1 for n in range(MANY)}}}}
    ),
    "many unknown keys": "\n".join(f"k{n} = 1" for n in range(MANY)),
    "many wrong values": f"[data]\nclasses = [{'1,' * MANY}]",
    "a long value": f'rounds = "{"x" * 200_000}"',
    "a long unknown key": f"{'x' * 200_000} = 1",
    "a long number": f"rounds = 0x{'f' * 200_000}",
}


@pytest.mark.parametrize("text", LARGE.values(), ids=LARGE)
def test_a_text_takes_memory_as_it_is_long_and_little_is_said(text: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(FedSieveError) as error:
            recipes.parse_text(text, "the recipe")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 32 << 20
    assert len(str(error.value)) < 10_000


UNKNOWN: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a key": lambda table: table.update({STEERS: 1}),
    "a table": lambda table: table.update({STEERS: {"x": 1}}),
    "a key of a table": lambda table: table["training"].update({STEERS: 1}),
    "an option": lambda table: table["method"].update({STEERS: 1}),
    "a server's option": lambda table: table.setdefault("server", {}).update({STEERS: 1}),
    "a method": lambda table: table["method"].update(name=STEERS),
    "a value": lambda table: table.update(rounds=STEERS),
    "a name": lambda table: table.update(name=STEERS),
    "a model": lambda table: table["model"].update(source=STEERS),
    "rows": lambda table: table["data"].update(train=STEERS),
    "a column": lambda table: table["data"].update(text=STEERS),
    "a layer": lambda table: table.setdefault("lora", {}).update(targets=[STEERS]),
    "a device": lambda table: table.update(device=STEERS),
}


@pytest.mark.parametrize("place", UNKNOWN)
def test_a_recipe_steers_no_terminal(
    place: str, tiny: Tiny, tmp_path: Path, command: Command
) -> None:
    table = tiny.table()
    UNKNOWN[place](table)
    path = tmp_path / "theirs.toml"
    path.write_text(tomli_w.dumps(table), encoding="utf-8")
    ran = command("run", path, "--out", tmp_path / "run")
    assert ran.code == 2
    for line in (ran.out + ran.err).splitlines():
        assert line.isprintable(), ascii(line)
        assert not line.startswith("error: all is well")


def test_a_worker_says_nothing_that_fills_or_steers_its_terminal(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    def serve(folder: Path, work: Any, *_: Any) -> None:
        table = tomllib.loads(recipe_text(tiny).decode())
        for more in ({STEERS: 1}, {"x" * 100_000: 1}, {f"k{n}": 1 for n in range(MANY)}):
            work(worker.Frame({"do": "recipe"}, tomli_w.dumps({**more, **table}).encode()))

    monkeypatch.setattr(worker, "serve", serve)
    run_worker(write_site(tiny, tmp_path), said.append)
    assert len(said) >= 3
    for line in "\n".join(said).splitlines():
        assert line.isprintable()
        assert not line.startswith("error: all is well")
    assert sum(map(len, said)) < 50_000


@pytest.mark.parametrize("fault", ["a letter", "a full disk", "closed"])
def test_a_log_that_cannot_be_written_does_not_end_a_worker(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """A request quotes what it likes, and a terminal may have the letters of one country."""
    log = io.TextIOWrapper(io.BytesIO(), encoding="latin-1", write_through=True)
    answers: list[worker.Frame] = []

    def say(text: str) -> None:
        if fault == "a full disk":
            raise OSError(28, "No space left on device")
        log.write(text)

    def serve(folder: Path, work: Any, *_: Any) -> None:
        if fault == "closed":
            log.close()
        answers.append(work(worker.Frame({"do": "плохо"})))
        answers.append(work(worker.Frame({"do": "recipe"}, "плохо = 1".encode())))

    monkeypatch.setattr(worker, "serve", serve)
    run_worker(write_site(tiny, tmp_path), say)
    assert [answer.header["ok"] for answer in answers] == [False, False]


SHOUT = """
import sys
from fedsieve import cli

@cli.app.command()
def shout() -> None:
    cli.say("плохо")
    cli.warn("плохо")
    print("плохо")

sys.argv[1:] = ["shout"]
cli.main()
"""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_without_the_letters_is_told_all_the_same(encoding: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SHOUT],
        env={**os.environ, "PYTHONIOENCODING": f"{encoding}:strict", "PYTHONUTF8": "1"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = "плохо".encode(encoding, "backslashreplace")
    assert (done.stdout.count(said), done.stderr.count(said)) == (2, 1)


def deeper(levels: int, do: Callable[[], Any]) -> Any:
    return do() if levels == 0 else deeper(levels - 1, do)


@pytest.mark.parametrize("kind", ["[]", '{"a":}'])
def test_a_header_that_one_thread_can_read_all_can_use(kind: str) -> None:
    """A worker reads frames in threads of their own, and works on them far down in another."""
    opens, closes = (kind[0], kind[1]) if kind == "[]" else ('{"a":', "}")
    for depth in (3, 100, *range(900, 1000)):
        text = (
            f'{{"length": 0, "do": {opens * depth}{"1" if closes == "}" else ""}{closes * depth}}}'
        )
        data = len(text).to_bytes(4, "big") + text.encode()
        read: list[worker.Frame] = []

        def reading(data: bytes = data, read: list[worker.Frame] = read) -> None:
            with suppress(WireError):
                read.append(worker.unpack(data))

        thread = threading.Thread(target=reading)
        thread.start()
        thread.join()
        assert bool(read) == (depth < 8)
        for frame in read:
            deeper(50, partial(worker.digest, frame))
            assert json.loads(json.dumps(frame.header)) == frame.header
