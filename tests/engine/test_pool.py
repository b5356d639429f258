"""Clients in worker processes: the bits of one process, whoever dies, and no process left over."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsieve import methods
from fedsieve.engine.spread import Spread, Worker
from fedsieve.errors import FedSieveError
from fedsieve.recipe import read as recipe
from fedsieve.recipe.workers import check, counts
from fedsieve.run import rundir, runner
from tests import runs
from tests.conftest import Command, Tiny
from tests.engine.test_methods import changes

pytestmark = pytest.mark.usefixtures("no_report")

LATE: dict[str, Any] = {
    "budgets": {
        "kind": "resources",
        "deadline": 100.0,
        "tiers": [
            {"memory": 50.0, "downlink": 5.0, "uplink": 1.0, "step_seconds": 0.5},
            {"memory": 50.0, "downlink": 1.0, "uplink": 0.5, "step_seconds": 2.0},
        ],
    },
    "sampling": {"extra": 2},
    "rounds": 2,
}


def workers(count: int) -> dict[str, Any]:
    return {"kind": "processes", "workers": count, "threads": 1}


@pytest.mark.slow
def test_a_run_goes_on_with_another_engine_and_ends_the_same(
    tiny: Tiny, tmp_path: Path, whole_with_memories: Path
) -> None:
    """Clients that keep a memory; stopped in one process and resumed with two workers."""
    folder = tmp_path / "run"
    with pytest.raises(runner.Stopped):
        runs.start(tiny, folder, runs.stop_at(1), **runs.FLASC)
    text = (folder / rundir.RECIPE).read_text(encoding="utf-8")
    edited = re.sub(r'kind = "process"\nworkers = "auto"', 'kind = "processes"\nworkers = 2', text)
    assert edited != text
    (folder / rundir.RECIPE).write_text(edited, encoding="utf-8")
    with pytest.raises(runner.Stopped):
        runner.resume(folder, runs.stop_at(4))
    (folder / rundir.RECIPE).write_text(text, encoding="utf-8")
    runner.resume(folder, runs.quiet)
    runs.assert_same(folder, whole_with_memories)


def test_a_worker_that_dies_is_replaced_and_its_client_runs_again(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole_with_memories: Path
) -> None:
    """Killed while it trains; and a client whose worker dies twice is dropped by name."""
    ask = Spread._ask
    killed: list[str] = []

    def kill(self: Spread, worker: Worker, job: Any) -> None:
        due = b'"round": 2' in job.request if killed else True
        if due and len(killed) < 3 and (len(killed) < 2 or killed[1] == job.client.id):
            killed.append(job.client.id)
            found = re.search(r"\d+$", worker.name)
            assert found
            os.kill(int(found[0]), signal.SIGKILL)
        ask(self, worker, job)

    monkeypatch.setattr(Spread, "_ask", kill)
    with pytest.warns(UserWarning, match="process .* was killed .*while client") as said:
        runs.start(tiny, tmp_path / "run", engine=workers(2), **{**runs.FLASC, "rounds": 2})
    assert len(killed) == sum("while client" in str(each.message) for each in said) == 3
    lines, before = (
        [line for line in runs.lines(each, rundir.CLIENTS) if line["round"] == 1]
        for each in (tmp_path / "run", whole_with_memories)
    )
    for line in (*lines, *before):
        for clock in runs.CLOCKS:
            line.pop(clock, None)
    assert lines == before  # of the round in which one died
    dropped = [line for line in runs.lines(tmp_path / "run", rundir.CLIENTS) if line.get("dropped")]
    assert [(each["client"], each["round"]) for each in dropped] == [(killed[-1], 2)]
    assert "its worker ended 2 times" in dropped[0]["dropped"]


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_process_is_left_behind(tiny: Tiny, tmp_path: Path, how: signal.Signals) -> None:
    path = tiny.write(tmp_path / "tiny.toml", engine=workers(2), rounds=1000)
    process = subprocess.Popen(
        [sys.executable, "-m", "fedsieve", "run", path, "--out", tmp_path / "run"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until = time.monotonic() + 60
        while not (tmp_path / "run" / rundir.CLIENTS).exists():
            assert time.monotonic() < until
            assert process.poll() is None
            time.sleep(0.1)
        while len(children := _children(process.pid)) != 2:  # a list read while threads come and go
            assert time.monotonic() < until
            time.sleep(0.1)
        process.send_signal(how)
        process.wait(30)
        while any(map(_runs, children)):
            assert time.monotonic() < until + 20
            time.sleep(0.1)
    finally:
        process.kill()
        process.wait()


def _children(pid: int) -> list[int]:
    return [
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_what_a_recipe_cannot_ask_for_is_refused(tiny: Tiny) -> None:
    for engine, said in (
        ({"workers": 2}, "engine: workers: an engine of kind 'process' has no workers"),
        ({"kind": "processes", "address": "x"}, "address: an engine of kind 'processes' has none"),
        ({"kind": "ray", "devices": ["cuda:0", "cuda:1"]}, "name one kind, 'cuda' or 'cpu'"),
        ({"kind": "processes", "devices": []}, "engine.devices"),
    ):
        with pytest.raises(FedSieveError, match=re.escape(said)):
            recipe.check(tiny.table(engine=engine))


def test_there_are_never_more_workers_than_clients_nor_four_a_core(tiny: Tiny) -> None:
    cores = os.cpu_count() or 1
    asked = recipe.check(tiny.table(engine=workers(1024)))
    assert counts(asked.engine, "cpu", asked.cohort)[0] == asked.cohort
    many = recipe.check(tiny.table(engine=workers(1024), cohort=4 * cores + 1))
    with pytest.raises(FedSieveError, match=f"at most {4 * cores} are started"):
        check(many)
    check(recipe.check(tiny.table(engine=workers(4 * cores), cohort=4 * cores + 1)))


def test_a_cluster_that_only_a_runs_folder_names_is_not_joined(
    tiny: Tiny, tmp_path: Path, whole_with_memories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows and model would go to it. A study goes by its own engine, whatever the folder says."""
    folder = tmp_path / "run"
    with pytest.raises(runner.Stopped):
        runs.start(tiny, folder, runs.stop_at(1), **runs.FLASC)
    path = folder / rundir.RECIPE
    text = path.read_text(encoding="utf-8")
    theirs = text.replace('kind = "process"', 'kind = "ray"\naddress = "192.0.2.1:6379"', 1)
    assert theirs != text
    path.write_text(theirs, encoding="utf-8")
    joined: list[str | None] = []
    monkeypatch.setattr("fedsieve.engine.on_ray.check", joined.append)
    with pytest.raises(FedSieveError, match=r"RAY_ADDRESS=192\.0\.2\.1:6379"):
        runner.resume(folder, runs.quiet)
    assert joined == []
    runner.resume(folder, runs.quiet, engine=recipe.check(tiny.table()).engine)
    assert joined == []
    runs.assert_same(folder, whole_with_memories)


def test_a_device_that_is_not_there_is_refused_before_anything_is_loaded(
    tiny: Tiny, tmp_path: Path, command: Command
) -> None:
    engine = {"kind": "processes", "devices": ["cpu", "cuda:77"]}
    path = tiny.write(tmp_path / "tiny.toml", engine=engine)
    ran = command("run", path, "--out", tmp_path / "run")
    assert ran.code == 2
    assert "engine.devices: device 'cuda:77' cannot be used here" in ran.err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "count"),
    [*((name, 2) for name in methods.names()), ("flasc", 1), ("flora", 3), ("hetlora", 3)],
)
def test_every_method_ends_with_the_bits_of_one_process(
    tiny: Tiny, tmp_path: Path, name: str, count: int
) -> None:
    given = changes(name, rounds=3)
    one = runs.start(tiny, tmp_path / "one", **given)
    many = runs.start(tiny, tmp_path / "many", engine=workers(count), **given)
    for part in ("tensors", "base"):
        expected, got = getattr(one, part), getattr(many, part)
        assert got.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in got.items())
    for log in (rundir.METRICS, rundir.CLIENTS):
        assert runs.untimed(tmp_path / "many", log) == runs.untimed(tmp_path / "one", log)


@pytest.mark.slow
def test_who_is_late_does_not_depend_on_the_engine(tiny: Tiny, tmp_path: Path) -> None:
    runs.start(tiny, tmp_path / "one", **LATE)
    runs.start(tiny, tmp_path / "many", engine=workers(2), **LATE)
    runs.assert_same(tmp_path / "many", tmp_path / "one")
    assert any(
        "late" in (line.get("dropped") or "")
        for line in runs.lines(tmp_path / "one", rundir.CLIENTS)
    )
