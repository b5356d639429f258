"""The methods, one file each. A method's name is its file's name, its options are the parameters of
the function `method` in it; there is no list to keep.
"""

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from fedsieve.errors import FedSieveError
from fedsieve.methods.catalogue import known, names

if TYPE_CHECKING:
    from fedsieve.algebra.method import Method

__all__ = ["load", "names"]


def load(name: str) -> "Callable[..., Method]":
    """The function that builds a method from its options.

    name: one of `names()`, or the dotted name of your own module that has a function `method`.
    Raises FedSieveError for a name that is neither, with the nearest names.
    """
    if "." in name:
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            raise FedSieveError(f"method {name!r} cannot be imported: {error}") from error
    else:
        module = importlib.import_module(f"{__name__}.{known(name).name}")
    build = getattr(module, "method", None)
    if build is None:
        raise FedSieveError(f"the module {name!r} has no function `method` that builds a Method")
    return build  # type: ignore[no-any-return]
