"""The in-process engine: the clients of a cohort run one after another, here.

The bytes go nowhere, but they are really encoded and decoded, and each client sees only them.
"""

from collections.abc import Callable, Collection, Iterable, Iterator

from fedsieve.algebra.adapter import Adapter
from fedsieve.algebra.budget import Client
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import Memory, Method
from fedsieve.clients.network import client_time
from fedsieve.engine.client import Asked, Reply, Train, take_part
from fedsieve.engine.held import Held
from fedsieve.engine.loop import Exchange
from fedsieve.errors import FedSieveError

Take = Callable[[Iterator[Asked]], Iterator[tuple[Reply, Memory]]]


def in_process(
    method: Method, train: Train, start: Adapter, memories: dict[str, Memory]
) -> Exchange:
    """An exchange that trains each client when its message comes.

    start: the adapter before the first round
    memories: what each client keeps between rounds, by id
    """
    return remembering(alone(method, train, start), memories)


def alone(method: Method, train: Train, start: Adapter) -> Take:
    """One client after another, each when it is asked."""
    return lambda asked: (take_part(method, train, start, *each) for each in asked)


def remembering(take: Take, memories: dict[str, Memory]) -> Exchange:
    """An exchange whose clients take part here, and keep between rounds what `memories` holds, by
    id.

    take: what clients are asked -> in the same order their replies, and what they keep then
    """
    fresh: dict[str, Memory] = {}
    held = Held(memories.values())

    def carry(messages: Iterable[tuple[Client, bytes]], key: Key) -> Iterator[Reply]:
        fresh.clear()
        asked = (
            Asked(client, memories.get(client.id, {}), key._replace(client=client.id), message)
            for client, message in messages
        )
        for reply, memory in take(asked):
            if memory:
                fresh[reply.client.id] = held.once(memory)
            yield reply

    def settle(merged: Collection[str]) -> None:
        memories.update({id: memory for id, memory in fresh.items() if id in merged})

    return Exchange(carry, settle)


def punctual(exchange: Exchange, size: int) -> Exchange:
    """The same exchange, with a reason on the updates that come after the first `size` that could
    be merged.

    Clients run one after another here, so when a reply would have come is worked out from its bytes
    and steps, and all encoded updates are held until it is known. A client that has no update says
    so at once and keeps nobody waiting; of equal times the smaller id counts as earlier. Raises
    FedSieveError for a client without link and seconds a step.
    """
    came = 0

    def usable(count: int) -> None:
        nonlocal came
        came = count

    def carry(messages: Iterable[tuple[Client, bytes]], key: Key) -> Iterator[Reply]:
        usable(0)
        down: dict[str, int] = {}

        def counted() -> Iterator[tuple[Client, bytes]]:
            for client, message in messages:
                down[client.id] = len(message)
                yield client, message

        held = list(exchange.carry(counted(), key))
        seconds = {reply.client.id: _seconds(reply, down[reply.client.id]) for reply in held}
        closed = 0.0
        for reply in sorted(held, key=lambda reply: (seconds[reply.client.id], reply.client.id)):
            took = seconds[reply.client.id]
            if reply.update is None:
                yield reply
            elif came < size:
                closed = took
                yield reply
            else:
                when = f"its update took {took:.4g} s, and the round had its {size} after"
                yield reply._replace(reason=f"late: {when} {closed:.4g} s")

    return exchange._replace(carry=carry, usable=usable)


def _seconds(reply: Reply, down: int) -> float:
    """When a reply would have come, counted from the round's start. down: bytes of its message"""
    link, step = reply.client.link, reply.client.step_seconds
    if link is None or step is None:
        raise FedSieveError(
            f"client {reply.client.id!r} has no link or no seconds a step: with sampling.extra "
            "every client needs both"
        )
    if reply.update is None:
        return 0.0
    return client_time(link, down, len(reply.update), reply.steps * step)
