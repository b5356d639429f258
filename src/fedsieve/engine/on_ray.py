"""Workers that are actors of a Ray cluster, one a device, each with a model that stays.

They take the same frames as the workers of pool.py, as bytes, and are placed, watched and replaced
by the same `Spread`. What they need to begin (rows, and the model's folder where a node does not
see it) goes through Ray's object store, which holds it once a node.

Ray's own words between processes are Ray's; what we put in them is bytes and names.
"""

import importlib
import os
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from fedsieve.engine.pool import check_ready
from fedsieve.engine.spread import Gone
from fedsieve.errors import FedSieveError, words
from fedsieve.frame import unpack

SECONDS = 10.0  # in which a cluster must answer
PLACE = 60.0  # and in which it must have room for a worker, and the worker begin
AT_ONCE = 256 << 20  # bytes of a file that are one object of the store


class Actor:
    """What stands at the node: a module's `ready`, which takes the setup, and what it gives."""

    def __init__(self, module: str) -> None:
        self._ready = importlib.import_module(module).ready_in
        self._folder = tempfile.TemporaryDirectory(prefix="fedsieve-")
        self._answer: Any = None

    def put(self, name: str, part: Any) -> None:
        """Append to a file of this worker's own; part: bytes as an array."""
        path = Path(self._folder.name) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(memoryview(part))

    def begin(self, setup: bytes) -> bytes:
        """Be ready for requests; what the setup calls by a relative path was put here."""
        self._answer, said = self._ready(setup, Path(self._folder.name))
        return bytes(said)

    def sees(self, path: str, sizes: Mapping[str, int]) -> bool:
        """Whether a folder with such files is at this node."""
        with suppress(OSError):
            return all((Path(path) / name).stat().st_size == n for name, n in sizes.items())
        return False

    def ask(self, request: bytes) -> bytes:
        """See `spread.Worker`."""
        return bytes(self._answer(request))


def imported() -> Any:
    """Ray. Raises FedSieveError if it is not there."""
    try:
        import ray
    except ImportError as error:
        raise FedSieveError(
            "engine.kind 'ray' needs Ray, the same at all nodes: pip install 'fedsieve[ray]'"
        ) from error
    return ray


def check(address: str | None) -> None:
    """Raises FedSieveError if Ray is missing, or if nothing listens where the cluster should be."""
    imported()
    found = address or os.environ.get("RAY_ADDRESS")
    host, _, port = (found or "").rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        return  # "auto", or a name: Ray itself finds it, or says that it does not
    try:
        socket.create_connection((host, int(port)), SECONDS).close()
    except OSError as error:
        raise FedSieveError(
            f"engine.address: no Ray cluster answers at {found} ({error}): start one with "
            "`ray start --head`"
        ) from error


@contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """Ray, connected to a cluster that is there; one that was connected already stays so.

    Raises FedSieveError if none answers.
    """
    ray = imported()
    if ray.is_initialized():
        yield ray
        return
    check(address)
    try:
        # What is printed at the nodes is theirs: workers print nothing.
        ray.init(address or "auto", log_to_driver=False, configure_logging=False)
    except Exception as error:  # whatever Ray raises: it may not be allowed in, too
        why = words(error)
        raise FedSieveError(f"engine.address: no Ray cluster can be joined: {why}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


class OnRay:
    """A worker that is an actor. Raises nothing where there is no place yet: `begin` does.

    files: name -> the parts of a file that it gets; model: a folder, and the names of what is in it
           in `files`, for nodes that do not see it; None where the model is called by a name
    """

    def __init__(
        self,
        ray: Any,
        number: int,
        module: str,
        setups: tuple[bytes, bytes],
        mark: str,
        files: Mapping[str, list[Any]],
        model: tuple[str, Mapping[str, int]] | None,
        *,
        gpu: bool,
        threads: int,
    ) -> None:
        self._ray, self._setups, self._mark = ray, setups, mark
        self._files, self._model = files, model
        self.name = f"the Ray worker {number}"
        kind = ray.remote(num_cpus=threads, num_gpus=1 if gpu else 0, max_restarts=0)(Actor)
        self._actor = kind.remote(module)

    def begin(self) -> None:
        """See `spread.Worker`."""
        there, carried = self._setups
        sees = True
        if self._model is not None:
            path, sizes = self._model
            sees = self._get(self._actor.sees.remote(path, dict(sizes)), PLACE)
        for name, parts in self._files.items():
            if sees and name.startswith("model/"):
                continue
            for part in parts:
                self._get(self._actor.put.remote(name, part))
        said = self._get(self._actor.begin.remote(there if sees else carried))
        check_ready(unpack(said).header, self._mark)

    def ask(self, request: bytes) -> bytes:
        """See `spread.Worker`."""
        return bytes(self._get(self._actor.ask.remote(request)))

    def end(self) -> None:
        """See `spread.Worker`."""
        with suppress(Exception):  # of a cluster that is gone
            self._ray.kill(self._actor)

    def _get(self, reference: Any, seconds: float | None = None) -> Any:
        try:
            return self._ray.get(reference, timeout=seconds)
        except self._ray.exceptions.GetTimeoutError as error:
            raise Gone(f"found no room on the cluster in {PLACE:g} s") from error
        except self._ray.exceptions.RayTaskError:
            raise  # a fault of ours: its own traceback says which
        except self._ray.exceptions.RayError as error:
            why = str(error).strip().splitlines()
            raise Gone(f"ended ({why[0][:200] if why else type(error).__name__})") from error


def stored(ray: Any, path: Path) -> list[Any]:
    """A file in Ray's object store, in parts."""
    size = path.stat().st_size
    ends = range(0, size, AT_ONCE) or [0]
    return [
        ray.put(np.fromfile(path, dtype=np.uint8, count=min(AT_ONCE, size - at), offset=at))
        for at in ends
    ]


def room(ray: Any, *, gpu: bool, threads: int) -> int:
    """For how many workers the cluster has devices now."""
    found = ray.cluster_resources()
    return int(found.get("GPU", 0)) if gpu else int(found.get("CPU", 0)) // threads


def has_gpu(ray: Any) -> bool:
    """Whether any node has one."""
    return bool(ray.cluster_resources().get("GPU", 0) > 0)
