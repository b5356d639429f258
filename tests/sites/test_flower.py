"""The engine for sites on other machines, over a network that is a list in this process.

The sites are clients of the toy federation; each answers frames as a worker does. So what is tested
is all that lies between the round loop and the bytes: who is met, asked, waited for and believed.
"""

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsieve.algebra.budget import Budget, Client
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import Memory, Method
from fedsieve.algebra.payload import Payload, Values
from fedsieve.algebra.support import everything
from fedsieve.engine.client import take_part
from fedsieve.engine.loop import Federation, Receipt, Round, begin, rounds
from fedsieve.errors import FedSieveError, NoUsableUpdate
from fedsieve.frame import Frame, pack, unpack
from fedsieve.methods import fedit, fedsa_lora, flasc, flora, fslora_flasc
from fedsieve.report import read
from fedsieve.run import rundir
from fedsieve.settings import Sampling
from fedsieve.sites import server
from fedsieve.sites.here import descendants
from fedsieve.sites.server import (
    Incoming,
    Node,
    PendingRequest,
    RoundPolicy,
    Sites,
    Transport,
    joint_score,
)
from fedsieve.sites.worker import BODY, digest, seal
from fedsieve.wire import encode
from tests import toy
from tests.sites import impostor

BUDGETS = [Budget(0.25, 0.5, 0.25), Budget(0.5, 1.0, 0.5), Budget()]
RECIPE = "the recipe"
EXACT: Any = {"down_values": "float64", "up_values": "float64"}
LOST = 77
Answer = Callable[[Frame], Frame | bytes | None]


@dataclass
class Net:
    """Nodes with a function each that answers frames, and a clock that moves when one waits.

    slow:   seconds until a node's answers to training are there
    losing: how many requests to train a node will lose
    """

    answers: dict[int, Answer] = field(default_factory=dict)
    slow: dict[int, float] = field(default_factory=dict)
    since: dict[int, str] = field(default_factory=dict)
    keys: dict[int, str] = field(default_factory=dict)
    losing: dict[int, int] = field(default_factory=dict)
    now: float = 0.0
    carried: int = 0  # bytes of all messages
    asked: list[tuple[int, Mapping[str, Any]]] = field(default_factory=list)
    coming: dict[str, tuple[float, bytes]] = field(default_factory=dict)

    def transport(self) -> Transport:
        return Transport(self.nodes, self.send, self.collect)

    def nodes(self) -> list[Node]:
        return [Node(id, self.since.get(id, ""), self.keys.get(id, "")) for id in self.answers]

    def send(self, node: int, kind: str, data: bytes, seconds: float) -> PendingRequest | None:
        if node not in self.answers:
            return None
        frame = unpack(data)
        request = str(len(self.asked))
        self.asked.append((node, frame.header))
        self.carried += len(data) + 100
        if kind == "train" and self.losing.get(node, 0):
            self.losing[node] -= 1
            self.coming[request] = self.now, b""
            return PendingRequest(request, len(data) + 100)
        answer = self.answers[node](frame)
        if isinstance(answer, Frame):
            answer = seal(digest(frame), answer)
        if answer is not None:
            wait = self.slow.get(node, 0.0) if kind == "train" else 0.0
            packed = answer if isinstance(answer, bytes) else pack(answer)
            self.coming[request] = self.now + wait, packed
        return PendingRequest(request, len(data) + 100)

    def collect(self, requests: Collection[str]) -> list[Incoming]:
        there = [t for t in requests if t in self.coming and self.coming[t][0] <= self.now]
        found = [(request, self.coming.pop(request)[1]) for request in there]
        arrived = [
            Incoming(request, data, "", len(data) + 1000)
            if data
            else Incoming(request, None, "lost on its way", LOST)
            for request, data in found
        ]
        self.carried += sum(incoming.transport for incoming in arrived)
        return arrived

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def site(client: Client, method: Method, change: Callable[[Frame], Any] = lambda f: f) -> Answer:
    """What a worker answers. change: what its answers to training become."""
    memory: Memory = {}

    def answer(request: Frame) -> Any:
        nonlocal memory
        head = request.header
        if head["do"] == "describe":
            budget = client.budget._asdict()
            return Frame({"ok": True, "name": client.id, "budget": budget, "versions": {}})
        if head["do"] == "recipe":
            assert request.body.decode() == RECIPE
            return Frame({"ok": True, "examples": client.examples})
        key = Key(head["seed"], head["round"], client.id)
        reply, memory = take_part(method, toy.train, toy.start(), client, memory, key, request.body)
        figures = reply._asdict()
        head = {n: figures[n] for n in ("loss", "steps", "seconds", "compute", "wire", "memory")}
        head = {"ok": True, "round": key.round, "reason": reply.reason, **head}
        return change(Frame(head, reply.update or b""))

    return answer


def welcome(head: Mapping[str, Any], client: Client | None) -> Client:
    if client is not None:
        return client._replace(examples=head["examples"])
    if head["versions"].get("wire", 1) != 1:
        raise FedSieveError(f"site {head['name']} speaks another version")
    return Client(head["name"], 1, Budget(**head["budget"]))


def sites_of(
    net: Net,
    said: list[str] | None = None,
    given: Mapping[tuple[str, str], int] | None = None,
    most: int = BODY,
    **policy: Any,
) -> Sites:
    say = (lambda text: None) if said is None else said.append
    settled = RoundPolicy(**{"sites": len(net.answers), **policy})
    return Sites(
        net.transport(),
        RECIPE,
        "digest",
        welcome,
        settled,
        say,
        lambda: net.now,
        net.sleep,
        given=given or {},
        most=most,
    )


def federation(sites: Sites, method: Method, **sampling: Any) -> Federation:
    drawn = Sampling(**{"size": 3, **sampling})
    return Federation(
        method, sites.there(), drawn, 7, sites.exchange, there=sites.there, before=sites.before
    )


def run(setup: Federation, number: int) -> tuple[Any, list[Receipt], list[Round]]:
    _, progress = begin(setup, toy.start())
    receipts: list[Receipt] = []
    summaries = []
    for summary, part, now in rounds(setup, progress, number):
        receipts += part
        summaries.append(summary)
        progress = now
    return setup.method.export(progress.state).tensors, receipts, summaries


def untimed(receipt: Receipt) -> Receipt:
    return receipt._replace(seconds=0, compute=0, wire=0, transport_bytes=None, digest=None)


@pytest.mark.parametrize("build", [fslora_flasc, fedsa_lora, flora], ids=lambda m: m.__name__)
def test_same_as_in_one_process(build: Any) -> None:
    """Whatever the order in which answers come: adapter and payload bytes are those of one process.

    The methods between them use budgets, keep memories, and change the base.
    """
    method = build.method(**EXACT)
    budgets = BUDGETS if "ratio" in method.knobs else [Budget()] * 3
    members = toy.clients(budgets)
    expected, receipts, _ = toy.after(method, members, 3, cohort=2)
    net = Net({9 - i: site(c, method) for i, c in enumerate(members)}, {9: 5.0, 8: 2.0})
    found, ours, summaries = run(federation(sites_of(net), method, size=2), 3)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert [untimed(r) for r in ours] == [untimed(r) for r in receipts]
    for summary in summaries:
        # Each message weighs 100 more than its frame there, and 1000 more on its way back.
        assert summary.transport_bytes is not None
        assert summary.transport_bytes > summary.down_bytes + summary.up_bytes + 2 * 1100


def test_each_node_is_met_once() -> None:
    method = fslora_flasc.method(**EXACT)
    net = Net({i: site(c, method) for i, c in enumerate(toy.clients(BUDGETS))})
    run(federation(sites_of(net), method), 3)
    for node in net.answers:
        asked = [head["do"] for n, head in net.asked if n == node]
        assert asked == ["describe", "recipe", "train", "train", "train"]


def test_late_is_dropped_counted_and_not_asked_while_it_is_busy() -> None:
    method = flasc.method(**EXACT)
    net = Net({i: site(c, method) for i, c in enumerate(toy.clients([Budget()] * 3))}, {1: 25.0})
    said: list[str] = []
    _, receipts, summaries = run(federation(sites_of(net, said, deadline=10.0), method), 3)
    late = [r for r in receipts if r.dropped is not None]
    assert [(r.round, r.client, r.up_bytes) for r in late] == [(1, "0001", 0)]
    assert late[0].dropped == "late: no answer in the round's 10 s (--deadline)"
    assert late[0].down_bytes == receipts[0].down_bytes  # it was sent, so it is charged
    assert [s.clients for s in summaries] == [3, 2, 2]
    net.now += 20
    setup = federation(sites_of(net, said, deadline=10.0), method)
    assert len(setup.clients) == 3


def test_who_is_there_and_still_at_a_round_is_told_as_that() -> None:
    """Not as somebody whose worker is to be started."""
    method = flasc.method(**EXACT)
    members = toy.clients([Budget()] * 2)
    net = Net({i: site(c, method) for i, c in enumerate(members)}, {0: 99.0, 1: 99.0})
    setup = replace(federation(sites_of(net, deadline=10.0, wait=5.0), method), spare=2)
    with pytest.raises(FedSieveError) as caught:
        run(setup, 2)
    told = "0 sites are there, and a round needs 1: 0000, 0001 would be enough, still at an earlier"
    assert told in str(caught.value)


def test_late_answer_comes_in_and_is_thrown_away() -> None:
    method = flasc.method(**EXACT)
    net = Net({i: site(c, method) for i, c in enumerate(toy.clients([Budget()] * 2))}, {1: 10.5})
    said: list[str] = []
    setup = federation(sites_of(net, said, deadline=10.0), method, size=2)
    net.slow[0] = 1.0
    _, receipts, _ = run(setup, 2)
    # Round 2 begins at 10 s with site 0 alone; the late answer arrives while it waits for that.
    assert [(r.round, r.client) for r in receipts] == [(1, "0000"), (1, "0001"), (2, "0000")]
    assert said[-1] == "site 0001: an answer came too late and is thrown away"
    net.slow.clear()
    _, receipts, _ = run(setup, 1)
    usual, with_late = (r.transport_bytes or 0 for r in receipts)
    assert with_late > usual + receipts[0].up_bytes


def test_what_came_while_the_server_decoded_has_come() -> None:
    """The second answer is there in time, while the server is busy with the first."""
    method = flasc.method(**EXACT)
    members = toy.clients([Budget()] * 3)
    net = Net({i: site(c, method) for i, c in enumerate(members)}, {0: 8.0, 1: 9.5, 2: 99.0})
    setup = federation(sites_of(net, deadline=10.0), method)

    def busy(site: str, said: str, number: int) -> None:
        net.now += 3.0

    _, receipts, _ = run(replace(setup, before=busy), 1)
    dropped = {r.client: r.dropped for r in receipts}
    assert dropped["0000"] is dropped["0001"] is None
    assert str(dropped["0002"]).startswith("late: ")


def test_over_selection_takes_the_first_and_says_who_was_late() -> None:
    method = flasc.method(**EXACT)
    members = toy.clients([Budget()] * 3)
    net = Net({i: site(c, method) for i, c in enumerate(members)}, {0: 9.0, 1: 1.0, 2: 2.0})
    setup = federation(sites_of(net, enough=2), method, size=2, extra=1)
    _, receipts, (summary,) = run(setup, 1)
    dropped = {r.client: r.dropped for r in receipts}
    assert dropped["0001"] is dropped["0002"] is None
    assert dropped["0000"] is not None
    assert dropped["0000"].startswith("late: the round had its 2 updates after 2")
    assert net.now < 3
    assert (summary.clients, summary.dropped) == (3, 1)


def _nan(frame: Frame) -> Frame:
    return Frame({**frame.header, "steps": "many"}, frame.body)


BAD: dict[str, tuple[Callable[[Frame], Any], str]] = {
    "garbage": (lambda frame: b"\xff" * 40, "header"),
    "half": (lambda frame: pack(frame)[:-5], "ends before"),
    "no update": (lambda frame: frame._replace(body=b""), "without an update"),
    "other round": (lambda f: Frame({**f.header, "round": 9}, f.body), "an answer for round 9"),
    "no number": (_nan, "steps"),
    "endless number": (lambda f: Frame({**f.header, "steps": 10**400}, f.body), "steps"),
    "huge number": (lambda f: Frame({**f.header, "loss": 1e308}, f.body), "loss"),
    "endless seconds": (lambda f: Frame({**f.header, "seconds": 1e9}, f.body), "seconds"),
    "endless compute": (lambda f: Frame({**f.header, "compute": 1e9}, f.body), "compute"),
    "endless wire": (lambda f: Frame({**f.header, "wire": 1e9}, f.body), "wire"),
    "endless compute of a refusal": (
        lambda f: Frame({**f.header, "compute": 1e9, "reason": "no"}),
        "compute",
    ),
    "negative number": (lambda f: Frame({**f.header, "steps": -1}, f.body), "steps"),
    "reason that is no text": (lambda f: Frame({**f.header, "reason": ["x"]}, f.body), "no text"),
    "reason that steers": (
        lambda f: Frame({**f.header, "reason": "\x1b[2J\nround 9"}, f.body),
        "?[2J?round 9",
    ),
    "refused": (lambda frame: Frame({"ok": False, "error": "disk full"}), "disk full"),
    "other bytes": (lambda f: f._replace(body=f.body[:-9] + b"123456789"), "refused"),
}


def test_a_round_that_was_full_is_no_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long what came took to decode: the others were late for the cohort."""
    method = flasc.method(**EXACT)
    members = toy.clients([Budget()] * 4)
    net = Net({i: site(c, method) for i, c in enumerate(members)}, {2: 1.0, 3: 2.0})
    sites = sites_of(net, enough=2)
    note = sites.usable

    def slowly(count: int) -> None:
        net.now += 1e4
        note(count)

    monkeypatch.setattr(sites, "usable", slowly)
    _, receipts, _ = run(federation(sites, method, size=2, extra=2), 1)
    dropped = {r.client: str(r.dropped) for r in receipts if r.dropped is not None}
    assert [*dropped] == ["0002", "0003"]
    assert all(why.startswith("late: the round had its 2 updates") for why in dropped.values())


@pytest.mark.parametrize("kind", [*BAD, "huge"])
def test_what_is_refused_closes_no_round(kind: str) -> None:
    """The first answer is nothing to merge: the round waits for those of the others."""
    layout = toy.start().layout
    change = {
        **{name: change for name, (change, _) in BAD.items()},
        "huge": lambda frame: frame._replace(body=impostor.huge(frame.body, layout)),
    }[kind]
    method = flasc.method(**EXACT)
    members = toy.clients([Budget()] * 4)
    net = Net(
        {i: site(c, method, change if i == 1 else lambda f: f) for i, c in enumerate(members)},
        {0: 2.0, 1: 0.5, 2: 1.0, 3: 9.0},
    )
    setup = federation(sites_of(net, enough=2), method, size=2, extra=2)
    found, receipts, _ = run(replace(setup, norm_bound=100.0), 1)
    dropped = {r.client: r.dropped for r in receipts}
    assert dropped["0000"] is dropped["0002"] is None
    assert not str(dropped["0001"]).startswith("late")
    assert str(dropped["0003"]).startswith("late: the round had its 2 updates after 2")
    expected, _, _ = toy.after(method, [members[0], members[2]], 1)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_over_selection_of_answers_that_come_together() -> None:
    """One too many in the same moment: it is late, and its site is free for the next round."""
    method = flasc.method(**EXACT)
    net = Net({i: site(c, method) for i, c in enumerate(toy.clients([Budget()] * 3))})
    sites = sites_of(net, enough=2)
    _, receipts, _ = run(federation(sites, method, size=2, extra=1), 1)
    assert [r.dropped is None for r in receipts] == [True, True, False]
    assert len(sites.there()) == 3


@pytest.mark.parametrize("kind", BAD)
def test_bad_answers_are_left_out(kind: str) -> None:
    """The round is that of the others, to the bit."""
    change, why = BAD[kind]
    method = flasc.method(**EXACT)
    members = toy.clients([Budget()] * 3)
    net = Net(
        {i: site(c, method, change if i == 1 else lambda f: f) for i, c in enumerate(members)}
    )
    found, receipts, _ = run(federation(sites_of(net), method), 1)
    assert [r.client for r in receipts if r.dropped] == ["0001"]
    assert why in (receipts[1].dropped or "")
    expected, _, _ = toy.after(method, [members[0], members[2]], 1)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", ["seconds", "compute", "wire"])
def test_a_log_of_whatever_times_sites_may_tell_can_be_read(tmp_path: Path, name: str) -> None:
    """The longest that is taken, of as many sites as a round may have: their sum is a time."""
    method, sites = fedit.method(**EXACT), 10_000
    longest = site(
        toy.clients([Budget()])[0],
        method,
        lambda f: Frame({**f.header, name: server.LONGEST}, f.body),
    )
    _, (receipt,), (summary,) = run(federation(sites_of(Net({0: longest})), method, size=1), 1)
    assert receipt.dropped is None
    assert getattr(receipt, name) == server.LONGEST
    log = summary._replace(
        **{
            each: sites * getattr(summary, each)
            for each in ("seconds", "compute_seconds", "wire_seconds")
        }
    )
    rundir.append(tmp_path, "metrics.jsonl", [log])
    assert len(read.rounds(tmp_path / "metrics.jsonl")) == 1


def test_the_same_answer_again_is_no_update() -> None:
    """The update of the round before, called the present one's: refused, whatever it is called."""
    method = flasc.method(**EXACT)
    members = toy.clients([Budget()] * 3)
    given: list[Frame] = []

    def again(frame: Frame) -> Frame:
        given.append(frame)
        if frame.header["round"] in (2, 3):
            return Frame({**frame.header, "round": frame.header["round"]}, given[0].body)
        return frame

    net = Net({i: site(c, method, again if i == 1 else lambda f: f) for i, c in enumerate(members)})
    _, receipts, _ = run(federation(sites_of(net), method), 4)
    why = "its update was refused: it says the same as that of round 1, number for number"
    assert [r.dropped for r in receipts if r.client == "0001"] == [None, why, why, None]
    assert all(r.dropped is None for r in receipts if r.client != "0001")


def test_an_update_that_changes_nothing_may_come_again() -> None:
    """Two such are alike by nature, and whoever found nothing to change took part."""
    method = flasc.method(**EXACT)
    layout = toy.start().layout
    zeros = Values("float64", torch.zeros(layout.size, dtype=torch.float64), torch.empty(0))
    nothing = encode(Payload(layout, everything(layout), zeros, "known", "known"))
    members = toy.clients([Budget()] * 2)
    content: dict[int, Callable[[Frame], Frame]] = {
        0: lambda f: f,
        1: lambda f: f._replace(body=nothing),
    }
    net = Net({i: site(c, method, content[i]) for i, c in enumerate(members)})
    _, receipts, _ = run(federation(sites_of(net), method, size=2), 3)
    assert [r.dropped for r in receipts] == [None] * 6


def test_an_answer_that_is_carried_twice_counts_once() -> None:
    method = flasc.method(**EXACT)
    members = toy.clients([Budget()] * 2)
    expected, _, _ = toy.after(method, members, 2)
    net = Net({i: site(c, method) for i, c in enumerate(members)})
    collect = net.collect
    before: list[Incoming] = []

    def stammering(requests: Collection[str]) -> list[Incoming]:
        found = collect(requests)
        twice = [*found, *found, *before]
        before.extend(found)
        return twice

    net.collect = stammering  # type: ignore[method-assign]
    found, receipts, _ = run(federation(sites_of(net), method, size=2), 2)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert [r.dropped for r in receipts] == [None] * 4


ENDS_WITH_PARENT = """
import sys, time
from fedsieve.sites.flower_app import end_with_parent
{handler}
end_with_parent(pause=0.1, patience=1.0)
print("at work", flush=True)
time.sleep(120)
"""


@pytest.mark.parametrize("handler", ["", "import signal; signal.signal(15, signal.SIG_IGN)"])
def test_the_servers_process_ends_when_flowers_own_is_killed(tmp_path: Path, handler: str) -> None:
    """It would hold the run's lock for good. Also one that has no ears for SIGTERM."""
    pytest.importorskip("flwr", reason="needs the extra fedsieve[flower]")
    program = tmp_path / "server.py"
    program.write_text(ENDS_WITH_PARENT.format(handler=handler))
    start = f"import subprocess, sys; subprocess.run([sys.executable, {str(program)!r}])"
    parent = subprocess.Popen([sys.executable, "-c", start], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent:
        assert parent.stdout.readline() == "at work\n"
        assert len(descendants(parent.pid)) == 1
        parent.kill()
        killed = time.monotonic()
        assert parent.stdout.read() == ""  # which ends when the last of both has ended
        assert time.monotonic() - killed < 60


def test_diverged_site_says_why() -> None:
    method = flasc.method(**EXACT)

    def diverged(frame: Frame) -> Frame:
        return Frame({**frame.header, "loss": None, "reason": "the loss became inf"})

    net = Net({0: site(toy.clients([Budget()])[0], method, diverged)})
    with pytest.raises(NoUsableUpdate, match="client 0000: the loss became inf"):
        run(federation(sites_of(net), method, size=1), 1)


def test_one_site_alone_in_its_round_stops_nobody() -> None:
    """Its round goes by as if nobody had been asked; so many in a row do stop the run, by name."""
    method = flasc.method(**EXACT)
    members = toy.clients([Budget()] * 4)

    def diverged(frame: Frame) -> Frame:
        return Frame({**frame.header, "loss": None, "reason": "the loss became inf"})

    def setup(bad: set[int], spare: int) -> Federation:
        net = Net({i: site(c, method, *[diverged] * (i in bad)) for i, c in enumerate(members)})
        return replace(federation(sites_of(net), method, size=1), spare=spare)

    found, receipts, summaries = run(setup({0}, 2), 12)
    refused = {r.round for r in receipts if r.dropped}
    assert refused
    assert refused == {r.round for r in receipts if r.client == "0000"}
    assert {s.round for s in summaries if s.dropped} == refused
    assert [s.round for s in summaries] == list(range(1, 13))
    # What is merged is what the others sent: that of a run which is asked for their rounds alone.
    assert all(s.loss is None for s in summaries if s.round in refused)
    with pytest.raises(NoUsableUpdate, match="client 0000: the loss became inf"):
        run(setup({0}, 0), 12)
    every = setup({0, 1, 2, 3}, 2)
    _, before = begin(every, toy.start())
    coming = rounds(every, before, 12)
    for number in (1, 2):
        summary, _, after = next(coming)
        assert (summary.round, summary.dropped) == (number, 1)
        assert toy.distance(after.state.trees["adapter"], before.state.trees["adapter"]) == 0
    with pytest.raises(NoUsableUpdate, match="the loss became inf"):
        next(coming)
    # Whoever goes on has lost them already: no restart gives rounds away anew.
    with pytest.raises(NoUsableUpdate, match="the loss became inf"):
        next(rounds(every, after, 12, lost=2))
    assert next(rounds(every, after, 12, lost=1))[0].dropped == 1
    assert all(torch.isfinite(t).all() for t in found.values())


def test_quorum() -> None:
    method = flasc.method(**EXACT)
    members = toy.clients([Budget()] * 3)
    net = Net({i: site(c, method) for i, c in enumerate(members)}, {1: 99.0, 2: 99.0})
    setup = federation(sites_of(net, deadline=5.0, quorum=2), method, quorum=2)
    with pytest.raises(NoUsableUpdate, match="quorum is 2"):
        run(setup, 1)


def test_other_wire_version_is_refused_by_name() -> None:
    method = flasc.method(**EXACT)
    members = toy.clients([Budget()] * 2)
    net = Net({i: site(c, method) for i, c in enumerate(members)})
    honest = net.answers[1]

    def old(frame: Frame) -> Any:
        answer = honest(frame)
        assert isinstance(answer, Frame)
        return Frame({**answer.header, "versions": {"wire": 0}}, answer.body)

    net.answers[1] = old
    said: list[str] = []
    setup = federation(sites_of(net, said, wait=30.0), method)
    assert [c.id for c in setup.clients] == ["0000"]
    assert said[0] == "node 1 is not used: site 0001 speaks another version"
    assert said.count(said[0]) == 1


def test_two_nodes_of_one_name() -> None:
    method = flasc.method(**EXACT)
    (client,) = toy.clients([Budget()])
    net = Net({5: site(client, method), 6: site(client, method)})
    said: list[str] = []
    sites = sites_of(net, said, sites=1)
    assert [c.id for c in sites.there()] == ["0000"]
    run(federation(sites, method, size=1), 1)
    assert any("another node is the site '0000' already" in line for line in said)
    trained = {node for node, head in net.asked if head["do"] == "train"}
    # When the node goes, the other takes its place.
    del net.answers[trained.copy().pop()]
    net.now += 60
    setup = federation(sites, method, size=1)
    run(setup, 1)
    assert {n for n, head in net.asked if head["do"] == "train"} == {5, 6}


def test_a_site_keeps_the_key_that_it_was_first_met_with() -> None:
    method = flasc.method(**EXACT)
    (client,) = toy.clients([Budget()])
    net = Net({5: site(client, method)}, keys={5: "one", 6: "two", 7: "one"})
    pinned: list[dict[str, str]] = []
    said: list[str] = []

    def sites(known: Mapping[str, str]) -> Sites:
        policy = RoundPolicy(sites=1, wait=30.0)
        keep = lambda keys: pinned.append(dict(keys))  # noqa: E731
        transport, clock = net.transport(), lambda: net.now
        return Sites(
            transport, RECIPE, "digest", welcome, policy, said.append, clock, net.sleep,
            keys=known, pin=keep,
        )  # fmt: skip

    first = sites({})
    assert [c.id for c in first.there()] == ["0000"]
    assert pinned == [{"0000": "one"}]
    # Another node takes the name while the first is away: in this run, and in one that goes on.
    net.answers = {6: site(client, method)}
    for each in (first, sites(pinned[0])):
        with pytest.raises(FedSieveError, match="0 sites are there"):
            each.there()
        (why,) = [line for line in said if line.startswith("node 6, as site 0000, is not used")]
        assert "another key than the one that was site '0000' before" in why
        said.clear()
    # The right key is let in again, whatever number its node has now.
    net.answers = {7: site(client, method)}
    assert [c.id for c in first.there()] == ["0000"]
    assert pinned == [{"0000": "one"}]


def test_site_that_comes_back_is_used_again() -> None:
    method = flasc.method(**EXACT)
    members = toy.clients([Budget()] * 2)
    net = Net({i: site(c, method) for i, c in enumerate(members)})
    setup = federation(sites_of(net), method, size=2)
    away = net.answers.pop(1)
    _, receipts, _ = run(setup, 1)
    assert [r.client for r in receipts] == ["0000"]
    net.answers[7] = away
    _, receipts, _ = run(setup, 2)
    # In its first round it is met while the others train.
    assert {(r.round, r.client) for r in receipts} >= {(2, "0000"), (2, "0001")}


def test_site_that_comes_back_during_a_round_is_drawn_in_the_next() -> None:
    method = flasc.method(**EXACT)
    members = toy.clients([Budget()] * 2)
    net = Net({i: site(c, method) for i, c in enumerate(members)}, slow={0: 30.0})
    setup = federation(sites_of(net), method, size=2)
    away, stays = net.answers.pop(1), net.answers[0]

    def and_then_it_is_back(request: Frame) -> Any:
        net.answers[7] = away
        return stays(request)

    net.answers[0] = and_then_it_is_back
    _, receipts, _ = run(setup, 2)
    assert [(r.round, r.client) for r in receipts] == [(1, "0000"), (2, "0000"), (2, "0001")]


def test_node_that_was_away_owes_nothing() -> None:
    """What it had not answered before it went is never answered: it is not waited for."""
    method = flasc.method(**EXACT)
    members = toy.clients([Budget()] * 2)
    net = Net({i: site(c, method) for i, c in enumerate(members)}, {1: math.inf})
    sites = sites_of(net, deadline=5.0)
    run(federation(sites, method, size=2), 1)
    assert [c.id for c in sites.there()] == ["0000"]
    net.slow.clear()
    net.since[1] = "later"
    sites.there()
    assert [c.id for c in sites.there()] == ["0000", "0001"]


def test_worker_that_forgot_the_recipe_is_told_again() -> None:
    method = flasc.method(**EXACT)
    (client,) = toy.clients([Budget()])
    net = Net({0: site(client, method)})
    sites = sites_of(net)
    setup = federation(sites, method, size=1)
    honest = net.answers[0]
    net.answers[0] = lambda f: (
        Frame({"ok": False, "error": "what recipe?", "unknown_recipe": True})
        if f.header["do"] == "train"
        else honest(f)
    )
    with pytest.raises(NoUsableUpdate, match="what recipe"):
        run(setup, 1)
    net.answers[0] = honest
    run(setup, 1)
    assert [head["do"] for _, head in net.asked] == [
        "describe", "recipe", "train", "describe", "recipe", "train",
    ]  # fmt: skip


def test_too_few_sites_for_too_long() -> None:
    method = flasc.method(**EXACT)
    (client,) = toy.clients([Budget()])
    net = Net({0: site(client, method)})
    with pytest.raises(FedSieveError, match=r"after 40 s 1 sites are there, and a round needs 2"):
        sites_of(net, sites=3, quorum=2, wait=40.0).there()
    assert 40 < net.now < 45


def counted(told: object, sums: object = None, loss: object = 1.0) -> Frame:
    """A site's answer; sums that are no table are sent as they are."""
    head = {"ok": True, "counted": told, "loss_sum": loss}
    return Frame(head, sums if isinstance(sums, bytes) else json.dumps(sums).encode())


def test_scores_over_sites_are_those_of_all_rows() -> None:
    answers = {
        "a": counted(3, {"0 as 0": 1, "1 as 0": 2}, 6.0),
        "b": counted(7, {"1 as 1": 3, "0 as 0": 4}, 1.0),
    }
    said: list[str] = []
    score = joint_score(answers, "classification", ("x", "y"), said.append)
    assert score is not None
    assert (score.metrics["accuracy"], score.loss, score.counted) == (0.8, 0.7, 10)
    # x: 5 right of 7 taken for it, none missed. y: 3 right, 2 missed.
    assert score.metrics["macro_f1"] == pytest.approx((10 / 12 + 6 / 8) / 2)
    bad = [
        counted(None, {"0 as 0": 1}), counted("3", {"0 as 0": 3}), counted(3, b"\xff"),
        counted(3, [3]), counted(3, {"0 as 0": 4}), counted(3, {"0 as 2": 3}),
        counted(3, {"0 as 0": 4, "0 as 1": -1}), counted(3, {"all": 3}),
        counted(3, {"0 as 0": 1e999}),
        counted(2.5, {"0 as 0": 2.5}), counted(3, {"0 as 0": None}), counted(3, {}),
        counted(3, b'{"0 as 0": ' + b"[" * 100_000), counted(1, {"0 as 0": "1"}, "much"),
        counted(-3, {"0 as 0": -3}), counted(3, {f"0 as {'9' * 5000}": 3}),
    ]  # fmt: skip
    answers |= {f"c{i:02}": each for i, each in enumerate(bad)}
    assert joint_score(answers, "classification", ("x", "y"), said.append) == score
    assert [line.split(":")[0] for line in said] == [f"site c{i:02}" for i in range(len(bad))]
    assert joint_score({}, "classification", ("x", "y"), said.append) is None


def test_one_site_takes_the_loss_from_no_other() -> None:
    """Where a model diverged, no site has one, and that is told with what else was counted."""
    sound = {"a": counted(3, {"0 as 0": 3}, 6.0), "d": counted(0, {}, 0.0)}
    nothing = {"e": counted(0, {}, None)}  # of no rows, and no loss either
    odd = {name: counted(7, {"1 as 1": 7}, None) for name in ("b", "c")}
    said: list[str] = []
    score = joint_score({**sound, **odd, **nothing}, "classification", ("x", "y"), said.append)
    assert score == joint_score(sound, "classification", ("x", "y"), print)
    assert sorted(line.split(":")[0] for line in said) == ["site b", "site c", "site e"]
    score = joint_score({**odd, "d": sound["d"]}, "classification", ("x", "y"), said.append)
    assert score is not None
    assert score.counted == 14
    assert math.isnan(score.loss)


def test_sites_evaluate_and_keep() -> None:
    method = flasc.method(**EXACT)
    members = toy.clients([Budget()] * 2)
    net = Net({i: site(c, method) for i, c in enumerate(members)})
    sites = sites_of(net)
    run(federation(sites, method, size=2), 2)
    said: list[str] = []
    sites._say = said.append
    net.answers[0] = lambda f: Frame({"ok": True, "round": f.header["round"]}, f.body)
    net.answers[1] = lambda f: Frame({"ok": False, "error": "no test rows"})
    answers = sites.ask_all("evaluate", b"the adapter", 5.0)
    assert list(answers) == ["0000"]
    assert (answers["0000"].header["round"], answers["0000"].body) == (2, b"the adapter")
    assert said == ["0001: evaluate: the site says: no test rows"]
    sites.ask_all("evaluate", b"the adapter", 5.0)
    assert len(said) == 1  # a site without test rows is not told in each evaluation anew
    net.answers[1] = lambda f: Frame({"ok": False, "error": "no room"})
    sites.ask_all("evaluate", b"the adapter", 5.0)
    assert said[1:] == ["0001: evaluate: the site says: no room"]


def test_whoever_is_late_at_the_end_keeps_the_adapter_as_well() -> None:
    """Who has a round to end is not asked to evaluate, and who is gone to do neither."""
    method = flasc.method(**EXACT)
    members = toy.clients([Budget()] * 4)
    net = Net({i: site(c, method) for i, c in enumerate(members)}, {2: 1.0, 3: 30.0})
    sites = sites_of(net, enough=2)
    said: list[str] = []
    sites._say = said.append
    run(federation(sites, method, size=2, extra=2), 1)
    net.answers = {i: lambda f: Frame({"ok": True}) for i in (0, 1, 3)}
    sites.there()
    assert list(sites.ask_all("evaluate", b"the adapter", 5.0)) == ["0000", "0001"]
    assert "evaluate: 1 site not asked, still at a round: 0003" in said
    assert "evaluate: 1 site not asked, not there: 0002" in said
    assert list(sites.ask_all("keep", b"the adapter", 60.0)) == ["0000", "0001", "0003"]
    assert "keep: 1 site not asked, not there: 0002" in said


@pytest.mark.parametrize(
    ("change", "dropped", "loss"),
    [({"loss": -2.5}, None, -2.5), ({"loss": -1e16}, "whose loss is no number from -1e+15", None),
     ({"reason": ""}, "no reason given", None)],
)  # fmt: skip
def test_what_an_answer_may_say(
    change: dict[str, Any], dropped: str | None, loss: float | None
) -> None:
    """A loss to which a method adds a term may be below zero."""
    method = flasc.method(**EXACT)
    members = toy.clients([Budget()] * 2)

    def changed(frame: Frame) -> Frame:
        return Frame({**frame.header, **change}, frame.body)

    net = Net({0: site(members[0], method, changed), 1: site(members[1], method)})
    _, receipts, _ = run(federation(sites_of(net), method, size=2), 1)
    found = next(receipt for receipt in receipts if receipt.client == "0000")
    assert found.dropped is None if dropped is None else dropped in str(found.dropped)
    assert loss is None or found.loss == loss


def test_every_byte_is_a_rounds_or_aside() -> None:
    """What the transport carried is in the receipts or in `aside`, once: nothing is left out."""
    method = flasc.method(**EXACT)
    members = toy.clients([Budget()] * 3)
    net = Net({i: site(c, method) for i, c in enumerate(members)}, losing={2: 1})
    net.answers[7] = lambda f: b"garbage"  # never met
    sites = sites_of(net, sites=3)
    setup = replace(federation(sites, method), aside=sites.aside)
    first, progress = begin(setup, toy.start())
    told = [first.aside_bytes]
    counted = 0
    for summary, _, _ in rounds(setup, progress, 2):
        told.append(summary.aside_bytes)
        assert summary.transport_bytes is not None
        counted += summary.transport_bytes
    net.answers = {i: lambda f: Frame({"ok": True}) for i in range(3)}
    sites.ask_all("evaluate", b"the adapter", 5.0)
    told.append(sites.aside())
    assert all(n is not None for n in told)
    assert told[0]
    answer = len(pack(seal(bytes(32), Frame({"ok": True}))))
    asked = {"do": "evaluate", "recipe": "digest", "round": 2, "site": "0000", "after": 2}
    assert told[-1] == 3 * (answer + 1000 + 100 + len(pack(Frame(asked, b"the adapter"))))
    assert counted + sum(n or 0 for n in told) == net.carried


def test_lost_on_the_way_is_sent_again() -> None:
    """Flower loses a message where its client process starts too slowly, and says so."""
    method = flasc.method(**EXACT)
    members = toy.clients([Budget()] * 2)
    expected, receipts, _ = toy.after(method, members, 1)
    net = Net({i: site(c, method) for i, c in enumerate(members)})
    sites = sites_of(net)
    setup = federation(sites, method, size=2)
    net.losing = {1: 2}
    found, ours, _ = run(setup, 1)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert [untimed(r) for r in ours] == [untimed(r) for r in receipts]
    once, thrice = (r.transport_bytes or 0 for r in ours)
    assert receipts[0].down_bytes == receipts[1].down_bytes
    assert thrice > once + 2 * (receipts[1].down_bytes + LOST)


def test_lost_too_often() -> None:
    method = flasc.method(**EXACT)
    members = toy.clients([Budget()] * 2)
    net = Net({i: site(c, method) for i, c in enumerate(members)})
    sites = sites_of(net)
    setup = federation(sites, method, size=2)
    net.losing = {1: 3}
    _, receipts, _ = run(setup, 1)
    assert [r.dropped for r in receipts] == [None, "no answer: lost on its way"]
    assert net.now < 10


def test_replies_are_charged_to_their_client() -> None:
    """A ledger entry for everyone who was asked, reachable or not."""
    method = flasc.method(**EXACT)
    members = toy.clients([Budget()] * 2)
    net = Net({i: site(c, method) for i, c in enumerate(members)})
    sites = sites_of(net)
    setup = federation(sites, method, size=2)
    net.answers.pop(1)
    # Drawn although it has gone, as where an account of privacy counts on everyone.
    sites.there()
    setup = replace(setup, there=None)
    _, receipts, _ = run(setup, 1)
    assert [r.dropped for r in receipts] == [None, "its node could not be reached"]
