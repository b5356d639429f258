"""What clients can afford, as plain records.

The laws by which budgets are given out are in clients/laws.py; budgets that follow from a client's
memory and network in clients/resources.py.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from fedsieve.algebra.counts import exact, nearest
from fedsieve.errors import FedSieveError, quoted
from fedsieve.settings import as_float, is_number


class Budget(NamedTuple):
    """What one client can afford.

    ratio: share of the server's ranks that it trains, in (0, 1]; k = counts.nearest(ratio, r)
    down:  density of what it receives, in (0, 1]
    up:    density of what it returns, in (0, 1]
    """

    ratio: float = 1.0
    down: float = 1.0
    up: float = 1.0

    def ranks(self, rank: int) -> int:
        """k: how many of `rank` ranks this client trains."""
        return nearest(self.ratio, rank)


class Link(NamedTuple):
    """A client's line to the server.

    downlink, uplink: Mbit/s (10**6 bits a second), to the client and from it
    latency: seconds that every message takes beside its bits
    """

    downlink: float
    uplink: float
    latency: float = 0.0


class Client(NamedTuple):
    """One client as the server sees it; `examples` counts its training examples.

    link, step_seconds: its line and its seconds an optimizer step, where they are known
    """

    id: str
    examples: int
    budget: Budget = Budget()
    link: Link | None = None
    step_seconds: float | None = None


def check(budgets: Mapping[str, Budget], rank: int) -> None:
    """Raises FedSieveError, naming the client, for a budget that no server of this rank can serve.

    That is a rank above the server's, or a ratio or density that is no number in (0, 1].
    """
    seen: set[Budget] = set()  # of many clients most are alike
    for id, budget in sorted(budgets.items()):
        for knob, value in budget._asdict().items():
            if not is_number(value):
                raise FedSieveError(
                    f"client {id!r}: its budget has {knob} {quoted(value)}; it must be a number "
                    "above 0, at most 1"
                )
        if budget in seen:  # not before: True is equal to 1
            continue
        if 1 < (ratio := as_float(budget.ratio)) < math.inf:
            refuse_rank(id, round(exact(ratio) * rank), rank)
        for knob, value in budget._asdict().items():
            if not 0 < (value := as_float(value)) <= 1:
                raise FedSieveError(
                    f"client {id!r}: its budget has {knob} {value:g}; it must be above 0, at most 1"
                )
        seen.add(budget)


def refuse_rank(id: str, own: int, rank: int) -> None:
    """Raises FedSieveError if a client's own rank is above the server's."""
    if own > rank:
        raise FedSieveError(
            f"client {id!r}: its rank {own} is above the server's {rank}: lower it or raise "
            "lora.rank"
        )
