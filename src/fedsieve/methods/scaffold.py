"""SCAFFOLD: clients that each pull their own way are corrected by what all of them pull
(Karimireddy et al. 2020, arXiv 1910.06378, Algorithm 1 with option II), on dense LoRA.

    client i steps along   g_i(y) - c_i + c            from y = x
    and keeps              c_i <- c_i - c + (x - y) / p
    the server moves       x by the mean change, as FedIT does
                           c = the mean of the c_i of all clients that have taken part

Local steps of FedAvg end where each client's own loss is small; the more steps, the further from
where their mean is. c_i is the mean of the gradients of a client's last steps, c the mean of those:
with both, a client's steps follow the common loss. As the added gradient is constant over a round,
it is that of a term (c - c_i) . (y - x) in the local loss.

p is how far the steps of a round move a number whose gradient is always one: K lr for K plain
steps. Here SGD may have momentum, and p holds its sum. Both ends know p from the recipe and the
client's number of rows, so the server works out the change of c_i from the change of y that it gets
anyway: an upload is FedIT's to the byte, half of the paper's. A download holds c as well
(`Payload.control`), from a client's second round on.

Departures. A client that is new begins with c_i = c, and not with zero: it is not corrected, and
gets no c. With zero it would be corrected by c alone, a second gradient on top of its own. As those
that never took part stand for c itself, c is the mean of the others, whatever the number of clients
is; and over all clients the corrections c - c_i add up to nothing, as in the paper. Each message is
rounded as its form says, and both ends go on from what was rounded. Clients count alike.
"""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from fedsieve.algebra.adapter import Tree
from fedsieve.algebra.budget import Client
from fedsieve.algebra.keys import Key, generator
from fedsieve.algebra.method import ClientContext, Memory, Method, State, Unbounded, View, compose
from fedsieve.algebra.optim import Optimizer, limits
from fedsieve.algebra.options import checked
from fedsieve.algebra.payload import Form, Payload, rounded
from fedsieve.algebra.sieve import dense
from fedsieve.algebra.support import everything, gather
from fedsieve.errors import FedSieveError, WireError
from fedsieve.settings import Training, steps_of

CONTROL = "control"  # the sum of the c_i at the server, c_i at a client
_CAME = "came"  # c, while a client trains
_COUNTED = "counted"  # whose c_i are in the sum


@checked
def method(
    *,
    server: Optimizer | None = None,
    down_values: Form = "float32",
    up_values: Form = "float32",
) -> Method:
    """SCAFFOLD. Budgets have no say; clients train with plain SGD, with or without momentum."""
    return _method(server, down_values, up_values, lambda number: Training())


def _method(
    server: Optimizer | None,
    down_values: Form,
    up_values: Form,
    training: Callable[[int], Training],
) -> Method:
    """training: a round's number -> how clients train in it."""
    if server is not None and limits(server):
        raise Unbounded("merge")  # c moves by more than the clipped update says
    inner = compose(
        down=dense, up=dense, server=server, down_values=down_values, up_values=up_values
    )

    def pulled(update: Payload, common: Tree, client: Client, number: int) -> Tree:
        """What a client's c_i changes by."""
        now = training(number)
        far = pace(now, steps_of(client.examples, now))
        return _plus({n: t / far for n, t in update.tree().items()}, common, -1)

    def control(state: State, key: Key) -> Payload | None:
        """c, rounded alike for all clients: the server goes on from what they were sent."""
        counted = len(state.trees.get(_COUNTED, {}))
        if not counted:
            return None
        mean = {name: total / counted for name, total in state.trees[CONTROL].items()}
        support = everything(state.layout)
        draws = generator(key._replace(client="").at("round control"))
        values = rounded(gather(mean, support).cpu(), down_values, draws)
        return Payload(state.layout, support, values, "known", "known")

    def known(state: State, client: Client) -> bool:
        return client.id in state.trees.get(_COUNTED, {})

    def publish(plan: State, client: Client, key: Key) -> Payload:
        sent = inner.publish(plan, client, key)
        return sent._replace(control=control(plan, key)) if known(plan, client) else sent

    def view(payload: Payload, memory: Memory, context: ClientContext) -> tuple[View, Memory]:
        seen, memory = inner.view(payload, memory, context)
        if payload.control is None:
            return seen, memory
        if CONTROL not in memory:
            raise WireError(
                "the server counts on a control variate that this client has not kept: put back "
                "what it kept, or go back to a round before its first update (--at-round)"
            )
        common = payload.control.tree()
        added = _plus(common, memory[CONTROL], -1)
        seen = seen._replace(penalty=_along(added, seen.adapter.tensors))
        return seen, {**memory, _CAME: common}

    def report(
        view: View, trained: Tree, memory: Memory, context: ClientContext
    ) -> tuple[Payload, Memory]:
        update, _ = inner.report(view, trained, {}, context)
        came = memory.get(_CAME)
        new = pulled(update, came or {}, context.client, context.key.round)
        return update, {CONTROL: new if came is None else _plus(new, memory[CONTROL])}

    def merge(state: State, updates: Iterable[tuple[Client, Payload]], key: Key) -> State:
        sent = control(state, key)
        common = {} if sent is None else sent.tree()
        total: Tree = state.trees.get(CONTROL, {})
        counted: Tree = dict(state.trees.get(_COUNTED, {}))

        def noted() -> Iterator[tuple[Client, Payload]]:
            nonlocal total
            for client, update in updates:
                told = common if known(state, client) else {}
                total = _plus(pulled(update, told, client, key.round), total)
                counted[client.id] = torch.tensor(1)
                yield client, update
                del update  # before the next one is decoded

        merged = inner.merge(state, noted(), key)
        return State(merged.layout, {**merged.trees, CONTROL: total, _COUNTED: counted})

    def trained_by(training: Callable[[int], Training]) -> Method:
        _refuse(training(1))
        return _method(server, down_values, up_values, training)

    return inner._replace(
        publish=publish,
        view=view,
        report=report,
        merge=merge,
        linear=False,
        keeps=True,
        counts=True,
        trained_by=trained_by,
    )


def pace(training: Training, steps: int) -> float:
    """How far so many steps move a number whose gradient is one in each of them.

    A step takes (far, speed, 1) to (far + lr (m speed + 1), m speed + 1, 1). How many they are may
    be what a site says, so they are not gone through one by one.
    """
    lr, momentum = training.lr, training.momentum
    step = np.array([[1, lr * momentum, lr], [0, momentum, 1], [0, 0, 1]])
    return float(np.linalg.matrix_power(step, steps)[0, 2])


def _along(added: Tree, start: Tree) -> Callable[[Tree], Tensor]:
    """What a loss gains so that its gradient gains `added`; nothing at the start."""

    def term(tree: Tree) -> Tensor:
        parts = [
            (tree[n] - start[n].to(tree[n])).mul(t.to(tree[n])).sum() for n, t in added.items()
        ]
        return torch.stack(parts).sum()

    return term


def _plus(tree: Tree, other: Tree, times: float = 1) -> Tree:
    """The sum of two trees; what the other lacks counts as zero there."""
    return {n: t + times * other[n] if n in other else t for n, t in tree.items()}


def _refuse(training: Training) -> None:
    """Raises FedSieveError for training whose change does not tell the mean of its gradients."""
    odd = {
        "function": training.function is not None,
        "optimizer": training.optimizer != "sgd",
        "weight_decay": training.weight_decay > 0,
        "clip": training.clip is not None,
        "proximal": training.proximal > 0,
        "packing": training.packing,
    }
    for name, found in odd.items():
        if found:
            raise FedSieveError(
                f"training.{name}: the method scaffold takes a client's mean gradient from how far "
                'plain SGD moved: it needs training.optimizer = "sgd", and none of weight_decay, '
                "clip, proximal, packing and function"
            )
