"""Who takes part in a round, and whose update comes too late.

Every draw is named by the round's key, and those about one client by its id too: who is drawn
depends on the set of clients and on nothing else.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch

from fedsieve.algebra.budget import Client
from fedsieve.algebra.keys import Key, generator, word
from fedsieve.errors import FedSieveError, nearest
from fedsieve.settings import Sampling


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


def counting(
    clients: Sequence[Client], sampling: Sampling, seed: int
) -> Callable[[int], Mapping[str, int]]:
    """A function from a number of rounds to how often each client was drawn in them, by id.

    It draws again what the rounds drew, so nothing of it has to be kept. Clients that were never
    drawn are left out; asked with rising numbers, it draws each round once.
    """
    counts: Counter[str] = Counter()
    counted = 0

    def drawn(rounds: int) -> Mapping[str, int]:
        nonlocal counted
        if rounds < counted:
            counts.clear()
            counted = 0
        while counted < rounds:
            counted += 1
            counts.update(client.id for client in cohort(clients, sampling, Key(seed, counted)))
        return counts

    return drawn


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


def _happens(probability: float, key: Key) -> bool:
    # In whole numbers: at probability 1 it always does.
    return probability >= 1 or word(key) < int(probability * 2**64)
