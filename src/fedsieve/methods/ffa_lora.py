"""FFA-LoRA: A frozen at its initial value, B trained (Sun et al. 2024, arXiv 2403.12313).

    W_i = W0 + s B_i A_0,        B <- mean_i B_i

As all clients share A_0, the mean of the factors is the mean of the products: mean(B_i) A_0 =
mean(B_i A_0), which is the paper's point, also under noise. A_0 is drawn from the recipe's seed at
both ends and never travels: messages are B and the head.
"""

from fedsieve.algebra.method import Method, Weighting, compose
from fedsieve.algebra.optim import Optimizer
from fedsieve.algebra.options import checked
from fedsieve.algebra.payload import Form
from fedsieve.algebra.sieve import all_but_a, dense, only


@checked
def method(
    *,
    server: Optimizer | None = None,
    weighting: Weighting = "uniform",
    down_values: Form = "float32",
    up_values: Form = "float32",
) -> Method:
    """FFA-LoRA. Budgets have no say."""
    return compose(
        down=only(all_but_a),
        up=dense,
        trained=all_but_a,
        server=server,
        weighting=weighting,
        down_values=down_values,
        up_values=up_values,
    )
