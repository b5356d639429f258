"""A client's side of a round: bytes in, bytes out.

Every engine runs this same function on its clients, and training starts from the DECODED bytes, so
a simulation cannot be better than the deployment.
"""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

from fedsieve.algebra.adapter import Adapter
from fedsieve.algebra.budget import Client
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import ClientContext, Memory, Method, View
from fedsieve.algebra.payload import LARGEST, magnitude
from fedsieve.train.local import Fit
from fedsieve.wire import decode, encode

Train = Callable[[View, Client, Key], Fit]


class Reply(NamedTuple):
    """What a client sends back.

    update:  the encoded payload, or None when there is nothing to merge; `reason` then says why
    loss:    mean training loss
    compute: seconds in forward, backward and optimizer step; `seconds`: in all, the wire included
    wire:    seconds in decode and encode
    memory:  bytes of the adapter, its gradients and the optimizer's state, and of what the client
             keeps between rounds
    transport: bytes of the messages that carried payload and reply; None where nothing did
    """

    client: Client
    update: bytes | None
    reason: str | None
    loss: float
    steps: int
    seconds: float
    compute: float
    wire: float
    memory: int
    transport: int | None = None


def take_part(
    method: Method,
    train: Train,
    start: Adapter,
    client: Client,
    memory: Memory,
    key: Key,
    message: bytes,
) -> tuple[Reply, Memory]:
    """Decode, train, report, encode. A client whose training diverged keeps its old memory.

    start: the adapter before the first round, which the client drew from the recipe's seed
    Raises WireError if the message does not fit the layout.
    """
    began = time.perf_counter()
    context = ClientContext(client, start, key)
    payload = decode(message, start.layout)
    decoded = time.perf_counter()
    view, caught_up = method.view(payload, memory, context)
    fit = train(view, client, key)
    reason = _unusable(fit)
    update = None
    wire = decoded - began
    if reason is None:
        report, memory = method.report(view, fit.tensors, caught_up, context)
        reported = time.perf_counter()
        update = encode(report)
        wire += time.perf_counter() - reported
    seconds = time.perf_counter() - began
    held = fit.memory + sum(t.nbytes for group in memory.values() for t in group.values())
    reply = Reply(client, update, reason, fit.loss, fit.steps, seconds, fit.compute, wire, held)
    return reply, memory


def _unusable(fit: Fit) -> str | None:
    if not math.isfinite(fit.loss):
        return (
            f"the training loss became {fit.loss} (a lower training.lr or training.clip may help)"
        )
    for name, tensor in fit.tensors.items():
        found = magnitude(tensor)
        if not found <= LARGEST:  # NaN is not
            what = f"beyond {LARGEST:.1e}" if math.isfinite(found) else "that are not finite"
            return f"the trained {name} holds numbers {what} (a lower training.lr may help)"
    return None
