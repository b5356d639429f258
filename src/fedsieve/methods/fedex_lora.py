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

from fedsieve.algebra import lowrank
from fedsieve.algebra.adapter import Adapter
from fedsieve.algebra.budget import Client
from fedsieve.algebra.catchup import catch_up, fold, missing
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import (
    ClientContext,
    Memory,
    Method,
    State,
    View,
    Weighting,
    compose,
    unscaled,
)
from fedsieve.algebra.optim import Optimizer, sgd
from fedsieve.algebra.options import checked
from fedsieve.algebra.payload import Form, Payload
from fedsieve.algebra.replacing import collect, means
from fedsieve.algebra.sieve import dense


@checked
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

    def view(payload: Payload, memory: Memory, context: ClientContext) -> tuple[View, Memory]:
        memory = catch_up(payload.base, memory, payload.layout, context.key.round)
        seen, memory = inner.view(payload, memory, context)
        return seen._replace(adapter=seen.adapter._replace(base=memory.get("base", {}))), memory

    def merge(state: State, updates: Iterable[tuple[Client, Payload]], key: Key) -> State:
        state, stacks, members = collect(
            optimizer, state, updates, key, weighting=weighting, rescale=unscaled
        )
        tree, factors = dict(state.trees["adapter"]), {}
        for pair in state.layout.pairs:
            stack = stacks[pair.module]
            mean_b, mean_a = means(stack)
            b, factors[pair.a] = lowrank.stacked([*stack, (-1.0, mean_b, mean_a)])
            factors[pair.b] = state.layout.scale * b
            tree[pair.b], tree[pair.a] = mean_b, mean_a
        state = State(state.layout, {**state.trees, "adapter": tree})
        return fold(state, factors, members, key.round)

    def export(state: State) -> Adapter:
        return Adapter(state.layout, state.trees["adapter"], state.trees.get("base", {}))

    return inner._replace(publish=publish, view=view, merge=merge, export=export)
