"""A run's directory: the recipe, the logs, the checkpoints, the adapter and the report.

The logs hold one JSON object a line and only ever grow, except that resuming cuts off the lines
written after the checkpoint from which it goes on: those rounds are done again.

A run that protects real clients has a second directory beside its own, `<run>.secret`, for its
server alone (mode 0700): the seed of what only the server may know, and all that tells who took
part when (clients.jsonl, and the checkpoints, which hold what clients keep). It lies outside the
run's directory so that nobody hands it on with the run.
"""

import json
import os
import platform
import secrets
import shutil
import subprocess
from collections.abc import Iterable
from contextlib import AbstractContextManager
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import filelock

from fedsieve.errors import FedSieveError

RECIPE = "recipe.toml"
METRICS = "metrics.jsonl"
CLIENTS = "clients.jsonl"
CHECKPOINTS = "checkpoints"
ADAPTER = "adapter"
REPORT = "report.html"
_LOGS = (METRICS, CLIENTS)
_OURS = (RECIPE, *_LOGS, CHECKPOINTS, ADAPTER, REPORT)  # in the order of removal
SEED = "seed"
_TELLING = (CLIENTS, CHECKPOINTS)  # of who took part


def own(folder: Path) -> Path:
    """The directory of the server's secrets of a run, where it has any."""
    folder = folder.resolve()
    return folder.with_name(f"{folder.name}.secret")


def place(folder: Path, name: str) -> Path:
    """Where a run keeps one of its files: among its server's secrets, or in its own directory."""
    return (own(folder) if name in _TELLING and own(folder).is_dir() else folder) / name


def secret_seed(folder: Path) -> int:
    """The seed of what only the server may know. Raises FedSieveError where it is not there."""
    path = own(folder) / SEED
    if not path.exists() and (folder / CLIENTS).exists():
        raise FedSieveError(
            f"{folder} is of an older FedSieve, in whose private runs the recipe's seed tells who "
            "takes part: epsilon would not hold against those who know it: start it again"
        )
    try:
        return int(path.read_text(encoding="ascii"), 16)
    except (OSError, ValueError) as error:
        raise FedSieveError(
            f"{path} cannot be read ({error}): it holds what only this run's server knows, and "
            f"the run cannot go on without it: put {own(folder)} back"
        ) from error


def _make_secret(folder: Path) -> None:
    own(folder).mkdir(mode=0o700)
    opened = os.open(own(folder) / SEED, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(opened, "w", encoding="ascii") as file:
        file.write(secrets.token_hex(32))
        file.flush()
        os.fsync(file.fileno())


def refuse(folder: Path) -> None:
    """Raises FedSieveError if the folder holds a run already, or the secrets of one are left."""
    if (folder / RECIPE).exists():
        raise FedSieveError(
            f"{folder} holds a run already: go on with `fedsieve resume {folder}`, choose "
            "another --out, or replace it with --overwrite"
        )
    if own(folder).exists():
        raise FedSieveError(
            f"{own(folder)} holds the secrets of a run that is not in {folder} any more: remove "
            "it, choose another --out, or replace both with --overwrite"
        )


def create(folder: Path, recipe: str, *, overwrite: bool = False, secret: bool = False) -> None:
    """Begin a new run in a folder that `lock` holds.

    secret: with a directory for what only its server may know
    Raises FedSieveError if it holds a run already, unless `overwrite`: the old run's files are
    removed, and nothing else.
    """
    if not overwrite:
        refuse(folder)
    for name in _OURS:
        there = folder / name
        if there.is_dir():
            shutil.rmtree(there)
        else:
            there.unlink(missing_ok=True)
    if own(folder).exists():
        shutil.rmtree(own(folder))
    if secret:
        _make_secret(folder)
    for name in _LOGS:
        place(folder, name).write_bytes(b"")
    # Last, and by a rename: a folder with a recipe is a run that can be resumed.
    part = folder / f".{RECIPE}.part"
    part.write_text(recipe, encoding="utf-8")
    part.replace(folder / RECIPE)


def check(folder: Path) -> None:
    """Raises FedSieveError if the folder holds no run."""
    if not (folder / RECIPE).is_file():
        raise FedSieveError(f"{folder} holds no run: there is no {RECIPE} in it")


def untouched(folder: Path) -> bool:
    """Whether a run was stopped before its first checkpoint, and so before its first round."""
    clients = place(folder, CLIENTS)
    started = clients.exists() and clients.stat().st_size > 0
    return not started and not any(place(folder, CHECKPOINTS).glob("round-*"))


def lock(folder: Path) -> AbstractContextManager[object]:
    """Keep other processes out of the folder, which is made if need be, while the lock is held.

    Raises FedSieveError if another process has it, or if the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return filelock.FileLock(folder / ".lock").acquire(timeout=0)
    except filelock.Timeout:
        raise FedSieveError(f"another process is working on the run in {folder}") from None
    except OSError as error:
        raise FedSieveError(f"{folder} cannot be written: {error.strerror}") from error


def append(folder: Path, log: str, rows: Iterable[NamedTuple]) -> None:
    """Add a line for each row; what a row does not know (None) is left out of its line."""
    lines = []
    for row in rows:
        known = {key: value for key, value in row._asdict().items() if value is not None}
        lines.append(json.dumps(known, allow_nan=False) + "\n")
    with place(folder, log).open("a", encoding="utf-8") as file:
        file.writelines(lines)


def marks(folder: Path) -> dict[str, int]:
    """The logs' lengths in bytes, after making sure that they are on the disk."""
    lengths = {}
    for name in _LOGS:
        with place(folder, name).open("rb") as file:
            os.fsync(file.fileno())
            lengths[name] = os.fstat(file.fileno()).st_size
    return lengths


def last_round(folder: Path) -> int:
    """The round of the last whole line of metrics.jsonl; 0 where there is none."""
    lines = (folder / METRICS).read_bytes().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n")]
    return int(json.loads(whole[-1])["round"]) if whole else 0


def cut_back(folder: Path, lengths: dict[str, int]) -> None:
    """Cut the logs to the lengths that a checkpoint noted.

    Raises FedSieveError if a log is shorter: somebody has changed it.
    """
    for name, length in lengths.items():
        path = place(folder, name)
        size = path.stat().st_size if path.exists() else 0
        if size < length:
            raise FedSieveError(f"{path} has lost lines since the checkpoint: it cannot be resumed")
        os.truncate(path, length)


def environment(device: str) -> dict[str, Any]:
    """What a run ran on: versions, machine, and the commit of the working directory, if any."""
    packages = ("fedsieve", "torch", "transformers", "peft", "datasets", "constriction")
    facts: dict[str, Any] = {name: metadata.version(name) for name in packages}
    facts |= {"python": platform.python_version(), "platform": platform.platform()}
    facts |= {"cpus": os.cpu_count() or 0, "device": device}
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        facts["git_commit"] = done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        facts["git_commit"] = "none"
    return facts
