"""Algebra on thin factors, against the dense product and torch's SVD of it.

The oracle forms B A, which the code must never do: the last tests watch every tensor it makes.
"""

import json
import runpy
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fedsieve.algebra.lowrank import (
    RunningSum,
    add,
    best_of_rank,
    product_norm,
    rank_that_keeps,
    stacked,
    turned,
)

CLOSE = 1e-10
SHAPES = ((12, 9, 4), (9, 12, 4), (7, 7, 7), (6, 20, 11), (20, 6, 11), (5, 8, 30), (1, 5, 1))


def factors(m: int, n: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random B (m, k) and A (k, n), float64, with ranks of different weight."""
    draws = torch.Generator().manual_seed(seed)
    b = torch.randn(m, k, generator=draws, dtype=torch.float64)
    a = torch.randn(k, n, generator=draws, dtype=torch.float64)
    return b * torch.linspace(3, 0.2, k, dtype=torch.float64), a


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm())


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_the_norm_is_that_of_the_dense_product(m: int, n: int, k: int) -> None:
    b, a = factors(m, n, k)
    assert product_norm(b, a) == pytest.approx(float(torch.linalg.matrix_norm(b @ a)), rel=CLOSE)


def test_the_norm_of_nothing_and_of_what_cancels() -> None:
    b, a = factors(9, 8, 3)
    assert product_norm(torch.zeros(9, 3), torch.ones(3, 8)) == 0
    gone = product_norm(torch.cat((b, b), 1), torch.cat((a, -a), 0))
    assert 0 <= gone < 1e-6 * product_norm(b, a)


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_best_of_rank_is_the_truncated_svd(m: int, n: int, k: int, rank: int) -> None:
    b, a = factors(m, n, k)
    u, sizes, v = torch.linalg.svd(b @ a, full_matrices=False)
    truncated = (u[:, :rank] * sizes[:rank]) @ v[:rank]
    best_b, best_a = best_of_rank(b, a, rank)
    assert best_b.shape == (m, rank)
    assert best_a.shape == (rank, n)
    assert distance(best_b @ best_a, truncated) < CLOSE
    # Balanced and in order: both Gram matrices are the singular values, falling, zeros at the end.
    expected = torch.zeros(rank, dtype=torch.float64)
    there = min(rank, k, m, n)
    expected[:there] = sizes[:there]
    assert distance(best_b.T @ best_b, expected.diag()) < CLOSE
    assert distance(best_a @ best_a.T, expected.diag()) < CLOSE
    assert not best_b[:, there:].any()
    assert not best_a[there:].any()


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_turned_factors_have_the_product_and_orthonormal_rows(m: int, n: int, k: int) -> None:
    b, a = factors(m, n, k)
    turned_b, turned_a = turned(b, a)
    assert (turned_b.shape, turned_a.shape) == (b.shape, a.shape)
    assert distance(turned_b @ turned_a, b @ a) < CLOSE
    there = min(k, n)
    assert distance(turned_a[:there] @ turned_a[:there].T, torch.eye(there).double()) < CLOSE
    sizes = torch.zeros(k, dtype=torch.float64)
    sizes[: min(m, n, k)] = torch.linalg.svdvals(b @ a)[: min(m, n, k)]
    assert distance(turned_b.T @ turned_b, sizes.square().diag()) < 1e-8


def test_a_rank_that_the_product_does_not_need_keeps_a_row_of_what_a_spans() -> None:
    b, a = factors(12, 9, 4)
    for thin in (torch.zeros(12, 4), b * torch.tensor([1.0, 0.0, 0.0, 1.0])):
        turned_b, turned_a = turned(thin.double(), a)
        assert distance(turned_b @ turned_a, thin.double() @ a) < CLOSE
        assert distance(turned_a @ turned_a.T, torch.eye(4).double()) < CLOSE
        within = turned_a @ torch.linalg.pinv(a) @ a
        assert distance(within, turned_a) < CLOSE
    nothing = turned(torch.zeros(12, 4), torch.zeros(4, 9))
    assert not nothing[0].any()
    assert distance(nothing[1] @ nothing[1].T, torch.eye(4)) < 1e-6


def test_a_convolutions_factors_are_turned_in_place() -> None:
    b, a = factors(6, 24, 3)
    turned_b, turned_a = turned(b[:, :, None, None], a.reshape(3, 4, 3, 2))
    flat_b, flat_a = turned(b, a)
    assert turned_b.shape == (6, 3, 1, 1)
    assert torch.equal(turned_b.flatten(1), flat_b)
    assert torch.equal(turned_a.flatten(1), flat_a)


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999, 1.0])
def test_the_rank_that_keeps_a_share_is_the_smallest(m: int, n: int, k: int, share: float) -> None:
    b, a = factors(m, n, k)
    whole = float((b @ a).norm() ** 2)

    def kept(rank: int) -> float:
        best_b, best_a = best_of_rank(b, a, rank)
        return float((best_b @ best_a).norm() ** 2) / whole

    rank = rank_that_keeps(share, b, a)
    assert 1 <= rank <= min(m, n, k)
    assert kept(rank) >= share - CLOSE
    assert kept(rank - 1) < share


def test_the_rank_that_keeps_all_of_nothing_is_none_and_of_little_that_of_the_product() -> None:
    b, a = factors(9, 8, 3)
    assert rank_that_keeps(1.0, torch.zeros(9, 3), torch.ones(3, 8)) == 0
    assert rank_that_keeps(1.0, torch.cat((b, b), 1), torch.cat((a, a), 0)) == 3


def test_no_other_matrix_of_the_rank_is_nearer() -> None:
    """Eckart-Young: not after any of many small or large moves of the factors."""
    b, a = factors(10, 8, 6)
    dense = b @ a
    best_b, best_a = best_of_rank(b, a, 3)
    least = distance(best_b @ best_a, dense)
    assert least > 0.1
    draws = torch.Generator().manual_seed(1)
    for size in (1e-3, 1e-2, 1e-1, 1.0):
        for _ in range(50):
            near_b = best_b + size * torch.randn(10, 3, generator=draws, dtype=torch.float64)
            near_a = best_a + size * torch.randn(3, 8, generator=draws, dtype=torch.float64)
            assert distance(near_b @ near_a, dense) > least
            fitted = near_b @ torch.linalg.lstsq(near_b, dense).solution
            assert distance(fitted, dense) >= least - CLOSE


def test_a_product_of_low_rank_comes_back_whole_and_the_rest_is_zero() -> None:
    b, a = factors(12, 9, 2)
    mixed = torch.randn(2, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    wide_b, wide_a = b @ mixed, torch.linalg.pinv(mixed) @ a  # K = 7, but of rank 2
    best_b, best_a = best_of_rank(wide_b, wide_a, 5)
    assert distance(best_b @ best_a, b @ a) < CLOSE
    assert not best_b[:, 2:].any()  # exactly: no rounding noise with directions of its own
    assert not best_a[2:].any()
    zero_b, zero_a = best_of_rank(torch.cat((b, b), 1), torch.cat((a, -a), 0), 3)
    assert not zero_b.any()
    assert not zero_a.any()


def test_small_singular_values_survive_factors_of_unequal_size() -> None:
    """Columns that are huge in B and tiny in A are no reason to call a small product noise."""
    b, a = factors(12, 9, 3)
    b, _ = torch.linalg.qr(b)
    a = torch.linalg.qr(a.T)[0].T
    sizes = torch.tensor([1.0, 1e-3, 1e-6], dtype=torch.float64)
    skew = torch.tensor([1e7, 1.0, 1e-7], dtype=torch.float64)
    best_b, best_a = best_of_rank(b * sizes * skew, a / skew[:, None], 3)
    assert torch.allclose(best_b.norm(dim=0) * best_a.norm(dim=1), sizes, rtol=1e-6)


def test_the_sign_of_each_rank_does_not_depend_on_that_of_the_factors() -> None:
    b, a = factors(12, 9, 4)
    first_b, first_a = best_of_rank(b, a, 4)
    flips = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
    order = torch.tensor([2, 0, 3, 1])
    for other_b, other_a in (
        (-b, -a),
        (b * flips, a * flips[:, None]),
        (b[:, order], a[order]),
        (b / 7, a * 7),
    ):
        again_b, again_a = best_of_rank(other_b, other_a, 4)
        assert distance(again_b, first_b) < CLOSE
        assert distance(again_a, first_a) < CLOSE
    assert (first_b.gather(0, first_b.abs().argmax(dim=0, keepdim=True)) > 0).all()


def test_equal_input_gives_equal_bits() -> None:
    b, a = factors(40, 30, 20)
    one, other = best_of_rank(b, a, 5), best_of_rank(b.clone(), a.clone(), 5)
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])


def test_float32_stays_float32_and_is_right_to_its_rounding() -> None:
    b, a = factors(30, 20, 8)
    low_b, low_a = best_of_rank(b.float(), a.float(), 3)
    assert low_b.dtype == low_a.dtype == torch.float32
    best_b, best_a = best_of_rank(b.float().double(), a.float().double(), 3)
    product = best_b @ best_a
    assert distance(low_b.double() @ low_a.double(), product) < 1e-6 * float(product.norm())


def test_stacked_factors_are_the_weighted_sum() -> None:
    parts = [(0.5, *factors(9, 7, 2, 1)), (-2.0, *factors(9, 7, 5, 2)), (0.0, *factors(9, 7, 1, 3))]
    b, a = stacked(iter(parts))
    assert b.shape == (9, 8)
    assert distance(b @ a, sum(w * (p @ q) for w, p, q in parts)) < CLOSE  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no products"):
        stacked([])


@pytest.mark.parametrize(("m", "n", "k"), [(6, 4, 3), (3, 2, 9)])
def test_convolutions_keep_their_axes(m: int, n: int, k: int) -> None:
    draws = torch.Generator().manual_seed(0)
    b = torch.randn(m, k, 1, 1, generator=draws, dtype=torch.float64)
    a = torch.randn(k, n, 3, 2, generator=draws, dtype=torch.float64)
    dense = torch.einsum("mkxy,knij->mnij", b, a)  # the kernel that the two convolutions make
    assert product_norm(b, a) == pytest.approx(float(dense.norm()), rel=CLOSE)
    best_b, best_a = best_of_rank(b, a, 5)
    assert best_b.shape == (m, 5, 1, 1)
    assert best_a.shape == (5, n, 3, 2)
    u, sizes, v = torch.linalg.svd(dense.reshape(m, -1), full_matrices=False)
    truncated = ((u[:, :5] * sizes[:5]) @ v[:5]).reshape(dense.shape)
    assert distance(torch.einsum("mkxy,knij->mnij", best_b, best_a), truncated) < CLOSE
    wide_b, wide_a = stacked([(1.0, b, a), (2.0, b, a)])
    assert distance(torch.einsum("mkxy,knij->mnij", wide_b, wide_a), 3 * dense) < CLOSE


def test_axes_beyond_the_rank_of_b_come_back_in_place() -> None:
    b, a = factors(24, 9, 4)
    best_b, best_a = best_of_rank(b.reshape(4, 3, 2, 4).movedim(-1, 1), a, 2)
    flat_b, flat_a = best_of_rank(b, a, 2)
    assert torch.equal(best_b.movedim(1, -1).reshape(24, 2), flat_b)
    assert torch.equal(best_a, flat_a)


def test_factors_that_do_not_fit_are_refused() -> None:
    for b, a in ((torch.ones(5, 2), torch.ones(3, 4)), (torch.ones(5), torch.ones(1, 4))):
        for work in (product_norm, lambda b, a: best_of_rank(b, a, 1)):
            with pytest.raises(ValueError, match="do not multiply"):
                work(b, a)
    with pytest.raises(ValueError, match="0 or more"):
        best_of_rank(torch.ones(5, 2), torch.ones(2, 4), -1)


def test_no_ranks_at_all() -> None:
    best_b, best_a = best_of_rank(torch.zeros(5, 0), torch.zeros(0, 7), 2)
    assert torch.equal(best_b, torch.zeros(5, 2))
    assert torch.equal(best_a, torch.zeros(2, 7))
    assert best_of_rank(torch.ones(5, 3), torch.ones(3, 7), 0)[0].shape == (5, 0)


def running(clients: list[tuple[float, Tensor, Tensor]], most: int) -> RunningSum:
    total: RunningSum | None = None
    for weight, b, a in clients:
        total = add(total, weight, b, a, most)
        assert total.b.shape[1] == total.a.shape[0] <= most
    assert total is not None
    return total


def test_a_running_sum_is_exact_while_it_fits() -> None:
    clients = [(0.1 * i, *factors(30, 20, 3, i)) for i in range(1, 5)]
    b, a = stacked(clients)
    for most in (12, 20):
        total = running(clients, most)
        assert total.lost == 0
        assert distance(total.b @ total.a, b @ a) < CLOSE


def test_a_running_sum_of_low_rank_is_exact_however_many_clients_there_are() -> None:
    """All clients move within the same four columns, so no compression drops anything."""
    shared, _ = factors(30, 20, 4, 0)
    draws = torch.Generator().manual_seed(9)
    clients = []
    for _ in range(20):
        mix = torch.randn(4, 3, generator=draws, dtype=torch.float64)
        clients.append(
            (0.05, shared @ mix, torch.randn(3, 20, generator=draws, dtype=torch.float64))
        )
    b, a = stacked(clients)
    total = running(clients, 4)
    assert total.lost < CLOSE
    assert distance(total.b @ total.a, b @ a) < CLOSE


@pytest.mark.parametrize("most", [3, 5, 9])
def test_what_a_running_sum_loses_is_within_its_bound(most: int) -> None:
    clients = [(0.2 + 0.1 * i, *factors(30, 20, 3, i)) for i in range(6)]
    b, a = stacked(clients)
    total = running(clients, most)
    error = distance(total.b @ total.a, b @ a)
    tail = torch.linalg.svdvals(b @ a)[most:].norm()
    assert tail - CLOSE <= error <= total.lost + CLOSE  # no rank-`most` sum does better


def test_one_step_of_a_running_sum_drops_the_tail_and_no_more() -> None:
    b, a = factors(30, 20, 8)
    total = add(None, -2.0, b, a, 3)
    sizes = torch.linalg.svdvals(-2 * b @ a)
    assert total.lost == pytest.approx(float(sizes[3:].norm()), rel=CLOSE)
    assert distance(total.b @ total.a, -2 * b @ a) == pytest.approx(total.lost, rel=CLOSE)


class Largest(TorchDispatchMode):
    """Watches every operation: the most numbers that any tensor made had."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, Tensor):
                self.most = max(self.most, tensor.numel())
        return made


def test_no_tensor_is_larger_than_the_factors() -> None:
    m, n = 400, 500
    clients = [(0.25, *factors(m, n, 5, i)) for i in range(4)]
    wide = stacked(clients)
    with Largest() as seen:
        _ = wide[0] @ wide[1]
    assert seen.most == m * n  # the watch does see a dense product
    with Largest() as seen:
        product_norm(*stacked(clients))
        best_of_rank(*stacked(clients), 8)
        running(clients, 10)
    assert 0 < seen.most <= 20 * max(m, n)


def test_the_core_is_capped_where_there_are_more_ranks_than_rows() -> None:
    b, a = factors(6, 50, 200)
    with Largest() as seen:
        best_of_rank(b, a, 4)
    assert seen.most <= 200 * 50  # A itself, and no core of 200 x 200
    assert all(x >= y for x, y in pairwise(best_of_rank(b, a, 4)[1].norm(dim=1).tolist()))


def test_the_benchmark_agrees_with_the_dense_svd(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "flexlora.py"
    out = tmp_path / "numbers.json"
    command = ["flexlora.py", "--small", "--repeat", "2", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    threads = torch.get_num_threads()
    try:
        runpy.run_path(str(script), run_name="__main__")  # SystemExit if they differ
    finally:
        torch.set_num_threads(threads)
    numbers = json.loads(out.read_text(encoding="utf-8"))
    assert numbers["product_off"] < 1e-5
