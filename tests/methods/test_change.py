"""Downloads that rank the change since the start, against plain numpy and the docs' own reader."""

from typing import Any

import numpy as np
import pytest
import torch

from fedsieve import methods
from fedsieve.algebra.adapter import Adapter, Tree
from fedsieve.algebra.budget import Budget, Client
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import Method, State
from fedsieve.algebra.optim import adam, sgd
from fedsieve.clients.noise import private
from fedsieve.errors import FedSieveError
from fedsieve.methods import fed_select, flasc
from fedsieve.wire import decode, encode
from tests import toy
from tests.wire import reader
from tests.wire.test_reader import spec_of

EXACT = {"down_values": "float64", "up_values": "float64"}
BUDGETS = (Budget(0.5, 0.25, 0.125), Budget(0.25, 0.1, 0.5), Budget(1.0, 0.5, 0.25), Budget())
CASES: list[tuple[str, dict[str, Any]]] = [
    ("flasc", {}),
    ("flasc", {"head": "whole"}),
    ("flasc", {"decay": 0.9, "least": 0.05, "weights": "all"}),
    ("fslora_flasc", {}),
    ("fslora_flasc", {"shared": False, "head": "whole"}),
    ("fed_select", {}),
    ("fed_select", {"head": "whole", "dense_rounds": 2}),
]


def build(name: str, options: dict[str, Any], **more: Any) -> Method:
    return methods.load(name)(**{**EXACT, "ranked": "change", **options, **more})


def used(method: Method, budget: Budget) -> Budget:
    return Budget(**{k: v for k, v in budget._asdict().items() if k in method.knobs})


def after(method: Method, number: int) -> State:
    members = toy.clients([used(method, budget) for budget in BUDGETS])
    return toy.after(method, members, number, zero_b=True)[2].state


def held(client_view: Any) -> dict[str, np.ndarray]:
    return {n: t.numpy() for n, t in client_view.adapter.tensors.items()}


def slices(name: str, array: np.ndarray, ranks: list[list[int]] | None) -> np.ndarray:
    """What a client with these ranks of each pair has of a whole tensor."""
    for number, pair in enumerate(toy.start().layout.pairs):
        if ranks is not None and name == pair.a:
            return array[ranks[number]]
        if ranks is not None and name == pair.b:
            return array[:, ranks[number]]
    return array


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_a_client_holds_the_start_plus_what_came_and_what_came_is_the_largest_change(
    name: str, options: dict[str, Any]
) -> None:
    """The message is read by the reader of docs/wire.md, and the sum is numpy's."""
    method = build(name, options, server=adam(0.05))
    start = toy.start(zero_b=True)
    layout = start.layout
    for rounds in (0, 1, 4):
        state = after(method, rounds)
        change = {n: (t - start.tensors[n]).numpy() for n, t in state.trees["adapter"].items()}
        key = Key(7, rounds + 1)
        plan = method.plan(state, key)
        for client in toy.clients([used(method, budget) for budget in BUDGETS]):
            own = key._replace(client=client.id)
            data = encode(method.publish(plan, client, own))
            told = reader.read(data, spec_of(layout))
            context = toy.context(client, own)._replace(start=start)
            view, _ = method.view(decode(data, layout), {}, context)
            values, kept, lost = iter(told.values), [], [0.0]
            for tensor in told.names:
                mine = slices(tensor, change[tensor], told.ranks)
                mask = np.ones(mine.size, bool)
                if tensor in told.masks:
                    mask = np.array(told.masks[tensor], bool)
                came = np.zeros(mine.size)
                came[mask] = [next(values) for _ in range(mask.sum())]
                begun = slices(tensor, start.tensors[tensor].numpy(), told.ranks)
                expected = begun + came.reshape(mine.shape)
                assert np.array_equal(held(view)[tensor], expected)
                if tensor in told.masks and (tensor != toy.HEAD or "head" not in options):
                    size = np.abs(mine).reshape(-1)
                    kept += size[mask].tolist()
                    lost += size[~mask].tolist()
            assert next(values, None) is None
            assert sorted(told.names) == sorted(view.adapter.tensors)
            if not kept:
                assert rounds == 0 or not told.masks  # nothing has changed, or all travels
                continue
            density = client.budget.down * options.get("decay", 1.0) ** rounds
            assert min(kept) >= max(lost)
            assert min(kept) > 0  # what stands at its start does not travel
            assert len(kept) - 1 < density * (len(kept) + len(lost) - 1)


def test_three_rounds_written_out_by_hand() -> None:
    """FLASC on one flat vector, the change ranked, with torch.optim.Adam."""
    down, up, lr = 0.25, 0.125, 0.05
    start = toy.start(zero_b=True)
    names = start.layout.names
    sizes = [start.tensors[n].numel() for n in names]
    begun = torch.cat([start.tensors[n].flatten() for n in names])

    def tree(flat: torch.Tensor) -> Tree:
        parts = zip(names, flat.split(sizes), strict=True)
        return {n: p.reshape(start.tensors[n].shape) for n, p in parts}

    def largest(numbers: torch.Tensor, count: int) -> torch.Tensor:
        kept = torch.zeros_like(numbers)
        index = numbers.abs().argsort(descending=True)[:count]
        kept[index] = numbers[index]
        return kept

    flat = begun.clone().requires_grad_(True)
    server = torch.optim.Adam([flat], lr=lr)
    for _ in range(3):
        client_start = begun + largest(flat.detach() - begun, -(-flat.numel() // 4))
        gradient = torch.zeros_like(begun)
        for client in ("0000", "0001", "0002"):
            view = toy.whole(Adapter(start.layout, tree(client_start)))
            trained = toy.train(view, Client(client, 6), Key(0)).tensors
            change = client_start - torch.cat([trained[n].flatten() for n in names])
            gradient += largest(change, -(-flat.numel() // 8)) / 3
        flat.grad = gradient
        server.step()
    method = build("flasc", {}, server=adam(lr))
    ours, _, _ = toy.after(method, toy.clients([Budget(1, down, up)] * 3), 3, zero_b=True)
    together = torch.cat([ours[n].flatten() for n in names])
    assert (together - flat.detach()).abs().max() <= 1e-12


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_the_evaluated_model_is_what_a_client_of_that_density_holds(
    name: str, options: dict[str, Any]
) -> None:
    method = build(name, options, server=adam(0.05), evaluated=0.25)
    state = after(method, 4)
    start = toy.start(zero_b=True)
    client = Client("0000", 6, Budget(1.0, 0.25 / options.get("decay", 1.0) ** 4, 1.0))
    key = Key(7, 5, client.id)
    payload = method.publish(method.plan(state, key), client, key)
    context = toy.context(client, key)._replace(start=start)
    view, _ = method.view(payload, {}, context)
    evaluated = method.export(state).tensors
    assert toy.distance(view.adapter.tensors, evaluated) <= 1e-15
    assert toy.distance(evaluated, state.trees["adapter"]) > 1e-3  # something is masked
    assert toy.distance(evaluated, start.tensors) > 1e-3  # and something is not
    whole = build(name, options, server=adam(0.05)).export(state).tensors
    assert all(torch.equal(t, state.trees["adapter"][n]) for n, t in whole.items())


@pytest.mark.parametrize("ranked", ["values", "change"])
def test_what_b_has_learned_reaches_a_client(ranked: Any) -> None:
    """The reason for the option: with a small rate B stays below A's random start for long."""
    method = flasc.method(server=adam(1e-3), ranked=ranked, **EXACT)  # type: ignore[arg-type]
    state = toy.after(method, toy.clients([Budget(1, 0.25, 0.25)] * 3), 5, zero_b=True)[2].state
    key = Key(7, 6, "0000")
    payload = method.publish(method.plan(state, key), Client("0000", 6, Budget(1, 0.25)), key)
    came = sum(int(payload.support.masks[n].sum()) for n in (toy.B1, toy.B2))
    assert (came > 0) == (ranked == "change")


def test_nothing_travels_before_anything_has_changed() -> None:
    method = build("flasc", {})
    client, key = Client("0000", 6, Budget(1, 0.25, 1.0)), Key(7, 1, "0000")
    state = method.init(toy.start())
    payload = method.publish(method.plan(state, key), client, key)
    assert payload.values.data.numel() == 0
    assert len(encode(payload)) < 100
    view, _ = method.view(decode(encode(payload), state.layout), {}, toy.context(client, key))
    assert toy.distance(view.adapter.tensors, toy.start().tensors) == 0


def test_federated_select_needs_a_change_to_rank() -> None:
    for options in ({"kind": "ranks"}, {"dense_rounds": 0}):
        with pytest.raises(FedSieveError, match="'change' needs kind = 'entries' and dense_rounds"):
            fed_select.method(ranked="change", **options)


@pytest.mark.parametrize("name", ["flasc", "fslora_flasc", "fed_select"])
def test_the_noise_of_a_private_run_is_the_same_and_the_start_gets_none(name: str) -> None:
    """Updates that are clipped to nothing leave noise alone: the ranking has no say in it."""
    begun = toy.start(zero_b=True).tensors
    results = []
    for ranked in ("values", "change"):
        server = private(adam(0.01), clip=1e-9, noise_multiplier=1e7, expected=4, key=Key(5))
        method = build(name, {}, ranked=ranked, server=server)
        assert method.linear
        results.append(after(method, 3))
    values, change = (state.trees for state in results)
    assert toy.distance(values["adapter"], change["adapter"]) <= 1e-6
    assert toy.distance(values["adapter"], begun) > 1e-3
    assert all(torch.equal(change["start"][n], t) for n, t in begun.items())


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_one_client_moves_a_private_state_by_no_more_than_its_clip(
    name: str, options: dict[str, Any]
) -> None:
    """One round from the same state with and without a client, no noise: C / n at most."""
    clip, count = 0.01, len(BUDGETS)
    server = private(sgd(), clip=clip, noise_multiplier=0, expected=count, key=Key(5))
    method = build(name, options, server=server)
    state = after(method, 3)
    key = Key(7, 4)
    plan = method.plan(state, key)
    updates = []
    for client in toy.clients([used(method, budget) for budget in BUDGETS]):
        own = key._replace(client=client.id)
        payload = method.publish(plan, client, own)
        context = toy.context(client, own)._replace(start=toy.start(zero_b=True))
        view, memory = method.view(payload, {}, context)
        report, _ = method.report(view, toy.train(view, client, own).tensors, memory, context)
        updates.append((client, report))
    with_all = method.merge(state, iter(updates), key).trees["adapter"]
    for left_out in range(count):
        others = [u for i, u in enumerate(updates) if i != left_out]
        without = method.merge(state, iter(others), key).trees["adapter"]
        moved = np.concatenate([(with_all[n] - without[n]).numpy().ravel() for n in with_all])
        assert 0 < np.linalg.norm(moved) <= clip / count * (1 + 1e-9)
