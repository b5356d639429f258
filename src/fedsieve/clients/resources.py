"""Budgets from resources: the rank and the densities with which a client's round fits.

Given is what a client has: free memory, a link, seconds an optimizer step, and a deadline for its
part of a round. The model, for an adapter of k of r ranks with p numbers a rank (the sum of m + n
over the pairs) and h numbers beside the pairs, n = k p + h in all:

    memory   4 n (start + trained + gradient + moments) bytes: the adapter that arrived, which the
             client keeps to know its change, the one that it trains, its gradient, and what the
             local optimizer holds: nothing (SGD), one (momentum) or two numbers (AdamW) for each
    message  HEAD + p v(d) / 8 + c H(p / c) / 8 bytes at density d, where c of the n numbers compete
             (all, or all but the head), p of them pass (`counts.how_many`), v(d) is bits a value
             and H the entropy of a mask's bit; what does not compete goes whole
    round    latency + download / down + steps * step + latency + upload / up seconds

Free memory is what is left beside the base model, its activations and the program. v(d) is 32 for
float32 and 64 for float64. The other forms are entropy-coded, so their cost depends on the numbers:
v(d) is then the entropy for normal ones of which the largest passed (`value_bits`). Numbers with
heavier tails, as trained changes mostly are, cost less in int8, and masks of uneven rows cost less
than H; so the model is near the really encoded bytes for random numbers and above them for most
others (tests/clients/test_budgets.py encodes and compares). A step is taken to last as long at rank
k as at rank r: the base model is most of it.

The choice goes in this order, and each stage takes the most that fits:

1. The rank: the largest k whose memory fits and which makes the deadline at the smallest densities.
   FLASC and FSLoRA both find that a high rank sent sparsely beats a low rank sent whole.
2. The densities: of the time that is left for messages, each way gets a half, and more if the other
   way does not need its half to send everything. A slow uplink so gets a sparse upload (FLASC,
   Figure 3). Densities are steps of `LADDER`.

With more of any resource, or a later deadline, the rank never falls, and at an equal rank neither
density does. All here is plain arithmetic on numbers; nothing is measured.
"""

import math
from collections.abc import Collection
from functools import lru_cache
from typing import Literal, NamedTuple

import torch

from fedsieve.algebra.budget import Budget, Link
from fedsieve.algebra.counts import how_many
from fedsieve.algebra.payload import BLOCK, Form
from fedsieve.clients.network import client_time
from fedsieve.errors import FedSieveError

LADDER = tuple(2 ** (-step / 4) for step in range(41))  # densities from 1 to 1/1024, each 16 % less
HEAD = 36  # bytes of a message beside its values and masks: frame, seed, histograms
MEGA = 10**6


class Resources(NamedTuple):
    """What a client has.

    memory: free, in MB (10**6 bytes), beside the base model and its activations
    link:   its line to the server
    step_seconds: one local optimizer step, forward and backward included
    """

    memory: float
    link: Link
    step_seconds: float


class Work(NamedTuple):
    """What a client's round is made of, whatever its budget.

    rank, per_rank, head: r of the server's adapter; how many numbers one rank has over all pairs;
          how many numbers stand beside the pairs
    steps: local optimizer steps
    moments: numbers that the local optimizer keeps for each trained one
    down_values, up_values: the form in which numbers travel
    sieved_head: whether the head competes with the pairs for the density, or travels whole
    """

    rank: int
    per_rank: int
    head: int
    steps: int
    moments: int = 0
    down_values: Form = "float32"
    up_values: Form = "float32"
    sieved_head: bool = True


def memory_bytes(work: Work, kept: int) -> int:
    """What a client of `kept` ranks holds at once while it trains: see the module's head."""
    return 4 * (kept * work.per_rank + work.head) * (3 + work.moments)


def message_bytes(work: Work, way: Literal["down", "up"], kept: int, density: float) -> float:
    """The length of a client's download or upload, as modelled."""
    form = work.down_values if way == "down" else work.up_values
    if density >= 1:
        return HEAD + (kept * work.per_rank + work.head) * value_bits(form, 1.0) / 8
    compete = kept * work.per_rank + (work.head if work.sieved_head else 0)
    whole = 0 if work.sieved_head else work.head
    passed = how_many(density, compete)
    bits = passed * value_bits(form, density) + compete * _entropy(passed / max(1, compete))
    return HEAD + (bits + whole * value_bits(form, 1.0)) / 8


def round_seconds(work: Work, has: Resources, budget: Budget) -> float:
    """The modelled time of a client's round with this budget."""
    kept = budget.ranks(work.rank)
    down = message_bytes(work, "down", kept, budget.down)
    up = message_bytes(work, "up", kept, budget.up)
    work_seconds = work.steps * has.step_seconds
    return client_time(has.link, math.ceil(down), math.ceil(up), work_seconds)


def choose(
    id: str,
    has: Resources,
    work: Work,
    deadline: float,
    *,
    knobs: Collection[str] = ("ratio", "down", "up"),
    least: float = 1 / 64,
) -> Budget:
    """The largest budget, in the order of the module's head, that fits a client.

    id:    the client's, for messages
    deadline: seconds for the whole round of this client
    knobs: which parts of a budget the method uses; the others stay 1
    least: no density below this is chosen
    Raises FedSieveError, naming the client, if not even the smallest budget fits.
    """
    ladder = [density for density in LADDER if density >= least]
    may = {way: ladder if way in knobs else [1.0] for way in ("down", "up")}
    smallest = 1 if "ratio" in knobs else work.rank
    floor = Budget(smallest / work.rank, may["down"][-1], may["up"][-1])
    for kept in range(work.rank, smallest - 1, -1):
        sparsest = floor._replace(ratio=kept / work.rank)
        fits = memory_bytes(work, kept) <= has.memory * MEGA
        if fits and round_seconds(work, has, sparsest) <= deadline:
            return _densest(has, work, deadline, sparsest, may["down"], may["up"])
    raise FedSieveError(_too_small(id, has, work, deadline, floor))


def _densest(
    has: Resources,
    work: Work,
    deadline: float,
    sparsest: Budget,
    down_ladder: list[float],
    up_ladder: list[float],
) -> Budget:
    """The densities at this rank, from falling ladders whose last steps are known to fit.

    Each way may use what the other leaves: all of the time but half, or less where the other sends
    everything sooner, or more where its smallest density already takes longer.
    """
    kept = sparsest.ranks(work.rank)

    def down(density: float) -> float:
        bits = 8 * math.ceil(message_bytes(work, "down", kept, density))
        return bits / (has.link.downlink * MEGA)

    def up(density: float) -> float:
        bits = 8 * math.ceil(message_bytes(work, "up", kept, density))
        return bits / (has.link.uplink * MEGA)

    free = deadline - 2 * has.link.latency - work.steps * has.step_seconds
    for_up = free - min(max(free / 2, down(down_ladder[-1])), down(down_ladder[0]))
    for_down = free - min(max(free / 2, up(up_ladder[-1])), up(up_ladder[0]))
    return sparsest._replace(
        down=next((d for d in down_ladder if down(d) <= for_down), down_ladder[-1]),
        up=next((d for d in up_ladder if up(d) <= for_up), up_ladder[-1]),
    )


def _too_small(id: str, has: Resources, work: Work, deadline: float, floor: Budget) -> str:
    kept = floor.ranks(work.rank)
    said = f"rank {kept} with densities {floor.down:g} down and {floor.up:g} up"
    need = memory_bytes(work, kept) / MEGA
    if need > has.memory:
        return (
            f"client {id!r}: not even the smallest budget fits: {said} needs {need:.3g} MB beside "
            f"the base model, and {has.memory:g} MB are free. Leave the client out, or choose a "
            "method that trains fewer numbers"
        )
    took = round_seconds(work, has, floor)
    train = work.steps * has.step_seconds
    return (
        f"client {id!r}: not even the smallest budget fits: {said} takes {took:.3g} s, of which "
        f"{train:.3g} s are training, and the deadline is {deadline:g} s. Raise the deadline, "
        "train fewer steps, or leave the client out"
    )


@lru_cache(maxsize=256)
def value_bits(form: Form, density: float) -> float:
    """v(d): bits that a value costs on the wire, of the largest d of normal numbers.

    Worked out on 4096 quantiles of the half-normal law above its (1 - d) quantile: the entropy of
    their codes, and what goes beside each.
    """
    if form == "float32":
        return 32.0
    if form == "float64":
        return 64.0
    tail = density * (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096
    sizes = -torch.special.ndtri(tail / 2)
    if form == "bfloat16":
        return 8 + _code_entropy(sizes.log2().floor())  # sign and mantissa go raw
    # Half of all blocks have no entry above this; a block's largest entry is its step times 127.
    largest = -torch.special.ndtri(torch.tensor(density * (1 - 0.5 ** (1 / BLOCK)) / 2).double())
    codes = (127 * sizes / largest).round().clamp(max=127)
    # The sign; the block's scale; and of masked messages each block's lowest code and slope.
    return 1 + _code_entropy(codes) + (16 if density >= 1 else 16 + 11) / BLOCK


def _code_entropy(codes: torch.Tensor) -> float:
    counts = codes.unique(return_counts=True)[1].double()
    shares = counts / counts.sum()
    return float(-(shares * shares.log2()).sum())


def _entropy(share: float) -> float:
    """Bits of a mask's entry that is set with this probability."""
    if not 0 < share < 1:
        return 0.0
    return -share * math.log2(share) - (1 - share) * math.log2(1 - share)
