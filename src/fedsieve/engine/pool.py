"""Workers that are processes of this machine.

A worker is asked over a pair of sockets that only it and this process hold: no port is open, and
nothing else crosses. When this process ends, however it does, the worker reads the end of its
socket and ends too, also while it trains (`serve`). Files that workers share (weights,
examples) have no name once they are open here, so that none is left: a worker gets descriptors.
"""

import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedsieve.engine.request import refuse_failed
from fedsieve.engine.spread import Gone, Hire
from fedsieve.errors import FedSieveError, WireError
from fedsieve.frame import pack, read, unpack

OUT_OF_MEMORY = 12  # the exit code of a worker whose device had no room
PATIENCE = 10.0  # seconds in which it is known how a worker ended, or an answer goes on that began
_AT_ONCE = 1 << 20  # bytes


class Process:
    """A worker that is a process. setup, mark: see `processes`"""

    def __init__(
        self, module: str, threads: int, files: Sequence[int], setup: bytes, mark: str
    ) -> None:
        self._setup, self._mark = setup, mark
        ours, theirs = socket.socketpair()
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
            # What is imported here, a method of the user's own too, is found there.
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }
        with theirs:
            # A session of its own: Ctrl-C in a terminal reaches this process alone, which ends it.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr.fileno() if _has_file(sys.stderr) else subprocess.DEVNULL,
                env=environment,
                pass_fds=[theirs.fileno(), *files],
                start_new_session=True,
            )
        self._socket = ours

    @property
    def name(self) -> str:
        """As warnings call it."""
        return f"the worker process {self._process.pid}"

    def begin(self) -> None:
        """See `spread.Worker`."""
        check_ready(unpack(self.ask(self._setup)).header, self._mark)

    def ask(self, request: bytes) -> bytes:
        """See `spread.Worker`."""
        try:
            self._socket.settimeout(None)
            self._socket.sendall(request)
            self._socket.recv(1, socket.MSG_PEEK)  # which takes as long as it trains
            self._socket.settimeout(PATIENCE)
            return pack(read(lambda count: _exactly(self._socket, count)))
        except (OSError, EOFError) as error:
            raise Gone(self._how()) from error
        except WireError as error:
            raise Gone(f"answered with no frame ({error})") from error

    def end(self) -> None:
        """See `spread.Worker`."""
        self._process.kill()  # it keeps nothing
        self._process.wait()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits for an answer
        self._socket.close()

    def _how(self) -> str:
        try:
            code = self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            return "stopped answering"
        if code == OUT_OF_MEMORY:
            return "ran out of memory"
        if code == -signal.SIGKILL:
            return "was killed (out of memory?)"
        return f"ended with exit code {code}"


def processes(
    module: str, threads: int, setup: Callable[[int], bytes], files: Sequence[int], mark: str
) -> Hire:
    """Who starts workers: `python -m module`, which calls `serve`.

    setup: the number of a worker -> the request that makes it ready
    files: descriptors that it inherits
    mark:  of the model that it must have
    """

    return lambda number: Process(module, threads, files, setup(number), mark)


def check_ready(said: Mapping[str, Any], mark: str) -> None:
    """Raises FedSieveError where what a worker says of its setup is not that it has the model."""
    try:
        refuse_failed(said, "a worker")
    except FedSieveError as error:
        raise FedSieveError(f"a worker cannot begin: {error}") from error
    if said.get("mark") != mark:
        raise FedSieveError(
            "a worker has another model than this process (other weights, another configuration, "
            "or other versions of the libraries): make both the same"
        )


def serve(descriptor: int, answer: Callable[[bytes], bytes]) -> None:
    """Be a worker: answer what comes over a socket until its other end is closed."""
    connection = socket.socket(fileno=descriptor)
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def listen() -> None:
        with suppress(OSError, EOFError, WireError):
            while True:
                requests.put(pack(read(lambda count: _exactly(connection, count))))
        os._exit(0)  # whoever asked is gone: nobody waits for what is being trained

    threading.Thread(target=listen, daemon=True).start()
    while True:
        connection.sendall(answer(requests.get()))


def nameless(write: Callable[[Path], None]) -> int:
    """The descriptor of a file that `write` wrote, and that is gone once all have closed it."""
    with tempfile.TemporaryDirectory(prefix="fedsieve-") as folder:
        path = Path(folder) / "file"
        write(path)
        return os.open(path, os.O_RDONLY)


def path_of(descriptor: int) -> Path:
    """Where a file without a name can be opened in a process that has its descriptor."""
    return Path(f"/dev/fd/{descriptor}")


def _exactly(connection: socket.socket, count: int) -> bytes:
    parts: list[bytes] = []  # as they come: a length is only a promise
    while count:
        part = connection.recv(min(count, _AT_ONCE))
        if not part:
            raise EOFError
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _has_file(stream: object) -> bool:
    try:
        return stream.fileno() >= 0  # type: ignore[attr-defined, no-any-return]
    except (AttributeError, OSError, ValueError):
        return False
