"""RAVAN: several heads, a square core in each, frozen factors (Raje et al. 2025, arXiv 2506.05568).

    client i trains       W0 + s sum_j g_ij B_j R_ij A_j       g_ij = 1 at the beginning of a round
    the server averages   R_j <- mean_i g_ij R_ij

B_j (m, r/h) and A_j (r/h, n) of the h heads are the same at all clients, never move, and stand at
right angles to those of the other heads (`algebra.cores`). A product of h heads has rank r, as
LoRA's, and costs r r / h numbers a module. Clients send the products g R and no g, so that the mean
of what they send is the mean of their weights.

A client of little means trains k of the h heads, k from its ratio, and sends these alone. The
others stand still and have their part in its forward pass, so it gets all of them. In the mean a
head that a client did not train counts as unchanged: the exact mean of the clients' weights.

Choices of ours: which heads a client trains is drawn anew each round, uniformly, from the client's
name and the round (the paper also ranks them by norms of weights or gradients); R begins at zero;
the heads share `lora.rank`, which h must divide.
"""

from pydantic import PositiveInt

from fedsieve.algebra.adapter import Layout, Tree
from fedsieve.algebra.budget import Client
from fedsieve.algebra.cores import Cores, gain_of, head_of, no_gains
from fedsieve.algebra.keys import Key, word
from fedsieve.algebra.method import (
    ClientContext,
    Memory,
    Method,
    View,
    Weighting,
    compose,
    difference,
)
from fedsieve.algebra.optim import Optimizer
from fedsieve.algebra.options import checked
from fedsieve.algebra.payload import Form, Payload
from fedsieve.algebra.sieve import dense, only
from fedsieve.algebra.support import Support, draw_ranks


@checked
def method(
    *,
    heads: PositiveInt = 4,
    server: Optimizer | None = None,
    weighting: Weighting = "uniform",
    down_values: Form = "float32",
    up_values: Form = "float32",
) -> Method:
    """RAVAN. How many heads a client trains comes from its budget's ratio.

    heads: h, which share the rank evenly
    """
    inner = compose(
        down=only(no_gains),
        up=dense,
        knobs=frozenset({"ratio"}),
        shared=no_gains,
        server=server,
        weighting=weighting,
        down_values=down_values,
        up_values=up_values,
        trains=Cores(heads, gains=True),
    )

    def trained(layout: Layout, client: Client, number: int) -> tuple[str, ...]:
        """The tensors that a client trains in a round: its heads', and what is beside the pairs."""
        chosen = heads_of(client, heads, number)
        return tuple(n for n in layout.names if head_of(n) is None or head_of(n) in chosen)

    def view(payload: Payload, memory: Memory, context: ClientContext) -> tuple[View, Memory]:
        seen, memory = inner.view(payload, memory, context)
        names = trained(payload.layout, context.client, context.key.round)
        return seen._replace(moves=Support(names, None, {})), memory

    def report(
        view: View, trained: Tree, memory: Memory, context: ClientContext
    ) -> tuple[Payload, Memory]:
        products = {n: t * trained[g] for n, t in trained.items() if (g := gain_of(n)) is not None}
        return inner.report(view, {**trained, **products}, memory, context)

    def misfit(update: Payload, sent: Support, client: Client, key: Key) -> str | None:
        shared = set(no_gains(update.layout, key.round))
        names = tuple(n for n in trained(update.layout, client, key.round) if n in shared)
        return difference(update, Support(names, None, {}), up_values, places=False)

    return inner._replace(view=view, report=report, misfit=misfit)


def heads_of(client: Client, heads: int, number: int) -> set[int]:
    """The heads that a client trains in round `number`: as many of them as its ratio says.

    Not from the run's seed: a private run's server has another than its clients.
    """
    draw = word(Key(0, number, client.id, "heads"))
    chosen: list[int] = draw_ranks(draw, 1, heads, client.budget.ranks(heads), shared=True)[
        0
    ].tolist()
    return set(chosen)
