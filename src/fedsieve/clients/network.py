"""Time on a network: what counted bytes and seconds of work cost on given links.

A simulation on one machine knows every byte that a round sends and how long its clients work, but
not how long the round would last where clients have lines of their own. This model adds just that:
each client fetches its message, works, and sends its reply, one after the other; clients do so side
by side; and the server goes on when it has the replies that it waits for. The server's own line
and work are free, so the model is about slow clients, as FLASC's Figure 3 is.

The model is a function of what a run wrote down, so one run can be looked at under many links
without training again. docs/network.md tells what it leaves out.
"""

import math
from collections.abc import Iterable, Mapping
from statistics import NormalDist
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from fedsieve.algebra.budget import Link
from fedsieve.errors import FedSieveError

if TYPE_CHECKING:
    from fedsieve.algebra.keys import Key

DOWNLINK = 10.0  # Mbit/s: the downlink of the reference links
_BITS = 8 / 1e6  # Mbit in a byte


class Part(NamedTuple):
    """One client's part in one round, as clients.jsonl tells it.

    seconds: of its work (decode, train, encode), as measured
    steps:   optimizer steps
    merged:  whether its update was used; the server is not held up by one that was not
    """

    client: str
    down_bytes: int
    up_bytes: int
    seconds: float
    steps: int = 0
    merged: bool = True


class Outcome(NamedTuple):
    """When the server goes on, in seconds after it began the round, and who has not replied."""

    seconds: float
    late: tuple[str, ...]


class Conditions(NamedTuple):
    """The world in which a run's logs are played again.

    link:     the line of every client that is not in `links`
    links:    lines of single clients, by id
    seconds_per_step: work is counted as so many seconds for every optimizer step, which makes the
              result the same on every machine; None takes the seconds that were measured
    spread:   of the stragglers: the sigma of `slowdown`, on every client's work; 0 has none
    seed:     of the stragglers
    """

    link: Link
    links: Mapping[str, Link] = MappingProxyType({})
    seconds_per_step: float | None = None
    spread: float = 0.0
    seed: int = 0


# The uplink as fast as the downlink, a quarter of it, and a sixteenth (FLASC, Figure 3).
REFERENCE = tuple(Conditions(Link(DOWNLINK, DOWNLINK / part)) for part in (1, 4, 16))


def client_time(link: Link, down_bytes: int, up_bytes: int, seconds: float) -> float:
    """Seconds from the start of a round until the server has this client's reply.

    latency + down bits / down rate + seconds of work + latency + up bits / up rate. A client that
    reports a failure sends no bytes, but its word takes the latency too.

    Raises FedSieveError for a rate that is not above 0, and for a latency or work below 0.
    """
    if not (link.downlink > 0 and link.uplink > 0):
        raise FedSieveError(
            f"a link of {link.downlink:g} Mbit/s down and {link.uplink:g} up carries nothing: both "
            "rates must be above 0"
        )
    if not (link.latency >= 0 and seconds >= 0):
        raise FedSieveError(
            f"a latency of {link.latency:g} s and {seconds:g} s of work: neither may be below 0"
        )
    fetch = link.latency + down_bytes * _BITS / link.downlink
    return fetch + seconds + link.latency + up_bytes * _BITS / link.uplink


def round_time(
    times: Mapping[str, float], deadline: float | None = None, needed: int | None = None
) -> Outcome:
    """When the server can go on, given when each client's reply would be there.

    times:    seconds by client id; infinity for one that never replies
    deadline: seconds after which the server waits no longer, whoever is missing
    needed:   so many replies suffice, where more clients were asked than are needed
              (over-selection); with fewer clients than that, all of them are waited for

    The server goes on at the first of: the reply that makes `needed`, the last reply, the deadline.
    A reply at that very moment is still in time. Without clients there is nothing to wait for.

    Raises FedSieveError for times that are not from 0 up, a deadline not above 0, or needed < 1.
    """
    if wrong := [client for client, time in times.items() if not time >= 0]:
        raise FedSieveError(f"client {wrong[0]} takes {times[wrong[0]]} s: it must be from 0 up")
    if deadline is not None and not deadline > 0:
        raise FedSieveError(f"a deadline of {deadline:g} s leaves no time: it must be above 0")
    if needed is not None and needed < 1:
        raise FedSieveError(f"{needed} replies cannot be enough: at least 1 is needed")
    if not times:
        return Outcome(0.0, ())
    enough = len(times) if needed is None else min(needed, len(times))
    end = sorted(times.values())[enough - 1]
    if deadline is not None:
        end = min(end, deadline)
    return Outcome(end, tuple(client for client, time in times.items() if time > end))


def slowdown(key: "Key", spread: float) -> float:
    """By what factor a client's work takes longer than usual: log-normal with median 1.

    exp(spread * z) with z standard normal, drawn from the key alone: a key of a round and a client
    gives hiccups; one of a client, at round 0, a machine that is always slow or fast. With a spread
    of 0.5 one client in twenty takes 2.3 times as long as usual, with 1 one in twenty 5.2 times.

    Raises FedSieveError for a spread that is below 0 or not finite.
    """
    # Here, because keys needs torch, and a report on logs should not have to load it.
    from fedsieve.algebra.keys import word

    if not 0 <= spread < math.inf:
        raise FedSieveError(f"a spread of {spread} is no log-normal: it must be finite, from 0 up")
    # The middle of one of 2**52 equal intervals: never 0 or 1, where a normal has no quantile.
    uniform = ((word(key.at("straggler")) >> 12) + 0.5) / 2**52
    return math.exp(spread * NormalDist().inv_cdf(uniform))


def times(parts: Iterable[Part], conditions: Conditions, number: int = 0) -> dict[str, float]:
    """When each client's reply to round `number` would be there, in seconds, by client id.

    Give the result to `round_time` to see what a deadline or a quorum would have changed.
    """
    return {part.client: _time(part, conditions, number) for part in parts}


def _time(part: Part, conditions: Conditions, number: int) -> float:
    step = conditions.seconds_per_step
    work = part.seconds if step is None else part.steps * step
    if conditions.spread:
        from fedsieve.algebra.keys import Key

        work *= slowdown(Key(conditions.seed, number, part.client), conditions.spread)
    link = conditions.links.get(part.client, conditions.link)
    return client_time(link, part.down_bytes, part.up_bytes, work)


def clock(rounds: Mapping[int, Iterable[Part]], conditions: Conditions) -> dict[int, float]:
    """How many seconds have passed at the end of each round; 0 at round 0.

    A round lasts until the last reply that was merged is there: what the run has learned is what
    those replies told it, so neither more nor fewer may be waited for. A deadline that the run did
    not have is therefore no part of this: it would have changed the accuracy too. Rounds follow
    each other at once.
    """
    passed = 0.0
    clock = {0: passed}
    for number in sorted(rounds):
        merged = [part for part in rounds[number] if part.merged]
        passed += round_time(times(merged, conditions, number)).seconds
        clock[number] = passed
    return clock


def first_round(target: float, scores: Mapping[int, float]) -> int | None:
    """The first of the evaluated rounds whose score is at least `target`; None if none is.

    Scores are better when higher: for losses, give the negatives of both.
    """
    return min((number for number, score in scores.items() if score >= target), default=None)


def time_to(target: float, scores: Mapping[int, float], clock: Mapping[int, float]) -> float | None:
    """Seconds until the first evaluated round that reaches the target; None if none does.

    scores: accuracy by evaluated round; clock: from `clock`. Between evaluations nothing is known,
    so a run that is evaluated seldom is late by up to that many rounds.
    """
    number = first_round(target, scores)
    return None if number is None else clock[number]
