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
from fedsieve.algebra.optim import adam, fading, sgd
from fedsieve.methods.lora_fair import _corrected
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


# --- FLoRIST


def dense_mean(trained: list[tuple[Tree, float]], pair: tuple[str, str]) -> Tensor:
    """The mean of the clients' s_i B_i A_i."""
    return torch.stack([scale * tree[pair[1]] @ tree[pair[0]] for tree, scale in trained]).mean(0)


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.9, 0.99])
def test_florist_keeps_the_fewest_ranks_that_hold_the_share(threshold: float) -> None:
    """The same of all modules: as many as the one that needs most."""
    method = build("florist", threshold=threshold)
    after, trained = one_round(method, method.init(toy.start()), toy.clients([SMALL, FULL, MIDDLE]))
    means = {pair: dense_mean(trained, pair) for pair in PAIRS}

    def share_kept(rank: int) -> float:
        shares = [float((best(mean, rank).norm() / mean.norm()) ** 2) for mean in means.values()]
        return min(shares)

    rank = next(rank for rank in range(1, 30) if share_kept(rank) >= threshold)
    base = method.export(after).base
    for (a, _), mean in means.items():
        change = base[a.replace("lora_A.weight", "base")]
        assert (change - best(mean, rank)).abs().max() < CLOSE
    assert {t.shape[0] for n, t in after.trees["fold 1"].items() if "lora_A" in n} == {rank}


def test_florist_without_a_cut_is_flora_and_with_one_sends_less() -> None:
    members = toy.clients([FULL] * 4)

    def of(name: str, **options: Any) -> tuple[Tree, int]:
        method = build(name, **options)
        _, receipts, progress = toy.after(method, members, 2)
        assert all(receipt.dropped is None for receipt in receipts)
        return method.export(progress.state).base, sum(r.down_bytes for r in receipts)

    (whole, most), (uncut, _), (cut, least) = (
        of("flora"), of("florist", threshold=1.0), of("florist", threshold=0.5)
    )  # fmt: skip
    assert toy.distance(uncut, whole) < CLOSE
    assert toy.distance(cut, whole) > 1e-3
    assert least < most


def test_a_stack_of_which_nothing_was_learned_is_one_rank_of_zeros() -> None:
    method = build("florist")
    state = method.init(toy.start())
    member, key = toy.clients([FULL])[0], Key(7, 1, "0000")
    view, memory = method.view(method.publish(state, member, key), {}, toy.context(member, key))
    report, _ = method.report(view, view.adapter.tensors, memory, toy.context(member, key))
    after = method.merge(state, iter([(member, report)]), Key(7, 1))
    assert all(not tensor.any() for tensor in method.export(after).base.values())
    sent = method.publish(after, Client("0009", 6), Key(7, 2, "0009"))
    assert sent.base is not None
    assert sent.base.change.layout.rank == 1


# --- LoRA-FAIR


def mean(trained: list[tuple[Tree, float]], name: str) -> Tensor:
    return torch.stack([tree[name] for tree, _ in trained]).mean(0)


@pytest.mark.parametrize("penalty", [0.0, 0.01, 0.5])
def test_no_other_correction_of_b_does_better_in_lora_fair(penalty: float) -> None:
    """The objective's slope there is zero, and it is convex; A is the clients' mean."""
    method = build("lora_fair", penalty=penalty)
    after, trained = one_round(method, method.init(toy.start()), toy.clients([FULL] * 4))
    tree, scale = after.trees["adapter"], after.layout.scale
    for a, b in PAIRS:
        assert (tree[a] - mean(trained, a)).abs().max() < CLOSE
        added = (tree[b] - mean(trained, b)).requires_grad_(True)
        wanted = dense_mean(trained, (a, b)) / scale
        size = torch.linalg.eigvalsh(tree[a] @ tree[a].T).mean()
        missed = (wanted - (mean(trained, b) + added) @ tree[a]).square().sum()
        (slope,) = torch.autograd.grad(missed + penalty * size * added.square().sum(), added)
        assert slope.abs().max() < CLOSE
        assert added.abs().max() > 1e-6  # there was something to correct


def test_lora_fair_is_nearer_to_the_mean_of_products_than_fedit_and_a_penalty_holds_it() -> None:
    members = toy.clients([FULL] * 4)

    def missed(penalty: float) -> tuple[float, float]:
        method = build("lora_fair", penalty=penalty)
        after, trained = one_round(method, method.init(toy.start()), members)
        tree = after.trees["adapter"]
        offs = [float((product(after, p) - dense_mean(trained, p)).norm()) for p in PAIRS]
        return sum(offs), sum(float((tree[b] - mean(trained, b)).norm()) for _, b in PAIRS)

    found = [missed(penalty) for penalty in (0.0, 0.01, 0.1, 1.0, 1e9)]
    offs, sizes = zip(*found, strict=True)
    assert list(offs) == sorted(offs)
    assert offs[0] < 0.95 * offs[-1]
    assert list(sizes) == sorted(sizes, reverse=True)
    ours, _, _ = toy.after(build("lora_fair", penalty=1e12), members, 3)
    fedit, _, _ = toy.after(build("fedit"), members, 3)
    assert toy.distance(ours, fedit) < 1e-8


def test_a_correction_that_can_be_whole_is() -> None:
    """By hand: two clients, A of one row, so that what they lack lies in its row space or not."""
    stack = [
        (0.5, torch.tensor([[2.0], [0.0]]), torch.tensor([[1.0, 0.0]])),
        (0.5, torch.tensor([[0.0], [4.0]]), torch.tensor([[3.0, 0.0]])),
    ]
    b, a = _corrected(stack, 0.0)
    assert torch.equal(a, torch.tensor([[2.0, 0.0]]))
    # M = ((1, 0), (6, 0)), which is B A with B = (1/2, 3).
    torch.testing.assert_close(b, torch.tensor([[0.5], [3.0]]))


def test_factors_of_zeros_have_nothing_to_correct() -> None:
    b, a = _corrected([(1.0, torch.ones(3, 2), torch.zeros(2, 4))], 0.01)
    assert torch.equal(b, torch.ones(3, 2))
    assert not a.any()


def test_a_convolutions_factors_are_corrected_as_the_matrices_that_they_are() -> None:
    draws = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draws, dtype=torch.float64)

    flat = [(0.5, drawn(5, 2), drawn(2, 12)) for _ in range(2)]
    folded = [(w, b[:, :, None, None], a.reshape(2, 3, 2, 2)) for w, b, a in flat]
    (b, a), (wide_b, wide_a) = _corrected(flat, 0.1), _corrected(folded, 0.1)
    assert torch.equal(wide_b.flatten(1), b)
    assert torch.equal(wide_a.flatten(1), a)


# --- FedSVD


def orthonormal(rows: Tensor) -> float:
    return float((rows @ rows.T - torch.eye(len(rows)).double()).abs().max())


def test_fedsvd_gives_back_the_singular_vectors_of_the_mean_product() -> None:
    method = build("fedsvd")
    state = method.init(toy.start())
    for number in (1, 2, 3):
        state, trained = one_round(method, state, toy.clients([FULL] * 4), number)
        tree, scale = state.trees["adapter"], state.layout.scale
        for a, b in PAIRS:
            assert (product(state, (a, b)) - dense_mean(trained, (a, b))).abs().max() < CLOSE
            assert orthonormal(tree[a]) < CLOSE
            sizes = torch.linalg.svdvals(product(state, (a, b)))[: toy.RANK] / scale
            assert (tree[b].T @ tree[b] - sizes.square().diag()).abs().max() < CLOSE


def test_in_its_first_round_fedsvd_is_ffa_lora_and_then_its_a_moves() -> None:
    members = toy.clients([FULL] * 4)
    turned, fixed = build("fedsvd"), build("ffa_lora")
    ours, theirs = turned.init(toy.start()), fixed.init(toy.start())
    for number, alike in ((1, True), (2, False)):
        ours, trained = one_round(turned, ours, members, number)
        theirs, _ = one_round(fixed, theirs, members, number)
        apart = max(float((product(ours, p) - product(theirs, p)).abs().max()) for p in PAIRS)
        assert (apart < CLOSE) is alike
        heads = torch.stack([tree[toy.HEAD] for tree, _ in trained]).mean(0)
        assert (ours.trees["adapter"][toy.HEAD] - heads).abs().max() < CLOSE


def test_where_b_is_zero_fedsvd_leaves_every_rank_a_row_to_learn_from() -> None:
    method = build("fedsvd")
    state = method.init(toy.start(zero_b=True))
    member, key = toy.clients([FULL])[0], Key(7, 1, "0000")
    view, memory = method.view(method.publish(state, member, key), {}, toy.context(member, key))
    report, _ = method.report(view, view.adapter.tensors, memory, toy.context(member, key))
    after = method.merge(state, iter([(member, report)]), Key(7, 1)).trees["adapter"]
    for a, b in PAIRS:
        assert not after[b].any()
        assert orthonormal(after[a]) < CLOSE


@pytest.mark.parametrize("server", [lambda: sgd(0.5, 0.9), adam, lambda: fading(adam(), 0.5)])
def test_what_the_server_keeps_of_b_begins_anew_after_each_turn(server: Any) -> None:
    """And what it keeps of the head, and of the rounds, goes on."""
    members = toy.clients([FULL] * 3)
    fresh = server().init(toy.start().tensors)
    _, _, progress = toy.after(build("fedsvd", server=server()), members, 2)
    trees = progress.state.trees
    for group, tree in fresh.items():
        assert trees[group].keys() == tree.keys()
        for _, b in PAIRS:
            if b in tree:
                assert torch.equal(trees[group][b], tree[b])
        assert any(not torch.equal(t, tree[n]) for n, t in trees[group].items())
