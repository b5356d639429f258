"""Links of a given speed between a node and the SuperLink, made on this machine for tests.

Two ways, both with a relay of our own that passes bytes on to the SuperLink at 127.0.0.1:

    proxied      the relay itself holds the bytes back: a token bucket for each direction, shared by
                 all connections of the node. Works everywhere; its rate is that of the TCP streams.
    namespaced   the node lives in a network namespace, and the kernel holds back what passes the
                 veth pair (`tc`, tbf). Needs root and a kernel that can. Its rate counts frames, so
                 streams get 1448 of 1514 bytes.

The latency is the relay's in both, since not every kernel has netem. Nothing here can be reached
from another machine: the relay listens at 127.0.0.1, or at its end of the veth pair and for that
device alone, with an address that is for documentation and is never routed (RFC 5737).

A sender must feel a slow link at once: Flower waits 30 seconds for an answer once it has handed a
request to the system, and a loopback's buffers would take megabytes. So the relay takes small
segments into a small buffer.
"""

import itertools
import math
import os
import queue
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import NamedTuple

from fedsieve.algebra.budget import Link

OPEN = Link(math.inf, math.inf)
FRAME = 1514 / 1448  # bytes of a full frame on the veth pair for each byte of a TCP stream
_CHUNK = 4096  # bytes that pass together
_BURST = 0.1  # seconds that an idle link may catch up on: a busy machine wakes its threads late
_BUFFER = 1 << 16
_SEGMENT = 1400
_NAME = "fedsieve"
_DEVICE = "fs"


class Passed(NamedTuple):
    """Bytes of the TCP streams since the link was made, to the node and from it."""

    down: int
    up: int
    connections: int


class Line(NamedTuple):
    """A link as a test uses it.

    host, port: where the node finds the SuperLink
    enter:      words before a command that has to run at the node's end
    shape:      change the link's speed now
    passed:     what has passed so far
    """

    host: str
    port: int
    enter: tuple[str, ...]
    shape: Callable[[Link], None]
    passed: Callable[[], Passed]


class _Lane:
    """One direction of a link. Its rate, in Mbit/s, and latency may change at any time."""

    def __init__(self) -> None:
        self.rate, self.latency, self.bytes = math.inf, 0.0, 0
        self._free = 0.0
        self._lock = threading.Lock()

    def take(self, count: int) -> float:
        """Wait until so many bytes are through; returns when they are there."""
        with self._lock:
            self.bytes += count
            now = time.monotonic()
            self._free = max(self._free, now - _BURST) + count * 8e-6 / self.rate
            wait = max(0.0, self._free - now)
        time.sleep(wait)
        return now + wait + self.latency


@contextmanager
def proxied(port: int, link: Link = OPEN) -> Iterator[Line]:
    """A link to 127.0.0.1:port whose speed the relay makes."""
    with _relay(port, "127.0.0.1", None) as (at, down, up, passed):

        def shape(link: Link) -> None:
            down.rate, up.rate = link.downlink, link.uplink
            down.latency = up.latency = link.latency

        shape(link)
        yield Line("127.0.0.1", at, (), shape, passed)


@contextmanager
def namespaced(port: int, link: Link = OPEN) -> Iterator[Line]:
    """A link to 127.0.0.1:port whose speed the kernel makes. Raises OSError where it cannot."""
    if why := _missing():
        raise OSError(why)
    _sweep()
    with ExitStack() as stack:
        name = f"{_NAME}-{os.getpid()}-{next(_count)}"
        _run("ip", "netns", "add", name)
        stack.callback(_try, "ip", "netns", "del", name)
        ours, theirs = (f"{_DEVICE}{os.getpid()}{end}{next(_count)}" for end in "ab")
        _run("ip", "link", "add", ours, "type", "veth", "peer", "name", theirs, "netns", name)
        stack.callback(_try, "ip", "link", "del", ours)
        here, there = _free_addresses()
        inside = ("ip", "netns", "exec", name)
        _run("ip", "addr", "add", f"{here}/30", "dev", ours)
        _run("ip", "link", "set", ours, "up")
        _run(*inside, "ip", "addr", "add", f"{there}/30", "dev", theirs)
        for device in ("lo", theirs):
            _run(*inside, "ip", "link", "set", device, "up")
        at, down, up, passed = stack.enter_context(_relay(port, here, ours))

        def shape(link: Link) -> None:
            down.latency = up.latency = link.latency
            for enter, device, rate in (((), ours, link.downlink), (inside, theirs, link.uplink)):
                _try(*enter, "tc", "qdisc", "del", "dev", device, "root")
                if rate < math.inf:
                    _run(
                        *enter, "tc", "qdisc", "add", "dev", device, "root", "tbf",
                        "rate", f"{round(rate * 1e6)}bit", "burst", "8kb", "limit", "64kb",
                    )  # fmt: skip

        shape(link)
        yield Line(here, at, inside, shape, passed)


def no_namespaces() -> str:
    """Why this machine cannot make a namespaced link, or an empty text if it can."""
    try:
        with namespaced(9, Link(1, 1)):
            return ""
    except OSError as error:
        return str(error)


_count = itertools.count()


@contextmanager
def _relay(
    port: int, host: str, device: str | None
) -> Iterator[tuple[int, _Lane, _Lane, Callable[[], Passed]]]:
    """Pass what comes to `host` on to 127.0.0.1:port: the relay's port, its lanes, its count."""
    down, up = _Lane(), _Lane()
    alive: set[socket.socket] = set()
    accepted = itertools.count()
    connections = 0

    def pump(source: socket.socket, sink: socket.socket, lane: _Lane) -> None:
        ready: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()

        def deliver() -> None:
            with suppress(OSError):
                while True:
                    due, data = ready.get()
                    time.sleep(max(0.0, due - time.monotonic()))
                    if not data:
                        sink.shutdown(socket.SHUT_WR)
                        return
                    sink.sendall(data)

        writer = threading.Thread(target=deliver, daemon=True)
        writer.start()
        with suppress(OSError):
            while data := source.recv(_CHUNK):
                ready.put((lane.take(len(data)), data))
        ready.put((time.monotonic() + lane.latency, b""))
        writer.join()

    def converse(near: socket.socket) -> None:
        with suppress(OSError), near, _small(socket.socket()) as far:
            far.connect(("127.0.0.1", port))
            far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            alive.update((near, far))
            back = threading.Thread(target=pump, args=(far, near, down), daemon=True)
            back.start()
            pump(near, far, up)
            back.join()
            alive.difference_update((near, far))

    def accept() -> None:
        nonlocal connections
        with suppress(OSError):
            while True:
                near, _ = listener.accept()
                connections = next(accepted) + 1
                threading.Thread(target=converse, args=(near,), daemon=True).start()

    with _small(socket.socket()) as listener:
        if device is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
        listener.bind((host, 0))
        listener.listen(64)
        threading.Thread(target=accept, daemon=True).start()
        try:
            at: int = listener.getsockname()[1]
            yield at, down, up, lambda: Passed(down.bytes, up.bytes, connections)
        finally:
            for each in (listener, *alive):
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)


def _small(given: socket.socket) -> socket.socket:
    given.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
    given.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, _SEGMENT)
    return given


def _missing() -> str:
    if os.geteuid() != 0:
        return "network namespaces need root"
    absent = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    return f"network namespaces need {' and '.join(absent)} (iproute2)" if absent else ""


def _sweep() -> None:
    """Remove what a killed test left: its namespaces, and with them its devices."""
    for line in _run("ip", "netns", "list").splitlines():
        name = line.split()[0]
        kind, _, rest = name.partition("-")
        pid = rest.partition("-")[0]
        if kind == _NAME and pid.isdigit():
            try:
                os.kill(int(pid), 0)
            except ProcessLookupError:
                _try("ip", "netns", "del", name)


def _free_addresses() -> tuple[str, str]:
    """Two addresses for documentation (RFC 5737) that this machine makes no use of, in one /30."""
    known = [*_run("ip", "-4", "-o", "addr").splitlines(), *_run("ip", "-4", "route").splitlines()]
    foreign = [line for line in known if f" {_DEVICE}" not in line]
    for net in ("198.51.100", "203.0.113", "192.0.2"):
        if not any(net in line for line in foreign):
            for block in range(0, 256, 4):
                here, there = f"{net}.{block + 1}", f"{net}.{block + 2}"
                if not any(f" {here}/" in line for line in known):
                    return here, there
    raise OSError("the addresses for links are taken")


def _run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode != 0:
        raise OSError(f"`{' '.join(words)}` failed: {done.stderr.strip()}")
    return done.stdout


def _try(*words: str) -> None:
    with suppress(OSError):
        _run(*words)
