"""Which rows belong to which client.

A partition gives each client's row numbers, ascending; ids are sorted, and every row belongs to
exactly one client. It is held as one array of row numbers, client after client, and where each
client's begin: a hundred thousand clients are three objects and not a hundred thousand arrays.

The laws of `iid`, `dirichlet` and `natural` are those of flwr-datasets' partitioners, so that a
split here is the split that Flower users know (the tests compare natural clients, number by
number). The library itself makes a data set of each client, which takes milliseconds for each; here
the draws only fill an array.

Two laws share Dirichlet's name in the literature. `dirichlet` divides each class over the clients,
so that clients differ in size as well as in labels; `dirichlet_by_client` draws a mixture of labels
for each client, and all are of one size. A client of the first may be left without rows: with a
small alpha that is what the law says. It keeps its id and an empty index, and the engine skips and
counts it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedsieve.data.names import name_of, numbered
from fedsieve.errors import FedSieveError

Rows = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Partition(Mapping[str, Rows]):
    """Client id -> its row numbers, a view of `rows`.

    ids:     sorted
    rows:    (n,) int64, those of the first client, of the second, ...
    offsets: (clients + 1,) int64: client i has rows[offsets[i]:offsets[i + 1]]
    """

    ids: Sequence[str]
    rows: Rows
    offsets: Rows

    @cached_property
    def _places(self) -> dict[str, int]:
        return {id: place for place, id in enumerate(self.ids)}

    def __getitem__(self, id: str) -> Rows:
        place = self._places[id]
        return self.rows[self.offsets[place] : self.offsets[place + 1]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def counts(self) -> dict[str, int]:
        """How many rows each client has, by id."""
        return dict(zip(self.ids, np.diff(self.offsets).tolist(), strict=True))

    def beside(self, others: Iterable[str]) -> "Partition":
        """The same with clients that have no rows; those who have some keep them."""
        more = sorted(set(others) - self._places.keys())
        if not more:
            return self
        ids = sorted([*self.ids, *more])
        counts = self.counts
        return Partition(ids, self.rows, _offsets(np.array([counts.get(id, 0) for id in ids])))


# Outside of these numpy's sampler over- or underflows; either end looks the same well before.
ALPHAS = (1e-6, 1e9)


def iid(rows: int, clients: int, seed: int) -> Partition:
    """Rows 0..rows-1 shuffled and cut into parts whose sizes differ by at most one.

    Raises FedSieveError when clients < 1 or clients > rows.
    """
    _check_clients(clients, rows)
    owner = np.empty(rows, dtype=np.int64)
    sizes = np.full(clients, rows // clients)
    sizes[: rows % clients] += 1
    owner[np.random.default_rng(seed).permutation(rows)] = np.repeat(np.arange(clients), sizes)
    return _by_owner(numbered(clients), owner)


def dirichlet(labels: ArrayLike, clients: int, alpha: float, seed: int) -> Partition:
    """Each class's rows divided over the clients by proportions drawn from Dirichlet(alpha).

    labels: (rows,) of any type that can be sorted. A small alpha gives clients of few classes and
    of very unequal sizes, a large one gives each client the mixture of the whole (Hsu et al. 2019,
    arXiv:1909.06335; the division class by class is that of Yurochkin et al. 2019,
    arXiv:1905.12022).

    Raises FedSieveError when alpha <= 0 (or is no usable number), clients < 1 or clients > rows.
    """
    _, codes = np.unique(np.asarray(labels), return_inverse=True)
    _check_clients(clients, len(codes))
    _check_alpha(alpha)
    # No least size of a client is asked for, and none is filled up to the average: with alpha 0.1
    # and hundreds of clients the first never succeeds, and the second is no Dirichlet split.
    draws, weights = np.random.default_rng(seed), np.full(clients, float(alpha))
    owner = np.empty(len(codes), dtype=np.int64)
    for members in np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes))[:-1]):
        ends = (np.cumsum(draws.dirichlet(weights)) * len(members)).astype(np.int64)[:-1]
        # Whose share begins at or before a place and ends after it.
        owner[members] = np.searchsorted(ends, np.arange(len(members)), side="right")
    return _by_owner(numbered(clients), owner)


def dirichlet_by_client(labels: ArrayLike, clients: int, alpha: float, seed: int) -> Partition:
    """Clients whose sizes differ by at most one, each with labels drawn by a mixture of its own.

    labels: (rows,) of any type that can be sorted. A client's mixture is drawn from a Dirichlet of
    `alpha` for each class; its rows' labels are drawn by it, one by one and without replacement,
    and where a class has run out, by what is left of the mixture (Hsu et al. 2019,
    arXiv:1909.06335). So the last clients get the rows that the others left: with a small alpha
    they have more classes than the first. Who is last is drawn.

    Raises FedSieveError when alpha <= 0 (or is no usable number), clients < 1 or clients > rows.
    """
    _, codes = np.unique(np.asarray(labels), return_inverse=True)
    _check_clients(clients, len(codes))
    _check_alpha(alpha)
    draws = np.random.default_rng(seed)
    order = draws.permutation(len(codes))
    order = order[np.argsort(codes[order], kind="stable")]  # class after class, each shuffled
    left = np.bincount(codes)  # of each class, rows that are nobody's yet: the last ones
    ends = np.cumsum(left)
    owner = np.empty(len(codes), dtype=np.int64)
    for place in draws.permutation(clients):
        size = len(codes) // clients + int(place < len(codes) % clients)
        taken = _of_each_class(_log_mixture(len(left), alpha, draws), left, size, draws)
        for begin, number in zip((ends - left)[taken > 0], taken[taken > 0], strict=True):
            owner[order[begin : begin + number]] = place
        left = left - taken
    return _by_owner(numbered(clients), owner)


def _log_mixture(classes: int, alpha: float, draws: np.random.Generator) -> NDArray[np.float64]:
    """The logarithms of a draw from Dirichlet(alpha), but for a constant.

    A Dirichlet's shares are independent gammas, scaled; what is left of them when classes run out
    is a Dirichlet still. In logarithms, since with a small alpha all but one share would be 0.
    """
    gammas = np.log(draws.gamma(alpha + 1, size=classes))
    return np.asarray(gammas + np.log1p(-draws.random(classes)) / alpha)


def _of_each_class(
    mixture: NDArray[np.float64], left: Rows, size: int, draws: np.random.Generator
) -> Rows:
    """How many rows of each class a client of this mixture draws, where `left` are there."""
    taken = np.zeros_like(left)
    # What falls on a class that has run out is drawn again among the others: one more pass for
    # each class that does, as if rows were drawn one by one.
    while missing := size - int(taken.sum()):
        shares = np.where(taken < left, mixture, -np.inf)
        shares = np.exp(shares - shares.max())
        more = draws.multinomial(missing, shares / shares.sum())
        taken = np.minimum(taken + more, left)
    return taken


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
    ids = sorted(set(names))
    places = {id: place for place, id in enumerate(ids)}
    return _by_owner(ids, np.array([places[name] for name in names]))


def _by_owner(ids: Sequence[str], owner: Rows) -> Partition:
    """owner: (n,), the place in `ids` of the client that each row belongs to."""
    # A stable sort keeps the rows of each client ascending.
    rows = np.argsort(owner, kind="stable")
    return Partition(ids, rows, _offsets(np.bincount(owner, minlength=len(ids))))


def _offsets(counts: Rows) -> Rows:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)])


def _check_alpha(alpha: float) -> None:
    low, high = ALPHAS
    if not low <= alpha <= high:
        raise FedSieveError(
            f"alpha is {alpha}: a positive number is needed, from {low:g} (a class goes to one "
            f"client) to {high:g} (all clients alike)"
        )


def _check_clients(clients: int, rows: int) -> None:
    if clients < 1:
        raise FedSieveError(f"clients is {clients}: at least one is needed")
    if clients > rows:
        raise FedSieveError(
            f"clients is {clients}, but there are only {rows} rows: "
            "each client needs one row on average"
        )
