"""LoRA-A2: the factors take turns, and each client returns the ranks that matter to its own data
(Koo et al. 2024, arXiv 2410.22815).

    odd rounds    A frozen, client i trains B, and S_mj = |dB_m[:, j] A_m[j, :]|_F    (equation 4)
    even rounds   B frozen, client i trains A, and S_mj = |B_m[:, j] dA_m[j, :]|_F
    client i      returns the changes of the ranks (m, j) with the largest S, over all modules m
    the server    adds the mean of the changes, counting zero for ranks that were not returned

S is how far a rank has moved the weights. As ranks of all modules compete, a client spends its
upload on the modules that its rows ask to change, and clients of unlike rows get out of one
another's way. One factor is the same at all clients, so the mean of the factors is the mean of the
products; with full uploads it is RoLoRA. The client's density `up` says which share of all r N
ranks it returns; it trains at the server's rank. The head is trained in every round and returned
whole.

Departures: the paper's clients train an epoch to choose, forget it, and train the chosen ranks
alone. Here the choice is made of the training itself, and the other ranks' changes are dropped,
which saves that epoch, at the price that the chosen ranks were trained beside others. The paper
gives B a higher learning rate than A; here the trainer has one. Both factors go down, as a client
may have been away. A message tells the chosen ranks by a mask of entries.
"""

import torch
from torch import Tensor

from fedsieve.algebra.adapter import Layout, Tree
from fedsieve.algebra.budget import Client
from fedsieve.algebra.counts import how_many
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import (
    ClientContext,
    Memory,
    Method,
    View,
    Weighting,
    compose,
    difference,
    pack,
)
from fedsieve.algebra.optim import Optimizer
from fedsieve.algebra.options import checked
from fedsieve.algebra.payload import Form, Payload
from fedsieve.algebra.sieve import Passed, dense
from fedsieve.algebra.support import Support
from fedsieve.methods.rolora import in_turns


@checked
def method(
    *,
    server: Optimizer | None = None,
    weighting: Weighting = "uniform",
    down_values: Form = "float32",
    up_values: Form = "float32",
) -> Method:
    """LoRA-A2. The share of the ranks that a client returns is the density `up` of its budget."""
    inner = compose(
        down=dense,
        up=dense,
        knobs=frozenset({"up"}),
        trained=in_turns,
        server=server,
        weighting=weighting,
        down_values=down_values,
        up_values=up_values,
    )

    def report(
        view: View, trained: Tree, memory: Memory, context: ClientContext
    ) -> tuple[Payload, Memory]:
        start, layout = view.adapter.tensors, view.layout
        change = {n: start[n] - trained[n] for n in view.moves.names}
        masks: Tree = {}
        keep = _most(layout, context.client)
        if keep is not None:
            moved = _moved(layout, {**start, **change})
            chosen = torch.zeros(moved.numel(), dtype=torch.bool)
            chosen[moved.flatten().sort(descending=True, stable=True).indices[:keep]] = True
            masks = _masks(layout, context.key.round, chosen.view(moved.shape))
        passed = Passed(Support(tuple(sorted(change)), view.support.ranks, masks), "known", "sent")
        key = context.key.at("round up values")
        return pack(layout, change, passed, up_values, key, cut_already=True), memory

    def misfit(update: Payload, sent: Support, client: Client, key: Key) -> str | None:
        layout, names = update.layout, tuple(sorted(in_turns(update.layout, key.round)))
        keep = _most(layout, client)
        every = torch.ones(len(layout.pairs), layout.rank, dtype=torch.bool)
        masks = {} if keep is None else _masks(layout, key.round, every)
        wrong = difference(update, Support(names, sent.ranks, masks), up_values, places=False)
        if wrong is not None or keep is None:
            return wrong
        held = 0
        for name, mask in update.support.masks.items():
            by_rank = mask.movedim(layout.rank_axis[name][1], 0).flatten(1)
            if not torch.equal(by_rank.any(1), by_rank.all(1)):
                return "it holds parts of ranks, and whole ones were asked"
            held += int(by_rank.any(1).sum())
        return f"it holds {held} ranks, and at most {keep} were asked" if held > keep else None

    return inner._replace(report=report, misfit=misfit)


def _most(layout: Layout, client: Client) -> int | None:
    """How many of the ranks of all modules a client returns; None for all, without masks."""
    ranks = layout.rank * len(layout.pairs)
    keep = how_many(client.budget.up, ranks)
    return keep if keep < ranks else None


def _moved(layout: Layout, tree: Tree) -> Tensor:
    """S by module and rank, (modules, r), of a tree with the one factor and the other's change."""
    rows = []
    for pair in layout.pairs:
        columns = tree[pair.b].movedim(1, 0).flatten(1).double()
        rows.append(columns.norm(dim=1) * tree[pair.a].flatten(1).double().norm(dim=1))
    return torch.stack(rows)


def _masks(layout: Layout, number: int, chosen: Tensor) -> Tree:
    """Masks of the chosen ranks (modules, r) on the factors whose turn it is."""
    masks: Tree = {}
    for name in in_turns(layout, number):
        if name in layout.rank_axis:
            pair, axis = layout.rank_axis[name]
            along = [1] * len(layout.shapes[name])
            along[axis] = layout.rank
            masks[name] = chosen[pair].view(along).expand(layout.shapes[name]).contiguous()
    return masks
