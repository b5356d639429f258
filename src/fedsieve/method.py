"""A method of federated fine-tuning: seven pure functions over explicit state.

A round calls them in this order. The server plans once, publishes a payload for each client of the
cohort, and merges what they return; a client turns its payload into a view, trains that, and
reports a payload. `compose` builds all seven from two sieves and a server optimizer, which is
enough for most methods; a method that needs more replaces single functions of the result.
"""

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import torch

from fedsieve.adapter import Adapter, Layout, Tree
from fedsieve.budget import Client
from fedsieve.errors import NoUsableUpdate
from fedsieve.keys import Key, generator
from fedsieve.optim import Optimizer, sgd
from fedsieve.payload import Form, Payload, rounded
from fedsieve.sieve import Passed, Sieve
from fedsieve.support import Support, add_back, cut, gather, narrowed

Memory = dict[str, Tree]  # what a client keeps between its rounds; {} for most methods
Weighting = Literal["uniform", "examples"]
Knob = Literal["ratio", "down", "up"]


class State(NamedTuple):
    """What the server keeps between rounds: tensors alone, so any checkpoint can hold it.

    trees: "adapter" is the global adapter at full rank; the others are the optimizer's moments
    """

    layout: Layout
    trees: dict[str, Tree]


class View(NamedTuple):
    """What a client trains.

    adapter: at the client's own rank k, its layout's scale already holding the r / k of a sketch
    layout, support: the server's layout, and the coordinates of it that arrived
    """

    adapter: Adapter
    layout: Layout
    support: Support


class Method(NamedTuple):
    """The functions of a round; see the module's head. `knobs`: the budgets that it uses."""

    knobs: frozenset[Knob]
    init: Callable[[Adapter], State]
    plan: Callable[[State, Key], Adapter]
    publish: Callable[[Adapter, Client, Key], Payload]
    view: Callable[[Payload, Memory], tuple[View, Memory]]
    report: Callable[[View, Tree, Client, Memory, Key], tuple[Payload, Memory]]
    merge: Callable[[State, Iterable[tuple[Client, Payload]]], State]
    export: Callable[[State], Adapter]


def unscaled(rank: int, kept: int) -> float:
    """Clients use the server's own scale s."""
    return 1.0


def r_over_k(rank: int, kept: int) -> float:
    """The factor r / k that makes a sketch unbiased (FSLoRA, Definition 3.1)."""
    return rank / kept


def compose(
    *,
    down: Sieve,
    up: Sieve,
    knobs: frozenset[Knob] = frozenset(),
    rescale: Callable[[int, int], float] = unscaled,
    server: Optimizer | None = None,
    weighting: Weighting = "uniform",
    down_values: Form = "float32",
    up_values: Form = "float32",
    feedback: bool = False,
) -> Method:
    """A method from what passes down, what passes up, and how the server moves.

    down, up:  sieves; `up` sees the change at the client's own rank
    rescale:   (r, k) -> factor on the scale of a client that holds k of r ranks
    server:    the optimizer that takes the mean change as its gradient; default SGD with lr 1
    weighting: clients count alike, or by their number of examples
    down_values, up_values: the form in which numbers travel
    feedback:  a client keeps what its upload left out and adds it to its next change. The client
               must hold the same coordinates every round, so this is for methods without a sketch.
    """
    optimizer = sgd() if server is None else server

    def init(adapter: Adapter) -> State:
        slots = optimizer.init(adapter.tensors)
        return State(adapter.layout, {"adapter": dict(adapter.tensors), **slots})

    def publish(plan: Adapter, client: Client, key: Key) -> Payload:
        layout, tree = plan
        passed = down(tree, layout, client, key)
        part = cut(tree, layout, passed.support.ranks)
        return _pack(layout, part, passed, down_values, key.at("round down values"))

    def view(payload: Payload, memory: Memory) -> tuple[View, Memory]:
        layout, support = payload.layout, payload.support
        kept = layout.rank if support.ranks is None else support.ranks.shape[1]
        scale = layout.scale * (rescale(layout.rank, kept) if kept else 1.0)
        own = narrowed(layout, support.ranks, scale)
        return View(Adapter(own, payload.tree()), layout, support), memory

    def report(
        view: View, trained: Tree, client: Client, memory: Memory, key: Key
    ) -> tuple[Payload, Memory]:
        start = view.adapter.tensors
        change = {n: start[n] - trained[n] for n in start}
        if "residual" in memory:
            change = {n: c + memory["residual"][n] for n, c in change.items()}
        passed = up(change, view.adapter.layout, client, key)
        # The server knows which ranks it gave: they need not be told again.
        support = passed.support._replace(ranks=view.support.ranks)
        passed = passed._replace(support=support)
        payload = _pack(view.layout, change, passed, up_values, key.at("round up values"))
        if feedback:
            sent = payload.tree()
            memory = {**memory, "residual": {n: c - sent[n] for n, c in change.items()}}
        return payload, memory

    def merge(state: State, updates: Iterable[tuple[Client, Payload]]) -> State:
        params = state.trees["adapter"]
        total = {n: torch.zeros_like(p) for n, p in params.items()}
        weight = 0.0
        for client, payload in updates:
            share = float(client.examples) if weighting == "examples" else 1.0
            add_back(total, payload.tree(), state.layout, payload.support.ranks, share)
            weight += share
        if weight == 0:
            raise NoUsableUpdate("no client returned an update that can be merged")
        # The mean counts zeros: a client that did not hold a rank still counts below the line
        # (FSLoRA, equation 5; FLASC, Algorithm 1).
        gradient = {n: t / weight for n, t in total.items()}
        slots = {name: tree for name, tree in state.trees.items() if name != "adapter"}
        moved, slots = optimizer.step(params, gradient, slots)
        return State(state.layout, {"adapter": moved, **slots})

    def export(state: State) -> Adapter:
        return Adapter(state.layout, state.trees["adapter"])

    def plan(state: State, key: Key) -> Adapter:
        return export(state)

    return Method(knobs, init, plan, publish, view, report, merge, export)


def _pack(layout: Layout, part: Tree, passed: Passed, form: Form, key: Key) -> Payload:
    values = rounded(gather(part, passed.support).cpu(), form, generator(key))
    return Payload(layout, passed.support, values, passed.ranks_told, passed.masks_told)
