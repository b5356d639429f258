"""The methods, one file each. A method's name is its file's name, its options are the parameters of
the function `method` in it; there is no list to keep.
"""

import importlib
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

from fedsieve.errors import THEIRS, FedSieveError, beside, raise_of_memory, with_type
from fedsieve.methods.catalogue import known, names

if TYPE_CHECKING:
    from fedsieve.algebra.method import Method

__all__ = ["load", "names"]


def load(name: str) -> "Callable[..., Method]":
    """The function that builds a method from its options.

    name: one of `names()`, or the dotted name of your own module that has a function `method`.
    Raises FedSieveError for a name that is neither, with the nearest names. Whatever your own
    module raises, when it is imported, builds its method or takes part in a round, is one too.
    """
    if "." in name:
        try:
            module = importlib.import_module(name)
        except THEIRS as error:
            raise_of_memory(error)
            raise FedSieveError(
                f"method {name!r} cannot be imported: {with_type(error)}{beside(error)}"
            ) from error
    else:
        module = importlib.import_module(f"{__name__}.{known(name).name}")
    build = getattr(module, "method", None)
    if not callable(build):
        raise FedSieveError(f"the module {name!r} has no function `method` that builds a Method")
    return _told(build, name) if "." in name else build


def _told(build: "Callable[..., Method]", name: str) -> "Callable[..., Method]":
    @wraps(build)
    def method(*given: Any, **options: Any) -> "Method":
        from fedsieve.algebra.blame import blaming
        from fedsieve.algebra.method import Method

        try:
            built: object = build(*given, **options)
        except FedSieveError:
            raise
        except THEIRS as error:
            raise_of_memory(error)
            raise FedSieveError(f"method {name!r} fails: {with_type(error)}") from error
        if not isinstance(built, Method):
            made = type(built).__name__
            raise FedSieveError(f"method {name!r} gives a {made}, and no fedsieve Method")
        return blaming(name, built)

    return method
