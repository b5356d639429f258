"""Which coordinates of an adapter travel.

A support narrows in two steps. First it may keep some ranks of every pair: the SAME indices choose
rows of A and columns of B (FSLoRA, Definition 3.1). Then it may keep single entries of the tensors
that are left (FLASC's masks). A client's own tree has the narrowed shapes, so it really holds an
adapter of rank k; the server's tree keeps the full ones.
"""

import hashlib
import math
import struct
from collections.abc import Mapping
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedsieve.algebra.adapter import Layout, Tree
from fedsieve.algebra.counts import how_many


class Support(NamedTuple):
    """The coordinates of a layout that travel.

    names: the tensors that travel at all, in sorted order
    ranks: (pairs, k) int64, each row rising: the ranks kept of each pair; None keeps all
    masks: name -> bool of the narrowed shape: the entries kept; a tensor without a mask goes whole
    """

    names: tuple[str, ...]
    ranks: Tensor | None
    masks: dict[str, Tensor]


def everything(layout: Layout) -> Support:
    """All coordinates."""
    return Support(layout.names, None, {})


def equal(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two sets of ranks, or two masks, are the same; None is equal to None alone."""
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)


def narrowed(layout: Layout, ranks: Tensor | None, scale: float | None = None) -> Layout:
    """The layout at the rank that `ranks` keeps; `scale` replaces the layout's own."""
    kept = layout.rank if ranks is None else ranks.shape[1]
    return layout.narrow(kept, layout.scale if scale is None else scale)


def cut(tree: Tree, layout: Layout, ranks: Tensor | None) -> Tree:
    """The tree at the kept ranks: A (r, n) -> (k, n), B (m, r) -> (m, k). No ranks, no copy."""
    if ranks is None:
        return tree
    cut_tree: Tree = {}
    for name, tensor in tree.items():
        if name in layout.rank_axis:
            pair, axis = layout.rank_axis[name]
            tensor = tensor.index_select(axis, ranks[pair].to(tensor.device))
        cut_tree[name] = tensor
    return cut_tree


def add_back(total: Tree, part: Tree, layout: Layout, ranks: Tensor | None, weight: float) -> None:
    """total += weight * part, the part's ranks put back where `cut` took them. In place."""
    for name, tensor in part.items():
        if ranks is not None and name in layout.rank_axis:
            pair, axis = layout.rank_axis[name]
            index = ranks[pair].to(tensor.device)
            total[name].index_add_(axis, index, tensor.to(total[name].dtype), alpha=weight)
        else:
            total[name].add_(tensor, alpha=weight)


def norm(tree: Tree) -> float:
    """The L2 norm over all entries of a tree together, in float64."""
    return math.sqrt(sum(float(t.double().square().sum()) for t in tree.values()))


def masked(tree: Tree, masks: Mapping[str, Tensor]) -> Tree:
    """The tree with zeros off the masks; tensors without a mask are as they are."""
    return {n: t * masks[n] if n in masks else t for n, t in tree.items()}


def gather(tree: Tree, support: Support) -> Tensor:
    """The entries of a narrowed tree that travel, in order of name and then of place: (n,)."""
    if not support.names:
        return torch.empty(0)
    flat = torch.cat([tree[name].reshape(-1) for name in support.names])
    mask = _flat_mask(support, {name: tree[name].shape for name in support.names})
    return flat if mask is None else flat.masked_select(mask.to(flat.device))


def scatter(values: Tensor, support: Support, layout: Layout) -> Tree:
    """The narrowed tree that has `values` (n,) on the support and zeros off it; undoes `gather`."""
    shapes_of = narrowed(layout, support.ranks).shapes
    shapes = {name: torch.Size(shapes_of[name]) for name in support.names}
    mask = _flat_mask(support, shapes)
    if mask is not None:
        values = torch.zeros(mask.numel(), dtype=values.dtype).masked_scatter_(mask, values)
    tree: Tree = {}
    start = 0
    for name, shape in shapes.items():
        tree[name] = values[start : start + shape.numel()].reshape(shape)
        start += shape.numel()
    return tree


def _flat_mask(support: Support, shapes: Mapping[str, torch.Size]) -> Tensor | None:
    """One mask over all tensors that travel, end to end; None if they travel whole."""
    if not support.masks:
        return None
    parts = [
        support.masks[name].reshape(-1)
        if name in support.masks
        else torch.ones(shapes[name].numel(), dtype=torch.bool)
        for name in support.names
    ]
    return torch.cat(parts)


def top_k(
    tree: Tree, density: float | Fraction, among: tuple[str, ...], live: Mapping[str, Tensor] = {}
) -> dict[str, Tensor]:
    """Masks of the largest magnitudes among the named tensors taken together, at a density.

    As many of their n entries as `counts.how_many` says. FLASC ranks the flattened, concatenated
    weights, not each tensor apart (arXiv 2406.05233, Algorithm 1). Density 1 gives no masks: whole
    tensors need none. live: masks off which an entry comes after all others, whatever its magnitude
    Masks are on the CPU, where messages are made; of equal magnitudes the first ones are kept.
    """
    if density >= 1 or not among:
        return {}
    flat = torch.cat([tree[name].reshape(-1) for name in among]).abs()
    if live:
        alive = _flat_mask(Support(among, None, dict(live)), {n: tree[n].shape for n in among})
        assert alive is not None
        flat = flat.masked_fill(~alive.to(flat.device), -1.0)
    keep = how_many(density, flat.numel())
    if flat.device.type == "cpu":
        # A partition finds the smallest magnitude that is kept in half the time of torch's topk.
        least = torch.as_tensor(np.partition(flat.numpy(), -keep)[-keep])
    else:
        least = flat.topk(keep, sorted=False).values.min()
    mask = flat > least
    ties = (flat == least).nonzero()[: keep - int(mask.sum()), 0]
    mask[ties] = True
    masks = {}
    start = 0
    mask = mask.cpu()
    for name in among:
        shape = tree[name].shape
        masks[name] = mask[start : start + shape.numel()].reshape(shape)
        start += shape.numel()
    return masks


def draw_ranks(seed: int, pairs: int, rank: int, keep: int, *, shared: bool) -> Tensor:
    """A uniform choice of `keep` of `rank` ranks, told by a 64-bit seed: (pairs, keep) int64.

    Each rank draws a ticket, a hash of the seed, the pair and itself; the smallest tickets win.
    Any program with BLAKE2b can repeat it (docs/wire.md), so a sketch costs 8 bytes on the wire.
    `shared` gives all pairs the same ranks (the paper's sketch); else each pair draws its own.
    """
    rows = [_winners(seed, pair, rank, keep) for pair in range(1 if shared else pairs)]
    return torch.tensor(rows, dtype=torch.int64).expand(pairs, keep)


def _winners(seed: int, pair: int, rank: int, keep: int) -> list[int]:
    def ticket(number: int) -> bytes:
        message = struct.pack("<QII", seed, pair, number)
        return hashlib.blake2b(message, digest_size=8).digest()

    return sorted(sorted(range(rank), key=ticket)[:keep])
