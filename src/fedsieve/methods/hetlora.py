"""HetLoRA: the first k ranks, zero padding, weights by norm (Cho et al. 2024, arXiv 2401.06432;
"HeteroLoRA" in the FSLoRA paper).

    client i gets        B[:, :k_i], A[:k_i, :]    and trains them at the server's scale
    the server averages  B = sum_i p_i pad(B_i),  A = sum_i p_i pad(A_i),
                         p_i = ||B_i A_i||_F / sum_j ||B_j A_j||_F

where pad fills up to r ranks with zeros, so ranks that few clients hold shrink towards zero. The
norm is taken over all pairs together. The server optimizer gets B - sum_i p_i pad(B_i) as its
gradient: SGD(1) is the paper's rule.

Rank self-pruning (`pruning`): a client adds to its loss

    penalty * ||B_i[:, g:]||_F ||A_i[g:, :]||_F,     g = min(ceil(gamma k_i), k_i - 1)

summed over its pairs, and if that product has become smaller in training it drops these ranks: it
returns g ranks, and from then on gets g. The last rank stays.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from fedsieve.algebra import lowrank
from fedsieve.algebra.adapter import Layout, Tree
from fedsieve.algebra.budget import Client
from fedsieve.algebra.counts import at_least_one_less
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import ClientContext, Memory, Method, State, View, compose
from fedsieve.algebra.optim import Optimizer
from fedsieve.algebra.options import checked
from fedsieve.algebra.payload import Form, Payload
from fedsieve.algebra.sieve import dense, leading
from fedsieve.algebra.support import Support


@checked
def method(
    *,
    server: Optimizer | None = None,
    weighting: Literal["norm", "uniform", "examples"] = "norm",
    pruning: bool = False,
    gamma: Annotated[float, Field(gt=0, lt=1)] = 0.85,
    penalty: NonNegativeFloat = 0.01,
    down_values: Form = "float32",
    up_values: Form = "float32",
) -> Method:
    """HetLoRA. Each client's ratio k / r comes from its budget; a pruned client's rank is lower.

    gamma, penalty: of self-pruning, see the module's head
    """
    inner = compose(
        down=leading,
        up=dense,
        knobs=frozenset({"ratio"}),
        returns="values",
        server=server,
        weighting=_product_norm if weighting == "norm" else weighting,
        down_values=down_values,
        up_values=up_values,
    )
    if not pruning:
        return inner

    def publish(plan: State, client: Client, key: Key) -> Payload:
        rank = plan.trees.get("ranks", {}).get(client.id)
        if rank is not None:
            ratio = min(client.budget.ratio, int(rank) / plan.layout.rank)
            client = client._replace(budget=client.budget._replace(ratio=ratio))
        return inner.publish(plan, client, key)

    def view(payload: Payload, memory: Memory, context: ClientContext) -> tuple[View, Memory]:
        seen, memory = inner.view(payload, memory, context)
        return seen._replace(penalty=_tail_norms(seen.adapter.layout, gamma, penalty)), memory

    def report(
        view: View, trained: Tree, memory: Memory, context: ClientContext
    ) -> tuple[Payload, Memory]:
        layout = view.adapter.layout
        tail = _tail_norms(layout, gamma, 1.0)
        keep = at_least_one_less(gamma, layout.rank)
        if keep == layout.rank or tail(trained) >= tail(view.adapter.tensors):
            return inner.report(view, trained, memory, context)
        narrow = {n: _first(t, layout, n, keep) for n, t in trained.items()}
        start = {n: _first(t, layout, n, keep) for n, t in view.adapter.tensors.items()}
        own = layout.narrow(keep, layout.scale)
        ranks = torch.arange(keep).expand(len(layout.pairs), keep)
        smaller = view._replace(
            adapter=view.adapter._replace(layout=own, tensors=start),
            support=view.support._replace(ranks=ranks),
        )
        payload, memory = inner.report(smaller, narrow, memory, context)
        return payload._replace(ranks_told="sent"), memory  # the server expects more ranks

    def misfit(update: Payload, sent: Support, client: Client, key: Key) -> str | None:
        ranks = update.support.ranks
        most = update.layout.rank if sent.ranks is None else sent.ranks.shape[1]
        # It may have dropped the last ones of those that it was sent.
        if ranks is not None and ranks.shape[1] < most:
            sent = sent._replace(ranks=torch.arange(ranks.shape[1]).expand_as(ranks))
        return inner.misfit(update, sent, client, key)

    def merge(state: State, updates: Iterable[tuple[Client, Payload]], key: Key) -> State:
        ranks: Tree = dict(state.trees.get("ranks", {}))

        def noted() -> Iterator[tuple[Client, Payload]]:
            for client, payload in updates:
                if payload.support.ranks is not None:
                    ranks[client.id] = torch.tensor(payload.support.ranks.shape[1])
                yield client, payload

        merged = inner.merge(state, noted(), key)
        return State(merged.layout, {**merged.trees, "ranks": ranks})

    return inner._replace(publish=publish, view=view, report=report, misfit=misfit, merge=merge)


def _product_norm(part: Tree, own: Layout) -> float:
    """||B_i A_i||_F over all pairs together."""
    norms = [float(lowrank.product_norm(part[p.b], part[p.a])) for p in own.pairs]
    return float(sum(n * n for n in norms) ** 0.5)


def _tail_norms(layout: Layout, gamma: float, penalty: float) -> Callable[[Tree], Tensor]:
    keep = at_least_one_less(gamma, layout.rank)

    def tail(tree: Tree) -> Tensor:
        total = torch.zeros(())
        for pair in layout.pairs:
            # The square root's slope is infinite at zero, where B starts.
            b = (tree[pair.b][:, keep:].square().sum() + 1e-12).sqrt()
            a = (tree[pair.a][keep:].square().sum() + 1e-12).sqrt()
            total = total + a * b
        return penalty * total

    return tail


def _first(tensor: Tensor, layout: Layout, name: str, keep: int) -> Tensor:
    if name not in layout.rank_axis:
        return tensor
    return tensor.narrow(layout.rank_axis[name][1], 0, keep)
