"""Who takes part in a round, and whose update comes too late.

Every draw is named by the round's key, and those about one client by its id too: who is drawn
depends on the set of clients and on nothing else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from fedsieve.algebra.budget import Client
from fedsieve.algebra.keys import Key, generator, word
from fedsieve.errors import FedSieveError, nearest

Kind = Literal["uniform", "poisson", "all"]


@dataclass(frozen=True)
class Sampling:
    """How a round's clients are drawn.

    kind: "uniform" takes `size` clients without replacement; "poisson" takes each of N clients by
        itself with probability min(1, size / N), so that a round may have more, fewer, or none;
        "all" takes every client, whatever `size` says
    size: clients a round, for "poisson" the expected number
    availability: the probability with which a client can be drawn at all in a round: one number, or
        one by id (clients that are not named are always there). Only those who are there are drawn
    extra:  so many clients more are asked, and only the `size` fastest updates are merged
    quorum: the fewest updates that a round needs; 0 leaves it to the method

    Raises FedSieveError for values that make no sense.
    """

    kind: Kind = "uniform"
    size: int = 1
    availability: float | Mapping[str, float] = 1.0
    extra: int = 0
    quorum: int = 0

    def __post_init__(self) -> None:
        for name, least in (("size", 1), ("extra", 0), ("quorum", 0)):
            if getattr(self, name) < least:
                raise FedSieveError(
                    f"sampling.{name} is {getattr(self, name)}; it must be at least {least}"
                )
        if self.extra and self.kind != "uniform":
            raise FedSieveError(
                "sampling.extra asks for more clients than the cohort's size, and sampling of "
                f"kind {self.kind!r} has no fixed size: use 'uniform', or leave extra out"
            )
        if self.kind == "uniform" and self.quorum > self.size:
            raise FedSieveError(
                f"sampling.quorum is {self.quorum}, but a round merges at most {self.size} "
                "updates: lower it or raise the cohort"
            )
        for share in _shares(self.availability):
            if not 0 < share <= 1:
                raise FedSieveError(
                    f"sampling.availability is {share}; it must be above 0 and at most 1"
                )

    @property
    def plain(self) -> bool:
        """Whether clients are drawn and kept by kind and size alone.

        An accountant of privacy can only count on it then: availability and over-selection change
        who is merged.
        """
        return self.extra == 0 and all(share == 1 for share in _shares(self.availability))

    def probability(self, clients: int) -> float:
        """The probability with which one of so many clients is in a round, if `plain`."""
        return 1.0 if self.kind == "all" else min(1.0, self.size / clients)


def check(sampling: Sampling, clients: Sequence[Client]) -> None:
    """Raises FedSieveError, naming the client, if these clients cannot be sampled so.

    Over-selection needs every client's link and seconds a step, an availability a known client.
    """
    if isinstance(sampling.availability, Mapping):
        known = {client.id for client in clients}
        for id in sorted(set(sampling.availability) - known):
            raise FedSieveError(
                f"sampling.availability names client {id!r}, which does not exist or has no data"
                + nearest(id, known)
            )
    if sampling.quorum > len(clients):
        raise FedSieveError(
            f"sampling.quorum is {sampling.quorum}, but there are only {len(clients)} clients"
        )
    for client in clients if sampling.extra else ():
        if client.link is None or client.step_seconds is None:
            raise FedSieveError(
                "sampling.extra: who is late follows from each client's link and seconds a step, "
                f"and client {client.id!r} has none: use budgets of kind 'resources', or leave "
                "extra out"
            )


def cohort(clients: Sequence[Client], sampling: Sampling, key: Key) -> list[Client]:
    """The clients that are asked to take part, in order of id; there may be none.

    The draw depends on the key and on the set of ids alone, not on the order of `clients`.
    """
    ordered = sorted(clients, key=lambda client: client.id)
    there = [
        client
        for client in ordered
        if _happens(_available(sampling, client), key._replace(client=client.id).at("available"))
    ]
    if sampling.kind == "all":
        return there
    if sampling.kind == "poisson":
        # Of all clients, not of those who are there: nobody's chance depends on the others.
        rate = sampling.probability(len(ordered))
        return [c for c in there if _happens(rate, key._replace(client=c.id).at("poisson"))]
    size = min(sampling.size + sampling.extra, len(there))
    chosen = torch.randperm(len(there), generator=generator(key.at("cohort")))[:size]
    return [there[i] for i in sorted(chosen.tolist())]


def late(seconds: Mapping[str, float], size: int) -> dict[str, str]:
    """Which updates come after the first `size` of them, and what to say about each.

    seconds: client id -> when its update was there, counted from the round's start. Of equal times
    the smaller id counts as earlier.
    """
    order = sorted(seconds, key=lambda id: (seconds[id], id))
    if len(order) <= size:
        return {}
    closed = seconds[order[size - 1]]
    return {
        id: f"late: its update took {seconds[id]:.4g} s, and the round had its {size} after "
        f"{closed:.4g} s"
        for id in order[size:]
    }


def _available(sampling: Sampling, client: Client) -> float:
    if isinstance(sampling.availability, Mapping):
        return sampling.availability.get(client.id, 1.0)
    return sampling.availability


def _shares(availability: float | Mapping[str, float]) -> list[float]:
    return list(availability.values()) if isinstance(availability, Mapping) else [availability]


def _happens(probability: float, key: Key) -> bool:
    # In whole numbers: at probability 1 it always does.
    return probability >= 1 or word(key) < int(probability * 2**64)
