"""A method's options, checked against the signature of the function that takes them.

The signature is the one place that says what an option can be: its type, the words that are known,
the limits of a number. A recipe and a call in Python are both held to it, so that a misspelt word
is told here, and does not train as the default.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import cache, wraps
from math import isfinite
from typing import Any, ParamSpec, TypeVar, cast, get_type_hints

import numpy as np
from pydantic import TypeAdapter, ValidationError

from fedsieve.algebra.optim import optimizer_given
from fedsieve.errors import FedSieveError, nearest, quoted
from fedsieve.settings import LARGEST

P = ParamSpec("P")
Built = TypeVar("Built")


def checked(build: Callable[P, Built]) -> Callable[P, Built]:
    """The same function of options, each of which is checked before it is called.

    build: takes its options by name. One that is called `method` has its file's name
    The one that is given back raises FedSieveError, naming method and option, for a name that
    `build` has not, and for a value that the option's annotation does not allow.
    """
    called, file = build.__name__, build.__module__.rpartition(".")[2]
    place = f"method {file}" if called == "method" else called

    @cache
    def known() -> dict[str, Any]:  # not yet when the file is read: it may name what comes later
        return kinds(build)

    @wraps(build)
    def method(*args: P.args, **given: P.kwargs) -> Built:
        try:
            taken = {name: _taken(name, value, known()) for name, value in given.items()}
        except FedSieveError as error:
            raise FedSieveError(f"{place}: {error}") from None
        return build(*args, **cast(Any, taken))

    return method


def kinds(build: Callable[..., Any]) -> dict[str, Any]:
    """The options that a function takes, `server` among them, each with what its values can be.

    One without an annotation can be anything, and so can those that `**` takes, under that name,
    and those of a function whose annotations name what is there for a type checker alone.
    """
    try:
        hints = get_type_hints(build, include_extras=True)  # with the limits of their values
    except Exception:  # whatever evaluating them may raise
        hints = {}
    try:
        found = inspect.signature(build).parameters.values()
    except ValueError:  # one of Python's own types has none
        return {"**": Any}
    return {
        "**" if each.kind is each.VAR_KEYWORD else each.name: hints.get(each.name, Any)
        for each in found
    }


def value_of(kind: Any, value: Any, *, strict: bool) -> Any:
    """The value as one of its kind.

    strict: a text is no number and no flag, and 1 is no flag. In a recipe they may be.
    Raises ValueError, which says what it should be.
    """
    try:
        found = TypeAdapter(kind).validate_python(value, strict=strict)
    except ValidationError as error:
        raise ValueError(_needed(error)) from None
    if isinstance(found, float) and not isfinite(found):
        raise ValueError("Input should be a finite number")
    if isinstance(found, int) and found > LARGEST:
        raise ValueError(f"Input should be at most {LARGEST}")
    return found


def _needed(error: ValidationError) -> str:
    """What a value should be; where words are known, also what else than a word."""
    first, *others = error.errors()
    if first["type"] == "callable_type":
        return "Input should be a function"
    if first["type"] == "frozen_set_type":
        return "Input should be a frozenset, as frozenset({'ratio'}) is one"
    more = [
        "a function" if each["type"] == "callable_type" else f"a {each['ctx']['class_name']}"
        for each in others
        if each["type"] in ("callable_type", "named_tuple_type")
    ]
    return ", or ".join([first["msg"], *more])


def _taken(name: str, value: Any, known: Mapping[str, Any]) -> Any:
    if name not in known:
        if "**" in known:
            return value
        raise FedSieveError(f"{name}: there is no such option{nearest(name, known)}")
    if name == "server":
        return value if value is None else optimizer_given(name, value)
    try:
        return value_of(known[name], _of_python(value), strict=True)
    except ValueError as error:
        needed = str(error).removeprefix("Input should be ")
        raise FedSieveError(f"{name} is {quoted(value)}; it must be {needed}") from None


def _of_python(value: Any) -> Any:
    """NumPy's numbers and flags, which a sweep has, are Python's."""
    return value.item() if isinstance(value, np.generic) else value
