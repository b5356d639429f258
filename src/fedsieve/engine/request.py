"""One client's round as a request to a worker, and the worker's answer: both are frames.

What crosses is what a client has and gives anyway: the message to it, its memory, its update. The
memory goes both ways, as safetensors, because it stays with whoever keeps the run: a checkpoint
needs it, and any worker can train any client.
"""

import math
from collections.abc import Callable
from typing import Any

import safetensors.torch
from torch import Tensor

from fedsieve.algebra.adapter import Adapter
from fedsieve.algebra.budget import Budget, Client, Link
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import Memory, Method, View
from fedsieve.engine.client import Reply, facts, take_part
from fedsieve.errors import FedSieveError
from fedsieve.frame import Frame, pack, unpack
from fedsieve.train.local import Fit

Rows = tuple[int, int]  # of a client: where its rows' numbers begin and end among those of all
Fitting = Callable[[View, Client, Key, Rows], Fit]


def request(client: Client, key: Key, rows: Rows, memory: Memory, message: bytes) -> bytes:
    """Ask for a client's part in a round. key: of the round."""
    head: dict[str, Any] = {
        "do": "train",
        "client": client._asdict(),
        "seed": key.seed,
        "round": key.round,
        "rows": rows,
        "groups": sorted(memory),
        "message": len(message),
    }
    return pack(Frame(head, message + _bytes(memory)))


def work(method: Method, fitting: Fitting, start: Adapter, asked: Frame) -> Frame:
    """Do what a request asks. start: as in `take_part`, which this is.

    Raises WireError as `take_part` does.
    """
    head = asked.header
    client = _client(head["client"])
    key = Key(head["seed"], head["round"], client.id)
    rows: Rows = (head["rows"][0], head["rows"][1])
    length = head["message"]
    before = _memory(asked.body[length:], head["groups"])

    def train(view: View, client: Client, key: Key) -> Fit:
        return fitting(view, client, key, rows)

    reply, after = take_part(method, train, start, client, before, key, asked.body[:length])
    update, kept = reply.update or b"", b"" if after is before else _bytes(after)
    said = {
        "ok": True,
        **facts(reply),
        "update": None if reply.update is None else len(update),
        "groups": None if after is before else sorted(after),
    }
    return Frame(said, update + kept)


def reply_of(client: Client, answer: bytes) -> tuple[Reply, Memory | None]:
    """What a worker answered for a client, and the client's memory, or None where it stays.

    Raises FedSieveError for what a worker met that the user can mend, RuntimeError with the
    worker's own traceback for anything else.
    """
    said, body = unpack(answer)
    if not said["ok"]:
        if said.get("ours"):
            raise RuntimeError(f"client {client.id}, in a worker:\n{said['error']}")
        raise FedSieveError(said["error"])
    length = said["update"]
    reply = Reply(
        client,
        None if length is None else body[:length],
        said["reason"],
        math.nan if said["loss"] is None else said["loss"],
        said["steps"],
        said["seconds"],
        said["compute"],
        said["wire"],
        said["memory"],
    )
    memory = None if said["groups"] is None else _memory(body[length or 0 :], said["groups"])
    return reply, memory


def _client(told: dict[str, Any]) -> Client:
    link = None if told["link"] is None else Link(*told["link"])
    budget = Budget(*told["budget"])
    return Client(told["id"], told["examples"], budget, link, told["step_seconds"])


def _bytes(memory: Memory) -> bytes:
    flat: dict[str, Tensor] = {}
    seen: set[int] = set()
    for group, tree in memory.items():
        for name, tensor in tree.items():
            # safetensors writes no tensor that lies where another does.
            shared = tensor.untyped_storage().data_ptr() in seen
            seen.add(tensor.untyped_storage().data_ptr())
            flat[f"{group}/{name}"] = tensor.clone() if shared else tensor.contiguous()
    data: bytes = safetensors.torch.save(flat) if flat else b""
    return data


def _memory(data: bytes, groups: list[str]) -> Memory:
    memory: Memory = {group: {} for group in groups}
    for full, tensor in (safetensors.torch.load(data) if data else {}).items():
        group, name = full.split("/", 1)
        memory[group][name] = tensor
    return {group: dict(sorted(tree.items())) for group, tree in memory.items()}
