"""The law of parity: a federation over Flower's real processes is the run in one process.

The same recipe, the same seed, and sites that hold the rows of the clients: the final adapter is
the same to the bit, and so is the ledger of payload bytes.
"""

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tomli_w

pytest.importorskip("flwr", reason="needs the extra fedsieve[flower]")

from fedsieve import federate, recipe, rundir, runner
from fedsieve.tables import Recipe
from tests.conftest import LABELS, Command, Tiny, write_rows
from tests.engines import runs
from tests.flower import certificates, processes
from tests.flower.sites import part, process

BUDGETS = {
    "north": {"ratio": 0.5, "down": 0.5, "up": 0.25},
    "south": {"ratio": 1.0, "down": 1.0, "up": 0.5},
    "west": {"ratio": 0.25, "down": 0.25, "up": 0.25},
}
# What a run in one process and a federation cannot have in common.
OWN = {*runs.CLOCKS, "transport_bytes", "aside_bytes"}
# A machine with much else to do starts Flower's processes slowly.
PATIENCE = federate.Patience(sites=2, deadline=200.0, setup=200.0, wait=200.0)


class World(NamedTuple):
    """What a federation of a test is made of. trust: a node's words for reaching the server."""

    folder: Path
    recipe: Recipe
    run: Path
    listen: federate.Listen
    sites: dict[str, Path]


def world(tiny: Tiny, folder: Path, names: Sequence[str], *, tls: bool, **changes: Any) -> World:
    """Rows in one file for the run in one process, and the same rows in a file for each site."""
    pool = write_rows(folder / "train.csv", 48, 1, names)
    budgets = {name: BUDGETS[name] for name in names}
    table = tiny.table(
        cohort=len(names),
        data__train=str(pool),
        data__classes=list(LABELS),
        partition={"kind": "column", "column": "author"},
        budgets={"kind": "list", "clients": budgets},
        evaluation__every=1,
        **changes,
    )
    sites = {}
    for name in names:
        home = folder / name
        home.mkdir()
        rows = {"train": str(part(pool, name)), "text": "text", "label": "label"}
        site = {"name": name, "device": "cpu", "model": str(tiny.bert), "data": rows}
        sites[name] = home / "site.toml"
        sites[name].write_text(tomli_w.dumps({**site, "budget": budgets[name]}), encoding="utf-8")
    safe = certificates.make(folder / "certificates") if tls else None
    listen = federate.Listen(port=processes.free_port(), certificates=safe)
    return World(folder, recipe.check(table), folder / "run", listen, sites)


@contextmanager
def started(given: World) -> Iterator["subprocess.Popen[bytes]"]:
    """Workers, server and nodes; the nodes' keys are registered where there is TLS.

    Gives the SuperLink.
    """
    with ExitStack() as stack:
        for path in given.sites.values():
            stack.enter_context(process(path))
        log = given.folder / "superlink.log"
        superlink = stack.enter_context(processes.superlink(given.run, given.listen, log))
        for path in given.sites.values():
            trust: list[str | Path] = ["--insecure"]
            if given.listen.certificates is not None:
                key = certificates.node_key(path.parent / "key")
                public = key.with_suffix(".pub")
                processes.flwr(given.run, "supernode", "register", public, federate.CONNECTION)
                root = given.listen.certificates / federate.CA
                trust = ["--root-certificates", root, "--auth-supernode-private-key", key]
            socket = path.parent / "worker" / "worker.sock"
            home, log = path.parent / "home", path.parent / "node.log"
            stack.enter_context(processes.supernode(home, given.listen, socket, log, trust))
        yield superlink


def ledger(folder: Path, log: str) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in OWN} for line in runs.lines(folder, log)]


def assert_parity(run: Path, alone: Path) -> None:
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        one, two = (each / rundir.ADAPTER / name for each in (alone, run))
        assert one.read_bytes() == two.read_bytes(), name
    for log in (rundir.METRICS, rundir.CLIENTS):
        assert ledger(run, log) == ledger(alone, log), log
    for line in runs.lines(run)[1:]:
        assert line["transport_bytes"] > line["down_bytes"] + line["up_bytes"]
    # Before round 0 every site was met, and told the recipe.
    text = (run / rundir.RECIPE).read_text()
    sites = {line["client"] for line in runs.lines(run, rundir.CLIENTS)}
    assert runs.lines(run)[0]["aside_bytes"] > len(sites) * len(text)


def test_two_sites_two_rounds(tiny: Tiny, tmp_path: Path, no_report: None) -> None:
    given = world(tiny, tmp_path, ("north", "south"), tls=False, rounds=2)
    runner.start(given.recipe, tmp_path / "alone", runs.quiet)
    federate.prepare(given.recipe, given.run, PATIENCE, given.listen)
    with started(given):
        processes.flwr(given.run, "run", given.run / "app", federate.CONNECTION, "--stream")
    assert_parity(given.run, tmp_path / "alone")
    for path in given.sites.values():
        (kept,) = (path.parent / "worker" / "adapters").iterdir()
        ours = given.run / rundir.ADAPTER / "adapter_model.safetensors"
        assert (kept / ours.name).read_bytes() == ours.read_bytes()


@pytest.mark.slow
def test_three_sites_with_tls_and_keys(tiny: Tiny, tmp_path: Path, no_report: None) -> None:
    given = world(tiny, tmp_path, ("north", "south", "west"), tls=True, rounds=4)
    runner.start(given.recipe, tmp_path / "alone", runs.quiet)
    patience = PATIENCE._replace(sites=3)
    federate.prepare(given.recipe, given.run, patience, given.listen)
    with started(given):
        processes.flwr(given.run, "run", given.run / "app", federate.CONNECTION, "--stream")
    assert_parity(given.run, tmp_path / "alone")


@pytest.mark.slow
def test_resumed_after_the_server_was_killed(
    tiny: Tiny,
    tmp_path: Path,
    no_report: None,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """kill -9 of the SuperLink with all that it started, in a middle round; a new one goes on."""
    given = world(tiny, tmp_path, ("north", "south"), tls=False, rounds=3)
    runner.start(given.recipe, tmp_path / "alone", runs.quiet)
    federate.prepare(given.recipe, given.run, PATIENCE, given.listen)
    with started(given) as superlink:
        processes.flwr(given.run, "run", given.run / "app", federate.CONNECTION)
        until = time.monotonic() + 300
        while len(runs.lines(given.run)) < 2:  # round 1 is done
            assert time.monotonic() < until
            time.sleep(0.1)
        processes.end(superlink, signal.SIGKILL)
    done = len(runs.lines(given.run)) - 1
    assert 1 <= done < 3
    monkeypatch.setenv("PATH", f"{processes.BIN}{os.pathsep}{os.environ['PATH']}")
    with started(given):  # nodes and workers are new too, in the same folders
        assert command("federate", "--resume", given.run).code == 0
    assert_parity(given.run, tmp_path / "alone")


def test_open_door_is_refused(tiny: Tiny, tmp_path: Path, command: Command) -> None:
    path = tiny.write(tmp_path / "recipe.toml", data__classes=list(LABELS))
    ran = command("federate", path, "--out", tmp_path / "run", "--host", "0.0.0.0")
    assert ran.code == 2
    assert "--host 0.0.0.0: other machines reach it, so it needs TLS" in ran.err
    assert not (tmp_path / "run").exists()
    ran = command("federate", path, "--out", tmp_path / "run", "--host", "0.0.0.0", "--insecure")
    assert ran.code == 0
    assert "paths under /v1/fleet/ only" in ran.err
    for program in ("flower-superlink --host 0.0.0.0", "flower-supernode ", "flwr run "):
        assert program in ran.out
