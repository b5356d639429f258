"""LoRA-A2's choice of ranks, against dense products and by hand."""

from typing import Any

import pytest
import torch

from fedsieve import methods
from fedsieve.algebra.budget import Budget, Client
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import Method
from fedsieve.algebra.payload import rounded
from tests import toy
from tests.methods.test_baselines import part, states

EXACT = {"down_values": "float64", "up_values": "float64"}
PAIRS = ((toy.A1, toy.B1), (toy.A2, toy.B2))
NAMES = ((toy.B1, toy.B2), (toy.A1, toy.A2))  # of odd rounds, and of even ones
ALL = toy.RANK * len(PAIRS)


def build(**options: Any) -> Method:
    return methods.load("lora_a2")(**EXACT, **options)


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("up", [1 / 16, 0.25, 0.6, 0.9])
def test_a_client_returns_the_ranks_that_moved_the_weights_most(number: int, up: float) -> None:
    method = build()
    client = Client("0002", 6, Budget(up=up))
    state = method.init(toy.start())
    _, view, trained, report, _ = part(method, state, client, number)
    before, moved = view.adapter.tensors, {}
    for module, (a, b) in enumerate(PAIRS):
        for rank in range(toy.RANK):
            old = torch.outer(before[b][:, rank], before[a][rank])
            new = torch.outer(trained[b][:, rank], trained[a][rank])
            moved[module, rank] = float((new - old).norm())  # of the weights, by this rank alone
    most = sorted(moved, key=lambda place: -moved[place])[: -int(-up * ALL // 1)]
    kept = set()
    for module, name in enumerate(NAMES[0] if number == 1 else NAMES[1]):
        mask = report.support.masks[name] if number == 2 else report.support.masks[name].T
        assert bool((mask == mask[:, :1]).all())  # whole ranks
        kept |= {(module, rank) for rank in range(toy.RANK) if mask[rank, 0]}
        change = (before[name] - trained[name]) * report.support.masks[name]
        assert torch.equal(report.tree()[name], change)
    assert kept == set(most)
    head = before[toy.HEAD] - trained[toy.HEAD]
    assert torch.equal(report.tree()[toy.HEAD], head)
    assert set(report.support.names) == {*(NAMES[number - 1]), toy.HEAD}


def test_modules_compete_so_that_one_of_them_may_have_all() -> None:
    method = build()
    client = Client("0000", 6, Budget(up=0.5))
    context = toy.context(client, Key(7, 1, client.id))
    view, _ = method.view(
        method.publish(method.init(toy.start()), client, context.key), {}, context
    )
    trained = {n: t.clone() for n, t in view.adapter.tensors.items()}
    trained[toy.B1] += 1e-3
    trained[toy.B2] += 1.0
    report, _ = method.report(view, trained, {}, context)
    assert not report.support.masks[toy.B1].any()
    assert report.support.masks[toy.B2].all()


def test_with_full_uploads_it_is_rolora() -> None:
    members = toy.clients([Budget()] * 4)
    ours, bill, _ = toy.after(build(), members, 4)
    theirs, other, _ = toy.after(methods.load("rolora")(**EXACT), members, 4)
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)
    assert [r.down_bytes for r in bill] == [r.down_bytes for r in other]


def test_a_rank_that_nobody_returned_stays_and_the_mean_counts_zeros() -> None:
    members = toy.clients([Budget(up=0.25), Budget(up=0.5)])
    method = build()
    before, after = states(method, members, 1)
    reports = [part(method, before, client, 1)[3].tree() for client in members]
    for name in NAMES[0]:
        moved = before.trees["adapter"][name] - after.trees["adapter"][name]
        mean = (reports[0][name] + reports[1][name]) / 2
        assert (moved - mean).abs().max() < 1e-12
    assert all(torch.equal(after.trees["adapter"][a], toy.start().tensors[a]) for a, _ in PAIRS)


@pytest.mark.parametrize("number", [1, 2])
def test_ranks_beyond_the_budget_or_parts_of_one_are_a_misfit(number: int) -> None:
    method = build()
    client, key = Client("0001", 6, Budget(up=0.25)), Key(7, number)
    sent, _, _, report, _ = part(method, method.init(toy.start()), client, number)
    assert method.misfit(report, sent.support, client, key) is None
    name = NAMES[number - 1][0]
    axis = 1 if number == 1 else 0

    def with_mask(mask: torch.Tensor) -> str | None:
        masks = {**report.support.masks, name: mask}
        count = sum(int(m.sum()) for m in masks.values()) + toy.start().tensors[toy.HEAD].numel()
        values = rounded(torch.ones(count), "float64", torch.Generator())
        support = report.support._replace(masks=masks)
        forged = report._replace(support=support, values=values)
        return method.misfit(forged, sent.support, client, key)

    every = torch.ones_like(report.support.masks[name])
    assert "ranks, and at most 4 were asked" in str(with_mask(every))
    part_of_one = torch.zeros_like(every)
    part_of_one.select(axis, 0)[0] = True
    assert "parts of ranks" in str(with_mask(part_of_one))
    assert with_mask(torch.zeros_like(every)) is None  # fewer may come
