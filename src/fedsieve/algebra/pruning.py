"""Pruned adapters: a state that remembers which entries are live, and messages of these alone.

SparseAdapter prunes once, Adapter LTH a little every round. The live entries are masks in the
state's tree "live", without the tensors that nothing was pruned from; there is no such tree before
the first pruning.
"""

from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Literal

from fedsieve.algebra.budget import Client
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import Method, State, Weighting, compose, pack
from fedsieve.algebra.optim import Optimizer
from fedsieve.algebra.payload import Form, Payload
from fedsieve.algebra.sieve import Passed, competing, dense
from fedsieve.algebra.support import Support, masked, top_k


def pruned(state: State, share: float | Fraction, head: Literal["sieved", "whole"]) -> State:
    """The state with the largest `share` of its entries live, and all others zero.

    share: of all the entries, those that are dead already counted with them, so that what is left
           after many prunings does not depend on how each of them was rounded. What is dead stays
           dead.
    All tensors compete together; head = "whole" leaves those outside the LoRA pairs alone.
    """
    layout, tree = state.layout, state.trees["adapter"]
    among = competing(layout.names, layout, head)
    live = state.trees.get("live", {})
    masks = top_k(tree, share, among, live)
    live = {n: m & live[n] if n in live else m for n, m in masks.items()} or live
    trees = {**state.trees, "adapter": masked(tree, live)}
    return State(layout, {**trees, "live": live} if live else trees)


def live_only(
    prune: Callable[[State, int], State],
    *,
    server: Optimizer | None,
    weighting: Weighting,
    down_values: Form,
    up_values: Form,
) -> Method:
    """Clients get the live entries, train these alone and return exactly these.

    prune: what the server does to its state after each round, by its number. An upload's masks cost
           nothing: the server sent them.
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
        return prune(inner.merge(state, updates, key), key.round)

    return inner._replace(publish=publish, merge=merge)
