"""What each function of a method gives, looked into: is it what a round can use at all?

For methods from outside the package (blame.py), whose author sees then what was wrong, and not
where it was met. What values mean is no matter here: `wire.encode` and `Method.misfit` ask that.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedsieve.algebra.adapter import Adapter, Layout, Tree, base_layout
from fedsieve.algebra.method import Method, State, View
from fedsieve.algebra.payload import Base, Payload, Seed, Values
from fedsieve.algebra.support import Support
from fedsieve.algebra.trees import a, dense_wrong, lacking, tree_unlike, tree_wrong, trees_wrong
from fedsieve.errors import quoted

_TOLD = ("known", "sent")


class Kind(NamedTuple):
    """Of what a function gives: in words, and what is wrong with a value, or None.

    wrong: the value, and the first of the function's arguments
    """

    words: str
    wrong: Callable[[Any, Any], str | None]


def _is(kind: type) -> Callable[[Any, Any], str | None]:
    return lambda made, of: None if isinstance(made, kind) else f"it gives {a(made)}"


def _state(made: Any, of: Any) -> str | None:
    if not isinstance(made, State):
        return f"it gives {a(made)}"
    if not isinstance(made.trees, dict) or "adapter" not in made.trees:
        return 'its trees have no "adapter"'
    if (wrong := trees_wrong(made.trees)) is not None:
        return f"its trees have {wrong}"
    return _laid_out(made.layout, made.trees["adapter"]) or _unlike(of, Adapter(*_whole(made)))


def _merged(made: Any, of: Any) -> str | None:
    """A state whose groups have the form in which a checkpoint's are looked for (`run/state.py`).

    A group may come, and one that is numbered may go, as what is kept of single rounds does; into a
    group names may come, as those of clients who take part for the first time.
    """
    if (wrong := _state(made, of)) is not None or not isinstance(of, State):
        return wrong
    stay = {group: tree for group, tree in of.trees.items() if tree and not group[-1:].isdigit()}
    if (lost := lacking(made.trees, stay)) is not None:
        return f"its trees have no {lost!r}, which was given"
    for group, tree in of.trees.items():
        came = made.trees.get(group, {})
        if group in stay and (lost := lacking(came, tree)) is not None:
            return f"its trees have a wrong {group!r}: {lost!r} is gone, which was given"
        if came and not tree:
            empty = "it was given empty: leave it out until there is something in it"
            return f"its trees have a wrong {group!r}: {empty}"
        both = {n: t for n, t in came.items() if n in tree}
        if (wrong := tree_unlike(both, tree)) is not None:
            return f"its trees have a wrong {group!r}: {wrong}"
    return None


def _adapter(made: Any, of: Any) -> str | None:
    if not isinstance(made, Adapter):
        return f"it gives {a(made)}"
    wrong = tree_wrong(made.tensors) or _laid_out(made.layout, made.tensors) or _based(made)
    return wrong or _unlike(of, made)


def _payload(made: Any, of: Any) -> str | None:
    """What `wire.encode` could not even ask of a payload; what does not fit it says itself."""
    if not isinstance(made, Payload):
        return f"it gives {a(made)}"
    layout, support, values, ranks_told, masks_told, base, control = _parts(made)
    if not isinstance(layout, Layout):
        return f"its layout is {a(layout)}"
    if (wrong := _support(support)) is not None:
        return f"its support is {wrong}"
    if not ((isinstance(ranks_told, str) and ranks_told in _TOLD) or isinstance(ranks_told, Seed)):
        return f'its ranks_told is {quoted(ranks_told)}, and no "known", "sent" or Seed'
    if not (isinstance(masks_told, str) and masks_told in _TOLD):
        return f'its masks_told is {quoted(masks_told)}, and no "known" or "sent"'
    if not isinstance(values, Values) or not isinstance(values.form, str):
        return f"its values are {a(values)}"
    for part, tensor in (("data", values.data), ("scales", values.scales)):
        if (wrong := dense_wrong(tensor)) is not None:
            return f"the {part} of its values are {wrong}"
    if base is not None:
        if not isinstance(base, Base) or not isinstance(base.since, int):
            return f"its base is {a(base)}, and no Base since a round"
        if (wrong := _payload(base.change, of)) is not None:
            return f"of its base, {wrong}"
    if control is not None and (wrong := _payload(control, of)) is not None:
        return f"of its control variates, {wrong}"
    return None


def _parts(made: tuple[Any, ...]) -> tuple[Any, ...]:
    """Those of a record, which may be anything, whatever its annotations say."""
    return made


def _support(of: Any) -> str | None:
    names, ranks, masks = _parts(of) if isinstance(of, Support) else (None, None, None)
    if not isinstance(names, tuple | list):
        return f"{a(of)}, and no Support of names, ranks and masks"
    if not all(isinstance(name, str) for name in names):
        return "of names that are no texts"
    if ranks is not None and (wrong := dense_wrong(ranks)) is not None:
        return f"of ranks that are {wrong}"
    if not isinstance(masks, dict):
        return f"of masks that are {a(masks)}"
    for name, mask in masks.items():
        if not isinstance(name, str) or (wrong := dense_wrong(mask)) is not None:
            return f"of a mask {quoted(name)} that is {wrong}"
    return None


def _view(made: Any, of: Any) -> str | None:
    if (wrong := _with_memory(View)(made, of)) is not None:
        return wrong
    adapter, moves = made[0].adapter, made[0].moves
    if (wrong := _adapter(adapter, None)) is not None:
        return wrong
    for name, tensor in adapter.tensors.items():
        if not tensor.is_floating_point():
            return f"{name!r} holds {tensor.dtype}, and no floats"
    if (wrong := _support(moves)) is not None:
        return f"what it moves is {wrong}"
    for name in sorted(map(str, {*moves.names, *moves.masks} - adapter.tensors.keys())):
        return f"it moves {name[:200]!r}, which its adapter has not"
    for name, mask in moves.masks.items():
        shape = tuple(adapter.tensors[name].shape)
        fits = isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == shape
        if not fits:
            return f"the mask of what moves of {name!r} must be of bools, of shape {shape}"
    return None


def _with_memory(kind: type) -> Callable[[Any, Any], str | None]:
    """A value of this kind, and what the client keeps."""

    def wrong(made: Any, of: Any) -> str | None:
        if not isinstance(made, tuple) or isinstance(made, kind) or len(made) != 2:
            return f"it gives {a(made)}"
        first, memory = made
        if not isinstance(first, kind) or not isinstance(memory, dict):
            return f"it gives {a(first)} and {a(memory)}"
        if (said := trees_wrong(memory)) is not None:
            return f"what the client keeps has {said}"
        return _payload(first, of) if kind is Payload else None

    return wrong


def _laid_out(layout: Any, tree: Tree) -> str | None:
    """How an adapter's tensors differ from its layout."""
    if not isinstance(layout, Layout) or not isinstance(layout.shapes, Mapping):
        return f"its layout is {a(layout)}"
    for name in sorted({*layout.shapes, *tree}):
        if name not in tree:
            return f"{name!r} of its layout is not there"
        if name not in layout.shapes:
            return f"{name!r} is none of its layout's"
        shape, asked = tuple(tree[name].shape), tuple(layout.shapes[name])
        if shape != asked:
            return f"{name!r} has the shape {shape}, and its layout says {asked}"
    return None


def _based(adapter: Adapter) -> str | None:
    """What is wrong with a change of the base that comes with an adapter."""
    if not isinstance(adapter.base, dict) or tree_wrong(adapter.base) is not None:
        return f"its base is {a(adapter.base)}, and no tree"
    known = base_layout(adapter.layout, 0).shapes if adapter.base else {}
    for name, change in adapter.base.items():
        if known.get(name) != tuple(change.shape):
            return f"its base has {name[:200]!r}, of shape {tuple(change.shape)}, which no pair has"
    return None


def _unlike(of: Any, made: Adapter) -> str | None:
    """How an adapter differs in form from the one that the function was given."""
    if not isinstance(of, State | Adapter):
        return None
    layout, tree = _whole(of)
    if made.layout != layout:
        for name in sorted({*layout.shapes, *made.layout.shapes}):
            shape, asked = made.layout.shapes.get(name), layout.shapes.get(name)
            if shape != asked:
                said = "not there" if shape is None else f"of shape {tuple(shape)}"
                was = "not there" if asked is None else f"of shape {tuple(asked)}"
                return f"{name!r} is {said} in its layout, and {was} in the one that it was given"
        return "its layout has other pairs, rank or scale than the one that it was given"
    for name, tensor in made.tensors.items():
        if tensor.dtype != tree[name].dtype:
            return f"{name!r} holds {tensor.dtype}, and {tree[name].dtype} was given"
    return None


def _whole(of: State | Adapter) -> tuple[Layout, Tree]:
    return of.layout, of.trees["adapter"] if isinstance(of, State) else of.tensors


def _reason(made: Any, of: Any) -> str | None:
    return None if made is None or isinstance(made, str) else f"it gives {a(made)}"


def _number(made: Any, of: Any) -> str | None:
    if isinstance(made, bool) or not isinstance(made, int | float):
        return f"it gives {a(made)}"
    return None if made >= 0 else f"it gives {made}"


def _penalty(made: Any, of: Any) -> str | None:
    if not isinstance(made, Tensor):
        return f"it gives {a(made)}"
    if made.is_nested or made.shape or not made.is_floating_point():
        what = "nested tensors" if made.is_nested else f"shape {tuple(made.shape)}"
        return f"it gives {made.dtype} of {what}"
    return "it gives a tensor without a number in it" if made.is_meta else None


A_PENALTY = Kind("a tensor of one number, without dimensions", _penalty)
A_METHOD = Kind("a Method", _is(Method))
_A_STATE = Kind("a State", _state)
_AN_ADAPTER = Kind("an Adapter", _adapter)
GIVES = {
    "init": _A_STATE,
    "plan": _A_STATE,
    "publish": Kind("a Payload", _payload),
    "view": Kind("a View and a dictionary of trees", _view),
    "report": Kind("a Payload and a dictionary of trees", _with_memory(Payload)),
    "merge": Kind("a State", _merged),
    "export": _AN_ADAPTER,
    "personal": _AN_ADAPTER,
    "clip": Kind("a number from 0 up", _number),
    "misfit": Kind("None, or a text that says what is wrong", _reason),
}
