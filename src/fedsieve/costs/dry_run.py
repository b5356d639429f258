"""A few rounds of a method over random numbers: its own functions, with no model and no data.

Each client's "training" adds noise to what it may move, and every message is really encoded and
decoded. What a method costs (costs.py), and whether its server could do with the sum of what its
clients send (sums.py), is read off such rounds and not derived from formulas a method.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from fedsieve.algebra.adapter import Adapter, Layout, Tree
from fedsieve.algebra.budget import Client
from fedsieve.algebra.keys import Key, generator
from fedsieve.algebra.method import ClientContext, Memory, Method, State, View
from fedsieve.algebra.payload import Payload
from fedsieve.errors import FedSieveError, quoted
from fedsieve.wire import decode, encode_for

ROUNDS = 3  # by then masks have begun, and the base has changed


class Part(NamedTuple):
    """One client's round: the messages down and up, the decoded upload, and what it then keeps.

    start, got: the adapter that both ends drew, and what of the message down was decoded
    """

    client: Client
    view: View
    memory: Memory
    down: bytes
    up: bytes
    update: Payload
    start: Adapter
    got: Payload


class Rehearsed(NamedTuple):
    """One round: the state before it, its key, and what each client did."""

    state: State
    key: Key
    parts: list[Part]


def rounds(method: Method, layout: Layout, clients: Sequence[Client]) -> Iterator[Rehearsed]:
    """So many rounds in which all clients take part."""
    begun = start(layout)
    state = method.init(begun)
    memories: dict[str, Memory] = {}
    for number in range(1, ROUNDS + 1):
        key = Key(0, number)
        plan = method.plan(state, key)
        parts = []
        for client in clients:
            part = take_part(method, plan, begun, client, memories.get(client.id, {}), key)
            memories[client.id] = part.memory
            parts.append(part)
        yield Rehearsed(state, key, parts)
        state = method.merge(state, ((part.client, part.update) for part in parts), key)


def take_part(
    method: Method, plan: State, start: Adapter, client: Client, memory: Memory, key: Key
) -> Part:
    """One client's part in a round of this plan and key."""
    context = ClientContext(client, start, key._replace(client=client.id))
    payload = method.publish(plan, client, context.key)
    down = encode_for(payload)
    got = decode(down, start.layout)
    view, memory = method.view(got, memory, context)
    report, memory = method.report(view, moved(view, context.key), memory, context)
    up = encode_for(report, payload.support)
    update = decode(up, start.layout, payload.support)
    return Part(client, view, memory, down, up, update, start, got)


def start(layout: Layout) -> Adapter:
    """Random numbers in the layout's shapes, B zero as LoRA has it."""
    tensors: Tree = {}
    for name in layout.names:
        if layout.rank_axis.get(name, (0, 0))[1] == 1:
            tensors[name] = torch.zeros(layout.shapes[name])
        else:
            draws = generator(Key(0, purpose=name))
            tensors[name] = 0.05 * torch.randn(layout.shapes[name], generator=draws)
    return Adapter(layout, tensors)


def moved(view: View, key: Key) -> Tree:
    """The view's tensors after noise was added to what may move."""
    trained = dict(view.adapter.tensors)
    for name in view.moves.names:
        if name not in trained:
            raise FedSieveError(f"the method trains {quoted(name)}, which the adapter has not")
        noise = torch.randn(trained[name].shape, generator=generator(key.at(f"moved {name}")))
        trained[name] = trained[name] + 0.01 * noise * view.moves.masks.get(name, 1)
    return trained
