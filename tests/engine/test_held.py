"""Memories that hold the same numbers hold them once, at a cost that others do not raise."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsieve.engine.held import Held

SAME: list[tuple[str, Callable[[], Tensor]]] = [
    ("floats", lambda: torch.arange(6.0).reshape(2, 3)),
    ("a scalar", lambda: torch.tensor(3)),
    ("truths", lambda: torch.tensor([True, False])),
    ("nothing", lambda: torch.zeros(0, 4)),
    ("a view", lambda: torch.arange(6.0).reshape(2, 3).T),
]
OTHER: list[tuple[str, Callable[[Tensor], Any]]] = [
    ("a number", lambda t: {"base": {"w": t + 1}}),
    ("a type", lambda t: {"base": {"w": t.double()}}),
    ("a shape", lambda t: {"base": {"w": t.reshape(3, 2)}}),
    ("a name", lambda t: {"base": {"v": t.clone()}}),
    ("a group", lambda t: {"left": {"w": t.clone()}}),
]


@pytest.mark.parametrize(("what", "make"), SAME)
def test_equal_tensors_become_one(what: str, make: Callable[[], Tensor]) -> None:
    first = {"base": {"w": make()}}
    again = Held([first]).once({"base": {"w": make()}, "own": {"w": torch.ones(2)}})
    assert again["base"]["w"] is first["base"]["w"]
    assert again["own"]["w"].tolist() == [1, 1]


@pytest.mark.parametrize(("what", "change"), OTHER)
def test_what_differs_stays_apart(what: str, change: Callable[[Tensor], Any]) -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    other = change(tensor)
    found = Held([{"base": {"w": tensor}}]).once(other)
    for group, tree in other.items():
        assert all(found[group][name] is each for name, each in tree.items())


def test_numbers_are_compared_where_checksums_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zlib.crc32", lambda _: 0)
    one, other = torch.ones(3), torch.zeros(3)
    store = Held([{"base": {"w": one}}])
    assert store.once({"base": {"w": other}})["base"]["w"] is other


def test_it_compares_with_few_and_keeps_none_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = 0
    equal = torch.equal

    def counted(one: Tensor, other: Tensor) -> bool:
        nonlocal asked
        asked += 1
        return equal(one, other)

    monkeypatch.setattr(torch, "equal", counted)
    memories = [{"left": {"w": torch.full((4,), float(n))}} for n in range(2000)]
    store = Held(memories)
    store.once({"left": {"w": torch.full((4,), 7.0)}})
    assert asked == 1
    del memories
    gc.collect()
    assert len(store._known) == 0
