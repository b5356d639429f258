"""Which rows belong to which client.

A partition is a dict from client id to that client's row numbers, ascending; ids are sorted, and
every row belongs to exactly one client. The drawing is left to flwr-datasets' partitioners, so that
a split here is the split that Flower users know; this file gives them a column of row numbers to
divide and reads the numbers back. Natural clients need no drawing, only a grouping: numpy does it
in milliseconds, where the library's partitioner takes one for each client and shows a bar.

A client may be left without rows: with a small alpha that is what the Dirichlet law says. It keeps
its id and an empty index, and the engine skips and counts it.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from datasets import Dataset
from numpy.typing import ArrayLike, NDArray

from fedsieve.data.names import name_of, numbered
from fedsieve.errors import FedSieveError

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

Partition = dict[str, NDArray[np.int64]]

# Outside of these numpy's sampler over- or underflows; either end looks the same well before.
ALPHAS = (1e-6, 1e9)


def iid(rows: int, clients: int, seed: int) -> Partition:
    """Rows 0..rows-1 shuffled and cut into parts whose sizes differ by at most one.

    Raises FedSieveError when clients < 1 or clients > rows.
    """
    from flwr_datasets.partitioner import IidPartitioner  # seconds: it imports its own plots

    _check_clients(clients, rows)
    # IidPartitioner cuts the rows in the order that it finds them, so the shuffle is ours.
    shuffled = np.random.default_rng(seed).permutation(rows)
    return _read(IidPartitioner(clients), {"row": shuffled}, numbered(clients))


def dirichlet(labels: ArrayLike, clients: int, alpha: float, seed: int) -> Partition:
    """Each class's rows divided over the clients by proportions drawn from Dirichlet(alpha).

    labels: (rows,) of any type that can be sorted. A small alpha gives clients of few classes and
    of very unequal sizes, a large one gives each client the mixture of the whole (Hsu et al. 2019,
    arXiv:1909.06335; the division class by class is that of Yurochkin et al. 2019,
    arXiv:1905.12022).

    Raises FedSieveError when alpha <= 0 (or is no usable number), clients < 1 or clients > rows.
    """
    from flwr_datasets.partitioner import DirichletPartitioner

    _, codes = np.unique(np.asarray(labels), return_inverse=True)
    _check_clients(clients, len(codes))
    low, high = ALPHAS
    if not low <= alpha <= high:
        raise FedSieveError(
            f"alpha is {alpha}: a positive number is needed, from {low:g} (a class goes to one "
            f"client) to {high:g} (all clients alike)"
        )
    partitioner = DirichletPartitioner(
        num_partitions=clients,
        partition_by="label",
        alpha=float(alpha),
        # Above zero it draws again until every client has so many rows, and gives up after ten
        # draws: with alpha 0.1 and hundreds of clients it never succeeds. Zero ends at once.
        min_partition_size=0,
        # Balancing stops filling clients of average size: that is no longer a Dirichlet split.
        self_balancing=False,
        shuffle=False,
        seed=seed,
    )
    return _read(partitioner, {"row": np.arange(len(codes)), "label": codes}, numbered(clients))


def natural(values: Sequence[object]) -> Partition:
    """One client for each distinct value of a column (an author, a hospital); its id is that value
    as a name (names.py).

    Raises FedSieveError when there are no rows, or a row has no name of a client.
    """
    names = []
    for row, value in enumerate(values):
        try:
            name = name_of(value)
        except FedSieveError as error:
            raise FedSieveError(f"row {row} of the column that names the clients {error}") from None
        if name is None:
            raise FedSieveError(
                f"row {row} has no client: the column that names the clients is empty there"
            )
        names.append(name)
    if not names:
        raise FedSieveError("no rows to give to clients")
    ids, codes = np.unique(names, return_inverse=True)
    # A stable sort keeps the rows of each client ascending.
    groups = np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes))[:-1])
    return {str(name): rows for name, rows in zip(ids, groups, strict=True)}


def _read(
    partitioner: "Partitioner", columns: dict[str, NDArray[np.int64]], ids: Sequence[str]
) -> Partition:
    """The row numbers that the partitioner gives to its partition 0, 1, ...; one for each id."""
    partitioner.dataset = Dataset.from_dict(columns).with_format("numpy")
    return {
        name: np.sort(np.asarray(partitioner.load_partition(number)["row"][:], dtype=np.int64))
        for number, name in enumerate(ids)
    }


def _check_clients(clients: int, rows: int) -> None:
    if clients < 1:
        raise FedSieveError(f"clients is {clients}: at least one is needed")
    if clients > rows:
        raise FedSieveError(
            f"clients is {clients}, but there are only {rows} rows: "
            "each client needs one row on average"
        )
