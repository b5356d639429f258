"""The laws by which budgets are given out to clients.

Every law is a function from the clients' ids to their budgets. A client's draw comes from a key of
its own, so that it depends neither on the order of the clients nor on how many there are; the laws
that place clients relative to each other (`assign`, `heavy_tail`) look at the whole set of ids.
"""

import math
from collections.abc import Iterator, Sequence

import torch

from fedsieve.algebra.budget import Budget
from fedsieve.algebra.keys import Key, generator, words


def assign(
    ids: Sequence[str], tiers: Sequence[tuple[float, Budget]], key: Key
) -> dict[str, Budget]:
    """Give each client one of several budgets, in the proportions of the tiers' shares.

    tiers: (share, budget) each; shares are relative to their sum. The counts are as near to the
    shares as whole clients allow, and who gets which is drawn from the key.
    """
    places = divide(ids, [share for share, _ in tiers], key)
    return {id: tiers[place][1] for id, place in places.items()}


def divide(ids: Sequence[str], shares: Sequence[float], key: Key) -> dict[str, int]:
    """The number of the tier that each client is in; see `assign`."""
    ordered = sorted(ids)
    draw = torch.randperm(len(ordered), generator=generator(key.at("budgets"))).tolist()
    total = sum(shares)
    places: dict[str, int] = {}
    begin, reached = 0, 0.0
    for tier, share in enumerate(shares):
        reached += share
        end = round(len(ordered) * reached / total)
        places |= dict.fromkeys((ordered[i] for i in draw[begin:end]), tier)
        begin = end
    return places


def tiers_by_rank(count: int) -> list[tuple[float, Budget]]:
    """FLASC's tiers of unequal ranks: tier b = 1..bs of equal shares, the top one with everything.

    The paper gives tier b the rank 4^b (arXiv 2406.05233, Figure 6), so its server has rank 4^bs.
    Here the server's rank r is free and tier b gets r 4^b / 4^bs, that is the ratio (1/4)^(bs - b):
    the paper's ranks where r = 4^bs, and the same steps between the tiers elsewhere.
    """
    return [(1.0, Budget(ratio=0.25 ** (count - b))) for b in range(1, count + 1)]


def tiers_by_density(count: int) -> list[tuple[float, Budget]]:
    """FLASC's tiers of unequal density: tier b = 1..bs has (1/4)^(bs - b), down and up.

    A tier sends as many LoRA entries as the tier of the same number in `tiers_by_rank`.
    """
    densities = [0.25 ** (count - b) for b in range(1, count + 1)]
    return [(1.0, Budget(down=density, up=density)) for density in densities]


def ratios(ids: Sequence[str], among: Sequence[float], key: Key) -> dict[str, float]:
    """A ratio for each client, drawn uniformly from `among` (FSLoRA: settings.PAPER_RATIOS)."""
    drawn = words(key.at("budget"), ids)
    return {id: among[own % len(among)] for id, own in zip(ids, drawn, strict=True)}


def normal(ids: Sequence[str], low: int, high: int, key: Key) -> dict[str, int]:
    """Ranks from a normal law of mean (a + b) / 2 and deviation (b - a) / 6, clipped to [a, b].

    low, high: a and b (FSLoRA, arXiv 2501.19389, takes 4 and 64). The ends are three deviations
    away: one client in 370 is clipped.
    """
    ranks = {}
    for id, own in _standard_normals(key, ids):
        draw = (low + high) / 2 + own * (high - low) / 6
        ranks[id] = min(high, max(low, round(draw)))
    return ranks


def heavy_tail(ids: Sequence[str], low: int, high: int, key: Key) -> dict[str, int]:
    """Ranks from FSLoRA's heavy-tailed law on [a, b]: few clients are strong.

    x_i = 1 / LogNormal(log((a + b) / 4), 1), scaled so that the smallest x becomes a and the
    largest b. A lone client has nothing to be scaled by, and gets a.
    """
    middle = math.log((low + high) / 4)
    draws = {id: math.exp(-middle - own) for id, own in _standard_normals(key, ids)}
    least, most = min(draws.values()), max(draws.values())
    span = (most - least) or 1.0
    return {id: round(low + (high - low) * (x - least) / span) for id, x in draws.items()}


def _standard_normals(key: Key, ids: Sequence[str]) -> Iterator[tuple[str, float]]:
    """Each client's own draw. One generator is set to the start of each stream in turn: to make one
    for each would take longer than to draw.
    """
    draws, place = torch.Generator(), torch.empty((), dtype=torch.float64)
    for id, own in zip(ids, words(key.at("budget"), ids), strict=True):
        yield id, float(place.normal_(generator=draws.manual_seed(own >> 1)))
