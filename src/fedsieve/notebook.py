"""A run in a notebook: rounds to iterate over, and what can be asked of the adapter in between."""

import json
import re
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import pyarrow as pa
import tomli_w
from datasets import Dataset

from fedsieve import report
from fedsieve.algebra.adapter import Adapter
from fedsieve.data import given, templates
from fedsieve.data.files import Columns
from fedsieve.disk import (
    LONGEST,
    bytes_of,
    move_into,
    objects,
    of_the_disk,
    put_back,
    refuse_link,
    write_whole,
)
from fedsieve.engine import loop
from fedsieve.engine.callbacks import CallbackFailed, OnRound, tell
from fedsieve.engine.cautions import cautioning
from fedsieve.engine.loop import Receipt, Round, Unevaluated
from fedsieve.errors import FedSieveError, count, quoted, reason
from fedsieve.recipe import arguments
from fedsieve.recipe import read as recipes
from fedsieve.recipe.examples import columns_of
from fedsieve.recipe.experiment import Experiment
from fedsieve.recipe.overrides import flat
from fedsieve.run import checkpoint, rundir
from fedsieve.run.checkpoint import Snapshot
from fedsieve.run.found import falls_over
from fedsieve.run.state import refuse_another
from fedsieve.settings import Precision
from fedsieve.tasks.tally import Score
from fedsieve.tasks.task import Bad, Fields, Reader, Rows, Task, refuse
from fedsieve.train.card import Told, called, is_ours, kinds_of
from fedsieve.train.local import evaluate, told
from fedsieve.train.model import refuse_other_base
from fedsieve.train.origin import Origin
from fedsieve.train.prepared import BASE

_PART = ".fedsieve.part"  # in a folder that is saved into: what is new, until it is whole
_LOCK = ".fedsieve.lock"  # in it for as long
_KEEP = ".fedsieve.keep"  # in one that is kept into first: whose run, until a checkpoint says it
_MARK = "# A run in a notebook: Run.report wrote this, and no command goes on with it.\n"


class Reading(NamedTuple):
    """How rows become examples.

    lead: the metric that leads; precision: of evaluations
    """

    task: Task
    fields: Fields
    tokenizer: Reader
    lead: str | None = None
    precision: Precision = "auto"

    @property
    def columns(self) -> Columns:
        return self.task.columns(self.fields)

    @property
    def texts(self) -> tuple[str, ...]:
        """Those of the columns that may be templates."""
        return columns_of(self.fields).texts


def rows_of(reading: Reading, rows: object) -> Dataset:
    """Rows of any form (data/given.py), in memory, with their templates filled in."""
    return templates.filled(given.rows_of(rows, reading.columns), reading.texts)


def bad(reading: Reading, rows: Dataset) -> Bad:
    """The rows that are no examples, and what is wrong with each."""
    found = reading.task.bad(rows, reading.tokenizer, reading.fields)
    return found | templates.bad(rows, reading.texts)


def read(reading: Reading, rows: Dataset) -> Rows:
    """The examples. Raises FedSieveError for the first row that is none."""
    refuse(templates.bad(rows, reading.texts))
    return reading.task.read(rows, reading.tokenizer, reading.fields)


class Run:
    """A federation in this process. Iterate over it to train, a round at a time.

    metrics:  one `Round` for each round so far, round 0 (before training) first
    receipts: one `Receipt` for each client and round so far
    adapter:  the global adapter as it stands now

    `predict`, `score` and `report` may be called between rounds, and change nothing of the run.
    """

    def __init__(
        self,
        experiment: Experiment,
        rounds: int,
        reading: Reading | None = None,
        settings: Mapping[str, Any] | None = None,
        on_round: Sequence[OnRound] = (),
    ) -> None:
        self._experiment = experiment
        self._reading = reading
        self._settings = settings or {}
        self._last = rounds
        self._on_round = on_round
        self._told = 0  # of the metrics, to the callbacks
        self._cautions = cautioning()
        self._half: Unevaluated | None = None  # merged, and stopped in its evaluation
        self._alone = threading.RLock()  # the model is one, whatever threads ask of it
        first, self._progress = loop.begin(experiment.federation, experiment.start)
        self._metrics: list[Round] = [first]
        self._receipts: list[Receipt] = []

    def __iter__(self) -> Iterator[Round]:
        """Train the rounds that are left, giving each one's metrics as it ends.

        Warns once if the downloads' masks let pass nothing of B (docs/methods.md), and once if the
        loss has not fallen in the first rounds. Raises FedSieveError, naming it, for a callback
        that failed, when its round is kept: iterated again, the run goes on with the next.
        """
        self._tell()
        while (summary := self._next()) is not None:
            self._tell()
            yield deepcopy(summary)

    def _next(self) -> Round | None:
        """The next round, and none after the last. Threads that share a run take turns."""
        federation, memories = self._experiment.federation, self._experiment.memories
        with self._alone:
            if self._half is None and self._progress.round >= self._last:
                return None
            if self._half is None:
                before = dict(memories)
                try:
                    self._half = loop.merged(federation, self._progress, last=self._last)
                except BaseException:
                    # The round did not happen: it can be tried again by iterating again.
                    memories.clear()
                    memories.update(before)
                    raise
                # From here on it did: merged again, it could have other noise.
                self._progress = self._half.progress
                for receipt in self._half.receipts:
                    if receipt.dropped is not None:
                        warnings.warn(
                            f"round {receipt.round}, client {receipt.client} is left out: "
                            f"{receipt.dropped}",
                            stacklevel=3,
                        )
            half = self._half
            summary = loop.evaluated(federation, half)
            self._half = None
            self._metrics.append(summary)
            self._receipts.extend(half.receipts)
            for caution in self._cautions(summary):  # last, for a warning may be raised
                warnings.warn(caution, stacklevel=3)
            return summary

    def _tell(self) -> None:
        """The callbacks are told without the lock: what they ask of the run, another thread may."""
        while True:
            with self._alone:
                if self._told == len(self._metrics):
                    return
                summary = self._metrics[self._told]
                self._told += 1
            try:
                tell(self._on_round, summary)
            except CallbackFailed as error:
                raise FedSieveError(
                    f"{error}. The round is kept: iterate again to go on with the next"
                ) from error.__cause__

    def __repr__(self) -> str:
        clients = count(len(self._experiment.federation.clients), "client")
        return f"<fedsieve.Run: {clients}, round {self._progress.round} of {self._last}>"

    def __reduce__(self) -> str:
        """Raises FedSieveError: a copy would share model and memories with the run."""
        raise FedSieveError(
            "a Run cannot be copied or pickled: `keep` writes it into a folder, from where another "
            "goes on"
        )

    def finish(self) -> "Run":
        """Train the rounds that are left."""
        for _ in self:
            pass
        return self

    @property
    def metrics(self) -> list[Round]:
        return deepcopy(self._metrics)  # whatever is done to it, the run and its card tell the same

    @property
    def receipts(self) -> list[Receipt]:
        return list(self._receipts)

    @property
    def adapter(self) -> Adapter:
        """What `save` writes, as it stands now: a copy, and no change of it reaches the run."""
        made = self._adapter()
        trees = (made.tensors, made.base)
        tensors, base = ({name: tensor.clone() for name, tensor in tree.items()} for tree in trees)
        return made._replace(tensors=tensors, base=base)

    def _adapter(self) -> Adapter:
        """The server's own, not to be changed: the run would go on from what was made of it."""
        return self._experiment.federation.method.export(self._progress.state)

    def save(self, folder: str | Path) -> None:
        """Write the adapter in PEFT's format, with all that loading it takes (docs/finetune.md).

        What else is in the folder stays. It is written into a folder in it first, which may be a
        disk of its own, so that a disk that is full leaves what was there.
        Raises FedSieveError if there can be no such folder, for that of the base, and where a file
        would be replaced that no earlier save wrote.
        """
        place = arguments.folder_given("save", folder).resolve()
        if not place.name:
            raise FedSieveError(f"save: {place} is the root of the disk: choose a folder in it")
        _refuse_the_base(place, self._experiment.resident.origin)
        last = self._metrics[-1]
        privacy = self._experiment.federation.method.private
        start = self._settings.get("lora", {}).get("start")
        known = Told(
            start=None if start is None else called(start),
            rounds=last.round,
            clients=len(self._experiment.federation.clients),
            simulated=True,
            metrics=last.metrics or {},
            loss=last.eval_loss,
            down_bytes=sum(each.down_bytes for each in self._metrics),
            up_bytes=sum(each.up_bytes for each in self._metrics),
            personal=self._experiment.federation.method.personal is not None,
            privacy=privacy and f"noise from the {privacy}; whoever trained it knows the epsilon",
        )
        part, new = place / _PART, not place.exists()
        try:
            place.mkdir(parents=True, exist_ok=True)
            with self._alone, _saving(place):
                try:
                    put_back(part, place)
                    self._experiment.resident.save(self._adapter(), part, known, home=place)
                    _refuse_others(place, part)
                    move_into(part, place)
                except Exception:
                    with suppress(OSError):
                        put_back(part, place)
                    raise
        except Exception as error:
            with suppress(OSError):
                if new:
                    place.rmdir()
            if of_the_disk(error) is None:
                raise
            raise FedSieveError(f"save: {place} cannot be written: {reason(error)}") from error

    def predict(self, rows: object) -> list[str]:
        """What the model as it stands now tells of each row, in words: the name of a class, the
        names that hold (", " between them), the tags of words, a number, the text it writes.

        rows: in any form that `finetune` takes. Their label's column counts for nothing, and need
              not be there for classes and numbers
        Raises FedSieveError, naming the row, for rows that are no examples, and for tasks that
        tell nothing of single rows (causal-lm).
        """
        reading = self._known("predict")
        try:
            read_as, table = _unlabelled(reading, rows)
            if not len(table):
                return []
            examples, came, _ = read(read_as, table)
        except FedSieveError as error:
            raise FedSieveError(f"predict: {error}") from error
        if len(came) < len(table):
            missing = min({*range(len(table))}.difference(came.tolist()))
            raise FedSieveError(f"predict: row {missing} has nothing to tell within max_length")
        with self._alone:
            resident = self._experiment.resident
            return told(resident, self._adapter(), examples, precision=reading.precision)

    def score(self, rows: object) -> Score:
        """How well the adapter does on rows as it stands now: `loss`, `metrics` by name (the
        leading one first), how many rows or tokens were `counted`, and `details.classes`.

        rows: in any form that `finetune` takes
        Raises FedSieveError, naming the row, for rows that are no examples.
        """
        return self._scored(rows, self._adapter(), "score")

    def score_by_client(self, clients: Mapping[Any, object]) -> dict[str, Score]:
        """`score` of each client's rows, by id. Where a method leaves a part of the model with its
        client (FedSA-LoRA), a client that took part is scored with its own.
        """
        experiment, found = self._experiment, {}
        whole, own = self._adapter(), experiment.federation.method.personal
        for id, rows in arguments.by_id(clients, "score_by_client").items():
            memory = experiment.memories.get(id)
            adapter = whole if own is None or not memory else own(whole, memory)
            found[id] = self._scored(rows, adapter, f"score_by_client: client {id!r}")
        return found

    def report(self, folder: str | Path, name: str = "notebook") -> Path:
        """Write the report of the rounds so far into a folder, and give the page's path: one file
        that opens offline, its plots beside it, and the logs that `fedsieve report` reads.

        Raises FedSieveError before the first round, for a folder that holds another run, and if
        there can be no such folder. What tells of single clients is left out where the method's
        noise protects them (noise_from="system").
        """
        place = arguments.folder_given("report", folder)
        if len(self._metrics) < 2:
            raise FedSieveError("report: no round has ended yet: iterate over the run first")
        written = place / rundir.RECIPE
        if not (written.is_file() and written.read_bytes().startswith(_MARK.encode())):
            rundir.refuse(place, function="report")
        method = self._settings.get("method") or "a notebook's"
        table = {**self._settings, "name": name, "method": {"name": method}}
        notes = {"environment": {"notes": list(self._experiment.notes)}}
        try:
            place.mkdir(parents=True, exist_ok=True)
            write_whole(written, (_MARK + tomli_w.dumps({**table, **notes})).encode())
            logs: dict[str, list[Any]] = {rundir.METRICS: self._metrics}
            if self._experiment.federation.method.private != "system":
                logs[rundir.CLIENTS] = self._receipts
            for log, rows in logs.items():
                write_whole(place / log, b"")
                rundir.append(place, log, rows)
            rundir.keep_details(place, self._metrics[-1].round, self._experiment.details)
        except OSError as error:
            raise FedSieveError(f"report: {place} cannot be written: {error.strerror}") from error
        return report.write([place], place / rundir.REPORT)[0]

    def keep(self, folder: str | Path) -> None:
        """Write where the run stands into a folder, for `go_on`; what was kept before stays as it
        was until the new is whole. What a keep of this run left that broke off is written over. It
        holds what clients keep: the folder is its owner's alone.

        Raises FedSieveError if it cannot be written, for a folder that holds another run, and where
        the method's noise is fresh (noise_from="system"): a round done again would be spent twice.
        """
        place = self._keeping(folder, "keep")
        with self._alone:
            self._keep(place)

    def _keep(self, place: Path) -> None:
        first = _refuse_another_run(place, self._text(), self._progress.round)
        snapshot = Snapshot(
            self._progress,
            dict(self._experiment.memories),
            {},
            self._half,
            self._experiment.resident.digest,
            self._text(),
        )
        try:
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            if first:
                write_whole(place / _KEEP, self._text().encode())
            for log, rows in ((rundir.METRICS, self._metrics), (rundir.CLIENTS, self._receipts)):
                text = "".join(json.dumps(row._asdict(), allow_nan=False) + "\n" for row in rows)
                write_whole(place / log, text.encode())
        except OSError as error:
            raise _unkept(place, error) from error
        try:
            checkpoint.save(place / rundir.CHECKPOINTS, snapshot)
        except FedSieveError as error:
            if isinstance(error.__cause__, OSError):
                raise _unkept(place, error.__cause__) from error
            raise
        with suppress(OSError):  # the checkpoint says it now
            (place / _KEEP).unlink()

    def go_on(self, folder: str | Path) -> "Run":
        """Go on where `keep` was called: this run, made with the same arguments in another process
        and not trained yet, then ends as if it had never stopped. It may have more rounds, or
        fewer; a learning rate that falls over the rounds then falls over these from here on.

        Raises FedSieveError, naming what, for fewer rounds than were kept, where model, rows,
        settings or the server's optimizer are others than then, and for a folder that holds nothing
        that can be gone on with. Other options of the method are compared as far as they change
        what it keeps.
        """
        place = self._keeping(folder, "go_on")
        if self._progress.round or self._half is not None:
            raise FedSieveError("go_on: this run has begun already: make a new one with `finetune`")
        experiment = self._experiment
        snapshot = checkpoint.load(
            place / rundir.CHECKPOINTS, experiment.resident.layout, experiment.resident.digest
        )
        text = snapshot.recipe or ""
        _refuse_other_settings(place, text, self._text())
        then: Any = recipes.toml(text, str(place)).get("rounds")
        if "last_lr" in self._settings.get("training", {}) and then != self._last:
            warnings.warn(falls_over(self._last, then), stacklevel=2)
        if self._last < snapshot.progress.round:
            raise FedSieveError(
                f"go_on: {place} holds round {snapshot.progress.round}, and this run is to have "
                f"{self._last}: make it with rounds={snapshot.progress.round}, or more"
            )
        refuse_another(place, experiment, snapshot)
        known = snapshot.progress.round - (snapshot.half is not None)
        _refuse_damaged(place)
        try:
            logs = [
                [row for _, row in objects(place / log) if row and row["round"] <= known]
                for log in (rundir.METRICS, rundir.CLIENTS)
            ]
            metrics, receipts = [Round(**r) for r in logs[0]], [Receipt(**r) for r in logs[1]]
        except (TypeError, KeyError, AttributeError) as error:
            raise FedSieveError(f"go_on: the logs in {place} are not as kept: {error}") from error
        if [each.round for each in metrics] != [*range(known + 1)]:
            raise FedSieveError(f"go_on: {place / rundir.METRICS} lacks rounds: it was changed")
        asked = Counter(receipt.round for receipt in receipts)
        for each in metrics[1:]:
            if asked[each.round] != each.clients:
                raise FedSieveError(
                    f"go_on: {place / rundir.CLIENTS} has {asked[each.round]} clients of round "
                    f"{each.round}, and {each.clients} were asked: it was changed"
                )
        experiment.memories.update(snapshot.memories)
        self._progress, self._half = snapshot.progress, snapshot.half
        self._metrics, self._receipts, self._told = metrics, receipts, len(metrics)
        self._evaluate_the_last()
        return self

    def _evaluate_the_last(self) -> None:
        """Let the round that is reached wait for its evaluation where it has become the last."""
        number, federation = self._progress.round, self._experiment.federation
        if self._half is not None:
            self._half = self._half._replace(due=federation.evaluates(number, self._last))
        elif number == self._last and federation.evaluate is not None:
            last = self._metrics[-1]
            if number and last.eval_examples is None:
                own = [receipt for receipt in self._receipts if receipt.round == number]
                self._half = Unevaluated(last, own, self._progress, due=True)
                self._receipts = self._receipts[: len(self._receipts) - len(own)]
                self._metrics = self._metrics[:-1]
                self._told = len(self._metrics)

    def _keeping(self, folder: str | Path, what: str) -> Path:
        place = arguments.folder_given(what, folder)
        if self._experiment.federation.method.private == "system":
            raise FedSieveError(
                f'{what}: with noise_from="system" a round done again would be spent twice: run a '
                "recipe, whose rounds are on the disk before they are told"
            )
        return place

    def _text(self) -> str:
        return tomli_w.dumps(dict(self._settings))

    def _known(self, what: str) -> Reading:
        if self._reading is None:
            raise FedSieveError(f"{what}: this run does not know how its rows are read")
        return self._reading

    def _scored(self, rows: object, adapter: Adapter, what: str) -> Score:
        reading = self._known("score")
        try:
            examples = read(reading, rows_of(reading, rows)).examples
        except FedSieveError as error:
            raise FedSieveError(f"{what}: {error}") from error
        with self._alone:
            resident, precision = self._experiment.resident, reading.precision
            return evaluate(resident, adapter, examples, precision=precision, lead=reading.lead)


def _refuse_the_base(place: Path, origin: Origin | None) -> None:
    """Raises FedSieveError for the folder of the base, or one that has it as its `base/`."""
    if origin is None or not Path(origin.source).is_dir():
        return
    source, base = Path(origin.source).resolve(), place / BASE
    with suppress(RuntimeError):  # of a link that leads in circles
        base = base.resolve()
    if source in (place, base):
        raise FedSieveError(
            f"save: the base {origin.name!r} is in {place}, and its files would be "
            "replaced: choose another folder"
        )


@contextmanager
def _saving(place: Path) -> Iterator[None]:
    """Keep other saves out of a folder. Raises FedSieveError where one is at work."""
    lock = place / _LOCK
    refuse_link(lock)
    try:
        held = filelock.FileLock(lock).acquire(timeout=0)
    except filelock.Timeout:
        raise FedSieveError(
            f"save: another save is at work in {place}: wait until it has ended, or choose another "
            "folder"
        ) from None
    with held:
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


# What a save writes into `base/`, though another one, of the same weights, need not.
_OF_A_BASE = re.compile(r"model.*\.safetensors(\.index\.json)?|generation_config\.json")


def _refuse_others(place: Path, part: Path) -> None:
    """Raises FedSieveError where what is written in `part` would replace what no earlier save
    wrote. A link is replaced, and nothing behind it.
    """
    ours = is_ours(place)
    if ours and kinds_of(place) != kinds_of(part):
        raise FedSieveError(
            f"save: {place} holds what was saved of another kind (an adapter, or a whole "
            "model) or over another base, and both would lie there mixed: choose another "
            "folder, or move it away"
        )
    for path in sorted(part.iterdir()):
        there = place / path.name
        if path.name == BASE or there.is_symlink() or not there.exists():
            continue
        if not ours:
            raise FedSieveError(
                f"save: {there} is there already, and no earlier save wrote it: choose another "
                "folder, or move it away"
            )
        if there.is_dir():
            raise FedSieveError(
                f"save: {there} is a folder, and a file is written there: choose another folder, "
                "or move it away"
            )
    if (part / BASE).exists():
        try:
            refuse_other_base(place)
        except FedSieveError as error:
            raise FedSieveError(f"save: {error}") from None
        names = {path.name for path in (part / BASE).iterdir()}
        for path in sorted((place / BASE).iterdir()) if (place / BASE).is_dir() else ():
            if path.name not in names and not (path.is_file() and _OF_A_BASE.fullmatch(path.name)):
                raise FedSieveError(
                    f"save: {path} is there, and no earlier save wrote it: choose another folder, "
                    "or move it away"
                )


def _unkept(place: Path, error: OSError) -> FedSieveError:
    return FedSieveError(
        f"keep: {place} cannot be written ({reason(error)}); what was kept there before is whole: "
        "make room, or choose another folder, and keep again"
    )


def _refuse_another_run(folder: Path, settings: str, number: int) -> bool:
    """Whether a folder holds no checkpoint yet. What a first keep of these settings, as TOML, may
    have left there that broke off is no other run's.

    Raises FedSieveError where it holds another run, or a later round of this one: neither could be
    gone on with afterwards.
    """
    for name in (_KEEP, *rundir.LOGS, rundir.CHECKPOINTS):
        refuse_link(folder / name, folder=name == rundir.CHECKPOINTS)
    found = checkpoint.notes(folder / rundir.CHECKPOINTS)
    if not found:
        broke_off = _kept_first(folder) == settings.encode()
        left = (*rundir.LOGS, rundir.CHECKPOINTS) if broke_off else ()
        rundir.refuse(folder, function="keep", besides=left)
    for note in found[:1]:
        if _compared(note.recipe or "", folder) != _compared(settings, folder):
            raise FedSieveError(f"keep: {folder} holds another run: choose another folder")
        if note.round > number:
            raise FedSieveError(
                f"keep: {folder} holds round {note.round} of this run, and it stands at {number}: "
                "`go_on` from there, or choose another folder"
            )
    return not found


def _kept_first(folder: Path) -> bytes | None:
    """The settings of the run whose first keep into a folder broke off."""
    try:
        return bytes_of(folder / _KEEP, LONGEST)
    except OSError:
        return None


def _refuse_damaged(folder: Path) -> None:
    """Raises FedSieveError, naming file and line, for logs that no run writes."""
    metrics, clients = (folder / name for name in rundir.LOGS)
    try:
        lengths = {path.name: path.stat().st_size for path in (metrics, clients)}
    except OSError as error:
        raise FedSieveError(f"go_on: {error.filename}: {error.strerror}") from None
    rounds = report.rounds(metrics)
    report.check_logs(metrics, clients, lengths, rounds[-1].round if rounds else 0)


def _refuse_other_settings(folder: Path, then: str, now: str) -> None:
    """Raises FedSieveError, naming the first, for settings that differ. then, now: as TOML"""
    before, after = (_compared(text, folder) for text in (then, now))
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            was, now = (quoted(of[key]) if key in of else "not set" for of in (before, after))
            raise FedSieveError(
                f"go_on: {key} was {was} in {folder} and is {now}: make the run with the same "
                "arguments"
            )


def _compared(text: str, folder: Path) -> dict[str, Any]:
    """The settings, as TOML, that make a run the same one. It may have more rounds, or fewer, and
    its base may lie elsewhere: that it is the same, its digest says.
    """
    settings = dict(flat(recipes.toml(text, str(folder))))
    for free in ("rounds", "model.source"):
        settings.pop(free, None)
    return settings


def _unlabelled(reading: Reading, rows: object) -> tuple[Reading, Dataset]:
    """Rows to be told of, with labels that count for nothing where a task's labels are simple."""
    task, fields = reading.task, reading.fields
    classes = fields.classes or ()
    kind = task.config(classes).get("problem_type")
    label: tuple[Any, ...] = ()
    if kind == "single_label_classification":
        label = classes[:1]
    elif kind == "regression":
        label = (0.0,)
    elif kind == "multi_label_classification":
        label = ([],) if isinstance(fields.label, str) else (False,)
    if not label:
        return reading, rows_of(reading, rows)
    names = (fields.label,) if isinstance(fields.label, str) else tuple(fields.label or ())
    texts = Columns(tuple(name for name in reading.columns.texts if name not in names))
    table = templates.filled(given.rows_of(rows, texts), reading.texts)
    table = table.select_columns([n for n in table.column_names if n not in names])
    if table._indices is not None:
        table = table.flatten_indices(keep_in_memory=True)  # or it would be done on the disk
    made = pa.array(list(label) * len(table), pa.list_(pa.string()) if label == ([],) else None)
    for name in names:
        table = table.add_column(name, made)
    return reading, table
