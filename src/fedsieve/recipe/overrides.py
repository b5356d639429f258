"""Nested tables by dotted keys: "training.lr" for what a TOML file says under [training]."""

from collections.abc import Iterator, Mapping
from typing import Any

from fedsieve.errors import FedSieveError, nearest


def flat(table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Dotted key and value of all that a table holds; tables that hold nothing are left out.

    Keys may have dots in them: {"a.b": 1}, {"a": {"b": 1}} are the same.
    """
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}.{inner}", each) for inner, each in flat(value))
        else:
            yield key, value


def put(table: dict[str, Any], key: str, value: Any, said: str) -> None:
    """Set a dotted key ("training.lr", "budgets.0.up") of a table, in place; None takes it out.

    Raises FedSieveError, beginning with `said`, if the key leads nowhere.
    """
    *path, last = key.split(".")
    place: Any = table
    for step in path:
        if isinstance(place, list) and step in map(str, range(len(place))):
            place = place[int(step)]
        elif isinstance(place, dict):
            place = place.setdefault(step, {})
        else:
            raise FedSieveError(f"{said}: {step!r} is not a table of the recipe")
    if isinstance(place, list) and place and path:
        within = ".".join(path)
        which = "" if len(place) == 1 else f" to {len(place) - 1}"
        raise FedSieveError(
            f"{said}: {within} is a list: {within}.0{which} are its parts ({within}.0.{last}), and "
            f"'{within}=[...]' is all of it"
        )
    if not isinstance(place, dict):
        raise FedSieveError(f"{said}: {last!r} is not a key of a table")
    if value is not None:
        place[last] = value
    elif place.pop(last, None) is None:
        raise FedSieveError(f"{said}: the recipe has no {key} to take out{nearest(last, place)}")
