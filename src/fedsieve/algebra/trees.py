"""Trees from functions of the user's own, looked into: can a run go on with them, and a checkpoint
hold them? The checks say what is wrong in words, for the end of a sentence, or None.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedsieve.algebra.adapter import STORED
from fedsieve.errors import quoted


def a(value: object) -> str:
    """What type a value is of, for "it gives ...": "one int", or "None"."""
    return "None" if value is None else f"one {type(value).__name__}"


def trees_wrong(trees: dict[Any, Any]) -> str | None:
    """What is wrong with one of the groups that a state or a memory is made of."""
    for group, tree in trees.items():
        if not isinstance(group, str):
            return f"a tree under {quoted(group)}"
        if "/" in group:  # a checkpoint's names are "state/group/tensor"
            return f'a tree under {quoted(group)}: the name of a group has no "/"'
        if (wrong := tree_wrong(tree)) is not None:
            return f"a wrong {group!r}: {wrong}"
    return None


def tree_wrong(tree: Any) -> str | None:
    """What is wrong with one of a tree's tensors, whatever their names and shapes may be."""
    if not isinstance(tree, dict):
        return f"it is {a(tree)}"
    for name, tensor in tree.items():
        if not isinstance(name, str):
            return f"there is {a(tensor)} under {quoted(name)}"
        if (wrong := dense_wrong(tensor)) is not None:
            return f"{name!r} is {wrong}"
        if tensor.dtype not in STORED:
            return f"{name!r} holds {tensor.dtype}, which no checkpoint does"
    return None


def dense_wrong(tensor: Any) -> str | None:
    """Why something is not numbers that are there, and nothing else."""
    if not isinstance(tensor, Tensor):
        return f"{a(tensor)}, and no tensor"
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta:
        return "no dense tensor"
    if tensor.is_neg() or tensor.is_conj():
        return "a view of other numbers, negated when they are read: give a copy, .clone()"
    return "a tensor that still has a gradient: detach it" if tensor.requires_grad else None


def tree_unlike(tree: Any, given: Mapping[str, Tensor]) -> str | None:
    """How a tree that is made of another differs from it in form; some of it may be left out."""
    if not isinstance(tree, dict):
        return f"it is {a(tree)}"
    for name, tensor in tree.items():
        if name not in given:
            return f"{quoted(name)} was not given"
        if (wrong := dense_wrong(tensor)) is not None:
            return f"{name!r} is {wrong}"
        if (found := _form(tensor)) != (asked := _form(given[name])):
            return f"{name!r} is {found}, and must be {asked}, as it was given"
    return None


def lacking(made: Mapping[str, Any], given: Mapping[str, Any]) -> str | None:
    """The first name of what was given that is not there any more."""
    return min(given.keys() - made.keys(), default=None)


def _form(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"
