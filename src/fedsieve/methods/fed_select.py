"""Federated Select: clients train only what they download (Charles et al. 2022, arXiv 2208.09432),
as the FLASC paper compares with it (arXiv 2406.05233, section 4).

    kind = "entries": the server sends the top d_down of |P|; the client trains and returns exactly
                      these; the mask is chosen anew every round
    kind = "ranks":   the k ranks of each pair with the largest ||A_j||^2 + ||B_j||^2, whole

    P <- P - step( mean_i D_i ),  D_i zero where client i trained nothing

An upload's mask costs nothing: the server chose it. Departure: as LoRA starts with B = 0, the top
entries of |P| would all lie in A, whose gradient is then zero for ever; so the first
`dense_rounds` rounds are dense (kind = "entries").
"""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt

from fedsieve.algebra.method import Method, Ranked, Weighting, compose, evaluated_at
from fedsieve.algebra.optim import Optimizer, adam
from fedsieve.algebra.options import checked
from fedsieve.algebra.payload import Form
from fedsieve.algebra.sieve import after, dense, top_k, top_ranks
from fedsieve.errors import FedSieveError


@checked
def method(
    *,
    server: Optimizer | None = None,
    kind: Literal["entries", "ranks"] = "entries",
    dense_rounds: NonNegativeInt = 1,
    ranked: Ranked = "values",
    head: Literal["sieved", "whole"] = "sieved",
    evaluated: Annotated[float, Field(gt=0, le=1)] = 1.0,
    weighting: Weighting = "uniform",
    down_values: Form = "float32",
    up_values: Form = "float32",
) -> Method:
    """Federated Select. Densities (entries) or ratios (ranks) come from each client's budget.

    server: by default Adam, which the FLASC paper gives it too
    dense_rounds: rounds before the first mask; ranked, evaluated: as in `flasc`
    Raises FedSieveError where the change would be ranked before there is one: what a client does
    not get it does not train, so the first choice, one among zeros, would stand for ever.
    """
    by_rank = kind == "ranks"
    if ranked == "change" and (by_rank or dense_rounds < 1):
        raise FedSieveError(
            "method.ranked: 'change' needs kind = 'entries' and dense_rounds of at least 1: before "
            "the first round all changes are zero, and what is then left out would never be trained"
        )
    inner = compose(
        down=top_ranks if by_rank else after(dense_rounds, top_k("down", head=head)),
        up=dense,
        knobs=frozenset({"ratio"} if by_rank else {"down"}),
        freeze_absent=True,
        server=adam(5e-3) if server is None else server,
        weighting=weighting,
        down_values=down_values,
        up_values=up_values,
        ranked=ranked,
    )
    return evaluated_at(inner, evaluated, head)
