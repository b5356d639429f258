"""A client's own rounds on its own disk: what it answered, and what it kept.

In one process the memories of all clients are in the run's checkpoints. A site keeps its own, and
neither end can rely on the other's clock: an answer may get lost, a message may come twice, and a
server that was restarted goes back to its checkpoint and asks for the rounds after it again. So a
site keeps a file for each of its last rounds, with the memory after the round and the answer that
it gave:

    the same message again    the same answer again, and no training
    a later round             trained from the newest memory before it that the message fits: an
                              answer that got lost is no round to the server, and a method whose
                              server keeps track of its clients (FLoRA) goes on from before it
    an earlier round, with    the server went back: trained from the memory before that round, and
    another message           what came after it is forgotten

How far back a server can go follows from its checkpoints, two of which it keeps, and of rounds in
which nothing was merged it keeps none but the newest. So what is kept here is counted by the rounds
that went on from each other, and not by those in which an answer came to nothing. A file is whole
or not there (`disk.write_whole`), begins with a digest, and says of which run and client it is; one
that is damaged, or another's (out of the wrong backup), counts as not there, with a warning.
Nothing is kept in this process: what is on the disk is what counts.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import safetensors
import safetensors.torch
import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
)
from torch import Tensor

from fedsieve.algebra.method import Memory
from fedsieve.disk import bytes_of, remove, tensors_read, write_whole

_DIGEST = 16  # bytes
_ANSWER = "answer"
_ENTRY = re.compile(r"round-[0-9]{9}")


class _Answered(BaseModel):
    """What `engine.client.facts` says of a round, and that it is one."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    ok: Literal[True]
    round: PositiveInt
    reason: Annotated[str, Field(max_length=10_000)] | None
    loss: float | None
    steps: NonNegativeInt
    seconds: NonNegativeFloat
    compute: NonNegativeFloat
    wire: NonNegativeFloat
    memory: NonNegativeInt


class _Facts(BaseModel):
    """What stands beside an entry's tensors."""

    model_config = ConfigDict(frozen=True, strict=True)

    format: Literal[2]
    whose: str
    round: PositiveInt
    before: NonNegativeInt
    asked: str
    facts: _Answered
    length: NonNegativeInt


class Entry(NamedTuple):
    """One round of one client.

    before: the round whose memory it began with; 0 if there was none
    asked:  digest of what was asked
    whose:  the run's and the client's name
    facts, answer: what was answered: figures, and bytes
    memory: what the client keeps after the round
    """

    round: int
    before: int
    asked: str
    whose: str
    facts: dict[str, Any]
    answer: bytes
    memory: Memory


def find(folder: Path, number: int, whose: str) -> Entry | None:
    """The entry of a round, if there is one that is whole and of this run and client."""
    return _read(folder / _name(number), whose)


def memories(folder: Path, number: int, whose: str) -> Iterator[tuple[int, Memory]]:
    """The rounds before this one and the memory after each, newest first; last (0, {}).

    That last one, what a client has before its first round, is left out where the site has
    forgotten how it went on from there.
    """
    oldest = None
    for path in reversed(_files(folder)):
        entry = _read(path, whose)
        if entry is None:
            continue
        oldest = entry
        if entry.round < number:
            yield entry.round, entry.memory
    if oldest is None or oldest.before == 0 or not oldest.memory:
        yield 0, {}


def write(
    folder: Path, entry: Entry, keep: int, room: Callable[[int], None] = lambda more: None
) -> None:
    """Add a round. Later rounds are void and go first; then those that are no longer needed.

    keep: so many entries and one stay of those that this one goes on from, one from the other; and
          of the others, which came to nothing, those of the last half as many rounds
    room: told how many bytes more there will be for a while, before anything is changed; raises to
          refuse them
    Raises OSError if it cannot be written; the entries of earlier rounds are as they were then.
    """
    data = _to_bytes(entry)
    void = [path for path in _files(folder) if path.name >= _name(entry.round)]
    room(len(data) - sum(path.lstat().st_size for path in void if path.is_file()))
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for path in void:
        remove(path)  # a folder of that name, too
    write_whole(folder / _name(entry.round), data)
    wanted, count = _name(entry.before), 0
    for path in reversed(_files(folder)):
        if path.name >= _name(entry.round):
            continue
        if path.name <= wanted and count <= keep:
            count += 1
            before = _began_with(path)
            # Of a damaged one it is not known what it began with: the next will do.
            wanted = path.name if before is None else _name(before)
        elif path.name < _name(max(0, entry.round - keep // 2)):
            remove(path)


def _name(number: int) -> str:
    return f"round-{number:09d}"


def _files(folder: Path) -> list[Path]:
    """The entries. What is called otherwise, a copy of one for example, is the owner's."""
    return sorted(path for path in folder.glob("round-*") if _ENTRY.fullmatch(path.name))


def _to_bytes(entry: Entry) -> bytes:
    tensors: dict[str, Tensor] = {
        f"{group}/{name}": tensor.detach().cpu().contiguous()
        for group, tree in entry.memory.items()
        for name, tensor in tree.items()
    }
    tensors[_ANSWER] = torch.frombuffer(bytearray(entry.answer or b"\0"), dtype=torch.uint8)
    facts = {
        "format": 2,
        "whose": entry.whose,
        "round": entry.round,
        "before": entry.before,
        "asked": entry.asked,
        "facts": entry.facts,
        "length": len(entry.answer),
    }
    data = safetensors.torch.save(tensors, {"facts": json.dumps(facts, allow_nan=False)})
    return _digest(data) + data


def _began_with(path: Path) -> int | None:
    """The round whose memory an entry began with, by its first bytes; None if they do not tell."""
    try:
        if not path.is_file():
            return None  # a pipe would be waited for
        with path.open("rb") as file:
            size = int.from_bytes(file.read(_DIGEST + 8)[_DIGEST:], "little")
            head = file.read(min(size, path.stat().st_size))
        return _Facts.model_validate_json(json.loads(head)["__metadata__"]["facts"]).before
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _read(path: Path, whose: str) -> Entry | None:
    try:
        whole = bytes_of(path, None)
        data = whole[_DIGEST:]
        if _digest(data) != whole[:_DIGEST]:
            raise ValueError("its digest does not match")
        size = int.from_bytes(data[:8], "little")
        facts = _Facts.model_validate_json(json.loads(data[8 : 8 + size])["__metadata__"]["facts"])
        with tensors_read():
            tensors = safetensors.torch.load(data)
        if path.name != _name(facts.round) or facts.before >= facts.round:
            raise ValueError("it is of another round")
        if facts.whose != whose:
            raise ValueError("it is of another run or client")
        answer = tensors.pop(_ANSWER)
        if answer.dtype != torch.uint8 or not facts.length <= answer.numel():
            raise ValueError("its answer is none")
        memory: Memory = {}
        for name, tensor in tensors.items():
            group, rest = name.split("/", 1)
            memory.setdefault(group, {})[rest] = tensor
            if not tensor.isfinite().all():
                raise ValueError(f"{name} is not finite")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        warnings.warn(f"{path} is damaged ({why}): it is not used", stacklevel=3)
        return None
    answered = answer.numpy().tobytes()[: facts.length]
    said = facts.facts.model_dump()
    return Entry(facts.round, facts.before, facts.asked, facts.whose, said, answered, memory)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST).digest()
