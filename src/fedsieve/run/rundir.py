"""A run's directory: the recipe, the logs, the checkpoints, the adapter and the report.

A directory that is made here is its owner's alone (mode 0700): logs and checkpoints tell of single
clients. It may also come from somebody else. So nothing in it is followed that leads out of it:
where a link stands in the place of one of the run's files, the run is refused (`check`).

The logs hold one JSON object a line and only ever grow, except that resuming cuts off the lines
written after the checkpoint from which it goes on: those rounds are done again.

A run that protects real clients has a second directory beside its own, `<run>.secret`, for its
server alone (mode 0700): the seed of what only the server may know, and all that tells who took
part when (clients.jsonl, and the checkpoints, which hold what clients keep). It lies outside the
run's directory so that nobody hands it on with the run.
"""

import errno
import hashlib
import json
import os
import platform
import re
import secrets
import shlex
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import filelock
from safetensors import safe_open

from fedsieve import disk
from fedsieve.disk import (
    bytes_of,
    no_room,
    no_temporary,
    of_the_disk,
    refuse_link,
    remove,
    remove_link,
    write_whole,
)
from fedsieve.errors import FedSieveError
from fedsieve.recipe import read as recipes

if TYPE_CHECKING:
    from fedsieve.tasks.digest import RowsDigest
    from fedsieve.tasks.tally import Details, Held

RECIPE = "recipe.toml"
METRICS = "metrics.jsonl"
CLIENTS = "clients.jsonl"
CHECKPOINTS = "checkpoints"
ADAPTER = "adapter"
REPORT = "report.html"
EVALUATION = "details.json"
TRACKING = "tracking"  # a folder: the tracker's name for the run, and TensorBoard's files
LOCK = ".lock"
LOGS = (METRICS, CLIENTS)
_OURS = (
    RECIPE,
    *LOGS,
    CHECKPOINTS,
    ADAPTER,
    EVALUATION,
    REPORT,
    TRACKING,
)  # in the order of removal
_FOLDERS = (CHECKPOINTS, ADAPTER, TRACKING)
SEED = "seed"
_SEED_DIGEST = "seed_digest"
_TELLING = (CLIENTS, CHECKPOINTS)  # of who took part
_REPLACES = "`fedsieve run` has --overwrite"


def own(folder: Path) -> Path:
    """The directory of the server's secrets of a run, where it has any."""
    try:
        folder = folder.resolve()
    except RuntimeError:
        raise FedSieveError(f"{folder} is a link that leads in circles: remove it") from None
    if not folder.name:
        raise FedSieveError(f"{folder} is the root of the disk, and no folder of a run")
    secret = folder.with_name(f"{folder.name}.secret")
    try:
        secret.is_symlink()
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise FedSieveError(
            f"{folder}: its name is too long for a run's folder, beside which another may be made, "
            "whose name ends in .secret: choose a shorter one"
        ) from None
    return secret


def place(folder: Path, name: str) -> Path:
    """Where a run keeps one of its files: among its server's secrets, or in its own directory."""
    return (own(folder) if name in _TELLING and own(folder).is_dir() else folder) / name


def federated(folder: Path) -> bool:
    """Whether it is the directory of a federation across machines, though parts of it are gone."""
    if any(os.path.lexists(folder / name) for name in ("app/pyproject.toml", "told.toml")):
        return True
    try:
        text = recipes.text_of(folder / RECIPE)
        environment = recipes.toml(text, RECIPE).get("environment")
    except (OSError, ValueError):  # who reads the recipe says what is wrong
        return False
    return isinstance(environment, dict) and "federation" in environment


def again(folder: Path) -> str:
    """The command that goes on with a run, to be pasted into a shell: a folder may be called
    anything, and by a recipe of somebody else's.
    """
    command = "fedsieve federate --resume" if federated(folder) else "fedsieve resume"
    return f"{command} {shlex.quote(str(folder))}"


def secret_seed(folder: Path) -> int:
    """The seed of what only the server may know. Raises FedSieveError where it is not there."""
    path = own(folder) / SEED
    if not path.exists() and (folder / CLIENTS).exists():
        raise FedSieveError(
            f"{folder} is of an older FedSieve, in whose private runs the recipe's seed tells who "
            "takes part: epsilon would not hold against those who know it: start it again"
        )
    try:
        seed = bytes_of(path, 1000).decode("ascii").strip()
        if not re.fullmatch("[0-9a-f]{64}", seed):
            raise ValueError("not 64 hexadecimal digits")
    except (OSError, ValueError) as error:
        raise FedSieveError(
            f"{path} cannot be read ({error}): it holds what only this run's server knows, and "
            f"the run cannot go on without it: put {own(folder)} back"
        ) from error
    told = environment_of(folder).get(_SEED_DIGEST)  # older runs have none
    if told is not None and {_SEED_DIGEST: told} != told_of(seed):
        raise FedSieveError(
            f"{path} is not the seed that this run began with: who took part in its rounds would "
            f"be worked out from another, and epsilon be wrong: put this run's {own(folder)} back"
        )
    return int(seed, 16)


def new_secret() -> str:
    """A seed of what only a run's server may know, as it is written."""
    return secrets.token_hex(32)


def told_of(secret: str) -> dict[str, str]:
    """What a run's recipe says of its seed, in [environment]: enough to know it again, and nothing
    by which to find it.
    """
    return {_SEED_DIGEST: hashlib.sha256(secret.encode()).hexdigest()}


def _keep(secret: str, folder: Path) -> None:
    own(folder).mkdir(mode=0o700)
    opened = os.open(own(folder) / SEED, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(opened, "w", encoding="ascii") as file:
        file.write(secret)
        file.flush()
        os.fsync(file.fileno())


def refuse(
    folder: Path,
    *,
    overwrite: bool = False,
    function: str | None = None,
    besides: Sequence[str] = (),
) -> None:
    """Raises FedSieveError if the folder holds a run already, something that would be taken for a
    part of one, or the secrets of one.

    overwrite: what is of a run may be replaced; not a recipe without one, which is the user's
    function:  of a notebook's run, which would write there; None is a command
    besides:   parts of a run that are known to be the writer's own, and may be there
    """
    says = "" if function is None else f"{function}: "
    another = "another --out" if function is None else "another folder"
    replaces = f" ({_REPLACES})" if function is None else ""
    if (folder / RECIPE).is_file() and not _any_of_a_run(folder):
        raise FedSieveError(
            f"{says}{folder} holds no run, and has {RECIPE}, in whose place a run writes its own: "
            f"choose {another}, or give the recipe another name"
        )
    if overwrite:
        return
    refuse_link(folder / RECIPE)
    if (folder / RECIPE).exists():
        raise FedSieveError(
            f"{says}{folder} holds a run already: go on with `{again(folder)}`, choose {another}, "
            f"or move it away{replaces}"
        )
    if own(folder).exists():
        raise FedSieveError(
            f"{says}{own(folder)} holds the secrets of a run that is not in {folder} any more: "
            f"remove it, or choose {another}{replaces}"
        )
    for name in _OURS:
        if name in besides:
            continue
        there = folder / name
        if there.is_symlink():
            continue  # it is removed, and nothing behind it
        if there.is_dir() or (there.is_file() and there.stat().st_size):
            raise FedSieveError(
                f"{says}{folder} holds no run, and has {name}, which one would replace: choose "
                f"{another}, or move it away{replaces}"
            )


def _any_of_a_run(folder: Path) -> bool:
    """Whether there is what a run writes before its recipe, or by it."""
    return any(os.path.lexists(folder / name) for name in (*LOGS, CHECKPOINTS))


def create(
    folder: Path, recipe: str, *, overwrite: bool = False, secret: str | None = None
) -> None:
    """Begin a new run in a folder that `lock` holds.

    secret: the seed of what only its server may know, which then has a directory of its own. The
            recipe says which it is (`told_of`)
    Raises FedSieveError if it holds a run already, unless `overwrite`: the old run's files are
    removed, and nothing else.
    """
    refuse(folder, overwrite=overwrite)
    for plot in plots(folder):
        remove_link(plot)
    left = disk.before(folder / ADAPTER)  # by a run that ended as it wrote its adapter
    for there in (*(folder / name for name in _OURS), left, own(folder)):
        if remove_link(there):
            continue
        if there.is_dir():
            remove(there)
        else:
            there.unlink(missing_ok=True)
    if secret is not None:
        _keep(secret, folder)
    for name in LOGS:
        write_whole(place(folder, name), b"")
    # Last, and by a rename: a folder with a recipe is a run that can be resumed.
    write_whole(folder / RECIPE, recipe.encode())


def check(folder: Path) -> None:
    """Raises FedSieveError if the folder holds no run, or a link in the place of a run's file."""
    for name in (*_OURS, LOCK):
        refuse_link(folder / name, folder=name in _FOLDERS)
    for plot in plots(folder):
        refuse_link(plot)
    secret = own(folder)
    refuse_link(secret, folder=True)
    for name in (SEED, *_TELLING):
        refuse_link(secret / name, folder=name in _FOLDERS)
    if not (folder / RECIPE).is_file():
        raise FedSieveError(f"{folder} holds no run: there is no {RECIPE} in it")
    if not (_any_of_a_run(folder) or _any_of_a_run(secret)):
        raise FedSieveError(
            f"{folder} holds no run: there is a {RECIPE} in it, and nothing of a run by it. Begin "
            f"one with `fedsieve run {shlex.quote(str(folder / RECIPE))} --out FOLDER`"
        )


def plots(folder: Path) -> list[Path]:
    """The report's pictures."""
    return sorted(folder.glob(f"{Path(REPORT).stem}-*.png"))


def environment_of(folder: Path) -> dict[str, Any]:
    """What a run's recipe says of where it ran. Raises FedSieveError where it is no TOML."""
    path = folder / RECIPE
    found = recipes.table_in(path).get("environment", {})
    if not isinstance(found, dict):
        raise FedSieveError(f"{path}: environment is no table: take it out")
    return found


def rows_of(folder: Path) -> "RowsDigest | None":
    """What a run says of the rows that it began with; None of one that says nothing, or is none."""
    from fedsieve.tasks.digest import RowsDigest

    told = environment_of(folder).get("rows") if (folder / RECIPE).is_file() else None
    train, test = (told.get("train"), told.get("test")) if isinstance(told, dict) else (None, None)
    return RowsDigest(train, test) if isinstance(train, str) and isinstance(test, str) else None


def base_of(folder: Path) -> str | None:
    """What a run says of the base that it began over, in one word; None as of `rows_of`."""
    told = environment_of(folder).get("base") if (folder / RECIPE).is_file() else None
    return told if isinstance(told, str) else None


def reader_of(folder: Path) -> dict[str, str]:
    """What a run says of each part of its tokenizer or image processor; nothing of an older one."""
    told = environment_of(folder).get("reader")
    if not isinstance(told, dict):
        return {}
    return {part: digest for part, digest in told.items() if isinstance(digest, str)}


def untouched(folder: Path) -> bool:
    """Whether a run was stopped before its first checkpoint, and so before its first round."""
    clients = place(folder, CLIENTS)
    started = clients.exists() and clients.stat().st_size > 0
    return not started and not any(place(folder, CHECKPOINTS).glob("round-*"))


class AtWork(FedSieveError):
    """Another process works on the run."""


def lock(folder: Path) -> AbstractContextManager[object]:
    """Keep other processes out of the folder, which is made if need be, while the lock is held.

    Raises AtWork if another process has it, FedSieveError if the folder cannot be made.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        refuse_link(folder / LOCK)
        return filelock.FileLock(folder / LOCK).acquire(timeout=0)
    except filelock.Timeout:
        raise AtWork(f"another process is working on the run in {folder}") from None
    except OSError as error:
        raise FedSieveError(f"{folder} cannot be written: {error.strerror}") from error


def append(folder: Path, log: str, rows: Iterable[NamedTuple]) -> None:
    """Add a line for each row; what a row does not know (None) is left out of its line."""
    lines = []
    for row in rows:
        known = {key: value for key, value in row._asdict().items() if value is not None}
        lines.append(json.dumps(known, allow_nan=False) + "\n")
    disk.append(place(folder, log), "".join(lines))


def keep_details(
    folder: Path, round: int, details: Iterable["Details"], held: Iterable["Held"] = ()
) -> None:
    """Write what the last evaluation shows beyond its scores, in the place of what was there.

    details: one, or none; it quotes rows, so the file is its owner's alone
    held: the classes of clients' rows, to be shown beside it
    """
    for each in details:
        table = {
            "round": round,
            "classes": [of_class._asdict() for of_class in each.classes],
            "answers": [answer._asdict() for answer in each.answers],
            "clients": [client._asdict() for client in each.clients],
            "held": [client._asdict() for client in held if each.classes],
        }
        text = json.dumps(table, ensure_ascii=False, indent=1) + "\n"
        # Half of a character, which a token may be, is no text that a file can hold.
        write_whole(folder / EVALUATION, text.encode("utf-8", "replace"), mode=0o600)


def marks(folder: Path) -> dict[str, int]:
    """The logs' lengths in bytes, after making sure that they are on the disk."""
    return {name: disk.synced_length(place(folder, name)) for name in LOGS}


def last_round(folder: Path) -> int:
    """The round of the last whole line of metrics.jsonl; 0 where there is none.

    Raises FedSieveError, naming the line, where the file is damaged.
    """
    path, last = folder / METRICS, 0
    for number, line in disk.objects(path):
        if line is not None:
            if type(line.get("round")) is not int:
                raise FedSieveError(f"{path}, line {number} tells no round")
            last = line["round"]
    return last


def refuse_fewer(folder: Path, rounds: int) -> None:
    """Raises FedSieveError for fewer rounds than a run has already."""
    done = last_round(folder)
    if rounds < done:
        raise FedSieveError(
            f"{folder}: --rounds {rounds}: {done} are done already; `--at-round` goes back"
        )


def has_ended(folder: Path, number: int, rounds: int) -> bool:
    """Whether nothing of a run of so many rounds is left to do after round `number`, its adapter
    (or whole model) and report included.
    """
    adapter = folder / ADAPTER
    there = number >= rounds and (folder / REPORT).is_file()
    return there and _is_whole(adapter) and _is_of(adapter, number)


def _is_of(adapter: Path, number: int) -> bool:
    """Whether an adapter is of this round: a run that had ended may have been given more. One of an
    older FedSieve does not say.
    """
    facts = adapter / "provenance.json"  # of train/card.py, on a floor of heavy imports
    try:
        said = disk.parsed(bytes_of(facts, disk.LONGEST), str(facts))
    except FileNotFoundError:
        return True
    except (OSError, FedSieveError):
        return False
    return said.get("rounds") in (None, number)


_SAID = ("adapter_config.json", "config.json")  # what an adapter's folder, or a model's, says of it


def _is_whole(adapter: Path) -> bool:
    """Whether an adapter's folder has tensors, and none of its files is cut or of something else.
    The numbers themselves are not looked at.
    """
    weights = [*adapter.glob("*.safetensors")]
    try:
        with disk.tensors_read():
            for path in weights:
                disk.refuse_holes(path)  # nor what is no file, for which one would wait
                with safe_open(path, framework="np"):
                    pass
        for path in (path for name in _SAID for path in adapter.glob(name)):
            disk.parsed(bytes_of(path, disk.LONGEST), str(path))
    except (OSError, ValueError, KeyError, FedSieveError):
        return False
    return bool(weights)


def cut_back(folder: Path, lengths: Mapping[str, int]) -> None:
    """Cut the logs to the lengths that a checkpoint noted.

    Raises FedSieveError if a log is shorter: somebody has changed it. Nothing but logs is cut.
    """
    for name in LOGS:
        path = place(folder, name)
        if name in lengths and not disk.cut(path, lengths[name]):
            raise disk.has_lost_lines(path)


@contextmanager
def disk_errors(folder: Path, also: str = "") -> Iterator[None]:
    """A full disk is the user's to mend, whichever file met it. also: of the command to go on"""
    try:
        yield
    except FedSieveError:
        raise
    except Exception as error:
        if (found := of_the_disk(error)) is None:
            raise
        if (without := no_temporary(found)) is not None:
            raise FedSieveError(f"{without}, then `{again(folder)}{also}`") from error
        said = f"{disk.named_by(found) or folder} cannot be written: {found.strerror or error}."
        todo = "make room" if no_room(found) else "mend that"
        if not (folder / RECIPE).is_file():
            raise FedSieveError(f"{said} Nothing is lost: {todo}, then begin again") from error
        raise FedSieveError(
            f"{said} The checkpoints are whole: {todo}, then `{again(folder)}{also}`"
        ) from error


def environment(device: str) -> dict[str, Any]:
    """What a run ran on: versions, machine, and the commit of the working directory, if any."""
    packages = ("fedsieve", "torch", "transformers", "peft", "datasets", "constriction")
    facts: dict[str, Any] = {name: metadata.version(name) for name in packages}
    facts |= {"python": platform.python_version(), "platform": platform.platform()}
    facts |= {"cpus": os.cpu_count() or 0, "device": device}
    try:
        # No more than the commit: whether files differ from it, git asks of the programs that the
        # repository's own configuration names (fsmonitor, filters), and it may be a stranger's.
        command = ["git", "rev-parse", "--verify", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        facts["git_commit"] = done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        facts["git_commit"] = "none"
    return facts
