"""Checkpoints: one safetensors file a checkpoint, whole or not there.

A file is written beside its place, flushed to the disk and then renamed, so that a crash or a full
disk leaves the one before untouched. It holds the method's state, the clients' memories and a few
numbers, all under a digest; a file that does not match its digest counts as damaged, and the one
before it is used instead. The digest is for accidents: who makes a file up makes up its digest too,
so what it says is checked besides.

Two are kept. A round that merges nothing leaves the state as it was, and of checkpoints with one
state only the newest stays: however many rounds are lost after a bad merge, the checkpoint before
that merge is there to go back to.

What clients keep was computed from their rows: the files are for their owner alone.
"""

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_type_hints

import safetensors
import safetensors.numpy
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor

from fedsieve.algebra.adapter import STORED, Layout, Tree
from fedsieve.algebra.method import Memory, State
from fedsieve.disk import (
    LARGEST,
    parsed,
    refuse_holes,
    refuse_link,
    sync,
    tensors_read,
    write_whole,
)
from fedsieve.engine.loop import Progress, Receipt, Round, Unevaluated
from fedsieve.errors import FedSieveError, quoted
from fedsieve.tasks.digest import RowsDigest
from fedsieve.train.digest import BaseDigest, tensors_digest

# What reading a file raises that was cut, or changed by accident.
_DAMAGE = (OSError, ValueError, KeyError)
KEEP = 2  # the newest, and one to fall back to, of another state
_NAME = re.compile(r"round-(\d{6,})\.safetensors")


class Snapshot(NamedTuple):
    """All that a run needs to go on.

    marks: length in bytes of each of the run's logs at this point, by file name; lines written
           after it belong to rounds that will be done again
    half:  the last round, where it is merged and no more: what is left of it is to be done
    base:  digest of the base model that the run began with; none in checkpoints of old
    recipe: by which its rounds were trained, as TOML; none in checkpoints of old
    rows:  of the examples that they were trained on; none in checkpoints of old
    moved: the last round that changed the state; None is the last round, as in checkpoints of old
    """

    progress: Progress
    memories: dict[str, Memory]
    marks: dict[str, int]
    half: Unevaluated | None = None
    base: BaseDigest | None = None
    recipe: str | None = None
    rows: RowsDigest | None = None
    moved: int | None = None


Count = Annotated[int, Field(ge=0, le=LARGEST)]
Total = Annotated[int, Field(ge=0, le=LARGEST // 2)]  # to which rounds add


class _Facts(BaseModel):
    """What a checkpoint holds beside tensors; see `Snapshot`, and `_same` for `same`."""

    model_config = ConfigDict(strict=True)

    format: Literal[1]
    round: Count
    total_bytes: Total
    dense_bytes: Total
    clients: list[str]
    marks: dict[Literal["metrics.jsonl", "clients.jsonl"], Count]
    same: dict[str, str]
    base: "_Base | None" = None
    recipe: str | None = None
    rows: "_Rows | None" = None
    moved: Count | None = None
    half: "_Half | None" = None


class _Base(BaseModel):
    """See `BaseDigest`, as `_known` has it."""

    model_config = ConfigDict(strict=True, extra="forbid")

    weights: str
    config: str
    start: str = ""


class _Rows(BaseModel):
    """See `RowsDigest`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    train: str
    test: str


class _Half(BaseModel):
    """See `Unevaluated`: the fields of a `Round` and of `Receipt`s."""

    model_config = ConfigDict(strict=True)

    summary: dict[str, Any]
    receipts: list[dict[str, Any]]
    due: bool


def save(folder: Path, snapshot: Snapshot) -> Path:
    """Write a checkpoint, then remove all but the newest `KEEP`, of one state only the newest.

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
        "base": None if snapshot.base is None else _known(snapshot.base),
        "recipe": snapshot.recipe,
        "rows": None if snapshot.rows is None else snapshot.rows._asdict(),
        "moved": progress.round if snapshot.moved is None else snapshot.moved,
    }
    if snapshot.half is not None:
        half = snapshot.half
        receipts = [receipt._asdict() for receipt in half.receipts]
        facts["half"] = {"summary": half.summary._asdict(), "receipts": receipts, "due": half.due}
    text = json.dumps(facts, sort_keys=True)
    digest = tensors_digest(tensors, text)
    # By NumPy: safetensors' way from torch takes longer for each tensor, and there may be many.
    arrays = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
    data = safetensors.numpy.save(arrays, {"facts": text, "digest": digest})
    path = folder / _name(progress.round)
    try:
        if not folder.is_dir():
            folder.mkdir(mode=0o700, parents=True)
            sync(folder.parent)
        write_whole(path, data, mode=0o600)
    except OSError as error:
        raise FedSieveError(
            f"the checkpoint {path} cannot be written: {error.strerror or error}. The older "
            "checkpoints are whole: make room, then `fedsieve resume` (or, of a federation, "
            "`fedsieve federate --resume`) and this directory"
        ) from error
    _prune(folder)
    return path


def _prune(folder: Path) -> None:
    kept: set[int] = set()  # by the last round that changed their state
    for path in _newest_first(folder):
        moved = _moved(path)
        if moved in kept or len(kept) == KEEP:
            path.unlink()
        else:
            kept.add(moved)


def _moved(path: Path) -> int:
    """The last round that changed a checkpoint's state; its own where it does not tell."""
    try:
        refuse_holes(path)
        with safetensors.safe_open(path, framework="pt") as file:
            facts = parsed((file.metadata() or {})["facts"], f"what the checkpoint {path} says")
        told = facts.get("moved")
    except (FedSieveError, *_DAMAGE, safetensors.SafetensorError):
        return _round(path)
    return told if type(told) is int else _round(path)


def load(folder: Path, layout: Layout, base: BaseDigest | None = None) -> Snapshot:
    """The newest whole checkpoint; a damaged one is passed over with a warning.

    Raises FedSieveError if there is none, if it says what no run says, or if it belongs to another
    base or another layout.
    """
    files = _newest_first(folder)
    for path in files:
        try:
            facts, tensors = _read(path)
        except FedSieveError:
            raise  # no accident: the digest is right
        except _DAMAGE as error:
            warnings.warn(
                f"the checkpoint {path} is damaged ({error}): the one before it is used",
                stacklevel=2,
            )
            continue
        _check(path, facts, tensors)
        then = None if facts.get("base") is None else BaseDigest(**facts["base"])
        _refuse_another_base(then, base)
        rows = None if facts.get("rows") is None else RowsDigest(**facts["rows"])
        return _snapshot(path, facts, tensors, layout)._replace(base=then, rows=rows)
    what = "no checkpoint that is whole" if files else "no checkpoint"
    raise FedSieveError(f"{folder} holds {what}: the run cannot be resumed, start it again")


def names_later(folder: Path, number: int) -> bool:
    """Whether there is a checkpoint of a later round, whole or not."""
    return bool(later(folder, number))


def round_of(log: Path, line: Mapping[str, Any]) -> Round:
    """A round as its line of a log tells of it, which leaves out what the round does not know.

    Raises FedSieveError for one that a half round could not be kept as.
    """
    row: dict[str, Any] = {name: line.get(name) for name in Round._fields}
    hints = get_type_hints(Round)
    for name, value in row.items():
        try:
            TypeAdapter(hints[name]).validate_python(value, strict=True)
        except ValidationError:
            raise FedSieveError(
                f"{log}: {name} of its round {row['round']} is {quoted(value)}, and no run writes "
                "that: put the file back, or go back to an earlier round, by `fedsieve resume "
                "--at-round`"
            ) from None
    return Round(**row)


class Note(NamedTuple):
    """What a checkpoint tells before a model is there. Of the fields of a `Snapshot`:

    round:    of its progress
    receipts: of its half round, where the log lacks them yet
    evaluated: whether the log has the line of its round
    """

    path: Path
    round: int
    marks: dict[str, int]
    recipe: str | None
    receipts: list[dict[str, Any]]
    evaluated: bool


def notes(folder: Path) -> list[Note]:
    """What the whole checkpoints of a folder tell, the newest first.

    Raises FedSieveError for one that says what no run says.
    """
    found = []
    for path in _newest_first(folder):
        try:
            facts, tensors = _read(path)
        except FedSieveError:
            raise
        except _DAMAGE:
            continue  # `load` warns of it
        _check(path, facts, tensors)
        half = facts.get("half")
        receipts = half["receipts"] if half else []
        recipe, marks = facts.get("recipe"), facts["marks"]
        found.append(Note(path, facts["round"], marks, recipe, receipts, half is None))
    return found


def newest_round(folder: Path) -> tuple[int, list[dict[str, Any]]]:
    """The round of the newest whole checkpoint, and its receipts where the log lacks them yet.

    0 and none where there is no checkpoint.
    """
    found = notes(folder)
    return (found[0].round, found[0].receipts) if found else (0, [])


def later(folder: Path, number: int) -> list[Path]:
    """The checkpoints of later rounds, whole or not, the newest first."""
    return [path for path in _newest_first(folder) if _round(path) > number]


def forget_after(folder: Path, number: int) -> None:
    """Remove the checkpoints of later rounds: they were damaged, and their rounds are done again.

    Left there, a damaged one would count among those that are kept, and push out a whole one.
    """
    for path in later(folder, number):
        path.unlink()


def _name(number: int) -> str:
    return f"round-{number:06d}.safetensors"


def _newest_first(folder: Path) -> list[Path]:
    """The files that are called as checkpoints are; nothing else in the folder is touched.

    Raises FedSieveError for a link among them.
    """
    refuse_link(folder, folder=True)
    found = [path for path in folder.glob("round-*.safetensors") if _NAME.fullmatch(path.name)]
    for path in found:
        refuse_link(path)
    return sorted(found, key=_round, reverse=True)


def _round(path: Path) -> int:
    named = _NAME.fullmatch(path.name)
    assert named is not None
    return int(named[1])


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


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    refuse_holes(path)
    with tensors_read(), safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if odd := {t.dtype for t in tensors.values()} - STORED:
        raise ValueError(f"it holds numbers of type {min(map(str, odd))}, and no run keeps such")
    if tensors_digest(tensors, metadata["facts"]) != metadata["digest"]:
        raise ValueError("its digest does not match")
    return parsed(metadata["facts"], f"what the checkpoint {path} says"), tensors


def _check(path: Path, facts: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raises FedSieveError, naming the fact, for a checkpoint that no run has written."""

    def refuse(what: str) -> FedSieveError:
        return FedSieveError(
            f"the checkpoint {path} was not written by FedSieve ({what}): remove it, and go on "
            "from the one before it"
        )

    try:
        _Facts.model_validate(facts)
        for kind, rows in _rows(facts):
            hints = get_type_hints(kind)
            for row in rows:
                kind(**row)  # no field too many or too few
                for name, value in row.items():
                    TypeAdapter(hints[name]).validate_python(value, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise refuse(f"{place}: {first['msg']}"[:200]) from None
    except TypeError as error:
        raise refuse(f"half: {error}"[:200]) from None
    if facts["round"] != _round(path):
        raise refuse(f"round is {facts['round']}")
    if (facts.get("moved") or 0) > facts["round"]:
        raise refuse(f"moved is {facts['moved']}")
    if len(set(facts["clients"])) != len(facts["clients"]):
        raise refuse("clients: one is there twice")
    for name, earlier in facts["same"].items():
        if earlier not in tensors or name in tensors:
            raise refuse(f"same: {name[:80]!r} is {earlier[:80]!r}")
    numbers = {str(number) for number in range(len(facts["clients"]))}
    for name in [*tensors, *facts["same"]]:
        kind, _, rest = name.partition("/")
        number, _, of_client = rest.partition("/")
        known = number in numbers and "/" in of_client
        if not (kind == "state" and "/" in rest) and not (kind == "memory" and known):
            raise refuse(f"it holds a tensor {name[:80]!r}")
    if not any(name.startswith("state/adapter/") for name in tensors):
        raise refuse("it holds no adapter")


def _rows(facts: Mapping[str, Any]) -> list[tuple[Any, list[dict[str, Any]]]]:
    half = facts.get("half")
    return [] if half is None else [(Round, [half["summary"]]), (Receipt, half["receipts"])]


def _known(base: BaseDigest) -> dict[str, str]:
    return {part: digest for part, digest in base._asdict().items() if digest is not None}


def _refuse_another_base(then: BaseDigest | None, now: BaseDigest | None) -> None:
    if now is None or then is None:
        return  # checkpoints of old do not know
    if now[:2] == then[:2] and now.start != then.start:
        raise FedSieveError(
            "the adapter that the run began from (lora.start) has changed since: put that back in "
            "its place, or start a new run"
        )
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
    if facts.get("half") is not None:
        told = facts["half"]
        receipts = [Receipt(**receipt) for receipt in told["receipts"]]
        half = Unevaluated(Round(**told["summary"]), receipts, progress, told["due"])
    known = {"recipe": facts.get("recipe"), "moved": facts.get("moved")}
    return Snapshot(progress, memories, facts["marks"], half, **known)
