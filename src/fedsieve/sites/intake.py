"""What a worker takes in from its socket at a time: bounded in number, in bytes and in time.

Whoever reaches the socket may open connections and say nothing, or promise a body and not send it.
So a connection has `SILENCE` seconds for its header, and again for its body with a second more for
each `RATE` bytes of it; of more than `READING` connections that are not through, the oldest is
closed; and bodies that were promised and are not yet answered hold at most `WAITING` bytes
together, or one body alone: others wait `ROOM` times as long for theirs.
"""

import math
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

SILENCE = 5.0  # seconds for a header, and for a body beside what its length takes
ROOM = 12
RATE = 4 << 20  # bytes a second, within one machine
READING = 64  # connections that are read at once
WAITING = 256 << 20  # bytes of all bodies together
BUFFER = 1 << 16


class Ended(Exception):
    """The other end closed the connection in the middle of a frame, or it was closed here."""


class Intake:
    """The connections that are being read, and the bytes that they may hold."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._reading: dict[int, socket.socket] = {}  # the oldest first
        self._held = 0

    @contextmanager
    def reading(self, connection: socket.socket) -> Iterator[None]:
        """Count a connection among those that are read; the oldest is closed if they are many."""
        with self._changed:
            while len(self._reading) >= READING:
                oldest = self._reading.pop(next(iter(self._reading)))
                with suppress(OSError):
                    oldest.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads it,
                self._changed.notify_all()  # and one that waits for room
            self._reading[id(connection)] = connection
        try:
            yield
        finally:
            with self._changed:
                self._reading.pop(id(connection), None)

    @contextmanager
    def holding(self, connection: socket.socket, count: int) -> Iterator[None]:
        """So many bytes for a connection that is read, as soon as there is room.

        Raises TimeoutError if there is none in time, Ended if it was closed for newer ones.
        """

        def closed() -> bool:
            return id(connection) not in self._reading

        with self._changed:
            if not self._changed.wait_for(lambda: closed() or self._fits(count), ROOM * SILENCE):
                raise TimeoutError(f"{self._held} bytes wait already: ask again later")
            if closed():
                raise Ended("others came, and it was the oldest")
            self._held += count
        try:
            yield
        finally:
            with self._changed:
                self._held -= count
                self._changed.notify_all()

    def _fits(self, count: int) -> bool:
        return not count or not self._held or self._held + count <= WAITING


def seconds_for(count: int) -> float:
    """How long so many bytes may take within one machine."""
    return SILENCE + count / RATE


def take(connection: socket.socket, count: int, seconds: float | None = None) -> bytes:
    """So many bytes of a connection; memory grows with what came, not with what was promised.

    seconds: for all of it; None is as many as its length may take within one machine
    Raises Ended or TimeoutError.
    """
    came = bytearray()
    due = time.monotonic() + (seconds_for(count) if seconds is None else seconds)
    while len(came) < count:
        left = due - time.monotonic()
        if left <= 0:
            raise TimeoutError("it took too long to arrive")
        connection.settimeout(left if left < math.inf else None)
        part = connection.recv(min(count - len(came), BUFFER))
        if not part:
            raise Ended("it ended in the middle")
        came += part
    return bytes(came)
