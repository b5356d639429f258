"""Sieves: the choices of the coordinates that travel.

A sieve looks at a tree and says which of its coordinates pass, and how the receiver learns which.
Both papers are sieves: FSLoRA passes some ranks, FLASC the largest entries. `within` puts one
sieve inside another, which is all that their combination takes.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch

from fedsieve.algebra.adapter import Layout, Tree
from fedsieve.algebra.budget import Client
from fedsieve.algebra.counts import exact
from fedsieve.algebra.keys import Key, word
from fedsieve.algebra.payload import Seed
from fedsieve.algebra.support import Support, cut, draw_ranks, narrowed
from fedsieve.algebra.support import top_k as largest


class Passed(NamedTuple):
    """What passes, and how the receiver is told (see `payload.Payload`)."""

    support: Support
    ranks_told: Literal["known", "sent"] | Seed
    masks_told: Literal["known", "sent"]


Sieve = Callable[[Tree, Layout, Client, Key], Passed]
Choice = Callable[[Layout, int], tuple[str, ...]]  # the names of some tensors, given the round


def every_name(layout: Layout, number: int) -> tuple[str, ...]:
    """All tensors."""
    return layout.names


def all_but_a(layout: Layout, number: int) -> tuple[str, ...]:
    """Every B, and the tensors outside the pairs."""
    return tuple(n for n in layout.names if layout.rank_axis.get(n, (0, 1))[1] == 1)


def all_but_b(layout: Layout, number: int) -> tuple[str, ...]:
    """Every A, and the tensors outside the pairs."""
    return tuple(n for n in layout.names if layout.rank_axis.get(n, (0, 0))[1] == 0)


def no_pairs(layout: Layout, number: int) -> tuple[str, ...]:
    """The tensors outside the pairs: a classifier head, modules that are trained whole."""
    return tuple(n for n in layout.names if n not in layout.rank_axis)


def dense(tree: Tree, layout: Layout, client: Client, key: Key) -> Passed:
    """Everything in the tree passes."""
    return Passed(Support(tuple(sorted(tree)), None, {}), "known", "known")


def only(choice: Choice) -> Sieve:
    """The chosen tensors pass, whole."""

    def sieve(tree: Tree, layout: Layout, client: Client, key: Key) -> Passed:
        names = tuple(n for n in choice(layout, key.round) if n in tree)
        return Passed(Support(names, None, {}), "known", "known")

    return sieve


def leading(tree: Tree, layout: Layout, client: Client, key: Key) -> Passed:
    """The first k of the r ranks pass, k from the client's budget (HetLoRA's truncation)."""
    keep = client.budget.ranks(layout.rank)
    if keep == layout.rank:
        return dense(tree, layout, client, key)
    ranks = torch.arange(keep).expand(len(layout.pairs), keep)
    return Passed(Support(tuple(sorted(tree)), ranks, {}), "sent", "known")


def top_ranks(tree: Tree, layout: Layout, client: Client, key: Key) -> Passed:
    """The k ranks of each pair with the largest norms pass, k from the client's budget.

    A rank's norm is that of its row of A and its column of B together, so that ranks differ even
    where B is still zero.
    """
    keep = client.budget.ranks(layout.rank)
    if keep == layout.rank:
        return dense(tree, layout, client, key)
    rows = []
    for pair in layout.pairs:
        a, b = tree[pair.a].flatten(1), tree[pair.b].transpose(0, 1).flatten(1)
        norms = (a * a).sum(1) + (b * b).sum(1)
        rows.append(norms.sort(descending=True, stable=True).indices[:keep].sort().values)
    ranks = torch.stack(rows).cpu()
    return Passed(Support(tuple(sorted(tree)), ranks, {}), "sent", "known")


def sketch(*, shared: bool = True) -> Sieve:
    """k of the r ranks pass, drawn uniformly, k from the client's budget (FSLoRA, Definition 3.1).

    shared: one draw a client and round for all modules, as in the paper; else one a module.
    A client that can afford every rank gets them all, and nothing is drawn.
    """

    def sieve(tree: Tree, layout: Layout, client: Client, key: Key) -> Passed:
        keep = client.budget.ranks(layout.rank)
        if keep == layout.rank:
            return dense(tree, layout, client, key)
        seed = Seed(word(key.at("sketch")), shared)
        ranks = draw_ranks(seed.word, len(layout.pairs), layout.rank, keep, shared=shared)
        return Passed(Support(tuple(sorted(tree)), ranks, {}), seed, "known")

    return sieve


def competing(
    names: tuple[str, ...], layout: Layout, head: Literal["sieved", "whole"]
) -> tuple[str, ...]:
    """The tensors whose entries compete for a density: all, or those of the pairs alone."""
    return tuple(n for n in names if head == "sieved" or n in layout.rank_axis)


def top_k(
    way: Literal["down", "up"],
    *,
    head: Literal["sieved", "whole"] = "sieved",
    decay: float = 1.0,
    least: float = 0.0,
) -> Sieve:
    """The entries of largest magnitude pass, the density from the client's budget for that way.

    All tensors compete together, not each apart (FLASC, Algorithm 1). head = "whole" lets the
    tensors outside the LoRA pairs pass untouched; the density then counts LoRA entries alone.
    decay: the density of round t is the budget's times decay ** (t - 1), but not under `least`
    """

    def sieve(tree: Tree, layout: Layout, client: Client, key: Key) -> Passed:
        names = tuple(sorted(tree))
        among = competing(names, layout, head)
        budget = exact(getattr(client.budget, way))
        density = max(exact(least), budget * exact(decay) ** max(0, key.round - 1))
        masks = largest(tree, min(density, budget), among)
        # "sent" even where there are none: the other end may hold masks of the way here.
        return Passed(Support(names, None, masks), "known", "sent")

    return sieve


def nonzero(inner: Sieve) -> Sieve:
    """Of the entries that a sieve's masks let pass, those that are not zero.

    Where a change is ranked (`method.since_start`), zero is no news: before anything has moved, the
    largest entries are ties, the first ones by name. What passes without masks is left alone.
    """

    def sieve(tree: Tree, layout: Layout, client: Client, key: Key) -> Passed:
        passed = inner(tree, layout, client, key)
        names, ranks, masks = passed.support
        held = cut({n: tree[n] for n in masks}, layout, ranks)
        news = {n: mask & (held[n] != 0).cpu() for n, mask in masks.items()}
        return passed._replace(support=Support(names, ranks, news))

    return sieve


def after(rounds: int, sieve: Sieve) -> Sieve:
    """Everything passes in the first rounds, and after them what the sieve says."""

    def waiting(tree: Tree, layout: Layout, client: Client, key: Key) -> Passed:
        return (dense if key.round <= rounds else sieve)(tree, layout, client, key)

    return waiting


def within(ranks: Sieve, entries: Sieve) -> Sieve:
    """First a sieve of ranks, then a sieve of single entries inside the ranks that passed it."""

    def sieve(tree: Tree, layout: Layout, client: Client, key: Key) -> Passed:
        outer = ranks(tree, layout, client, key)
        kept = outer.support.ranks
        inner = entries(cut(tree, layout, kept), narrowed(layout, kept), client, key)
        support = Support(inner.support.names, kept, inner.support.masks)
        return Passed(support, outer.ranks_told, inner.masks_told)

    return sieve
