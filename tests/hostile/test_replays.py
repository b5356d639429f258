"""Messages that were right once and come again: in another round, as another site's, in another
run, written in another way, or to a server that was started anew.

Law: an update counts in the round, for the site and in the run that it was made for, and no more.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedsieve.algebra.budget import Budget
from fedsieve.algebra.payload import Form, Payload, Values, digest, exact, rounded
from fedsieve.algebra.support import everything, gather
from fedsieve.engine.loop import Receipt
from fedsieve.errors import WireError
from fedsieve.frame import Frame, unpack
from fedsieve.methods import fedit, flasc
from fedsieve.run import checkpoint, rundir
from fedsieve.sites import federate, worker
from fedsieve.sites.worker import check_seal, seal
from fedsieve.wire import decode, encode
from tests import toy
from tests.sites.test_flower import EXACT, Net, federation, run, site, sites_of

ASKED = Frame(
    {"do": "train", "recipe": "a" * 64, "seed": 7, "round": 3, "after": 2, "site": "north"}, b"sent"
)
ANSWER = Frame({"ok": True, "round": 3, "reason": None, "loss": 0.5, "steps": 2}, b"the update")

OTHERS: dict[str, Frame] = {
    "another round": Frame({**ASKED.header, "round": 4}, ASKED.body),
    "another site": Frame({**ASKED.header, "site": "south"}, ASKED.body),
    "another run": Frame({**ASKED.header, "recipe": "b" * 64}, ASKED.body),
    "another seed": Frame({**ASKED.header, "seed": 8}, ASKED.body),
    "another download": ASKED._replace(body=b"other"),
    "the same, and more before it": Frame({**ASKED.header, "after": 1}, ASKED.body),
    "an evaluation": Frame({**ASKED.header, "do": "evaluate"}, ASKED.body),
}


@pytest.mark.parametrize("other", OTHERS)
def test_an_answer_is_tied_to_what_it_answers(other: str) -> None:
    sealed = unpack(worker.pack(seal(worker.digest(ASKED), ANSWER)))
    check_seal(worker.digest(unpack(worker.pack(ASKED))), sealed)
    with pytest.raises(WireError, match="another request"):
        check_seal(worker.digest(OTHERS[other]), sealed)


CHANGES: dict[str, Frame] = {
    "its round": Frame({**ANSWER.header, "round": 4}, ANSWER.body),
    "its figures": Frame({**ANSWER.header, "steps": 2000}, ANSWER.body),
    "its update": ANSWER._replace(body=b"the updatf"),
    "a figure more": Frame({**ANSWER.header, "memory": 1}, ANSWER.body),
    "no tag": ANSWER,
}


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_of_an_answer_can_be_changed_on_its_way(change: str) -> None:
    sealed = seal(worker.digest(ASKED), ANSWER)
    changed = CHANGES[change]
    if change != "no tag":
        changed = Frame({**changed.header, "tag": sealed.header["tag"]}, changed.body)
    with pytest.raises(WireError, match="another request"):
        check_seal(worker.digest(ASKED), changed)


@pytest.mark.parametrize("form", ["float32", "bfloat16", "float64", "int8"])
def test_numbers_that_are_written_in_another_way_say_the_same(form: Form) -> None:
    layout = toy.start().layout
    numbers = torch.zeros(layout.size, dtype=torch.float64)
    numbers[: layout.size // 2 : 3] = 2.0
    whole = rounded(numbers, form, torch.Generator())
    if form == "int8":
        other = whole._replace(data=whole.data // 2, scales=whole.scales * 2)
        whole = whole._replace(data=whole.data // 2 * 2)
    else:
        other = whole._replace(data=torch.where(whole.data == 0, -0.0, whole.data))
    one, two = (Payload(layout, everything(layout), v, "sent", "sent") for v in (whole, other))
    assert torch.equal(exact(one.values), exact(two.values))
    assert digest(one) == digest(two)
    data = whole.data.clone()
    data[0] += 1
    assert digest(one._replace(values=whole._replace(data=data))) != digest(one)


def as_it_was(update: bytes) -> bytes:
    return update


def masks_told(update: bytes) -> bytes:
    """The same update, which tells what it left to the receiver."""
    payload = decode(update, toy.start().layout)
    return encode(payload._replace(masks_told="sent", ranks_told="sent"))


def unread(update: bytes) -> bytes:
    """The same numbers, taken apart and put together."""
    payload = decode(update, toy.start().layout)
    data = gather(payload.tree(), payload.support)
    return encode(payload._replace(values=Values("float64", data, torch.empty(0))))


WRITINGS: list[Callable[[bytes], bytes]] = [as_it_was, masks_told, unread]


def replaying(update: bytes, write: Callable[[bytes], bytes]) -> Callable[[Frame], Frame]:
    """A site's own answer, with an old update in it; it can seal what it likes."""
    return lambda frame: frame._replace(body=write(update))


def first_round() -> tuple[dict[int, bytes], list[Receipt]]:
    """What two sites sent in a first round, and its receipts."""
    method, members = fedit.method(**EXACT), toy.clients([Budget()] * 2)
    sent: dict[int, bytes] = {}

    def kept(i: int) -> Callable[[Frame], Frame]:
        def keep(frame: Frame) -> Frame:
            sent[i] = frame.body
            return frame

        return keep

    net = Net({i: site(c, method, kept(i)) for i, c in enumerate(members)})
    _, receipts, _ = run(federation(sites_of(net), method, size=2), 1)
    return sent, receipts


@pytest.mark.parametrize("write", WRITINGS)
def test_an_old_update_is_known_by_what_it_says_and_after_a_restart(
    write: Callable[[bytes], bytes],
) -> None:
    sent, receipts = first_round()
    # As of a server that went on from round 1 to round 9, and was started anew.
    given = {(r.client, str(r.digest)): 9 for r in receipts if r.client == "0001"}
    method, members = fedit.method(**EXACT), toy.clients([Budget()] * 2)
    net = Net({i: site(c, method) for i, c in enumerate(members)})
    net.answers[1] = site(members[1], method, replaying(sent[1], write))
    found, receipts, _ = run(federation(sites_of(net, given=given), method, size=2), 1)
    why = "its update was refused: it says the same as that of round 9, number for number"
    assert {r.client: r.dropped for r in receipts} == {"0000": None, "0001": why}
    expected, _, _ = toy.after(method, members[:1], 1)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_digests_of_a_log_are_those_that_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the newest checkpoint; a round after it is done again, and its answers are right."""
    lines = [
        {"round": 1, "client": "a", "dropped": None, "digest": "x"},
        {"round": 2, "client": "a", "dropped": "late", "digest": None},
        {"round": 3, "client": "a", "dropped": None, "digest": "x"},
        {"round": 3, "client": "b", "dropped": None},  # of a version without digests
        {"round": 3, "client": "c", "dropped": "its norm", "digest": "z"},  # never merged
        {"round": 4, "client": "a", "dropped": None, "digest": "y"},
    ]
    log = tmp_path / rundir.CLIENTS
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(checkpoint, "newest_round", lambda folder: (3, []))
    history = federate._history(tmp_path)
    assert history.merged == {"a": 3, "b": 3}
    assert history.given == {("a", "x"): 1}


def test_an_update_that_was_never_merged_may_come_again() -> None:
    """Who trains without chance says the same of the same adapter: left out once beside another's
    update, it was out for good.
    """
    method, members = fedit.method(**EXACT), toy.clients([Budget()] * 2)
    sites = sites_of(Net({i: site(c, method) for i, c in enumerate(members)}))
    assert sites.before("0000", "x", 1) is None
    sites.settle(())  # left out by `server.norm_bound`
    assert sites.before("0000", "x", 2) is None
    sites.settle({"0000"})
    assert sites.before("0001", "x", 3) is None
    assert sites.before("0000", "x", 3) == 2


def test_a_digest_is_of_what_is_said() -> None:
    """Equal for other writings of the same, another one for any change of it."""
    method = flasc.method(**EXACT)
    client = toy.clients([Budget(1, 1, 0.25)])[0]
    bodies: list[bytes] = []

    def keep(frame: Frame) -> Frame:
        bodies.append(frame.body)
        return frame

    net = Net({0: site(client, method, keep)})
    run(federation(sites_of(net), method, size=1), 1)
    layout = toy.start().layout
    payload = decode(bodies[0], layout)
    assert payload.support.masks
    seen = {digest(payload)}
    assert digest(payload._replace(ranks_told="sent")) in seen
    name = payload.support.names[0]
    mask = payload.support.masks[name].clone()
    flat = mask.view(-1)
    flat[int(flat.nonzero()[0])], flat[int((~flat).nonzero()[0])] = False, True
    moved = payload.support._replace(masks={**payload.support.masks, name: mask})
    numbers = payload.values.data.clone()
    numbers[-1] += 1e-12
    none = torch.empty(0)
    names, masks = payload.support.names[1:], {**payload.support.masks}
    del masks[name]
    fewer = payload.support._replace(names=names, masks=masks)
    of_fewer = Values("float64", gather(payload.tree(), fewer), none)
    ranks = torch.arange(layout.rank).expand(len(layout.pairs), -1)
    float32 = payload.values._replace(form="float32", data=payload.values.data.float())
    others = [
        payload._replace(support=moved),
        payload._replace(values=payload.values._replace(data=numbers)),
        payload._replace(values=float32),
        payload._replace(support=fewer, values=of_fewer),
    ]
    assert digest(payload._replace(support=payload.support._replace(ranks=ranks))) in seen
    for other in others:
        assert digest(other) not in seen
        seen.add(digest(other))
    # A zero that travels, and the same without it.
    numbers[0] = 0.0
    zero = payload._replace(values=payload.values._replace(data=numbers))
    mask = payload.support.masks[name].clone()
    mask.view(-1)[int(mask.view(-1).nonzero()[0])] = False
    less = payload.support._replace(masks={**payload.support.masks, name: mask})
    without = zero._replace(support=less, values=Values("float64", numbers[1:], none))
    assert digest(zero) not in seen
    assert digest(without) == digest(zero)


@pytest.mark.parametrize("do", ["evaluate", "keep"])
def test_no_two_sites_are_asked_the_same_of_an_adapter(do: str) -> None:
    """A node without worker and rows repeats, to the byte, what the worker of another site said."""
    method, members = fedit.method(**EXACT), toy.clients([Budget()] * 2)
    net = Net({i: site(c, method) for i, c in enumerate(members)})
    sites = sites_of(net)
    run(federation(sites, method, size=2), 1)
    said: list[bytes] = []

    def honest(request: Frame) -> bytes:
        said.append(worker.pack(seal(worker.digest(request), Frame({"ok": True, "round": 1}))))
        return said[-1]

    net.answers = {0: honest, 1: lambda request: said[-1]}
    assert [*sites.ask_all(do, b"the adapter", 5.0)] == ["0000"]
