"""Trackers: a run's figures, round by round, where others of the user's are looked at.

A recipe says by what a run is tracked, and under which project. Where that is, the user's own
settings say, as the tracker itself reads them (MLFLOW_TRACKING_URI, WANDB_BASE_URL, ...): so no
recipe and no run's folder of somebody else's sends figures, or the user's keys, to an address of
its own. What is told is what may be handed on with an adapter: settings without paths and without
names of clients, and of a run that protects real clients no figure that has no noise.

Each tracker is a function of `Facts` and of the run's folder, which gives how a round is told and
how the run ends. A run that goes on does so in the same run of the tracker: its name for that is
kept in `tracking/id`. A tracker that cannot begin stops a run before it trains; one that fails
later is left, with a warning.
"""

import contextlib
import importlib.util
import io
import logging
import math
import os
import re
import secrets
import shlex
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from fedsieve.disk import bytes_of, refuse_link, write_whole
from fedsieve.errors import FedSieveError, printable
from fedsieve.recipe.overrides import flat
from fedsieve.recipe.schema import Recipe, Tracker, Tracking, deployed
from fedsieve.run import rundir

if TYPE_CHECKING:
    from fedsieve.engine.loop import Round

ID = "id"  # in rundir.TRACKING
# Tables of a recipe that say what was trained and how, and nothing of places or clients.
_TOLD = {"seed", "rounds", "cohort", "lora", "method", "server", "privacy", "training"}
_TOLD_OF_MODEL = {"task", "dtype", "quantization"}
Figures = Mapping[str, float]
OnFigures = Callable[[int, Figures], None]  # a round's number, and what is told of it
Finish = Callable[[bool], None]  # whether the run came to its end


class Facts(NamedTuple):
    """What a tracker is told of a run before its first round.

    id: of the run at the tracker, the same whenever it goes on
    done: rounds that it was told of before; -1 before any
    settings: of the recipe, by dotted key
    """

    name: str
    project: str
    id: str
    done: int
    settings: Mapping[str, str | int | float | bool]


class Package(NamedTuple):
    """What a tracker needs: the module that is looked for, and the extra that brings it."""

    module: str
    extra: str


PACKAGES: dict[Tracker, Package] = {
    "tensorboard": Package("tensorboard", "tensorboard"),
    "wandb": Package("wandb", "wandb"),
    "mlflow": Package("mlflow", "mlflow"),
    "trackio": Package("trackio", "trackio"),
}


def check(asked: Tracking | None) -> None:
    """Raises FedSieveError, naming the extra, where the tracker's package is missing."""
    if asked is None:
        return
    package = PACKAGES[asked.kind]
    if importlib.util.find_spec(package.module) is None:
        raise FedSieveError(
            f"tracking.kind {asked.kind!r} needs a package that is not installed: "
            f"run `pip install 'fedsieve[{package.extra}]'`"
        )


def where(asked: Tracking, folder: Path) -> str:
    """Where a run is tracked, in words, as far as it can be told without the tracker."""
    told, project = os.environ.get, f"project {asked.project!r}"
    if asked.kind == "tensorboard":
        return f"TensorBoard: tensorboard --logdir {shlex.quote(str(folder))}"
    if asked.kind == "mlflow":
        place = told("MLFLOW_TRACKING_URI")
        return f"MLflow, {project}: {_address(place) if place else 'on this machine'}"
    if asked.kind == "wandb":
        if (mode := told("WANDB_MODE", "online")) != "online":
            return f"Weights & Biases, {project}: {printable(mode)}"
        place = _address(told("WANDB_BASE_URL", "https://api.wandb.ai"))
        return f"Weights & Biases, {project}: {place}"
    space, server = told("TRACKIO_SPACE_ID"), told("TRACKIO_SERVER_URL")
    at = f"the space {printable(space)}" if space else _address(server) if server else ""
    return f"Trackio, {project}: {at or 'on this machine'}"


@contextlib.contextmanager
def tracked(recipe: Recipe, folder: Path, done: int) -> "Iterator[Callable[[Round], None]]":
    """While the context is open, a run's tracker is told each round.

    done: the last round before the next that will be told; -1 before any
    Raises FedSieveError if the tracker's package is missing or if it cannot begin.
    """
    asked = recipe.tracking
    if asked is None:
        yield lambda summary: None
        return
    check(asked)
    private = deployed(recipe)
    facts = Facts(recipe.name, asked.project, _id(folder), done, settings_of(recipe))
    try:
        log, finish = TRACKERS[asked.kind](facts, folder)
    except Exception as error:  # of whatever the tracker and its network raise
        raise FedSieveError(
            f"tracking: {where(asked, folder)} could not begin ({_said(error)}): mend it, or take "
            f"[tracking] out of {folder / rundir.RECIPE}, then `{rundir.again(folder)}`"
        ) from error
    alive = True

    def on_round(summary: "Round") -> None:
        nonlocal alive
        if not alive:
            return
        try:
            log(summary.round, figures(summary, private=private))
        except Exception as error:  # as above; rounds are worth more than their curves
            alive = False
            warnings.warn(
                f"tracking: {asked.kind} failed at round {summary.round} and is told no more: "
                f"{_said(error)}. The run goes on, and its metrics.jsonl has every round",
                stacklevel=2,
            )

    ended = False
    try:
        yield on_round
        ended = True
    finally:
        try:
            finish(ended)
        except Exception as error:
            warnings.warn(f"tracking: {asked.kind} did not end well: {_said(error)}", stacklevel=2)


def figures(summary: "Round", *, private: bool) -> dict[str, float]:
    """What is told of a round, by name; what it does not have, or what is not finite, is left out.

    private: the run protects real clients, and what is told has noise or is of public rows
    """
    found: dict[str, float | None] = {
        "loss/evaluation": summary.eval_loss,
        "privacy/epsilon": summary.epsilon,
        **{f"score/{name}": value for name, value in (summary.metrics or {}).items()},
    }
    if not private:
        found |= {
            "loss/training": summary.loss,
            "bytes/down": summary.down_bytes,
            "bytes/up": summary.up_bytes,
            "bytes/total": summary.total_bytes,
            "bytes/dense": summary.dense_bytes,
            "round/clients": summary.clients,
            "round/dropped": summary.dropped,
            "round/seconds": summary.seconds,
        }
    return {k: float(v) for k, v in found.items() if v is not None and math.isfinite(v)}


def settings_of(recipe: Recipe) -> dict[str, str | int | float | bool]:
    """What a tracker is told of a recipe, by dotted key: no path, and no name of a client."""
    table = recipe.model_dump(mode="json", include={*_TOLD, "model", "partition"})
    table["model"] = {key: table["model"][key] for key in _TOLD_OF_MODEL}
    table["model"]["source"] = Path(recipe.model.source).name
    table["partition"] = {key: table["partition"][key] for key in ("kind", "clients", "alpha")}
    return {
        key: value if isinstance(value, int | float) else printable(str(value))[:200]
        for key, value in flat(table)
        if value is not None
    }


def _id(folder: Path) -> str:
    """What the run is called at its tracker; made at the first time.

    Raises FedSieveError for one that was not made here, and for links among the tracker's files.
    """
    own = folder / rundir.TRACKING
    refuse_link(own, folder=True)
    own.mkdir(mode=0o700, exist_ok=True)
    for path in own.iterdir():
        refuse_link(path)  # writers that go on with a file would go through it
    path = own / ID
    if not path.exists():
        write_whole(path, f"{secrets.token_hex(8)}\n".encode())
    told = bytes_of(path, 100).decode("ascii", "replace").strip()
    if not re.fullmatch("[0-9a-f]{16}", told):
        raise FedSieveError(
            f"{path} holds no name of a tracked run: put it back, or remove it to begin another"
        )
    return told


def _address(text: str) -> str:
    """An address as it may be shown: without a password or a token, wherever in it they stand."""
    try:
        parts = urlsplit(text)
        host = parts.netloc.rpartition("@")[2]
        return printable(urlunsplit(parts._replace(netloc=host, query="", fragment="")))
    except ValueError:
        return "an address that is none"


_ADDRESSES = ("MLFLOW_TRACKING_URI", "TRACKIO_SERVER_URL", "WANDB_BASE_URL")


def _said(error: Exception) -> str:
    """An error in words, in which its library may have quoted where it was sent."""
    said = str(error)
    for name in _ADDRESSES:
        if given := os.environ.get(name):
            said = said.replace(given, _address(given))
            for secret in _secrets(given):
                said = said.replace(secret, "***")
    return printable(f"{type(error).__name__}: {said}".split("\n")[0])[:300]


def _secrets(address: str) -> list[str]:
    """What an address holds beside where it leads."""
    try:
        parts = urlsplit(address)
        found = [parts.password, *(value for _, value in parse_qsl(parts.query)), parts.fragment]
    except ValueError:
        return []
    return [each for each in found if each and len(each) > 3]  # others are parts of other words


# --- the trackers


def tensorboard(facts: Facts, folder: Path) -> tuple[OnFigures, Finish]:
    """Event files in the run's folder; points of rounds that are done again are taken back."""
    from torch.utils.tensorboard import SummaryWriter

    purge = facts.done + 1 if facts.done >= 0 else None
    # Where it cannot write, its thread says so in a traceback, and the writer in an error of ours.
    before = threading.excepthook
    threading.excepthook = lambda fault: None if _of_tensorboard(fault.thread) else before(fault)
    writer = SummaryWriter(str(folder / rundir.TRACKING), purge_step=purge)
    if facts.done < 0:
        rows = "".join(f"| {key} | {value} |\n" for key, value in facts.settings.items())
        writer.add_text("recipe", f"| key | value |\n|---|---|\n{rows}", 0)

    def log(number: int, told: Figures) -> None:
        for name, value in told.items():
            writer.add_scalar(name, value, number)
        writer.flush()

    def finish(ended: bool) -> None:
        try:
            writer.close()
        finally:
            threading.excepthook = before

    return log, finish


def _of_tensorboard(thread: threading.Thread | None) -> bool:
    return type(thread).__module__.partition(".")[0] == "tensorboard"


def wandb(facts: Facts, folder: Path) -> tuple[OnFigures, Finish]:
    """Where WANDB_BASE_URL and WANDB_MODE say; nothing of the machine, the code or the terminal."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb as package

    run = package.init(
        project=facts.project,
        name=facts.name,
        id=facts.id,
        resume="allow",
        config=dict(facts.settings),
        settings=package.Settings(
            console="off",
            silent=True,
            disable_code=True,
            disable_git=True,
            login_timeout=60,
            x_disable_meta=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
        ),
    )
    run.define_metric("round")
    run.define_metric("*", step_metric="round")

    def log(number: int, told: Figures) -> None:
        run.log({"round": number, **told})

    return log, lambda ended: run.finish(exit_code=0 if ended else 1)


def mlflow(facts: Facts, folder: Path) -> tuple[OnFigures, Finish]:
    """Where MLFLOW_TRACKING_URI says; without it, where MLflow does by itself."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow as package

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    client = package.MlflowClient()
    found = client.get_experiment_by_name(facts.project)
    experiment = client.create_experiment(facts.project) if found is None else found.experiment_id
    tag = "fedsieve.id"
    known = client.search_runs([experiment], f"tags.`{tag}` = '{facts.id}'", max_results=1)
    if known:
        run = known[0].info.run_id
        client.set_terminated(run, "RUNNING")
    else:
        run = client.create_run(experiment, tags={tag: facts.id}, run_name=facts.name).info.run_id
        param = package.entities.Param
        told = [param(key, str(value)) for key, value in facts.settings.items()]
        client.log_batch(run, params=told)
    metric = package.entities.Metric

    def log(number: int, told: Figures) -> None:
        now = int(time.time() * 1000)
        each = [metric(name, value, now, number) for name, value in told.items()]
        client.log_batch(run, metrics=each, synchronous=False)

    def finish(ended: bool) -> None:
        package.flush_async_logging()
        client.set_terminated(run, "FINISHED" if ended else "KILLED")

    return log, finish


def trackio(facts: Facts, folder: Path) -> tuple[OnFigures, Finish]:
    """Where TRACKIO_SPACE_ID or TRACKIO_SERVER_URL say; without them, on this machine."""
    import trackio as package

    with contextlib.redirect_stdout(io.StringIO()):  # it has much to say
        run = package.init(
            project=facts.project,
            name=f"{facts.name}-{facts.id}",
            resume="allow",
            config=dict(facts.settings),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(number: int, told: Figures) -> None:
        run.log(dict(told), step=number)

    def finish(ended: bool) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            package.finish()  # not the run's own: it would be ended again when the process ends

    return log, finish


TRACKERS: dict[Tracker, Callable[[Facts, Path], tuple[OnFigures, Finish]]] = {
    "tensorboard": tensorboard,
    "wandb": wandb,
    "mlflow": mlflow,
    "trackio": trackio,
}
