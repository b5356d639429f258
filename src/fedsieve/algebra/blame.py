"""A method from outside the package, whose failures are told with its name.

What a function of such a method raises, and what it gives that is not what a round needs, is a
`MethodFailed` that names the method, the function, round and client, and the line that raised. Only
its own calls are seen: what it gives may still fail where it is used.
"""

import traceback
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

from fedsieve.algebra.adapter import Adapter
from fedsieve.algebra.budget import Client
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import ClientContext, Method, State, View
from fedsieve.algebra.payload import Payload
from fedsieve.errors import THEIRS, FedSieveError, MethodFailed, raise_of_memory, with_type


class _Kind(NamedTuple):
    """Of what a function gives: in words, and what is wrong with one value, or None."""

    words: str
    wrong: Callable[[object], str | None]


def blaming(name: str, method: Method) -> Method:
    """The same method, whose functions fail as the module's head says.

    name: what the user calls it
    """
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
            penalty = _blaming(name, "view's penalty", _ANYTHING, made[0].penalty)
            return made[0]._replace(penalty=penalty), made[1]
        return made

    return told


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
    return None if "adapter" in made.trees else 'its trees have no "adapter"'


def _pair(kind: type) -> Callable[[object], str | None]:
    """A value of this kind, and what the client keeps."""

    def wrong(made: object) -> str | None:
        if not isinstance(made, tuple) or isinstance(made, kind) or len(made) != 2:
            return f"it gives {_a(made)}"
        first, memory = made
        if isinstance(first, kind) and isinstance(memory, dict):
            return None
        return f"it gives {_a(first)} and {_a(memory)}"

    return wrong


def _reason(made: object) -> str | None:
    return None if made is None or isinstance(made, str) else f"it gives {_a(made)}"


def _number(made: object) -> str | None:
    plain = isinstance(made, int | float) and not isinstance(made, bool)
    return None if plain and made >= 0 else f"it gives {_a(made)}"  # type: ignore[operator]


_ANYTHING = _Kind("anything", lambda made: None)
_A_METHOD = _Kind("a Method", _is(Method))
_A_STATE = _Kind("a State", _state)
_AN_ADAPTER = _Kind("an Adapter", _is(Adapter))
_GIVES = {
    "init": _A_STATE,
    "plan": _A_STATE,
    "publish": _Kind("a Payload", _is(Payload)),
    "view": _Kind("a View and a dictionary", _pair(View)),
    "report": _Kind("a Payload and a dictionary", _pair(Payload)),
    "merge": _A_STATE,
    "export": _AN_ADAPTER,
    "personal": _AN_ADAPTER,
    "clip": _Kind("a number from 0 up", _number),
    "misfit": _Kind("None, or a text that says what is wrong", _reason),
}
