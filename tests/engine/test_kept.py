"""What receipts and rounds tell of A, B and head, counted again from the bytes."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedsieve import methods
from fedsieve.algebra.adapter import Layout, Pair
from fedsieve.algebra.budget import Budget, Client
from fedsieve.algebra.keys import Key
from fedsieve.algebra.optim import adam, sgd
from fedsieve.algebra.support import Support
from fedsieve.clients.privacy import PrivacyPlan
from fedsieve.engine.client import Reply
from fedsieve.engine.kept import kept, starves_b
from fedsieve.engine.loop import Receipt, Round, begin
from tests import toy
from tests.wire import reader
from tests.wire.test_reader import spec_of

EXACT = {"down_values": "float64", "up_values": "float64"}
BUDGETS = (Budget(0.5, 0.25, 0.125), Budget(0.25, 0.5, 0.5), Budget(1.0, 0.1, 1.0), Budget())
MORE: list[tuple[str, dict[str, Any]]] = [
    ("flasc", {"ranked": "change"}),
    ("flasc", {"head": "whole"}),
    ("flasc", {"ranked": "change", "head": "whole"}),
    ("flasc", {"weights": "all"}),
    ("fslora_flasc", {"ranked": "change", "shared": False}),
    ("fed_select", {"ranked": "change"}),
    ("fed_select", {"kind": "ranks"}),
    ("sparse_adapter", {"density": 0.05}),
    ("adapter_lth", {"keep": 0.5}),
]
MASKED = {"flasc", "fslora_flasc", "sparse_adapter", "adapter_lth", "fed_select", "lora_a2"}
PARTS = ("a", "b", "head")


def run(
    name: str, options: dict[str, Any], number: int = 4, privacy: PrivacyPlan | None = None
) -> tuple[list[Round], list[Receipt], list[tuple[bytes, bytes]]]:
    """Rounds on the toy, and the bytes down and up of each receipt, in their order."""
    method = methods.load(name)(**{"server": adam(0.01), **EXACT, **options})
    budgets = [{k: v for k, v in b._asdict().items() if k in method.knobs} for b in BUDGETS]
    members = toy.clients([Budget(**budget) for budget in budgets])
    begun = toy.start(zero_b=True)
    inner = toy.federation(method, members, adapter=begun)
    log: list[tuple[bytes, bytes]] = []

    def carry(messages: Iterable[tuple[Client, bytes]], key: Key) -> Iterator[Reply]:
        given = list(messages)
        downs = {client.id: message for client, message in given}
        for reply in inner.exchange.carry(iter(given), key):
            assert reply.update is not None
            log.append((downs[reply.client.id], reply.update))
            yield reply

    setup = replace(inner, exchange=inner.exchange._replace(carry=carry), privacy=privacy)
    _, progress = begin(setup, begun)
    summaries, receipts = [], []
    for _ in range(number):
        summary, more, progress = toy.one_round(setup, progress)
        summaries.append(summary)
        receipts += more
    return summaries, receipts, log


def counted(message: reader.Message, layout: Layout) -> dict[str, float]:
    """Shares of A, B and head by counting bits; nothing where there are no masks."""
    if not message.masks:
        return {}
    spec = spec_of(layout)
    bits: dict[str, list[int]] = {part: [] for part in PARTS}
    for name in message.names:
        part = "a" if "lora_A" in name else "b" if "lora_B" in name else "head"
        rank = len(message.ranks[0]) if message.ranks else layout.rank
        size = int(torch.Size(reader.narrow(name, spec, rank)).numel())
        bits[part] += message.masks.get(name, [1] * size)
    return {part: sum(found) / len(found) for part, found in bits.items() if found}


@pytest.mark.parametrize(("name", "options"), [*((n, {}) for n in methods.names()), *MORE], ids=str)
def test_receipts_tell_what_each_message_keeps(name: str, options: dict[str, Any]) -> None:
    layout = toy.start().layout
    summaries, receipts, log = run(name, options)
    masked = 0
    for receipt, (down, up) in zip(receipts, log, strict=True):
        if down[:3] in (b"FSB", b"FSC"):
            assert receipt.down_a is receipt.up_b is None
            continue
        told = reader.read(down, spec_of(layout))
        back = reader.read(up, spec_of(layout), told.ranks, told.masks)
        for way, message in (("down", told), ("up", back)):
            expected = counted(message, layout)
            masked += bool(expected)
            for part in PARTS:
                assert getattr(receipt, f"{way}_{part}") == pytest.approx(expected.get(part))
    assert bool(masked) == (name in MASKED and options.get("kind") != "ranks")
    for summary in summaries:
        own = [receipt for receipt in receipts if receipt.round == summary.round]
        for key in (f"{way}_{part}" for way in ("down", "up") for part in PARTS):
            values = [getattr(r, key) for r in own if getattr(r, key) is not None]
            mean = sum(values) / len(values) if values else None
            assert getattr(summary, key) == pytest.approx(mean)


def test_a_mask_that_starves_b_is_counted_while_it_does() -> None:
    """By value the three clients with masks get nothing of B; by change, never."""
    summaries, _, _ = run("flasc", {}, 3)
    assert [summary.starved for summary in summaries] == [3, 3, 3]
    assert all(summary.down_b == 0 for summary in summaries)
    summaries, _, _ = run("flasc", {"ranked": "change"}, 3)
    assert [summary.starved for summary in summaries] == [0, 0, 0]
    assert [summary.down_b == 0 for summary in summaries] == [True, False, False]
    for name in ("fedit", "fslora", "ffa_lora", "fedsa_lora", "head", "flora"):
        summaries, _, _ = run(name, {}, 2)
        assert [summary.starved for summary in summaries] == [None, None], name


@pytest.mark.parametrize(
    ("passing", "names", "starved"),
    [
        ({"a": 1, "b": 0, "head": 0}, "a b head", True),
        ({"a": 0, "b": 0, "head": 1}, "a b head", True),
        ({"b": 0, "head": 1}, "b head", True),
        ({"a": 1, "b": 0}, "a b head", True),  # the head travels whole
        ({"a": 0, "b": 0}, "a b head", False),  # there is nothing to tell but the head
        ({"a": 0, "b": 0, "head": 0}, "a b head", False),
        ({"a": 1, "b": 1, "head": 0}, "a b head", False),
        ({"a": 0, "head": 1}, "a b head", False),  # B travels whole
        ({"a": 1, "head": 1}, "a head", False),  # B does not travel: absent is not zero
        ({}, "a b head", False),
    ],
)
def test_b_starves_where_others_pass_and_it_does_not(
    passing: dict[str, int], names: str, starved: bool
) -> None:
    layout = Layout({"a": (2, 3), "b": (4, 2), "head": (5,)}, (Pair("m", "a", "b"),), 2, 1.0)
    masks = {n: torch.zeros(layout.shapes[n], dtype=torch.bool) for n in passing}
    for name, count in passing.items():
        masks[name].view(-1)[:count] = True
    support = Support(tuple(names.split()), None, masks)
    assert starves_b(support, layout) is starved
    found = kept(support, layout)
    assert (found is None) == (not masks)
    if found is not None:
        for part in PARTS:
            size = torch.Size(layout.shapes[part]).numel()
            share = passing.get(part, size) / size if part in names.split() else None
            assert getattr(found, part) == share


def test_what_a_private_update_keeps_is_not_told() -> None:
    plan = PrivacyPlan(1.0, 0.0, 4, None, "seed", None, 4, "", (), None)
    private = {"server": plan.around(sgd(), Key(7))}
    summaries, receipts, _ = run("flasc", private, 1, privacy=plan)
    assert all(receipt.up_a is receipt.up_b is receipt.up_head is None for receipt in receipts)
    assert summaries[0].up_b is None
    assert summaries[0].down_a is not None


def test_a_client_that_was_dropped_has_the_share_that_went_down() -> None:
    method = methods.load("flasc")(**EXACT)
    setup = toy.federation(method, toy.clients([Budget(1, 0.25, 0.25)] * 2))

    def carry(messages: Iterable[tuple[Client, bytes]], key: Key) -> Iterator[Reply]:
        for number, reply in enumerate(setup.exchange.carry(messages, key)):
            yield reply._replace(reason="late") if number else reply

    broken = replace(setup, exchange=setup.exchange._replace(carry=carry))
    _, receipts, _ = toy.one_round(broken, begin(broken, toy.start())[1])
    assert [receipt.dropped for receipt in receipts] == [None, "late"]
    assert receipts[1].down_a == receipts[0].down_a is not None
    assert receipts[1].up_a is None
    assert receipts[0].up_a is not None
