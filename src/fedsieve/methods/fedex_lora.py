"""FedEx-LoRA: FedIT, and what its mean of factors misses goes into the base (Singhal et al. 2024,
arXiv 2410.09432).

    B = mean_i B_i,   A = mean_i A_i
    W <- W + s ( mean_i (B_i A_i) - B A )

After that s B A together with W is the exact mean of the clients' models. The residual is kept as
factors, [B_1/n ... B_n/n, -B] [A_1; ...; A_n; A], of rank (n + 1) r; as with FLoRA, clients that
were away get what they missed (`catchup`), and those bytes are counted. All clients have the
server's rank. Pairs are replaced by their means; the server optimizer moves the head alone.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from fedsieve.adapter import Adapter, Tree
from fedsieve.budget import Client
from fedsieve.catchup import catch_up, fold, missing
from fedsieve.errors import NoUsableUpdate
from fedsieve.keys import Key
from fedsieve.method import Memory, Method, Seat, State, View, Weighting, compose, step
from fedsieve.optim import Optimizer, sgd
from fedsieve.payload import Form, Payload
from fedsieve.sieve import dense, no_pairs


def method(
    *,
    server: Optimizer | None = None,
    weighting: Weighting = "uniform",
    down_values: Form = "float32",
    up_values: Form = "float32",
) -> Method:
    """FedEx-LoRA. Budgets have no say."""
    optimizer = sgd() if server is None else server
    inner = compose(
        down=dense,
        up=dense,
        returns="values",
        server=server,
        weighting=weighting,
        down_values=down_values,
        up_values=up_values,
    )

    def publish(plan: State, client: Client, key: Key) -> Payload:
        payload = inner.publish(plan, client, key)
        return payload._replace(base=missing(plan, client, key.round))

    def view(payload: Payload, memory: Memory, seat: Seat) -> tuple[View, Memory]:
        memory = catch_up(payload.base, memory, payload.layout, seat.key.round)
        seen, memory = inner.view(payload, memory, seat)
        return seen._replace(adapter=seen.adapter._replace(base=memory.get("base", {}))), memory

    def merge(state: State, updates: Iterable[tuple[Client, Payload]], key: Key) -> State:
        layout, params = state.layout, state.trees["adapter"]
        total: Tree = {n: p * 0 for n, p in params.items()}
        stacks: dict[str, list[Tensor]] = {n: [] for n in layout.rank_axis}
        members: list[str] = []
        weight = 0.0
        for client, payload in updates:
            part = payload.tree()
            share = float(client.examples) if weighting == "examples" else 1.0
            weight += share
            members.append(client.id)
            total = {n: t + share * part[n] for n, t in total.items()}
            for pair in layout.pairs:
                stacks[pair.b].append(share * part[pair.b])
                stacks[pair.a].append(part[pair.a])
        if weight == 0:
            raise NoUsableUpdate("no client returned an update that can be merged")
        mean = {n: t / weight for n, t in total.items()}
        heads = no_pairs(layout, key.round)
        state = step(optimizer, state, {n: params[n] - mean[n] for n in heads}, heads)
        factors: Tree = {}
        for pair in layout.pairs:
            b = torch.cat([*stacks[pair.b], -weight * mean[pair.b]], dim=1)
            factors[pair.b] = b * (layout.scale / weight)
            factors[pair.a] = torch.cat([*stacks[pair.a], mean[pair.a]], dim=0)
        pairs = {n: mean[n] for n in layout.rank_axis}
        tree = {**state.trees["adapter"], **pairs}
        state = State(layout, {**state.trees, "adapter": dict(sorted(tree.items()))})
        return fold(state, factors, members, key.round)

    def export(state: State) -> Adapter:
        return Adapter(state.layout, state.trees["adapter"], state.trees.get("base", {}))

    return inner._replace(publish=publish, view=view, merge=merge, export=export)
