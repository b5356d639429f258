"""The in-process engine: the clients of a cohort run one after another, here.

The bytes go nowhere, but they are really encoded and decoded, and each client sees only them.
"""

from collections.abc import Collection, Iterable, Iterator

import torch

from fedsieve.algebra.adapter import Adapter, Tree
from fedsieve.algebra.budget import Client
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import Memory, Method
from fedsieve.clients.network import client_time
from fedsieve.clients.sampling import late
from fedsieve.engine.client import Reply, Train, take_part
from fedsieve.engine.loop import Exchange
from fedsieve.errors import FedSieveError


def in_process(
    method: Method, train: Train, start: Adapter, memories: dict[str, Memory]
) -> Exchange:
    """An exchange that trains each client when its message comes.

    start: the adapter before the first round
    memories: what each client keeps between rounds, by id
    """
    fresh: dict[str, Memory] = {}

    def carry(messages: Iterable[tuple[Client, bytes]], key: Key) -> Iterator[Reply]:
        fresh.clear()
        for client, message in messages:
            own = key._replace(client=client.id)
            memory = memories.get(client.id, {})
            reply, memory = take_part(method, train, start, client, memory, own, message)
            if memory:
                fresh[client.id] = held_once(memory, [*fresh.values(), *memories.values()])
            yield reply

    def settle(merged: Collection[str]) -> None:
        memories.update({id: memory for id, memory in fresh.items() if id in merged})

    return Exchange(carry, settle)


def punctual(exchange: Exchange, size: int) -> Exchange:
    """The same exchange, with a reason on the replies that come after the first `size` updates.

    Clients run one after another here, so when a reply would have come is worked out from its bytes
    and steps, and all encoded updates are held until it is known. A client that has no update says
    so at once and keeps nobody waiting. Raises FedSieveError for a client without link and seconds
    a step.
    """

    def carry(messages: Iterable[tuple[Client, bytes]], key: Key) -> Iterator[Reply]:
        down: dict[str, int] = {}

        def counted() -> Iterator[tuple[Client, bytes]]:
            for client, message in messages:
                down[client.id] = len(message)
                yield client, message

        held = list(exchange.carry(counted(), key))
        seconds = {}
        for reply in held:
            link, step = reply.client.link, reply.client.step_seconds
            if link is None or step is None:
                raise FedSieveError(
                    f"client {reply.client.id!r} has no link or no seconds a step: with "
                    "sampling.extra every client needs both"
                )
            if reply.update is not None:
                work = reply.steps * step
                up = len(reply.update)
                seconds[reply.client.id] = client_time(link, down[reply.client.id], up, work)
        reasons = late(seconds, size)
        for reply in held:
            yield reply._replace(reason=reasons.get(reply.client.id, reply.reason))

    return exchange._replace(carry=carry)


def held_once(memory: Memory, others: Iterable[Memory]) -> Memory:
    """A memory whose groups are other clients' own where they hold the same numbers.

    Clients that caught up with the same base (FLoRA) would otherwise hold a copy of it each, here
    and in every checkpoint.
    """
    for other in others:
        for group, tree in memory.items():
            if group in other and tree is not other[group] and _equal(tree, other[group]):
                memory = {**memory, group: other[group]}
    return memory


def _equal(tree: Tree, other: Tree) -> bool:
    return tree.keys() == other.keys() and all(torch.equal(t, other[n]) for n, t in tree.items())
