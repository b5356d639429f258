"""The two ends of a Flower app: `server` runs the federation, `client` carries bytes to a worker.

Flower starts a new client process for every message, so nothing heavy is imported here: the model
and the data stay in the site's worker. Which worker that is comes from the node's own
configuration, never from a message.

A message is one opaque array of bytes, a frame of worker.py: Flower moves many arrays slowly, and
has no business with what is in them. Its `Message` works only inside a task of Flower's, which is
why it is nowhere else in FedSieve.
"""

import math
import os
import queue
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedsieve.errors import FedSieveError, WireError
from fedsieve.frame import pack, refusal
from fedsieve.sites.worker import SOCKET, carry, without_paths

if TYPE_CHECKING:
    from fedsieve.sites.server import Incoming, Node, PendingRequest, Transport

FORM = "fedsieve/1"
RECORD, ARRAY = "fedsieve", "frame"
SETTING = "socket"  # in the node's configuration: the path of its worker's socket


def relay(message: Message, context: Context) -> Message:
    """A client's whole work: the bytes to the worker, the worker's bytes back."""
    path = context.node_config.get(SETTING)
    try:
        if not isinstance(path, str):
            raise FedSieveError(
                "this node knows no worker: start flower-supernode with --node-config "
                f"'{SETTING}=\"<folder of the site>/{SOCKET}\"'"
            )
        answer = carry(Path(path), frame_of(message))
    except FedSieveError as error:
        # The node's own log, and no other, is told where the socket lies.
        # In letters that any log has: what cannot be written would be no answer.
        print(f"fedsieve: {error}".encode("ascii", "backslashreplace").decode(), flush=True)
        known = [each for each in (str(path), str(Path(str(path)))) if os.sep in each]
        answer = pack(refusal(without_paths(str(error), *known)))
    return Message(content_of(answer), reply_to=message)


def content_of(frame: bytes) -> RecordDict:
    """A frame as the content of a message."""
    array = Array("uint8", (len(frame),), FORM, frame)
    return RecordDict({RECORD: ArrayRecord({ARRAY: array})})


def frame_of(message: Message) -> bytes:
    """The frame that a message holds. Raises WireError if it holds anything else."""
    if message.has_error():
        raise WireError(message.error.reason or f"Flower's error {message.error.code}")
    record = message.content.array_records.get(RECORD)
    array = None if record is None else record.get(ARRAY)
    if array is None or array.stype != FORM or len(message.content) != 1:
        raise WireError("a message that holds no frame of this version of FedSieve")
    return bytes(array.data)


def size_of(part: Any) -> int:
    """Bytes of a message as Flower sends it: each of its parts is an object of its own."""
    return len(part.deflate()) + sum(size_of(child) for child in (part.children or {}).values())


class MessagePoller:
    """Replies, each fetched by a thread of its own.

    Flower tells of a reply before its bytes have come over a slow uplink, and whoever fetches it
    waits for them: others would wait behind it, and the round's deadline would not hold.
    """

    def __init__(self, pull: "Callable[[str, int], list[Incoming]]", pause: float = 0.5) -> None:
        """pull: a request, and the bytes of the longest frame that answers it -> its replies
        pause: seconds between two looks for the same reply
        """
        self._pull, self._pause = pull, pause
        self._next: dict[str, float] = {}  # when to look again; never, while a thread does
        self._came: dict[str, list[Incoming]] = {}  # and not asked for since
        self._done: queue.SimpleQueue[tuple[str, list[Incoming] | Exception]] = queue.SimpleQueue()

    def collect(self, requests: Mapping[str, int]) -> "list[Incoming]":
        """What has come for these requests, once; at once. Raises what a fetch raised."""
        while True:
            try:
                request, came = self._done.get_nowait()
            except queue.Empty:
                break
            if isinstance(came, Exception):
                raise came
            self._next[request] = time.monotonic() + self._pause
            if came:
                self._came[request] = came
        found: list[Incoming] = []
        for request, most in requests.items():
            if request in self._came:
                found += self._came.pop(request)
                self._next.pop(request, None)
            elif self._next.get(request, 0.0) <= time.monotonic():
                self._next[request] = math.inf
                # A daemon: a reply that never comes whole must not keep the process from ending.
                threading.Thread(target=self._fetch, args=(request, most), daemon=True).start()
        return found

    def _fetch(self, request: str, most: int) -> None:
        try:
            self._done.put((request, self._pull(request, most)))
        except Exception as error:
            self._done.put((request, error))


def transport(grid: Grid, proved: bool) -> "Transport":
    """Flower's Grid as the engine knows it. proved: nodes have proved that they hold their keys."""
    from fedsieve.sites.replies import fetch
    from fedsieve.sites.server import Node, PendingRequest, Transport

    def nodes() -> "list[Node]":
        with told_by_name():
            found = grid.get_nodes()
        return [
            Node(n.node_id, n.last_activated_at, n.public_key.hex() if proved else "")
            for n in found
        ]

    def send(node: int, kind: str, frame: bytes, seconds: float) -> "PendingRequest | None":
        message = Message(content_of(frame), node, kind, ttl=seconds)
        size = size_of(message)
        with told_by_name():
            (request,) = grid.push_messages([message]) or (None,)
        return None if request is None else PendingRequest(request, size)

    return Transport(nodes, send, MessagePoller(partial(fetch, grid)).collect)


@contextmanager
def told_by_name() -> Iterator[None]:
    """Raises FedSieveError for an error of the SuperLink itself, in place of Flower's traceback."""
    import httpx

    try:
        yield
    except httpx.HTTPStatusError as error:
        raise FedSieveError(
            f"the SuperLink failed ({error.response.status_code} at {error.request.url.path}): "
            "what it prints says why (a full disk, say; with --local it is in sites/server.log). "
            "Mend that, then go on with --resume"
        ) from error


def end_with_parent(pause: float = 1.0, patience: float = 60.0) -> None:
    """Stop this process as SIGTERM does when the one that started it is gone, and end it after some
    time whatever it does then: Flower would wait for its SuperLink for good, with the run's lock.

    pause: seconds between two looks; patience: seconds until it is ended
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(pause)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(patience)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(grid: Grid, context: Context) -> None:
    """The server's whole work."""
    end_with_parent()
    from fedsieve import console
    from fedsieve.sites import federate
    from fedsieve.sites.server import RoundPolicy

    console.quiet()
    console.take_any_letter()
    warnings.showwarning = console.show_warning
    config = context.run_config
    if config["tls"] and "--insecure" in sys.argv:
        raise FedSieveError("this federation was prepared for TLS, and the SuperLink has none")
    policy = RoundPolicy(**{name: config[name] for name in federate.ASKED_FOR})
    reach = transport(grid, proved=bool(config["tls"]))

    def say(text: str) -> None:
        with suppress(OSError, ValueError):  # a full disk, a log that was closed
            print(text, flush=True)

    try:
        federate.serve(Path(str(config["folder"])), reach, policy, say)
    except FedSieveError as error:
        # Flower calls a run failed by what it raises, and logs all of its traceback: ours says
        # nothing that the sentence does not.
        raise error.with_traceback(None) from None


server = ServerApp()
server.main()(main)
client = ClientApp()
for _kind in (client.train, client.evaluate, client.query):
    _kind()(relay)
