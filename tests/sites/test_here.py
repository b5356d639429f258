"""`fedsieve federate --local`: rows divided over sites of this machine, and all their processes."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedsieve.algebra.keys import Key, word
from fedsieve.data import partition
from fedsieve.errors import FedSieveError
from fedsieve.recipe import read as recipe
from fedsieve.recipe.examples import load_rows, prepare, sample, tensors
from fedsieve.recipe.experiment import from_recipe
from fedsieve.recipe.schema import Recipe
from fedsieve.run import rundir, runner
from fedsieve.sites import federate, here, resident
from fedsieve.sites import site as sites
from fedsieve.sites.server import RoundPolicy
from fedsieve.sites.told import for_sites
from fedsieve.tasks.digest import rows_digest
from fedsieve.tasks.examples import count, take, unasked
from fedsieve.train.reader import load_reader
from tests import kinds, runs
from tests.conftest import Command, Tiny, texts
from tests.sites.sites import quiet
from tests.tasks.test_federated import Kind, changes, each, quietly

pytestmark = pytest.mark.usefixtures("no_report")
BUDGETS = [{"share": 0.5, "ratio": 0.5}, {"share": 0.5}]


@pytest.mark.parametrize("name", ['q"x', "b\\n", "two\nlines"])
def test_a_path_that_a_node_would_read_otherwise_is_refused_before_anything_is_written(
    tmp_path: Path, command: Command, name: str
) -> None:
    ran = command("federate", "demo", "--local", "2", "--out", tmp_path / name)
    assert ran.code == 2
    assert "--local: the path" in ran.err
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize(
    "kind",
    [
        {"kind": "iid"},
        {"kind": "dirichlet", "alpha": 1.0},
        {"kind": "dirichlet-by-client", "alpha": 1.0, "by": "author"},
    ],
)
def test_each_site_gets_the_rows_and_the_budget_of_a_client(
    tiny: Tiny, tmp_path: Path, kind: dict[str, object]
) -> None:
    asked = recipe.check(
        tiny.table(partition={**kind, "clients": 7}, budgets=BUDGETS, method={"name": "fslora"})
    )
    settled = here.settle(asked, 3, tmp_path)
    assert settled.recipe.data.classes
    here.write_sites(tmp_path, settled)
    experiment = from_recipe(here.of_clients(asked, 3))
    for client in experiment.federation.clients:
        site = sites.load(tmp_path / here.HERE / client.id / "site.toml")
        assert sites.budget_of(site) == client.budget
        assert len(settled.rows[client.id]) == client.examples
        assert resident.start(site, quiet)


@each
@quietly
def test_the_rows_of_every_task_are_the_same_examples_there(
    tiny: Tiny, tmp_path: Path, kind: Kind
) -> None:
    """Read from the site's own file, by its site.toml."""
    given = {**changes(tiny, tmp_path, kind, kind.rows), "partition": {"kind": "iid", "clients": 2}}
    settled = here.settle(recipe.check(tiny.table(**given)), 2, tmp_path)
    here.write_sites(tmp_path, settled)
    asked = settled.recipe
    reader, _ = load_reader(asked.model.source, kind.task)
    whole, _, _ = tensors(asked, load_rows(asked.data, asked.data.train, None), reader)
    for number, part in enumerate(partition.iid(count(whole), 2, _seed(asked)).values()):
        site = sites.load(tmp_path / here.HERE / f"000{number}" / "site.toml")
        data = asked.data.model_copy(update=dict(site.data))
        own, _, _ = tensors(asked, load_rows(data, data.train, None), reader)
        expected = unasked(take(whole, torch.as_tensor(part)))
        assert rows_digest(unasked(own), {}, []) == rows_digest(expected, {}, [])


RATED_AS = ("round", "eval_examples", "eval_loss", "metrics")
HELD_BACK: dict[str, object] = {"data__validation": 0.25, "evaluation__on": "validation"}
# What a recipe says of the rows that it is evaluated on. The rest of the rows is divided.
RATED: dict[str, dict[str, object]] = {
    "a share held back": HELD_BACK,
    "some of a share held back": {**HELD_BACK, "evaluation__limit": 5},
    "a share held back, and rows beside": {"data__validation": 0.25},
    "a split": {"data__train_split": "train", "data__test_split": "test", "data__test": None},
    "a share held back of a file with ;": {
        **HELD_BACK, "data__separator": ";", "data__test": None,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", RATED)
def test_what_is_held_back_is_held_back_once_and_the_server_evaluates_on_it(
    tiny: Tiny, tmp_path: Path, kind: str
) -> None:
    """The sites' rows and the server's, read from their files, are those of one process."""
    source = tiny.train
    if "split" in kind:
        source = tmp_path / "both"
        source.mkdir()
        shutil.copy(tiny.train, source / "train.csv")
        shutil.copy(tiny.test, source / "test.csv")
    elif ";" in kind:
        source = tmp_path / "rows.csv"
        source.write_text(tiny.train.read_text(encoding="utf-8").replace(",", ";"))
    given = {"data__train": str(source), "partition": {"kind": "iid", "clients": 3}}
    asked = recipe.check(tiny.table(**given, **RATED[kind]))
    alone = from_recipe(asked)
    settled = here.settle(asked, 3, tmp_path)
    here.write_sites(tmp_path, settled)
    told = for_sites(settled.recipe)
    for client in alone.federation.clients:
        site = sites.load(tmp_path / here.HERE / client.id / "site.toml")
        own = told.data.model_copy(update=dict(site.data))
        rows = load_rows(own, own.train, own.train_split)
        reader, _ = load_reader(asked.model.source, asked.model.task)
        prepared = prepare(told.model_copy(update={"data": own}), rows, None, reader)
        assert count(prepared.train) == client.examples
    server = settled.recipe
    assert server.data.test is not None
    assert alone.test is not None
    stored = load_rows(server.data, server.data.test, server.data.test_split)
    tested, _, _ = tensors(server, sample(server, stored), reader)
    assert rows_digest(tested, {}, []) == rows_digest(alone.test, {}, [])


def _seed(asked: Recipe) -> int:
    return word(Key(asked.seed, purpose="partition")) % 2**32


def test_what_cannot_be_divided_is_refused(tiny: Tiny, tmp_path: Path, command: Command) -> None:
    for given, said in (
        ({"kind": "column", "column": "author"}, "--local 50: column 'author' names"),
        ({"kind": "dirichlet", "alpha": 0.01, "clients": 3}, "without rows: raise partition.alpha"),
    ):
        path = tiny.write(tmp_path / "r.toml", partition=given)
        ran = command("federate", path, "--local", "50", "--out", tmp_path / "run")
        assert ran.code == 2
        assert said in " ".join(ran.err.split())
        assert not (tmp_path / "run").exists()


def prepared(tiny: Tiny, folder: Path) -> Path:
    pytest.importorskip("flwr", reason="needs the extra fedsieve[flower]")
    settled = here.settle(recipe.check(tiny.table()), 2, folder)
    listen = federate.ServerAddress(port=here.free_port())
    federate.prepare(settled.recipe, folder, RoundPolicy(2, 9.0, 9.0, 9.0), listen)
    here.write_sites(folder, settled)
    return folder


@pytest.mark.parametrize(
    "name", ["/tmp/x", "../x", "..", "a/b", "St. Mary", "Köln", "x" * 65, "server.log", here.HELD]
)
def test_a_value_that_names_no_site_is_refused_before_anything_is_written(
    tiny: Tiny, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number, (text, label) in enumerate(texts(40, seed=1)):
            row = {"text": text, "label": label, "at": name if number % 2 else "b"}
            file.write(json.dumps(row) + "\n")
    partition = {"kind": "column", "column": "at"}
    given = recipe.check(tiny.table(data__train=str(path), partition=partition))
    with pytest.raises(FedSieveError, match="cannot name a site"):
        here.settle(given, 2, tmp_path / "run")


def test_an_availability_of_no_site_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    """It was taken for one of a site that nobody had, and the other was asked in every round."""
    given = recipe.check(tiny.table(sampling={"availability": {"0000": 0.5, "00001": 0.5}}))
    with pytest.raises(FedSieveError, match=r"'00001', and no site is called that .*'0001'"):
        here.settle(given, 2, tmp_path / "run")


# What somebody does to the folder -> what is said of it.
FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "other rows": (
        lambda run: edit(run / "sites/0000/site.toml", here.ROWS, "/etc/passwd"),
        "is not what .* wrote",
    ),
    "another model": (
        lambda run: edit(run / "sites/0001/site.toml", "bert", "other"), "is not what .* wrote",
    ),
    "one key more": (
        lambda run: edit(run / "sites/0001/site.toml", "name = ", 'folder = "/tmp/x"\nname = '),
        "is not what .* wrote",
    ),
    "a site's folder that is elsewhere": (lambda run: moved(run / "sites/0001"), "link"),
    "a site's runs that are elsewhere": (
        lambda run: linked(run / "sites/0000/worker/runs"), "link",
    ),
    "a site's door that is elsewhere": (
        lambda run: linked(run / "sites/0001/worker/door"), "link",
    ),
    "a file deep in it that is elsewhere": (
        lambda run: linked(run / "sites/0001/worker/runs" / ("a" * 64) / "rounds"), "link",
    ),
    "rows that are a pipe": (lambda run: piped(run / "sites/0000" / here.ROWS), "something else"),
    "a worker's folder that is a file": (
        lambda run: (run / "sites/0000/worker").write_text(""), "something else",
    ),
    "held rows that are elsewhere": (lambda run: linked(run / "sites" / here.HELD), "link"),
    "another server": (
        lambda run: edit(run / "flower/config.toml", "127.0.0.1", "192.0.2.1"), "no server of this",
    ),
    "a log that is another file": (lambda run: hard(run / "sites/server.log"), "is a hard link"),
    "a worker's log that is another file": (
        lambda run: hard(run / "sites/0001/worker.log"), "is a hard link",
    ),
    "more sites than were asked for": (
        lambda run: shutil.copytree(run / "sites/0001", run / "sites/0002"), "holds 3 sites",
    ),
    "a site's file of holes": (
        lambda run: os.truncate(run / "sites/0000/site.toml", 1 << 31),
        "site.toml.* cannot be read",
    ),
    "a server's log of another kind": (
        lambda run: (run / "sites/server.log").mkdir(), "is something else",
    ),
    "a line that no run writes": (
        lambda run: (run / "clients.jsonl").write_text('{"x": 1}\n'), "clients.jsonl, line 1",
    ),
    "keys of holes": (lambda run: holes(run / "sites.json"), "sites.json .* more than"),
    "an app of somebody's": (
        lambda run: (run / "app/fedsieve.py").write_text("raise SystemExit(7)"), "would be run",
    ),
}  # fmt: skip


def moved(path: Path) -> None:
    path.symlink_to(path.rename(path.parents[2] / "elsewhere"))


def piped(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def hard(path: Path) -> None:
    (path.parents[3] / "mine").write_text("mine")
    path.hardlink_to(path.parents[3] / "mine")


def holes(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 31)


def linked(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to("/tmp")


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


@pytest.mark.parametrize("kind", FOREIGN)
def test_nothing_is_started_of_a_folder_that_is_not_as_it_was_left(
    tiny: Tiny, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    run = prepared(tiny, tmp_path / "run")
    act, said = FOREIGN[kind]
    act(run)
    monkeypatch.setattr(here, "at_work", lambda *_: pytest.fail("it was started"))
    ran = command("federate", "--resume", run)
    assert ran.code == 2
    assert re.search(said, " ".join(ran.err.split()))


def test_a_port_that_is_taken_is_changed_and_said(tiny: Tiny, tmp_path: Path) -> None:
    """Somebody else's server there would get the sites' updates."""
    run, said = prepared(tiny, tmp_path / "run"), list[str]()
    port = here.port_of(run)
    assert here.own_port(run, said.append) == port
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        taken = here.own_port(run, said.append)
    assert taken != port
    assert here.port_of(run) == taken
    assert said == [
        f"port {port} is taken by another program: this federation's server takes {taken}"
    ]
    here.check(run)


def test_more_sites_than_memory_are_refused(
    tiny: Tiny, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(here, "_EACH", 1 << 60)
    path = tiny.write(tmp_path / "r.toml", partition={"kind": "iid", "clients": 5})
    ran = command("federate", path, "--local", "5", "--out", tmp_path / "run")
    assert ran.code == 2
    assert "5 sites are as many workers" in " ".join(ran.err.split())
    assert not (tmp_path / "run").exists()


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_all_of_a_federation_by_one_command_is_the_run_in_one_process(
    tiny: Tiny, tmp_path: Path, how: signal.Signals
) -> None:
    """Stopped after a round and gone on with; and nothing that it began is left."""
    pytest.importorskip("flwr", reason="needs the extra fedsieve[flower]")
    given = {"partition": {"kind": "dirichlet", "alpha": 1.0, "clients": 2}, **HELD_BACK}
    path = tiny.write(tmp_path / "r.toml", **given, rounds=3, cohort=2)
    runner.start(recipe.load(str(path)), tmp_path / "alone", runs.quiet)
    run = tmp_path / "run"
    for words in ([str(path), "--local", "2", "--out", str(run)], ["--resume", str(run)]):
        process = subprocess.Popen(
            [sys.executable, "-m", "fedsieve", "federate", *words],
            stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        until = time.monotonic() + 400
        children: list[int] = []
        try:
            while process.poll() is None:
                assert time.monotonic() < until
                children = here.descendants(process.pid) or children
                begun = (run / rundir.METRICS).exists() and rundir.last_round(run) > 0
                if begun and words[0] != "--resume":
                    process.send_signal(how)
                    process.wait(100)
                time.sleep(0.2)
        finally:
            process.terminate()
            process.wait(100)
        until = time.monotonic() + 120  # as long as `--resume` waits for them (here.py)
        while any(map(_runs, children)):
            assert time.monotonic() < until
            time.sleep(0.2)
    assert process.returncode == 0
    scores = [
        [[line.get(name) for name in RATED_AS] for line in runs.lines(each, rundir.METRICS)]
        for each in (tmp_path / "alone", run)
    ]
    assert {line[1] for line in scores[0]} == {60, None}  # a quarter of 240, where it is rated
    assert scores[0] == scores[1]
    runs.assert_same_adapter(tmp_path / "alone" / rundir.ADAPTER, run / rundir.ADAPTER)
    assert not [line for line in runs.lines(run, rundir.CLIENTS) if line.get("dropped")]


DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); "


@pytest.mark.parametrize("how", ["deaf", "stopped", "a child of a shell"])
@pytest.mark.parametrize("number", kinds.some_of([signal.SIGINT, signal.SIGTERM]))
def test_who_presses_ctrl_c_again_leaves_no_process_behind(
    how: str, number: signal.Signals, tmp_path: Path
) -> None:
    """It hurries the end of what has not heard the first, and leaves nothing of it out."""
    line = DEAF + "time.sleep(60)"
    words = [sys.executable, "-c", line]
    if how == "a child of a shell":
        words = ["sh", "-c", f"trap '' TERM; {shlex.join(words)}; true"]
    press = threading.Timer(1.0, os.kill, (os.getpid(), number))
    with here._all_ended() as started:
        for place in "ab":
            started.append(here._start(words, tmp_path / f"{place}.log", {}))
            here._until(lambda: bool(here._said_by(started[-1])), started[-1])
        own = [each.process.pid for each in started]
        everyone = [*own, *(child for pid in own for child in here.descendants(pid))]
        assert len(everyone) == (4 if how == "a child of a shell" else 2)
        if how == "stopped":
            os.kill(own[0], signal.SIGSTOP)
        begun = time.monotonic()
        press.start()
    assert time.monotonic() - begun < here._ENDING
    until = time.monotonic() + 10  # what SIGKILL has hit takes a moment to be gone
    while any(map(alive, everyone)):
        assert time.monotonic() < until
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """A child that nobody has waited for yet is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_what_a_killed_command_left_in_the_temporary_folder_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run = tmp_path / "run"
    prefix = here._without_remains(run)
    left = Path(tempfile.mkdtemp(prefix=prefix))
    (left / "link.db").write_bytes(b"x")
    other = Path(tempfile.mkdtemp(prefix=here._without_remains(tmp_path / "other")))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / f"{prefix}link").symlink_to(elsewhere)
    assert here._without_remains(run) == prefix
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([other.name, "elsewhere"])
