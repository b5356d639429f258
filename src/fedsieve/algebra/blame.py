"""A method from outside the package, whose failures are told with its name.

What a function of such a method raises, and what it gives that is not what a round needs, is a
`MethodFailed` that names the method, the function, round and client, and the line that raised. Only
its own calls are seen: what it gives may still fail where it is used.
"""

import traceback
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedsieve.algebra.adapter import STORED, Adapter, Layout, Tree, base_layout
from fedsieve.algebra.budget import Budget, Client
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import ClientContext, Method, State, View
from fedsieve.algebra.payload import Payload
from fedsieve.algebra.support import Support
from fedsieve.errors import (
    THEIRS,
    FedSieveError,
    MethodFailed,
    nearest,
    quoted,
    raise_of_memory,
    with_type,
)


class _Kind(NamedTuple):
    """Of what a function gives: in words, and what is wrong with a value, or None.

    wrong: the value, and the first of the function's arguments
    """

    words: str
    wrong: Callable[[Any, Any], str | None]


def blaming(name: str, method: Method) -> Method:
    """The same method, whose functions fail as the module's head says.

    name: what the user calls it
    """
    _refuse_knobs(name, method.knobs)
    functions: dict[str, Any] = {
        part: _blaming(name, part, kind, getattr(method, part))
        for part, kind in _GIVES.items()
        if getattr(method, part) is not None
    }
    if method.trained_by is not None:
        functions["trained_by"] = _blaming(name, "trained_by", _A_METHOD, method.trained_by)
    return method._replace(**functions)


def _blaming(name: str, part: str, kind: _Kind, function: Any) -> Callable[..., Any]:
    said = f"method {name!r}: its {part}"
    if not callable(function):
        raise MethodFailed(f"{said} must be a function, not {_a(function)}")

    @wraps(function)
    def told(*given: Any) -> Any:
        where = said + _of_round(given)
        try:
            made: Any = function(*given)
        except FedSieveError:
            raise
        except THEIRS as error:
            raise_of_memory(error)
            # `merge` goes through updates that wait on our disk, whose faults are not the method's.
            if part == "merge" and isinstance(error, OSError):
                raise
            raise MethodFailed(f"{where} fails: {with_type(error)}{_line(error)}") from error
        if (wrong := kind.wrong(made, given[0] if given else None)) is not None:
            raise MethodFailed(f"{where} must give {kind.words}: {wrong}")
        if part == "trained_by":
            return blaming(name, made)
        if part == "view" and made[0].penalty is not None:
            penalty = _blaming(name, "view's penalty", _A_PENALTY, made[0].penalty)
            return made[0]._replace(penalty=penalty), made[1]
        return made

    return told


def _refuse_knobs(name: str, knobs: object) -> None:
    known = Budget._fields
    if not isinstance(knobs, frozenset):
        raise MethodFailed(f"method {name!r}: its knobs must be a frozenset, not {_a(knobs)}")
    for knob in sorted(map(str, knobs - {*known})):
        raise MethodFailed(
            f"method {name!r}: knobs: a budget has no {knob!r}{nearest(knob, known)}"
        )


def _of_round(given: tuple[Any, ...]) -> str:
    """ " (round 3, client '7')", as far as the arguments tell it."""
    last = given[-1] if given else None
    key = last.key if isinstance(last, ClientContext) else last
    if not isinstance(key, Key):
        return ""
    ids = [key.client] if key.client else [each.id for each in given if isinstance(each, Client)]
    return f" (round {key.round}{''.join(f', client {id!r}' for id in ids)})"


def _line(error: BaseException) -> str:
    """Where it was raised: the last line of the traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if len(frames) > 1 else ""


def _a(value: object) -> str:
    return "None" if value is None else f"one {type(value).__name__}"


def _is(kind: type) -> Callable[[Any, Any], str | None]:
    return lambda made, of: None if isinstance(made, kind) else f"it gives {_a(made)}"


def _state(made: Any, of: Any) -> str | None:
    if not isinstance(made, State):
        return f"it gives {_a(made)}"
    if not isinstance(made.trees, dict) or "adapter" not in made.trees:
        return 'its trees have no "adapter"'
    if (wrong := _trees(made.trees)) is not None:
        return f"its trees have {wrong}"
    return _laid_out(made.layout, made.trees["adapter"]) or _unlike(of, Adapter(*_whole(made)))


def _adapter(made: Any, of: Any) -> str | None:
    if not isinstance(made, Adapter):
        return f"it gives {_a(made)}"
    wrong = _tree(made.tensors) or _laid_out(made.layout, made.tensors) or _based(made)
    return wrong or _unlike(of, made)


def _view(made: Any, of: Any) -> str | None:
    if (wrong := _with_memory(View)(made, of)) is not None:
        return wrong
    adapter, moves = made[0].adapter, made[0].moves
    if (wrong := _adapter(adapter, None)) is not None:
        return wrong
    for name, tensor in adapter.tensors.items():
        if not tensor.is_floating_point():
            return f"{name!r} holds {tensor.dtype}, and no floats"
    if not isinstance(moves, Support) or not isinstance(moves.masks, dict):
        return f"what it moves is {_a(moves)}, and no Support of names and masks"
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
            return f"it gives {_a(made)}"
        first, memory = made
        if not isinstance(first, kind) or not isinstance(memory, dict):
            return f"it gives {_a(first)} and {_a(memory)}"
        said = _trees(memory)
        return None if said is None else f"what the client keeps has {said}"

    return wrong


def _trees(trees: dict[Any, Any]) -> str | None:
    for group, tree in trees.items():
        if not isinstance(group, str):
            return f"a tree under {quoted(group)}"
        if (wrong := _tree(tree)) is not None:
            return f"a wrong {group!r}: {wrong}"
    return None


def _tree(tree: Any) -> str | None:
    """What is wrong with one of a tree's tensors, whatever their names and shapes may be."""
    if not isinstance(tree, dict):
        return f"it is {_a(tree)}"
    for name, tensor in tree.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            return f"there is {_a(tensor)} under {quoted(name)}"
        if tensor.layout != torch.strided or tensor.is_meta:
            return f"{name!r} is no dense tensor"
        if tensor.dtype not in STORED:
            return f"{name!r} holds {tensor.dtype}, which no checkpoint does"
        if tensor.requires_grad:
            return f"{name!r} still has a gradient: detach it"
    return None


def _laid_out(layout: Any, tree: Tree) -> str | None:
    """How an adapter's tensors differ from its layout."""
    if not isinstance(layout, Layout) or not isinstance(layout.shapes, Mapping):
        return f"its layout is {_a(layout)}"
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
    if not isinstance(adapter.base, dict) or _tree(adapter.base) is not None:
        return f"its base is {_a(adapter.base)}, and no tree"
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
    return None if made is None or isinstance(made, str) else f"it gives {_a(made)}"


def _number(made: Any, of: Any) -> str | None:
    if isinstance(made, bool) or not isinstance(made, int | float):
        return f"it gives {_a(made)}"
    return None if made >= 0 else f"it gives {made}"


def _penalty(made: Any, of: Any) -> str | None:
    if not isinstance(made, Tensor):
        return f"it gives {_a(made)}"
    if made.shape or not made.is_floating_point():
        return f"it gives {made.dtype} of shape {tuple(made.shape)}"
    return None


_A_PENALTY = _Kind("a tensor of one number, without dimensions", _penalty)
_A_METHOD = _Kind("a Method", _is(Method))
_A_STATE = _Kind("a State", _state)
_AN_ADAPTER = _Kind("an Adapter", _adapter)
_GIVES = {
    "init": _A_STATE,
    "plan": _A_STATE,
    "publish": _Kind("a Payload", _is(Payload)),
    "view": _Kind("a View and a dictionary of trees", _view),
    "report": _Kind("a Payload and a dictionary of trees", _with_memory(Payload)),
    "merge": _A_STATE,
    "export": _AN_ADAPTER,
    "personal": _AN_ADAPTER,
    "clip": _Kind("a number from 0 up", _number),
    "misfit": _Kind("None, or a text that says what is wrong", _reason),
}
