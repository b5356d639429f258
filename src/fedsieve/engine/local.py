"""The in-process engine: the clients of a cohort run one after another, here.

The bytes go nowhere, but they are really encoded and decoded, and each client sees only them.
"""

from collections.abc import Collection, Iterable, Iterator

import torch

from fedsieve.adapter import Adapter, Tree
from fedsieve.budget import Client
from fedsieve.engine.client import Reply, Train, take_part
from fedsieve.engine.loop import Exchange
from fedsieve.keys import Key
from fedsieve.method import Memory, Method


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
                fresh[client.id] = _held_once(memory, [*fresh.values(), *memories.values()])
            yield reply

    def settle(merged: Collection[str]) -> None:
        memories.update({id: memory for id, memory in fresh.items() if id in merged})

    return Exchange(carry, settle)


def _held_once(memory: Memory, others: Iterable[Memory]) -> Memory:
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
