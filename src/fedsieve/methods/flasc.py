"""FLASC: dense training, sparse messages (Kuo et al. 2024, arXiv 2406.05233, Algorithm 1).

    the server sends      P * M_down, M_down the top d_down of |P|
    client i trains       ALL entries of what arrived, zeros too, and returns the top d_up
                          entries of D_i = P_i - P_i'
    the server steps      on P, which stays dense, with the gradient mean_i D_i

The two densities are each client's own, so a slow uplink can be given a sparser upload. The paper
ranks a classifier head together with the LoRA weights, and so does `head = "sieved"`. The variants
of the paper and its code: densities that decay from round to round, all weights instead of LoRA's
(`weights = "all"`), and evaluation of P itself or of P masked as a client would get it.

Ours is `ranked = "change"`. LoRA starts with A random and B zero, so the top entries of |P| lie in
A until some of B has outgrown them, and until then clients see nothing of B. With it

    the server sends      M_down * (P - P_0), M_down the top d_down of |P - P_0|
    client i trains       from P_0 + M_down * (P - P_0): what did not pass stands at its start

P_0 is the start, which both ends draw from the seed. The rest is as above.
"""

from typing import Literal

from fedsieve.algebra.method import Method, Ranked, Weighting, compose, evaluated_at
from fedsieve.algebra.optim import Optimizer, adam
from fedsieve.algebra.options import checked
from fedsieve.algebra.payload import Form
from fedsieve.algebra.sieve import top_k
from fedsieve.settings import Share


@checked
def method(
    *,
    server: Optimizer | None = None,
    ranked: Ranked = "values",
    head: Literal["sieved", "whole"] = "sieved",
    weights: Literal["lora", "all"] = "lora",
    decay: Share = 1.0,
    least: Share = 1 / 256,
    evaluated: Share = 1.0,
    weighting: Weighting = "uniform",
    down_values: Form = "float32",
    up_values: Form = "float32",
    feedback: bool = False,
) -> Method:
    """FLASC. Densities come from each client's budget.

    server: by default Adam, as in the paper; of its learning rates {1e-4, 5e-4, 1e-3, 5e-3} the
        largest, which is nearest to what was best here (docs/results.md)
    ranked: what the download's mask keeps the largest of: the values, as in the paper, or their
        change since the start; `evaluated` ranks the same
    weights: "lora" trains LoRA pairs and the head, "all" every weight of the model
    decay, least: both densities are multiplied by decay after each round, but not below `least`
    evaluated: the density at which the evaluated and saved P is masked; 1 masks nothing. The
        published code evaluates P masked at the download's density, and so should a run whose
        clients all have one: `method.evaluated_at` says why.
    feedback: clients keep what their upload left out and add it next time (error feedback, not in
    the paper; Karimireddy et al. 2019, arXiv 1901.09847).
    """
    inner = compose(
        down=top_k("down", head=head, decay=decay, least=least),
        up=top_k("up", head=head, decay=decay, least=least),
        knobs=frozenset({"down", "up"}),
        server=adam(5e-3) if server is None else server,
        weighting=weighting,
        down_values=down_values,
        up_values=up_values,
        feedback=feedback,
        trains=weights,
        ranked=ranked,
    )
    return evaluated_at(inner, evaluated, head)
