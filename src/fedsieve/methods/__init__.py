"""The methods, one file each. A method's name is its file's name, its options are the parameters of
the function `method` in it; there is no list to keep.
"""

import importlib
import pkgutil
from collections.abc import Callable

from fedsieve.algebra.method import Method
from fedsieve.errors import FedSieveError, nearest


def names() -> list[str]:
    """The methods that ship with FedSieve."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> Callable[..., Method]:
    """The function that builds a method from its options.

    name: one of `names()`, or the dotted name of your own module that has a function `method`.
    Raises FedSieveError for a name that is neither, with the nearest names.
    """
    if "." in name:
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            raise FedSieveError(f"method {name!r} cannot be imported: {error}") from error
    elif name in names():
        module = importlib.import_module(f"{__name__}.{name}")
    else:
        raise FedSieveError(f"unknown method {name!r}{nearest(name, names())}")
    build = getattr(module, "method", None)
    if build is None:
        raise FedSieveError(f"the module {name!r} has no function `method` that builds a Method")
    return build  # type: ignore[no-any-return]
