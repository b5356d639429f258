"""FSLoRA's own laws: Definition 3.1 (the sketch), equation 4 (the steps), equation 5 (the mean)."""

from collections import Counter
from itertools import combinations
from math import comb

import pytest
import torch
from torch import Tensor

from fedsieve.algebra.adapter import layout_of
from fedsieve.algebra.budget import Budget, Client
from fedsieve.algebra.keys import Key
from fedsieve.algebra.payload import Seed
from fedsieve.algebra.support import add_back, cut, draw_ranks
from fedsieve.methods import fslora
from tests import toy


def sketch_matrix(ranks: Tensor, rank: int) -> Tensor:
    """S of Definition 3.1, written out as a diagonal matrix."""
    matrix = torch.zeros(rank, rank, dtype=torch.float64)
    for j in ranks.tolist():
        matrix[j, j] = rank / len(ranks)
    return matrix


def test_draws_are_uniform_over_subsets() -> None:
    rank, keep, draws = 5, 2, 6000
    seen = Counter(
        tuple(draw_ranks(seed, 1, rank, keep, shared=True)[0].tolist()) for seed in range(draws)
    )
    assert set(seen) == set(combinations(range(rank), keep))
    expected = draws / comb(rank, keep)
    chi2 = sum((count - expected) ** 2 / expected for count in seen.values())
    assert chi2 < 27.9  # the 0.999 quantile for 9 degrees of freedom


def test_the_sketch_is_unbiased() -> None:
    """E[B S A] = B A: the mean over sketches lies within 5 standard errors, entry by entry."""
    draws = torch.Generator().manual_seed(1)
    rank, keep = 8, 3
    b = torch.randn(6, rank, generator=draws, dtype=torch.float64)
    a = torch.randn(rank, 7, generator=draws, dtype=torch.float64)
    sketched = torch.stack(
        [
            b @ sketch_matrix(draw_ranks(seed, 1, rank, keep, shared=True)[0], rank) @ a
            for seed in range(3000)
        ]
    )
    error = (sketched.mean(0) - b @ a).abs()
    assert (error <= 5 * sketched.std(0) / 3000**0.5).all()


def test_pairs_share_their_ranks_by_default_and_can_draw_their_own() -> None:
    shared = draw_ranks(11, 6, 32, 8, shared=True)
    own = draw_ranks(11, 6, 32, 8, shared=False)
    assert (shared == shared[0]).all()
    assert len({tuple(row) for row in own.tolist()}) == 6
    assert (own.diff(dim=1) > 0).all()  # rising, so no rank comes twice


@pytest.mark.parametrize("shared", [True, False])
def test_a_and_b_of_a_module_are_cut_at_the_same_ranks(shared: bool) -> None:
    adapter = toy.start()
    method = fslora.method(shared=shared)
    plan = method.plan(method.init(adapter), Key(1, 1))
    payload = method.publish(plan, Client("0001", 5, Budget(0.5)), Key(1, 1, "0001"))
    assert isinstance(payload.ranks_told, Seed)
    assert payload.support.ranks is not None
    tree = payload.tree()
    for number, pair in enumerate(adapter.layout.pairs):
        index = payload.support.ranks[number]
        a, b = adapter.tensors[pair.a].float(), adapter.tensors[pair.b].float()
        assert torch.equal(tree[pair.a], a[index])
        assert torch.equal(tree[pair.b], b[:, index])


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("ratio", [0.125, 0.5, 0.75])
def test_a_rank_k_adapter_has_the_gradients_of_the_masked_one(ratio: float, rslora: bool) -> None:
    """d loss(W0 + s B S A) on the chosen rows and columns equals the rank-k adapter's gradients."""
    adapter = toy.start()
    scale = 16 / toy.RANK ** (0.5 if rslora else 1.0)
    layout = layout_of(adapter.tensors, scale)
    method = fslora.method(down_values="float64", up_values="float64")
    plan = method.plan(method.init(adapter._replace(layout=layout)), Key(3, 1))
    client = Client("0002", 5, Budget(ratio))
    payload = method.publish(plan, client, Key(3, 1, "0002"))
    view, _ = method.view(payload, {}, toy.context(client))
    assert payload.support.ranks is not None
    index = payload.support.ranks[0]
    s = sketch_matrix(index, toy.RANK)
    x, y = toy.data("0002")

    full = {n: t.clone().requires_grad_(True) for n, t in adapter.tensors.items()}
    masked = {**full, toy.B1: full[toy.B1] @ s, toy.B2: full[toy.B2] @ s}
    masked_loss = toy.loss(masked, scale, x, y)
    masked_loss.backward()

    own = {n: t.clone().requires_grad_(True) for n, t in view.adapter.tensors.items()}
    own_loss = toy.loss(own, view.adapter.layout.scale, x, y)
    own_loss.backward()

    assert own_loss.item() == pytest.approx(masked_loss.item(), abs=1e-12)
    expected = cut(
        {n: t.grad for n, t in full.items() if t.grad is not None}, layout, view.support.ranks
    )
    for name, tensor in own.items():
        assert tensor.grad is not None
        torch.testing.assert_close(tensor.grad, expected[name], rtol=0, atol=1e-12)
    unchosen = [j for j in range(toy.RANK) if j not in index.tolist()]
    gradient = full[toy.A1].grad
    assert gradient is not None
    assert gradient[unchosen].abs().max() == 0  # equation 4: only the chosen ones move


def test_the_server_adds_the_mean_and_counts_zeros() -> None:
    """Equation 5, with each client's change put back into the full shape by hand."""
    adapter = toy.start()
    method = fslora.method(down_values="float64", up_values="float64")
    state = method.init(adapter)
    key = Key(5, 1)
    plan = method.plan(state, key)
    members = toy.clients([Budget(0.25), Budget(0.5), Budget(1.0)])
    total = {n: torch.zeros_like(t) for n, t in adapter.tensors.items()}
    updates = []
    for client in members:
        own = key._replace(client=client.id)
        payload = method.publish(plan, client, own)
        context = toy.context(client, own)
        view, _ = method.view(payload, {}, context)
        trained = toy.train(view, client, own).tensors
        updates.append((client, method.report(view, trained, {}, context)[0]))
        rows = list(range(toy.RANK))
        if payload.support.ranks is not None:
            rows = payload.support.ranks[0].tolist()
        for place, j in enumerate(rows):
            for name in (toy.A1, toy.A2):
                total[name][j] += trained[name][place] - view.adapter.tensors[name][place]
            for name in (toy.B1, toy.B2):
                total[name][:, j] += trained[name][:, place] - view.adapter.tensors[name][:, place]
        total[toy.HEAD] += trained[toy.HEAD] - view.adapter.tensors[toy.HEAD]
    merged = method.export(method.merge(state, iter(updates), key)).tensors
    expected = {n: t + total[n] / 3 for n, t in adapter.tensors.items()}
    assert toy.distance(merged, expected) <= 1e-12


def test_cut_and_add_back_undo_each_other() -> None:
    adapter = toy.start()
    ranks = draw_ranks(4, 2, toy.RANK, 3, shared=False)
    total = {n: torch.zeros_like(t) for n, t in adapter.tensors.items()}
    add_back(total, cut(adapter.tensors, adapter.layout, ranks), adapter.layout, ranks, 2.0)
    again = cut(total, adapter.layout, ranks)
    expected = cut(adapter.tensors, adapter.layout, ranks)
    assert all(torch.equal(again[n], 2 * expected[n]) for n in again)
    assert int((total[toy.A1].abs().sum(1) > 0).sum()) == 3
