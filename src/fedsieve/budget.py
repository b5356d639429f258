"""What clients can afford, who gets which budget, and who takes part in a round."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fedsieve.keys import Key, generator


class Budget(NamedTuple):
    """What one client can afford.

    ratio: share of the server's ranks that it trains, in (0, 1]; k = round(ratio * r), at least 1
    down:  density of what it receives, in (0, 1]
    up:    density of what it returns, in (0, 1]
    """

    ratio: float = 1.0
    down: float = 1.0
    up: float = 1.0

    def ranks(self, rank: int) -> int:
        """k: how many of `rank` ranks this client trains."""
        return min(rank, max(1, round(self.ratio * rank)))


class Client(NamedTuple):
    """One client as the server sees it; `examples` counts its training examples."""

    id: str
    examples: int
    budget: Budget = Budget()


def assign(
    ids: Sequence[str], tiers: Sequence[tuple[float, Budget]], key: Key
) -> dict[str, Budget]:
    """Give each client one of several budgets, in the proportions of the tiers' shares.

    tiers: (share, budget) each; shares are relative to their sum. The counts are as near to the
    shares as whole clients allow, and who gets which is drawn from the key.
    """
    ordered = sorted(ids)
    draw = torch.randperm(len(ordered), generator=generator(key.at("budgets"))).tolist()
    total = sum(share for share, _ in tiers)
    budgets: dict[str, Budget] = {}
    begin, reached = 0, 0.0
    for share, budget in tiers:
        reached += share
        end = round(len(ordered) * reached / total)
        budgets |= {ordered[i]: budget for i in draw[begin:end]}
        begin = end
    return budgets


def cohort(clients: Sequence[Client], size: int, key: Key) -> list[Client]:
    """`size` clients drawn uniformly without replacement, in order of id.

    The draw depends on the key and on the set of ids alone, not on the order of `clients`.
    """
    ordered = sorted(clients, key=lambda client: client.id)
    size = min(size, len(ordered))
    chosen = torch.randperm(len(ordered), generator=generator(key.at("cohort")))[:size]
    return [ordered[i] for i in sorted(chosen.tolist())]
