"""A client's side of a round: bytes in, bytes out.

Every engine runs this same function on its clients, and training starts from the DECODED bytes, so
a simulation cannot be better than the deployment.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fedsieve.algebra.adapter import Adapter
from fedsieve.algebra.budget import Client
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import ClientContext, Memory, Method, View
from fedsieve.algebra.payload import LARGEST, magnitude
from fedsieve.algebra.support import Support
from fedsieve.errors import WireError, of_memory
from fedsieve.train.local import Fit
from fedsieve.wire import decode, encode_for

Train = Callable[[View, Client, Key], Fit]
TrainTogether = Callable[[Sequence[tuple[View, Client, Key]]], list[Fit]]


class Reply(NamedTuple):
    """What a client sends back.

    update:  the encoded payload, or None when there is nothing to merge; `reason` then says why
    loss:    mean training loss; NaN where none was told
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


def facts(reply: Reply) -> dict[str, Any]:
    """What a reply says beside its update, as JSON has words for it: there is none for NaN."""
    return {
        "reason": reply.reason,
        "loss": reply.loss if math.isfinite(reply.loss) else None,
        "steps": reply.steps,
        "seconds": reply.seconds,
        "compute": reply.compute,
        "wire": reply.wire,
        "memory": reply.memory,
    }


MOST_LOSS = 1e15  # beyond which none is of any training; a server takes no larger one from a site


class Asked(NamedTuple):
    """What a client is asked in a round. memory: what it kept; key: of the round and the client;
    message: the encoded payload
    """

    client: Client
    memory: Memory
    key: Key
    message: bytes


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
    asked = Asked(client, memory, key, message)
    began = _begin(method, start, asked)
    before = time.perf_counter()
    try:
        fit = train(began.view, asked.client, asked.key)
    except Exception as error:
        if of_memory(error):
            error.add_note(f"client {client.id!r}, round {key.round}")
        raise
    return _end(method, began, asked, fit, time.perf_counter() - before)


def take_part_together(
    method: Method, train: TrainTogether, start: Adapter, asked: Sequence[Asked]
) -> list[tuple[Reply, Memory]]:
    """`take_part` of several clients, who are trained at once. Of the seconds that this takes, each
    has its share by `Fit.compute`.
    """
    began = [_begin(method, start, each) for each in asked]
    before = time.perf_counter()
    fits = train([(b.view, a.client, a.key) for b, a in zip(began, asked, strict=True)])
    seconds = time.perf_counter() - before
    whole = sum(fit.compute for fit in fits)
    return [
        _end(method, b, a, fit, seconds * (fit.compute / whole if whole else 1 / len(fits)))
        for b, a, fit in zip(began, asked, fits, strict=True)
    ]


class _Began(NamedTuple):
    """A client before it trains.

    sent: what of the server's layout arrived; seconds: until then, of them `wire` in decode
    """

    context: ClientContext
    sent: Support
    view: View
    memory: Memory
    seconds: float
    wire: float


def _begin(method: Method, start: Adapter, asked: Asked) -> _Began:
    began = time.perf_counter()
    context = ClientContext(asked.client, start, asked.key)
    payload = decode(asked.message, start.layout)
    wire = time.perf_counter() - began
    view, caught_up = method.view(payload, asked.memory, context)
    return _Began(context, payload.support, view, caught_up, time.perf_counter() - began, wire)


def _end(
    method: Method, began: _Began, asked: Asked, fit: Fit, trained: float
) -> tuple[Reply, Memory]:
    """trained: seconds"""
    start = time.perf_counter()
    reason, update, memory, wire = _unusable(fit), None, asked.memory, began.wire
    if reason is None:
        report, memory = method.report(began.view, fit.tensors, began.memory, began.context)
        reported = time.perf_counter()
        try:
            update = encode_for(report, began.sent)
        except WireError as error:  # a method of the user's own may give anything
            reason, memory = f"what the method reports cannot be sent: {error}", asked.memory
        wire += time.perf_counter() - reported
    seconds = began.seconds + trained + time.perf_counter() - start
    held = fit.memory + sum(t.nbytes for group in memory.values() for t in group.values())
    client = asked.client
    loss = fit.loss if abs(fit.loss) <= MOST_LOSS else math.nan
    reply = Reply(client, update, reason, loss, fit.steps, seconds, fit.compute, wire, held)
    return reply, memory


def _unusable(fit: Fit) -> str | None:
    if fit.told and not abs(fit.loss) <= MOST_LOSS:
        return (
            f"the training loss became {fit.loss} (a lower training.lr or training.clip may help)"
        )
    for name, tensor in fit.tensors.items():
        found = magnitude(tensor)
        if not found <= LARGEST:  # NaN is not
            what = f"beyond {LARGEST:.1e}" if math.isfinite(found) else "that are not finite"
            return f"the trained {name} holds numbers {what} (a lower training.lr may help)"
    return None
