"""FLoRIST: FLoRA's stack, cut by a threshold on its singular values (Ramesh and Dass 2025,
arXiv 2506.09199).

    M = sum_i w_i s_i B_i A_i = U D V^T                    the stack of all clients, as in FLoRA
    p = the smallest rank with  sum_(j <= p) D_j^2  >=  threshold * sum_j D_j^2
    W <- W + U_p D_p V_p^T

Clients that start alike learn much that is alike, so most of a stack's ranks hold little, and what
goes down to each client is p ranks in the place of all clients' ranks together. A threshold of 1 is
FLoRA, but that a stack never has more ranks than its product. M is never formed: two thin QRs and
the SVD of a small core do it (`lowrank`). All else is as in `flora`: clients start afresh, and
those that were away get what they missed.

Departures: the paper's clients go on from the cut, padded or truncated to their own rank; here it
goes into the base, so that no client has less of it than another. p is that of the module that
needs most ranks, so that every module keeps its share; the paper cuts each module at its own. What
was cut is lost.
"""

from collections.abc import Iterable

from fedsieve.algebra import lowrank
from fedsieve.algebra.adapter import Tree
from fedsieve.algebra.budget import Client
from fedsieve.algebra.catchup import fold
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import SCALINGS, Method, Scaling, State, Weighting
from fedsieve.algebra.optim import Optimizer, sgd
from fedsieve.algebra.options import checked
from fedsieve.algebra.payload import Form, Payload
from fedsieve.algebra.replacing import collect
from fedsieve.methods import flora
from fedsieve.settings import Share


@checked
def method(
    *,
    server: Optimizer | None = None,
    threshold: Share = 0.9,
    scaling: Scaling = "server",
    weighting: Weighting = "uniform",
    down_values: Form = "float32",
    up_values: Form = "float32",
) -> Method:
    """FLoRIST. Each client's ratio k / r comes from its budget. `scaling` as in `flexlora`.

    threshold: the share of the squared singular values of each module's stack that is kept
    """
    rescale = SCALINGS[scaling]
    optimizer = sgd() if server is None else server
    whole = flora.method(
        server=server,
        scaling=scaling,
        weighting=weighting,
        down_values=down_values,
        up_values=up_values,
    )

    def merge(state: State, updates: Iterable[tuple[Client, Payload]], key: Key) -> State:
        state, stacks, members = collect(
            optimizer, state, updates, key, weighting=weighting, rescale=rescale
        )
        wide = {p: lowrank.stacked(stacks[p.module]) for p in state.layout.pairs}
        # At least one, of zeros where nothing was learned: factors of no ranks say "the dense
        # change" in a message.
        rank = max([1, *(lowrank.rank_that_keeps(threshold, *stack) for stack in wide.values())])
        factors: Tree = {}
        for pair, stack in wide.items():
            b, factors[pair.a] = lowrank.best_of_rank(*stack, rank)
            factors[pair.b] = state.layout.scale * b
        return fold(state, factors, members, key.round)

    return whole._replace(knobs=frozenset({"ratio"}), merge=merge)
