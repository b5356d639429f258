"""Whole federations for tests: rows, sites and a recipe, and the processes of all of them.

A world holds the same rows twice: in one file with a column of authors, for the run in one process,
and in a file for each site. What a federation leaves on the disk can so be compared with what one
process leaves, also where some sites gave nothing in some rounds.
"""

import dataclasses
import subprocess
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import tomli_w

from fedsieve.algebra.budget import Client
from fedsieve.algebra.keys import Key
from fedsieve.engine.client import Reply
from fedsieve.errors import FedSieveError
from fedsieve.frame import pack, refusal, unpack
from fedsieve.recipe import read as recipe
from fedsieve.recipe.experiment import Experiment, from_recipe
from fedsieve.recipe.schema import Recipe
from fedsieve.run import rundir, runner
from fedsieve.sites import federate
from fedsieve.sites.certificates import CA
from fedsieve.sites.here import free_port
from fedsieve.sites.server import Incoming, Node, PendingRequest, RoundPolicy, Transport
from fedsieve.sites.worker import SOCKET, carry
from tests import runs
from tests.conftest import LABELS, Tiny, write_rows
from tests.sites import certificates, processes
from tests.sites.sites import asking, part, process, until_ready

BUDGETS = {
    "north": {"ratio": 0.5, "down": 0.5, "up": 0.25},
    "south": {"ratio": 1.0, "down": 1.0, "up": 0.5},
    "west": {"ratio": 0.25, "down": 0.25, "up": 0.25},
}
# What a run in one process and a federation cannot have in common.
OWN = {*runs.CLOCKS, "transport_bytes", "aside_bytes", "digest"}
# A machine with much else to do starts Flower's processes slowly.
PATIENCE = RoundPolicy(sites=2, deadline=200.0, setup=200.0, wait=200.0)

Process = subprocess.Popen[Any]
Missing = Mapping[int, Collection[str]]  # round -> sites


class World(NamedTuple):
    """What a federation of a test is made of."""

    folder: Path
    recipe: Recipe
    run: Path
    listen: federate.ServerAddress
    sites: dict[str, Path]


class Running(NamedTuple):
    """Its processes."""

    superlink: Process
    workers: dict[str, Process]
    nodes: dict[str, Process]


def world(
    tiny: Tiny,
    folder: Path,
    names: Sequence[str],
    *,
    tls: bool,
    budgets: Mapping[str, Mapping[str, float]] = BUDGETS,
    **changes: Any,
) -> World:
    """Rows in one file for the run in one process, and the same rows in a file for each site."""
    pool = write_rows(folder / "train.csv", 48, 1, names)
    afforded = {name: dict(budgets[name]) for name in names}
    given: dict[str, Any] = {
        "cohort": len(names),
        "data__train": str(pool),
        "data__classes": list(LABELS),
        "partition": {"kind": "column", "column": "author"},
        "budgets": {"kind": "list", "clients": afforded},
        "evaluation__every": 1,
    }
    table = tiny.table(**{**given, **changes})
    sites = {}
    for name in names:
        home = folder / name
        home.mkdir()
        rows = {"train": str(part(pool, name)), "text": "text", "label": "label"}
        site = {"name": name, "device": "cpu", "model": str(tiny.bert), "data": rows}
        sites[name] = home / "site.toml"
        sites[name].write_text(tomli_w.dumps({**site, "budget": afforded[name]}), encoding="utf-8")
    safe = certificates.make(folder / "certificates") if tls else None
    listen = federate.ServerAddress(port=free_port(), certificates=safe)
    return World(folder, recipe.check(table), folder / "run", listen, sites)


# (path of a site's file, ready=) -> its worker
Worker = Callable[..., AbstractContextManager[Process]]


@contextmanager
def working(given: World, workers: Mapping[str, Worker]) -> Iterator[dict[str, Process]]:
    """The sites' workers, started side by side. workers: what stands in for `fedsieve worker`."""
    own: dict[str, Process] = {}
    with ExitStack() as stack:
        for name, path in given.sites.items():
            worker = workers.get(name, process)(path, ready=False)
            own[name] = stack.enter_context(worker)
        for name, path in given.sites.items():
            until_ready(path, own[name])
        yield own


@contextmanager
def started(given: World, workers: Mapping[str, Worker] | None = None) -> Iterator[Running]:
    """Workers, server and nodes; the nodes' keys are registered where there is TLS.

    workers: what stands in for `fedsieve worker`, at some sites
    """
    nodes: dict[str, Process] = {}
    with ExitStack() as stack:
        own = stack.enter_context(working(given, workers or {}))
        log = given.folder / "superlink.log"
        superlink = stack.enter_context(processes.superlink(given.run, given.listen, log))
        for name in given.sites:
            if given.listen.certificates is not None:
                register(given, node_key(given, name))
            nodes[name] = stack.enter_context(node(given, name))
        yield Running(superlink, own, nodes)


def node(given: World, name: str) -> AbstractContextManager[Process]:
    """A site's node, with the site's own key where there is TLS."""
    home = given.sites[name].parent
    trust: list[str | Path] = ["--insecure"]
    if given.listen.certificates is not None:
        root = given.listen.certificates / CA
        trust = ["--root-certificates", root]
        trust += ["--auth-supernode-private-key", node_key(given, name)]
    address = home / "worker" / SOCKET
    return processes.supernode(home / "home", given.listen, address, home / "node.log", trust)


def node_key(given: World, name: str) -> Path:
    """A site's private key, made when it is first asked for."""
    path = given.sites[name].parent / "key"
    return path if path.exists() else certificates.node_key(path)


def register(given: World, key: Path) -> None:
    """What the server's owner does with a site's public key."""
    public = key.with_suffix(".pub")
    processes.flwr(given.run, "supernode", "register", public, federate.CONNECTION)


def begin(given: World, *, stream: bool = True) -> None:
    """The command that begins; with `stream` it returns when the run has ended."""
    more = ["--stream"] if stream else []
    processes.flwr(given.run, "run", given.run / "app", federate.CONNECTION, *more)


def sockets(sites: Mapping[str, Path]) -> Transport:
    """A network of nothing but the workers' sockets: real workers, and no Flower."""
    nodes = {number: path.parent / "worker" / SOCKET for number, path in enumerate(sites.values())}
    came: dict[str, bytes] = {}
    sent: list[str] = []

    def bring(request: str, address: Path, data: bytes) -> None:
        try:
            came[request] = carry(address, data)
        except FedSieveError as error:
            came[request] = pack(refusal(str(error)))

    def send(number: int, kind: str, data: bytes, seconds: float) -> PendingRequest:
        request = str(len(sent))
        sent.append(request)
        threading.Thread(target=bring, args=(request, nodes[number], data), daemon=True).start()
        return PendingRequest(request, len(data))

    return Transport(lambda: [Node(number) for number in nodes], send, collecting(came))


def at_once(sites: Mapping[str, Path], told: list[tuple[str, bytes]]) -> Transport:
    """A network of sites in this process, which answer at once; told: (site, frame), as sent."""
    asks = {number: (name, asking(path)) for number, (name, path) in enumerate(sites.items())}
    came: dict[str, bytes] = {}

    def send(number: int, kind: str, data: bytes, seconds: float) -> PendingRequest:
        name, ask = asks[number]
        told.append((name, data))
        came[str(len(told))] = pack(ask(unpack(data)))
        return PendingRequest(str(len(told)), len(data))

    return Transport(lambda: [Node(number) for number in asks], send, collecting(came))


def collecting(came: dict[str, bytes]) -> Callable[[Collection[str]], list[Incoming]]:
    """What hands over the answers that are there, once each."""

    def collect(requests: Collection[str]) -> list[Incoming]:
        there = [(request, came.pop(request)) for request in requests if request in came]
        return [Incoming(request, data, "", len(data)) for request, data in there]

    return collect


def ledger(folder: Path, log: str) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in OWN} for line in runs.lines(folder, log)]


def dropped(folder: Path) -> dict[tuple[int, str], str]:
    """(round, site) -> why its update was not merged, as the ledger has it."""
    lines = runs.lines(folder, rundir.CLIENTS)
    return {(r["round"], r["client"]): r["dropped"] for r in lines if "dropped" in r}


def merged(folder: Path, site: str) -> list[int]:
    """The rounds in which a site's update was merged."""
    lines = runs.lines(folder, rundir.CLIENTS)
    return [r["round"] for r in lines if r["client"] == site and "dropped" not in r]


Spoil = Callable[[Reply, int], Reply]


def alone(given: World, folder: Path, nothing: Missing, away: Missing, spoil: Spoil) -> None:
    """The same run in one process, in which some clients give nothing in some rounds.

    nothing: who trains, and whose answer does not come; away: who is not there to be asked
    spoil:   (reply, round) -> what becomes of any other answer
    """

    def build(asked: Recipe) -> Experiment:
        experiment = from_recipe(asked)
        inner = experiment.federation.exchange
        now = 0

        def there() -> list[Client]:
            nonlocal now
            now += 1
            return [c for c in experiment.federation.clients if c.id not in away.get(now, ())]

        def carried(messages: Iterable[tuple[Client, bytes]], key: Key) -> Iterator[Reply]:
            for reply in inner.carry(messages, key):
                if reply.client.id in nothing.get(key.round, ()):
                    yield reply._replace(update=None, reason="it gave nothing")
                else:
                    yield spoil(reply, key.round)

        federation = dataclasses.replace(
            experiment.federation, exchange=inner._replace(carry=carried), there=there
        )
        return dataclasses.replace(experiment, federation=federation)

    folder.mkdir()
    rundir.create(folder, recipe.dump(given.recipe, {}))
    runner.resume(folder, runs.quiet, build)


def assert_as_if_it_gave_nothing(
    given: World, away: Missing | None = None, spoil: Spoil = lambda reply, number: reply
) -> None:
    """The adapter is that of a run in one process in which no update that was dropped ever came.

    To the bit, and so are the figures of all others. away: who was not asked, by round; by default
    nobody
    """
    nothing: dict[int, set[str]] = {}
    for number, site in dropped(given.run):
        nothing.setdefault(number, set()).add(site)
    other = given.folder / "alone"
    alone(given, other, nothing, away or {}, spoil)
    runs.assert_same_adapter(other / rundir.ADAPTER, given.run / rundir.ADAPTER)
    ours, theirs = (
        [line for line in ledger(each, rundir.CLIENTS) if "dropped" not in line]
        for each in (given.run, other)
    )
    assert ours == theirs
    # What came and was not merged is counted all the same; one process counts none there.
    bytes_up = ("up_bytes", "total_bytes", "dense_bytes")
    ours, theirs = (
        [{k: v for k, v in line.items() if k not in bytes_up} for line in ledger(each, name)]
        for each, name in ((given.run, rundir.METRICS), (other, rundir.METRICS))
    )
    assert ours == theirs


def missing_from(folder: Path, sites: Collection[str]) -> dict[int, set[str]]:
    """Who was not asked, by round, as the ledger has it."""
    asked: dict[int, set[str]] = {}
    for line in runs.lines(folder, rundir.CLIENTS):
        asked.setdefault(line["round"], set()).add(line["client"])
    return {number: set(sites) - there for number, there in asked.items()}
