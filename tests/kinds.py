"""The methods by kind: which of them stand for all in the quick tests of a table over every method.

Most of what a table over all methods holds is one path of the code, walked again by each: a run
that is stopped and resumed, a checkpoint that is damaged, an update that is refused. What differs
there is what a method keeps, sends and trains. So one of each kind is tried by `make test`, the
others by `make test-all`; a method that is added is among the others. tests/methods/test_kinds.py
holds that whatever a method of FedSieve has, one of the quick ones has it too.
"""

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from fedsieve import methods

# Of each kind one, and what it stands for.
QUICK = {
    "fedit": "a plain mean of changes, of whole pairs, with no budget and nothing kept",
    "fslora_flasc": "ranks that differ by client, and masks both ways; Adam's moments",
    "sparse_adapter": "a mask that is the method's own, and stays",
    "fed_plora": "no mean of changes: each rank's is over its clients, who fold the others away",
    "florist": "what is learned goes into the base, and clients have to catch up",
    "fedsa_lora": "clients keep a part of their own, and have a model of their own",
    "rolora": "A and B by turns",
    "scaffold": "something beside what is trained: control variates, which both ends keep",
    "ravan": "cores between frozen factors, several heads with gains, some by a client's budget",
    "head": "no pairs: the head alone",
    "full": "no pairs: all weights",
}

# Methods that refuse any other optimizer of clients.
PLAIN_SGD = {"scaffold"}


def _param(row: Any, quick: bool, id: str | None = None) -> Any:
    values = row if isinstance(row, tuple) else (row,)
    return pytest.param(*values, marks=() if quick else pytest.mark.slow, id=id)


def quick_of(
    rows: Iterable[Any], stays: Callable[[Any], bool], id: Callable[[Any], str] | None = None
) -> list[Any]:
    """Rows as parameters of a test: those that do not stay quick are marked slow."""
    return [_param(row, stays(row), None if id is None else id(row)) for row in rows]


def some_of(rows: Iterable[Any], each: int = 3) -> list[Any]:
    """Rows that walk one path of the code, as parameters: the first and each third after it are
    quick. For long tables of one kind, as of damages that one place refuses.
    """
    return [_param(row, number % each == 0) for number, row in enumerate(rows)]


def each_method(*among: str) -> list[Any]:
    """These methods' names as parameters, or all; those that are not in QUICK are marked slow."""
    return quick_of(among or methods.names(), QUICK.__contains__)
