"""FedSVD: clients train B, and the server turns both factors anew (Lee et al. 2025,
arXiv 2505.12805).

    client i trains    W0 + s B_i A,  A frozen, and returns the change of B_i
    the server         B <- B - step(mean_i of the changes),   B A = U D V^T
                       A <- V^T,   B <- U D

All clients share A, so the mean of the factors is the mean of the products, as in FFA-LoRA, but A
does not stay what chance made it: its rows are the directions in which the clients moved, all of
length 1 and none leaning on another. No noise on B is multiplied by noise on A, and what is done to
B A after the mean is post-processing, so it can be private, which is the paper's aim. Turning
changes no product.

Where B A has fewer than r singular values, V is filled up from the rows of A, so that every rank
can go on learning (`lowrank.turned`). As A changes in every round, both factors go down; B and the
head come up.

Chosen here: what the server optimizer keeps of B (momentum, moments) begins anew in every round,
for after the turn the columns of B mean something else. A mean of changes, the default, keeps
nothing.
"""

from collections.abc import Iterable

from fedsieve.algebra import lowrank
from fedsieve.algebra.budget import Client
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import Method, State, Weighting, compose
from fedsieve.algebra.optim import Optimizer, slots_of
from fedsieve.algebra.options import checked
from fedsieve.algebra.payload import Form, Payload
from fedsieve.algebra.sieve import all_but_a, dense


@checked
def method(
    *,
    server: Optimizer | None = None,
    weighting: Weighting = "uniform",
    down_values: Form = "float32",
    up_values: Form = "float32",
) -> Method:
    """FedSVD. Budgets have no say."""
    inner = compose(
        down=dense,
        up=dense,
        trained=all_but_a,
        server=server,
        weighting=weighting,
        down_values=down_values,
        up_values=up_values,
    )

    def merge(state: State, updates: Iterable[tuple[Client, Payload]], key: Key) -> State:
        merged = inner.merge(state, updates, key)
        tree = dict(merged.trees["adapter"])
        for pair in state.layout.pairs:
            tree[pair.b], tree[pair.a] = lowrank.turned(tree[pair.b], tree[pair.a])
        columns = {pair.b: tree[pair.b] for pair in state.layout.pairs}
        fresh = slots_of(inner.server, columns)
        slots = {
            group: {**kept, **{n: t for n, t in fresh.get(group, {}).items() if n in columns}}
            for group, kept in merged.trees.items()
        }
        return State(state.layout, {**slots, "adapter": tree})

    return inner._replace(merge=merge)
