"""Well-formed updates that are not what was asked: each decodes, and would stop or spoil a merge.

Law, over all methods: whatever one client of a cohort sends, it is left out by name, and the server
ends where it would have ended had that client sent nothing.
"""

import math
import random
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from functools import cache
from typing import Literal

import pytest
import torch
from torch import Tensor

from fedsieve.algebra.adapter import Layout, Tree, base_layout
from fedsieve.algebra.budget import Budget, Client
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import Method, State, compose
from fedsieve.algebra.optim import sgd
from fedsieve.algebra.payload import Base, Form, Payload, exact, rounded
from fedsieve.algebra.sieve import Passed, dense
from fedsieve.algebra.support import Support, everything, gather
from fedsieve.engine.arrivals import outliers
from fedsieve.engine.client import Reply
from fedsieve.engine.loop import Exchange, Federation, Receipt, begin, rounds
from fedsieve.errors import FedSieveError
from fedsieve.recipe import read as recipes
from fedsieve.recipe.experiment import from_recipe
from fedsieve.wire import decode, encode
from tests import kinds, toy
from tests.conftest import Tiny
from tests.methods.test_laws import MIXED, ROWS, Row

BAD = "0001"
ROUNDS = 2
TRIALS = 3

# A client's own update, and what it was sent -> what it sends in its place; None where the method
# leaves no room for such an update.
Forge = Callable[[Payload, Support], Payload | None]


def told_all(update: Payload, support: Support) -> Payload:
    """An update on another support, with numbers of its own, that tells all of it."""
    layout = update.layout
    numbers = torch.ones(_count(layout, support))
    values = rounded(numbers, update.values.form, torch.Generator())
    ranks_told: Literal["known", "sent"] = "sent" if layout.pairs else "known"
    return Payload(layout, support, values, ranks_told, "sent")


def _count(layout: Layout, support: Support) -> int:
    tree: Tree = {}
    rank = layout.rank if support.ranks is None else support.ranks.shape[1]
    shapes = layout.narrow(rank, layout.scale).shapes
    for name in support.names:
        tree[name] = torch.zeros(shapes[name])
    return gather(tree, support).numel()


def no_tensors(update: Payload, sent: Support) -> Payload | None:
    return told_all(update, Support((), update.support.ranks, {}))


def first_tensor_alone(update: Payload, sent: Support) -> Payload | None:
    names = update.support.names[:1]
    if len(update.support.names) < 2:
        return None
    masks = {n: m for n, m in update.support.masks.items() if n in names}
    return told_all(update, Support(names, update.support.ranks, masks))


def one_tensor_less(update: Payload, sent: Support) -> Payload | None:
    names = update.support.names[:-1]
    masks = {n: m for n, m in update.support.masks.items() if n in names}
    return told_all(update, Support(names, update.support.ranks, masks))


def all_tensors(update: Payload, sent: Support) -> Payload | None:
    if update.support.names == update.layout.names:
        return None
    return told_all(update, Support(update.layout.names, update.support.ranks, {}))


def another_rank(keep: int) -> Forge:
    def forge(update: Payload, sent: Support) -> Payload | None:
        pairs = len(update.layout.pairs)
        own = update.layout.rank if update.support.ranks is None else update.support.ranks.shape[1]
        if not pairs or keep == own:
            return None
        ranks = None if keep == toy.RANK else torch.arange(keep).expand(pairs, keep)
        return told_all(update, Support(update.support.names, ranks, {}))

    forge.__name__ = f"rank_{keep}"
    return forge


def other_ranks_of_that_number(update: Payload, sent: Support) -> Payload | None:
    ranks, rank = update.support.ranks, update.layout.rank
    if ranks is None or ranks.shape[1] == rank:
        return None
    other = (ranks + 1) % rank
    return told_all(update, Support(update.support.names, other.sort(dim=1).values, {}))


def every_entry(update: Payload, sent: Support) -> Payload | None:
    if not update.support.masks:
        return None
    return told_all(update, update.support._replace(masks={}))


def one_entry_more(update: Payload, sent: Support) -> Payload | None:
    for name, mask in update.support.masks.items():
        if not mask.all():
            wider = mask.clone().view(-1)
            wider[int((~wider).nonzero()[0])] = True
            masks = {**update.support.masks, name: wider.view(mask.shape)}
            return told_all(update, update.support._replace(masks=masks))
    return None


def masks_where_none_were_asked(update: Payload, sent: Support) -> Payload | None:
    if update.support.masks or not update.support.names:
        return None
    rank = update.layout.rank if update.support.ranks is None else update.support.ranks.shape[1]
    shapes = update.layout.narrow(rank, update.layout.scale).shapes
    masks = {n: torch.ones(shapes[n], dtype=torch.bool) for n in update.support.names}
    masks[update.support.names[0]].view(-1)[0] = False
    return told_all(update, update.support._replace(masks=masks))


def another_form(update: Payload, sent: Support) -> Payload | None:
    forms: tuple[Form, ...] = ("bfloat16", "float32", "float64")
    form = next(f for f in forms if f != update.values.form)
    return update._replace(values=rounded(exact(update.values), form, torch.Generator()))


def a_change_of_the_base(update: Payload, sent: Support) -> Payload | None:
    return update._replace(base=a_base(update.layout)) if update.layout.pairs else None


def a_base(layout: Layout) -> Base:
    of_base = base_layout(layout, 1)
    numbers = rounded(torch.ones(of_base.size), "float32", torch.Generator())
    return Base(0, Payload(of_base, everything(of_base), numbers, "known", "known"))


def times(factor: float) -> Forge:
    def forge(update: Payload, sent: Support) -> Payload | None:
        numbers = exact(update.values) * factor
        if not numbers.any():
            return None
        return update._replace(values=rounded(numbers, update.values.form, torch.Generator()))

    forge.__name__ = f"times_{factor:g}"
    return forge


FORGERIES: list[Forge] = [
    no_tensors,
    first_tensor_alone,
    one_tensor_less,
    all_tensors,
    *(another_rank(keep) for keep in (1, 3, toy.RANK)),
    other_ranks_of_that_number,
    every_entry,
    one_entry_more,
    masks_where_none_were_asked,
    another_form,
    a_change_of_the_base,
    times(1e38),
    times(1e6),
]


def forging(exchange: Exchange, layout: Layout, forge: Forge, done: list[int]) -> Exchange:
    """The exchange, with the bad client's updates forged; done: the rounds in which it could be."""

    def carry(messages: Iterable[tuple[Client, bytes]], key: Key) -> Iterator[Reply]:
        sent: dict[str, Support] = {}

        def noted() -> Iterator[tuple[Client, bytes]]:
            for client, message in messages:
                sent[client.id] = decode(message, layout).support
                yield client, message

        for reply in exchange.carry(noted(), key):
            if reply.client.id == BAD and reply.update is not None:
                known = sent[BAD]
                forged = forge(decode(reply.update, layout, known), known)
                if forged is not None:
                    done.append(key.round)
                    reply = reply._replace(update=encode(forged))
            yield reply

    return exchange._replace(carry=carry)


def silent(exchange: Exchange, numbers: Collection[int]) -> Exchange:
    """The exchange, with nothing from the bad client in these rounds."""

    def carry(messages: Iterable[tuple[Client, bytes]], key: Key) -> Iterator[Reply]:
        for reply in exchange.carry(messages, key):
            bad = reply.client.id == BAD and key.round in numbers
            yield reply._replace(update=None, reason="it is silent") if bad else reply

    return exchange._replace(carry=carry)


def run(method: Method, around: Callable[[Exchange], Exchange]) -> tuple[State, list[Receipt]]:
    members = toy.clients(MIXED)
    setup = toy.federation(method, members)
    setup = replace(setup, exchange=around(setup.exchange), norm_bound=100.0)
    return go(setup)


def go(setup: Federation) -> tuple[State, list[Receipt]]:
    _, progress = begin(setup, toy.start(trains=setup.method.trains))
    receipts: list[Receipt] = []
    for _, more, now in rounds(setup, progress, ROUNDS):
        receipts, progress = [*receipts, *more], now
    return progress.state, receipts


@cache
def _without(row: str, numbers: tuple[int, ...]) -> State:
    """The state where the bad client is silent in these rounds: the same for every forgery."""
    (of,) = (each for each in ROWS if str(each) == row)
    return run(of.build(), lambda e: silent(e, numbers))[0]


@pytest.mark.parametrize("forge", FORGERIES, ids=lambda forge: forge.__name__)
@pytest.mark.parametrize("row", kinds.some_of(((row,) for row in ROWS), 6), ids=str)
def test_what_was_not_asked_is_left_out_by_name_and_the_others_are_merged(
    row: Row, forge: Forge
) -> None:
    done: list[int] = []
    found, receipts = run(row.build(), lambda e: forging(e, row.start().layout, forge, done))
    may_shrink = row.options.get("pruning") and forge.__name__ in ("rank_1", "rank_3")
    if not done or may_shrink:
        pytest.skip("this method leaves no room for such an update")
    assert {r.client for r in receipts if r.dropped is not None} == {BAD}
    assert all("update" in (r.dropped or "update") for r in receipts)
    expected = _without(str(row), tuple(done))
    for group, tree in expected.trees.items():
        assert tree.keys() == found.trees[group].keys()
        for name, tensor in tree.items():
            assert torch.equal(found.trees[group][name], tensor)


def above(tree: Tree, layout: Layout, client: Client, key: Key) -> Passed:
    """The entries above a threshold: how many, only the client's own numbers tell."""
    masks = {n: t.abs() > 0.01 for n, t in tree.items()}
    return Passed(Support(tuple(sorted(tree)), None, masks), "known", "sent")


def test_a_sieve_whose_number_of_entries_depends_on_the_change_is_no_misfit() -> None:
    method = compose(down=dense, up=above, server=sgd(), down_values="float64", up_values="float64")
    _, receipts = run(method, lambda e: e)
    assert [r.dropped for r in receipts] == [None] * len(receipts)
    assert {r.up_bytes for r in receipts} != {receipts[0].up_bytes}


def failing(method: Method, culprit: Callable[[Tensor], bool], error: Exception) -> Method:
    """The method, with a merge that fails over an update of which `culprit` says yes."""

    def merge(state: State, updates: Iterable[tuple[Client, Payload]], key: Key) -> State:
        everyone = list(updates)  # it fails at the end, when nobody is to be seen as the cause
        if any(culprit(exact(payload.values)) for _, payload in everyone):
            raise error
        return method.merge(state, everyone, key)

    return method._replace(merge=merge)


@pytest.mark.parametrize(
    "error", [KeyError("m.head.weight"), RuntimeError("shapes"), ValueError(), OverflowError()]
)
@pytest.mark.parametrize("name", ["fedit", "flora", "hetlora"])
def test_an_error_that_one_update_causes_in_a_method_leaves_that_client_out(
    name: str, error: Exception
) -> None:
    row = next(row for row in ROWS if row.name == name)
    mark = 0.123456

    def forge(update: Payload, sent: Support) -> Payload:
        numbers = exact(update.values).clone()
        numbers[0] = mark
        return update._replace(values=rounded(numbers, update.values.form, torch.Generator()))

    method = failing(row.build(), lambda numbers: float(numbers[0]) == mark, error)
    done: list[int] = []
    found, receipts = run(method, lambda e: forging(e, toy.start().layout, forge, done))
    reasons = {r.client: r.dropped for r in receipts}
    assert [id for id, why in reasons.items() if why is not None] == [BAD]
    assert type(error).__name__ in str(reasons[BAD])
    expected, _ = run(row.build(), lambda e: silent(e, done))
    for group, tree in expected.trees.items():
        for name, tensor in tree.items():
            assert torch.equal(found.trees[group][name], tensor)


@pytest.mark.parametrize(
    "error", [OSError(28, "full"), *toy.no_memory()], ids=lambda e: type(e).__name__
)
def test_what_the_server_lacks_is_no_clients_fault(error: Exception) -> None:
    """Memory or room on its disk: the round ends as it began, and no update is left out for it."""
    method = failing(ROWS[0].build(), lambda numbers: True, error)
    with pytest.raises(type(error)) as caught:
        run(method, lambda e: e)
    assert caught.value is error


def test_a_merge_that_fails_over_two_together_goes_on_without_the_larger() -> None:
    """Each alone could be merged: nothing says whose fault it is, so the larger one goes."""
    inner = ROWS[0].build()

    def merge(state: State, updates: Iterable[tuple[Client, Payload]], key: Key) -> State:
        everyone = list(updates)
        if {"0001", "0002"} <= {client.id for client, _ in everyone}:
            raise RuntimeError("these two do not go together")
        return inner.merge(state, everyone, key)

    def forge(update: Payload, sent: Support) -> Payload:
        numbers = exact(update.values) * 20
        return update._replace(values=rounded(numbers, update.values.form, torch.Generator()))

    method = inner._replace(merge=merge)
    _, receipts = run(method, lambda e: forging(e, toy.start().layout, forge, []))
    assert {r.client for r in receipts if r.dropped is not None} == {BAD}


def test_a_merge_that_fails_over_everyone_is_told_with_its_own_error() -> None:
    method = failing(ROWS[0].build(), lambda numbers: True, KeyError("a mistake"))
    with pytest.raises(Exception, match=r"client 0000.*KeyError.*a mistake"):
        run(method, lambda e: e)


def test_the_bound_is_relative_to_the_cohort() -> None:
    """So units do not matter."""
    small = toy.clients([Budget()] * 4)
    method = ROWS[0].build()
    setup = replace(toy.federation(method, small), norm_bound=100.0)
    for scale in (1e-6, 1.0, 1e6):

        def scaled(exchange: Exchange, scale: float = scale) -> Exchange:
            def carry(messages: Iterable[tuple[Client, bytes]], key: Key) -> Iterator[Reply]:
                for reply in exchange.carry(messages, key):
                    assert reply.update is not None
                    own = decode(reply.update, toy.start().layout)
                    factor = scale * (1000 if reply.client.id == BAD else 1)
                    numbers = rounded(exact(own.values) * factor, "float64", torch.Generator())
                    yield reply._replace(update=encode(own._replace(values=numbers)))

            return exchange._replace(carry=carry)

        _, progress = begin(setup, toy.start())
        around = replace(setup, exchange=scaled(setup.exchange))
        _, receipts, _ = next(rounds(around, progress, 1))
        assert [r.client for r in receipts if r.dropped is not None] == [BAD]
        why = next(str(r.dropped) for r in receipts if r.client == BAD)
        assert re.search("norm.*median.*norm_bound", why)
        assert all(r.norm is not None for r in receipts)


@pytest.mark.parametrize(
    ("norms", "out", "of_two"),
    [
        ({"a": 1.0, "b": 1000.0}, {"b"}, True),
        ({"a": 1.0, "b": 1000.0, "c": 0.0}, {"b"}, True),
        ({"a": 1.0, "b": 1000.0, "c": 900.0}, set(), False),
        ({"a": 1.0, "b": 1000.0, "c": 1.0}, {"b"}, False),
        ({"a": 1.0, "b": 99.0}, set(), True),
        ({"a": 1000.0}, set(), False),
    ],
)
def test_of_two_updates_none_is_called_usual(
    norms: dict[str, float], out: set[str], of_two: bool
) -> None:
    found = outliers(norms, 100.0)
    assert set(found) == out
    assert all(("Of two updates the larger" in why) is of_two for why in found.values())


BOUNDS: list[tuple[dict[str, object], float | str]] = [
    ({}, 100.0),
    ({"clip": 1.0}, "none"),
    ({"norm_bound": 7}, 7.0),
    ({"norm_bound": 7, "clip": 1.0}, 7.0),
    ({"norm_bound": "none"}, "none"),
]


@pytest.mark.parametrize(("server", "bound"), BOUNDS)
def test_the_bound_of_a_recipe_is_written_out_and_holds(
    tiny: Tiny, server: dict[str, object], bound: float | str
) -> None:
    recipe = recipes.check(tiny.table(server={**server, "optimizer": "sgd"}))
    assert recipe.server.norm_bound == bound
    expected = math.inf if bound == "none" else bound
    assert from_recipe(recipe).federation.norm_bound == expected


def test_a_bound_of_norms_beside_privacy_is_refused(tiny: Tiny) -> None:
    privacy = {"clip": 0.1, "delta": 1e-3, "noise_multiplier": 1.0}
    with pytest.raises(FedSieveError, match=r"server\.norm_bound.*privacy"):
        recipes.check(tiny.table(privacy=privacy, server={"norm_bound": 10}))
    recipe = recipes.check(tiny.table(privacy=privacy))
    assert recipe.server.norm_bound == "none"


def anything(draws: random.Random, update: Payload) -> Payload:
    """A payload of any names, ranks, masks, form and size that the format has words for."""
    layout = update.layout
    torch.manual_seed(draws.randrange(1 << 30))
    count = len(layout.names)
    names = tuple(
        sorted(draws.sample(layout.names, draws.choice([count, draws.randint(0, count)])))
    )
    ranks = None
    if layout.pairs and draws.random() < 0.7:
        keep = draws.randint(1, layout.rank)
        rows = [sorted(draws.sample(range(layout.rank), keep)) for _ in layout.pairs]
        ranks = torch.tensor(rows)
    if draws.random() < 0.3:
        names, ranks = update.support.names, update.support.ranks
    rank = layout.rank if ranks is None else ranks.shape[1]
    shapes = layout.narrow(rank, layout.scale).shapes
    masked = [n for n in names if draws.random() < draws.choice([0, 0.5, 1])]
    share = draws.random()
    masks = {n: torch.rand(shapes[n]) < share for n in masked}
    support = Support(names, ranks, masks)
    form: Form = draws.choice(["float64", "float32", "bfloat16", "int8"])
    most = 290 if form == "float64" else 37
    numbers = torch.randn(_count(layout, support), dtype=torch.float64)
    numbers = numbers * 10.0 ** draws.uniform(-most, most)
    values = rounded(numbers, form, torch.Generator())
    forged = Payload(layout, support, values, "sent", "sent")
    with_base = layout.pairs and draws.random() < 0.1
    return forged._replace(base=a_base(layout)) if with_base else forged


def endure(row: Row, draws: random.Random) -> None:
    """One run in which one client sends anything, beside honest ones."""
    done: list[int] = []

    def forge(update: Payload, sent: Support) -> Payload:
        return anything(draws, update)

    found, receipts = run(row.build(), lambda e: forging(e, row.start().layout, forge, done))
    assert done == list(range(1, ROUNDS + 1))
    assert all(r.dropped is None for r in receipts if r.client != BAD)
    assert all(t.isfinite().all() for tree in found.trees.values() for t in tree.values())
    if all(r.dropped is not None for r in receipts if r.client == BAD):
        expected, _ = run(row.build(), lambda e: silent(e, done))
        for group, tree in expected.trees.items():
            for name, tensor in tree.items():
                assert torch.equal(found.trees[group][name], tensor)


@pytest.mark.parametrize("row", kinds.some_of(((row,) for row in ROWS), 2), ids=str)
def test_whatever_decodes_leaves_the_others_merged(row: Row) -> None:
    draws = random.Random(str(row))
    for _ in range(TRIALS):
        endure(row, draws)
