"""FLASC's own laws: a round written out by hand, masks that count, feedback that loses nothing."""

import pytest
import torch

from fedsieve.algebra.adapter import Adapter, Tree
from fedsieve.algebra.budget import Budget, Client
from fedsieve.algebra.keys import Key
from fedsieve.algebra.optim import adam
from fedsieve.algebra.support import top_k
from fedsieve.methods import flasc
from tests import toy


def test_a_round_equals_algorithm_1_written_out_by_hand() -> None:
    """Two rounds over three clients, in plain torch on one flat vector with torch.optim.Adam."""
    down, up, lr = 0.25, 0.125, 0.05
    names = toy.start().layout.names
    shapes = {n: toy.start().tensors[n].shape for n in names}

    flat = torch.cat([toy.start().tensors[n].flatten() for n in names]).requires_grad_(True)
    server = torch.optim.Adam([flat], lr=lr)
    for _ in range(2):
        weights = flat.detach().clone()
        cut = weights.abs().sort(descending=True).values[-(-flat.numel() // 4) - 1]
        start = weights * (weights.abs() >= cut)
        gradient = torch.zeros_like(weights)
        for client in ("0000", "0001", "0002"):
            parts = start.split([shapes[n].numel() for n in names])
            tree = {n: p.reshape(shapes[n]) for n, p in zip(names, parts, strict=True)}
            adapter = Adapter(toy.start().layout, tree)
            trained = toy.train(toy.whole(adapter), Client(client, 6), Key(0)).tensors
            change = start - torch.cat([trained[n].flatten() for n in names])
            cut = change.abs().sort(descending=True).values[-(-flat.numel() // 8) - 1]
            gradient += change * (change.abs() >= cut) / 3
        flat.grad = gradient
        server.step()

    method = flasc.method(server=adam(lr), down_values="float64", up_values="float64")
    ours, receipts, _ = toy.after(method, toy.clients([Budget(1, down, up)] * 3), 2)
    together = torch.cat([ours[n].flatten() for n in names])
    assert (together - flat.detach()).abs().max() <= 1e-12
    assert len(receipts) == 6


@pytest.mark.parametrize("density", [1 / 256, 1 / 16, 0.3, 0.99])
def test_a_mask_keeps_the_share_asked_for_and_nothing_smaller_than_what_it_drops(
    density: float,
) -> None:
    tree = toy.start().tensors
    names = tuple(sorted(tree))
    masks = top_k(tree, density, names)
    kept = torch.cat([tree[n][masks[n]].abs() for n in names])
    dropped = torch.cat([tree[n][~masks[n]].abs() for n in names])
    assert kept.numel() - 1 < density * (kept.numel() + dropped.numel()) <= kept.numel()
    assert kept.min() >= dropped.max()


def test_what_did_not_travel_down_starts_at_zero_and_is_trained_all_the_same() -> None:
    method = flasc.method(down_values="float64", up_values="float64")
    plan = method.plan(method.init(toy.start()), Key(0, 1))
    client = Client("0000", 6, Budget(1, 0.1, 1.0))
    key = Key(0, 1, "0000")
    payload = method.publish(plan, client, key)
    view, _ = method.view(payload, {}, toy.context(client, key))
    held = torch.cat([t.flatten() for t in view.adapter.tensors.values()])
    assert int((held != 0).sum()) == payload.values.data.numel() < held.numel() / 9
    trained = toy.train(view, client, key).tensors
    moved = torch.cat([(trained[n] - view.adapter.tensors[n]).flatten() for n in trained])
    assert (moved != 0).float().mean() > 0.9


def test_a_whole_upload_is_not_read_with_the_masks_of_the_download() -> None:
    method = flasc.method(down_values="float64", up_values="float64")
    _, receipts, _ = toy.after(method, toy.clients([Budget(1, 0.25, 1.0)] * 2), 2)
    assert [receipt.dropped for receipt in receipts] == [None] * 4


def test_with_feedback_nothing_of_a_change_is_lost() -> None:
    """What was sent over the rounds and what is still held back add up to all changes."""
    method = flasc.method(feedback=True, up_values="int8", down_values="float64")
    layout = toy.start().layout
    client = Client("0000", 6, Budget(1, 1, 0.1))
    memory: dict[str, Tree] = {}
    sent = {n: torch.zeros(s, dtype=torch.float64) for n, s in layout.shapes.items()}
    changed = {n: torch.zeros(s, dtype=torch.float64) for n, s in layout.shapes.items()}
    for number in range(4):
        key = Key(0, number, "0000")
        plan = method.plan(method.init(toy.start(number)), key)
        view, memory = method.view(
            method.publish(plan, client, key), memory, toy.context(client, key)
        )
        trained = toy.train(view, client, key).tensors
        payload, memory = method.report(view, trained, memory, toy.context(client, key))
        for name, tensor in payload.tree().items():
            sent[name] += tensor
            changed[name] += view.adapter.tensors[name] - trained[name]
    held = memory["residual"]
    total = {n: sent[n] + held[n] for n in sent}
    assert toy.distance(total, changed) <= 1e-6  # int8 steps are float32
    assert max(float(t.abs().max()) for t in held.values()) > 1e-3


def test_ties_at_the_limit_are_broken_by_place() -> None:
    tree = {"a": torch.tensor([1.0, -2.0, 2.0]), "b": torch.tensor([[2.0, 0.5], [-2.0, 3.0]])}
    masks = top_k(tree, 4 / 7, ("a", "b"))
    assert masks["a"].tolist() == [False, True, True]
    assert masks["b"].tolist() == [[True, False], [False, True]]
    assert top_k({"a": torch.zeros(4)}, 0.5, ("a",))["a"].tolist() == [True, True, False, False]
