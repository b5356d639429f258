"""Pruned adapters: a state that remembers which entries are live, and messages of these alone.

SparseAdapter prunes once, Adapter LTH a little every round. The live entries are masks in the
state's tree "live", without the tensors that nothing was pruned from; there is no such tree before
the first pruning.
"""

from collections.abc import Callable, Iterable
from math import ceil
from typing import Literal

from fedsieve.algebra.budget import Client
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import Method, State, Weighting, compose, pack
from fedsieve.algebra.optim import Optimizer
from fedsieve.algebra.payload import Form, Payload
from fedsieve.algebra.sieve import Passed, competing, dense
from fedsieve.algebra.support import Support, masked, top_k


def pruned(state: State, keep: float, head: Literal["sieved", "whole"]) -> State:
    """The state with the largest `keep` share of its live entries left, all others zero.

    All tensors compete together; head = "whole" leaves those outside the LoRA pairs alone.
    """
    layout, tree = state.layout, state.trees["adapter"]
    among = competing(layout.names, layout, head)
    live = state.trees.get("live", {})
    tree = masked(tree, live)
    if keep < 1:
        size = sum(tree[n].numel() for n in among)
        before = sum(int(live[n].sum()) for n in among) if live else size
        masks = top_k(tree, ceil(keep * before) / size, among)
        # Among equals (zeros) top_k takes the first ones: what is dead stays dead.
        live = {n: m & live[n] if live else m for n, m in masks.items()}
        tree = masked(tree, live)
    trees = {**state.trees, "adapter": tree}
    return State(layout, {**trees, "live": live} if live else trees)


def live_only(
    prune: Callable[[State], State],
    *,
    server: Optimizer | None,
    weighting: Weighting,
    down_values: Form,
    up_values: Form,
) -> Method:
    """Clients get the live entries, train these alone and return exactly these.

    prune: what the server does to its state after each round. An upload's masks cost nothing: the
           server sent them.
    """
    inner = compose(
        down=dense,
        up=dense,
        freeze_absent=True,
        server=server,
        weighting=weighting,
        down_values=down_values,
        up_values=up_values,
    )

    def publish(plan: State, client: Client, key: Key) -> Payload:
        live = plan.trees.get("live", {})
        if not live:
            return inner.publish(plan, client, key)
        passed = Passed(Support(plan.layout.names, None, live), "known", "sent")
        key = key.at("round down values")
        return pack(plan.layout, plan.trees["adapter"], passed, down_values, key)

    def merge(state: State, updates: Iterable[tuple[Client, Payload]], key: Key) -> State:
        return prune(inner.merge(state, updates, key))

    return inner._replace(publish=publish, merge=merge)
