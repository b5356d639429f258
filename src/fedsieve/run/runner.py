"""Runs on disk: start, resume, export.

A run is a pure function of its recipe. What is written along the way serves to look at it and to go
on after a stop: a resumed run ends with the same adapter and the same metrics as one that was never
stopped, byte for byte, timings aside.

Noise that comes from the operating system is the one thing that no recipe repeats. A round with
such noise is on the disk before anything of it leaves (an evaluation, a message, the adapter), and
is never drawn a second time once it is: two noisy versions of one round would tell more than the
account of epsilon counts.

A run's folder may come from somebody else, or have been changed by hand. Before the model is loaded
all that is there has been read and found in order (found.py): no links, no programs, the recipe by
which the rounds were trained, whole logs.
"""

import shutil
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from fedsieve import report
from fedsieve.algebra.adapter import Adapter
from fedsieve.disk import (
    bytes_of,
    objects,
    of_the_disk,
    remove,
    remove_link,
    take_place,
    write_whole,
)
from fedsieve.engine import loop
from fedsieve.engine.callbacks import CallbackFailed, OnClient, OnRound, counted, tell
from fedsieve.engine.loop import Progress, Receipt, Round, Unevaluated
from fedsieve.errors import FedSieveError, NoUsableUpdate, count, reason
from fedsieve.recipe import read as recipes
from fedsieve.recipe.experiment import (
    Experiment,
    from_recipe,
    locate,
    set_up_resident,
    with_secret,
)
from fedsieve.recipe.method import build_method
from fedsieve.recipe.schema import Engine, Recipe, deployed
from fedsieve.recipe.told import told
from fedsieve.run import checkpoint, rundir, tracking
from fedsieve.run.checkpoint import Snapshot
from fedsieve.run.found import in_order
from fedsieve.run.state import exported, refuse_another
from fedsieve.train.card import Told
from fedsieve.train.model import pick_device
from fedsieve.train.reader import load_reader, reader_parts

Show = Callable[[Round, Sequence[Receipt]], None]  # called after every round
Build = Callable[[Recipe], Experiment]  # who sets the federation up: here, or on a network


class Stopped(Exception):
    """The run was stopped by the user; its state is kept."""


def start(
    recipe: Recipe,
    folder: Path,
    show: Show,
    build: Build = from_recipe,
    *,
    overwrite: bool = False,
    on_round: Sequence[OnRound] = (),
    on_client: OnClient | None = None,
) -> Adapter:
    """Run a recipe from its beginning, in a directory of its own.

    on_round: called with each round once it is logged; one that fails stops the run, its round kept
    on_client: called with each reply of a round as it comes
    Raises FedSieveError for bad input, Stopped after Ctrl-C or SIGTERM.
    """
    rundir.refuse(folder, overwrite=overwrite)  # before the model and the data are loaded
    tracking.check(recipe.tracking)
    experiment = build(recipe)
    assert experiment.recipe is not None
    facts = _facts(experiment, experiment.recipe)
    secret = rundir.new_secret() if deployed(experiment.recipe) else None
    if secret is not None:
        facts |= rundir.told_of(secret)
    text = recipes.dump(experiment.recipe, facts)
    with rundir.lock(folder), rundir.disk_errors(folder):
        recipe = experiment.recipe
        rundir.create(folder, text, overwrite=overwrite, secret=secret)
        experiment = _with_secret(experiment, recipe, folder)
        return _go_on(experiment, recipe, None, folder, show, on_round, on_client)


def resume(
    folder: Path,
    show: Show,
    build: Build = from_recipe,
    *,
    rounds: int | None = None,
    allow_code: bool = False,
    accept_changes: bool = False,
    engine: Engine | None = None,
    on_round: Sequence[OnRound] = (),
    on_client: OnClient | None = None,
) -> Adapter:
    """Go on with a run from its newest whole checkpoint; a finished run is left as it is.

    rounds: as many as the run is to have, in place of its recipe's; it then ends as one that was
        started with so many, but where a learning rate falls over the rounds
    allow_code: see `recipes.check`
    accept_changes: go on though recipe, rows or tokenizer were changed since the rounds so far were
        trained
    engine: where the clients run from here on; None as the folder's recipe says, but for a cluster
        that the environment does not name
    on_round, on_client: as in `start`, of the rounds that are left
    Raises FedSieveError if the folder holds no run that can be resumed, if anything in it is not as
    a run leaves it, or if the base model has changed since; Stopped as `start` does.
    """
    rundir.check(folder)
    with rundir.lock(folder):
        recipe = in_order(
            folder,
            rounds=rounds,
            allow_code=allow_code,
            accept_changes=accept_changes,
            engine=engine,
        )
        if deployed(recipe):
            rundir.secret_seed(folder)  # refused before the model and the data are loaded
        tracking.check(recipe.tracking)
        experiment = _with_secret(build(recipe), recipe, folder)
        checkpoints = rundir.place(folder, rundir.CHECKPOINTS)
        snapshot, known = None, rundir.environment_of(folder)
        facts: Mapping[str, Any] = known
        if rundir.untouched(folder):
            facts = _anew(folder, known, experiment, recipe)
        else:
            resident = experiment.resident
            snapshot = checkpoint.load(checkpoints, resident.layout, resident.digest)
            if recipe.rounds < (done := snapshot.progress.round):
                raise FedSieveError(
                    f"{folder}: {count(done, 'round')} are done already, and it is to have "
                    f"{recipe.rounds}: give it as many, or go back by `--at-round`"
                )
            _refuse_one_count(folder, recipe, snapshot)
            _refuse_other_rows(folder, recipe, snapshot, experiment, accept_changes)
            if resident.tokenizer is not None:
                now = reader_parts(resident.tokenizer)
                facts = known | _refuse_another_reader(folder, now, accept_changes, "go on with")
            before = {row["client"] for row in _logged(folder, rundir.CLIENTS, snapshot)}
            refuse_another(folder, experiment, snapshot, before)
            experiment.memories.update(snapshot.memories)
        if deployed(recipe):
            _refuse_other_noise(folder, snapshot.progress.round if snapshot else 0)
        with rundir.disk_errors(folder):
            rundir.cut_back(folder, snapshot.marks if snapshot else {rundir.METRICS: 0})
            if snapshot:
                checkpoint.forget_after(checkpoints, snapshot.progress.round)
                kept = snapshot
                snapshot = _still_due(folder, recipe, snapshot, experiment)
                if rounds is not None:
                    snapshot = snapshot._replace(recipe=recipes.dump(recipe, {}))
                # What takes most room comes first: without it nothing has changed. After a kill
                # before the recipe is written, `in_order` asks for the rounds again.
                if snapshot is not kept:
                    checkpoint.save(checkpoints, snapshot)
                    rundir.cut_back(folder, snapshot.marks)
            if rounds is not None or facts != known:
                _rewrite(folder, recipe, facts)
            return _go_on(experiment, recipe, snapshot, folder, show, on_round, on_client)


def _facts(experiment: Experiment, recipe: Recipe) -> dict[str, Any]:
    """What a run's recipe says of where and over what it begins, in [environment]."""
    resident = experiment.resident
    facts = rundir.environment(str(resident.device))
    if experiment.rows is not None and not deployed(recipe):
        facts |= {"rows": experiment.rows._asdict()}
    if resident.body is not None:
        facts |= {"base": resident.body}
    if resident.tokenizer is not None:
        facts |= {"reader": reader_parts(resident.tokenizer)}
    return {**facts, "notes": list(experiment.notes)}


def _anew(
    folder: Path, known: Mapping[str, Any], experiment: Experiment, recipe: Recipe
) -> Mapping[str, Any]:
    """The [environment] of a run that begins only now: base, rows and tokenizer may be others than
    when its folder was made. A federation's is of its sites, and says nothing of these.
    """
    if rundir.federated(folder):
        return known
    begun = ("rows", "base", "reader")
    kept = {name: fact for name, fact in known.items() if name not in begun}
    return {**kept, **_facts(experiment, recipe)}


def _still_due(
    folder: Path, recipe: Recipe, snapshot: Snapshot, experiment: Experiment
) -> Snapshot:
    """The snapshot, with what is left of its round by the rounds that the run has now.

    A last round is evaluated. One that has become the last is halved again: its line of the log is
    left out of the marks, and comes back with its scores. So is one whose details are not there,
    as they are of the last evaluation alone, and that was a later round's; a run for real clients
    keeps none.
    """
    number, federation = snapshot.progress.round, experiment.federation
    if snapshot.half is not None:
        due = federation.evaluates(number, recipe.rounds)
        if due == snapshot.half.due:
            return snapshot
        return snapshot._replace(half=snapshot.half._replace(due=due))
    # Of a federation's last round nobody may have been there to ask; its rounds stay as they are.
    if number != recipe.rounds or federation.evaluate is None or rundir.federated(folder):
        return snapshot
    path, end = rundir.place(folder, rundir.METRICS), snapshot.marks[rundir.METRICS]
    line = _logged(folder, rundir.METRICS, snapshot)[-1]
    if "eval_examples" in line and (deployed(recipe) or (folder / rundir.EVALUATION).exists()):
        return snapshot
    before = bytes_of(path, None)[:end].rstrip().rfind(b"\n") + 1
    half = Unevaluated(checkpoint.round_of(path, line), [], snapshot.progress, due=True)
    return snapshot._replace(half=half, marks={**snapshot.marks, rundir.METRICS: before})


def _refuse_other_rows(
    folder: Path, recipe: Recipe, snapshot: Snapshot, experiment: Experiment, accept: bool
) -> None:
    """Raises FedSieveError where the rows are others than those of the rounds so far: their figures
    would be of neither. accept: warn of it, where epsilon does not count on the rows as they were
    """
    then, now = snapshot.rows, experiment.rows
    if then is None or now is None or then == now:
        return
    told = deployed(recipe) or rundir.federated(folder)
    what = "training rows" if then.train != now.train else "rows that are evaluated on"
    said = f"{folder}: the {what} were changed since the run's rounds were trained"
    if accept and not deployed(recipe):
        warnings.warn(said, stacklevel=3)
        return
    raise FedSieveError(
        f"{said}, or are read otherwise (by another tokenizer, say): put them back, or start a new "
        "run" + ("" if told else "; --accept-changes goes on with them as they are now")
    )


def _refuse_another_reader(
    folder: Path, now: Mapping[str, str], accept: bool, to: str
) -> dict[str, Mapping[str, str]]:
    """What [environment] is to say of the reader, where it has changed and that is accepted.

    accept: warn of it; to: what it is accepted for, in words
    Raises FedSieveError where what would be written beside the adapter reads otherwise than what it
    was trained with.
    """
    then = rundir.reader_of(folder)
    changed = [part for part in now if then.get(part) != now[part]]
    if not then or not changed:  # a run of an older FedSieve has none
        return {}
    what = "image processor" if "pixels" in now else "tokenizer"
    said = (
        f"{folder}: the base model's {what} has changed since the run began (its "
        f"{' and '.join(changed).replace('_', ' ')})"
    )
    if accept:
        warnings.warn(said, stacklevel=3)
        return {"reader": now}
    raise FedSieveError(
        f"{said}, and the adapter learned with the old one: put its files back, or give "
        f"--accept-changes to {to} it as it is now"
    )


def _rewrite(folder: Path, recipe: Recipe, facts: Mapping[str, Any]) -> None:
    """Let a run's folder hold this recipe. facts: of its [environment]"""
    text = recipes.dump(recipe, facts)
    write_whole(folder / rundir.RECIPE, text.encode())


def _refuse_one_count(folder: Path, recipe: Recipe, snapshot: Snapshot) -> None:
    """Raises FedSieveError for rounds that would go on from an Adam of 0.1.

    It had one count of steps for all tensors, which is wrong for methods whose tensors take turns.
    """
    counts = snapshot.progress.state.trees.get("count", {})
    if "steps" in counts and snapshot.progress.round < recipe.rounds:
        raise FedSieveError(
            f"{folder} is of an older FedSieve, whose checkpoints have one count of Adam's steps "
            "for all tensors and not one for each: start it again, or finish it with that version"
        )


def export(
    folder: Path,
    to: Path,
    *,
    merge: bool = False,
    for_hub: bool = False,
    trust_remote_code: bool = False,
    allow_code: bool = False,
    accept_changes: bool = False,
) -> int:
    """Write the newest checkpoint's adapter, or the whole model with it merged in, to a folder.

    for_hub: see `ResidentModel.save`
    trust_remote_code: see `load_base`; allow_code, accept_changes: see `resume`
    Returns the round it is from. Raises FedSieveError as `resume` does, and if `to` is not empty.
    """
    rundir.check(folder)
    try:
        to.mkdir(parents=True, exist_ok=True)
        if any(to.iterdir()):
            raise FedSieveError(f"{to} is not empty: choose another folder")
    except OSError as error:
        raise FedSieveError(f"{to} cannot be written: {error.strerror}") from error
    recipe = in_order(folder, allow_code=allow_code, accept_changes=accept_changes)
    source = locate(recipe.model.source)
    task = recipe.model.task
    tokenizer, _ = load_reader(source, task, trust_remote_code=trust_remote_code)
    _refuse_another_reader(folder, reader_parts(tokenizer), accept_changes, "write")
    device = pick_device("cpu")
    resident = set_up_resident(recipe, tokenizer, device, trust_remote_code=trust_remote_code)
    place = rundir.place(folder, rundir.CHECKPOINTS)
    snapshot = checkpoint.load(place, resident.layout, resident.digest)
    method, state = build_method(recipe), snapshot.progress.state
    adapter = exported(folder, method, resident, resident.adapter(), state)
    known = _told(folder, recipe, snapshot)
    try:
        if merge:
            resident.merge(adapter, to, known)
        else:
            resident.save(adapter, to, known, for_hub=for_hub)
    except BaseException as error:
        for path in to.iterdir():  # it was empty: half an adapter is in nobody's way
            remove(path)
        if of_the_disk(error) is not None:
            raise FedSieveError(f"{to} cannot be written: {reason(error)}") from error
        raise
    return snapshot.progress.round


def rounds_of(folder: Path) -> int:
    """How many rounds a run's recipe asks for."""
    rundir.check(folder)
    source = str(folder / rundir.RECIPE)
    return recipes.parse(recipes.read(source), source).rounds


def _go_on(
    experiment: Experiment,
    recipe: Recipe,
    snapshot: Snapshot | None,
    folder: Path,
    show: Show,
    on_round: Sequence[OnRound],
    on_client: OnClient | None,
) -> Adapter:
    """Train the rounds that are left, from a snapshot that is on the disk, or from none."""
    checkpoints = rundir.place(folder, rundir.CHECKPOINTS)
    text = recipes.dump(recipe, {})
    if on_client is not None:
        experiment = replace(experiment, federation=counted(experiment.federation, on_client))
    done = -1 if snapshot is None else snapshot.progress.round - (snapshot.half is not None)
    with (
        sigterm_as_ctrl_c(),
        experiment.federation.exchange.at_work(),
        tracking.tracked(recipe, folder, done) as track,
    ):
        if snapshot is None:
            first, progress = loop.begin(experiment.federation, experiment.start)
            rundir.append(folder, rundir.METRICS, [first])
            rundir.keep_details(folder, 0, experiment.details, experiment.held)
            snapshot = _snapshot(experiment, progress, folder, text, None)
            checkpoint.save(checkpoints, snapshot)
            track(first)
            _tell(on_round, first, folder)
            show(first, [])
        saved = snapshot
        fresh = experiment.federation.method.private == "system"

        def hold(half: Unevaluated) -> None:
            nonlocal snapshot, saved
            if not fresh:
                return  # the round can be done again as it was
            snapshot = _snapshot(experiment, half.progress, folder, text, snapshot)
            snapshot = snapshot._replace(half=half)
            checkpoint.save(checkpoints, snapshot)
            saved = snapshot

        try:
            for summary, receipts, progress in loop.rounds(
                experiment.federation,
                snapshot.progress,
                recipe.rounds,
                unevaluated=snapshot.half,
                hold=hold,
                lost=0 if snapshot.moved is None else snapshot.progress.round - snapshot.moved,
            ):
                rundir.append(folder, rundir.METRICS, [summary])
                if summary.metrics is not None:
                    details, held = experiment.details, experiment.held
                    rundir.keep_details(folder, summary.round, details, held)
                rundir.append(folder, rundir.CLIENTS, receipts)
                # Before this line a Ctrl-C finds the snapshot of the round before, with its own
                # marks and memories: what of this round is written already will be cut off.
                snapshot = _snapshot(experiment, progress, folder, text, snapshot)
                if progress.round % recipe.checkpoint.every == 0 or progress.round == recipe.rounds:
                    checkpoint.save(checkpoints, snapshot)
                    saved = snapshot
                track(summary)
                _tell(on_round, summary, folder)
                show(summary, receipts)
            adapter = experiment.federation.method.export(snapshot.progress.state)
            known = _told(folder, recipe, snapshot)
            _save_adapter(experiment, adapter, folder / rundir.ADAPTER, known)
            _report(folder)
            if experiment.ending:
                warnings.warn(experiment.ending, stacklevel=2)
        except NoUsableUpdate as error:
            if snapshot is not saved:
                checkpoint.save(checkpoints, snapshot)
            raise FedSieveError(
                f"round {snapshot.progress.round + 1}: {error}. The state after round "
                f"{snapshot.progress.round} is kept in {folder}"
            ) from error
        except CallbackFailed:
            if snapshot is not saved:
                checkpoint.save(checkpoints, snapshot)
            raise
        except KeyboardInterrupt:
            if snapshot is not saved:
                checkpoint.save(checkpoints, snapshot)
            raise Stopped(
                f"stopped after round {snapshot.progress.round} of {recipe.rounds}; go on with "
                f"`{rundir.again(folder)}`"
            ) from None
    return adapter


def _tell(on_round: Sequence[OnRound], summary: Round, folder: Path) -> None:
    try:
        tell(on_round, summary)
    except CallbackFailed as error:
        raise CallbackFailed(
            f"{error}. The state after the round is kept: go on with `{rundir.again(folder)}`"
        ) from error.__cause__


def _with_secret(experiment: Experiment, recipe: Recipe, folder: Path) -> Experiment:
    """The experiment with the seed that only its server knows, where it has one."""
    if not deployed(recipe):
        return experiment
    return with_secret(experiment, rundir.secret_seed(folder))


def _refuse_other_noise(folder: Path, number: int) -> None:
    """Raises FedSieveError if a round after `number` was given out: it would be drawn again."""
    later = checkpoint.names_later(rundir.place(folder, rundir.CHECKPOINTS), number)
    if later or rundir.last_round(folder) > number:
        raise FedSieveError(
            f"{folder}: the newest checkpoint that is whole is of round {number}, and a later "
            "round was given out already. Done again it would have other noise, which epsilon does "
            "not count: put the newest checkpoint back, or end with the adapter that was given out"
        )


def _snapshot(
    experiment: Experiment,
    progress: Progress,
    folder: Path,
    recipe: str,
    before: Snapshot | None,
) -> Snapshot:
    """recipe: as TOML; before: the snapshot before this one, where there is one."""
    marks, base = rundir.marks(folder), experiment.resident.digest
    memories, rows = dict(experiment.memories), experiment.rows
    moved = progress.round
    # A round that merges nothing hands the very state on that it was given (engine/loop.py).
    if before is not None and progress.state is before.progress.state:
        moved = before.progress.round if before.moved is None else before.moved
    return Snapshot(progress, memories, marks, base=base, recipe=recipe, rows=rows, moved=moved)


def _report(folder: Path) -> None:
    try:
        report.write([folder], folder / rundir.REPORT)
    except FedSieveError as error:
        raise FedSieveError(
            f"{error}. The adapter is written, and `{rundir.again(folder)}` writes the report"
        ) from error


def _told(folder: Path, recipe: Recipe, snapshot: Snapshot) -> Told:
    """What the run's logs say of a checkpoint's rounds, for the card. What they hold beyond its
    marks is of rounds that will be done again, or anybody's, and nobody has looked at it.
    """
    rows = _logged(folder, rundir.METRICS, snapshot)
    last = rows[-1] if rows else {}
    clients: int | None = None
    if not deployed(recipe):  # where it is nobody's business who took part
        clients = len({row["client"] for row in _logged(folder, rundir.CLIENTS, snapshot)})
    return told(recipe, last.get("epsilon"))._replace(
        rounds=snapshot.progress.round,
        clients=clients or recipe.partition.clients,
        simulated=not rundir.federated(folder),
        metrics=last.get("metrics") or {},
        loss=last.get("eval_loss"),
        down_bytes=sum(row.get("down_bytes", 0) for row in rows),  # round 0 may have none
        up_bytes=sum(row.get("up_bytes", 0) for row in rows),
        personal=build_method(recipe).personal is not None,
    )


def _logged(folder: Path, log: str, snapshot: Snapshot) -> list[dict[str, Any]]:
    """A log's lines as far as a checkpoint knows of them; `in_order` has found them whole."""
    path = rundir.place(folder, log)
    return [row for _, row in objects(path, snapshot.marks.get(log, 0)) if row]


def _save_adapter(experiment: Experiment, adapter: Adapter, folder: Path, known: Told) -> None:
    """Write the adapter beside its place first, so that a crash leaves no half of it."""
    part = folder.with_name(f".{folder.name}.part")
    if not remove_link(part):
        shutil.rmtree(part, ignore_errors=True)
    experiment.resident.save(adapter, part, known, home=folder)
    take_place(part, folder)


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """A machine that is taken away sends SIGTERM: keep the state then too."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
