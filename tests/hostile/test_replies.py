"""Replies that a node has made up, in Flower's own objects: each fails by itself, and is small.

What stands in for the SuperLink gives out what a node has stored there; the grid that asks it, and
all that is made of what it gives, are Flower's own.
"""

import json
import time
import tracemalloc
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

pytest.importorskip("flwr", reason="needs the extra fedsieve[flower]")

from flwr.app import ConfigRecord, Metadata, RecordDict
from flwr.app.message import make_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ObjectTree, PullObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import (
    add_header_to_object_body,
    get_all_nested_objects,
    get_object_body,
    get_object_id,
    get_object_tree,
)
from flwr.superlink.grid.http_grid import HttpGrid

from fedsieve.algebra.budget import Budget
from fedsieve.errors import FedSieveError
from fedsieve.methods import fedit
from fedsieve.sites import flower_app
from fedsieve.sites.flower_app import content_of, transport
from fedsieve.sites.server import Incoming
from tests import toy
from tests.sites.test_flower import EXACT, Net, federation, run, site, sites_of

FRAME = bytes(range(256)) * 40
MOST = 3 * len(FRAME)


class Stored:
    """A reply's objects as a SuperLink keeps them: its heads were looked at, and nothing else."""

    def __init__(self, content: RecordDict, answers: str) -> None:
        metadata = Metadata(1, "m", 7, 1, answers, "", time.time(), 60.0, "train")
        self.message = make_message(metadata=metadata, content=content)
        self.objects = {
            name: part.deflate() for name, part in get_all_nested_objects(self.message).items()
        }
        self.tree: ObjectTree = get_object_tree(self.message)
        self.root: str = self.tree.object_id

    def swap(self, kind: str, body: Callable[[bytes], bytes]) -> "Stored":
        """The object of this kind gets another body; what names it, names the new one."""
        (old,) = [n for n, c in self.objects.items() if c.startswith(kind.encode() + b" ")]
        head, _, rest = self.objects[old].partition(b"\0")
        made = body(rest)
        first, _ = head.rsplit(b" ", 1)
        content = first + b" %d\0" % len(made) + made
        return self._put(old, content)

    def _put(self, old: str, content: bytes) -> "Stored":
        new = get_object_id(content)
        del self.objects[old]
        above = [(n, c) for n, c in self.objects.items() if old.encode() in c]
        self.objects[new] = content
        if old == self.root:
            self.root = new
        _rename(self.tree, old, new)
        for name, text in above:
            self._put(name, _sized(text.replace(old.encode(), new.encode())))
        return self


def _sized(content: bytes) -> bytes:
    head, _, body = content.partition(b"\0")
    return head.rsplit(b" ", 1)[0] + b" %d\0" % len(body) + body


def _rename(tree: ObjectTree, old: str, new: str) -> None:
    if tree.object_id == old:
        tree.object_id = new
    for child in tree.children:
        _rename(child, old, new)


def grid_of(stored: dict[str, Stored], error: Exception | None = None) -> Any:
    """Flower's grid, whose SuperLink has these replies."""

    def pull_messages(asked: Any) -> Any:
        if error is not None:
            raise error
        there = [stored[name] for name in asked.message_ids if name in stored]
        messages = []
        for each in there:
            message = message_to_proto(each.message)
            message.metadata.message_id = each.root
            message.metadata.reply_to_message_id = "r"
            messages.append(message)
        trees = [each.tree for each in there]
        return PullAppMessagesResponse(messages_list=messages, message_object_trees=trees)

    def pull_object(asked: Any) -> Any:
        content = next(
            (s.objects[asked.object_id] for s in stored.values() if asked.object_id in s.objects),
            None,
        )
        return PullObjectResponse(
            object_found=content is not None, object_available=True, object_content=content or b""
        )

    grid = HttpGrid(token="t")
    grid._run = SimpleNamespace(run_id=1)
    grid._client = SimpleNamespace(
        PullMessages=pull_messages, PullObject=pull_object, ConfirmMessageReceived=lambda _: None
    )
    return grid


@pytest.fixture(autouse=True)
def _plain_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HttpGrid, "run", property(lambda self: self._run))


def collected(grid: Any, most: int = MOST) -> Incoming:
    reach = transport(grid, proved=False)
    until = time.monotonic() + 60
    while not (found := reach.collect({"r": most})):
        assert time.monotonic() < until
        time.sleep(0.01)
    (incoming,) = found
    return incoming


def test_an_honest_reply_comes_whole() -> None:
    stored = Stored(content_of(FRAME), "r")
    sent = sum(map(len, stored.objects.values()))
    assert collected(grid_of({"r": stored}), len(FRAME)) == Incoming("r", FRAME, "", sent)


def named(times: int) -> Callable[[bytes], bytes]:
    return lambda body: json.dumps({**json.loads(body), "arraychunk_ids": [0] * times}).encode()


def changed(**what: Any) -> Callable[[bytes], bytes]:
    return lambda body: json.dumps({**json.loads(body), **what}).encode()


SPOILT: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "an array that is no UTF-8": ("Array", lambda body: b"\xff\xffgarbage"),
    "an array that is no JSON": ("Array", lambda body: body[:-1]),
    "an array nested deep": ("Array", lambda body: b'{"a":' + b"[" * 100_000),
    "an array that is a list": ("Array", lambda body: b"[]"),
    "an array of other chunks": ("Array", changed(arraychunk_ids=[5])),
    "an array whose chunks are words": ("Array", changed(arraychunk_ids=["x"])),
    "an array without chunks": ("Array", changed(arraychunk_ids=[])),
    "an array of no shape": ("Array", changed(shape=None)),
    "an array of another form": ("Array", changed(stype="numpy.ndarray")),
    "a record that is no JSON": ("ArrayRecord", lambda body: b"{"),
    "a record of another name": ("ArrayRecord", lambda body: body.replace(b"frame", b"flame")),
    "records that are a number": ("RecordDict", lambda body: b"7"),
    "a message that is no protobuf": ("Message", lambda body: b"\xff" * 50),
    "one chunk, named many times": ("Array", named(4)),
}


@pytest.mark.parametrize("how", SPOILT)
def test_what_is_no_reply_is_that_requests_failure(how: str) -> None:
    stored = Stored(content_of(FRAME), "r").swap(*SPOILT[how])
    incoming = collected(grid_of({"r": stored}))
    assert incoming.request == "r"
    assert incoming.data is None
    assert incoming.error
    assert not incoming.lost  # nothing is gained by asking again


def test_another_kind_of_record_is_refused() -> None:
    stored = Stored(RecordDict({"fedsieve": ConfigRecord({"a": "b"})}), "r")
    assert "ConfigRecord" in collected(grid_of({"r": stored})).error


def test_a_reply_is_added_up_before_it_is_put_together() -> None:
    """5 MB that would be 3.7 GB."""
    chunk = 5 << 20
    stored = Stored(content_of(bytes(chunk)), "r").swap("Array", named(700))
    grid = grid_of({"r": stored})
    tracemalloc.start()
    try:
        incoming = collected(grid, chunk)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert incoming.error == f"it would be {700 * chunk} bytes: at most {chunk} can be"
    assert peak < 5 * chunk


@pytest.mark.parametrize("kind", ["Array", "ArrayRecord", "RecordDict"])
def test_what_holds_no_bytes_of_a_frame_is_short(kind: str) -> None:
    """Lists of nothing become 27 times as much in Python as they are as text."""

    def padded(body: bytes) -> bytes:
        said = json.loads(body)
        return json.dumps({**said, "x": [[]] * (1 << 20)}).encode()

    stored = Stored(content_of(FRAME), "r").swap(kind, padded)
    incoming = collected(grid_of({"r": stored}), most=90 << 20)
    assert incoming.data is None
    assert f"its {kind} is" in incoming.error
    assert not incoming.lost


def test_a_reply_of_too_many_bytes_is_not_fetched_whole() -> None:
    stored = Stored(content_of(bytes(range(256)) * (100 << 10)), "r")  # 25 MiB, in 5 chunks
    incoming = collected(grid_of({"r": stored}))
    assert "longer than" in incoming.error
    assert not incoming.lost


def test_objects_that_are_not_there_are_lost() -> None:
    stored = Stored(content_of(FRAME), "r")
    stored.objects.popitem()
    incoming = collected(grid_of({"r": stored}))
    assert incoming.data is None
    assert incoming.lost  # as those of a node that ended: it is asked again


def test_a_reply_answers_what_it_was_asked_for_whatever_it_says() -> None:
    stored = Stored(content_of(FRAME), "of another site")
    assert collected(grid_of({"r": stored})).request == "r"


@pytest.mark.parametrize("error", [httpx.ConnectError("gone"), httpx.ReadTimeout("slow")])
def test_an_error_of_the_connection_is_raised(error: Exception) -> None:
    with pytest.raises(type(error)):
        collected(grid_of({}, error))


def failing(path: str) -> httpx.HTTPStatusError:
    request = httpx.Request("POST", f"http://127.0.0.1:1/v1/runtime/{path}")
    answer = httpx.Response(500, request=request)
    return httpx.HTTPStatusError("Server error '500'", request=request, response=answer)


def test_an_error_of_the_superlinks_is_no_word_of_the_sites() -> None:
    """Its database is full or locked, say: the site is asked again."""
    incoming = collected(grid_of({}, failing("pull-messages")))
    assert incoming.lost
    assert incoming.error.startswith("the SuperLink could not give it: ")


def test_a_superlink_that_fails_is_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower_app, "Message", lambda *_, **__: None)  # made in a run alone
    monkeypatch.setattr(flower_app, "size_of", lambda _: 1)
    grid = grid_of({})

    def fails(*_: object) -> None:
        raise failing("push-messages")

    grid.get_nodes = grid.push_messages = fails
    reach = transport(grid, proved=False)
    for ask in (reach.nodes, lambda: reach.send(1, "train", b"x", 1.0)):
        with pytest.raises(FedSieveError, match=r"the SuperLink failed \(500 at /v1/runtime/push-"):
            ask()


def test_a_site_of_no_answers_is_dropped_by_name_and_not_asked_again() -> None:
    """And the others are merged."""
    method = fedit.method(**EXACT)
    members = toy.clients([Budget()] * 2)
    net = Net({n: site(member, method) for n, member in enumerate(members)})
    inner = net.transport()

    def collect(requests: Any) -> list[Incoming]:
        found = []
        for incoming in inner.collect(requests):
            node, head = net.asked[int(incoming.request)]
            if node == 1 and head["do"] == "train":
                incoming = Incoming(incoming.request, None, "UnicodeDecodeError: \x1b[2J", 9, False)
            found.append(incoming)
        return found

    net.transport = lambda: inner._replace(collect=collect)  # type: ignore[method-assign]
    _, receipts, _ = run(federation(sites_of(net), method, size=2), 2)
    reasons = {(r.round, r.client): r.dropped for r in receipts}
    why = "answered with bytes that are no answer: UnicodeDecodeError: ?[2J"
    assert [reasons[n, "0000"] for n in (1, 2)] == [None, None]
    assert [reasons[n, "0001"] for n in (1, 2)] == [why, why]
    assert [head["do"] for node, head in net.asked if node == 1].count("train") == 2


def test_objects_are_as_flower_writes_them() -> None:
    """What the tests above swap: a body, and the head that goes with it."""
    stored = Stored(content_of(FRAME), "r")
    before = dict(stored.objects)
    assert stored.swap("Array", lambda body: body).objects == before
    array = content_of(FRAME)["fedsieve"]["frame"]
    body = get_object_body(array.deflate(), type(array))
    assert add_header_to_object_body(body, array) == array.deflate()
