"""FedSA-LoRA: A is shared, B stays with its client (Guo et al. 2024, arXiv 2410.01463).

    client i trains     W0 + s B_i A          both factors; B_i its own, from its own last round
    A <- mean_i A_i     B_i is never sent

A learns what is common, B what is the client's own. There is no single global model: each client's
is A with its own B_i (`Method.personal`), and that is what is evaluated, client by client. What
`export` gives has the B of a client that never took part: zero. The head is shared, as A is.
"""

from fedsieve.algebra.adapter import Adapter, Tree
from fedsieve.algebra.method import ClientContext, Memory, Method, View, Weighting, compose
from fedsieve.algebra.optim import Optimizer
from fedsieve.algebra.options import checked
from fedsieve.algebra.payload import Form, Payload
from fedsieve.algebra.sieve import all_but_b, dense, only


@checked
def method(
    *,
    server: Optimizer | None = None,
    weighting: Weighting = "uniform",
    down_values: Form = "float32",
    up_values: Form = "float32",
) -> Method:
    """FedSA-LoRA. Budgets have no say."""
    inner = compose(
        down=only(all_but_b),
        up=dense,
        shared=all_but_b,
        server=server,
        weighting=weighting,
        down_values=down_values,
        up_values=up_values,
    )

    def view(payload: Payload, memory: Memory, context: ClientContext) -> tuple[View, Memory]:
        seen, memory = inner.view(payload, memory, context)
        return seen._replace(adapter=personal(seen.adapter, memory)), memory

    def report(
        view: View, trained: Tree, memory: Memory, context: ClientContext
    ) -> tuple[Payload, Memory]:
        payload, memory = inner.report(view, trained, memory, context)
        own = {pair.b: trained[pair.b] for pair in view.layout.pairs}
        return payload, {**memory, "own": own}

    return inner._replace(view=view, report=report, personal=personal, keeps=True)


def personal(adapter: Adapter, memory: Memory) -> Adapter:
    """The shared A and head with a client's own B."""
    return adapter._replace(tensors={**adapter.tensors, **memory.get("own", {})})
