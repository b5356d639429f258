"""Connections that say nothing, promise what they do not send, or send too much: a worker answers
others meanwhile, within seconds, and holds no more than its bounds.
"""

import os
import random
import socket
import threading
import time
import tracemalloc
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsieve.algebra.adapter import base_layout, layout_of
from fedsieve.algebra.budget import Budget
from fedsieve.algebra.payload import Base, Form, Payload, Values, rounded
from fedsieve.algebra.support import Support, everything
from fedsieve.errors import FedSieveError
from fedsieve.frame import Frame, pack, unpack
from fedsieve.methods import fedit
from fedsieve.sites import intake, worker
from fedsieve.sites.worker import SOCKET, ask
from fedsieve.wire import encode, longest
from tests import kinds, toy
from tests.sites.test_flower import EXACT, Net, federation, run, site, sites_of

MOST, LONG = 1 << 20, 8 << 20
UNWANTED = Frame({"ok": False, "error": "tell it first", "unknown_recipe": True})


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A worker's socket; its requests say how long their body was, and "describe" needs no work."""
    monkeypatch.setattr(intake, "SILENCE", 0.5)
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    folder = tmp_path / "w"
    folder.mkdir(mode=0o700)
    ready = threading.Event()

    def work(request: Frame) -> Frame:
        if request.header["do"] == "stop":
            raise SystemExit
        if request.header["do"] == "long":
            return Frame({"ok": True}, bytes(LONG))
        return Frame({"ok": True, "came": len(request.body)})

    def about(request: Frame) -> Frame | None:
        return Frame({"ok": True}) if request.header.get("do") == "describe" else None

    def serve() -> None:
        with suppress(SystemExit):
            worker.serve(folder, work, about, lambda _: ready.set(), most)

    def most(header: Mapping[str, Any]) -> int | Frame:
        return UNWANTED if header.get("do") == "unwanted" else MOST

    serving = threading.Thread(target=serve, daemon=True)
    serving.start()
    assert ready.wait(10)
    yield Path("w") / SOCKET
    with suppress(Exception):
        ask(Path("w") / SOCKET, Frame({"do": "stop"}), 0.2)
    serving.join(10)
    assert not serving.is_alive()


def head(length: int, do: str = "train") -> bytes:
    whole = pack(Frame({"do": do}))
    text = whole[4:].replace(b'"length": 0', b'"length": %d' % length)
    return len(text).to_bytes(4, "big") + text


# What a connection sends before it says nothing more.
BEGINNINGS: dict[str, bytes] = {
    "nothing": b"",
    "half a length": b"\0\0",
    "half a header": head(10)[:12],
    "a header alone": head(MOST),
    "half a body": head(MOST) + bytes(MOST // 2),
    "all but a byte": head(MOST) + bytes(MOST - 1),
}


@pytest.mark.parametrize("count", kinds.some_of([100, 32, 16]))
@pytest.mark.parametrize("beginning", kinds.some_of(BEGINNINGS, 2))
def test_silent_connections_keep_nobody_waiting(address: Path, beginning: str, count: int) -> None:
    with ExitStack() as open_ones:
        for _ in range(count):
            connection = open_ones.enter_context(socket.socket(socket.AF_UNIX))
            connection.settimeout(10)
            connection.connect(str(address))
            with suppress(OSError):
                connection.sendall(BEGINNINGS[beginning])
        began = time.monotonic()
        assert ask(address, Frame({"do": "describe"}), 30).header["ok"]
        assert ask(address, Frame({"do": "train"}, b"12345"), 30).header["came"] == 5
        assert time.monotonic() - began < 10  # of a busy machine; minutes before
        # And each is told, or closed, in seconds.
        connection.settimeout(20)
        with suppress(ConnectionError):
            assert b"no request" in connection.recv(1000)


def test_a_drip_is_no_progress(address: Path) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        connection.connect(str(address))
        connection.sendall(head(MOST))
        began = time.monotonic()
        with suppress(OSError):
            while time.monotonic() - began < 20:
                connection.sendall(b"x")
                time.sleep(0.05)
        assert time.monotonic() - began < 15


def test_a_body_has_as_long_as_its_length_takes_however_it_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A piece now and then is no reason to wait for all that was promised."""
    monkeypatch.setattr(intake, "SILENCE", 0.5)
    monkeypatch.setattr(intake, "RATE", 100 << 20)
    ours, theirs = socket.socketpair()
    going = threading.Event()

    def drip() -> None:
        with suppress(OSError):
            while not going.wait(0.1):
                theirs.sendall(bytes(1 << 20))

    dripping = threading.Thread(target=drip, daemon=True)
    dripping.start()
    began = time.monotonic()
    with ours, pytest.raises(TimeoutError):
        intake.take(ours, 100 << 20)
    assert time.monotonic() - began < 5  # 1.5, on a busy machine
    going.set()
    dripping.join(10)
    theirs.close()


def test_a_request_whose_body_is_not_wanted_is_answered_without_it(address: Path) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        connection.connect(str(address))
        connection.sendall(head(worker.BODY, "unwanted"))
        assert unpack(connection.recv(1 << 16)) == UNWANTED


def test_answers_that_nobody_takes_are_few(address: Path) -> None:
    """Each is as long as an update; who does not read has seconds, and others are put off."""
    tracemalloc.start()
    try:
        with ExitStack() as open_ones:
            for _ in range(3 * worker.JOBS):
                connection = open_ones.enter_context(socket.socket(socket.AF_UNIX))
                connection.connect(str(address))
                connection.sendall(pack(Frame({"do": "long"})))
            time.sleep(1)
            _, peak = tracemalloc.get_traced_memory()
            until = time.monotonic() + 60
            while not ask(address, Frame({"do": "train"}, b"12345"), 30).header.get("came"):
                assert time.monotonic() < until
                time.sleep(0.2)
        assert peak < 2.5 * LONG * worker.JOBS
    finally:
        tracemalloc.stop()


def test_no_more_threads_is_no_reason_to_hear_nothing(
    address: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, failing = threading.Thread.start, threading.Event()

    def starting(thread: threading.Thread) -> None:
        if failing.is_set() and thread.daemon:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", starting)
    failing.set()
    for _ in range(3):
        with pytest.raises(FedSieveError, match="gave no answer"):
            ask(address, Frame({"do": "describe"}), 5)
    failing.clear()
    assert ask(address, Frame({"do": "describe"}), 30).header["ok"]


def test_a_flood_takes_a_bounded_number_of_threads(address: Path) -> None:
    """Refused connections are drained for a second, and are no longer among those that are read."""
    before, most = threading.active_count(), 0
    with ExitStack() as open_ones:
        for number in range(400):
            connection = open_ones.enter_context(socket.socket(socket.AF_UNIX))
            connection.connect(str(address))  # waits outside while they are many
            with suppress(OSError):
                connection.sendall(b"\xff" * 4)
            if number % 20 == 0:
                most = max(most, threading.active_count())
        assert ask(address, Frame({"do": "describe"}), 30).header["ok"]
    assert most <= before + worker.THREADS + 1


@pytest.mark.parametrize("length", [MOST + 1, 100 << 20, worker.BODY])
def test_a_body_longer_than_can_be_is_refused_before_it_is_read(address: Path, length: int) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        connection.connect(str(address))
        connection.sendall(head(length))
        answer = connection.recv(1 << 16)
    assert f"a body of {length} bytes" in unpack(answer).header["error"]
    assert "at most" in unpack(answer).header["error"]


def test_unfinished_bodies_hold_no_more_than_their_bound(
    address: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "WAITING", 4 * MOST)
    tracemalloc.start()
    try:
        with ExitStack() as open_ones:
            for _ in range(40):
                connection = open_ones.enter_context(socket.socket(socket.AF_UNIX))
                connection.settimeout(0.05)
                connection.connect(str(address))
                with suppress(OSError):
                    connection.sendall(head(MOST) + bytes(MOST - 1))
            assert ask(address, Frame({"do": "describe"}), 30).header["ok"]
            _, peak = tracemalloc.get_traced_memory()
        assert peak < 4 * MOST + 4 * MOST  # and what this end holds
    finally:
        tracemalloc.stop()


def test_promises_of_bodies_keep_nobody_waiting(
    address: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that is closed for newer ones waits for room no longer."""
    monkeypatch.setattr(intake, "WAITING", 2 * MOST)
    monkeypatch.setattr(intake, "SILENCE", 5.0)
    with ExitStack() as open_ones:
        for _ in range(worker.THREADS + 100):
            connection = open_ones.enter_context(socket.socket(socket.AF_UNIX))
            connection.connect(str(address))
            connection.sendall(head(MOST))
        assert ask(address, Frame({"do": "describe"}), 20).header["ok"]


def test_what_waits_for_room_is_taken_when_there_is(
    address: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "WAITING", MOST)
    answers: list[int] = []

    def send() -> None:
        answer = ask(address, Frame({"do": "train"}, bytes(MOST - 7)), 60)
        answers.append(answer.header.get("came", -1))

    sending = [threading.Thread(target=send) for _ in range(8)]
    for each in sending:
        each.start()
    for each in sending:
        each.join(60)
    assert answers == [MOST - 7] * 8


def test_an_answer_longer_than_any_update_is_left_out() -> None:
    method = fedit.method(**EXACT)
    members = toy.clients([Budget()] * 2)
    most = longest(toy.start().layout)
    honest = site(members[0], method)
    long = site(members[1], method, lambda f: f._replace(body=f.body + os.urandom(2 * most)))
    net = Net({0: honest, 1: long})
    _, receipts, _ = run(federation(sites_of(net, most=most), method, size=2), 1)
    reasons = {r.client: r.dropped for r in receipts}
    assert reasons["0000"] is None
    assert "at most" in str(reasons["0001"])


def test_what_a_site_says_of_itself_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it is met, and in an answer that is refused: neither is unpacked."""
    method = fedit.method(**EXACT)
    members = toy.clients([Budget()] * 2)
    most = longest(toy.start().layout)
    words = {"ok": False, "error": "no", "unknown_recipe": True, "lost_memory": True}
    answers = {0: site(members[0], method), 1: site(members[1], method)}
    honest = answers[1]

    def long(request: Frame) -> Any:
        if request.header["do"] == "train":
            return Frame(words, os.urandom(2 * most))
        return honest(request)

    answers[1] = long
    net = Net(answers)
    sites = sites_of(net, most=most)
    _, receipts, _ = run(federation(sites, method, size=2), 2)
    assert {r.dropped for r in receipts if r.client == "0001"} == {
        r.dropped for r in receipts if r.dropped and "at most" in r.dropped
    }
    after = [h.get("after") for node, h in net.asked if node == 1 and h["do"] == "train"]
    assert None not in after  # its word that it lost its memory was not taken


@pytest.mark.parametrize("form", ["float64", "float32", "bfloat16", "int8"])
def test_no_message_is_longer_than_the_longest(form: Form) -> None:
    """Over shapes, masks of any density and numbers that no coder makes shorter."""
    draws = random.Random(form)
    for trial in range(60):
        rank, rows = draws.randint(1, 9), draws.randint(1, 400)
        torch.manual_seed(trial)
        tensors = {
            "m.a.lora_A.weight": torch.zeros(rank, rows),
            "m.a.lora_B.weight": torch.zeros(draws.randint(1, 90), rank),
            "m.head.weight": torch.zeros(draws.randint(1, 60)),
        }
        layout = layout_of(tensors, 1.0)
        density = draws.choice([0.0, 0.01, 0.5, 0.5, 0.99, 1.0])
        masks = {n: torch.rand(t.shape) < density for n, t in tensors.items()}
        support = Support(layout.names, None, masks if draws.random() < 0.7 else {})
        size = sum(int(m.sum()) for m in support.masks.values()) if support.masks else layout.size
        numbers = torch.randn(size, dtype=torch.float64) * 10.0 ** draws.randint(-30, 30)
        numbers[::2] *= 1e-7
        payload = Payload(
            layout, support, rounded(numbers, form, torch.Generator()), "sent", "sent"
        )
        assert len(encode(payload)) <= longest(layout)
        of_base = base_layout(layout, 0)
        dense = Values("float64", torch.randn(of_base.size, dtype=torch.float64), torch.empty(0))
        change = Payload(of_base, everything(of_base), dense, "known", "known")
        assert len(encode(payload._replace(base=Base(0, change)))) <= longest(layout, down=True)
        whole = Values("float64", torch.randn(layout.size, dtype=torch.float64), torch.empty(0))
        control = Payload(layout, everything(layout), whole, "known", "known")
        assert len(encode(payload._replace(control=control))) <= longest(layout, down=True)
