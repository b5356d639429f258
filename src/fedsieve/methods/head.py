"""Head-only tuning: the classifier's head alone, averaged; the model's body is frozen (the linear
probe that the FLASC paper compares with, arXiv 2406.05233).

    H <- H - step( mean_i (H - H_i) ),   H the tensors outside the model's body

The least that a client can be asked for, and the floor that LoRA has to be better than.
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
    """The head, and the modules named in lora.whole. Budgets have no say."""
    return compose(
        down=dense,
        up=dense,
        server=server,
        weighting=weighting,
        down_values=down_values,
        up_values=up_values,
        trains="head",
    )
