"""Adapter LTH: prune a little after every round (the lottery ticket hypothesis, Frankle and Carbin
2019, arXiv 1803.03635), as the FLASC paper compares with it (arXiv 2406.05233, section 4).

    M_1 = everything
    after round t:   M_{t+1} = the top keep^t n of |P| among M_t;   P <- P * M_{t+1}

where n is how many entries there are: a `keep` share of those before stays each time, and nothing
is lost or gained by rounding it anew every round.

Clients get P * M_t, train the entries of M_t alone and return exactly these. With keep = 0.98 half
of the weights are left after 34 rounds, so little is saved. Weights are not rewound to their start,
as they are in the original ticket search.
"""

from typing import Annotated, Literal

from pydantic import Field

from fedsieve.algebra.counts import exact
from fedsieve.algebra.method import Method, State, Weighting
from fedsieve.algebra.optim import Optimizer, adam
from fedsieve.algebra.options import checked
from fedsieve.algebra.payload import Form
from fedsieve.algebra.pruning import live_only, pruned


@checked
def method(
    *,
    server: Optimizer | None = None,
    keep: Annotated[float, Field(gt=0, le=1)] = 0.98,
    head: Literal["sieved", "whole"] = "sieved",
    weighting: Weighting = "uniform",
    down_values: Form = "float32",
    up_values: Form = "float32",
) -> Method:
    """Adapter LTH. Budgets have no say.

    server: by default Adam, which the FLASC paper gives it too
    keep: the share of the live entries that stays live after a round
    """

    def prune(state: State, number: int) -> State:
        return pruned(state, exact(keep) ** number, head)

    return live_only(
        prune,
        server=adam(5e-3) if server is None else server,
        weighting=weighting,
        down_values=down_values,
        up_values=up_values,
    )
