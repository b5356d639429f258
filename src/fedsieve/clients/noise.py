"""Noise on the mean of clipped updates: what makes a round private for its clients.

The server sees the clients' updates; whoever sees the models that it gives out shall learn almost
nothing of any one client. Two things bring that about, and neither knows of a method:

    clip     each decoded update u_i is scaled down to min(1, C / |u_i|) u_i, the norm over all of
             its values together, so that no payload, however sparse, narrow or rounded, moves the
             sum by more than C (`optim.Optimizer.clip`; the merge does it)
    noise    g = (sum_i u_i) / n + N(0, (z C / n)^2) on EVERY coordinate, also where no client sent
             anything: which coordinates were sent is a secret of the clients too. n is a fixed
             number, not the count of those who answered, which is a secret as well

C may follow a quantile of the updates' norms (`Adaptive`), found from a noised count of the updates
that were within it, whose privacy is paid for out of the same z.

`private` puts both around a server optimizer, so DP-FedAvg is `private(sgd(), ...)` (McMahan et al.
2018, arXiv 1710.06963) and DP-FedAdam is `private(fedadam(...), ...)`; what comes after the noise
(moments, masks, pruning, what the next round sends) is post-processing and costs nothing. What it
buys is counted in `privacy.py`.
"""

import math
import os
from typing import NamedTuple

import torch
from torch import Tensor

from fedsieve.algebra.adapter import Tree
from fedsieve.algebra.keys import Key, generator
from fedsieve.algebra.optim import (
    Optimizer,
    Slots,
    limits,
    optimizer_given,
    slots_of,
    stepped,
)
from fedsieve.errors import FedSieveError
from fedsieve.settings import Source

_SLOT = "privacy"


class Adaptive(NamedTuple):
    """A clip that follows a quantile of the updates' norms (Andrew et al. 2021, arXiv 1905.03871).

    C <- C exp(-rate (b - quantile)), b the noised share of updates whose norm is at most C

    quantile:    the share of updates that is to be within the clip
    rate:        eta_C of the paper
    count_noise: sigma_b: the standard deviation of the noise on the sum of (b_i - 1/2), which one
                 client moves by at most 1/2
    """

    quantile: float = 0.5
    rate: float = 0.2
    count_noise: float = 1.0


def private(
    optimizer: Optimizer,
    *,
    clip: float,
    noise_multiplier: float,
    expected: float,
    key: Key,
    simulated_cohort: float | None = None,
    noise_from: Source = "seed",
    adaptive: Adaptive | None = None,
) -> Optimizer:
    """The same optimizer, on clipped updates with Gaussian noise on their mean.

    clip:             C, of each client's update over all of its values
    noise_multiplier: z, the standard deviation of the noise on the SUM over C; 0 adds none
    expected:         n, what the sum is divided by: the number of clients of a round, on average
    key:              names the noise's stream; the round is counted in a slot of the optimizer's
                      own, so that a resumed run draws the same
    simulated_cohort: M: the noise on the mean is z C / M instead of z C / n, as if the M clients of
                      a larger federation had answered. This is NOT private for the clients at hand
    noise_from:       "seed" repeats with the recipe; "system" takes it from the operating system's
                      entropy, as a deployment must
    adaptive:         clip is where C starts; z is then shared between the sum and the count, so
                      that both together are as private as the sum alone would be

    Put it outermost: private(fading(adam())), so that the noise comes before all else.
    Raises FedSieveError for numbers that make no sense, or where the optimizer clips or is private
    already. A method whose server moves by more than a mean of clipped changes refuses the result
    (`method.Unbounded`).
    """
    optimizer_given("optimizer", optimizer)
    if limits(optimizer) and optimizer.private is None:
        raise FedSieveError("privacy: the server optimizer has a clip of its own: leave it out")
    if not clip > 0:
        raise FedSieveError(f"privacy: clip is {clip}; it must be above 0")
    if not (noise_multiplier >= 0 and math.isfinite(noise_multiplier)):
        raise FedSieveError(
            f"privacy: noise_multiplier is {noise_multiplier}; it must be a number from 0 up"
        )
    if noise_multiplier > 0 and math.isinf(clip):
        raise FedSieveError("privacy: noise needs a finite clip: without one nothing bounds it")
    over = expected if simulated_cohort is None else simulated_cohort
    if not (expected > 0 and over > 0):
        raise FedSieveError(f"privacy: a cohort of {min(expected, over)}; it must be above 0")
    on_sum = noise_multiplier
    if adaptive is not None and noise_multiplier:
        on_sum = beside_the_count(noise_multiplier, adaptive.count_noise)

    def now(slots: Slots) -> float:
        return clip if adaptive is None else float(slots[_SLOT]["clip"])

    def init(params: Tree) -> Slots:
        slots = slots_of(optimizer, params)
        if _SLOT in slots:
            raise FedSieveError("privacy: the server optimizer adds noise already")
        own = {"rounds": torch.zeros(())}
        if adaptive is not None:
            own["clip"] = torch.tensor(clip, dtype=torch.float64)
        return {**slots, _SLOT: own}

    def step(params: Tree, gradient: Tree, slots: Slots) -> tuple[Tree, Slots]:
        rounds = slots[_SLOT]["rounds"] + 1
        if on_sum:
            here, deviation = key._replace(round=int(rounds)), on_sum * now(slots) / over
            gradient = {
                n: g + _noise(g, deviation, here, n, noise_from) for n, g in gradient.items()
            }
        inner = {name: tree for name, tree in slots.items() if name != _SLOT}
        moved, inner = stepped(optimizer, params, gradient, inner)
        return moved, {**inner, _SLOT: {**slots[_SLOT], "rounds": rounds}}

    def settle(slots: Slots, within: int, merged: int) -> Slots:
        if adaptive is None:
            return slots
        own = slots[_SLOT]
        share = 0.5 + (within - merged / 2) / expected
        if noise_multiplier:
            here = key._replace(round=int(own["rounds"]))
            noise = _noise(own["clip"], adaptive.count_noise, here, "count", noise_from)
            share += float(noise) / over
        moved = own["clip"] * math.exp(-adaptive.rate * (share - adaptive.quantile))
        return {**slots, _SLOT: {**own, "clip": moved}}

    return Optimizer(init, step, clip=now, expected=expected, settle=settle, private=noise_from)


def beside_the_count(noise_multiplier: float, count_noise: float) -> float:
    """z of the sum, so that it and the count together are as private as z alone (their Theorem 1).

    Raises FedSieveError if the count alone spends more than that.
    """
    left = noise_multiplier**-2 - (2 * count_noise) ** -2
    if left <= 0:
        raise FedSieveError(
            f"privacy.count_noise: {count_noise:g} is too little (where none is given it is a 20th "
            f"of the cohort): with a noise multiplier of {noise_multiplier:g} it must be above "
            f"{noise_multiplier / 2:g}"
        )
    return float(left**-0.5)


def _noise(like: Tensor, deviation: float, key: Key, name: str, source: Source) -> Tensor:
    """Gaussian noise with the shape, type and device of a tensor.

    In float64 first: Box and Muller's method on 24 random bits never leaves 5.8 deviations, on 53
    bits it never leaves 8.6.
    """
    if source == "system":
        normal = _from_system(like.numel()).view(like.shape)
    else:
        draws = generator(key.at(f"privacy noise {name}"))
        normal = torch.randn(like.shape, generator=draws, dtype=torch.float64)
    return (deviation * normal).to(like.device, like.dtype)


def _from_system(count: int) -> Tensor:
    """(count,) standard normal numbers in float64 from os.urandom, by Box and Muller's method."""
    half = count // 2 + 1
    words = torch.frombuffer(bytearray(os.urandom(16 * half)), dtype=torch.int64)[: 2 * half]
    # 53 bits each: u in (0, 1], so that its logarithm is finite.
    u, v = ((words >> 11) & (2**53 - 1)).to(torch.float64).add(1).div(2**53).view(2, half)
    radius, angle = (-2 * u.log()).sqrt(), 2 * math.pi * v
    return torch.cat([radius * angle.cos(), radius * angle.sin()])[:count]
