"""Fed-SB: a square core between two frozen factors (Singhal et al. 2025, arXiv 2502.15436).

    W_i = W0 + s B R_i A,        R <- mean_i R_i

A (r, n) and B (m, r) are the same at all clients and never move, so the mean of the cores is the
mean of the products: mean(B R_i A) = B mean(R_i) A. Messages are R, r r numbers a module whatever
its size, and the head; LoRA's are r (m + n).

Departure: the paper takes B and A from the SVD of the clients' first averaged gradient of W0, which
each client works out and sends whole, m n numbers a module. Here they are orthonormal factors that
both ends draw from the recipe's seed, at no cost, and R begins at zero (`algebra.cores`). They know
nothing of the task, so a rank that is large for LoRA is in place here: it costs little.
"""

from fedsieve.algebra.cores import Cores
from fedsieve.algebra.method import Method, Weighting, compose
from fedsieve.algebra.optim import Optimizer
from fedsieve.algebra.options import checked
from fedsieve.algebra.payload import Form
from fedsieve.algebra.sieve import dense


@checked
def method(
    *,
    server: Optimizer | None = None,
    weighting: Weighting = "uniform",
    down_values: Form = "float32",
    up_values: Form = "float32",
) -> Method:
    """Fed-SB. Budgets have no say."""
    return compose(
        down=dense,
        up=dense,
        server=server,
        weighting=weighting,
        down_values=down_values,
        up_values=up_values,
        trains=Cores(),
    )
