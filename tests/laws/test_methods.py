"""The table of laws: one row a method, and every law for every row.

A method that is added gets a row in ROWS; the laws below then hold for it or a test fails. A law is
a function of a row.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from fedsieve import methods
from fedsieve.budget import Budget
from fedsieve.engine.loop import begin, rounds
from fedsieve.keys import Key
from fedsieve.method import Method
from fedsieve.optim import Optimizer, adam, fedadam, sgd
from tests.laws import toy

FULL = Budget()
EXACT = {"down_values": "float64", "up_values": "float64"}
MIXED = (Budget(0.25, 0.5, 0.25), Budget(0.5, 0.25, 0.125), Budget(), Budget(0.5, 1.0, 0.5))


@dataclass(frozen=True)
class Row:
    """A method and what the laws need to know of it.

    full:    the budget at which it must equal FedIT
    mixed:   budgets of unequal clients that it can serve
    options: settings under which the laws must hold as well
    """

    name: str
    full: Budget = FULL
    mixed: tuple[Budget, ...] = MIXED
    options: dict[str, Any] = field(default_factory=dict)

    def build(self, **more: Any) -> Method:
        return methods.load(self.name)(**EXACT, **self.options, **more)

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{k}={v}" for k, v in self.options.items())])


ROWS = [
    Row("fedit"),
    Row("fedit", options={"weighting": "examples"}),
    Row("fslora"),
    Row("fslora", options={"shared": False}),
    Row("flasc"),
    Row("flasc", options={"head": "whole"}),
    Row("flasc", options={"feedback": True}),
    Row("fslora_flasc"),
    Row("fslora_flasc", options={"shared": False, "head": "whole"}),
]

SERVERS: tuple[Callable[[], Optimizer], ...] = (sgd, lambda: sgd(0.5, 0.9), adam, fedadam)


def reduces_to_fedit_when_everything_passes(row: Row) -> None:
    members = toy.clients([row.full] * 4)
    weighting = row.options.get("weighting", "uniform")
    for server in SERVERS:
        plain = methods.load("fedit")(**EXACT, server=server(), weighting=weighting)
        ours, _, _ = toy.after(row.build(server=server()), members, 3)
        theirs, _, _ = toy.after(plain, members, 3)
        assert toy.distance(ours, theirs) <= 1e-12
        assert toy.distance(ours, toy.start().tensors) > 1e-3  # the rounds did something


def the_same_seed_gives_the_same_bytes_and_another_does_not(row: Row) -> None:
    members = toy.clients(row.mixed * 3)
    first, bill, _ = toy.after(row.build(), members, 3, cohort=5)
    again, same_bill, _ = toy.after(row.build(), members, 3, cohort=5)
    other, _, _ = toy.after(row.build(), members, 3, cohort=5, seed=8)

    def bytes_of(receipts: Any) -> list[tuple[str, int, int]]:
        return [(r.client, r.down_bytes, r.up_bytes) for r in receipts]

    assert bytes_of(bill) == bytes_of(same_bill)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert toy.distance(first, other) > 0


def the_order_of_clients_changes_nothing(row: Row) -> None:
    members = toy.clients(row.mixed * 3)
    shuffled = [members[i] for i in torch.randperm(12, generator=torch.Generator().manual_seed(3))]
    first, _, _ = toy.after(row.build(), members, 2, cohort=7)
    second, _, _ = toy.after(row.build(), shuffled, 2, cohort=7)
    assert all(torch.equal(first[n], second[n]) for n in first)


def the_functions_change_none_of_their_arguments(row: Row) -> None:
    adapter = toy.start()
    kept = {n: t.clone() for n, t in adapter.tensors.items()}
    toy.federation(row.build(), toy.clients(row.mixed))
    setup = toy.federation(row.build(server=adam()), toy.clients(row.mixed))
    _, progress = begin(setup, adapter)
    before = {
        g: {n: t.clone() for n, t in tree.items()} for g, tree in progress.state.trees.items()
    }
    list(rounds(setup, progress, 2))
    assert all(torch.equal(adapter.tensors[n], kept[n]) for n in kept)
    for group, tree in progress.state.trees.items():
        assert all(torch.equal(tree[n], before[group][n]) for n in tree)


def clients_hold_what_their_budget_says(row: Row) -> None:
    """A client's own tensors have its k ranks, and the numbers that travel follow its densities."""
    method = row.build()
    state = method.init(toy.start())
    plan = method.plan(state, Key(7, 1))
    for client in toy.clients(row.mixed):
        key = Key(7, 1, client.id)
        payload = method.publish(plan, client, key)
        view, memory = method.view(payload, {})
        kept = client.budget.ranks(toy.RANK) if "ratio" in method.knobs else toy.RANK
        assert view.adapter.tensors[toy.A1].shape == (kept, toy.INPUTS)
        assert view.adapter.tensors[toy.B2].shape == (toy.HIDDEN, kept)
        assert view.adapter.layout.rank == kept
        trained = toy.train(view.adapter, client, key).tensors
        report, _ = method.report(view, trained, client, memory, key)
        head = toy.OUTPUTS * toy.HIDDEN
        pairs = kept * (toy.INPUTS + 3 * toy.HIDDEN)
        for sent, knob in ((payload, "down"), (report, "up")):
            density = getattr(client.budget, knob) if knob in method.knobs else 1.0
            if row.options.get("head") == "whole":
                expected = density * pairs + head
            else:
                expected = density * (pairs + head)
            assert abs(sent.values.data.numel() - expected) <= 1


def an_upload_never_repeats_what_the_server_knows(row: Row) -> None:
    """The ranks of an upload cost nothing: the server chose them."""
    method = row.build()
    plan = method.plan(method.init(toy.start()), Key(7, 1))
    for client in toy.clients(row.mixed):
        key = Key(7, 1, client.id)
        payload = method.publish(plan, client, key)
        view, memory = method.view(payload, {})
        report, _ = method.report(view, view.adapter.tensors, client, memory, key)
        assert report.ranks_told == "known"
        assert report.support.ranks is payload.support.ranks


LAWS = (
    reduces_to_fedit_when_everything_passes,
    the_same_seed_gives_the_same_bytes_and_another_does_not,
    the_order_of_clients_changes_nothing,
    the_functions_change_none_of_their_arguments,
    clients_hold_what_their_budget_says,
    an_upload_never_repeats_what_the_server_knows,
)


@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(law: Callable[[Row], None], row: Row) -> None:
    law(row)


def test_every_method_has_a_row() -> None:
    assert {row.name for row in ROWS} == set(methods.names())
