"""Pruned adapters: a state that remembers which entries are live, and messages of these alone.

SparseAdapter prunes once, Adapter LTH a little every round. The live entries are masks in the
state's tree "live", without the tensors that nothing was pruned from; there is no such tree before
the first pruning.
"""

from collections.abc import Callable
from math import ceil
from typing import Literal

import torch

from fedsieve.adapter import Tree
from fedsieve.budget import Client
from fedsieve.keys import Key
from fedsieve.method import State, pack
from fedsieve.payload import Form, Payload
from fedsieve.sieve import Passed
from fedsieve.support import Support, top_k

Publish = Callable[[State, Client, Key], Payload]


def pruned(state: State, keep: float, head: Literal["sieved", "whole"]) -> State:
    """The state with the largest `keep` share of its live entries left, all others zero.

    All tensors compete together; head = "whole" leaves those outside the LoRA pairs alone.
    """
    layout, tree = state.layout, state.trees["adapter"]
    among = tuple(n for n in layout.names if head == "sieved" or n in layout.rank_axis)
    live = state.trees.get("live", {})
    tree = {n: t * live[n] if n in live else t for n, t in tree.items()}
    if keep < 1:
        size = sum(tree[n].numel() for n in among)
        before = sum(int(live[n].sum()) for n in among) if live else size
        masks = top_k(tree, ceil(keep * before) / size, among)
        # Among equals (zeros) top_k takes the first ones: what is dead stays dead.
        live = {n: m & live[n] if live else m for n, m in masks.items()}
        tree = {n: t * live[n] if n in live else t for n, t in tree.items()}
    trees = {**state.trees, "adapter": tree}
    return State(layout, {**trees, "live": live} if live else trees)


def publish_live(publish: Publish, form: Form) -> Publish:
    """Publish the live entries alone, once there are any that are not."""

    def publish_pruned(plan: State, client: Client, key: Key) -> Payload:
        live: Tree = plan.trees.get("live", {})
        if not live:
            return publish(plan, client, key)
        masks = {n: m.to(torch.bool) for n, m in live.items()}
        passed = Passed(Support(plan.layout.names, None, masks), "known", "sent")
        key = key.at("round down values")
        return pack(plan.layout, plan.trees["adapter"], passed, form, key)

    return publish_pruned
