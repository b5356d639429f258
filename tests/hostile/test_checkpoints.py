"""A checkpoint whose tensors are not those of the recipe's method: named before anything is done.

Every kind of tensor that each method keeps, of the server's state and of clients' memories, is
damaged in turn; the file's own digest is right each time, as it is in a file that was made to harm.
"""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from fedsieve import methods
from fedsieve.algebra.adapter import Adapter
from fedsieve.algebra.catchup import SEEN
from fedsieve.engine.loop import Progress
from fedsieve.errors import FedSieveError
from fedsieve.methods import fedit
from fedsieve.recipe import read as recipe
from fedsieve.recipe.experiment import from_recipe
from fedsieve.recipe.method import build_method
from fedsieve.run import checkpoint, rundir, runner, state
from fedsieve.run.checkpoint import Snapshot
from fedsieve.tasks.digest import RowsDigest
from fedsieve.train.digest import BaseDigest, tensors_digest
from tests import runs, toy
from tests.conftest import Tiny
from tests.kinds import QUICK, quick_of

KEEPS: dict[str, dict[str, Any]] = {
    "flasc": {"feedback": True},
    "hetlora": {"pruning": True},
}
NEWEST = f"{rundir.CHECKPOINTS}/round-000002.safetensors"


@pytest.fixture(
    scope="module",
    params=quick_of(methods.names(), lambda name: name in QUICK or name in KEEPS),
)
def stopped(request: pytest.FixtureRequest, tiny: Tiny, tmp_path_factory: Any) -> Path:
    """A run of each method that was stopped after two of three rounds."""
    folder: Path = tmp_path_factory.mktemp(request.param) / "run"
    with pytest.raises(runner.Stopped):
        runs.start(
            tiny,
            folder,
            runs.stop_at(2),
            method={"name": request.param, **KEEPS.get(request.param, {})},
            server=None if "flex" in request.param or request.param == "flora" else {},
            budgets=[{}],
            rounds=3,
            partition={"kind": "iid", "clients": 6},  # of whom some have not taken part yet
            cohort=2,
            evaluation={"every": 3},
        )
    return folder


def kinds(tensors: dict[str, Tensor]) -> Iterator[str]:
    """One tensor of each group of the state, and of each group that clients keep."""
    seen = set()
    for name in sorted(tensors):
        parts = name.split("/")
        group = (parts[0], parts[2] if parts[0] == "memory" else parts[1])
        if group not in seen:
            seen.add(group)
            yield name


def damages(name: str, tensor: Tensor) -> Iterator[tuple[str, dict[str, Tensor | None]]]:
    other = name.rsplit("/", 1)[0] + "/nobody"
    yield "another shape", {name: torch.zeros(7, dtype=tensor.dtype)}
    yield "empty", {name: torch.zeros(0, dtype=tensor.dtype)}
    yield "more dimensions", {name: tensor[None]}
    yield (
        "another type",
        {name: tensor.to(torch.bool if tensor.is_floating_point() else torch.float32)},
    )
    if not name.rsplit("/", 1)[1].isdecimal():  # who has not taken part is not in a group by client
        yield "away", {name: None}
    yield "one too many", {other: torch.zeros(3)}


def with_tensors(folder: Path, changed: dict[str, Tensor | None]) -> None:
    facts, tensors = checkpoint._read(folder / NEWEST)
    new = {n: t for n, t in {**tensors, **changed}.items() if t is not None}
    facts = {**facts, "same": {n: e for n, e in facts["same"].items() if e in new and n not in new}}
    text = json.dumps(facts)
    told = {"facts": text, "digest": tensors_digest(new, text)}
    (folder / NEWEST).write_bytes(safetensors.torch.save(new, told))


def test_tensors_that_the_method_does_not_keep_are_named(stopped: Path, tmp_path: Path) -> None:
    """As `resume` looks at them, with the model loaded once for all."""
    source = str(stopped / rundir.RECIPE)
    experiment = from_recipe(recipe.load(source))
    resident = experiment.resident
    _, tensors = checkpoint._read(stopped / NEWEST)
    tried = 0
    for name in kinds(tensors):
        for damage, changed in damages(name, tensors[name]):
            folder = tmp_path / f"{tried}" / rundir.CHECKPOINTS
            shutil.copytree(stopped / rundir.CHECKPOINTS, folder)
            with_tensors(folder.parent, changed)
            with pytest.raises(FedSieveError) as refused:  # noqa: PT012
                snapshot = checkpoint.load(folder, resident.layout, resident.digest)
                state.refuse_another(folder.parent, experiment, snapshot)
                raise AssertionError((name, damage))
            assert str(folder.parent) in str(refused.value), (name, damage)
            assert len(str(refused.value)) < 700
            tried += 1
    assert tried >= 6


@pytest.mark.parametrize("value", [3, 5, -1, 2**31 - 1])
def test_rounds_that_have_not_been_are_named(stopped: Path, tmp_path: Path, value: int) -> None:
    """Of clients, where a method keeps how far each of them is; two rounds have been."""
    _, tensors = checkpoint._read(stopped / NEWEST)
    of_clients = {
        name: torch.full_like(tensor, value)
        for name, tensor in tensors.items()
        if f"/{SEEN}/" in name
    }
    if not of_clients:
        pytest.skip("it keeps no such numbers")
    shutil.copytree(stopped, tmp_path / "run")
    with_tensors(tmp_path / "run", dict(of_clients))
    with pytest.raises(FedSieveError, match=r"newest checkpoint's .* is not what"):
        runner.resume(tmp_path / "run", runs.quiet)


def test_nothing_is_trained_or_written_over_other_tensors(
    stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trains(*_: object) -> Any:
        raise AssertionError("a client trains")

    runs.before_fit(monkeypatch, trains)
    _, tensors = checkpoint._read(stopped / NEWEST)
    name = sorted(tensors)[0]
    shutil.copytree(stopped, tmp_path / "run")
    with_tensors(tmp_path / "run", {name: torch.zeros(7, dtype=tensors[name].dtype)})
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(FedSieveError, match="run"):
        runner.resume(tmp_path / "run", runs.quiet)
    assert {p: p.read_bytes() for p in before} == before


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_adapter_is_exported_that_is_not_finite(value: float) -> None:
    method, start = fedit.method(), toy.start()
    begun = method.init(start)
    group = {name: tensor.clone() for name, tensor in begun.trees["adapter"].items()}
    next(iter(group.values())).view(-1)[0] = value
    changed = begun._replace(trees={**begun.trees, "adapter": group})
    resident: Any = SimpleNamespace(put=lambda adapter: None)
    with pytest.raises(FedSieveError, match=r"adapter is not finite .*resume --at-round"):
        state.exported(Path("run"), method, resident, start, changed)


ODD_FACTS: list[Any] = [
    *({}, [], "x", 7, -1, 2**70, None, True, [7], {"x": "y"}, {"x": 7}, "9" * 5000),
    *({"weights": "x"}, {"config": "x"}, {"weights": "x", "config": "x", "start": None}),
    *({"train": "x"}, {"train": "x", "test": "y", "more": "z"}, {"summary": {}}),
    {"summary": {}, "receipts": [{}], "due": True},
]


@pytest.mark.parametrize("fact", [*checkpoint._Facts.model_fields])
def test_any_fact_may_be_anything(tmp_path: Path, fact: str) -> None:
    """With its right digest it is no accident: the file is named, and what of it is odd."""
    start, method = toy.start(), fedit.method()
    base, rows = BaseDigest("w", "c"), RowsDigest("a", "b")
    done = Snapshot(Progress(1, method.init(start)), {}, {}, base=base, rows=rows)
    path = checkpoint.save(tmp_path, done)
    facts, tensors = checkpoint._read(path)
    assert checkpoint.load(tmp_path, start.layout, base).rows == rows
    for odd in ODD_FACTS:
        text = json.dumps({**facts, fact: odd})
        told = {"facts": text, "digest": tensors_digest(tensors, text)}
        safetensors.torch.save_file(tensors, path, told)
        said = ""
        try:
            checkpoint.load(tmp_path, start.layout, base)
        except FedSieveError as error:
            said = str(error)
        assert not said or str(path) in said or fact == "base"
        assert len(said) < 1000


@pytest.mark.parametrize("name", ["memory/" + "9" * 5000 + "/a/b", "memory/1/a/b", "memory/00/a/b"])
def test_a_memory_of_no_client_is_refused(tmp_path: Path, name: str) -> None:
    """By however many digits it is called."""
    start, method = toy.start(), fedit.method()
    done = Snapshot(Progress(1, method.init(start)), {"c": {"a": {"b": torch.ones(1)}}}, {})
    path = checkpoint.save(tmp_path, done)
    facts, tensors = checkpoint._read(path)
    checkpoint._check(path, facts, tensors)
    for odd in ({**tensors, name: torch.ones(1)}, tensors):
        same = {} if name in odd else {name: next(iter(tensors))}
        with pytest.raises(FedSieveError, match="it holds a tensor 'memory/"):
            checkpoint._check(path, {**facts, "same": same}, odd)
    with pytest.raises(FedSieveError, match="total_bytes"):
        checkpoint._check(path, {**facts, "total_bytes": 2**63 - 1}, tensors)


def test_what_is_exported_is_the_runs_adapter_or_nothing(stopped: Path, tmp_path: Path) -> None:
    """Each damage to each kind of tensor of the server's state is refused, or has no part in it."""
    given = recipe.load(str(stopped / rundir.RECIPE))
    experiment = from_recipe(given)
    resident, method = experiment.resident, build_method(given)
    _, tensors = checkpoint._read(stopped / NEWEST)

    def export(run: Path) -> Adapter:
        snapshot = checkpoint.load(run / rundir.CHECKPOINTS, resident.layout, resident.digest)
        return state.exported(run, method, resident, experiment.start, snapshot.progress.state)

    whole = export(stopped)
    refused: set[str] = set()
    for name in kinds(tensors):
        for number, (damage, changed) in enumerate(damages(name, tensors[name])):
            folder = tmp_path / f"{name.replace('/', '-')}{number}"
            shutil.copytree(stopped / rundir.CHECKPOINTS, folder / rundir.CHECKPOINTS)
            with_tensors(folder, changed)
            found, said = whole, ""
            try:
                found = export(folder)
            except FedSieveError as error:
                said = str(error)
                refused.add(name)
            assert state._alike(found, whole), (name, damage)
            assert not said or str(folder) in said
    assert {name for name in refused if name.startswith("state/adapter/")}
    shutil.copytree(stopped, tmp_path / "run")
    name = next(name for name in sorted(tensors) if name.startswith("state/adapter/"))
    with_tensors(tmp_path / "run", {name: tensors[name][None]})
    with pytest.raises(FedSieveError, match=r"checkpoint"):
        runner.export(tmp_path / "run", tmp_path / "to")
    assert not list((tmp_path / "to").iterdir())


def test_a_run_that_is_as_it_was_left_goes_on(stopped: Path, tmp_path: Path) -> None:
    shutil.copytree(stopped, tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedsieve.report.write", lambda *_: [])
        runner.resume(tmp_path / "run", runs.quiet)
    assert rundir.last_round(tmp_path / "run") == 3
