"""Sieves: the choices of the coordinates that travel.

A sieve looks at a tree and says which of its coordinates pass, and how the receiver learns which.
Both papers are sieves: FSLoRA passes some ranks, FLASC the largest entries. `within` puts one
sieve inside another, which is all that their combination takes.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

from fedsieve.adapter import Layout, Tree
from fedsieve.budget import Client
from fedsieve.keys import Key, word
from fedsieve.payload import Seed
from fedsieve.support import Support, cut, draw_ranks, everything, narrowed
from fedsieve.support import top_k as largest


class Passed(NamedTuple):
    """What passes, and how the receiver is told (see `payload.Payload`)."""

    support: Support
    ranks_told: Literal["known", "sent"] | Seed
    masks_told: Literal["known", "sent"]


Sieve = Callable[[Tree, Layout, Client, Key], Passed]


def dense(tree: Tree, layout: Layout, client: Client, key: Key) -> Passed:
    """Everything passes."""
    return Passed(everything(layout), "known", "known")


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
        return Passed(Support(layout.names, ranks, {}), seed, "known")

    return sieve


def top_k(way: Literal["down", "up"], *, head: Literal["sieved", "whole"] = "sieved") -> Sieve:
    """The entries of largest magnitude pass, the density from the client's budget for that way.

    All tensors compete together, not each apart (FLASC, Algorithm 1). head = "whole" lets the
    tensors outside the LoRA pairs pass untouched; the density then counts LoRA entries alone.
    """

    def sieve(tree: Tree, layout: Layout, client: Client, key: Key) -> Passed:
        among = tuple(n for n in layout.names if head == "sieved" or n in layout.rank_axis)
        masks = largest(tree, getattr(client.budget, way), among)
        return Passed(Support(layout.names, None, masks), "known", "sent" if masks else "known")

    return sieve


def within(ranks: Sieve, entries: Sieve) -> Sieve:
    """First a sieve of ranks, then a sieve of single entries inside the ranks that passed it."""

    def sieve(tree: Tree, layout: Layout, client: Client, key: Key) -> Passed:
        outer = ranks(tree, layout, client, key)
        kept = outer.support.ranks
        inner = entries(cut(tree, layout, kept), narrowed(layout, kept), client, key)
        support = Support(layout.names, kept, inner.support.masks)
        return Passed(support, outer.ranks_told, inner.masks_told)

    return sieve
