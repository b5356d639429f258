"""A method from outside the package, whose failures are told with its name.

What a function of such a method raises, and what it gives that is not what a round needs, is a
`MethodFailed` that names the method, the function, round and client, and the line that raised. Only
its own calls are seen: what it gives may still fail where it is used.
"""

import traceback
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedsieve.algebra.adapter import Adapter, Layout, Tree
from fedsieve.algebra.budget import Budget, Client
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import ClientContext, Method, State, View
from fedsieve.algebra.payload import Payload
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
    """Of what a function gives: in words, and what is wrong with one value, or None."""

    words: str
    wrong: Callable[[object], str | None]


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
        if (wrong := kind.wrong(made)) is not None:
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


def _is(kind: type) -> Callable[[object], str | None]:
    return lambda made: None if isinstance(made, kind) else f"it gives {_a(made)}"


def _state(made: object) -> str | None:
    if not isinstance(made, State):
        return f"it gives {_a(made)}"
    trees: object = made.trees
    if not isinstance(trees, dict) or "adapter" not in trees:
        return 'its trees have no "adapter"'
    for group, tree in trees.items():
        if not isinstance(group, str) or not isinstance(tree, dict):
            return f"its trees have {_a(tree)} under {quoted(group)}"
        if (wrong := _tensors(tree)) is not None:
            return f"in its tree {group!r}, {wrong}"
    return _laid_out(made.layout, trees["adapter"])


def _adapter(made: object) -> str | None:
    if not isinstance(made, Adapter):
        return f"it gives {_a(made)}"
    tree: object = made.tensors
    if not isinstance(tree, dict):
        return f"its tensors are {_a(tree)}"
    return _tensors(tree) or _laid_out(made.layout, tree)


def _tensors(tree: dict[Any, Any]) -> str | None:
    """What is wrong with one of a tree's tensors, whatever their names and shapes may be."""
    for name, tensor in tree.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            return f"there is {_a(tensor)} under {quoted(name)}"
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_complex():
            return f"{name!r} is no dense tensor of real numbers"
        if tensor.requires_grad:
            return f"{name!r} still has a gradient: detach it"
    return None


def _laid_out(layout: object, tree: Tree) -> str | None:
    """How an adapter's tensors differ from its layout."""
    if not isinstance(layout, Layout):
        return f"its layout is {_a(layout)}"
    for name in sorted({*layout.shapes, *tree}):
        if name not in tree:
            return f"{name!r} of its layout is not there"
        if name not in layout.shapes:
            return f"{name!r} is none of its layout's"
        shape, asked = tuple(tree[name].shape), tuple(layout.shapes[name])
        if shape != asked:
            return f"{name!r} has the shape {shape}, and its layout says {asked}"
        if not tree[name].is_floating_point():
            return f"{name!r} holds {tree[name].dtype}, and no floats"
    return None


def _view(made: object) -> str | None:
    wrong = _with_memory(View)(made)
    return wrong if wrong is not None else _adapter(made[0].adapter)  # type: ignore[index]


def _with_memory(kind: type) -> Callable[[object], str | None]:
    """A value of this kind, and what the client keeps."""

    def wrong(made: object) -> str | None:
        if not isinstance(made, tuple) or isinstance(made, kind) or len(made) != 2:
            return f"it gives {_a(made)}"
        first, memory = made
        if not isinstance(first, kind) or not isinstance(memory, dict):
            return f"it gives {_a(first)} and {_a(memory)}"
        for group, tree in memory.items():
            if not isinstance(group, str) or not isinstance(tree, dict):
                return f"what the client keeps has {_a(tree)} under {quoted(group)}"
            if (said := _tensors(tree)) is not None:
                return f"of what the client keeps, in {group!r}, {said}"
        return None

    return wrong


def _reason(made: object) -> str | None:
    return None if made is None or isinstance(made, str) else f"it gives {_a(made)}"


def _number(made: object) -> str | None:
    if isinstance(made, bool) or not isinstance(made, int | float):
        return f"it gives {_a(made)}"
    return None if made >= 0 else f"it gives {made}"


def _penalty(made: object) -> str | None:
    if isinstance(made, Tensor):
        return None if made.numel() == 1 else f"it gives a tensor of shape {tuple(made.shape)}"
    return None if isinstance(made, int | float) else f"it gives {_a(made)}"


_A_PENALTY = _Kind("a number, as a tensor", _penalty)
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
