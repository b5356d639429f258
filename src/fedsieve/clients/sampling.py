"""Who takes part in a round, and whose update comes too late.

Every draw is named by the round's key, and those about one client by its id too: who is drawn
depends on the set of clients and on nothing else.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from operator import itemgetter

import torch

from fedsieve.algebra.budget import Client
from fedsieve.algebra.keys import Key, generator, words
from fedsieve.errors import FedSieveError, nearest
from fedsieve.settings import Sampling


def check(sampling: Sampling, clients: Sequence[Client]) -> None:
    """Raises FedSieveError, naming the client, if these clients cannot be sampled so.

    Over-selection needs every client's link and seconds a step, an availability a known client.
    """
    known = {client.id for client in clients}
    for id in unknown_to(sampling, known):
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


def unknown_to(sampling: Sampling, known: Collection[str]) -> list[str]:
    """Whom an availability names that is none of these clients, in order."""
    named = sampling.availability
    return sorted(set(named).difference(known)) if isinstance(named, Mapping) else []


def cohort(clients: Sequence[Client], sampling: Sampling, key: Key) -> list[Client]:
    """The clients that are asked to take part, in order of id; there may be none.

    The draw depends on the key and on the set of ids alone, not on the order of `clients`.
    """
    return cohort_of(in_order(clients), sampling, key)


def in_order(clients: Iterable[Client]) -> list[Client]:
    """The clients in order of id, as `cohort_of` has them: sorted once and not in every round."""
    return sorted(clients, key=itemgetter(0))


def cohort_of(ordered: Sequence[Client], sampling: Sampling, key: Key) -> list[Client]:
    """`cohort` of clients that are in order of id already."""
    if sampling.kind == "all":
        return list(_there(ordered, sampling, key))
    if sampling.kind == "poisson":
        # Of all clients, not of those who are there: nobody's chance depends on the others. So who
        # is drawn can be asked first, and only of those few whether they are there.
        rate = sampling.probability(len(ordered))
        return list(_there(_happening(ordered, rate, key.at("poisson")), sampling, key))
    there = _there(ordered, sampling, key)
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
    counted, ordered = 0, in_order(clients)

    def drawn(rounds: int) -> Mapping[str, int]:
        nonlocal counted
        if rounds < counted:
            counts.clear()
            counted = 0
        while counted < rounds:
            counted += 1
            counts.update(client.id for client in cohort_of(ordered, sampling, Key(seed, counted)))
        return counts

    return drawn


def _there(clients: Sequence[Client], sampling: Sampling, key: Key) -> Sequence[Client]:
    """Those who are there in this round: a draw for each client that may be away, and no other."""
    key = key.at("available")
    if not isinstance(sampling.availability, Mapping):
        return _happening(clients, sampling.availability, key)
    rates = sampling.availability
    rare = [client for client in clients if client.id in rates]
    drawn = zip(rare, words(key, (client.id for client in rare)), strict=True)
    away = {client.id for client, own in drawn if not _happens(rates[client.id], own)}
    return [client for client in clients if client.id not in away] if away else clients


def _happening(clients: Sequence[Client], probability: float, key: Key) -> Sequence[Client]:
    """The clients whose own draw says yes."""
    if probability >= 1:
        return clients
    drawn = zip(clients, words(key, (client.id for client in clients)), strict=True)
    limit = int(probability * 2**64)
    return [client for client, own in drawn if own < limit]


def _happens(probability: float, drawn: int) -> bool:
    # In whole numbers: at probability 1 it always does.
    return probability >= 1 or drawn < int(probability * 2**64)
