"""The socket between a site's worker and whoever carries its bytes.

A site's base model, data and memory live in one resident process (`engine/resident.py`); what
stands at the network, Flower's client process say, is started anew for every message and only
carries bytes to that process over a Unix socket. So this module imports no torch: `carry` is all
that such a process needs.

A request or an answer is a frame (frame.py), and one connection carries one request and its answer.

An answer's header also holds a tag that ties it to the request that it answers (`seal`), and so to
its run, its round, its site and the very bytes that were sent: an answer to another request that is
called this one's is refused, whatever it says.

The socket and its folder are the owner's alone, and what comes in is read as if it came from an
enemy all the same: numbers, sizes and times have limits (intake.py), and whatever is wrong with a
request is answered with `{"ok": false, "error": ...}` and never stops the worker.

Requests are worked on one at a time, in the main thread, in the order in which they came; other
threads only read and write. Those that ask about the worker itself are answered at once, also while
it trains.
"""

import hashlib
import json
import math
import os
import queue
import re
import shlex
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import filelock

from fedsieve.disk import refuse_link
from fedsieve.errors import FedSieveError, WireError, reason
from fedsieve.frame import BODY as BODY  # users of this module find them here
from fedsieve.frame import HEADER as HEADER
from fedsieve.frame import Frame as Frame
from fedsieve.frame import pack as pack
from fedsieve.frame import read, read_head, refusal
from fedsieve.frame import unpack as unpack
from fedsieve.sites.intake import BUFFER, Ended, Intake, seconds_for, take

# In a folder of its own: a node that is locked up gets this folder and nothing else of the site.
SOCKET = "door/worker.sock"
_LOCK = ".lock"
THREADS = 256  # connections that are read, answered or drained at once; others wait outside
JOBS = 16  # requests whose answer is not taken yet; more are put off
TAG = "tag"
# From the root, from the home folder, or from Windows' drives, to the next space, quote or colon.
_PATH = re.compile(r"(?:(?<![\w.>/])~?/|\b[A-Za-z]:\\)[^\s'\"`:,;)]*[\w/\\]")
_ADDRESS = 107  # bytes of a Unix socket's address on Linux


Job = tuple[Frame, "queue.SimpleQueue[Frame]"]


def digest(frame: Frame) -> bytes:
    """Of all that a frame says, its tag left out."""
    said = {name: value for name, value in frame.header.items() if name != TAG}
    head = json.dumps(said, sort_keys=True).encode()
    found = hashlib.blake2b(len(head).to_bytes(8, "big") + head, digest_size=32)
    found.update(frame.body)  # not joined: it may be as long as the model
    return found.digest()


def seal(request: bytes, answer: Frame) -> Frame:
    """An answer with its tag. request: the digest of what it answers."""
    tag = hashlib.blake2b(digest(answer), key=request, digest_size=16).hexdigest()
    return answer._replace(header={**answer.header, TAG: tag})


def check_seal(request: bytes, answer: Frame) -> None:
    """Raises WireError for an answer that answers another request, or none."""
    if answer.header.get(TAG) != seal(request, answer).header[TAG]:
        raise WireError("an answer to another request than this one")


def without_paths(text: str, *known: object) -> str:
    """A text for the server: paths that are known, and what looks like one, are left out of it."""
    for path in sorted({str(each) for each in known if each}, key=len, reverse=True):
        text = text.replace(path, "<a path of the site>")
    return _PATH.sub("<a path of the site>", text)


def ask(address: Path, request: Frame, timeout: float | None = None) -> Frame:
    """Ask the worker that listens at `address` (`<folder of the site>/door/worker.sock`), and wait.

    timeout: seconds for all of it; None waits as long as the worker trains
    Raises FedSieveError if no worker listens there, if it ends before it answers, or if it takes
    longer than the timeout; WireError if its answer is no frame.
    """
    return unpack(carry(address, pack(request), timeout))


def carry(address: Path, request: bytes, timeout: float | None = None) -> bytes:
    """`ask` for one who only carries: a packed request to the worker, its packed answer back."""
    until = None if timeout is None else time.monotonic() + timeout
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout)
            _connect(connection, _address(address), until)
            with suppress(BrokenPipeError):  # the worker says why, if it did not like the beginning
                connection.sendall(request)
            left = math.inf if until is None else until - time.monotonic()
            return pack(read(lambda count: take(connection, count, left)))
    except TimeoutError:
        raise FedSieveError(f"the worker at {address} did not answer in {timeout:g} s") from None
    except (FileNotFoundError, ConnectionRefusedError):
        raise FedSieveError(
            f"no worker listens at {address}: start `fedsieve worker site.toml`"
        ) from None
    except (ConnectionError, PermissionError, Ended) as error:
        why = reason(error)
        raise FedSieveError(f"the worker at {address} gave no answer: {why}") from error


def _connect(connection: socket.socket, address: str, until: float | None) -> None:
    while True:
        try:
            connection.connect(address)
            return
        except BlockingIOError:  # too many wait to be let in, and a timeout is set
            if until is None or time.monotonic() > until:
                raise TimeoutError from None
            time.sleep(0.05)


def lock(folder: Path) -> AbstractContextManager[object]:
    """Keep other workers out of a site's folder, which is made if need be, for its owner alone.

    Raises FedSieveError if another worker has it, or if the folder is open to others than its
    owner: what a worker keeps there was computed from the site's data.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = folder.stat()
        if facts.st_uid != os.geteuid():
            raise FedSieveError(f"{folder} belongs to another user: choose another folder")
        if stat.S_IMODE(facts.st_mode) & 0o077:
            alone = facts.st_mode & stat.S_ISVTX == 0  # a folder of everybody's, as /tmp, is not
            raise FedSieveError(
                f"{folder} is open to other users than its owner: "
                + f"`chmod 700 {shlex.quote(str(folder))}`, or " * alone
                + "choose another folder"
            )
        refuse_link(folder / _LOCK)  # it would be opened to be written
        return filelock.FileLock(folder / _LOCK, mode=0o600).acquire(timeout=0)
    except filelock.Timeout:
        raise FedSieveError(f"another worker is running on {folder}: stop that one first") from None
    except OSError as error:
        raise FedSieveError(f"{folder} cannot be written: {error.strerror}") from error


def serve(
    folder: Path,
    work: Callable[[Frame], Frame],
    about: Callable[[Frame], Frame | None],
    ready: Callable[[Path], None] = lambda address: None,
    most: Callable[[Mapping[str, Any]], int | Frame] = lambda header: BODY,
) -> None:
    """Answer requests at `<folder>/door/worker.sock` until the process is interrupted.

    folder: locked by the caller
    work:   does what a request asks; called in this thread, for one request at a time
    about:  the answer to a request that needs no work, or None; called in other threads
    ready:  called with the socket's path once it takes requests
    most:   a request's header -> the longest body that it can have, or the answer to a request
        whose body is not wanted; called in other threads
    Neither function may raise. Raises FedSieveError if the socket cannot be made, or is there no
    more: a worker that nobody can reach must not go on as if it were one.
    """
    jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
    with _listening(folder / SOCKET) as (listener, made):
        threading.Thread(target=_accept, args=(listener, about, jobs, most), daemon=True).start()
        ready(folder / SOCKET)
        while True:
            try:
                # Not for ever: a signal that arrives just before the wait does not end it.
                request, answer = jobs.get(timeout=1.0)
            except queue.Empty:
                if _lies(folder / SOCKET, made):
                    continue
                raise FedSieveError(
                    f"{folder / SOCKET} was removed, or is another worker's now: nobody can reach "
                    "this one any more. Start it again"
                ) from None
            answer.put(work(request))


def _lies(path: Path, made: os.stat_result) -> bool:
    """Whether a file is still the one that was made there; where nobody can tell, it is."""
    try:
        return os.path.samestat(path.lstat(), made)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True


@contextmanager
def _listening(path: Path) -> Iterator[tuple[socket.socket, os.stat_result]]:
    """The socket, and the file that it is."""
    address = _address(path)
    refuse_link(path.parent, folder=True)
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise FedSieveError(f"{path.parent} cannot be made: {error.strerror}") from error
    before = os.umask(0o177)  # the socket is the owner's alone from its first moment on
    try:
        # What lies there was left by a worker that was killed: the folder is locked.
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(address)
        listener.listen(128)
        made = path.lstat()
    except OSError as error:
        raise FedSieveError(f"{path} cannot be listened at: {error.strerror or error}") from error
    finally:
        os.umask(before)
    try:
        yield listener, made
    finally:
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        listener.close()
        if _lies(path, made):
            path.unlink(missing_ok=True)


def _address(path: Path) -> str:
    """The path as a socket's address: relative to the working directory where that is shorter."""
    short = min(str(path), os.path.relpath(path), key=lambda text: len(os.fsencode(text)))
    if len(os.fsencode(short)) > _ADDRESS:
        raise FedSieveError(
            f"{path} is too long for a socket (at most {_ADDRESS} bytes): choose a `folder` with a "
            "shorter path in site.toml"
        )
    return short


def _accept(
    listener: socket.socket,
    about: Callable[[Frame], Frame | None],
    jobs: "queue.SimpleQueue[Job]",
    most: Callable[[Mapping[str, Any]], int | Frame],
) -> None:
    intake, room = Intake(), threading.BoundedSemaphore(JOBS)
    threads = threading.BoundedSemaphore(THREADS)

    def answer_to(request: Frame, held: ExitStack) -> Frame:
        answer = about(request)
        if answer is None and not room.acquire(blocking=False):
            answer = refusal(f"{JOBS} requests wait already: ask again later")
        if answer is None:
            held.callback(room.release)  # not before its answer was taken, which may be long
            done: queue.SimpleQueue[Frame] = queue.SimpleQueue()
            jobs.put((request, done))
            answer = done.get()
        return answer

    def converse(connection: socket.socket) -> None:
        # A connection that breaks off is nobody's error here: who asked will ask again.
        with connection, suppress(OSError), ExitStack() as held:
            try:
                with intake.reading(connection):
                    header, length = read_head(lambda count: take(connection, count))
                    limit = most(header)
                    if isinstance(limit, Frame):
                        _send(connection, limit)
                        _drain(connection)
                        return
                    if length > limit:
                        raise WireError(f"a body of {length} bytes: at most {limit} for this")
                    held.enter_context(intake.holding(connection, length))
                    request = Frame(header, take(connection, length))
            except (WireError, Ended, TimeoutError) as error:
                _send(connection, refusal(f"this is no request: {error}"))
                _drain(connection)
                return
            _send(connection, answer_to(request, held))

    def end(connection: socket.socket) -> None:
        try:
            converse(connection)
        finally:
            threads.release()

    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            if listener.fileno() < 0:
                return  # closed: the worker ends
            time.sleep(0.1)  # out of descriptors, say: they come back
            continue
        # For seconds: all but those that wait for an answer, which are few, are through by then.
        threads.acquire()
        try:
            threading.Thread(target=end, args=(connection,), daemon=True).start()
        except (RuntimeError, MemoryError):  # no more threads for now: they come back
            threads.release()
            connection.close()
            time.sleep(0.1)


def _send(connection: socket.socket, answer: Frame) -> None:
    packed = pack(answer)
    connection.settimeout(seconds_for(len(packed)))
    connection.sendall(packed)


def _drain(connection: socket.socket) -> None:
    """Read for a second what is still to come: closed before, a socket takes its answer with it."""
    connection.shutdown(socket.SHUT_WR)
    until = time.monotonic() + 1
    while (left := until - time.monotonic()) > 0:
        connection.settimeout(left)
        if not connection.recv(BUFFER):
            return
