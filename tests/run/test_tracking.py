"""Trackers really written to and read back by their own readers, where they are installed."""

import contextlib
import errno
import json
import os
import shutil
import struct
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedsieve.engine.loop import Round
from fedsieve.errors import FedSieveError
from fedsieve.recipe import read as recipes
from fedsieve.run import rundir, runner, tracking
from fedsieve.run.runner import Stopped
from fedsieve.sites.told import for_sites
from fedsieve.study.jobs import Job, refuse_changed
from fedsieve.study.parts import ASKED
from tests import runs
from tests.conftest import Command, Tiny

pytestmark = pytest.mark.usefixtures("no_report")
KINDS = list(tracking.TRACKERS)
Points = dict[str, list[tuple[int, float]]]  # by figure: round and value, as they were told


def of_log(folder: Path) -> dict[str, dict[int, float]]:
    """What a tracker should hold, by figure and round, from the run's own log."""
    names = {
        "loss": "loss/training", "eval_loss": "loss/evaluation", "down_bytes": "bytes/down",
        "up_bytes": "bytes/up", "total_bytes": "bytes/total", "dense_bytes": "bytes/dense",
        "clients": "round/clients", "dropped": "round/dropped", "seconds": "round/seconds",
    }  # fmt: skip
    found: dict[str, dict[int, float]] = {}
    for row in runs.lines(folder):
        told = {names[key]: row[key] for key in names if key in row}
        told |= {f"score/{name}": value for name, value in row.get("metrics", {}).items()}
        for name, value in told.items():
            found.setdefault(name, {})[row["round"]] = value
    return found


def from_tensorboard(folder: Path) -> Points:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / rundir.TRACKING))
    read.Reload()
    tags = read.Tags()["scalars"]
    return {tag: [(each.step, each.value) for each in read.Scalars(tag)] for tag in tags}


def from_mlflow(folder: Path) -> Points:
    import mlflow

    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("tiny project")
    (run,) = client.search_runs([experiment.experiment_id])  # one, however often it was resumed
    assert run.info.status == "FINISHED"
    told = json.dumps(run.data.params)
    assert run.data.params["training.lr"] == "0.03"
    assert str(folder.parent) not in told
    return {
        name: [(each.step, each.value) for each in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }


def from_trackio(folder: Path) -> Points:
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = SQLiteStorage.get_runs("tiny project")
    found: Points = {}
    for row in SQLiteStorage.get_logs("tiny project", run):
        for name, value in row.items():
            if "/" in name:
                found.setdefault(name, []).append((row["step"], value))
    return found


def from_wandb(folder: Path) -> Points:
    """Its offline files: a log of LevelDB's form (blocks of 32 KiB, records in pieces) of protobuf
    records.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    files = sorted(Path("wandb").glob("offline-run-*/*.wandb"))
    assert len({path.stem for path in files}) == 1  # one name, however often it was resumed
    found: Points = {}
    for path in files:
        for data in _pieces(path.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            row = {
                each.key or ".".join(each.nested_key): json.loads(each.value_json)
                for each in record.history.item
            }
            for name, value in row.items():
                if "/" in name:
                    found.setdefault(name, []).append((row["round"], value))
    return found


def _pieces(data: bytes) -> Iterator[bytes]:
    at, held = 7, b""  # after the file's own header
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        held += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield held
            held = b""


READERS: dict[str, Callable[[Path], Points]] = {
    "tensorboard": from_tensorboard,
    "wandb": from_wandb,
    "mlflow": from_mlflow,
    "trackio": from_trackio,
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every tracker stays on this machine, and in this folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def asked(kind: str) -> dict[str, Any]:
    return {"tracking": {"kind": kind, "project": "tiny project"}}


@pytest.mark.parametrize("kind", KINDS)
def test_a_tracker_has_every_figure_of_every_round_also_of_a_resumed_run(
    kind: str, tiny: Tiny, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(kind)
    if kind == "trackio":
        for module in ("trackio.utils", "trackio.sqlite_storage"):
            monkeypatch.setattr(f"{module}.TRACKIO_DIR", here / "trackio")
    folder = here / "run"
    with pytest.raises(Stopped):
        runs.start(tiny, folder, runs.stop_at(2), **asked(kind))
    runner.resume(folder, runs.quiet)
    found = READERS[kind](folder)
    wanted = of_log(folder)
    assert len(wanted) > 10
    assert set(found) == set(wanted)
    for name, points in found.items():
        assert [number for number, _ in points] == sorted(wanted[name]), name
        for number, value in points:
            assert value == pytest.approx(wanted[name][number], rel=1e-6), name


def test_tensorboard_takes_back_rounds_that_are_done_again(tiny: Tiny, here: Path) -> None:
    """Stopped between two checkpoints by force, a run goes on from the older one."""
    pytest.importorskip("tensorboard")
    folder = here / "run"

    def killed(summary: Round, receipts: object) -> None:
        if summary.round == 3:
            raise MemoryError

    with pytest.raises(MemoryError):
        runs.start(tiny, folder, killed, checkpoint={"every": 2}, **asked("tensorboard"))
    runner.resume(folder, runs.quiet)
    assert [number for number, _ in from_tensorboard(folder)["bytes/down"]] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_package_is_a_sentence_before_anything_is_loaded(
    kind: Any, tiny: Tiny, here: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tracking.PACKAGES[kind]
    monkeypatch.setitem(tracking.PACKAGES, kind, package._replace(module="there_is_none"))
    recipe = tiny.write(here / "recipe.toml", **asked(kind))
    for words in (("run", recipe), ("federate", recipe)):
        done = command(*words)
        assert done.code == 2
        assert f"pip install 'fedsieve[{kind}]'" in done.err
        assert "loading" not in done.out
    assert not (here / "runs").exists()


def fails_at(last: int) -> Any:
    """A tracker whose server goes away after some rounds; -1: before the first."""

    def tracker(facts: tracking.Facts, folder: Path) -> Any:
        def log(number: int, figures: tracking.Figures) -> None:
            if number > last:
                raise ConnectionError("nobody is there")

        if last < 0:
            raise ConnectionError("nobody is there")
        return log, lambda ended: None

    return tracker


def test_a_tracker_that_cannot_begin_stops_a_run_and_one_that_fails_later_does_not(
    tiny: Tiny, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "check", lambda asked: None)
    monkeypatch.setitem(tracking.TRACKERS, "wandb", fails_at(-1))
    with pytest.raises(FedSieveError, match=r"could not begin .ConnectionError: nobody is there"):
        runs.start(tiny, here / "first", **asked("wandb"))
    assert runs.lines(here / "first") == []
    monkeypatch.setitem(tracking.TRACKERS, "wandb", fails_at(1))
    with pytest.warns(UserWarning, match="failed at round 2 and is told no more") as said:
        runs.start(tiny, here / "second", **asked("wandb"))
    assert sum("tracking:" in str(each.message) for each in said) == 1
    assert len(runs.lines(here / "second")) == 5


# --- what leaves, and where to


def test_what_is_told_of_a_recipe_has_no_path_and_no_client(tiny: Tiny) -> None:
    clients = {f"ward-{number}": {"ratio": 0.5} for number in range(12)}
    changes: dict[str, Any] = {
        "budgets": {"kind": "list", "clients": clients},
        "sampling__availability": {"ward-3": 0.5},
        "partition": {"kind": "column", "column": "author"},
    }
    told = tracking.settings_of(recipes.parse(tiny.table(**changes)))
    assert told["lora.rank"] == 4
    assert told["model.source"] == "bert"
    text = json.dumps(told)
    assert "ward-" not in text
    assert "author" not in text
    assert str(tiny.bert.parent) not in text


def test_of_a_run_that_protects_clients_no_figure_without_noise_is_told(
    whole: Path,
) -> None:
    last = runs.lines(whole)[-1]
    summary = Round(**last)._replace(epsilon=1.5, epsilon_unamplified=2.5)
    told = tracking.figures(summary, private=True)
    scores = {f"score/{name}" for name in last["metrics"]}
    assert set(told) == scores | {"loss/evaluation", "privacy/epsilon"}
    assert set(told) < set(tracking.figures(summary, private=False))


def test_no_recipe_can_say_where_a_run_is_tracked(tiny: Tiny) -> None:
    for key in ("address", "folder", "entity", "space_id", "tracking_uri"):
        given = {"tracking": {"kind": "mlflow", key: "http://example.invalid"}}
        with pytest.raises(FedSieveError, match=f"tracking.{key}: unknown key"):
            recipes.parse(tiny.table(**given))
    with pytest.raises(FedSieveError, match=r"tracking\.project"):
        recipes.parse(tiny.table(tracking={"kind": "wandb", "project": "someone/else"}))


def test_the_sites_are_not_told_of_a_tracker(tiny: Tiny) -> None:
    recipe = recipes.parse(tiny.table(**asked("wandb")))
    assert for_sites(recipe).tracking is None


def test_where_a_run_is_tracked_is_said_without_passwords(
    tiny: Tiny, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@figures.example/x")
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "https://own.example")
    said = {
        kind: tracking.where(recipes.parse(tiny.table(**asked(kind))).tracking, here)  # type: ignore[arg-type]
        for kind in KINDS
    }
    assert said["mlflow"].endswith(": https://figures.example/x")
    assert said["wandb"].endswith(": https://own.example")
    assert str(here) in said["tensorboard"]
    assert said["trackio"].endswith("on this machine")


@pytest.mark.parametrize(
    "address",
    [
        "https://me:secret@figures.example/x",
        "https://figures.example/x?write_token=secret",
        "postgresql://u:p@figures.example/x?password=secret&sslmode=require",
        "https://figures.example/x#secret",
    ],
)
def test_no_part_of_an_address_that_is_secret_is_shown(
    tiny: Tiny, here: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    """Also where the tracker's own error quotes it, whole or in part."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setenv("TRACKIO_SERVER_URL", address)
    for kind in ("mlflow", "trackio"):
        table = recipes.parse(tiny.table(**asked(kind))).tracking
        assert table is not None
        shown = tracking.where(table, here)
        assert "figures.example/x" in shown
        assert "secret" not in shown
    error = RuntimeError(f"cannot reach {address} (token secret)")
    assert "secret" not in tracking._said(error)
    assert "figures.example/x" in tracking._said(error)


def test_a_resumed_run_says_where_it_is_tracked_and_the_table_may_be_edited(
    tiny: Tiny, here: Path, command: Command
) -> None:
    pytest.importorskip("tensorboard")
    folder = here / "run"
    with pytest.raises(Stopped):
        runs.start(tiny, folder, runs.stop_at(2))
    with (folder / "recipe.toml").open("a") as file:
        file.write('[tracking]\nkind = "tensorboard"\n')
    done = command("resume", folder)
    assert done.code == 0, done.err
    assert "tracked by TensorBoard" in done.out
    assert [number for number, _ in from_tensorboard(folder)["bytes/down"]] == [3, 4]


def test_a_disk_that_is_full_is_told_once_and_in_a_sentence(
    tiny: Tiny, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not by the traceback of TensorBoard's own thread; others' threads are heard as before."""
    pytest.importorskip("tensorboard")
    from tensorboard.summary.writer.record_writer import RecordWriter

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    heard: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", heard.append)
    monkeypatch.setattr(RecordWriter, "write", full)
    with (
        warnings.catch_warnings(record=True) as said,
        contextlib.suppress(FedSieveError),  # where it cannot even begin
    ):
        warnings.simplefilter("always")
        runs.start(tiny, here / "run", rounds=2, **asked("tensorboard"))
    assert not heard
    assert said
    (other := threading.Thread(target=full)).start()
    other.join()
    assert len(heard) == 1


@pytest.mark.parametrize("what", ["id", "link", "folder"])
def test_a_trackers_files_of_somebody_else_are_refused(what: str, tiny: Tiny, here: Path) -> None:
    folder = here / "run"
    with pytest.raises(Stopped):
        runs.start(tiny, folder, runs.stop_at(2))
    with (folder / "recipe.toml").open("a") as file:
        file.write('[tracking]\nkind = "tensorboard"\n')
    own, elsewhere = folder / rundir.TRACKING, here / "elsewhere"
    elsewhere.mkdir()
    if what == "folder":
        own.symlink_to(elsewhere)
    else:
        own.mkdir()
        if what == "id":
            (own / tracking.ID).write_text("../../somebody's run\n", encoding="utf-8")
        else:
            (own / "events.out.tfevents.1").symlink_to(elsewhere / "file")
    pytest.importorskip("tensorboard")
    with pytest.raises(FedSieveError, match=r"holds no name|symbolic link"):
        runner.resume(folder, runs.quiet)
    assert list(elsewhere.iterdir()) == []
    assert len(runs.lines(folder)) == 3


def test_a_study_does_not_go_on_with_a_run_that_is_tracked_elsewhere(
    tiny: Tiny, here: Path, whole: Path
) -> None:
    recipe = recipes.parse(recipes.read(str(whole / "recipe.toml")))
    folder = here / "study" / "entry" / "seed-0"
    folder.parent.mkdir(parents=True)
    shutil.copytree(whole, folder)
    (folder / ASKED).write_text(recipes.dump(recipe, {}), encoding="utf-8")
    refuse_changed([Job("entry", recipe, folder)])
    with (folder / "recipe.toml").open("r+") as file:
        text = file.read().replace("[environment]", '[tracking]\nkind = "wandb"\n\n[environment]')
        file.seek(0)
        file.write(text)
    with pytest.raises(FedSieveError, match="another \\[tracking\\] than this study"):
        refuse_changed([Job("entry", recipe, folder)])
