"""A mark of what a method is made of, by which two values of a method are told apart."""

import hashlib
from collections.abc import Mapping
from functools import partial
from types import CellType, FunctionType

from fedsieve.algebra.method import Method
from fedsieve.algebra.optim import Optimizer


def made_of(method: Method) -> str:
    """A mark of the functions and options that a method is made of: two methods with one mark do
    the same, as far as their functions' names and plain options tell.

    The server's optimizer is none of it.
    """
    told = _told(method._asdict(), frozenset())
    return hashlib.blake2b(told.encode(), digest_size=16).hexdigest()


def _told(value: object, around: frozenset[int]) -> str:
    """A value in words; around: what it is a part of, which may come again within it."""
    if value is None or isinstance(value, str | int | float):
        return repr(value)
    inside = around | {id(value)}
    if id(value) in around or len(around) > 30 or isinstance(value, Optimizer):
        parts: list[object] = []
    elif isinstance(value, FunctionType):
        parts = [cell.cell_contents for cell in value.__closure__ or () if _filled(cell)]
        parts += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    elif isinstance(value, partial):
        parts = [value.func, *value.args, *value.keywords.items()]
    elif isinstance(value, tuple | list):
        parts = [*value]
    elif isinstance(value, Mapping):
        parts = [*value.items()]
    elif isinstance(value, frozenset | set):
        parts = sorted(value, key=repr)
    else:
        parts = []
    name = value if isinstance(value, FunctionType | type) else type(value)
    said = ", ".join(_told(part, inside) for part in parts)
    return f"{name.__module__}.{name.__qualname__}({said})"


def _filled(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
