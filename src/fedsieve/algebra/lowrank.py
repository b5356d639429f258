"""Products of thin factors: norms, sums and best approximations, without the product itself.

What a LoRA pair does to a weight is B A, m x n numbers told by k (m + n). Methods that average the
products of clients and not their factors (FlexLoRA, FLoRA, FedEx-LoRA, ...) need the sum of many of
them and its best part of some rank. A sum of products is a product of stacked factors, so all of
it can be done with thin QRs and the SVD of a small core: nothing of m x n numbers is formed
here, unless K itself reaches that size.

Factors are those of `adapter.Pair`: B (m, K), A (K, n). In LoRA convolutions more axes follow,
A (K, n, kh, kw) and B (m, K, 1, 1): the rank axis stays apart, all others are one, and results get
their axes back. The work is done in float64 (the factors are thin, so it costs little, and makes
results differ less between machines); results have the dtype of what came in.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class RunningSum(NamedTuple):
    """A sum of products in factors of bounded rank.

    b, a: factors whose product is the sum so far
    lost: how far it can be off: a bound on the Frobenius norm of the true sum less b a. It is the
          sum of what each compression dropped, the root of its squared singular values.
    """

    b: Tensor
    a: Tensor
    lost: float


def product_norm(b: Tensor, a: Tensor) -> float:
    """The Frobenius norm of B A, from the Gram matrices: |B A|^2 = sum((B^T B) * (A A^T)).

    b: (m, K), a: (K, n), or with further axes. Where columns cancel, so that B A is much smaller
    than its parts, the result is exact to about 1e-8 of their size.
    """
    left, right = _matrices(b, a)
    square = ((left.T @ left) * (right @ right.T)).sum()
    return float(square.clamp_min(0).sqrt())


def stacked(factors: Iterable[tuple[float, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Factors of the weighted sum of products: from (weight, B_i, A_i) to B, A side by side.

    B (m, sum of K_i), A (sum of K_i, n); the weights are in B. Ranks may differ.
    Raises ValueError if there are no factors.
    """
    bs: list[Tensor] = []
    rows: list[Tensor] = []
    for weight, b, a in factors:
        bs.append(weight * b)
        rows.append(a)
    if not bs:
        raise ValueError("a sum of no products has no shape: give at least one")
    return torch.cat(bs, dim=1), torch.cat(rows, dim=0)


def best_of_rank(b: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of B A of some rank (Eckart-Young): B (m, rank), A (rank, n).

    With B A = U S V^T it is U sqrt(S) and sqrt(S) V^T, by falling singular values, so any first k
    columns and rows are the best of rank k. Where B A has fewer than `rank` singular values above
    rounding, zeros fill the rest of both factors.

    Of each singular pair the sign is open; the entry of largest magnitude in the column of B is
    made positive. Equal singular values leave more open than that, and those stay as they come.
    Raises ValueError if the ranks of b and a differ, or `rank` is negative.
    """
    best_b, best_a, _ = _best(b, a, rank)
    return best_b, best_a


def turned(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """The same product, in factors turned such that A's rows are orthonormal: B (m, K), A (K, n).

    With B A = U S V^T they are U S, the columns longest first, and V^T. Where there are fewer than
    K singular values, columns of B are zero, and the rows of A beside them are others of the space
    that A's rows span: no row is zero, unless K is above n. Signs as in `best_of_rank`.
    Raises ValueError if the ranks of b and a differ.
    """
    left, right = _matrices(b, a)
    q, r = torch.linalg.qr(right.T)  # A = r^T q^T
    short = left @ r.T  # B A = short q^T
    *_, turn = torch.linalg.svd(torch.linalg.qr(short).R, full_matrices=True)
    columns, rows = short @ turn.T, turn @ q.T
    signs = columns.gather(0, columns.abs().argmax(dim=0, keepdim=True)).sign()
    signs = torch.where(signs == 0, 1.0, signs)
    missing = left.shape[1] - len(rows)
    columns = torch.nn.functional.pad(columns * signs, (0, missing))
    rows = torch.nn.functional.pad(rows * signs.T, (0, 0, 0, missing))
    shaped_b = columns.reshape(b.shape[0], *b.shape[2:], b.shape[1]).movedim(-1, 1)
    return shaped_b.to(b.dtype).contiguous(), rows.reshape(a.shape).to(a.dtype)


def rank_that_keeps(share: float, b: Tensor, a: Tensor) -> int:
    """The smallest rank whose best approximation has this share of |B A|^2, the Frobenius norm's.

    What is lost are squared singular values, so 1 asks for all that are above rounding.
    """
    squares = _decomposed(b, a).sizes.square()
    lost = squares.flip(0).cumsum(0).flip(0)  # by rank, if it is the first one to go
    return int((lost > (1 - share) * squares.sum()).sum())


def add(total: RunningSum | None, weight: float, b: Tensor, a: Tensor, most: int) -> RunningSum:
    """total + weight B A, kept in factors of at most `most` ranks; None is an empty sum.

    Once the stack is wider than `most`, only its best part of that rank is kept. That is exact
    while the running sum has no higher rank; else it drops something, and the errors of all steps
    together are at most the sum of their norms, `lost`. `best_of_rank(*stacked(...))` at the end
    instead loses no more than it must, but holds the factors of all clients.
    Raises ValueError if the ranks of b and a differ.
    """
    before = [] if total is None else [(1.0, total.b, total.a)]
    lost = 0.0 if total is None else total.lost
    wide_b, wide_a = stacked([*before, (weight, b, a)])
    if wide_b.shape[1] <= most:
        return RunningSum(wide_b, wide_a, lost)
    best_b, best_a, dropped = _best(wide_b, wide_a, most)
    return RunningSum(best_b, best_a, lost + float(dropped.norm()))


def _best(b: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """`best_of_rank`, and the singular values that it drops."""
    if rank < 0:
        raise ValueError(f"an approximation of rank {rank}: must be 0 or more")
    q_left, u, sizes, v, q_right = _decomposed(b, a)
    keep = min(rank, sizes.numel())
    roots = sizes[:keep].sqrt()
    columns, rows = q_left @ u[:, :keep], v[:keep] @ q_right.T
    if keep:
        signs = columns.gather(0, columns.abs().argmax(dim=0, keepdim=True)).sign()
        columns, rows = columns * signs, rows * signs.T
    best_b = columns.new_zeros(columns.shape[0], rank)
    best_a = rows.new_zeros(rank, rows.shape[1])
    best_b[:, :keep] = columns * roots
    best_a[:keep] = rows * roots[:, None]
    shaped_b = best_b.reshape(b.shape[0], *b.shape[2:], rank).movedim(-1, 1)
    shaped_a = best_a.reshape(rank, *a.shape[1:])
    return shaped_b.to(b.dtype).contiguous(), shaped_a.to(a.dtype), sizes[rank:]


class _Svd(NamedTuple):
    """B A = (q_left u) diag(sizes) (v q_right^T); the sizes fall, and all are above rounding."""

    q_left: Tensor
    u: Tensor
    sizes: Tensor
    v: Tensor
    q_right: Tensor


def _decomposed(b: Tensor, a: Tensor) -> _Svd:
    left, right = _matrices(b, a)
    # Reduced, R is (min(m, K), K): the core is never larger than K x K, nor than m x n.
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, sizes, v = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    # Rounding leaves singular values of about this size where there are none; their vectors
    # would be noise that differs from machine to machine.
    parts = (r_left.norm(dim=0) * r_right.norm(dim=0)).sum()
    noise = parts * max(left.shape[1], 1) * torch.finfo(torch.float64).eps
    there = int((sizes > noise).sum())
    return _Svd(q_left, u[:, :there], sizes[:there], v[:there], q_right)


def _matrices(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Both factors as float64 matrices, (m ..., K) and (K, n ...), without gradients."""
    if b.ndim < 2 or a.ndim < 2 or b.shape[1] != a.shape[0]:
        raise ValueError(
            f"B {tuple(b.shape)} and A {tuple(a.shape)} do not multiply: axis 1 of B and axis 0 "
            "of A must be the rank"
        )
    left = b.detach().movedim(1, -1).flatten(0, -2)
    return left.double(), a.detach().flatten(1).double()
