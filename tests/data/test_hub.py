"""A name that is nowhere is told so in seconds, with where it was looked up: a mistyped one on a
machine without a network, above all.
"""

import socket
import time
from collections.abc import Callable, Iterator

import datasets
import pytest
from huggingface_hub import constants

from fedsieve.algebra.keys import Key
from fedsieve.data import hub, sources
from fedsieve.errors import FedSieveError
from fedsieve.train.model import load_base, shape_of
from fedsieve.train.reader import load_reader


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A hub at a port of this machine at which nobody listens."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in (
        "http_proxy",
        "https_proxy",
        "all_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)
    yield endpoint
    assert constants.HF_HUB_OFFLINE is False  # as it was found


LOOKUPS: dict[str, Callable[[], object]] = {
    "a model": lambda: load_base("minilm-l7", "classification", ("a", "b"), key=Key(0)),
    "a model's shape": lambda: shape_of("some/model", "classification", 2),
    "a tokenizer": lambda: load_reader("some/model", "classification"),
    "rows": lambda: sources.load("some/rows", "train"),
}


@pytest.mark.parametrize("what", LOOKUPS)
def test_without_a_network_it_takes_seconds(away: str, what: str) -> None:
    began, before = time.monotonic(), datasets.config.HF_HUB_OFFLINE
    with pytest.raises(FedSieveError) as refused:
        LOOKUPS[what]()
    assert time.monotonic() - began < 8
    said = str(refused.value)
    assert f"in the hub's cache ({constants.HF_HUB_CACHE}) alone" in said
    assert "(127.0.0.1) cannot be reached from here" in said
    if what == "a model":
        assert "did you mean 'minilm-l6'" in said
    assert before == datasets.config.HF_HUB_OFFLINE


def test_a_proxy_is_believed(away: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not hub.reachable()
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert hub.reachable()


def test_a_hub_that_answers_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        assert hub.reachable()
        assert hub.places() == "at the hub (127.0.0.1)"
