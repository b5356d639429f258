"""raFLoRA: FlexLoRA, with each rank's mean over the clients that hold it (Wu et al. 2026,
arXiv 2602.13486).

    M = sum_j sum_(i: k_i > j) w_ij s_i B_i[:, j] A_i[j, :],     w_ij = w_i / sum_(l: k_l > j) w_l
    M = U D V^T,   B = U_r D_r^(1/2) / s^(1/2),   A = D_r^(1/2) V_r^T / s^(1/2)

FlexLoRA divides every rank by all clients, those too that are too small to hold it: ranks that few
hold shrink in every round, and what is learned ends in those that all hold. Here j is divided by
its holders alone. The paper cuts the ranks into partitions at the clients' k_i; within one of them
all ranks have the same holders, so a rank at a time is the same rule. Where all clients have the
server's rank it is FlexLoRA. As there, clients get the first k ranks and return values, and the
server optimizer moves the head alone.

Chosen here: a rank that no client of the round holds stays in M as the server has it, for else one
round of small clients would wipe out what the large ones have learned.

Memory while merging is that of the clients' factors together: what a rank is divided by is known
when all are there.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from fedsieve.algebra.budget import Client
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import SCALINGS, Method, Scaling, State, Weighting, compose
from fedsieve.algebra.optim import Optimizer, sgd
from fedsieve.algebra.options import checked
from fedsieve.algebra.payload import Form, Payload
from fedsieve.algebra.replacing import Stack, collect, first_ranks, refactored
from fedsieve.algebra.sieve import dense, leading


@checked
def method(
    *,
    server: Optimizer | None = None,
    scaling: Scaling = "server",
    weighting: Weighting = "uniform",
    down_values: Form = "float32",
    up_values: Form = "float32",
) -> Method:
    """raFLoRA. Each client's ratio k / r comes from its budget. `scaling` as in `flexlora`.

    weighting: the w_i; the paper's are the numbers of examples
    """
    rescale = SCALINGS[scaling]
    optimizer = sgd() if server is None else server
    inner = compose(
        down=leading,
        up=dense,
        knobs=frozenset({"ratio"}),
        rescale=rescale,
        returns="values",
        server=server,
        weighting=weighting,
        down_values=down_values,
        up_values=up_values,
    )

    def merge(state: State, updates: Iterable[tuple[Client, Payload]], key: Key) -> State:
        state, stacks, _ = collect(
            optimizer, state, updates, key, weighting=weighting, rescale=rescale
        )
        tree = state.trees["adapter"]
        by_rank = {
            p.module: _by_holders(stacks[p.module], tree[p.b], tree[p.a], rescale)
            for p in state.layout.pairs
        }
        return refactored(state, by_rank)

    return inner._replace(publish=first_ranks(rescale, down_values), merge=merge)


def _by_holders(stack: Stack, b: Tensor, a: Tensor, rescale: Callable[[int, int], float]) -> Stack:
    """A stack whose sum is M, of one whose sum is the mean over all; b, a: the server's own."""
    rank = b.shape[1]
    held = torch.zeros(rank, dtype=torch.float64)  # by rank: the weights of its holders
    for weight, own, _ in stack:
        kept = own.shape[1]
        held[:kept] += weight / rescale(rank, kept)  # the stack's weights have the scales in them
    nobodys = held == 0
    divisor = torch.where(nobodys, 1.0, held)
    divided: Stack = []
    for weight, own, rows in stack:
        share = weight / divisor[: own.shape[1]]
        divided.append((1.0, own * share.to(own.dtype).reshape(-1, *[1] * (own.ndim - 2)), rows))
    return [*divided, (1.0, b[:, nobodys], a[nobodys])]
