"""Each baseline's own rule, written out by hand on the toy federation."""

from typing import Any

import pytest
import torch

from fedsieve import methods
from fedsieve.algebra.adapter import Tree, base_layout
from fedsieve.algebra.budget import Budget, Client
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import ClientContext, Memory, Method, State, View
from fedsieve.algebra.optim import adam
from fedsieve.algebra.payload import Payload
from fedsieve.algebra.support import norm
from fedsieve.engine.loop import begin, rounds
from fedsieve.errors import WireError
from tests import toy

EXACT = {"down_values": "float64", "up_values": "float64"}


def build(name: str, **options: Any) -> Method:
    return methods.load(name)(**EXACT, **options)


def part(
    method: Method, state: State, client: Client, number: int, memory: Memory | None = None
) -> tuple[Payload, View, Tree, Payload, Memory]:
    """One client's round: what it got, its view, what it trained, what it returned, its memory."""
    context = ClientContext(client, toy.start(), Key(7, number, client.id))
    sent = method.publish(method.plan(state, Key(7, number)), client, context.key)
    view, memory = method.view(sent, memory or {}, context)
    trained = toy.train(view, client, context.key).tensors
    report, memory = method.report(view, trained, memory, context)
    return sent, view, trained, report, memory


def states(method: Method, members: list[Client], number: int, **given: Any) -> list[State]:
    """The server's state before the first round and after each."""
    setup = toy.federation(method, members, **given)
    _, progress = begin(setup, toy.start())
    return [progress.state, *(now.state for _, _, now in rounds(setup, progress, number))]


def live(state: State) -> dict[str, torch.Tensor]:
    return {n: t != 0 for n, t in state.trees["adapter"].items()}


# --- masks


@pytest.mark.parametrize("server", [None, adam(0.05)])
def test_sparse_adapter_fixes_its_mask_after_one_dense_round(server: Any) -> None:
    method = build("sparse_adapter", density=0.25, server=server)
    first, *later = states(method, toy.clients([Budget()] * 3), 4)
    assert all(bool(mask.all()) for mask in live(first).values())
    masks = live(later[0])
    kept = sum(int(mask.sum()) for mask in masks.values())
    assert kept == -(-toy.start().layout.size // 4)
    for state in later[1:]:
        assert all(torch.equal(mask, masks[n]) for n, mask in live(state).items())
        assert toy.distance(state.trees["adapter"], later[0].trees["adapter"]) > 0


def test_a_pruned_entry_is_not_sent_not_trained_and_not_returned() -> None:
    method = build("sparse_adapter", density=0.25)
    state = states(method, toy.clients([Budget()] * 3), 1)[-1]
    sent, view, trained, report, _ = part(method, state, Client("0001", 6), 2)
    kept = -(-toy.start().layout.size // 4)
    assert sent.values.data.numel() == report.values.data.numel() == kept
    assert (sent.masks_told, report.masks_told) == ("sent", "known")
    for name, tensor in trained.items():
        assert bool((tensor[~live(state)[name]] == 0).all())
        assert torch.equal(view.moves.masks[name], live(state)[name])


def test_lth_keeps_a_share_of_what_is_left_after_every_round() -> None:
    method = build("adapter_lth", keep=0.9, server=adam(0.05))
    size = toy.start().layout.size
    before = None
    for number, state in enumerate(states(method, toy.clients([Budget()] * 3), 5)):
        masks = live(state)
        count = sum(int(mask.sum()) for mask in masks.values())
        assert abs(count - size * 0.9**number) <= number
        if before is not None:  # what is dead stays dead
            assert all(not (mask & ~before[n]).any() for n, mask in masks.items())
        before = masks


def test_federated_select_trains_and_returns_what_it_sent() -> None:
    method = build("fed_select")
    client = Client("0002", 6, Budget(1, 0.25, 1))
    state = method.init(toy.start())
    dense, _, _, _, _ = part(method, state, client, 1)
    assert not dense.support.masks  # the first round is dense
    sent, view, trained, report, _ = part(method, state, client, 2)
    assert report.masks_told == "known"
    assert report.support.masks == sent.support.masks
    for name, mask in sent.support.masks.items():
        assert bool((trained[name][~mask] == 0).all())
        # All but the rows of A whose column of B did not come: their gradient is zero.
        moved = trained[name][mask] != view.adapter.tensors[name][mask]
        assert moved.double().mean() > 0.5


def test_federated_select_by_rank_takes_the_ranks_of_largest_norm() -> None:
    method = build("fed_select", kind="ranks")
    state = method.init(toy.start())
    sent, view, _, _, _ = part(method, state, Client("0002", 6, Budget(0.375)), 1)
    tree = toy.start().tensors
    assert sent.support.ranks is not None
    for row, (a, b) in zip(
        sent.support.ranks.tolist(), ((toy.A1, toy.B1), (toy.A2, toy.B2)), strict=True
    ):
        sizes = [norm({"a": tree[a][j], "b": tree[b][:, j]}) for j in range(toy.RANK)]
        assert row == sorted(sorted(range(toy.RANK), key=lambda j: -sizes[j])[:3])
    assert view.adapter.layout.scale == toy.start().layout.scale


def test_flasc_densities_decay_down_to_the_least() -> None:
    method = build("flasc", decay=0.5, least=0.1)
    state = method.init(toy.start())
    size = toy.start().layout.size
    client = Client("0000", 6, Budget(1, 0.8, 0.4))
    for number, down, up in ((1, 0.8, 0.4), (2, 0.4, 0.2), (3, 0.2, 0.1), (4, 0.1, 0.1)):
        sent, _, _, report, _ = part(method, state, client, number)
        assert abs(sent.values.data.numel() - down * size) <= 1
        assert abs(report.values.data.numel() - up * size) <= 1


def test_flasc_can_be_evaluated_as_a_client_would_get_it() -> None:
    masked = build("flasc", evaluated=0.25)
    state = masked.init(toy.start())
    sent, *_ = part(masked, state, Client("0000", 6, Budget(1, 0.25, 1)), 1)
    assert toy.distance(masked.export(state).tensors, sent.tree()) == 0
    whole = build("flasc")
    assert toy.distance(whole.export(state).tensors, toy.start().tensors) == 0


# --- factors


@pytest.mark.parametrize(
    ("name", "number", "down", "up"),
    [
        ("ffa_lora", 1, "B", "B"),
        ("ffa_lora", 2, "B", "B"),
        ("rolora", 1, "AB", "B"),
        ("rolora", 2, "AB", "A"),
        ("fedsa_lora", 1, "A", "A"),
    ],
)
def test_which_factors_travel(name: str, number: int, down: str, up: str) -> None:
    method = build(name)
    state = method.init(toy.start())
    sent, view, trained, report, _ = part(method, state, Client("0001", 6), number)

    def factors(names: tuple[str, ...]) -> str:
        assert toy.HEAD in names
        return "".join(f for f in "AB" if any(f"lora_{f}" in n for n in names))

    assert factors(sent.support.names) == down
    assert factors(report.support.names) == up
    moved = tuple(n for n, t in trained.items() if not torch.equal(t, view.adapter.tensors[n]))
    assert factors(moved) == ("AB" if name == "fedsa_lora" else up)


def test_momentum_does_not_move_the_factor_whose_turn_it_is_not() -> None:
    for state, after in zip(
        (found := states(build("rolora", server=adam(0.05)), toy.clients([Budget()] * 3), 4))[:-1],
        found[1:],
        strict=True,
    ):
        moved = {
            n
            for n, t in after.trees["adapter"].items()
            if not torch.equal(t, state.trees["adapter"][n])
        }
        assert moved in ({toy.A1, toy.A2, toy.HEAD}, {toy.B1, toy.B2, toy.HEAD})


def test_fedsa_leaves_each_client_its_own_b() -> None:
    method = build("fedsa_lora")
    memories: dict[str, Memory] = {}
    members = toy.clients([Budget()] * 3)
    state = states(method, members, 2, memories=memories)[-1]
    shared = method.export(state)
    assert torch.equal(shared.tensors[toy.B1], toy.start().tensors[toy.B1])
    assert method.personal is not None
    models = [method.personal(shared, memories[c.id]).tensors for c in members]
    assert all(torch.equal(m[toy.A1], shared.tensors[toy.A1]) for m in models)
    assert not torch.equal(models[0][toy.B1], models[1][toy.B1])
    # The next round starts from it.
    _, view, _, _, _ = part(method, state, members[0], 3, memories[members[0].id])
    assert torch.equal(view.adapter.tensors[toy.B1], models[0][toy.B1])


# --- HetLoRA


def test_hetlora_pads_with_zeros_and_weighs_by_the_norm_of_the_product() -> None:
    method = build("hetlora")
    state = method.init(toy.start())
    members = toy.clients([Budget(0.25), Budget(0.5), Budget(1.0)])
    updates, padded, weights = [], [], []
    for client in members:
        _, _, trained, report, _ = part(method, state, client, 1)
        updates.append((client, report))
        full = {n: torch.zeros(s, dtype=torch.float64) for n, s in state.layout.shapes.items()}
        for name, tensor in trained.items():
            full[name][tuple(slice(0, side) for side in tensor.shape)] = tensor
        padded.append(full)
        products = [full[toy.B1] @ full[toy.A1], full[toy.B2] @ full[toy.A2]]
        weights.append(torch.cat([p.flatten() for p in products]).norm())
    merged = method.merge(state, iter(updates), Key(7, 1)).trees["adapter"]
    share = [w / sum(weights) for w in weights]
    expected = {
        n: sum(s * p[n] for s, p in zip(share, padded, strict=True)) for n in state.layout.names
    }
    assert toy.distance(merged, expected) <= 1e-12


def test_a_client_whose_last_ranks_shrink_drops_them_and_gets_fewer() -> None:
    members = toy.clients([Budget(), Budget(0.5)])
    pruning = build("hetlora", pruning=True, gamma=0.5, penalty=0.5)
    found = states(pruning, members, 3)
    ranks = [{n: int(t) for n, t in s.trees.get("ranks", {}).items()} for s in found]
    # 8 -> 4 -> 2 -> 1 and 4 -> 2 -> 1: half of the ranks go in each round.
    assert ranks[1:] == [{"0000": 4, "0001": 2}, {"0000": 2, "0001": 1}, {"0000": 1, "0001": 1}]
    sent, *_ = part(pruning, found[1], members[0], 2)
    assert sent.support.ranks is not None
    assert sent.support.ranks[0].tolist() == [0, 1, 2, 3]


# --- changes of the base


@pytest.mark.parametrize("name", ["flora", "florist", "fedex_lora"])
def test_only_clients_that_were_away_pay_for_catching_up(name: str) -> None:
    method = build(name)
    members = toy.clients([Budget()] * 2)
    found = states(method, members, 2)
    newcomer = Client("0009", 6)
    for number, state in ((1, found[0]), (2, found[1]), (3, found[2])):
        sent, *_ = part(method, state, newcomer, number)
        assert (sent.base is None) == (number == 1)
    last = method.publish(method.plan(found[2], Key(7, 3)), members[0], Key(7, 3, "0000"))
    assert last.base is not None
    assert last.base.since in (0, 1)  # the fold of round 2, or all of it where that is shorter


def test_a_long_absence_costs_no_more_than_the_whole_change() -> None:
    method = build("flora")
    state = states(method, toy.clients([Budget()] * 4), 3)[-1]
    sent, *_ = part(method, state, Client("0009", 6), 4)
    assert sent.base is not None
    assert sent.base.since == 0
    whole = base_layout(state.layout, 0)
    assert sent.base.change.layout.fingerprint == whole.fingerprint
    # Folds that are never sent again are not kept.
    assert sum(group.startswith("fold") for group in state.trees) == 0


def test_a_change_that_counts_from_elsewhere_is_refused() -> None:
    method = build("flora")
    members = toy.clients([Budget(0.125)])
    found = states(method, members, 2)
    sent = method.publish(method.plan(found[2], Key(7, 3)), members[0], Key(7, 3, "0000"))
    assert sent.base is not None
    assert sent.base.since == 1
    with pytest.raises(WireError, match="since round 1 came, and this client is at round 0: "):
        method.view(sent, {}, toy.context(members[0], Key(7, 3, "0000")))
