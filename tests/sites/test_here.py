"""`fedsieve federate --local`: rows divided over sites of this machine, and all their processes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedsieve.algebra.keys import Key, word
from fedsieve.data import partition
from fedsieve.errors import FedSieveError
from fedsieve.recipe import read as recipe
from fedsieve.recipe.examples import load_rows, tensors
from fedsieve.recipe.experiment import from_recipe
from fedsieve.recipe.schema import Recipe
from fedsieve.run import rundir, runner
from fedsieve.sites import federate, here, resident
from fedsieve.sites import site as sites
from fedsieve.sites.server import RoundPolicy
from fedsieve.tasks.digest import rows_digest
from fedsieve.tasks.examples import count, take, unasked
from fedsieve.train.reader import load_reader
from tests import runs
from tests.conftest import Command, Tiny, texts
from tests.sites.sites import quiet
from tests.tasks.test_federated import Kind, changes, each, quietly

pytestmark = pytest.mark.usefixtures("no_report")
BUDGETS = [{"share": 0.5, "ratio": 0.5}, {"share": 0.5}]


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
    given, rows, budgets = here.settle(asked, 3)
    assert given.data.classes
    here.write_sites(tmp_path, given, rows, budgets)
    experiment = from_recipe(here.of_clients(asked, 3))
    for client in experiment.federation.clients:
        site = sites.load(tmp_path / here.HERE / client.id / "site.toml")
        assert sites.budget_of(site) == client.budget
        assert len(rows[client.id]) == client.examples
        assert resident.start(site, quiet)


@each
@quietly
def test_the_rows_of_every_task_are_the_same_examples_there(
    tiny: Tiny, tmp_path: Path, kind: Kind
) -> None:
    """Read from the site's own file, by its site.toml."""
    given = {**changes(tiny, tmp_path, kind, kind.rows), "partition": {"kind": "iid", "clients": 2}}
    asked, rows, budgets = here.settle(recipe.check(tiny.table(**given)), 2)
    here.write_sites(tmp_path, asked, rows, budgets)
    reader, _ = load_reader(asked.model.source, kind.task)
    whole, _, _ = tensors(asked, load_rows(asked.data, asked.data.train, None), reader)
    for number, part in enumerate(partition.iid(count(whole), 2, _seed(asked)).values()):
        site = sites.load(tmp_path / here.HERE / f"000{number}" / "site.toml")
        data = asked.data.model_copy(update=dict(site.data))
        own, _, _ = tensors(asked, load_rows(data, data.train, None), reader)
        expected = unasked(take(whole, torch.as_tensor(part)))
        assert rows_digest(unasked(own), {}, []) == rows_digest(expected, {}, [])


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
    given, rows, budgets = here.settle(recipe.check(tiny.table()), 2)
    listen = federate.ServerAddress(port=here.free_port())
    federate.prepare(given, folder, RoundPolicy(2, 9.0, 9.0, 9.0), listen)
    here.write_sites(folder, given, rows, budgets)
    return folder


@pytest.mark.parametrize("name", ["/tmp/x", "../x", "..", "a/b", "St. Mary", "Köln", "x" * 65])
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
        here.settle(given, 2)


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
    "another server": (
        lambda run: edit(run / "flower/config.toml", "127.0.0.1", "192.0.2.1"), "no server of this",
    ),
    "an app of somebody's": (
        lambda run: (run / "app/fedsieve.py").write_text("raise SystemExit(7)"), "would be run",
    ),
}  # fmt: skip


def moved(path: Path) -> None:
    path.symlink_to(path.rename(path.parents[2] / "elsewhere"))


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
    partition = {"kind": "dirichlet", "alpha": 1.0, "clients": 2}
    path = tiny.write(tmp_path / "r.toml", partition=partition, rounds=3, cohort=2)
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
        until = time.monotonic() + 60
        while any(map(_runs, children)):
            assert time.monotonic() < until
            time.sleep(0.2)
    assert process.returncode == 0
    runs.assert_same_adapter(tmp_path / "alone" / rundir.ADAPTER, run / rundir.ADAPTER)
    assert not [line for line in runs.lines(run, rundir.CLIENTS) if line.get("dropped")]
