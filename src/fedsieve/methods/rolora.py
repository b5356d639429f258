"""RoLoRA: the factors take turns (Chen et al. 2024, arXiv 2409.02346).

    odd rounds:   A frozen at its mean, all clients train B;   B <- mean_i B_i
    even rounds:  B frozen at its mean, all clients train A;   A <- mean_i A_i

In each round one factor is the same at all clients, so the mean of the factors is the mean of the
products: mean(B_i) A = mean(B_i A). Only the factor that was trained is returned. The paper's
clients take part in every round and get only what changed; here a client may have been away, so
both factors go down. The head is trained in every round.
"""

from fedsieve.algebra.adapter import Layout
from fedsieve.algebra.method import Method, Weighting, compose
from fedsieve.algebra.optim import Optimizer
from fedsieve.algebra.options import checked
from fedsieve.algebra.payload import Form
from fedsieve.algebra.sieve import all_but_a, all_but_b, dense


def in_turns(layout: Layout, number: int) -> tuple[str, ...]:
    """B in odd rounds, as its start is zero and moves first; A in even ones; the head always."""
    return (all_but_a if number % 2 else all_but_b)(layout, number)


@checked
def method(
    *,
    server: Optimizer | None = None,
    weighting: Weighting = "uniform",
    down_values: Form = "float32",
    up_values: Form = "float32",
) -> Method:
    """RoLoRA. Budgets have no say."""
    return compose(
        down=dense,
        up=dense,
        trained=in_turns,
        server=server,
        weighting=weighting,
        down_values=down_values,
        up_values=up_values,
    )
