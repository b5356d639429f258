"""One client's round as a request to a worker, and the worker's answer: both are frames.

What crosses is what a client has and gives anyway: the message to it, its memory, its update. The
memory goes both ways, as safetensors, because it stays with whoever keeps the run: a checkpoint
needs it, and any worker can train any client.
"""

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import safetensors.torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from fedsieve.algebra.adapter import Adapter
from fedsieve.algebra.budget import Budget, Client, Link
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import Memory, Method, View
from fedsieve.disk import tensors_read
from fedsieve.engine.client import Reply, facts, take_part
from fedsieve.errors import FedSieveError, WireError, quoted
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
        "client": client.id,
        "round": key.round,
        **facts(reply),
        "update": None if reply.update is None else len(update),
        "groups": None if after is before else sorted(after),
    }
    return Frame(said, update + kept)


def reply_of(client: Client, number: int, answer: bytes) -> tuple[Reply, Memory | None]:
    """What a worker answered for a client in a round, and the client's memory, or None where it
    stays.

    Raises FedSieveError for what a worker met that the user can mend, and for what no worker
    answers; RuntimeError with the worker's own traceback for anything else.
    """
    try:
        header, body = unpack(answer)
        refuse_failed(header, f"client {client.id}, in a worker")
        said, memory = _checked(client, number, header, body)
    except WireError as error:
        raise FedSieveError(
            f"a worker answers for client {client.id!r} what none does ({str(error)[:200]}): is "
            "another version of FedSieve installed where it runs?"
        ) from error
    update = None if said.update is None else body[: said.update]
    loss = math.nan if said.loss is None else said.loss
    times = (said.seconds, said.compute, said.wire)
    return Reply(client, update, said.reason, loss, said.steps, *times, said.memory), memory


def _checked(
    client: Client, number: int, header: Mapping[str, Any], body: bytes
) -> tuple["_Said", Memory | None]:
    """What an answer says, and the client's memory in it. Raises WireError for what no worker says
    of this client and this round.
    """
    try:
        said = _Said.model_validate({name: header.get(name) for name in _Said.model_fields})
    except ValidationError as error:
        first = error.errors()[0]
        raise WireError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    if (said.client, said.round) != (client.id, number):
        raise WireError(f"it is of {quoted(said.client)} and round {said.round}")
    length = said.update or 0
    if length > len(body):
        raise WireError(f"its update is {len(body)} bytes long, and not {length}")
    try:
        return said, None if said.groups is None else _memory(body[length:], said.groups)
    except ValueError as error:
        raise WireError(str(error)) from error


def refuse_failed(said: Mapping[str, Any], whose: str) -> None:
    """Raises FedSieveError for a worker's answer that it could not do what was asked, RuntimeError
    where that is a fault of ours, and WireError for one that says neither.
    """
    if said.get("ok") is True:
        return
    error = said.get("error")
    if said.get("ok") is not False or not isinstance(error, str):
        raise WireError("it says neither that it is done nor why it is not")
    if said.get("ours"):
        raise RuntimeError(f"{whose}:\n{error}")
    raise FedSieveError(error)


_Seconds = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
_LOSS = 1e39  # beyond any float32
_Count = Annotated[int, Field(ge=0, le=2**62)]


class _Said(BaseModel):
    """The head of an answer: whose it is, `client.facts`, and how long the update is."""

    model_config = ConfigDict(strict=True)

    client: str
    round: _Count
    update: _Count | None
    groups: list[str] | None
    reason: str | None
    loss: Annotated[float, Field(ge=-_LOSS, le=_LOSS)] | None
    steps: _Count
    seconds: _Seconds
    compute: _Seconds
    wire: _Seconds
    memory: _Count


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
    """Raises ValueError for bytes that are no memory of these groups."""
    memory: Memory = {group: {} for group in groups}
    with tensors_read():
        kept = safetensors.torch.load(data) if data else {}
    for full, tensor in kept.items():
        group, _, name = full.partition("/")
        if group not in memory:
            raise ValueError(f"it keeps {full[:80]!r}, of no group that it names")
        memory[group][name] = tensor
    return {group: dict(sorted(tree.items())) for group, tree in memory.items()}
