"""Rounds in which there is nothing to divide by, nothing to keep, or numbers too large: no method
stops a run over one, and what it does then is a rule (docs/methods.md, Degenerate rounds).

A situation says what clients there are and what they return; a law holds for every row of the table
of laws in every situation.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsieve import methods
from fedsieve.algebra.adapter import Adapter, Tree, layout_of
from fedsieve.algebra.budget import Budget, Client
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import Memory, Method, View
from fedsieve.algebra.optim import Optimizer, adam, fedadam, sgd
from fedsieve.algebra.payload import LARGEST, Form
from fedsieve.engine.local import in_process
from fedsieve.engine.loop import Federation, Progress, Receipt, Round, begin, rounds
from fedsieve.settings import Sampling
from fedsieve.train.local import Fit
from tests import kinds, toy
from tests.methods.test_laws import MIXED, ROWS, Row

Act = Callable[[Tree, View, Client], Tree]  # what a client makes of its tensors

SERVERS: dict[str, Callable[[], Optimizer]] = {
    "sgd": sgd,
    "momentum": lambda: sgd(0.5, 0.9),
    "adam": adam,
    "fedadam": fedadam,
}
TINY = 1e-9
ROUNDS = 2
ALL = (Budget(),) * 4


def unmoved(tree: Tree, view: View, client: Client) -> Tree:
    return tree


def moves(tree: Tree, view: View, client: Client) -> Tree:
    """All that may move moves, by each client's own numbers."""
    draws = torch.Generator().manual_seed(int(client.id))
    steps = {n: torch.randn(t.shape, generator=draws).to(t.dtype) / 10 for n, t in tree.items()}
    return _moved(tree, view, steps)


def head_moves(tree: Tree, view: View, client: Client) -> Tree:
    steps = {n: torch.full_like(t, 0.1 * (1 + int(client.id))) for n, t in tree.items()}
    return _moved(tree, view, {n: s * (n == toy.HEAD) for n, s in steps.items()})


def _moved(tree: Tree, view: View, steps: Tree) -> Tree:
    names, masks = view.moves.names, view.moves.masks
    mine = {n: s * masks.get(n, torch.ones(())).to(s.dtype) for n, s in steps.items() if n in names}
    return {n: t + mine[n] if n in mine else t for n, t in tree.items()}


def zeros(adapter: Adapter) -> Adapter:
    return adapter._replace(tensors={n: torch.zeros_like(t) for n, t in adapter.tensors.items()})


def zero_b(adapter: Adapter) -> Adapter:
    """As LoRA starts: every product is zero."""
    of_b = {pair.b for pair in adapter.layout.pairs}
    tensors = {
        n: torch.zeros_like(t) if n in of_b or "core" in n else t
        for n, t in adapter.tensors.items()
    }
    return adapter._replace(tensors=tensors)


def headless(adapter: Adapter) -> Adapter:
    """As a causal LM has it: pairs alone."""
    tensors = {n: t for n, t in adapter.tensors.items() if n != toy.HEAD}
    shapes = {n: tuple(t.shape) for n, t in tensors.items()}
    return Adapter(replace(adapter.layout, shapes=shapes), tensors)


def head_alone(adapter: Adapter) -> Adapter:
    tensors = {toy.HEAD: adapter.tensors[toy.HEAD]}
    return Adapter(layout_of(tensors, 0.5), tensors)


@dataclass(frozen=True)
class Situation:
    """What is degenerate about a federation.

    act: what clients make of what they get; start: the adapter of before
    budgets: one client each; cohort: how many of them a round; options: of methods that have them
    """

    name: str
    act: Act = moves
    start: Callable[[Adapter], Adapter] = lambda adapter: adapter
    budgets: tuple[Budget, ...] = MIXED
    cohort: int | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


SITUATIONS = [
    Situation("one client alone", cohort=1),
    Situation("one client there is", budgets=(Budget(0.5, 0.5, 0.5),)),
    Situation("nothing moves", unmoved),
    Situation("everything is zero", unmoved, zeros),
    Situation("all products are zero", unmoved, zero_b),
    Situation("all products are zero, the head moves", head_moves, zero_b),
    Situation(
        "next to nothing is kept",
        budgets=(Budget(TINY, TINY, TINY),) * 3,
        options={"density": TINY, "keep": TINY, "evaluated": TINY, "least": TINY},
    ),
    Situation(
        "next to nothing is kept of nothing",
        unmoved,
        zeros,
        budgets=(Budget(TINY, TINY, TINY),) * 3,
        options={"density": TINY, "keep": TINY, "evaluated": TINY, "least": TINY},
    ),
    Situation("no head", start=headless),
    Situation("no head, nothing moves", unmoved, headless),
    Situation("nothing but a head", start=head_alone, budgets=ALL),
    Situation(
        "products that float32 has no number for",
        lambda tree, view, client: {n: t * 1e-22 for n, t in moves(tree, view, client).items()},
    ),
]


def federate(
    method: Method,
    situation: Situation,
    *,
    dtype: torch.dtype = torch.float64,
    number: int = ROUNDS,
    members: list[Client] | None = None,
) -> tuple[Adapter, Progress, list[Receipt], list[Round]]:
    """The global model after some rounds, with what is told of them."""
    begun = toy.start(trains=method.trains)
    begun = situation.start(
        begun._replace(tensors={n: t.to(dtype) for n, t in begun.tensors.items()})
    )

    def train(view: View, client: Client, key: Key) -> Fit:
        return Fit(situation.act(dict(view.adapter.tensors), view, client), 1.0, 1, 0.0)

    members = toy.clients(situation.budgets) if members is None else members
    memories: dict[str, Memory] = {}
    sampling = Sampling(size=situation.cohort or len(members))
    exchange = in_process(method, train, begun, memories)
    setup = Federation(method, members, sampling, 7, exchange)
    first, progress = begin(setup, begun)
    receipts: list[Receipt] = []
    told = [first]
    for summary, more, now in rounds(setup, progress, number):
        receipts, told, progress = [*receipts, *more], [*told, summary], now
    return method.export(progress.state), progress, receipts, told


def built(row: Row, situation: Situation, server: str = "sgd", form: Form = "float64") -> Method:
    options = {**row.options, "down_values": form, "up_values": form, "server": SERVERS[server]()}
    known = inspect.signature(methods.load(row.name)).parameters
    options |= {key: value for key, value in situation.options.items() if key in known}
    return methods.load(row.name)(**options)


def assert_finite(*trees: Tree) -> None:
    for tree in trees:
        assert all(tensor.isfinite().all() for tensor in tree.values())


# Every server and every form, and of each kind one at once: a mean and moments, exact and rounded.
CASES: dict[str, list[tuple[str, Form, torch.dtype]]] = {
    "one of each kind": [("sgd", "float64", torch.float64), ("adam", "int8", torch.float32)],
    "the others": [
        ("momentum", "bfloat16", torch.float32),
        ("fedadam", "float32", torch.float32),
    ],
}


@pytest.mark.parametrize("cases", kinds.quick_of(CASES, "one of each kind".__eq__))
@pytest.mark.parametrize("situation", SITUATIONS, ids=str)
@pytest.mark.parametrize("row", kinds.some_of(((row,) for row in ROWS), 6), ids=str)
def test_no_round_stops_and_all_stays_finite(row: Row, situation: Situation, cases: str) -> None:
    for server, form, dtype in CASES[cases]:
        method = built(row, situation, server, form)
        found, progress, receipts, told = federate(method, situation, dtype=dtype)
        assert progress.round == ROUNDS
        assert [receipt.dropped for receipt in receipts] == [None] * len(receipts)
        assert {summary.dropped for summary in told} == {0}
        assert_finite(*progress.state.trees.values(), found.tensors, found.base)


def all_huge(tensor: Tensor) -> Tensor:
    return tensor.sign() * -3e38


def one_huge(tensor: Tensor) -> Tensor:
    flat = tensor.flatten().clone()
    flat[0] = 3e38
    return flat.view(tensor.shape)


def with_numbers_of_no_use(tensor: Tensor) -> Tensor:
    return tensor + 1e10


HUGE = [all_huge, one_huge, with_numbers_of_no_use]


@pytest.mark.parametrize("huge", HUGE)
@pytest.mark.parametrize("bad", ["0001", "every second"])
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_updates_too_large_for_a_merge_are_left_out_and_named(
    row: Row, bad: str, huge: Callable[[Tensor], Tensor]
) -> None:
    """End minus start overflows, or a sum, square or product of the merge would."""

    def is_bad(client: str) -> bool:
        return client == bad if bad != "every second" else int(client) % 2 == 1

    def act(tree: Tree, view: View, client: Client) -> Tree:
        moved = moves(tree, view, client)
        if not is_bad(client.id):
            return moved
        return {n: huge(t) if n in view.moves.names else t for n, t in moved.items()}

    situation = Situation("some overflow", act)
    method = built(row, situation, form="float32")
    found, progress, receipts, _ = federate(method, situation, dtype=torch.float32)
    assert {r.client: r.dropped is not None for r in receipts} == {
        c.id: is_bad(c.id) for c in toy.clients(MIXED)
    }
    assert_finite(*progress.state.trees.values(), found.tensors, found.base)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_the_largest_numbers_that_are_merged_leave_a_state_of_numbers(row: Row) -> None:
    def act(tree: Tree, view: View, client: Client) -> Tree:
        moved = moves(tree, view, client)
        # RAVAN's gains multiply what is sent, and so stay one.
        large = {n for n in view.moves.names if "gain" not in n}
        return {
            n: t.sign() * LARGEST if n in large else view.adapter.tensors[n] if "gain" in n else t
            for n, t in moved.items()
        }

    situation = Situation("as large as may be", act)
    for server in SERVERS:
        method = built(row, situation, server, form="float32")
        found, *_ = federate(method, situation, dtype=torch.float32, number=1)
        assert_finite(found.tensors, found.base)


@pytest.mark.parametrize("act", [unmoved, head_moves], ids=["nothing", "the head"])
def test_where_no_product_has_a_norm_clients_of_hetlora_count_alike(act: Act) -> None:
    """And as soon as one has, those without count for nothing (HetLoRA's rule)."""
    situation = Situation("all products are zero", act, zero_b)
    alike = methods.load("hetlora")(server=sgd(), weighting="uniform")
    by_norm = methods.load("hetlora")(server=sgd())
    expected, *_ = federate(alike, situation)
    found, *_ = federate(by_norm, situation)
    for name, tensor in expected.tensors.items():
        assert torch.equal(found.tensors[name], tensor)


@pytest.mark.parametrize("alone", ["0000", "0002", "0003"])
def test_one_product_among_zeros_is_all_that_counts_in_hetlora(alone: str) -> None:
    def act(tree: Tree, view: View, client: Client) -> Tree:
        return moves(tree, view, client) if client.id == alone else head_moves(tree, view, client)

    situation = Situation("one product among zeros", act, zero_b)
    method = methods.load("hetlora")(server=sgd())
    only = [c for c in toy.clients(MIXED) if c.id == alone]
    expected, *_ = federate(method, situation, number=1, members=only)
    found, *_ = federate(method, situation, number=1)
    assert torch.allclose(found.tensors[toy.HEAD], expected.tensors[toy.HEAD], atol=1e-12)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_draw_of_nobody_leaves_the_model_as_it_is(row: Row) -> None:
    sampling, members = toy.nobody_drawn()
    setup = replace(toy.federation(row.build(), members), sampling=sampling)
    _, progress = begin(setup, row.start())
    (summary, receipts, after), *_ = rounds(setup, progress, 1)
    assert (summary.clients, receipts, after.round) == (0, [], 1)
    for group, tree in progress.state.trees.items():
        for name, tensor in tree.items():
            assert torch.equal(after.state.trees[group][name], tensor)
