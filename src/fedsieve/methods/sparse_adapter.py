"""SparseAdapter: one dense round, then one mask for ever (He et al. 2022, arXiv 2210.04284), as the
FLASC paper compares with it (arXiv 2406.05233, section 4).

    round 1     dense LoRA
    after it    M = the top d entries of |P|;  P <- P * M
    later       clients get P * M, train the entries of M alone, and return exactly these

Pruned entries are zero and stay so, whatever the server optimizer's momentum says. The density is
the method's own option, the same for all clients: one mask serves everyone. The mask is told with
every download, since a client may come in for the first time; an upload's costs nothing.
"""

from typing import Annotated, Literal

from pydantic import Field

from fedsieve.algebra.method import Method, State, Weighting
from fedsieve.algebra.optim import Optimizer, adam
from fedsieve.algebra.options import checked
from fedsieve.algebra.payload import Form
from fedsieve.algebra.pruning import live_only, pruned


@checked
def method(
    *,
    server: Optimizer | None = None,
    density: Annotated[float, Field(gt=0, le=1)] = 0.25,
    head: Literal["sieved", "whole"] = "sieved",
    weighting: Weighting = "uniform",
    down_values: Form = "float32",
    up_values: Form = "float32",
) -> Method:
    """SparseAdapter. Budgets have no say.

    server:  by default Adam, which the FLASC paper gives it too
    density: the share of the entries that the mask keeps; head = "whole" leaves the head out of it
    """

    def prune(state: State, number: int) -> State:
        return pruned(state, density, head)  # after the first time, the same entries

    return live_only(
        prune,
        server=adam(5e-3) if server is None else server,
        weighting=weighting,
        down_values=down_values,
        up_values=up_values,
    )
