"""Methods that make the server's factors of the clients' products, against the dense products.

The oracle forms B A, a matrix, and takes torch's SVD of it; the code never does.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from fedsieve import methods
from fedsieve.algebra.adapter import Tree
from fedsieve.algebra.budget import Budget, Client
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import Method, State
from tests import toy

EXACT = {"down_values": "float64", "up_values": "float64"}
FULL = Budget()
PAIRS = ((toy.A1, toy.B1), (toy.A2, toy.B2))
CLOSE = 1e-10


def build(name: str, **options: Any) -> Method:
    return methods.load(name)(**EXACT, **options)


def one_round(
    method: Method, state: State, members: list[Client], number: int = 1
) -> tuple[State, list[tuple[Tree, float]]]:
    """The server's state after a round, and what each client trained, with its scale."""
    plan, updates, trained = method.plan(state, Key(7, number)), [], []
    for client in members:
        context = toy.context(client, Key(7, number, client.id))
        view, memory = method.view(method.publish(plan, client, context.key), {}, context)
        tree = toy.train(view, client, context.key).tensors
        updates.append((client, method.report(view, tree, memory, context)[0]))
        trained.append((tree, view.adapter.layout.scale))
    return method.merge(state, iter(updates), Key(7, number)), trained


def product(state: State, pair: tuple[str, str]) -> Tensor:
    """s B A of the server's adapter."""
    tree = state.trees["adapter"]
    return (tree[pair[1]] @ tree[pair[0]]) * state.layout.scale


def best(matrix: Tensor, rank: int) -> Tensor:
    """The nearest matrix of a rank."""
    u, sizes, v = torch.linalg.svd(matrix, full_matrices=False)
    nearest: Tensor = (u[:, :rank] * sizes[:rank]) @ v[:rank]
    return nearest


# --- raFLoRA

SMALL, MIDDLE = Budget(0.25), Budget(0.5)
COHORTS = [(SMALL, MIDDLE, FULL), (SMALL, SMALL, MIDDLE), (MIDDLE, FULL, FULL, SMALL), (SMALL,)]


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
@pytest.mark.parametrize("scaling", ["server", "alpha/k", "alpha/sqrt(k)"])
@pytest.mark.parametrize("cohort", COHORTS)
def test_raflora_divides_each_rank_by_its_holders(
    cohort: tuple[Budget, ...], scaling: str, weighting: str
) -> None:
    """And what nobody holds stays as the server has it."""
    method = build("raflora", scaling=scaling, weighting=weighting)
    before = method.init(toy.start())
    members = toy.clients(cohort)
    after, trained = one_round(method, before, members)
    for a, b in PAIRS:
        dense = torch.zeros(after.layout.shapes[b][0], after.layout.shapes[a][1]).double()
        for rank in range(toy.RANK):
            held = [
                (client.examples if weighting == "examples" else 1, scale, tree)
                for client, (tree, scale) in zip(members, trained, strict=True)
                if tree[a].shape[0] > rank
            ]
            own = before.trees["adapter"]
            everything = held or [(1, before.layout.scale, own)]
            total = sum(share for share, _, _ in everything)
            for share, scale, tree in everything:
                dense += share / total * scale * torch.outer(tree[b][:, rank], tree[a][rank])
        assert (product(after, (a, b)) - best(dense, toy.RANK)).abs().max() < CLOSE


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_raflora_is_flexlora_where_all_clients_have_the_servers_rank(weighting: str) -> None:
    members = toy.clients([FULL] * 4)
    ours, _, _ = toy.after(build("raflora", weighting=weighting), members, 3)
    theirs, _, _ = toy.after(build("flexlora", weighting=weighting), members, 3)
    assert toy.distance(ours, theirs) < CLOSE


def test_in_raflora_the_ranks_of_few_do_not_shrink_as_in_flexlora() -> None:
    """Three of four clients are small, and nobody moves: the product should stay what it was."""
    members = toy.clients([FULL, SMALL, SMALL, SMALL])

    def energy_left(name: str) -> float:
        method = build(name)
        state = method.init(toy.start())
        first = state
        for number in (1, 2, 3, 4):
            key = Key(7, number)
            updates = []
            for client in members:
                context = toy.context(client, key._replace(client=client.id))
                sent = method.publish(method.plan(state, key), client, context.key)
                view, memory = method.view(sent, {}, context)
                report, _ = method.report(view, view.adapter.tensors, memory, context)
                updates.append((client, report))
            state = method.merge(state, iter(updates), key)
        tails = [torch.linalg.svdvals(product(s, PAIRS[0]))[2:].norm() for s in (state, first)]
        return float(tails[0] / tails[1])

    assert energy_left("raflora") == pytest.approx(1, abs=1e-8)
    assert energy_left("flexlora") < 0.01  # a quarter of them is left in each round
