"""The law of parity: a federation over Flower's real processes is the run in one process.

The same recipe, the same seed, and sites that hold the rows of the clients: the final adapter is
the same to the bit, and so is the ledger of payload bytes.
"""

import os
import signal
import time
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="needs the extra fedsieve[flower]")

from fedsieve import methods
from fedsieve.run import rundir, runner
from fedsieve.sites import federate
from tests import runs
from tests.conftest import LABELS, Command, Tiny
from tests.sites import processes
from tests.sites.worlds import PATIENCE, at_once, ledger, sockets, started, working, world


def assert_parity(run: Path, alone: Path) -> None:
    runs.assert_same_adapter(alone / rundir.ADAPTER, run / rundir.ADAPTER)
    for log in (rundir.METRICS, rundir.CLIENTS):
        assert ledger(run, log) == ledger(alone, log), log
    for line in runs.lines(run)[1:]:
        assert line["transport_bytes"] > line["down_bytes"] + line["up_bytes"]
    # Before round 0 every site was met, and told the recipe.
    text = (run / federate.TOLD).read_text()
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


@pytest.mark.parametrize("processes", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("ranked", ["values", "change"])
def test_masked_downloads(
    tiny: Tiny, tmp_path: Path, no_report: None, ranked: str, processes: bool
) -> None:
    """What masks keep is told as in one process; that B gets nothing is said once, or never.

    processes: the sites are workers of their own, reached over their sockets
    """
    given = world(
        tiny,
        tmp_path,
        ("north", "south"),
        tls=False,
        rounds=3,
        budgets={"north": {"down": 0.2, "up": 0.125}, "south": {"down": 0.1, "up": 0.25}},
        method={"name": "flasc", "ranked": ranked, "evaluated": 0.2},
        server={"optimizer": "adam", "lr": 1e-3},
    )
    runner.start(given.recipe, tmp_path / "alone", runs.quiet)
    federate.prepare(given.recipe, given.run, PATIENCE, given.listen)
    said: list[str] = []
    if processes:
        with working(given, {}):
            federate.serve(given.run, sockets(given.sites), PATIENCE, said.append)
    else:
        federate.serve(given.run, at_once(given.sites, []), PATIENCE, said.append)
    assert_parity(given.run, tmp_path / "alone")
    lines = runs.lines(given.run, rundir.CLIENTS)
    assert len(lines) == 6
    told = {f"{way}_{part}" for way in ("down", "up") for part in ("a", "b", "head")}
    assert all(told <= line.keys() for line in lines)
    assert len([text for text in said if "nothing of B" in text]) == (ranked == "values")
    assert any("(kept A 0" in text for text in said if text.startswith("round 2/3"))


# Each method once, with a bound of every kind that it knows; scaffold's loss falls below zero.
METHODS = [name for name in methods.names() if name != "fedsa_lora"]


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method(tiny: Tiny, tmp_path: Path, no_report: None, name: str) -> None:
    knobs = methods.load(name)().knobs
    bounds = {"ratio": 0.5, "down": 0.5, "up": 0.25}
    given = world(
        tiny,
        tmp_path,
        ("north", "south"),
        tls=False,
        rounds=6,
        method={"name": name},
        budgets={s: {k: v for k, v in bounds.items() if k in knobs} for s in ("north", "south")},
        server=None,
        training={"optimizer": "sgd", "lr": 0.03, "steps": 40, "batch": 8, "precision": "fp32"},
    )
    runner.start(given.recipe, tmp_path / "alone", runs.quiet)
    federate.prepare(given.recipe, given.run, PATIENCE, given.listen)
    federate.serve(given.run, at_once(given.sites, []), PATIENCE, lambda said: None)
    for log in (rundir.METRICS, rundir.CLIENTS):
        assert ledger(given.run, log) == ledger(tmp_path / "alone", log), log
    ours = sorted(path.name for path in (tmp_path / "alone" / rundir.ADAPTER).iterdir())
    for file in (file for file in ours if file.endswith(".safetensors")):
        theirs = given.run / rundir.ADAPTER / file
        assert theirs.read_bytes() == (tmp_path / "alone" / rundir.ADAPTER / file).read_bytes()
    told = runs.lines(given.run, rundir.CLIENTS)
    assert not any(line.get("dropped") for line in told)
    if name == "scaffold":
        assert min(line["loss"] for line in told) < 0


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
    with started(given) as running:
        processes.flwr(given.run, "run", given.run / "app", federate.CONNECTION)
        until = time.monotonic() + 300
        while len(runs.lines(given.run)) < 2:  # round 1 is done
            assert time.monotonic() < until
            time.sleep(0.1)
        processes.end(running.superlink, signal.SIGKILL)
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
    for program in (
        "flower-superlink --host 0.0.0.0",
        "flower-supernode ",
        "fedsieve federate --resume ",
    ):
        assert program in ran.out
