"""What the methods' files say of themselves, read without running them.

Building a method takes torch, which takes seconds to import. Listing the methods and telling a
misspelt option take their sources alone: names, options and the budgets that are made use of are
read off the syntax tree.
"""

import ast
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

from fedsieve.errors import FedSieveError, nearest, quoted

OPTIMIZERS = Path(__file__).parents[1] / "algebra" / "optim.py"


class Entry(NamedTuple):
    """One method: the first line of its head, the budgets that it can use, its options' names."""

    name: str
    summary: str
    knobs: tuple[str, ...]
    options: tuple[str, ...]


def names() -> list[str]:
    """The methods that ship with FedSieve: each file of this package with a function `method`."""
    return sorted(_files())


def known(name: str) -> Entry:
    """What the file of a method says. Raises FedSieveError, with the nearest, for no such name."""
    files = _files()
    if name not in files:
        raise FedSieveError(
            f"unknown method {quoted(name)}{nearest(name, files)}. One of your own is a module in "
            "a package, with a dot in its name (docs/methods.md)"
        )
    path = files[name]
    head = (ast.get_docstring(_tree(path)) or name).splitlines()[0]
    return Entry(name, head.split(" (")[0], _knobs(path), options(path, "method"))


def options(path: Path, function: str) -> tuple[str, ...]:
    """The names of the options that a function of a file takes; `server` is a table of its own."""
    found = _function(path, function)
    assert found is not None
    taken = [*found.args.args, *found.args.kwonlyargs]
    return tuple(each.arg for each in taken if each.arg != "server")


def _files() -> dict[str, Path]:
    folders = map(Path, sys.modules[__package__].__path__)
    paths = (path for folder in folders for path in folder.glob("*.py"))
    return {path.stem: path for path in paths if _function(path, "method")}


@cache
def _knobs(path: Path) -> tuple[str, ...]:
    said = [
        constant.value
        for call in ast.walk(_tree(path))
        if isinstance(call, ast.keyword) and call.arg == "knobs"
        for constant in ast.walk(call.value)
        if isinstance(constant, ast.Constant) and isinstance(constant.value, str)
    ]
    return tuple(sorted(set(said)))


@cache
def _function(path: Path, name: str) -> ast.FunctionDef | None:
    functions = (node for node in _tree(path).body if isinstance(node, ast.FunctionDef))
    return next((each for each in functions if each.name == name), None)


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))
