"""FlexLoRA's merge: thin QRs and a small SVD, against the SVD of the dense mean.

The server has B_i A_i from each client, wants the best approximation of their weighted mean of
the rank of one client, and never needs the mean itself (`fedsieve.algebra.lowrank`). The other way
is to form the m x n mean and take `torch.linalg.svd` of it; only that call is timed, not the
forming. Both run here, on as many threads, and both results are compared. Our way works in float64
inside, the dense one in the factors' float32.

    python benchmarks/flexlora.py [--small] [--repeat 10] [--json FILE]

It exits with 1 if results differ or our way is not REACH times faster (--small is for tests: it
only compares results). The dense SVD takes minutes and is done once.
"""

import argparse
import json
import platform
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fedsieve.algebra.lowrank import best_of_rank, stacked

REACH = 100  # times faster than the dense SVD
CLOSE = 1e-4  # of the largest singular value, or of the product's norm: float32's SVD is the limit

Clients = list[tuple[float, Tensor, Tensor]]


class Size(NamedTuple):
    """A merge: the weight's shape, clients and their rank."""

    m: int
    n: int
    clients: int
    rank: int


FULL = Size(3072, 8192, 10, 16)
SMALL = Size(96, 256, 10, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description="FlexLoRA's merge against a dense SVD.")
    parser.add_argument("--small", action="store_true", help="96 x 256, results compared only")
    parser.add_argument("--repeat", type=int, default=10, help="runs of our merge")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    args = parser.parse_args()
    torch.set_num_threads(1)

    size = SMALL if args.small else FULL
    clients = made_up_clients(size, args.seed)
    merge(clients, size.rank)  # a warm-up
    seconds = []
    for _ in range(args.repeat):
        start = time.perf_counter()
        b, a = merge(clients, size.rank)
        seconds.append(time.perf_counter() - start)

    start = time.perf_counter()
    mean = torch.zeros(size.m, size.n)
    for weight, client_b, client_a in clients:
        mean.addmm_(client_b, client_a, alpha=weight)
    forming = time.perf_counter() - start
    start = time.perf_counter()
    u, sizes, v = torch.linalg.svd(mean, full_matrices=False)
    dense = time.perf_counter() - start

    best = (u[:, : size.rank] * sizes[: size.rank]) @ v[: size.rank]
    found = b.norm(dim=0) * a.norm(dim=1)
    numbers = {
        **size._asdict(),
        "seed": args.seed,
        "ours_median_s": median(seconds),
        "ours_fastest_s": min(seconds),
        "ours_slowest_s": max(seconds),
        "repeats": args.repeat,
        "dense_svd_s": dense,
        "dense_forming_s": forming,
        "times_faster": dense / median(seconds),
        "singular_values_off": float((found - sizes[: size.rank]).abs().max() / sizes[0]),
        "product_off": float((b @ a - best).norm() / best.norm()),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread, "
        f"torch {torch.__version__}",
    }
    show(numbers)
    if args.json:
        args.json.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    if max(numbers["singular_values_off"], numbers["product_off"]) > CLOSE:
        raise SystemExit("FAILED: the merge is not the best approximation of the mean")
    if not args.small and numbers["times_faster"] < REACH:
        raise SystemExit(f"FAILED: less than {REACH} times faster than the dense SVD")


def merge(clients: Clients, rank: int) -> tuple[Tensor, Tensor]:
    return best_of_rank(*stacked(clients), rank)


def made_up_clients(size: Size, seed: int) -> Clients:
    """Clients of unequal weight, each with ranks of falling size, as trained ones have."""
    draws = torch.Generator().manual_seed(seed)
    shares = 0.5 + torch.rand(size.clients, generator=draws)
    falling = 0.8 ** torch.arange(size.rank)
    return [
        (
            float(share / shares.sum()),
            torch.randn(size.m, size.rank, generator=draws) * falling,
            torch.randn(size.rank, size.n, generator=draws),
        )
        for share in shares
    ]


def show(numbers: dict[str, object]) -> None:
    table = Table(title="FlexLoRA's merge")
    table.add_column("what")
    table.add_column("number", justify="right")
    for name, number in numbers.items():
        table.add_row(name, f"{number:.4g}" if isinstance(number, float) else str(number))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
