"""How many of n pass at a share: one rule, exact in whole numbers, wherever something is kept.

The oracle is integer arithmetic on the fraction that was meant: a share of p / q of n things is
-(-p n // q), whatever its floating-point number makes of p / q times n.
"""

from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fedsieve import methods
from fedsieve.algebra.adapter import Adapter, layout_of
from fedsieve.algebra.budget import Budget, Client
from fedsieve.algebra.counts import at_least_one_less, how_many, nearest
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import ClientContext, State
from fedsieve.algebra.payload import Payload, Values
from fedsieve.algebra.pruning import pruned
from fedsieve.algebra.support import Support, top_k
from fedsieve.clients.resources import HEAD, Work, message_bytes
from fedsieve.wire import decode, encode

# Shares of which a product in floating point, or its ceiling, is off by one.
FRACTIONS = [Fraction(p, q) for p, q in (
    (1, 10), (7, 100), (29, 100), (55, 100), (57, 100), (58, 100), (1, 3), (2, 3), (5, 7), (1, 49),
    (1, 64), (98, 100), (14, 100), (123457, 10**6), (1, 10**9),
)]  # fmt: skip


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.integers(1, 10**8))
@example(7, 100, 100)
@example(1, 10, 10)
@example(5, 7, 7)
@example(29, 100, 50)
def test_a_share_of_whole_numbers_is_exact(p: int, q: int, of: int) -> None:
    if p <= q:
        assert how_many(p / q, of) == max(1, -(-p * of // q))


@given(st.integers(1, 10**12), st.integers(1, 12), st.integers(1, 10**10))
def test_a_share_is_the_decimal_that_was_written(digits: int, places: int, of: int) -> None:
    if digits <= 10**places:
        assert how_many(float(f"{digits}e-{places}"), of) == max(1, -(-digits * of // 10**places))


def test_the_ends() -> None:
    assert how_many(1, 7) == how_many(1.0, 7) == 7
    assert how_many(0.1 * 3, 10) == 3  # 0.30000000000000004
    assert how_many(5e-324, 10**9) == 1
    assert how_many(0.5, 0) == 0
    assert [nearest(0.29, 50), nearest(0.07, 50), nearest(0.35, 90)] == [14, 4, 32]  # to even
    assert [at_least_one_less(0.85, k) for k in (1, 2, 6, 20)] == [1, 1, 5, 17]


A, B = "m.lora_A.weight", "m.lora_B.weight"


def adapter(size: int) -> Adapter:
    """`size` numbers in one pair of rank 1; none of them is zero, and no two are equal."""
    numbers = torch.randperm(size, generator=torch.Generator().manual_seed(size)) + 1.0
    tensors = {A: numbers[: size // 2].reshape(1, -1), B: numbers[size // 2 :].reshape(-1, 1)}
    return Adapter(layout_of(tensors, 1.0), tensors)


def size_for(share: Fraction) -> int:
    """A number of things of which the share is a whole number, where it can be small."""
    return share.denominator * 2 if share.denominator < 10**4 else 1000


def rounds(name: str, start: Adapter, client: Client, number: int, **options: Any) -> Any:
    """(download, upload, state after) of each round of one client that moves all that it may."""
    method = methods.load(name)(**options)
    state: State = method.init(start)
    found = []
    for n in range(1, number + 1):
        key = Key(0, n, client.id)
        payload = decode(encode(method.publish(method.plan(state, key), client, key)), start.layout)
        view, memory = method.view(payload, {}, ClientContext(client, start, key))
        moved = {
            n: t + 0.01 * t.sign() * view.moves.masks.get(n, 1)
            for n, t in view.adapter.tensors.items()
        }
        report, _ = method.report(view, moved, memory, ClientContext(client, start, key))
        update = decode(encode(report), start.layout, payload.support)
        state = method.merge(state, iter([(client, update)]), Key(0, n))
        found.append((payload, update, state))
    return found


def passed(payload: Payload) -> int:
    return payload.values.data.numel()


def live(state: State) -> int:
    return sum(int((t != 0).sum()) for t in state.trees["adapter"].values())


@pytest.mark.parametrize("share", FRACTIONS, ids=str)
def test_every_method_that_keeps_a_share_keeps_as_many(share: Fraction) -> None:
    size = size_for(share)
    start, density = adapter(size), float(share)
    expected = max(1, -(-share.numerator * size // share.denominator))
    masks = top_k(start.tensors, density, (A, B))
    assert sum(int(mask.sum()) for mask in masks.values()) == expected
    client = Client("0", 1, Budget(1.0, density, density))
    for name in ("flasc", "fslora_flasc"):
        ((down, up, _),) = rounds(name, start, client, 1)
        assert (passed(down), passed(up)) == (expected, expected)
    ((down, up, _),) = rounds("fed_select", start, client, 1, dense_rounds=0)
    assert (passed(down), passed(up)) == (expected, expected)
    evaluated = methods.load("flasc")(evaluated=density)
    kept = evaluated.export(evaluated.init(start)).tensors.values()
    assert sum(int((t != 0).sum()) for t in kept) == expected
    later = rounds("sparse_adapter", start, client, 3, density=density)
    assert [live(state) for _, _, state in later] == [expected] * 3
    assert [passed(down) for down, _, _ in later] == [size, expected, expected]
    (first,) = rounds("adapter_lth", start, client, 1, keep=density)
    assert live(first[2]) == expected


@pytest.mark.parametrize(("size", "keep"), [(40, (98, 100)), (1000, (97, 100)), (100, (7, 10))])
def test_iterative_pruning_follows_the_powers_of_its_share_to_the_end(
    size: int, keep: tuple[int, int]
) -> None:
    """After t rounds ceil(keep^t n) entries are left: no rounding adds up, and none stalls."""
    p, q = keep
    found = rounds("adapter_lth", adapter(size), Client("0", 1), 60, keep=p / q)
    counts = [live(state) for _, _, state in found]
    assert counts == [max(1, -(-(p**t) * size // q**t)) for t in range(1, 61)]
    assert [passed(down) for down, _, _ in found[1:]] == counts[:-1]


def test_live_entries_that_have_become_zero_are_not_confused_with_dead_ones() -> None:
    """Of zeros, the live ones are kept: the count is right, and what is dead stays dead."""
    start = adapter(20)
    zeros = {n: torch.zeros_like(t) for n, t in start.tensors.items()}
    live = {n: torch.full(t.shape, n == B) for n, t in zeros.items()}
    state = State(start.layout, {"adapter": zeros, "live": live})
    for share, left in ((0.5, 10), (0.25, 5), (0.25, 5), (0.12, 3)):
        state = pruned(state, share, "sieved")
        masks = state.trees["live"]
        assert int(masks[B].sum()) == left
        assert not masks[A].any()


def test_hetloras_pruning_does_not_stall_at_few_ranks() -> None:
    """0.85 of 6 ranks is 5.1: a ceiling alone would prune none, ever."""
    tensors = {A: torch.ones(6, 8), B: torch.ones(8, 6)}
    start = Adapter(layout_of(tensors, 1.0), tensors)
    method = methods.load("hetlora")(pruning=True)
    client, key = Client("0", 1), Key(0, 1, "0")
    payload = method.publish(method.init(start), client, key)
    context = ClientContext(client, start, key)
    view, memory = method.view(payload, {}, context)
    trained = {n: t.clone() for n, t in view.adapter.tensors.items()}
    trained[B][:, 5:] *= 0.5
    report, _ = method.report(view, trained, memory, context)
    assert report.support.ranks is not None
    assert report.support.ranks.shape[1] == 5


def test_modelled_messages_count_whole_entries() -> None:
    """A message of one entry of a few costs one entry: 4 bytes beside its mask."""
    few = Work(rank=1, per_rank=100, head=0, steps=1)
    assert message_bytes(few, "down", 1, 1e-6) >= HEAD + 4
    whole = message_bytes(few, "down", 1, 1.0)
    assert message_bytes(few, "down", 1, 0.999) == pytest.approx(whole, abs=1)  # all of 100
    for density in (1e-6, 0.07, 0.29, 0.5):
        tensors = adapter(100)
        masks = top_k(tensors.tensors, density, (A, B))
        support = Support((A, B), None, masks)
        count = sum(int(m.sum()) for m in masks.values())
        values = Values("float32", torch.ones(count), torch.empty(0))
        real = len(encode(Payload(tensors.layout, support, values, "known", "sent")))
        assert message_bytes(few, "down", 1, density) == pytest.approx(real, abs=16)
