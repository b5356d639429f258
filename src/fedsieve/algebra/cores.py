"""Square cores between frozen factors: what is trained in the place of A and B.

    W0 + s sum_j g_j B_j R_j A_j        j = 0 .. h-1

The h heads share the adapter's rank r: A_j (r/h, n) are the rows of A, B_j (m, r/h) the columns of
B, one head after another. A and B are the same at all clients and never move: rows of A and columns
of B are orthonormal, drawn from the recipe's seed at both ends. So they never travel, and a mean of
cores is the mean of the products. R_j (r/h, r/h) begins at zero; a method may train a number g_j
beside it, which begins at one.

The tree of such a method holds cores, numbers and what lies beside the pairs, and no pair. What is
saved is LoRA all the same: lora_A = A, lora_B = B diag(g_0 R_0, ..., g_h-1 R_h-1).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fedsieve.algebra.adapter import Layout, Tree
from fedsieve.algebra.keys import Key, generator
from fedsieve.errors import quoted

_CORE, _GAIN = ".lora_core.", ".lora_gain."


class Cores(NamedTuple):
    """What a method trains of each pair: cores of so many heads, and whether each has a number."""

    heads: int = 1
    gains: bool = False


def core_name(module: str, head: int) -> str:
    """Of the tensor that a head's core is."""
    return f"{module}{_CORE}{head}"


def gain_name(module: str, head: int) -> str:
    """Of the tensor (1, 1) that holds a head's number."""
    return f"{module}{_GAIN}{head}"


def head_of(name: str) -> int | None:
    """The head that a tensor belongs to; None for what lies beside the pairs."""
    _, mark, head = name.rpartition(_GAIN if _GAIN in name else _CORE)
    return int(head) if mark else None


def gain_of(name: str) -> str | None:
    """The name of the number beside a core; None for any other tensor."""
    return name.replace(_CORE, _GAIN) if _CORE in name else None


def no_gains(layout: Layout, number: int) -> tuple[str, ...]:
    """All tensors but the numbers beside the cores."""
    return tuple(name for name in layout.names if _GAIN not in name)


def cored(layout: Layout, cores: Cores) -> Layout:
    """The layout of what is trained, from that of the LoRA adapter that it becomes.

    Raises ValueError if the heads do not share the rank evenly.
    """
    side, left = divmod(layout.rank, cores.heads)
    if left or not side:
        raise ValueError(f"{quoted(cores.heads)} heads do not share a rank of {layout.rank} evenly")
    shapes = {n: shape for n, shape in layout.shapes.items() if n not in layout.rank_axis}
    for pair in layout.pairs:
        for head in range(cores.heads):
            shapes[core_name(pair.module, head)] = (side, side)
            if cores.gains:
                shapes[gain_name(pair.module, head)] = (1, 1)
    return Layout(dict(sorted(shapes.items())), (), layout.rank, layout.scale)


def orthonormal(rows: int, columns: int, key: Key) -> Tensor:
    """Columns of length one at right angles to each other, at least as many rows as columns.

    They are those of a normal matrix by Gram-Schmidt, worked out in float64.
    """
    draws = torch.randn(rows, columns, generator=generator(key), dtype=torch.float64)
    q, r = torch.linalg.qr(draws)
    turned: Tensor = q * r.diagonal().sign()  # the library may choose either sign
    return turned.float()


def between(tree: Tree, module: str) -> Tensor:
    """diag(g_0 R_0, ...) of a module, (r, r), in float64."""
    blocks: list[Tensor] = []
    while (name := core_name(module, len(blocks))) in tree:
        gain = tree.get(gain_name(module, len(blocks)), torch.ones(()))
        blocks.append(tree[name].double() * gain.double())
    whole: Tensor = torch.block_diag(*blocks)
    return whole
