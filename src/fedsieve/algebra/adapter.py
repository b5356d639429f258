"""What is trained: a flat tree of tensors, and the layout that says how they belong together.

The tree has PEFT's own state-dict names, in sorted order, and is never nested. Most tensors come
in pairs, A of shape (r, n) and B of shape (m, r), that add s B A to a frozen weight of shape
(m, n); in LoRA convolutions more axes follow. The rest (a classifier head, say) is trained whole.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

Tree = dict[str, Tensor]
# What methods and optimizers keep, and so what a checkpoint holds.
STORED = {torch.float32, torch.float64, torch.int32, torch.int64, torch.bool, torch.uint8}


class Pair(NamedTuple):
    """The two factors that change one weight: `a` has the rank as axis 0, `b` as axis 1."""

    module: str
    a: str
    b: str


@dataclass(frozen=True)
class Layout:
    """Names and shapes of an adapter; everything about it but the numbers.

    rank:  r, the same for every pair
    scale: s of W0 + s B A; alpha / r for LoRA, alpha / sqrt(r) for rank-stabilised LoRA
    """

    shapes: Mapping[str, tuple[int, ...]]
    pairs: tuple[Pair, ...]
    rank: int
    scale: float

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self.shapes))

    @cached_property
    def rank_axis(self) -> dict[str, tuple[int, int]]:
        """Of each factor: the number of its pair and the axis along which the ranks lie."""
        places: dict[str, tuple[int, int]] = {}
        for number, pair in enumerate(self.pairs):
            places[pair.a] = (number, 0)
            places[pair.b] = (number, 1)
        return places

    @cached_property
    def size(self) -> int:
        """How many numbers the adapter holds."""
        return sum(prod(shape) for shape in self.shapes.values())

    @cached_property
    def fingerprint(self) -> int:
        """32 bits by which two ends of a wire notice that they hold different layouts."""
        text = json.dumps([self.rank, [[n, list(self.shapes[n])] for n in self.names], self.pairs])
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")

    def narrow(self, rank: int, scale: float) -> "Layout":
        """The same modules at a smaller rank."""
        shapes = dict(self.shapes)
        for name, (_, axis) in self.rank_axis.items():
            shape = list(shapes[name])
            shape[axis] = rank
            shapes[name] = tuple(shape)
        return Layout(shapes, self.pairs, rank, scale)


class Adapter(NamedTuple):
    """A layout and the numbers that fill it.

    base: what has been added to the frozen weights since the start, `<module>.base` -> the shape of
          B A; only FLoRA, FLoRIST and FedEx-LoRA change them
    """

    layout: Layout
    tensors: Tree
    base: Tree = {}  # noqa: RUF012


def layout_of(tensors: Mapping[str, Tensor], scale: float) -> Layout:
    """Read the layout off a tree with PEFT's names (`….lora_A.weight` beside `….lora_B.weight`).

    Raises ValueError if a factor lacks its partner or the ranks of two pairs differ.
    """
    pairs = tuple(_pairs(tensors))
    ranks = {tensors[p.a].shape[0] for p in pairs} | {tensors[p.b].shape[1] for p in pairs}
    if len(ranks) > 1:
        raise ValueError(f"pairs of different ranks {sorted(ranks)} in one adapter: use one rank")
    shapes = {name: tuple(tensors[name].shape) for name in sorted(tensors)}
    return Layout(shapes, pairs, ranks.pop() if ranks else 0, scale)


def base_layout(layout: Layout, rank: int) -> Layout:
    """The layout of a change of the frozen weights under an adapter's pairs, at scale 1.

    rank K >= 1: the pairs alone, at rank K, which may exceed the adapter's own; B A is the change.
    rank 0: no pairs, but for each a tensor `<module>.base` of the product's shape: (m, n), or
    (m, n, kh, kw) where A has the axes of a convolution. It is the change itself.

    Raises ValueError if the rank is not within 0..65535, the most that a message can tell.
    """
    if not 0 <= rank <= 0xFFFF:
        raise ValueError(f"a base change of rank {rank}: must be within 0..65535")
    shapes = layout.shapes
    if rank == 0:
        products = {f"{p.module}.base": (shapes[p.b][0], *shapes[p.a][1:]) for p in layout.pairs}
        return Layout(products, (), 0, 1.0)
    factors = {name: shapes[name] for name in layout.names if name in layout.rank_axis}
    return Layout(factors, layout.pairs, layout.rank, 1.0).narrow(rank, 1.0)


def _pairs(names: Iterable[str]) -> Iterable[Pair]:
    known = set(names)
    for a in sorted(known):
        for mark in ("lora_A", "lora_embedding_A"):
            if f".{mark}" in a:
                module, tail = a.split(f".{mark}", 1)
                b = f"{module}.{mark[:-1]}B{tail}"
                if b not in known:
                    raise ValueError(f"{a} has no partner {b}")
                yield Pair(module, a, b)
