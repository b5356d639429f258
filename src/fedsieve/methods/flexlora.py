"""FlexLoRA: average the products, cut the mean by SVD (Bai et al. 2024, arXiv 2402.11505).

    M = sum_i w_i s_i B_i A_i          w_i = 1/n, or by examples; s_i the client's own scale
    M = U D V^T,   B = U_r D_r^(1/2) / s^(1/2),   A = D_r^(1/2) V_r^T / s^(1/2)

so that s B A is the best approximation of M at the server's rank r, and its first k ranks, which a
client of rank k gets, the best at rank k. M is never formed: the clients' factors stand side by
side, two thin QRs and the SVD of a small core do it (`lowrank`). Factors of an SVD have no fixed
direction from round to round, so the server optimizer moves the head alone; pairs are replaced.

Clients return their trained values, not changes. Memory while merging is that of the clients'
factors together, which an exact mean needs; `most` bounds it.
"""

from collections.abc import Iterable

from pydantic import PositiveInt

from fedsieve.algebra.budget import Client
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import SCALINGS, Method, Scaling, State, Weighting, compose
from fedsieve.algebra.optim import Optimizer, sgd
from fedsieve.algebra.options import checked
from fedsieve.algebra.payload import Form, Payload
from fedsieve.algebra.replacing import collect, first_ranks, refactored
from fedsieve.algebra.sieve import dense, leading


@checked
def method(
    *,
    server: Optimizer | None = None,
    scaling: Scaling = "server",
    most: PositiveInt | None = None,
    weighting: Weighting = "uniform",
    down_values: Form = "float32",
    up_values: Form = "float32",
) -> Method:
    """FlexLoRA. Each client's ratio k / r comes from its budget.

    scaling: the scale at which clients train: the server's, or alpha / k or alpha / sqrt(k) of
             their own rank, for LoRA and rank-stabilised LoRA
    most:    the stack of factors is cut to this many ranks whenever it is longer; None never cuts,
             and the mean is exact
    """
    rescale = SCALINGS[scaling]
    optimizer = sgd() if server is None else server
    inner = compose(
        down=leading,
        up=dense,
        knobs=frozenset({"ratio"}),
        rescale=rescale,
        returns="values",
        server=server,
        weighting=weighting,
        down_values=down_values,
        up_values=up_values,
    )

    def merge(state: State, updates: Iterable[tuple[Client, Payload]], key: Key) -> State:
        state, stacks, _ = collect(
            optimizer, state, updates, key, weighting=weighting, rescale=rescale, most=most
        )
        return refactored(state, stacks)

    return inner._replace(publish=first_ranks(rescale, down_values), merge=merge)
