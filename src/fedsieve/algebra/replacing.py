"""Merges that put new factors in the place of the old ones, made of all clients' products.

FlexLoRA, raFLoRA, FLoRA, FLoRIST, FedEx-LoRA and LoRA-FAIR average products s_i B_i A_i, which no
step along a mean of factors can do. They share how the updates come in: the clients return their
trained values, the tensors outside the pairs take a step of the server optimizer, and the factors
are collected, each with its weight in the mean (`collect`). Those that cut the mean to the server's
rank (`refactored`) share what goes down as well: its first k ranks, at the client's scale
(`first_ranks`).
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from fedsieve.algebra import lowrank
from fedsieve.algebra.adapter import Tree
from fedsieve.algebra.budget import Client
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import State, Weighting, own_layout, pack, share_of, step
from fedsieve.algebra.optim import Optimizer
from fedsieve.algebra.payload import Form, Payload
from fedsieve.algebra.sieve import leading, no_pairs
from fedsieve.errors import NoUsableUpdate

Stack = list[tuple[float, Tensor, Tensor]]  # (weight, B, A), whose weighted products are summed


class Collected(NamedTuple):
    """What a merge starts from.

    state:   the head has moved
    stacks:  module -> the clients' factors; the weights, times the layout's scale, make the mean of
             the s_i B_i A_i
    members: ids of the clients
    """

    state: State
    stacks: dict[str, Stack]
    members: list[str]


def collect(
    optimizer: Optimizer,
    state: State,
    updates: Iterable[tuple[Client, Payload]],
    key: Key,
    *,
    weighting: Weighting,
    rescale: Callable[[int, int], float],
    most: int | None = None,
) -> Collected:
    """Move the head along its mean change, and collect the factors.

    most: a stack is cut to this many ranks whenever it is longer; None never cuts
    Raises NoUsableUpdate if there is no update.
    """
    layout, params = state.layout, state.trees["adapter"]
    heads = no_pairs(layout, key.round)
    change: Tree = {n: torch.zeros_like(params[n]) for n in heads}
    stacks: dict[str, Stack] = {pair.module: [] for pair in layout.pairs}
    sums: dict[str, lowrank.RunningSum] = {}
    members: list[str] = []
    weight = 0.0
    for client, payload in updates:
        part = payload.tree()
        share = share_of(client, weighting)
        own = own_layout(layout, payload.support, rescale)
        weight += share
        members.append(client.id)
        for n in heads:
            change[n].add_(params[n] - part[n], alpha=share)
        for pair in layout.pairs:
            name, factors = pair.module, (part[pair.b], part[pair.a])
            own_share = share * own.scale / layout.scale
            if most is None:
                stacks[name].append((own_share, *factors))
            else:
                sums[name] = lowrank.add(sums.get(name), own_share, *factors, most)
                stacks[name] = [(1.0, sums[name].b, sums[name].a)]
        del payload, part
    if weight == 0:
        raise NoUsableUpdate("no client returned an update that can be merged")
    moved = step(optimizer, state, {n: t / weight for n, t in change.items()}, heads)
    shares = {m: [(w / weight, b, a) for w, b, a in stack] for m, stack in stacks.items()}
    return Collected(moved, shares, members)


def means(stack: Stack) -> tuple[Tensor, Tensor]:
    """The means of the factors themselves, B and A; all have one rank."""
    return (
        torch.stack([weight * b for weight, b, _ in stack]).sum(0),
        torch.stack([weight * a for weight, _, a in stack]).sum(0),
    )


def first_ranks(
    rescale: Callable[[int, int], float], form: Form
) -> Callable[[State, Client, Key], Payload]:
    """A `publish`: the first k ranks, such that a client's s_i B A is what the server's s B A is.

    The client multiplies by its own scale, so its factors are smaller by the root of that.
    """

    def publish(plan: State, client: Client, key: Key) -> Payload:
        layout, tree = plan.layout, plan.trees["adapter"]
        passed = leading(tree, layout, client, key)
        own = own_layout(layout, passed.support, rescale)
        shrink = (layout.scale / own.scale) ** 0.5
        tree = {n: t * shrink if n in layout.rank_axis else t for n, t in tree.items()}
        return pack(layout, tree, passed, form, key.at("round down values"))

    return publish


def refactored(state: State, stacks: dict[str, Stack]) -> State:
    """The state with each pair the best approximation, at the server's rank, of its stack's sum.

    A rank that the sum does not need has a zero column in B, and with a zero row in A it could
    never learn again: it keeps the row that it had, which changes no product.
    """
    tree = dict(state.trees["adapter"])
    for pair in state.layout.pairs:
        stacked = lowrank.stacked(stacks[pair.module])
        tree[pair.b], a = lowrank.best_of_rank(*stacked, state.layout.rank)
        unused = (a.flatten(1) == 0).all(1).reshape(-1, *[1] * (a.ndim - 1))
        tree[pair.a] = torch.where(unused, tree[pair.a], a)
    return State(state.layout, {**state.trees, "adapter": tree})
