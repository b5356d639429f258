"""Full fine-tuning: all weights of the model, averaged (FedAvg, McMahan et al. 2017, 1602.05629).

    P <- P - step( mean_i (P - P_i) ),   P all weights, no LoRA

The same algebra as dense LoRA over another tree: what both papers measure the savings of LoRA by.
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
    """All weights. Budgets have no say; the recipe's [lora] table is not used."""
    return compose(
        down=dense,
        up=dense,
        server=server,
        weighting=weighting,
        down_values=down_values,
        up_values=up_values,
        trains="all",
    )
