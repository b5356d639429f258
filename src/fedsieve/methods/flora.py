"""FLoRA: stack the adapters, fold them into the base, start afresh (Wang et al. 2024,
arXiv 2409.05976; "stacking", FedStackLoRA).

    client i starts   A_i random, B_i = 0, at its own rank k_i, and trains W + s_i B_i A_i
    W <- W + sum_i w_i s_i B_i A_i  =  W + [w_1 s_1 B_1 ... w_n s_n B_n] [A_1; ...; A_n]

Stacking loses nothing, whatever the ranks, but the stack of the last round is what goes down, and a
client that was away needs every stack that it missed: `catchup` keeps that log, and those bytes are
counted (the paper's clients all take part in every round). Clients draw A_i themselves, so a
download is the stacks and the head. The global model is the changed base with an adapter that is
still zero. The server optimizer moves the head alone.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from fedsieve.algebra import lowrank
from fedsieve.algebra.adapter import Adapter, Tree
from fedsieve.algebra.budget import Client
from fedsieve.algebra.catchup import catch_up, fold, missing
from fedsieve.algebra.keys import Key, generator
from fedsieve.algebra.method import (
    SCALINGS,
    ClientContext,
    Memory,
    Method,
    Scaling,
    State,
    View,
    Weighting,
    compose,
    pack,
)
from fedsieve.algebra.optim import Optimizer, sgd
from fedsieve.algebra.options import checked
from fedsieve.algebra.payload import Form, Payload
from fedsieve.algebra.replacing import collect
from fedsieve.algebra.sieve import dense, leading, no_pairs, only
from fedsieve.algebra.support import Support


@checked
def method(
    *,
    server: Optimizer | None = None,
    scaling: Scaling = "server",
    weighting: Weighting = "uniform",
    down_values: Form = "float32",
    up_values: Form = "float32",
) -> Method:
    """FLoRA. Each client's ratio k / r comes from its budget. `scaling` as in `flexlora`."""
    rescale = SCALINGS[scaling]
    optimizer = sgd() if server is None else server
    inner = compose(
        down=only(no_pairs),
        up=dense,
        knobs=frozenset({"ratio"}),
        rescale=rescale,
        returns="values",
        server=server,
        weighting=weighting,
        down_values=down_values,
        up_values=up_values,
    )

    def init(adapter: Adapter) -> State:
        state = inner.init(adapter)
        zeros = {p.b: torch.zeros_like(adapter.tensors[p.b]) for p in adapter.layout.pairs}
        return State(state.layout, {**state.trees, "adapter": {**adapter.tensors, **zeros}})

    def publish(plan: State, client: Client, key: Key) -> Payload:
        layout, tree = plan.layout, plan.trees["adapter"]
        passed = leading(tree, layout, client, key)
        support = Support(no_pairs(layout, key.round), passed.support.ranks, {})
        passed = passed._replace(support=support)
        payload = pack(layout, tree, passed, down_values, key.at("round down values"))
        return payload._replace(base=missing(plan, client, key.round))

    def view(payload: Payload, memory: Memory, context: ClientContext) -> tuple[View, Memory]:
        memory = catch_up(payload.base, memory, payload.layout, context.key.round)
        seen, memory = inner.view(payload, memory, context)
        tensors = dict(seen.adapter.tensors)
        for pair in payload.layout.pairs:
            tensors[pair.b] = torch.zeros_like(tensors[pair.b])
            tensors[pair.a] = _fresh(tensors[pair.a], context.key.at(f"fresh {pair.a}"))
        base = memory.get("base", {})
        return seen._replace(adapter=Adapter(seen.adapter.layout, tensors, base)), memory

    def merge(state: State, updates: Iterable[tuple[Client, Payload]], key: Key) -> State:
        state, stacks, members = collect(
            optimizer, state, updates, key, weighting=weighting, rescale=rescale
        )
        factors: Tree = {}
        for pair in state.layout.pairs:
            b, factors[pair.a] = lowrank.stacked(stacks[pair.module])
            factors[pair.b] = state.layout.scale * b
        return fold(state, factors, members, key.round)

    def export(state: State) -> Adapter:
        return Adapter(state.layout, state.trees["adapter"], state.trees.get("base", {}))

    return inner._replace(init=init, publish=publish, view=view, merge=merge, export=export)


def _fresh(like: Tensor, key: Key) -> Tensor:
    """A as PEFT draws it: uniform within 1 / sqrt(n), n the numbers of a row."""
    limit = 1 / like[0].numel() ** 0.5
    fresh = torch.empty(like.shape, dtype=like.dtype)
    return fresh.uniform_(-limit, limit, generator=generator(key))
