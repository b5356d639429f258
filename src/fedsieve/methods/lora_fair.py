"""LoRA-FAIR: A is averaged, and B's mean corrected so that the mean of products is met (Bian et al.
2025, arXiv 2411.14961).

    A = sum_i w_i A_i,   B = sum_i w_i B_i,   M = sum_i w_i B_i A_i
    D = argmin S(M, (B + D) A) + penalty |D|
    the next round starts from A and B + D

FedIT's B A is not M. FedEx-LoRA puts the difference into the base, at the price of messages as
large as all clients' factors together; here B takes as much of it as the row space of A lets
through, and messages are FedIT's. The penalty keeps B near its mean, from which clients go on. All
clients have the server's rank; pairs are replaced, and the server optimizer moves the head alone.

Departures: the paper's S is a similarity of the two matrices, which says nothing of their size, and
its D is what some steps of SGD find. Here S is the squared Frobenius distance and the penalty's
norm is squared too, so that D is known in one step and costs no matrix of m x n numbers:

    D = (M - B A) A^T (A A^T + penalty c I)^+,        c = |A|^2 / r,

c being the mean of A A^T's eigenvalues, so that a penalty means the same whatever A's size is. Its
default is the paper's 0.01; at 0, D is what comes nearest to M.
"""

from collections.abc import Iterable

import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from fedsieve.algebra.budget import Client
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import Method, State, Weighting, compose, unscaled
from fedsieve.algebra.optim import Optimizer, sgd
from fedsieve.algebra.options import checked
from fedsieve.algebra.payload import Form, Payload
from fedsieve.algebra.replacing import Stack, collect, means
from fedsieve.algebra.sieve import dense


@checked
def method(
    *,
    server: Optimizer | None = None,
    penalty: NonNegativeFloat = 0.01,
    weighting: Weighting = "uniform",
    down_values: Form = "float32",
    up_values: Form = "float32",
) -> Method:
    """LoRA-FAIR. Budgets have no say.

    penalty: on what is added to B's mean; 0 has no other aim than the mean of products
    """
    optimizer = sgd() if server is None else server
    inner = compose(
        down=dense,
        up=dense,
        returns="values",
        server=server,
        weighting=weighting,
        down_values=down_values,
        up_values=up_values,
    )

    def merge(state: State, updates: Iterable[tuple[Client, Payload]], key: Key) -> State:
        state, stacks, _ = collect(
            optimizer, state, updates, key, weighting=weighting, rescale=unscaled
        )
        tree = dict(state.trees["adapter"])
        for pair in state.layout.pairs:
            tree[pair.b], tree[pair.a] = _corrected(stacks[pair.module], penalty)
        return State(state.layout, {**state.trees, "adapter": tree})

    return inner._replace(merge=merge)


def _corrected(stack: Stack, penalty: float) -> tuple[Tensor, Tensor]:
    """B + D and A."""
    mean_b, mean_a = means(stack)
    rows = mean_a.flatten(1).double()
    gram = rows @ rows.T
    # (M - B A) A^T, a client at a time: none of the products is formed.
    missed = torch.zeros_like(mean_b.flatten(1), dtype=torch.float64)
    for weight, b, a in [*stack, (-1.0, mean_b, mean_a)]:
        missed += weight * b.flatten(1).double() @ (a.flatten(1).double() @ rows.T)
    ridge = penalty * gram.trace() / len(gram) * torch.eye(len(gram), dtype=torch.float64)
    added = missed @ torch.linalg.pinv(gram + ridge, hermitian=True)
    return mean_b + added.reshape(mean_b.shape).to(mean_b.dtype), mean_a
