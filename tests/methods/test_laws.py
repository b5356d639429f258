"""The table of laws: one row a method, and every law for every row.

A method that is added gets a row in ROWS; the laws below then hold for it or a test fails. A law is
a function of a row.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import torch

from fedsieve import methods
from fedsieve.algebra.adapter import Adapter
from fedsieve.algebra.budget import Budget, Client
from fedsieve.algebra.cores import Cores, head_of
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import Memory, Method
from fedsieve.algebra.optim import Optimizer, adam, fedadam, sgd
from fedsieve.engine.loop import begin, rounds
from fedsieve.wire import decode, encode
from tests import kinds, toy
from tests.methods.optimum import Optimum, share_left

FULL = Budget()
EXACT = {"down_values": "float64", "up_values": "float64"}
MIXED = (Budget(0.25, 0.5, 0.25), Budget(0.5, 0.25, 0.125), Budget(), Budget(0.5, 1.0, 0.5))


@dataclass(frozen=True)
class Row:
    """A method and what the laws need to know of it.

    options: settings under which the laws must hold
    exact:   what its mean is: FedIT's mean of the factors, once `at` lets everything pass; the
             exact mean of the clients' weights W0 + s B A; or FedIT's if there is one client alone
    at:      settings that let everything pass
    members: budgets whose ranks together fit the server's, for methods that cut a mean to rank r
    optimum: how it does on the problem of optimum.py; at least one row a method has it
    counted: messages hold the numbers that the budget's ratio and densities say
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    exact: Literal["factors", "products", "alone"] = "factors"
    at: dict[str, Any] = field(default_factory=dict)
    members: tuple[Budget, ...] = (FULL,) * 4
    counted: bool = False
    optimum: Optimum | None = None

    def build(self, **more: Any) -> Method:
        method: Method = methods.load(self.name)(**{**EXACT, **self.options, **more})
        return method if method.trained_by is None else method.trained_by(toy.trained)

    def start(self) -> Adapter:
        return toy.start(trains=self.build().trains)

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{k}={v}" for k, v in self.options.items())])


HALVES = (Budget(0.5), Budget(0.5))

ROWS = [
    Row("fedit", counted=True, optimum=Optimum()),
    Row("fedit", {"weighting": "examples"}, counted=True),
    Row("fslora", counted=True, optimum=Optimum(budget=Budget(0.5), least=1e-2)),
    Row("fslora", {"shared": False}, counted=True),
    Row("flasc", counted=True, optimum=Optimum(budget=Budget(1, 0.75, 0.25), least=1e-2)),
    Row("flasc", {"head": "whole"}, counted=True),
    Row("flasc", {"feedback": True}, counted=True),
    Row("flasc", {"weights": "all"}, counted=True),
    Row("flasc", {"decay": 0.5, "evaluated": 0.5}, at={"evaluated": 1.0, "decay": 1.0}),
    Row(
        "flasc",
        {"ranked": "change"},
        optimum=Optimum({"ranked": "change"}, Budget(1, 0.75, 0.25), 1e-2),
    ),
    Row("flasc", {"ranked": "change", "head": "whole", "feedback": True}),
    Row("flasc", {"ranked": "change", "weights": "all"}),
    Row(
        "fslora_flasc",
        counted=True,
        optimum=Optimum(budget=Budget(0.5, 1.0, 0.25), least=2e-2),
    ),
    Row("fslora_flasc", {"shared": False, "head": "whole"}, counted=True),
    Row(
        "fslora_flasc",
        {"ranked": "change"},
        optimum=Optimum({"ranked": "change"}, Budget(0.5, 0.75, 0.25), 2e-2),
    ),
    Row("sparse_adapter", at={"density": 1.0}, optimum=Optimum({"density": 0.75})),
    Row("sparse_adapter", {"head": "whole"}, at={"density": 1.0}),
    Row("adapter_lth", {"keep": 0.9}, at={"keep": 1.0}, optimum=Optimum({"keep": 0.998})),
    Row("fed_select", optimum=Optimum({"dense_rounds": 3}, Budget(1, 0.75, 1), 1e-2)),
    Row("fed_select", {"dense_rounds": 0, "head": "whole"}),
    Row(
        "fed_select",
        {"ranked": "change"},
        optimum=Optimum({"ranked": "change", "dense_rounds": 3}, Budget(1, 0.75, 1), 1e-2),
    ),
    Row("fed_select", {"kind": "ranks"}, optimum=Optimum({"kind": "ranks"}, Budget(0.5))),
    Row("hetlora", at={"weighting": "uniform"}, optimum=Optimum()),
    Row("hetlora", {"weighting": "examples"}),
    Row(
        "hetlora",
        {"pruning": True},
        at={"weighting": "uniform", "pruning": False},
        optimum=Optimum({"pruning": True, "penalty": 1e-4}),
    ),
    Row("fed_plora", counted=True, optimum=Optimum(budget=Budget(0.5))),
    Row("fed_plora", {"shared": False}, counted=True),
    Row("fed_plora", {"weighting": "examples"}, counted=True),
    Row("flexlora", exact="products", members=HALVES, optimum=Optimum(budget=Budget(0.5))),
    Row("flexlora", {"scaling": "alpha/k"}, exact="products", members=HALVES),
    Row("flexlora", {"scaling": "alpha/sqrt(k)"}, exact="products", members=HALVES),
    Row("flexlora", {"weighting": "examples"}, exact="products", members=HALVES),
    # Of one client, each rank's mean over its holders is the mean; tests/methods/test_products.py
    # has it for many.
    Row("raflora", exact="products", members=(FULL,), optimum=Optimum(budget=Budget(0.5))),
    Row("raflora", {"scaling": "alpha/k"}, exact="products", members=(FULL,)),
    Row("raflora", {"weighting": "examples"}, exact="products", members=(FULL,)),
    Row("flora", exact="products", members=MIXED, optimum=Optimum(budget=Budget(0.5))),
    Row("flora", {"scaling": "alpha/k"}, exact="products", members=MIXED),
    Row("flora", {"weighting": "examples"}, exact="products", members=MIXED),
    Row(
        "florist",
        exact="products",
        at={"threshold": 1.0},
        members=MIXED,
        optimum=Optimum(budget=Budget(0.5)),
    ),
    Row(
        "florist",
        {"scaling": "alpha/k", "weighting": "examples"},
        exact="products",
        at={"threshold": 1.0},
        members=MIXED,
    ),
    Row("fedex_lora", exact="products", optimum=Optimum()),
    Row("lora_fair", exact="products", members=(FULL,), optimum=Optimum()),
    Row("lora_fair", {"penalty": 0.0, "weighting": "examples"}, exact="products", members=(FULL,)),
    Row("ffa_lora", exact="products", optimum=Optimum()),
    Row("fedsvd", exact="products", optimum=Optimum()),
    Row(
        "lora_a2",
        exact="products",
        optimum=Optimum(budget=Budget(up=0.5), least=1e-2),
    ),
    Row("rolora", exact="products", optimum=Optimum()),
    Row("fedsa_lora", exact="alone", optimum=Optimum()),
    Row("scaffold", exact="alone", optimum=Optimum()),
    Row("fed_sb", exact="products", optimum=Optimum()),
    Row("fed_sb", {"weighting": "examples"}, exact="products"),
    Row(
        "ravan",
        exact="products",
        members=MIXED,
        optimum=Optimum(budget=Budget(0.5), least=1e-2),
    ),
    Row("ravan", {"heads": 2, "weighting": "examples"}, exact="products", members=MIXED),
    Row("full", counted=True, optimum=Optimum()),
    Row("head", counted=True, optimum=Optimum(only="head")),
]

SERVERS: tuple[Callable[[], Optimizer], ...] = (sgd, lambda: sgd(0.5, 0.9), adam, fedadam)


def its_mean_is_what_it_says(row: Row) -> None:
    weighting = row.options.get("weighting", "uniform")
    if row.exact == "products":
        the_mean_of_products_is_exact(row, toy.clients(row.members), weighting)
        return
    members = toy.clients([FULL] * (1 if row.exact == "alone" else 4))
    for server in SERVERS:
        plain = methods.load("fedit")(**EXACT, server=server(), weighting=weighting)
        method = row.build(server=server(), **row.at)
        memories: dict[str, Memory] = {}
        ours, receipts, _ = toy.after(method, members, 3, memories=memories)
        assert all(receipt.dropped is None for receipt in receipts)
        if method.personal is not None:
            adapter = Adapter(toy.start().layout, ours)
            ours = method.personal(adapter, memories[members[0].id]).tensors
            if server is not sgd:
                continue  # the client keeps its own B: no server optimizer moves it
        theirs, _, _ = toy.after(plain, members, 3)
        assert toy.distance(ours, theirs) <= 1e-12
        assert toy.distance(ours, toy.start().tensors) > 1e-3  # the rounds did something


def the_mean_of_products_is_exact(row: Row, members: list[Client], weighting: str) -> None:
    """After each of three rounds the weights W0 + base + s B A are the mean of the clients' own.

    In the second round one client is away, if there are more, so that in the third it has to catch
    up.
    """
    method = row.build(**row.at)
    state = method.init(row.start())
    memories: dict[str, Memory] = {}
    for number in (1, 2, 3):
        key = Key(7, number)
        present = members[1:] if number == 2 and len(members) > 1 else members
        plan = method.plan(state, key)
        updates, models, shares = [], [], []
        for client in present:
            context = toy.context(client, key._replace(client=client.id), method.trains)
            sent = method.publish(plan, client, context.key)
            payload = decode(encode(sent), state.layout)
            view, memory = method.view(payload, memories.get(client.id, {}), context)
            trained = toy.train(view, client, context.key).tensors
            report, memories[client.id] = method.report(view, trained, memory, context)
            updates.append((client, decode(encode(report), state.layout, sent.support)))
            adapter = view.adapter
            models.append(toy.weights(trained, adapter.layout.scale, adapter.base))
            shares.append(client.examples if weighting == "examples" else 1)
        state = method.merge(state, iter(updates), key)
        merged = method.export(state)
        ours = toy.weights(merged.tensors, merged.layout.scale, merged.base)
        for layer in (0, 1):
            parts = [share * model[layer] for share, model in zip(shares, models, strict=True)]
            mean = torch.stack(parts).sum(0) / sum(shares)
            assert (ours[layer] - mean).abs().max() <= 1e-10
            assert (ours[layer] - toy.frozen()[layer]).abs().max() > 1e-3


def the_same_seed_gives_the_same_bytes_and_another_does_not(row: Row) -> None:
    members = toy.clients(MIXED * 3)
    first, bill, _ = toy.after(row.build(), members, 3, cohort=5)
    again, same_bill, _ = toy.after(row.build(), members, 3, cohort=5)
    other, _, _ = toy.after(row.build(), members, 3, cohort=5, seed=8)

    def bytes_of(receipts: Any) -> list[tuple[str, int, int]]:
        return [(r.client, r.down_bytes, r.up_bytes) for r in receipts]

    assert bytes_of(bill) == bytes_of(same_bill)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert toy.distance(first, other) > 0


def the_order_of_clients_changes_nothing(row: Row) -> None:
    members = toy.clients(MIXED * 3)
    shuffled = [members[i] for i in torch.randperm(12, generator=torch.Generator().manual_seed(3))]
    first, _, _ = toy.after(row.build(), members, 2, cohort=7)
    second, _, _ = toy.after(row.build(), shuffled, 2, cohort=7)
    assert all(torch.equal(first[n], second[n]) for n in first)


def the_functions_change_none_of_their_arguments(row: Row) -> None:
    adapter = row.start()
    kept = {n: t.clone() for n, t in adapter.tensors.items()}
    toy.federation(row.build(), toy.clients(MIXED))
    setup = toy.federation(row.build(server=adam()), toy.clients(MIXED))
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
    state = method.init(row.start())
    plan = method.plan(state, Key(7, 1))
    for client in toy.clients(MIXED):
        key = Key(7, 1, client.id)
        payload = method.publish(plan, client, key)
        view, memory = method.view(payload, {}, toy.context(client, key, method.trains))
        if isinstance(method.trains, Cores):
            of = client.budget.ranks(method.trains.heads) if "ratio" in method.knobs else 1
            moving = {head_of(name) for name in view.moves.names} - {None}
            assert len(moving) == of
            continue
        kept = client.budget.ranks(toy.RANK) if "ratio" in method.knobs else toy.RANK
        assert view.adapter.tensors[toy.A1].shape == (kept, toy.INPUTS)
        assert view.adapter.tensors[toy.B2].shape == (toy.HIDDEN, kept)
        assert view.adapter.layout.rank == kept
        if not row.counted:
            continue
        trained = toy.train(view, client, key).tensors
        report, _ = method.report(view, trained, memory, toy.context(client, key))
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
    plan = method.plan(method.init(row.start()), Key(7, 1))
    for client in toy.clients(MIXED):
        key = Key(7, 1, client.id)
        context = toy.context(client, key, method.trains)
        payload = method.publish(plan, client, key)
        view, memory = method.view(payload, {}, context)
        report, _ = method.report(view, view.adapter.tensors, memory, context)
        assert report.ranks_told == "known"
        assert report.support.ranks is payload.support.ranks


def it_reaches_a_known_optimum(row: Row) -> None:
    if row.optimum is not None:
        assert share_left(row.name, row.optimum) <= row.optimum.least


LAWS = (
    its_mean_is_what_it_says,
    the_same_seed_gives_the_same_bytes_and_another_does_not,
    the_order_of_clients_changes_nothing,
    the_functions_change_none_of_their_arguments,
    clients_hold_what_their_budget_says,
    an_upload_never_repeats_what_the_server_knows,
    it_reaches_a_known_optimum,
)


def quick(case: tuple[Callable[[Row], None], Row]) -> bool:
    """All but what takes 150 rounds: that is quick for the methods that stand for their kinds."""
    law, row = case
    at_once = law is not it_reaches_a_known_optimum or row.optimum is None
    return at_once or row.name in kinds.QUICK


@pytest.mark.parametrize(
    ("law", "row"),
    kinds.quick_of(
        ((law, row) for law in LAWS for row in ROWS),
        quick,
        lambda case: f"{case[0].__name__}-{case[1]}",
    ),
)
def test_law(law: Callable[[Row], None], row: Row) -> None:
    law(row)


def test_every_method_has_a_row() -> None:
    assert {row.name for row in ROWS if row.optimum is not None} == set(methods.names())
