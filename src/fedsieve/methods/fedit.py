"""FedIT: dense LoRA, averaged (Zhang et al. 2024, arXiv 2305.05644).

Every client gets the whole adapter, trains it and returns the whole change; the server takes the
mean of A and of B, each apart. It is FedAvg on LoRA, the baseline of both papers, and what FSLoRA
at k = r and FLASC at density 1 reduce to.
"""

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
    """Dense LoRA. Budgets have no say: each client sends and trains everything."""
    return compose(
        down=dense,
        up=dense,
        server=server,
        weighting=weighting,
        down_values=down_values,
        up_values=up_values,
    )
