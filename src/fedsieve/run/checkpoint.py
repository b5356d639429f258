"""Checkpoints: one safetensors file a checkpoint, whole or not there.

A file is written beside its place, flushed to the disk and then renamed, so that a crash or a full
disk leaves the one before untouched. It holds the method's state, the clients' memories and a few
numbers, all under a digest; a file that does not match its digest counts as damaged, and the one
before it is used instead.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
from torch import Tensor

from fedsieve.algebra.adapter import Layout, Tree
from fedsieve.algebra.method import Memory, State
from fedsieve.engine.loop import Progress, Receipt, Round, Unevaluated
from fedsieve.errors import FedSieveError
from fedsieve.train.digest import BaseDigest

KEEP = 2  # the newest, and one to fall back to


class Snapshot(NamedTuple):
    """All that a run needs to go on.

    marks: length in bytes of each of the run's logs at this point, by file name; lines written
           after it belong to rounds that will be done again
    half:  the last round, where it is merged and no more: what is left of it is to be done
    base:  digest of the base model that the run began with; none in checkpoints of old
    """

    progress: Progress
    memories: dict[str, Memory]
    marks: dict[str, int]
    half: Unevaluated | None = None
    base: BaseDigest | None = None


def save(folder: Path, snapshot: Snapshot) -> Path:
    """Write a checkpoint, then remove all but the newest `KEEP`.

    Raises FedSieveError if it cannot be written (a full disk, say); the older ones stay whole.
    """
    progress = snapshot.progress
    tensors = _flat("state", progress.state.trees)
    clients = sorted(snapshot.memories)
    for number, client in enumerate(clients):
        tensors |= _flat(f"memory/{number}", snapshot.memories[client])
    same = _same(tensors)
    tensors = {name: tensor for name, tensor in tensors.items() if name not in same}
    facts = {
        "format": 1,
        "round": progress.round,
        "total_bytes": progress.total_bytes,
        "dense_bytes": progress.dense_bytes,
        "clients": clients,
        "marks": snapshot.marks,
        "same": same,
        "base": None if snapshot.base is None else snapshot.base._asdict(),
    }
    if snapshot.half is not None:
        half = snapshot.half
        receipts = [receipt._asdict() for receipt in half.receipts]
        facts["half"] = {"summary": half.summary._asdict(), "receipts": receipts, "due": half.due}
    text = json.dumps(facts, sort_keys=True)
    data = safetensors.torch.save(tensors, {"facts": text, "digest": _digest(tensors, text)})
    path = folder / _name(progress.round)
    try:
        if not folder.is_dir():
            folder.mkdir(parents=True)
            sync(folder.parent)
        write_whole(path, data)
    except OSError as error:
        raise FedSieveError(
            f"the checkpoint {path} cannot be written: {error.strerror or error}. The older "
            "checkpoints are whole: make room, then `fedsieve resume`"
        ) from error
    for old in _newest_first(folder)[KEEP:]:
        old.unlink()
    return path


def load(folder: Path, layout: Layout, base: BaseDigest | None = None) -> Snapshot:
    """The newest whole checkpoint; a damaged one is passed over with a warning.

    Raises FedSieveError if there is none, or if it belongs to another base or another layout.
    """
    files = _newest_first(folder)
    for path in files:
        try:
            facts, tensors = _read(path)
        except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
            warnings.warn(
                f"the checkpoint {path} is damaged ({error}): the one before it is used",
                stacklevel=2,
            )
            continue
        then = None if facts.get("base") is None else BaseDigest(**facts["base"])
        _refuse_another_base(then, base)
        return _snapshot(path, facts, tensors, layout)._replace(base=then)
    what = "no checkpoint that is whole" if files else "no checkpoint"
    raise FedSieveError(f"{folder} holds {what}: the run cannot be resumed, start it again")


def names_later(folder: Path, number: int) -> bool:
    """Whether there is a checkpoint of a later round, whole or not."""
    return any(path.name > _name(number) for path in _newest_first(folder))


def newest_round(folder: Path) -> tuple[int, list[dict[str, Any]]]:
    """The round of the newest whole checkpoint, and its receipts where the log lacks them yet.

    0 and none where there is no checkpoint.
    """
    for path in _newest_first(folder):
        try:
            facts, _ = _read(path)
        except (OSError, ValueError, KeyError, safetensors.SafetensorError):
            continue  # `load` warns of it
        return int(facts["round"]), facts["half"]["receipts"] if "half" in facts else []
    return 0, []


def forget_after(folder: Path, number: int) -> None:
    """Remove the checkpoints of later rounds: they were damaged, and their rounds are done again.

    Left there, a damaged one would count among the newest `KEEP` and push out a whole one.
    """
    for path in _newest_first(folder):
        if path.name > _name(number):
            path.unlink()


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is there with all of `data`, or not changed at all."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    sync(path.parent)  # the rename itself must reach the disk too


def sync(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _name(number: int) -> str:
    return f"round-{number:06d}.safetensors"


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("round-*.safetensors"), reverse=True)


def _flat(prefix: str, trees: Mapping[str, Tree]) -> dict[str, Tensor]:
    return {
        f"{prefix}/{group}/{name}": tensor.contiguous()
        for group, tree in trees.items()
        for name, tensor in tree.items()
    }


def _same(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """name -> an earlier name of the same tensor: what several clients hold is written once."""
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(tensor), name) for name, tensor in tensors.items()}
    return {name: earlier for name, earlier in names.items() if name != earlier}


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if _digest(tensors, metadata["facts"]) != metadata["digest"]:
        raise ValueError("its digest does not match")
    facts: dict[str, Any] = json.loads(metadata["facts"])
    return facts, tensors


def _refuse_another_base(then: BaseDigest | None, now: BaseDigest | None) -> None:
    if now is None or then is None:
        return  # checkpoints of old do not know
    if now != then:
        what = "weights" if now.weights != then.weights else "configuration"
        raise FedSieveError(
            f"the base model has changed since the run began (its {what}), and the run's adapter "
            "belongs to the old one: put that back in its place, or start a new run"
        )


def _snapshot(
    path: Path, facts: dict[str, Any], tensors: dict[str, Tensor], layout: Layout
) -> Snapshot:
    tensors = tensors | {name: tensors[earlier] for name, earlier in facts["same"].items()}
    trees: dict[str, Tree] = {}
    memories: dict[str, Memory] = {}
    for full, tensor in tensors.items():
        kind, rest = full.split("/", 1)
        if kind == "memory":
            number, rest = rest.split("/", 1)
            group, name = rest.split("/", 1)
            client = facts["clients"][int(number)]
            memories.setdefault(client, {}).setdefault(group, {})[name] = tensor
        else:
            group, name = rest.split("/", 1)
            trees.setdefault(group, {})[name] = tensor
    shapes = {name: tuple(tensor.shape) for name, tensor in trees["adapter"].items()}
    if shapes != dict(layout.shapes):
        raise FedSieveError(f"{path} holds another adapter than the recipe asks for")
    progress = Progress(
        facts["round"], State(layout, trees), facts["total_bytes"], facts["dense_bytes"]
    )
    half = None
    if "half" in facts:
        told = facts["half"]
        receipts = [Receipt(**receipt) for receipt in told["receipts"]]
        half = Unevaluated(Round(**told["summary"]), receipts, progress, told["due"])
    return Snapshot(progress, memories, facts["marks"], half)
