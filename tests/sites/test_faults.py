"""Sites that fail or lie, as real processes: the round goes on, and the adapter takes no harm.

The oracle is a run in one process in which whoever was dropped gave nothing: the same adapter to
the bit, with a method whose clients keep a residual, so that a memory that was lost would show.
"""

import json
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="needs the extra fedsieve[flower]")

from fedsieve.algebra.adapter import Layout
from fedsieve.engine.client import Reply
from fedsieve.recipe.experiment import from_recipe
from fedsieve.run import rundir
from fedsieve.sites import federate
from fedsieve.sites.certificates import CA
from tests import runs
from tests.conftest import Tiny
from tests.sites import certificates, impostor, processes
from tests.sites.sites import process, quiet
from tests.sites.worlds import (
    PATIENCE,
    Process,
    World,
    assert_as_if_it_gave_nothing,
    begin,
    dropped,
    merged,
    missing_from,
    node,
    sockets,
    started,
    working,
    world,
)

CLIP = 20.0
# What clients keep between rounds: what their uploads left out.
MEMORY: dict[str, Any] = {
    "method": {"name": "flasc", "feedback": True},
    "server": {"optimizer": "sgd", "lr": 1.0, "clip": CLIP},
    "budgets": {"north": {"up": 0.25}, "south": {"up": 0.5}, "west": {"down": 0.5, "up": 0.25}},
}
LIES = {2: "again", 3: "noise", 4: "garbage", 5: "layout", 6: "nan", 7: "round", 8: "huge"}
WHY = {
    2: "its update was refused: it says the same as that of round 1, number for number",
    3: "header",
    4: "its update was refused: these bytes are not a message",
    5: "its update was refused: a message for the layout",
    6: "is not finite",
    7: "an answer for round 8 in round 7",
}


def lying(path: Path, *, ready: bool = True) -> AbstractContextManager[Process]:
    """A worker that does as `LIES` says."""
    return process(path, json.dumps(LIES), ready=ready, program=(impostor.__file__,))


def prepared(tiny: Tiny, folder: Path, *names: str, tls: bool = False, rounds: int) -> World:
    given = world(tiny, folder, names, tls=tls, rounds=rounds, **MEMORY)
    federate.prepare(given.recipe, given.run, PATIENCE._replace(sites=len(names)), given.listen)
    return given


def test_a_site_that_lies(tiny: Tiny, tmp_path: Path, no_report: None) -> None:
    """Another lie in every round, between honest ones; over the workers' sockets alone."""
    given = prepared(tiny, tmp_path, "north", "west", rounds=9)
    with working(given, {"west": lying}):
        federate.serve(given.run, sockets(given.sites), PATIENCE, quiet)
    assert_the_lies_did_no_harm(given)


@pytest.mark.slow
def test_a_site_that_lies_over_flower(tiny: Tiny, tmp_path: Path, no_report: None) -> None:
    given = prepared(tiny, tmp_path, "north", "south", "west", rounds=9)
    with started(given, {"west": lying}):
        begin(given)
    assert_the_lies_did_no_harm(given)


def assert_the_lies_did_no_harm(given: World) -> None:
    why = dropped(given.run)
    assert sorted(why) == [(number, "west") for number in WHY]
    for number, reason in WHY.items():
        assert reason in why[number, "west"], number
    for line in runs.lines(given.run, rundir.CLIENTS):
        if "dropped" not in line:
            assert (line["norm"] > 1000 * CLIP) == (line["client"] == "west" and line["round"] == 8)
            assert line["norm"] < CLIP / 2 or line["round"] == 8
    layout = from_recipe(given.recipe).resident.layout
    assert_as_if_it_gave_nothing(given, spoil=lambda reply, number: _huge(reply, number, layout))


def _huge(reply: Reply, number: int, layout: Layout) -> Reply:
    """What the site did in the one round in which its update was not refused but bounded."""
    if (reply.client.id, number) != ("west", 8):
        return reply
    assert reply.update is not None
    return reply._replace(update=impostor.huge(reply.update, layout))


# Machines that fail -----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_full_disk(tiny: Tiny, tmp_path: Path, no_report: None) -> None:
    """Full in round 2 and 3: the site says so, keeps what it had, and is used again when it is not.

    The disk is a file system of its own that is filled to its last byte.
    """
    given = prepared(tiny, tmp_path, "north", "west", rounds=5)
    folder = given.sites["west"].parent / "worker"
    kept: list[dict[str, bytes]] = []

    def act(text: str) -> None:
        if text.startswith("round 1/"):
            fill(folder / "filling")
            kept.append(contents(folder))
        if text.startswith("round 3/"):
            kept.append(contents(folder))
            (folder / "filling").unlink()

    with small_disk(folder), working(given, {}):
        federate.serve(given.run, sockets(given.sites), PATIENCE, act)
        assert kept[0] == kept[1]
        assert len([name for name in kept[0] if "round-" in name]) == 1
        assert len(list(folder.glob("adapters/*/adapter_model.safetensors"))) == 1
    why = dropped(given.run)
    assert sorted(why) == [(2, "west"), (3, "west")]
    said = "the site says: the site's disk: No space left on device. Nothing that was kept is lost"
    assert set(why.values()) == {said}
    assert_as_if_it_gave_nothing(given)


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system of 1 MiB at `folder`; the test is skipped where none may be mounted."""
    folder.mkdir(mode=0o700)
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=0700", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, timeout=30, check=False)
    except OSError as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    if done.returncode:
        pytest.skip(f"no file system may be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], timeout=30, check=True)


def fill(path: Path) -> None:
    """Write until nothing more fits."""
    with path.open("wb", buffering=0) as file:
        for size in (4096, 1):
            with suppress(OSError):
                while True:
                    file.write(b"\0" * size)


def contents(folder: Path) -> dict[str, bytes]:
    """All that a worker has stored of its rounds."""
    return {str(path): path.read_bytes() for path in folder.glob("runs/*/rounds/*")}


@pytest.mark.slow
def test_a_worker_that_is_killed(tiny: Tiny, tmp_path: Path, no_report: None) -> None:
    """kill -9 while it trains, and between rounds; a new one goes on with what is on the disk."""
    given = prepared(tiny, tmp_path, "north", "west", rounds=5)
    home = given.sites["west"].parent
    with ExitStack() as stack:
        workers = stack.enter_context(working(given, {"west": gated}))

        def kill() -> None:
            workers["west"].kill()
            workers["west"].wait(timeout=30)

        def again() -> None:
            workers["west"] = stack.enter_context(process(given.sites["west"]))

        def kill_in_round_2() -> None:
            until(lambda: asked(home) == 2, "west is asked in round 2")
            kill()

        def act(text: str) -> None:
            if text.startswith("round 1/"):
                open_until(home, 1)
                threading.Thread(target=kill_in_round_2).start()
            if text.startswith("round 3/"):
                again()
            if text.startswith("round 4/"):
                kill()
                again()

        federate.serve(given.run, sockets(given.sites), PATIENCE, act)
    why = dropped(given.run)
    assert sorted(why) == [(2, "west"), (3, "west")]
    assert "gave no answer" in why[2, "west"]
    assert "start `fedsieve worker site.toml`" in why[3, "west"]
    assert_as_if_it_gave_nothing(given)


def gated(path: Path, *, ready: bool = True) -> AbstractContextManager[Process]:
    """A true worker that waits before a round that is closed to it."""
    return process(path, ready=ready, program=(impostor.__file__,))


def open_until(home: Path, number: int) -> None:
    """Close to a site all rounds after this one."""
    impostor.note(home / "open", str(number))


def asked(home: Path) -> int:
    """The round in which a site was asked last."""
    place = home / "asked"
    return int(place.read_text()) if place.exists() else 0


def until(there: Callable[[], bool], what: str, seconds: float = 240.0) -> float:
    """Wait for something; how many seconds it took."""
    began = time.monotonic()
    while not there():
        assert time.monotonic() - began < seconds, f"{seconds:g} s, and still not: {what}"
        time.sleep(0.1)
    return time.monotonic() - began


@contextmanager
def joining(given: World, name: str) -> Iterator[Process]:
    """A site's node, started again and again until the server lets it in, as a service would.

    Flower refuses a node as long as it believes the one before, of the same key, to be there.
    """
    log, began = given.sites[name].parent / "node.log", time.monotonic()
    while True:
        old = log.stat().st_size if log.exists() else 0
        with node(given, name) as started_now:
            while started_now.poll() is None and b"SuperNode ID" not in log.read_bytes()[old:]:
                assert time.monotonic() - began < 240, log.read_text()
                time.sleep(0.2)
            if started_now.poll() is None:
                yield started_now
                return


def has_answered(home: Path) -> bool:
    """Whether a site's node has brought the answer of the last round that it heard of."""
    _, heard, after = (home / "node.log").read_text().rpartition("Receiving: train message")
    return bool(heard) and "Sent successfully" in after.rpartition("Sending: train message")[2]


@pytest.mark.slow
def test_a_node_that_is_killed(tiny: Tiny, tmp_path: Path, no_report: None) -> None:
    """kill -9 of a node, its children and its worker: between rounds, and in the middle of one.

    They are started again and used again, the node with the same key. Gates keep the other site's
    rounds from running out meanwhile.
    """
    given = prepared(tiny, tmp_path, "north", "south", tls=True, rounds=14)
    north, south = (given.sites[name].parent for name in ("north", "south"))
    open_until(south, 0)
    with ExitStack() as stack:
        running = stack.enter_context(started(given, {"north": gated, "south": gated}))
        victim = running.nodes["north"], running.workers["north"]

        def kill() -> None:
            for part in victim:
                processes.end(part, signal.SIGKILL)

        def again() -> tuple[Process, Process]:
            worker = stack.enter_context(gated(given.sites["north"]))
            return stack.enter_context(joining(given, "north")), worker

        begin(given, stream=False)
        # Between rounds: its answer is in, and the round waits for the other site.
        until(lambda: has_answered(north), "north has answered in round 1")
        kill()
        victim = again()
        open_until(north, 1)
        open_until(south, 99)
        until(lambda: asked(north) > 1, "north is asked again")
        middle = asked(north)
        open_until(south, middle)
        kill()
        waited = until(lambda: len(runs.lines(given.run)) > middle, "the round ends without it")
        open_until(north, 99)
        victim = again()
        open_until(south, 99)
        until(lambda: (given.run / rundir.ADAPTER).exists(), "the run ends")
    assert waited < 2 * 30 + 30  # two heartbeats, and what a busy machine adds
    assert sorted(dropped(given.run)) == [(middle, "north")]
    assert "heartbeat" in dropped(given.run)[middle, "north"]
    back = merged(given.run, "north")
    assert back[0] == 1
    assert back[-1] == 14
    assert middle + 1 not in back
    assert merged(given.run, "south") == list(range(1, 15))
    assert_as_if_it_gave_nothing(given, missing_from(given.run, given.sites))


@pytest.mark.slow
def test_nodes_that_were_not_invited(tiny: Tiny, tmp_path: Path, no_report: None) -> None:
    """Without TLS, trusting another authority, without a key, or with one that nobody registered.

    None of them is admitted, and the federation goes on with the others.
    """
    given = prepared(tiny, tmp_path, "north", "south", tls=True, rounds=2)
    assert given.listen.certificates is not None
    root = given.listen.certificates / CA
    other = certificates.make(tmp_path / "other") / CA
    key = certificates.node_key(tmp_path / "unknown")
    signed: list[str | Path] = ["--auth-supernode-private-key", key]
    # What such a node says in the end; the first goes on trying.
    strangers: dict[str, tuple[list[str | Path], str]] = {
        "no-tls": (["--insecure"], "Connection attempt failed, retrying"),
        "other-authority": (["--root-certificates", other, *signed], "CERTIFICATE_VERIFY_FAILED"),
        "no-key": (["--root-certificates", root], "must be registered"),
        "unknown-key": (["--root-certificates", root, *signed], "Failed to activate SuperNode"),
    }
    logs = {name: tmp_path / f"{name}.log" for name in strangers}

    def tried(name: str) -> bool:
        return strangers[name][1] in logs[name].read_text()

    with started(given), ExitStack() as stack:
        trap = stack.enter_context(socket.socket(socket.AF_UNIX))
        trap.bind(str(tmp_path / "trap.sock"))
        trap.listen()
        trap.setblocking(False)
        for name, (trust, _) in strangers.items():
            home, at = tmp_path / name, tmp_path / "trap.sock"
            stack.enter_context(processes.supernode(home, given.listen, at, logs[name], trust))
        begin(given)
        for name in strangers:
            until(partial(tried, name), f"the node {name} has tried")
            assert "SuperNode ID" not in logs[name].read_text(), name
        words = ("supernode", "list", federate.CONNECTION, "--format", "json")
        listed = json.loads(processes.flwr(given.run, *words))
        assert [each["status"] for each in listed["nodes"]] == ["online", "online"]
        with pytest.raises(BlockingIOError):  # nobody has asked for anything there
            trap.accept()
    assert dropped(given.run) == {}
    assert_as_if_it_gave_nothing(given)
