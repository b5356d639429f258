"""A federation whose server, sites and nodes are processes of this machine, by one command.

The recipe's rows are divided over the sites as its [partition] divides them over clients, each site
has a folder with its own rows and site.toml, and Flower's own processes carry the messages over
127.0.0.1. Nothing is left out that is there between real machines but TLS and keys, so what is
tried here is what runs there; and what comes out is, to the bit, the run in one process. So the
rows that [data] tests on, or holds back from all clients, are the server's, and no site has any.

Whatever is started is ended here, with what it started itself.
"""

import ctypes
import hashlib
import os
import re
import shlex
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import tomli_w
import torch
from datasets import Dataset

from fedsieve.algebra.budget import Budget
from fedsieve.clients.sampling import unknown_to
from fedsieve.data.pictures import inlined
from fedsieve.disk import appending, everything_in, refuse_link, remove, write_whole
from fedsieve.errors import FedSieveError, count, nearest, printable, quoted, reason
from fedsieve.frame import Frame
from fedsieve.recipe import read as recipes
from fedsieve.recipe.budgets import hand_out, machines_of
from fedsieve.recipe.examples import as_read, prepare, stored_rows
from fedsieve.recipe.experiment import locate, parts_of, set_up_resident
from fedsieve.recipe.method import build_method
from fedsieve.recipe.schema import Recipe, sampling
from fedsieve.run import rundir, runner
from fedsieve.sites import federate
from fedsieve.sites.federate import ServerAddress
from fedsieve.sites.found import APP, CONFIG, HOME, LINK, server_of
from fedsieve.sites.found import HERE as HERE
from fedsieve.sites.site import NAME, Rows
from fedsieve.sites.worker import SOCKET, ask
from fedsieve.tasks.images import memory_of_machine
from fedsieve.train.model import pick_device
from fedsieve.train.reader import load_reader

ROWS = "rows.parquet"
HELD = "held-back.parquet"  # beside the sites' folders: what data.validation holds back
SITE = "site.toml"
_TRIAL = 1 << 23  # bytes: less is no room for a SuperLink's database
_LOGS, _SERVER_LOG = ("worker.log", "node.log"), "server.log"
_TAKEN = frozenset({_SERVER_LOG, HELD})  # names of files beside the sites' folders
_BIN = Path(sys.executable).parent
_PDEATHSIG = 1  # of <linux/prctl.h>
_EACH = 1 << 29  # bytes that a worker takes at least
_STARTING = 120.0  # seconds that a process has until it listens
_ENDING = 10.0  # and to end, before it is killed


def of_clients(recipe: Recipe, sites: int) -> Recipe:
    """The recipe with so many clients. Raises FedSieveError where a column says who they are."""
    if recipe.partition.column is not None:
        return recipe
    return recipe.model_copy(
        update={"partition": recipe.partition.model_copy(update={"clients": sites})}
    )


class Settled(NamedTuple):
    """A federation that can be written.

    recipe:  with its classes; its test rows are the server's, whatever of [data] named them
    rows:    what each site gets, by its name
    budgets: what each site affords
    held:    the rows to be evaluated on, in their order, where they are held back from all sites
    """

    recipe: Recipe
    rows: dict[str, Dataset]
    budgets: dict[str, Budget]
    held: Dataset | None


def _refuse_too_many(sites: int) -> None:
    """Raises FedSieveError for more sites than this machine has memory for."""
    if sites > (most := max(4, memory_of_machine() // _EACH)):
        raise FedSieveError(
            f"{sites} sites are as many workers on this machine, of half a GB each at least: its "
            f"memory is enough for {most}. Take fewer sites, or one process (`fedsieve run`), "
            "whose result is the same"
        )


def refuse_path(folder: Path) -> None:
    """Raises FedSieveError for a folder whose path a node of Flower's would read otherwise."""
    path = str(folder.absolute())
    if any(each in path for each in '"\\') or not path.isprintable():
        raise FedSieveError(
            f"--local: the path {printable(path)} has a quotation mark, a backslash or a letter in "
            "it that is not printable, and Flower's nodes would read another: choose another --out"
        )


def settle(recipe: Recipe, sites: int, folder: Path) -> Settled:
    """Divide a recipe's rows over sites of the federation that will be in the folder.

    Raises FedSieveError where the rows cannot be divided over so many, or cannot be used.
    """
    recipe = of_clients(recipe, sites)
    data, split, task = recipe.data, recipe.partition, recipe.model.task
    reader, _ = load_reader(locate(recipe.model.source), task)
    stored = stored_rows(data, data.train, data.train_split, split.reads)
    rows = as_read(data, stored, data.train)
    prepared = prepare(recipe, rows, None, reader)
    if prepared.classes:
        told = data.model_copy(update={"classes": prepared.classes})
        recipe = recipe.model_copy(update={"data": told})
    parts = parts_of(recipe, rows, prepared.train, prepared.came)
    if len(parts) != sites:
        raise FedSieveError(
            f"--local {sites}: column {split.column!r} names {count(len(parts), 'client')}, and "
            f"each is a site: give --local {len(parts)}, or another [partition]"
        )
    if odd := [id for id in parts if not re.fullmatch(NAME, id) or id.lower() in _TAKEN]:
        raise FedSieveError(
            f"--local {sites}: column {split.column!r} holds {odd[0][:80]!r}, which cannot name a "
            "site: letters, digits, '.', '_' and '-' can, 64 at most, the first a letter or digit"
            f" (but not {' and '.join(sorted(_TAKEN))})"
        )
    if empty := [id for id, own in parts.items() if not len(own)]:
        raise FedSieveError(
            f"--local {sites}: [partition] leaves site {empty[0]!r} without rows: raise "
            "partition.alpha, or take fewer sites"
        )
    for id in unknown_to(sampling(recipe), parts):
        raise FedSieveError(
            f"--local {sites}: sampling.availability names {quoted(id)}, and no site is called that"
            + nearest(id, parts)
        )
    _refuse_too_many(sites)
    moved = stored if data.image is None else inlined(rows, data.image)
    own = {id: moved.select(prepared.came[torch.as_tensor(part)]) for id, part in parts.items()}
    resident = set_up_resident(recipe, reader, pick_device("cpu"))
    machines, method = machines_of(recipe, parts.counts), build_method(recipe)
    budgets = hand_out(recipe, method, resident.layout, parts.counts, machines)
    held = moved.select(prepared.held) if recipe.evaluation.on == "validation" else None
    return Settled(_with_own_test(recipe, folder), own, budgets, held)


def _with_own_test(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with the rows that it is evaluated on as the server's own."""
    data, rating = recipe.data, recipe.evaluation
    changed: dict[str, Any] = {"validation": None}  # held back once, of all rows
    if rating.on == "validation":
        # A table of ours: how the recipe's own files are read says nothing of it.
        as_stored = ("train_split", "test_split", "config", "names", "separator", "field")
        changed |= dict.fromkeys((*as_stored, "more_tests"))
        changed["test"] = str((folder / HERE / HELD).absolute())
        rating = rating.model_copy(update={"on": "test"})
    elif data.test is None and data.test_split is not None:
        changed["test"] = data.train
    data = data.model_copy(update=changed)
    return recipe.model_copy(update={"data": data, "evaluation": rating})


def write_sites(folder: Path, settled: Settled) -> None:
    """A folder for each site: its rows and its site.toml; and the server's rows beside them."""
    recipe = settled.recipe
    for id, own in settled.rows.items():
        home = folder / HERE / id
        home.mkdir(mode=0o700, parents=True)
        own.to_parquet(str(home / ROWS))
        table = {**_site_of(recipe, id), "budget": settled.budgets[id]._asdict()}
        write_whole(home / SITE, tomli_w.dumps(table).encode())
    if settled.held is not None:
        settled.held.to_parquet(str(folder / HERE / HELD))


def _site_of(recipe: Recipe, id: str) -> dict[str, Any]:
    """What a site's file says, less its budget."""
    columns = recipe.data.model_dump(mode="json", include={*Rows.model_fields}, exclude_none=True)
    where = ("train", "test", "train_split", "test_split", "config")
    of_files = (*where, "names", "separator", "field")
    read = {name: value for name, value in columns.items() if name not in of_files}
    return {
        "name": id,
        "model": str(locate(recipe.model.source)),
        "device": recipe.device,
        "data": {"train": ROWS, **read},
    }


def check(folder: Path) -> None:
    """Raises FedSieveError for a site's folder that is not as `write_sites` leaves it: it may come
    from somebody else, and its file says what is read, and by which model.
    """
    source = folder / rundir.RECIPE
    recipe = recipes.parse(recipes.read(str(source)), str(source))
    refuse_link(folder / HERE, folder=True)
    _refuse_links_within(folder / HERE)
    asked = recipes.table_in(folder / APP / "pyproject.toml")["tool"]["flwr"]["app"]["config"]
    if len(_homes(folder)) != asked["sites"]:
        raise FedSieveError(
            f"{folder / HERE} holds {count(len(_homes(folder)), 'site')}, and the federation has "
            f"{asked['sites']:g}: put it back, or begin a new one"
        )
    _refuse_too_many(len(_homes(folder)))
    for log in (folder / HERE / _SERVER_LOG, *(h / n for h in _homes(folder) for n in _LOGS)):
        if os.path.lexists(log):
            appending(log).close()  # or it raises: what is written there would go elsewhere
    for home in _homes(folder):
        path = home / SITE
        refuse_link(home / "worker", folder=True)
        table = recipes.table_in(path)
        table.pop("budget", None)
        if table != _site_of(recipe, home.name):
            raise FedSieveError(
                f"{path} is not what `fedsieve federate --local` wrote: put it back, or begin anew"
            )
    port_of(folder)


def _refuse_links_within(folder: Path) -> None:
    """Raises FedSieveError for a link at any depth, and for a pipe or such in a file's place:
    workers write and remove below all of it. Their sockets may lie there.
    """
    for path in everything_in(folder):
        mode = path.lstat().st_mode
        if not stat.S_ISSOCK(mode):
            refuse_link(path, folder=stat.S_ISDIR(mode))


def _homes(folder: Path) -> list[Path]:
    """The sites' folders."""
    return sorted(path.parent for path in (folder / HERE).glob(f"*/{SITE}"))


def is_here(folder: Path) -> bool:
    """Whether a federation has its sites in its own directory."""
    return (folder / HERE).is_dir()


def port_of(folder: Path) -> int:
    """At which `flwr` looks for the server of a federation. Raises FedSieveError where it cannot
    be told.
    """
    host, _, port = server_of(folder)[0].rpartition(":")
    if host == ServerAddress().host and port.isdecimal():
        return int(port)
    path = folder / HOME / CONFIG
    raise FedSieveError(f"{path} names no server of this machine: begin a new federation")


def own_port(folder: Path, say: Callable[[str], None]) -> int:
    """The port of a federation's server; another one, from now on, where that is taken: the nodes
    would find somebody else's server there.
    """
    port = port_of(folder)
    if _is_free(port):
        return port
    other = free_port()
    say(f"port {port} is taken by another program: this federation's server takes {other}")
    federate.write_connection(folder, ServerAddress(port=other))
    return other


def _is_free(port: int) -> bool:
    """Whether one can listen there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # after a server's end
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError):
            return False
    return True


def free_port() -> int:
    """A port of 127.0.0.1 at which nothing listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class _Started(NamedTuple):
    """A process, and the file with what it says, from a byte on: before it are earlier starts."""

    process: "subprocess.Popen[bytes]"
    log: Path
    begins: int


@contextmanager
def at_work(folder: Path, port: int, say: Callable[[str], None]) -> Iterator[None]:
    """The server, and at each site of the folder a worker and a node, while this is open. Whoever
    opens it is alone with the folder (federate.alone).

    Raises FedSieveError, with its log's place, for a process that does not start.
    """
    refuse_path(folder)
    homes = _homes(folder)
    threads = str(max(1, (os.cpu_count() or 1) // len(homes)))
    flower = federate.environment(folder)
    in_objects = dict([federate.OBJECTS.split("=")])
    listen = ServerAddress(port=port)
    # What Flower finds in a node's FLWR_HOME, and waiting in its database, it runs: so there is
    # nothing, each time.
    empty = tempfile.TemporaryDirectory(prefix=_without_remains(folder))
    with runner.sigterm_as_ctrl_c(), empty as nodes, _all_ended() as started:
        _refuse_full(Path(nodes), folder)

        def start(command: Sequence[object], log: Path, more: Mapping[str, str]) -> _Started:
            started.append(_start(command, log, more))
            return started[-1]

        doors = {home: home / "worker" / SOCKET for home in homes}
        workers = {}
        for home in homes:
            command = [sys.executable, "-P", "-m", "fedsieve", "worker", home / SITE]
            own = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}
            workers[home] = start(command, home / "worker.log", own)
        for home, door in doors.items():
            _until(partial(_answers, door), workers[home])
        for home, door in doors.items():
            node = [
                _BIN / "flower-supernode", "--superlink", f"127.0.0.1:{port}", "--insecure",
                "--port", str(free_port()), "--node-config", f'socket="{door}"',
            ]  # fmt: skip
            own = {**flower, **in_objects, "FLWR_HOME": str(Path(nodes) / home.name)}
            start(node, home / "node.log", own)
        # Last, so that it is ended first: to a server whose sites go, they are lost in its round.
        words = shlex.split(federate.commands(folder, listen)[0])
        words[words.index("--database") + 1] = str(Path(nodes) / LINK)
        link = [_BIN / "flower-superlink", *words[words.index("flower-superlink") + 1 :]]
        if not _is_free(port):
            raise FedSieveError(f"port {port} was taken while the sites began: do it again")
        _until(lambda: _listens(port), start(link, folder / HERE / _SERVER_LOG, flower))
        say(f"{count(len(homes), 'site')} at work; what they say is in {folder / HERE}")
        try:
            yield
        except KeyboardInterrupt:
            say("stopping: the server and the sites are ended, which may take some seconds")
            raise


def _refuse_full(place: Path, folder: Path) -> None:
    """Raises FedSieveError where the server's database has no room: it would stop in mid-run."""
    trial = place / ".room"
    try:
        write_whole(trial, bytes(_TRIAL))
        trial.unlink()
    except OSError as error:
        raise FedSieveError(
            f"{place.parent} cannot be written ({reason(error)}), where the server of --local "
            "keeps what passes through it: make room, or set TMPDIR to another folder; then "
            f"`{rundir.again(folder)}`"
        ) from error


def _without_remains(folder: Path) -> str:
    """How the temporary folders of a federation's begin, after those were removed which a killed
    command left: updates pass through them.
    """
    path = hashlib.blake2b(os.fsencode(folder.resolve()), digest_size=8).hexdigest()
    prefix = f"fedsieve-{path}-"
    for left in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with suppress(OSError):  # anybody may make names there
            if left.lstat().st_uid == os.getuid():
                remove(left)
    return prefix


def _start(command: Sequence[object], log: Path, more: Mapping[str, str]) -> _Started:
    """A process in a session of its own: Ctrl-C reaches us alone, who end it and all that it began.

    more: what it finds in its environment beside ours
    """
    path = f"{_BIN}{os.pathsep}{os.environ.get('PATH', '')}"  # Flower starts programs by name
    with appending(log) as out:
        begins = out.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            list(map(str, command)),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **more, "PATH": path, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
            preexec_fn=_ends_with_us,
        )
    return _Started(process, log, begins)


@contextmanager
def _all_ended() -> Iterator[list[_Started]]:
    """A list of processes, to be added to, that are ended when this is closed: the last first, and
    then the others together. Ctrl-C and SIGTERM in the meantime hurry that, and leave none behind.
    """
    started: list[_Started] = []
    try:
        yield started
    finally:
        with _noted() as hurry:
            for some in (started[-1:], started[:-1]):
                _end([each.process for each in some], hurry)


def _end(processes: Sequence[subprocess.Popen[bytes]], hurry: threading.Event) -> None:
    """End processes and all that they began, of which some have sessions of their own: by SIGTERM,
    and by SIGKILL what has not heard it after some time, or when there is a hurry.
    """
    everyone = [pid for each in processes for pid in (each.pid, *descendants(each.pid))]
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in everyone:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        until = time.monotonic() + _ENDING
        while any(each.poll() is None for each in processes) and time.monotonic() < until:
            if hurry.is_set() and number == signal.SIGTERM:
                break
            time.sleep(0.05)


@contextmanager
def _noted() -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM raise nothing while this is open, and set the event."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # they come to the main thread alone
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: event.set()) for number in numbers]
    try:
        yield event
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _ends_with_us() -> None:
    """In a process that begins: end when its parent does, also where that is killed (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGTERM)


def descendants(pid: int) -> list[int]:
    """All processes that descend from one, as /proc knows them; none where there is no /proc."""
    parents: dict[int, list[int]] = {}
    for place in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = place.read_text().rpartition(")")[2].split()
            parents.setdefault(int(fields[1]), []).append(int(place.parent.name))
    found, todo = [], [pid]
    while todo:
        own = parents.get(todo.pop(), [])
        found += own
        todo += own
    return found


def _until(there: Callable[[], bool], started: _Started) -> None:
    until = time.monotonic() + _STARTING
    while not there():
        if started.process.poll() is not None or time.monotonic() > until:
            alive = started.process.poll() is None
            what = f"has not begun in {_STARTING:g} s" if alive else "has ended"
            said = _said_by(started)
            raise FedSieveError(
                f"a process of the federation {what}: "
                f"{said[-1][:300] if said else 'it said nothing'} (all of it is in {started.log})"
            )
        time.sleep(0.1)


def _said_by(started: _Started) -> list[str]:
    """The last lines of a process."""
    with started.log.open("rb") as file:
        file.seek(max(started.begins, file.seek(0, os.SEEK_END) - 10_000))
        return file.read().decode("utf-8", errors="replace").strip().splitlines()


def _answers(door: Path) -> bool:
    """Whether a worker takes requests there: the socket of one that was killed is there too."""
    try:
        return bool(ask(door, Frame({"do": "describe"}), 1.0).header)
    except (FedSieveError, OSError):
        return False


def _listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False
