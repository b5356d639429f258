"""FLASC: dense training, sparse messages (Kuo et al. 2024, arXiv 2406.05233, Algorithm 1).

    the server sends      P * M_down, M_down the top d_down of |P|
    client i trains       ALL entries of what arrived, zeros too, and returns the top d_up
                          entries of D_i = P_i - P_i'
    the server steps      on P, which stays dense, with the gradient mean_i D_i

The two densities are each client's own, so a slow uplink can be given a sparser upload. The paper
ranks a classifier head together with the LoRA weights, and so does `head = "sieved"`.
"""

from typing import Literal

from fedsieve.method import Method, Weighting, compose
from fedsieve.optim import Optimizer
from fedsieve.payload import Form
from fedsieve.sieve import top_k


def method(
    *,
    server: Optimizer | None = None,
    head: Literal["sieved", "whole"] = "sieved",
    weighting: Weighting = "uniform",
    down_values: Form = "float32",
    up_values: Form = "float32",
    feedback: bool = False,
) -> Method:
    """FLASC. The paper's server is `optim.adam`; densities come from each client's budget.

    feedback: clients keep what their upload left out and add it next time (error feedback, not in
    the paper; Karimireddy et al. 2019, arXiv 1901.09847).
    """
    return compose(
        down=top_k("down", head=head),
        up=top_k("up", head=head),
        knobs=frozenset({"down", "up"}),
        server=server,
        weighting=weighting,
        down_values=down_values,
        up_values=up_values,
        feedback=feedback,
    )
