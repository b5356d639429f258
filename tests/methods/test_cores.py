"""Methods that train cores between frozen factors: each one's own rule, by hand on the toy."""

import torch

from fedsieve import methods
from fedsieve.algebra.budget import Budget
from fedsieve.algebra.cores import core_name
from fedsieve.algebra.keys import Key
from fedsieve.engine.loop import dense_bytes
from fedsieve.wire import encode
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
