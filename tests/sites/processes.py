"""Flower's real processes for tests: on 127.0.0.1 only, on free ports, ended by their pid.

Every process has a home of its own in the test's folder, runs in a session of its own, and is ended
with all that it started.
"""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from fedsieve.sites import federate
from fedsieve.sites.here import descendants, free_port

BIN = Path(sys.executable).parent


def surroundings(home: Path) -> dict[str, str]:
    """The environment of a process: quiet, offline, with a home of its own."""
    home.mkdir(parents=True, exist_ok=True)
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    own = {"PATH": path, "HOME": str(home), "FLWR_HOME": str(home), "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **federate.environment(home), **own}


@contextmanager
def running(
    command: Sequence[str | Path], home: Path, log: Path
) -> Iterator["subprocess.Popen[bytes]"]:
    """A process whose output goes to a file, ended at last with all that it started."""
    with log.open("ab") as out:
        process = subprocess.Popen(
            [str(word) for word in command],
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=surroundings(home),
            cwd=home,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        end(process)


def end(process: "subprocess.Popen[bytes]", number: int = signal.SIGTERM) -> None:
    """A signal to the process and its children; SIGKILL to what is left after 5 seconds."""
    children = descendants(process.pid)
    for each in (number, signal.SIGKILL):
        for pid in (process.pid, *children):
            with suppress(ProcessLookupError):
                os.kill(pid, each)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
    process.wait(timeout=30)


def wait_for_port(port: int, process: "subprocess.Popen[bytes]", seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        assert process.poll() is None, "the process has ended"
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.1)
    raise AssertionError(f"nothing listens at port {port} after {seconds:g} s")


@contextmanager
def superlink(
    folder: Path, listen: federate.ServerAddress, log: Path
) -> Iterator["subprocess.Popen[bytes]"]:
    """Flower's server, started as `fedsieve federate` says."""
    words = shlex.split(federate.commands(folder, listen)[0])
    command = words[words.index("flower-superlink") :]
    with running([BIN / command[0], *command[1:]], folder / federate.HOME, log) as process:
        wait_for_port(listen.port, process)
        yield process


@contextmanager
def supernode(
    home: Path, listen: federate.ServerAddress, socket: Path, log: Path, trust: Sequence[str | Path]
) -> Iterator["subprocess.Popen[bytes]"]:
    """A site's node, whose own port is free too."""
    command = [
        BIN / "flower-supernode", "--superlink", f"{listen.host}:{listen.port}", *trust,
        "--port", str(free_port()), "--node-config", f'socket="{socket}"',
    ]  # fmt: skip
    with running(command, home, log) as process:
        yield process


def flwr(folder: Path, *words: str | Path, seconds: float = 240.0) -> str:
    """Flower's command line, as the server's owner; what it says. Raises if it fails."""
    done = subprocess.run(
        [str(BIN / "flwr"), *map(str, words)],
        env=surroundings(folder / federate.HOME),
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
