"""A method from outside the package, whose failures are told with its name.

What a function of such a method raises, what it gives that is not what a round needs, and what it
was given and changed in place (intact.py), is a `MethodFailed` that names the method, the function,
round and client, and the line that raised. Only its own calls are seen: what it gives may still
fail where it is used. One that is made in Python has no name, and is "method of your own".
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch

from fedsieve.algebra.budget import Budget, Client
from fedsieve.algebra.forms import A_METHOD, A_PENALTY, GIVES, Kind
from fedsieve.algebra.intact import left_intact, ours
from fedsieve.algebra.keys import Key
from fedsieve.algebra.mark import functions_of
from fedsieve.algebra.method import ClientContext, Method
from fedsieve.algebra.optim import optimizer_given
from fedsieve.algebra.trees import a
from fedsieve.errors import (
    THEIRS,
    FedSieveError,
    MethodFailed,
    line_of,
    nearest,
    raise_of_memory,
    with_type,
)
from fedsieve.settings import Training

_OWN = "method of your own"
_MAY_LACK = ("personal", "trained_by")


def blaming(name: str, method: Method) -> Method:
    """The same method, whose functions fail as the module's head says.

    name: what the user calls it
    """
    return _blamed(f"method {name!r}", method)


def guarded(method: Method) -> Method:
    """A method that is made in Python, whose failures are told so where a part of it is not
    FedSieve's own; any other as it is, at which nobody need look.

    Raises MethodFailed for a part that is not of its kind.
    """
    if not _ours_alone(method):
        return _blamed(_OWN, method)
    _refuse_unfit(_OWN, method)
    return method


def trained(method: Method, training: Callable[[int], Training]) -> Method:
    """A method that is made in Python, as it is where clients train so (`Method.trained_by`)."""
    if method.trained_by is None:
        return method
    _refuse_unfit(_OWN, method)
    if _ours_alone(method):
        return method.trained_by(training)
    made: Method = _blaming(_OWN, "trained_by", A_METHOD, method.trained_by)(training)
    return made


def _ours_alone(method: Method) -> bool:
    return all(map(ours, functions_of(method)))


def _refuse_unfit(whose: str, method: Method) -> None:
    """Raises MethodFailed, naming it, for a part that is not of the kind that it must be."""
    for part in (*GIVES, "trained_by"):
        function = getattr(method, part)
        if function is not None or part not in _MAY_LACK:
            _refuse_no_function(f"{whose}: its {part}", function)
    knobs: object = method.knobs
    if not isinstance(knobs, frozenset):
        raise MethodFailed(f"{whose}: its knobs must be a frozenset, not {a(knobs)}")
    try:
        _refuse_unknown(knobs)
        optimizer_given("its server", method.server)
    except FedSieveError as error:
        raise MethodFailed(f"{whose}: {error}") from None


def _refuse_no_function(said: str, function: object) -> None:
    if not callable(function):
        raise MethodFailed(f"{said} must be a function, not {a(function)}")


def _blamed(whose: str, method: Method) -> Method:
    _refuse_unfit(whose, method)
    functions: dict[str, Any] = {
        part: _blaming(whose, part, kind, getattr(method, part))
        for part, kind in GIVES.items()
        if getattr(method, part) is not None
    }
    functions["view"] = _with_penalty(whose, functions["view"])
    if method.trained_by is not None:
        told = _blaming(whose, "trained_by", A_METHOD, method.trained_by)
        functions["trained_by"] = lambda training: _blamed(whose, told(training))
    return method._replace(**functions)


def _refuse_unknown(knobs: frozenset[Any]) -> None:
    """Raises FedSieveError for one that is no part of a budget."""
    known = Budget._fields
    for knob in sorted(map(str, knobs - {*known})):
        raise FedSieveError(f"knobs: a budget has no {knob!r}{nearest(knob, known)}")


def _with_penalty(whose: str, view: Callable[..., Any]) -> Callable[..., Any]:
    """The penalty is a function of the method's too, which a view brings along."""

    def told(*given: Any) -> Any:
        made, memory = view(*given)
        if made.penalty is None:
            return made, memory
        part = f"view's penalty{_of_round(given)}"
        penalty = _blaming(whose, part, A_PENALTY, made.penalty)
        return made._replace(penalty=penalty), memory

    return told


def _blaming(whose: str, part: str, kind: Kind, function: Any) -> Callable[..., Any]:
    said = f"{whose}: its {part}"
    _refuse_no_function(said, function)

    @wraps(function)
    def told(*given: Any) -> Any:
        where = said + _of_round(given)
        with left_intact(given, where):
            made = called(where, given)
        if (wrong := kind.wrong(made, given[0] if given else None)) is not None:
            raise MethodFailed(f"{where} must give {kind.words}: {wrong}")
        return made

    def called(where: str, given: tuple[Any, ...]) -> Any:
        try:
            with _as_it_was():
                return function(*given)
        except MethodFailed as error:  # of a part of it that knows no method's name
            if str(error).startswith("method "):
                raise
            raise type(error)(f"{where}: {error}") from error
        except FedSieveError:
            raise
        except THEIRS as error:
            raise_of_memory(error)
            # `merge` goes through updates that wait on our disk, whose faults are not the method's.
            if part == "merge" and isinstance(error, OSError):
                raise
            raise MethodFailed(f"{where} fails: {with_type(error)}{line_of(error)}") from error

    return told


@contextmanager
def _as_it_was() -> Iterator[None]:
    """What torch keeps for a whole process is after a call what it was before it."""
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    grad = torch.is_grad_enabled()
    try:
        yield
    finally:
        torch.set_grad_enabled(grad)
        torch.set_default_dtype(dtype)
        if torch.get_default_device() != device:
            torch.set_default_device(device)


def _of_round(given: tuple[Any, ...]) -> str:
    """ " (round 3, client '7')", as far as the arguments tell it."""
    last = given[-1] if given else None
    key = last.key if isinstance(last, ClientContext) else last
    if not isinstance(key, Key):
        return ""
    ids = [key.client] if key.client else [each.id for each in given if isinstance(each, Client)]
    return f" (round {key.round}{''.join(f', client {id!r}' for id in ids)})"
