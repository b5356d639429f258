"""Slow links: the laws of the links that tests make, and the rounds of a federation on them.

The federation is real (SuperLink, node, worker, as in test_parity.py) and has one site, whose link
changes its speed between rounds. What a round takes is compared with `network.client_time`, fed
with the counted bytes and the measured seconds of work, plus what Flower needs for a round on an
open link: that is measured in the same run, and not part of the model. The model and Flower differ
in two points, which docs/network.md tells and the bounds here allow for: the download overlaps with
the start of Flower's client process, and the server looks for what is being uploaded at growing
intervals.

    python -m pytest -m slow -s tests/sites/test_links.py     prints what it measures
"""

import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import NamedTuple

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

pytest.importorskip("flwr", reason="needs the extra fedsieve[flower]")

from fedsieve.algebra.budget import Link
from fedsieve.clients import network
from fedsieve.recipe import read as recipe
from fedsieve.run import rundir
from fedsieve.sites import federate
from fedsieve.sites.certificates import CA
from fedsieve.sites.here import free_port
from fedsieve.sites.server import RoundPolicy
from fedsieve.sites.worker import SOCKET
from tests import runs
from tests.conftest import LABELS, Tiny
from tests.sites import certificates, links, processes, worlds
from tests.sites.sites import process, write_site

# At the node's end: each transfer in a connection of its own, all at once; prints their seconds.
CLIENT = """
import json, socket, struct, sys, threading, time
host, port, transfers = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
seconds = [0.0] * len(transfers)
begin = threading.Barrier(len(transfers))
def go(index, way, count):
    with socket.create_connection((host, port)) as line:
        begin.wait()
        start = time.monotonic()
        line.sendall(struct.pack(">?I", way == "up", count))
        if way == "up":
            line.sendall(bytes(count))
            count = 1
        while count:
            count -= len(line.recv(min(count, 65536)))
        seconds[index] = time.monotonic() - start
threads = [threading.Thread(target=go, args=(i, *each)) for i, each in enumerate(transfers)]
for each in threads: each.start()
for each in threads: each.join()
print(json.dumps(seconds))
"""
REQUEST = struct.calcsize(">?I")
Make = Callable[[int, Link], AbstractContextManager[links.Line]]


@contextmanager
def answering() -> Iterator[int]:
    """A server that gives or takes as many bytes as it is told; its port."""

    def converse(line: socket.socket) -> None:
        with line, suppress(OSError):
            up, count = struct.unpack(">?I", line.recv(REQUEST, socket.MSG_WAITALL))
            if not up:
                line.sendall(bytes(count))
                return
            while count:
                count -= len(line.recv(min(count, 65536)))
            line.sendall(b"!")

    def accept() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=converse, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def transfers(line: links.Line, *wanted: tuple[str, int]) -> list[float]:
    """The seconds that each of these takes, all begun at once: ("up" or "down", bytes)."""
    words = [sys.executable, "-c", CLIENT, line.host, str(line.port), json.dumps(wanted)]
    done = subprocess.run([*line.enter, *words], stdout=subprocess.PIPE, timeout=60, check=True)
    seconds: list[float] = json.loads(done.stdout)
    return seconds


@pytest.fixture(params=["proxied", "namespaced"])
def make(request: pytest.FixtureRequest) -> Make:
    if request.param == "namespaced" and (why := links.no_namespaces()):
        pytest.skip(why)
    made: Make = getattr(links, request.param)
    return made


def assert_took(seconds: float, expected: float) -> None:
    """A link at rest gives a tenth of a second of its bytes at once; a busy machine wakes late."""
    assert expected - 0.15 <= seconds <= 1.25 * expected + 0.25


def test_a_link_takes_the_time_of_its_rate(make: Make) -> None:
    """Also each direction its own, and two connections one rate; then with a latency, and open."""
    with answering() as port, make(port, Link(8, 2)) as line:
        (down,) = transfers(line, ("down", 1_000_000))
        assert_took(down, 1.0)
        (up,) = transfers(line, ("up", 250_000))
        assert_took(up, 1.0)
        first, second = transfers(line, ("up", 125_000), ("up", 125_000))
        assert_took(max(first, second), 1.0)
        assert min(first, second) > 0.6  # neither went first
        before = line.passed()
        line.shape(Link(8, 2, 0.25))
        (there_and_back,) = transfers(line, ("up", 1))
        assert_took(there_and_back, 0.5)
        line.shape(links.OPEN)
        (quick,) = transfers(line, ("up", 1_000_000))
        assert quick < 0.8
        after = line.passed()
        assert after.up - before.up == 2 * REQUEST + 1_000_001
        assert after.connections - before.connections == 2


def test_directions_do_not_share_a_rate() -> None:
    with answering() as port, links.proxied(port, Link(8, 2)) as line:
        for seconds in transfers(line, ("down", 1_000_000), ("up", 250_000)):
            assert_took(seconds, 1.0)


def test_nothing_is_left_of_a_namespace() -> None:
    if why := links.no_namespaces():
        pytest.skip(why)

    def here() -> list[str]:
        """This process's own: another test run may come and go meanwhile."""
        own = (f"fedsieve-{os.getpid()}-", f"fs{os.getpid()}")
        looks = [subprocess.check_output(["ip", *w], text=True) for w in (("netns",), ("link",))]
        return [line for look in looks for line in look.splitlines() if any(o in line for o in own)]

    with suppress(KeyboardInterrupt), links.namespaced(9, Link(1, 1)):
        assert here()
        raise KeyboardInterrupt
    assert here() == []


DOWNLINK = 4.0  # Mbit/s
RATIOS = (1, 4, 16)
NOISE = 8.0  # seconds that polling and a busy machine may add or hide
# FLASC's densities: a slow uplink is what they are for.
BUDGET = {"down": 0.5, "up": 0.0625}


class Took(NamedTuple):
    """A round: its link, its bytes as they are counted in three places, and its seconds.

    seconds:  as the server counts them, less the work of the client and the evaluation
    passed:   of the TCP streams through the link, polling and heartbeats included
    down, up: seconds in which the link carried most of what passed
    """

    link: Link
    payload: tuple[int, int]
    transport: int
    passed: links.Passed
    seconds: float
    down: float
    up: float

    def model(self) -> float:
        return network.client_time(self.link, *self.payload, 0.0)


class Place(NamedTuple):
    """A server and a site, ready for runs. line: the site's link."""

    folder: Path
    tiny: Tiny
    listen: federate.ServerAddress
    line: links.Line


@contextmanager
def site_on_a_link(tiny: Tiny, folder: Path, make: Make, *, tls: bool = False) -> Iterator[Place]:
    site = write_site(tiny, folder, budget=BUDGET)
    safe = certificates.make(folder / "certificates") if tls else None
    listen = federate.ServerAddress(port=free_port(), certificates=safe)
    first = prepared(tiny, folder / "first", listen, "fedit", 1)
    with ExitStack() as stack:
        stack.enter_context(process(site))
        stack.enter_context(processes.superlink(first, listen, folder / "superlink.log"))
        line = stack.enter_context(make(listen.port, links.OPEN))
        trust: list[str | Path] = ["--insecure"]
        if safe is not None:
            key = certificates.node_key(folder / "key")
            public = key.with_suffix(".pub")
            processes.flwr(first, "supernode", "register", public, federate.CONNECTION)
            trust = ["--root-certificates", safe / CA]
            trust += ["--auth-supernode-private-key", key]
        socket = site.parent / "worker" / SOCKET
        node: list[str | Path] = [
            *line.enter, processes.BIN / "flower-supernode",
            "--superlink", f"{line.host}:{line.port}", *trust,
            "--port", str(free_port()), "--node-config", f'socket="{socket}"',
        ]  # fmt: skip
        log = folder / "node.log"
        stack.enter_context(processes.running(node, folder / "home", log))
        yield Place(folder, tiny, listen, line)


def prepared(
    tiny: Tiny, run: Path, listen: federate.ServerAddress, method: str, rounds: int, rank: int = 4
) -> Path:
    table = tiny.table(
        rounds=rounds,
        cohort=1,
        lora__rank=rank,
        method={"name": method},
        budgets=[{}],
        data__classes=list(LABELS),
        training__steps=2,
        evaluation__every=rounds,
    )
    patience = RoundPolicy(sites=1, deadline=300.0, setup=200.0, wait=200.0)
    federate.prepare(recipe.check(table), run, patience, listen)
    return run


def rounds_on(place: Place, method: str, rank: int, plan: Sequence[Link]) -> list[Took]:
    """Run a method; the site's link is changed before each round. What each round took."""
    run = prepared(place.tiny, place.folder / method, place.listen, method, len(plan), rank)
    flwr: list[str | Path] = [processes.BIN / "flwr", "run"]
    words = [*flwr, run / federate.APP, federate.CONNECTION, "--stream"]
    looks: list[tuple[float, links.Passed]] = []
    marks: list[int] = []  # the last look before each round, and the one after the last round
    log = place.folder / f"{method}.log"
    with processes.running(words, run / federate.HOME, log) as going:
        until = time.monotonic() + 60 + 90 * len(plan)
        while len(marks) <= len(plan):
            assert time.monotonic() < until, log.read_text()[-3000:]
            assert going.poll() is None, log.read_text()[-3000:]
            looks.append((time.monotonic(), place.line.passed()))
            if (run / rundir.METRICS).exists() and len(runs.lines(run)) > len(marks):
                if len(marks) < len(plan):
                    place.line.shape(plan[len(marks)])
                marks.append(len(looks) - 1)
            time.sleep(0.02)
        going.wait(timeout=60)
    took = []
    receipts = runs.lines(run, rundir.CLIENTS)
    lines = runs.lines(run)[1:]
    for line, receipt, link, first, last in zip(
        lines, receipts, plan, marks[:-1], marks[1:], strict=True
    ):
        assert "dropped" not in receipt
        during = looks[first : last + 1]
        took.append(
            Took(
                link,
                (line["down_bytes"], line["up_bytes"]),
                line["transport_bytes"],
                links.Passed(*(b - a for a, b in zip(during[0][1], during[-1][1], strict=True))),
                line["seconds"] - line["evaluation_seconds"] - receipt["seconds"],
                span([(at, passed.down) for at, passed in during]),
                span([(at, passed.up) for at, passed in during]),
            )
        )
    place.line.shape(links.OPEN)
    return took


def span(looks: Sequence[tuple[float, int]]) -> float:
    """Seconds from the first to the last of these bytes, from those that the middle nine tenths
    took: polling comes before and after."""
    start, total = looks[0][1], looks[-1][1] - looks[0][1]
    first = next(at for at, count in looks if count - start >= 0.05 * total)
    last = next(at for at, count in looks if count - start >= 0.95 * total)
    return (last - first) / 0.9


def wide(tiny: Tiny, folder: Path) -> Tiny:
    """A model with so wide layers that its adapter of rank 64 has a megabyte."""
    shutil.copytree(tiny.bert, folder)
    config = BertConfig.from_pretrained(tiny.bert, hidden_size=512, num_attention_heads=8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertForSequenceClassification(config).save_pretrained(folder)
    return tiny._replace(bert=folder)


@pytest.mark.slow
def test_rounds_take_the_time_of_the_model(
    tiny: Tiny, tmp_path: Path, no_report: None, monkeypatch: pytest.MonkeyPatch, make: Make
) -> None:
    # Objects of 64 KiB: Flower's own 5 MiB take longer at a slow uplink than its clients wait.
    monkeypatch.setenv("FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", "65536")
    slow = [Link(DOWNLINK, DOWNLINK / ratio) for ratio in RATIOS for _ in range(2)]
    plan = [*[links.OPEN] * 3, *slow]
    with site_on_a_link(wide(tiny, tmp_path / "wide"), tmp_path, make) as place:
        took = {method: rounds_on(place, method, 64, plan) for method in ("fedit", "flasc")}
    beyond = {}  # what a round on a slow link takes beyond one on an open link
    print()
    for method, rounds in took.items():
        opened = [each.seconds for each in rounds if each.link == links.OPEN]
        print(f"{method}: open link", *(f"{each:.1f}" for each in opened))
        for each in rounds[len(opened) :]:
            beyond[each] = each.seconds - median(opened)
            print(
                f"  up {each.link.uplink:g} Mbit/s: payload {each.payload} "
                f"transport {each.transport} streams {each.passed} "
                f"model {each.model():.2f} s, measured {beyond[each]:.2f} s, "
                f"at the link {each.down:.2f} + {each.up:.2f} s"
            )
    for each, seconds in beyond.items():
        assert abs(seconds - each.model()) <= NOISE
        if each.model() > 20:
            assert seconds == pytest.approx(each.model(), rel=0.2)
        for count, rate, took_there in zip(
            each.payload, (each.link.downlink, each.link.uplink), (each.down, each.up), strict=True
        ):
            if count > 1_000_000:  # beside less, the node's polling is seen
                assert took_there == pytest.approx(count * 8e-6 / rate, rel=0.25)
    gains = []
    for ratio in RATIOS:
        link = Link(DOWNLINK, DOWNLINK / ratio)
        dense, sparse = ([e for e in rounds if e.link == link] for rounds in took.values())
        gains.append(median(beyond[e] for e in dense) - median(beyond[e] for e in sparse))
        expected = dense[0].model() - sparse[0].model()
        assert abs(gains[-1] - expected) <= NOISE
    assert gains == sorted(gains)
    assert gains[-1] == pytest.approx(expected, rel=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_what_travels(tiny: Tiny, tmp_path: Path, no_report: None, tls: bool) -> None:
    with site_on_a_link(tiny, tmp_path, links.proxied, tls=tls) as place:
        rounds = rounds_on(place, "fedit", 4, [links.OPEN] * 4)
        before = place.line.passed()
        time.sleep(30)  # a heartbeat or two, ten times asked for work
        idle = [(b - a) / 30 for a, b in zip(before, place.line.passed(), strict=True)]
    print(f"\nidle: {idle[0]:.0f} bytes a second down, {idle[1]:.0f} up")
    for each in rounds:
        print(f"payload {each.payload} transport {each.transport} streams {each.passed}")
        assert sum(each.payload) < each.transport < sum(each.payload) + 5_000
        assert 0 < sum(each.passed[:2]) - each.transport < 40_000
    assert sum(idle) < 1_000


@pytest.mark.slow
def test_a_slow_upload_does_not_outlast_the_deadline(
    tiny: Tiny, tmp_path: Path, no_report: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A megabyte at 0.1 Mbit/s takes 84 s: the round is over after 40, with the other site's."""
    monkeypatch.setenv(*federate.OBJECTS.split("="))
    given = worlds.world(
        wide(tiny, tmp_path / "wide"), tmp_path, ("north", "south"), tls=False, rounds=2,
        method={"name": "fedit"}, lora__rank=64, budgets={"north": {}, "south": {}},
        evaluation__every=2,
    )  # fmt: skip
    patience = worlds.PATIENCE._replace(deadline=40.0)
    federate.prepare(given.recipe, given.run, patience, given.listen)
    with ExitStack() as stack:
        stack.enter_context(worlds.working(given, {}))
        log = tmp_path / "superlink.log"
        stack.enter_context(processes.superlink(given.run, given.listen, log))
        line = stack.enter_context(links.proxied(given.listen.port, Link(10, 0.1)))
        behind = given._replace(listen=given.listen._replace(port=line.port))
        stack.enter_context(worlds.node(behind, "north"))
        stack.enter_context(worlds.node(given, "south"))
        worlds.begin(given)
    late = worlds.dropped(given.run)
    assert late[1, "north"].startswith("late: no answer in the round's 40 s")
    assert worlds.merged(given.run, "south") == [1, 2]
    first = runs.lines(given.run)[1]
    assert 40 <= first["seconds"] < 50
