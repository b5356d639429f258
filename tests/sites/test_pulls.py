"""Replies that are fetched: whoever is slow keeps nobody else waiting."""

import threading
import time
from collections.abc import Collection
from itertools import pairwise
from typing import Any

import pytest

pytest.importorskip("flwr", reason="needs the extra fedsieve[flower]")

from fedsieve.sites.flower_app import MessagePoller


def wait_for(poller: MessagePoller, requests: Collection[str], count: int) -> list[Any]:
    """What comes in the end, if so much comes within a minute."""
    found: list[Any] = []
    until = time.monotonic() + 60
    while len(found) < count:
        assert time.monotonic() < until, found
        found += poller.collect(dict.fromkeys(requests, 1))
        time.sleep(0.005)
    return found


def test_a_slow_reply_holds_up_nobody() -> None:
    whole = threading.Event()
    given: list[str] = []

    def pull(request: str, most: int) -> list[Any]:
        if request == "slow":
            assert whole.wait(60)
        given.append(request)
        return [request] if given.count(request) == 1 else []

    poller = MessagePoller(pull, pause=0.0)
    began = time.monotonic()
    assert poller.collect(dict.fromkeys(["slow", "fast", "faster"], 1)) == []
    assert sorted(wait_for(poller, ["slow", "fast", "faster"], 2)) == ["fast", "faster"]
    assert not whole.is_set()
    # A caller that left it for a while still gets it, once, when it is whole.
    assert poller.collect({}) == []
    whole.set()
    assert wait_for(poller, ["slow"], 1) == ["slow"]
    assert time.monotonic() - began < 30


def test_a_reply_waits_until_it_is_asked_for() -> None:
    """Those of a round and those of sites that are met are collected apart: none is lost."""
    given: list[str] = []

    def pull(request: str, most: int) -> list[Any]:
        given.append(request)
        return [request] if given.count(request) == 1 else []

    poller = MessagePoller(pull, pause=0.0)
    assert poller.collect({"a": 1, "b": 1}) == []
    until = time.monotonic() + 60
    while len(given) < 2:
        assert time.monotonic() < until
        time.sleep(0.005)
    time.sleep(0.05)
    assert wait_for(poller, ["b"], 1) == ["b"]
    assert wait_for(poller, ["c"], 1) == ["c"]
    assert wait_for(poller, ["a"], 1) == ["a"]


def test_one_look_at_a_time_for_each_reply() -> None:
    looks: list[str] = []
    active = 0

    def pull(request: str, most: int) -> list[Any]:
        nonlocal active
        active += 1
        assert active == 1
        looks.append(request)
        time.sleep(0.01)
        active -= 1
        return [request] if len(looks) == 5 else []

    poller = MessagePoller(pull, pause=0.0)
    assert wait_for(poller, ["a"], 1) == ["a"]
    assert len(looks) >= 5


def test_between_two_looks_there_is_a_pause() -> None:
    looks: list[float] = []

    def pull(request: str, most: int) -> list[Any]:
        looks.append(time.monotonic())
        return [request] if len(looks) == 3 else []

    assert wait_for(MessagePoller(pull, pause=0.2), ["a"], 1) == ["a"]
    assert all(later - earlier >= 0.2 for earlier, later in pairwise(looks))


def test_an_error_is_raised_where_it_is_waited_for() -> None:
    def pull(request: str, most: int) -> list[Any]:
        raise OSError("the server is gone")

    with pytest.raises(OSError, match="the server is gone"):
        wait_for(MessagePoller(pull), ["a"], 1)
