"""The in-process engine: the clients of a cohort run one after another, here.

The bytes go nowhere, but they are really encoded and decoded, and each client sees only them.
"""

from collections.abc import Iterable, Iterator

from fedsieve.adapter import Layout
from fedsieve.budget import Client
from fedsieve.engine.client import Reply, Train, take_part
from fedsieve.engine.loop import Exchange
from fedsieve.keys import Key
from fedsieve.method import Memory, Method


def in_process(
    method: Method, train: Train, layout: Layout, memories: dict[str, Memory]
) -> Exchange:
    """An exchange that trains each client when its message comes.

    memories: what each client keeps between rounds, by id. It changes only when a round is through,
    so that a round which was broken off leaves no trace.
    """

    def exchange(messages: Iterable[tuple[Client, bytes]], key: Key) -> Iterator[Reply]:
        fresh: dict[str, Memory] = {}
        for client, message in messages:
            own = key._replace(client=client.id)
            memory = memories.get(client.id, {})
            reply, memory = take_part(method, train, layout, client, memory, own, message)
            if memory:
                fresh[client.id] = memory
            yield reply
        memories.update(fresh)

    return exchange
