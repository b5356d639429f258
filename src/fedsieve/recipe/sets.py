"""Data sets by name: what `data.set` stands for, in sets.toml beside this file.

A name is filled in when a recipe is read, after all changes to it, and is gone then: whatever comes
later sees an ordinary recipe. The recipe's own keys win.
"""

import tomllib
from collections.abc import Mapping
from functools import cache
from importlib import resources
from string import Formatter
from typing import Any, NamedTuple

from fedsieve.errors import FedSieveError, nearest, quoted

# Where a recipe has rows of its own, these of the set do not concern them.
_ROWS = ("train", "test", "config", "train_split", "test_split", "more_tests")
_TEXTS = ("text", "text_b", "prompt", "completion")


class Set(NamedTuple):
    """A data set: what it is, and the recipe's model.task, evaluation.metric and [data] for it."""

    what: str
    task: str
    metric: str
    data: Mapping[str, Any]


@cache
def known() -> Mapping[str, Set]:
    """All that there are, by name."""
    with (resources.files(__package__) / "sets.toml").open("rb") as file:
        return {name: Set(**table) for name, table in tomllib.load(file).items()}


def columns(found: Set) -> list[str]:
    """Those of the data set that are read, in the order of a row; those in its templates too."""
    read: list[str] = []
    for key in ("text", "text_b", "options", "label"):
        given = found.data.get(key, ())
        for each in (given,) if isinstance(given, str) else given:
            read += [name for _, name, *_ in Formatter().parse(each) if name] or [each]
    return read


def filled(table: Mapping[str, Any]) -> Mapping[str, Any]:
    """A recipe's table with what its `data.set` stands for in the place of that; else as it is.

    Raises FedSieveError, with the nearest, for a name that no set has, and where the recipe names
    another configuration of the very data set.
    """
    data = table.get("data")
    if not isinstance(data, Mapping) or not isinstance(data.get("set"), str):
        return table
    name = data["set"]
    if name not in known():
        raise FedSieveError(
            f"data.set: no data set is called {quoted(name)}{nearest(name, known())}"
        )
    found, own = known()[name], {key: value for key, value in data.items() if key != "set"}
    _refuse_another(name, found, own)
    taken = dict(found.data)
    if "train" in own:
        taken = {key: value for key, value in taken.items() if key not in _ROWS}
    elif "test" in own:
        taken = {k: v for k, v in taken.items() if k not in ("test_split", "more_tests")}
    if "{" in str(own.get("text")) or "prompt" in own or "completion" in own:
        # Texts that are made of columns have those of the set in them, or do without.
        taken = {key: value for key, value in taken.items() if key not in _TEXTS}
    made = {**table, "data": {**taken, **own}}
    if _put(made, "model", "task", found.task) != found.task:
        if "classes" not in own:
            made["data"].pop("classes", None)
    else:
        _put(made, "evaluation", "metric", found.metric)
    return made


def _put(table: dict[str, Any], name: str, key: str, value: str) -> Any:
    """Give a key of one of the recipe's tables a value unless it has one. Returns what it has."""
    inner = table.get(name, {})
    if not isinstance(inner, Mapping):
        return None  # refused when the recipe is checked
    table[name] = {key: value, **inner}
    return table[name][key]


def _refuse_another(name: str, found: Set, own: Mapping[str, Any]) -> None:
    """A run's own recipe has all keys, so a change of `data.set` alone would change nothing."""
    train, config = found.data["train"], found.data.get("config")
    if own.get("train") == train and own.get("config", config) != config:
        raise FedSieveError(
            f"data.set: {name!r} is {train} with the configuration {config!r}, and the recipe has "
            f"data.config = {own['config']!r}: leave one of the two out"
        )
