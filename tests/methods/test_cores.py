"""Methods that train cores between frozen factors: each one's own rule, by hand on the toy."""

from collections import Counter
from typing import Any

import torch

from fedsieve import methods
from fedsieve.algebra.adapter import Tree
from fedsieve.algebra.budget import Budget, Client
from fedsieve.algebra.cores import core_name, gain_name, head_of
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import Method, State, View
from fedsieve.algebra.payload import Payload
from fedsieve.engine.loop import dense_bytes
from fedsieve.methods.ravan import heads_of
from fedsieve.wire import decode, encode
from tests import toy

EXACT = {"down_values": "float64", "up_values": "float64"}


def test_fed_sb_moves_the_core_by_the_projected_gradient() -> None:
    """One step of one client, from dL/dW alone: R <- R - lr s B^T (dL/dW) A^T."""
    method = methods.load("fed_sb")(**EXACT)
    (member,) = toy.clients([Budget()])
    begun = toy.start(trains=method.trains)
    weights = [w.detach().requires_grad_(True) for w in toy.weights(begun.tensors, 0.5, {})]
    x, y = toy.data(member.id)
    hidden = torch.tanh(torch.tanh(x @ weights[0].T) @ weights[1].T)
    value = ((hidden @ begun.tensors[toy.HEAD].T - y) ** 2).mean()
    slopes = torch.autograd.grad(value, weights)

    state, key = method.init(begun), Key(7, 1)
    sent = method.publish(method.plan(state, key), member, key)
    context = toy.context(member, trains=method.trains)
    view, memory = method.view(sent, {}, context)
    trained = toy.train(view, member, key, steps=1, lr=0.1).tensors
    report, _ = method.report(view, trained, memory, context)
    after = method.export(method.merge(state, iter([(member, report)]), key)).tensors
    for module, (b, a), slope in zip(("m.first", "m.second"), toy.factors(), slopes, strict=True):
        name = core_name(module, 0)
        expected = begun.tensors[name] - 0.1 * 0.5 * b.T @ slope @ a.T
        assert (after[name] - expected).abs().max() < 1e-12


def test_fed_sb_sends_squares_of_the_rank_and_the_head() -> None:
    method = methods.load("fed_sb")()
    (member,) = toy.clients([Budget(0.25, 0.25, 0.25)])
    state = method.init(toy.start(trains=method.trains))
    message = encode(method.publish(method.plan(state, Key(7, 1)), member, Key(7, 1)))
    numbers = 2 * toy.RANK**2 + toy.OUTPUTS * toy.HIDDEN
    assert len(message) == dense_bytes(state.layout) == 18 + 4 * numbers


# --- RAVAN


def ravan(**options: Any) -> Method:
    return methods.load("ravan")(**EXACT, **options)


def part(
    method: Method, state: State, client: Client, number: int = 1, **training: Any
) -> tuple[Payload, View, Tree, Payload]:
    """What a client got, its view, what it trained, and what of its answer was decoded."""
    key = Key(7, number, client.id)
    context = toy.context(client, key, method.trains)
    sent = decode(encode(method.publish(method.plan(state, key), client, key)), state.layout)
    view, memory = method.view(sent, {}, context)
    trained = toy.train(view, client, key, **training).tensors
    report, _ = method.report(view, trained, memory, context)
    return sent, view, trained, decode(encode(report), state.layout, sent.support)


def test_the_server_has_the_mean_of_the_products_of_gain_and_core() -> None:
    method = ravan(heads=2)
    members = toy.clients([Budget()] * 3)
    state = method.init(toy.start(trains=method.trains))
    came = [part(method, state, client, steps=5, lr=0.5) for client in members]
    updates = [(client, each[3]) for client, each in zip(members, came, strict=True)]
    after = method.export(method.merge(state, iter(updates), Key(7, 1))).tensors
    for module in ("m.first", "m.second"):
        for head in (0, 1):
            core, gain = core_name(module, head), gain_name(module, head)
            gains = [float(trained[gain]) for _, _, trained, _ in came]
            assert max(abs(each - 1) for each in gains) > 1e-3  # they were trained
            products = [g * t[core] for g, (_, _, t, _) in zip(gains, came, strict=True)]
            assert (after[core] - sum(products) / 3).abs().max() < 1e-12
            assert after[gain].item() == 1  # the next round begins with one again


def test_gains_never_travel_and_only_trained_heads_go_up() -> None:
    method = ravan(heads=4)
    state = method.init(toy.start(trains=method.trains))
    for client in toy.clients([Budget(0.25), Budget(0.5), Budget()]):
        sent, view, trained, report = part(method, state, client)
        chosen = heads_of(client, 4, 1)
        cores = {core_name(m, h) for m in ("m.first", "m.second") for h in range(4)}
        assert set(sent.support.names) == {*cores, toy.HEAD}
        asked = {name for name in cores if head_of(name) in chosen}
        assert set(report.support.names) == {*asked, toy.HEAD}
        assert report.values.data.numel() == len(chosen) * 2 * 4 + toy.OUTPUTS * toy.HIDDEN
        # The others stand still, and are in the client's forward pass as the server has them.
        for name, tensor in view.adapter.tensors.items():
            stands = head_of(name) is not None and head_of(name) not in chosen
            assert torch.equal(trained[name], tensor) is stands
            assert torch.equal(tensor, state.trees["adapter"][name])


def test_the_heads_of_others_are_refused() -> None:
    method = ravan(heads=4)
    state = method.init(toy.start(trains=method.trains))
    one, *others = toy.clients([Budget(0.5)] * 12)
    sent, *_, own = part(method, state, one)
    assert method.misfit(own, sent.support, one, Key(99, 1)) is None  # whatever the server's seed
    refused = 0
    for client in others:
        *_, report = part(method, state, client)
        wrong = method.misfit(report, sent.support, one, Key(7, 1))
        assert (wrong is None) == (heads_of(client, 4, 1) == heads_of(one, 4, 1))
        refused += wrong is not None
    assert refused
    assert any(heads_of(one, 4, n) != heads_of(one, 4, 1) for n in range(2, 9))


def test_every_head_has_its_turn_as_often_as_the_others() -> None:
    client = Client("0007", 5, Budget(0.5))
    counts = Counter(head for n in range(1, 4001) for head in heads_of(client, 4, n))
    assert sum(counts.values()) == 8000
    assert all(abs(counts[head] - 2000) < 200 for head in range(4))  # more than 6 deviations


def test_one_head_whose_gain_stands_still_is_fed_sb() -> None:
    """Step by step: what RAVAN adds is heads and gains."""
    ours, theirs = ravan(heads=1), methods.load("fed_sb")(**EXACT)
    members = toy.clients([Budget()] * 3)
    start = toy.start(trains=theirs.trains)
    one = ours.init(toy.start(trains=ours.trains))
    one = one._replace(trees={**one.trees, "adapter": {**one.trees["adapter"], **start.tensors}})
    other = theirs.init(start)
    for number in (1, 2):
        mine, yours = [], []
        for client in members:
            key = Key(7, number, client.id)
            context = toy.context(client, key, ours.trains)
            view, _ = ours.view(ours.publish(one, client, key), {}, context)
            names = tuple(n for n in view.moves.names if "gain" not in n)
            still = view._replace(moves=view.moves._replace(names=names))
            trained = toy.train(still, client, key).tensors
            mine.append((client, ours.report(view, trained, {}, context)[0]))
            yours.append((client, part(theirs, other, client, number)[3]))
        one = ours.merge(one, iter(mine), Key(7, number))
        other = theirs.merge(other, iter(yours), Key(7, number))
    after = ours.export(one).tensors
    assert all((after[n] - t).abs().max() < 1e-12 for n, t in theirs.export(other).tensors.items())
