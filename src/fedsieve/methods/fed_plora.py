"""Fed-PLoRA: a client trains some ranks and folds the others into its base (Zhang et al. 2026,
arXiv 2602.16936, ICLR 2026; "Select-N-Fold").

An adapter of rank r is r modules of rank one beside each other, s B A = sum_j s b_j a_j. Each round

    client i draws    I, uniform over the subsets of k_i of the r modules
    it starts from    W_i = W0 + sum over j not in I of s b_j a_j,  and the modules of I as they are
    the server sets   b_j, a_j to the mean of what those returned who trained module j

so that W_i with what is trained is the server's own model to begin with, whatever k_i (no "noise
at the start"), and no module is shrunk by clients that did not hold it. A module that nobody drew
stays as it is. Where all clients afford every rank, it is FedIT.

The download is the whole adapter: the modules of I as such, the others as a change of the base that
counts from W0, and that the client drops after its round. The upload is the modules of I. The head
goes both ways whole, and its mean is over all.

The rule is from the paper's abstract and from summaries; its text was not at hand. Chosen here: one
draw a client and round for all layers (`shared = false`: one a layer), told by a seed of 8 bytes;
all modules have the server's scale s, whatever k_i; the server optimizer gets b_j less its mean as
its gradient, so that SGD(1) is the rule, and zero for a module that nobody drew.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from fedsieve.algebra.adapter import Layout, Tree, base_layout
from fedsieve.algebra.budget import Client
from fedsieve.algebra.catchup import catch_up
from fedsieve.algebra.keys import Key, generator
from fedsieve.algebra.method import (
    ClientContext,
    Memory,
    Method,
    State,
    View,
    Weighting,
    compose,
    share_of,
    step,
)
from fedsieve.algebra.optim import Optimizer, sgd
from fedsieve.algebra.options import checked
from fedsieve.algebra.payload import Base, Form, Payload, rounded
from fedsieve.algebra.sieve import dense, sketch
from fedsieve.algebra.support import add_back, cut, everything, gather
from fedsieve.errors import NoUsableUpdate


@checked
def method(
    *,
    server: Optimizer | None = None,
    shared: bool = True,
    weighting: Weighting = "uniform",
    down_values: Form = "float32",
    up_values: Form = "float32",
) -> Method:
    """Fed-PLoRA. Each client's ratio k / r comes from its budget; `shared` as in `fslora`."""
    optimizer = sgd() if server is None else server
    inner = compose(
        down=sketch(shared=shared),
        up=dense,
        knobs=frozenset({"ratio"}),
        returns="values",
        server=server,
        weighting=weighting,
        down_values=down_values,
        up_values=up_values,
    )

    def publish(plan: State, client: Client, key: Key) -> Payload:
        payload = inner.publish(plan, client, key)
        ranks = payload.support.ranks
        if ranks is None or not plan.layout.pairs:
            return payload
        folded = _others(plan, ranks)
        layout = base_layout(plan.layout, plan.layout.rank - ranks.shape[1])
        support, draws = everything(layout), generator(key.at("round folded values"))
        values = rounded(gather(folded, support).cpu(), down_values, draws)
        return payload._replace(base=Base(0, Payload(layout, support, values, "known", "known")))

    def view(payload: Payload, memory: Memory, context: ClientContext) -> tuple[View, Memory]:
        seen, memory = inner.view(payload, memory, context)
        folded = catch_up(payload.base, {}, payload.layout, context.key.round).get("base", {})
        return seen._replace(adapter=seen.adapter._replace(base=folded)), memory

    def merge(state: State, updates: Iterable[tuple[Client, Payload]], key: Key) -> State:
        layout, params = state.layout, state.trees["adapter"]
        total = {n: torch.zeros_like(p) for n, p in params.items()}
        trained = torch.zeros(len(layout.pairs), layout.rank, dtype=torch.float64)
        weight = 0.0
        for client, payload in updates:
            share, ranks = share_of(client, weighting), payload.support.ranks
            add_back(total, payload.tree(), layout, ranks, share)
            own = (
                torch.ones_like(trained, dtype=torch.bool) if ranks is None else _at(layout, ranks)
            )
            weight, trained = weight + share, trained + share * own
        if weight == 0:
            raise NoUsableUpdate("no client returned an update that can be merged")
        change = {}
        for name, start in params.items():
            by = torch.tensor(weight)
            if name in layout.rank_axis:
                pair, axis = layout.rank_axis[name]
                by = trained[pair].reshape([-1 if a == axis else 1 for a in range(start.ndim)])
            by = by.to(start)
            mean = total.pop(name).div_(by.clamp(min=torch.finfo(by.dtype).tiny))
            change[name] = torch.where(by > 0, start - mean, 0)
        return step(optimizer, state, change, layout.names)

    return inner._replace(publish=publish, view=view, merge=merge)


def _at(layout: Layout, ranks: Tensor) -> Tensor:
    """Which ranks of each pair these are: (pairs, r)."""
    none = torch.zeros(len(layout.pairs), layout.rank, dtype=torch.bool)
    return none.scatter(1, ranks, True)


def _others(plan: State, ranks: Tensor) -> Tree:
    """The pairs at all other ranks, the scale inside B."""
    layout, tree = plan.layout, plan.trees["adapter"]
    others = (~_at(layout, ranks)).nonzero()[:, 1].reshape(len(layout.pairs), -1)
    pairs = cut({n: tree[n] for n in layout.names if n in layout.rank_axis}, layout, others)
    return pairs | {p.b: layout.scale * pairs[p.b] for p in layout.pairs}
