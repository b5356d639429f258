"""Fed-PLoRA's own laws, on the toy federation."""

import pytest
import torch

from fedsieve import methods
from fedsieve.algebra.budget import Budget, Client
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import Method
from fedsieve.algebra.optim import adam
from fedsieve.algebra.payload import Base
from fedsieve.errors import NoUsableUpdate, WireError
from fedsieve.wire import decode, encode
from tests import toy
from tests.methods.test_baselines import build, part

BUDGETS = (Budget(0.125), Budget(0.25), Budget(0.5), Budget(0.75), Budget())
PAIRS = ((toy.A1, toy.B1), (toy.A2, toy.B2))


def held(method: Method, client: Client, number: int = 1) -> list[list[int]]:
    """The modules that a client trains, of each pair."""
    sent = method.publish(method.init(toy.start()), client, Key(7, number, client.id))
    ranks = sent.support.ranks
    return [[*range(toy.RANK)]] * 2 if ranks is None else ranks.tolist()


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("budget", BUDGETS)
def test_a_client_begins_with_the_servers_own_model(budget: Budget, shared: bool) -> None:
    """Whatever it can afford, and over the wire; what is folded is gone after the round."""
    method = build("fed_plora", shared=shared)
    start, client = toy.start(), Client("0002", 6, budget)
    expected = toy.weights(start.tensors, start.layout.scale, {})
    for number in (1, 2, 5):
        context = toy.context(client, Key(7, number, client.id))
        sent = method.publish(method.init(start), client, context.key)
        view, memory = method.view(decode(encode(sent), start.layout), {}, context)
        adapter = view.adapter
        assert adapter.layout.rank == budget.ranks(toy.RANK)
        got = toy.weights(adapter.tensors, adapter.layout.scale, adapter.base)
        for ours, theirs in zip(got, expected, strict=True):
            assert (ours - theirs).abs().max() <= 1e-12
        assert memory == {}
        base = 0 if sent.base is None else sent.base.change.values.data.numel()
        assert sent.values.data.numel() + base == start.layout.size  # nothing twice, nothing less
    one, other = held(method, client)
    assert (one == other) == (shared or budget == Budget())


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
@pytest.mark.parametrize("shared", [True, False])
def test_each_module_is_averaged_over_those_who_trained_it(weighting: str, shared: bool) -> None:
    """Module by module, by hand; what nobody drew stays to the bit."""
    method = build("fed_plora", weighting=weighting, shared=shared)
    state, members = method.init(toy.start()), toy.clients(BUDGETS[:3])
    updates, ends = [], []
    for client in members:
        _, _, trained, report, _ = part(method, state, client, 1)
        updates.append((client, report))
        ends.append((client.examples if weighting == "examples" else 1, client, trained))
    merged = method.merge(state, iter(updates), Key(7, 1)).trees["adapter"]
    nobody = 0
    for pair, (a, b) in enumerate(PAIRS):
        for module in range(toy.RANK):
            rows, columns, by = [], [], []
            for share, client, trained in ends:
                own = held(method, client)[pair]
                if module in own:
                    rows.append(share * trained[a][own.index(module)])
                    columns.append(share * trained[b][:, own.index(module)])
                    by.append(share)
            if not by:
                assert torch.equal(merged[a][module], toy.start().tensors[a][module])
                assert torch.equal(merged[b][:, module], toy.start().tensors[b][:, module])
                nobody += 1
                continue
            assert (merged[a][module] - sum(rows) / sum(by)).abs().max() <= 1e-12
            assert (merged[b][:, module] - sum(columns) / sum(by)).abs().max() <= 1e-12
    assert 0 < nobody < 2 * toy.RANK
    head = sum(share * trained[toy.HEAD] for share, _, trained in ends)
    assert (merged[toy.HEAD] - head / sum(share for share, _, _ in ends)).abs().max() <= 1e-12


def test_clients_of_one_module_do_not_shrink_it() -> None:
    """Of clients that learn nothing the model is what it was, whatever they held (not so where a
    mean counts zeros: HetLoRA's).
    """
    members = toy.clients(BUDGETS)
    for name, moves in (("fed_plora", False), ("hetlora", True)):
        method = build(name)
        state = method.init(toy.start())
        updates = []
        for client in members:
            context = toy.context(client, Key(7, 1, client.id))
            sent = method.publish(method.plan(state, Key(7, 1)), client, context.key)
            view, memory = method.view(sent, {}, context)
            updates.append((client, method.report(view, view.adapter.tensors, memory, context)[0]))
        after = method.merge(state, iter(updates), Key(7, 1)).trees["adapter"]
        assert (toy.distance(after, toy.start().tensors) > 1e-12) == moves


def test_a_change_that_does_not_count_from_the_start_is_refused() -> None:
    method, client = build("fed_plora"), Client("0002", 6, Budget(0.5))
    context = toy.context(client)
    sent = method.publish(method.init(toy.start()), client, context.key)
    assert sent.base is not None
    with pytest.raises(WireError, match="since round 3"):
        method.view(sent._replace(base=Base(3, sent.base.change)), {}, context)


def test_a_round_without_an_update_is_told() -> None:
    method = build("fed_plora", server=adam())
    with pytest.raises(NoUsableUpdate):
        method.merge(method.init(toy.start()), iter([]), Key(7, 1))


def test_numbers_are_rounded_alike_folded_or_not() -> None:
    """Of a download in bfloat16 all is in bfloat16."""
    method = methods.load("fed_plora")(down_values="bfloat16")
    sent = method.publish(method.init(toy.start()), Client("0002", 6, Budget(0.5)), Key(7, 1))
    assert sent.base is not None
    assert sent.values.form == sent.base.change.values.form == "bfloat16"
