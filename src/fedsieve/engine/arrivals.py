"""The updates of a round between their arrival and the server's new state.

Each is checked once, against what was asked of its client, before any is merged (`check`). Then
they wait, encoded, in a file without a name, and are decoded again as a merge asks for them, so
that one client's update is in memory at a time; for two things need all of them to be there:

    what is too large is told by the norms of the whole cohort           (`outliers`)
    a merge that fails is done again without the update it failed over   (`merge`)

So nothing that one client sends, and that can be decoded at all, ends a round for the others.
"""

import io
import math
import statistics
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, NamedTuple

import torch

from fedsieve.algebra.adapter import Layout
from fedsieve.algebra.budget import Client
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import Method, State
from fedsieve.algebra.payload import LARGEST, Payload, exact, magnitude
from fedsieve.algebra.support import Support
from fedsieve.errors import (
    ChangedInPlace,
    NoUsableUpdate,
    OptimizerFailed,
    WireError,
    of_memory,
    with_type,
)
from fedsieve.wire import decode

# Of the updates that wait, so many bytes are held in memory before they go to the disk.
IN_MEMORY = 64 << 20


class Arrival(NamedTuple):
    """An update that waits. known: what its bytes leave unsaid; norm: L2, over all its numbers."""

    client: Client
    known: Support
    norm: float
    start: int
    size: int


class Waiting:
    """The updates of one round."""

    def __init__(self, layout: Layout, file: IO[bytes]) -> None:
        self._layout, self._file = layout, file
        self._arrivals: dict[str, Arrival] = {}

    def add(self, client: Client, update: bytes, payload: Payload, sent: Support) -> float:
        """Keep an update that was checked; its norm. payload: what its bytes say."""
        # Masks that the bytes tell themselves are not held as well: they are as long as the model.
        masks = sent.masks if payload.masks_told == "known" else {}
        start = self._file.seek(0, io.SEEK_END)
        self._file.write(update)
        size = float(torch.linalg.vector_norm(exact(payload.values), dtype=torch.float64))
        known = sent._replace(masks=masks)
        self._arrivals[client.id] = Arrival(client, known, size, start, len(update))
        return size

    @property
    def norms(self) -> dict[str, float]:
        """Of each client's update, by id."""
        return {id: arrival.norm for id, arrival in self._arrivals.items()}

    def updates(self, ids: Iterable[str]) -> Iterator[tuple[Client, Payload]]:
        """The updates of these clients, in the order of `ids`."""
        for id in ids:
            client, known, _, start, size = self._arrivals[id]
            self._file.seek(start)
            yield client, decode(self._file.read(size), self._layout, known)


@contextmanager
def waiting_room(layout: Layout) -> Iterator[Waiting]:
    """An empty one, whose file is gone at the end."""
    with tempfile.SpooledTemporaryFile(max_size=IN_MEMORY) as file:
        yield Waiting(layout, file)


def check(
    method: Method, state: State, payload: Payload, sent: Support, client: Client, key: Key
) -> None:
    """Raises WireError for an update that no merge should see: not what was asked, or too large.

    No clip can bound numbers that overflow: scaled down to nothing, infinity is not zero.
    """
    wrong = method.misfit(payload, sent, client, key)
    if wrong is not None:
        raise WireError(wrong)
    dtypes = {tensor.dtype for tensor in state.trees["adapter"].values()}
    most = min([LARGEST, *(torch.finfo(dtype).max for dtype in dtypes)])
    if magnitude(exact(payload.values)) > most:
        raise WireError(f"it holds numbers beyond {most:.1e}, which no merge can use")


def outliers(norms: Mapping[str, float], bound: float) -> dict[str, str]:
    """The updates whose norm is more than `bound` times the cohort's median, and why they are left
    out. Of an even number the lower median counts: half of a cohort can be wrong.

    Updates that change nothing tell no median, and one update alone has none but its own. Of two,
    nothing tells which is wrong. The larger goes: a small one that is wrong costs a round, which is
    told, and a large one the adapter.
    """
    moving = [norm for norm in norms.values() if norm > 0]
    if not moving or bound == math.inf:
        return {}
    median = statistics.median_low(moving)
    of_two = ". Of two updates the larger is left out, whichever is wrong: see who sends so little"
    return {
        id: f"its update was refused: its norm, {norm:.3g}, is {norm / median:.3g} times the "
        f"cohort's median; server.norm_bound allows {bound:g}{of_two if len(moving) == 2 else ''}"
        for id, norm in norms.items()
        if norm > bound * median
    }


def merge(
    method: Method, state: State, waiting: Waiting, ids: Collection[str], key: Key
) -> tuple[State, dict[str, str]]:
    """The state after the updates of these clients, in this order, and why some of them are left
    out after all.

    Where the method fails over them, those go over which it fails alone, and the others are merged;
    if it fails over none alone, the largest goes.
    Raises NoUsableUpdate, or the method's own, if it fails over every one of them.
    """
    left = dict.fromkeys(ids)
    out: dict[str, str] = {}
    while True:
        try:
            return _finite(method.merge(state, waiting.updates(left.keys()), key)), out
        except Exception as error:
            if not left or _not_the_clients(error):
                raise
            alone = {id: _failure(method, state, waiting, id, key) for id in left}
            found = {id: why for id, why in alone.items() if why is not None}
            if len(found) == len(left):
                if isinstance(error, NoUsableUpdate):
                    raise
                shown = "; ".join(f"client {id}: {why}" for id, why in list(found.items())[:3])
                raise NoUsableUpdate(f"no update can be merged ({shown})") from error
            if not found:
                largest = max(left, key=waiting.norms.__getitem__)
                found = {largest: f"{with_type(error)} with it, and it is the largest"}
            for id, why in found.items():
                out[id] = f"its update was left out: the merge fails: {why}"
                del left[id]


def _failure(method: Method, state: State, waiting: Waiting, id: str, key: Key) -> str | None:
    """Why one client's update alone cannot be merged."""
    try:
        _finite(method.merge(state, waiting.updates([id]), key))
    except Exception as error:
        if _not_the_clients(error):
            raise
        return with_type(error)
    return None


def _not_the_clients(error: Exception) -> bool:
    """What is nobody's update: the machine's, or the user's."""
    return isinstance(error, OSError | OptimizerFailed | ChangedInPlace) or of_memory(error)


def _finite(state: State) -> State:
    """The state, if all its numbers are. Raises NoUsableUpdate if not."""
    for group, tree in state.trees.items():
        for name, tensor in tree.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise NoUsableUpdate(
                    f"after the merge, {group} {name} holds numbers that are not finite: "
                    "server.lr is too large for these updates (or the merge of a method of your "
                    "own gives that). server.clip bounds what one can do"
                )
    return state
