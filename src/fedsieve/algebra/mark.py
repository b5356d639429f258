"""What a method is made of: its functions, and a mark by which two values of a method are told
apart.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import CellType, FunctionType
from typing import Any

from fedsieve.algebra.method import Method
from fedsieve.algebra.optim import Optimizer


def made_of(method: Method) -> str:
    """A mark of the functions and options that a method is made of: two methods with one mark do
    the same, as far as their functions' names and plain options tell.

    The server's optimizer is none of it.
    """
    told = _told(method._asdict(), frozenset())
    return hashlib.blake2b(told.encode(), digest_size=16).hexdigest()


def functions_of(method: Method) -> Iterator[Callable[..., Any]]:
    """Those that a method is made of, and those that they hold in turn."""
    waiting: list[object] = [method._asdict()]
    seen: dict[int, object] = {}  # by their ids, which are nobody else's while they are held
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if callable(value) and not isinstance(value, partial):
            yield value
        waiting += _parts(value)


def _told(value: object, around: frozenset[int]) -> str:
    """A value in words; around: what it is a part of, which may come again within it."""
    if value is None or isinstance(value, str | int | float):
        return repr(value)
    inside = around | {id(value)}
    parts = [] if id(value) in around or len(around) > 30 else _parts(value)
    name = value if isinstance(value, FunctionType | type) else type(value)
    said = ", ".join(_told(part, inside) for part in parts)
    return f"{name.__module__}.{name.__qualname__}({said})"


def _parts(value: object) -> list[object]:
    """What a value holds: a function its closure and defaults, the server's optimizer nothing."""
    if isinstance(value, Optimizer):
        return []
    if isinstance(value, FunctionType):
        held = [cell.cell_contents for cell in value.__closure__ or () if _filled(cell)]
        return [*held, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.items()]
    if isinstance(value, tuple | list):
        return [*value]
    if isinstance(value, Mapping):
        return [*value.items()]
    return sorted(value, key=repr) if isinstance(value, frozenset | set) else []


def _filled(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
