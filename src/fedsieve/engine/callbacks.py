"""What is told of a run while it goes on: each round to callbacks, each reply to whoever counts."""

import time
from collections.abc import (
    AsyncGenerator,
    Callable,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
    Sequence,
)
from copy import deepcopy
from dataclasses import replace
from typing import NamedTuple

from fedsieve.algebra.budget import Client
from fedsieve.algebra.keys import Key
from fedsieve.engine.client import Reply
from fedsieve.engine.loop import Federation, Round
from fedsieve.errors import THEIRS, FedSieveError, listed, quoted, with_type

OnRound = Callable[[Round], object]  # called once a round, round 0 (before training) first


class Heard(NamedTuple):
    """How far a round is: so many of its clients have answered, or are through.

    left: seconds until the last of them will have, if they take as long as those before
    """

    round: int
    clients: int
    of: int
    left: float


OnClient = Callable[[Heard], object]


class CallbackFailed(FedSieveError):
    """A callback of the user's raised an exception, which is this one's cause."""


def as_list(on_round: OnRound | Iterable[OnRound] | None) -> list[OnRound]:
    """One callback, several, or none. Raises FedSieveError for what cannot be called."""
    if on_round is None:
        return []
    each = listed("on_round", on_round) if isinstance(on_round, Iterable) else [on_round]
    for callback in each:
        if not callable(callback):
            raise FedSieveError(
                "on_round: a function of a round, or a list of such, is needed, and "
                f"{quoted(callback)} cannot be called"
            )
    return each


def tell(callbacks: Sequence[OnRound], summary: Round) -> None:
    """Call them all in their order, also after one that fails.

    Raises CallbackFailed, from what the first of those raised, once all were called.
    """
    first: tuple[OnRound, BaseException] | None = None
    for callback in callbacks:
        try:
            made = callback(deepcopy(summary))  # what one does to it is its own affair
            if isinstance(made, Coroutine | Generator | AsyncGenerator):
                raise TypeError("it is `async`, or has a `yield`, and nothing in it was run")
        except THEIRS as raised:  # `sys.exit(0)` in one would end a run as if it were done
            first = first or (callback, raised)
    if first is not None:
        callback, error = first
        raise CallbackFailed(
            f"the callback {_name(callback)} failed after round {summary.round}: {with_type(error)}"
        ) from error


def _name(callback: OnRound) -> str:
    """What a user knows a callback by: a partial by its function, an object by its class."""
    found = getattr(callback, "func", callback)
    return str(getattr(found, "__qualname__", type(found).__qualname__))


def counted(federation: Federation, told: OnClient) -> Federation:
    """The same federation, which tells of each reply as it comes."""
    exchange = federation.exchange
    asked = 0

    def order(chosen: Sequence[Client]) -> Sequence[Client]:
        nonlocal asked
        asked = len(chosen)
        return exchange.order(chosen)

    def carry(messages: Iterable[tuple[Client, bytes]], key: Key) -> Iterator[Reply]:
        began = time.monotonic()
        for done, reply in enumerate(exchange.carry(messages, key), 1):
            left = (time.monotonic() - began) / done * (asked - done)
            told(Heard(key.round, done, asked, left))
            yield reply

    return replace(federation, exchange=exchange._replace(order=order, carry=carry))
