"""Federated fine-tuning from a notebook: data sets in, an adapter and its metrics out."""

import math
import secrets
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

from fedsieve.algebra.adapter import Adapter
from fedsieve.algebra.budget import Budget
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import Method
from fedsieve.algebra.optim import limits
from fedsieve.data import sources, templates
from fedsieve.data.files import Columns
from fedsieve.data.names import name_of, numbered
from fedsieve.engine import loop
from fedsieve.engine.callbacks import CallbackFailed, OnRound, as_list, tell
from fedsieve.engine.loop import Receipt, Round, Unevaluated
from fedsieve.engine.shares import starving
from fedsieve.errors import FedSieveError
from fedsieve.recipe import arguments
from fedsieve.recipe.examples import columns_of
from fedsieve.recipe.experiment import (
    Experiment,
    also,
    assemble,
    locate,
    reasons,
    stopped,
    with_secret,
)
from fedsieve.settings import NORM_BOUND, Dtype, Lora, Quantization, Sampling, Task, Training
from fedsieve.tasks import catalogue
from fedsieve.tasks.examples import Examples, count, unasked
from fedsieve.tasks.tally import check_lead
from fedsieve.tasks.task import Bad, Fields, Rows, refuse
from fedsieve.tasks.task import Task as TaskRecord
from fedsieve.train.card import Told
from fedsieve.train.changes import check_changes, refuse_quantised
from fedsieve.train.digest import base_digest
from fedsieve.train.lengths import check_rows
from fedsieve.train.model import load_base, pick_device, set_up
from fedsieve.train.reader import load_reader

T = TypeVar("T")
Made = TypeVar("Made")


class Run:
    """A federation in this process. Iterate over it to train, a round at a time.

    metrics:  one `Round` for each round so far, round 0 (before training) first
    receipts: one `Receipt` for each client and round so far
    adapter:  the global adapter as it stands now
    """

    def __init__(
        self, experiment: Experiment, rounds: int, on_round: Sequence[OnRound] = ()
    ) -> None:
        self._experiment = experiment
        self._last = rounds
        self._on_round = on_round
        self._told = 0  # of the metrics, to the callbacks
        self._half: Unevaluated | None = None  # merged, and stopped in its evaluation
        first, self._progress = loop.begin(experiment.federation, experiment.start)
        self.metrics: list[Round] = [first]
        self.receipts: list[Receipt] = []

    def __iter__(self) -> Iterator[Round]:
        """Train the rounds that are left, giving each one's metrics as it ends.

        Warns once if the downloads' masks let pass nothing of B (docs/methods.md). Raises
        FedSieveError, naming it, for a callback that failed, when its round is kept: iterated
        again, the run goes on with the next.
        """
        self._tell()
        federation, memories = self._experiment.federation, self._experiment.memories
        while self._half is not None or self._progress.round < self._last:
            if self._half is None:
                before, final = dict(memories), self._progress.round + 1 == self._last
                try:
                    self._half = loop.merged(federation, self._progress, evaluate=final)
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
                            stacklevel=2,
                        )
            half = self._half
            summary = loop.evaluated(federation, half)
            self._half = None
            problem = starving(summary)
            if problem and not any(map(starving, self.metrics)):
                warnings.warn(problem, stacklevel=2)
            self.metrics.append(summary)
            self.receipts.extend(half.receipts)
            self._tell()
            yield summary

    def _tell(self) -> None:
        for summary in self.metrics[self._told :]:
            self._told += 1
            try:
                tell(self._on_round, summary)
            except CallbackFailed as error:
                raise FedSieveError(
                    f"{error}. The round is kept: iterate again to go on with the next"
                ) from error.__cause__

    def finish(self) -> "Run":
        """Train the rounds that are left."""
        for _ in self:
            pass
        return self

    @property
    def adapter(self) -> Adapter:
        return self._experiment.federation.method.export(self._progress.state)

    def save(self, folder: str | Path) -> None:
        """Write the adapter in PEFT's format, with all that loading it takes (docs/finetune.md).

        Raises FedSieveError if there can be no such folder.
        """
        arguments.of_kind("save", folder, str | PathLike, "a folder")
        last = self.metrics[-1]
        privacy = self._experiment.federation.method.private
        known = Told(
            rounds=last.round,
            clients=len(self._experiment.federation.clients),
            metrics=last.metrics or {},
            loss=last.eval_loss,
            down_bytes=sum(each.down_bytes for each in self.metrics),
            up_bytes=sum(each.up_bytes for each in self.metrics),
            personal=self._experiment.federation.method.personal is not None,
            privacy=privacy and f"noise from the {privacy}; whoever trained it knows the epsilon",
        )
        self._experiment.resident.save(self.adapter, Path(folder), known)


def finetune(
    model: str | Path,
    clients: Sequence[Dataset | IterableDataset] | Mapping[str, Dataset | IterableDataset],
    method: Method,
    *,
    rounds: int,
    cohort: int | Sampling | None = None,
    test: Dataset | IterableDataset | None = None,
    task: Task = "classification",
    text: str | None = "text",
    label: str | Sequence[str] = "label",
    prompt: str | None = None,
    completion: str | None = None,
    classes: Sequence[str] | None = None,
    max_length: int = 128,
    dtype: Dtype = "float32",
    quantization: Quantization = "none",
    double_quantization: bool = False,
    lora: Lora | None = None,
    training: Training | None = None,
    budgets: Mapping[str, Budget] | Budget | None = None,
    evaluate_every: int = 1,
    metric: str | None = None,
    norm_bound: float | None = None,
    strict: bool = False,
    on_round: OnRound | Iterable[OnRound] | None = None,
    seed: int = 0,
    device: str = "auto",
    **data: Any,
) -> Run:
    """Set up federated LoRA fine-tuning; nothing is trained until the run is iterated.

    model:   a name on the hub, a folder, or a name that `fedsieve fetch` knows
    clients: one data set for each client, by id or in a list (ids "0000", "0001", ...); a stream
             (IterableDataset) is read to its end. A client whose rows cannot be used is left out,
             with a warning that names it, the row and the column
    method:  e.g. `fedsieve.flasc(server=fedsieve.adam(1e-3))`
    cohort:  clients a round, or a `Sampling` that says how they are drawn; default all
    task:    one of those of docs/tasks.md, which says what columns each reads
    text, label, prompt, completion: columns. For causal-lm give `text`, or the other two (then
             text is not used). `classes` defaults to the labels that the clients hold. Labels
             are names (data/names.py), 1 and "1" alike
    dtype, quantization, double_quantization: how the base is held, as a recipe's [model] says it
    data:    what else of a recipe's [data] says what rows hold, such as `text_b`, `options`,
             `option_word` (docs/recipes.md)
    budgets: what each client can afford, by id; or one budget for all
    metric:  which of the task's metrics leads (docs/tasks.md); by default its first
    norm_bound: an update whose norm is so many times the median of its round's is left out, with a
             warning; by default 100, and without a bound (math.inf) where the method's server clips
    strict:  a client whose rows cannot be used is an error, not left out
    on_round: a function, or a list of such, that is called with each round's metrics as it ends,
             and with round 0 when the run is first iterated
    Raises FedSieveError for bad input, naming the argument, and if no client has rows that can be
    used.
    """
    arguments.check(locals())
    held = arguments.model_given(
        dtype=dtype, quantization=quantization, double_quantization=double_quantization
    )
    callbacks = as_list(on_round)
    rounds, seed, max_length = int(rounds), int(seed), int(max_length)
    classes = None if classes is None else arguments.classes_given(classes)
    fields = Fields(
        text=text if prompt is None and completion is None else None,
        label=label if isinstance(label, str) else tuple(label),
        prompt=prompt,
        completion=completion,
        classes=classes,
        max_length=max_length,
        **arguments.fields_given(data),
    )
    asked = catalogue.load(task)
    if vain := sorted({*data}.difference(asked.uses)):
        raise FedSieveError(f"{vain[0]}: a {task} task has no use for it")
    columns, texts = asked.columns(fields), columns_of(fields).texts
    _check_lead(asked, metric, fields)
    left_out: dict[str, str] = {}
    given = _by_id(clients, "clients")
    if isinstance(budgets, Mapping):
        budgets = _by_id(budgets, "budgets")
        for id, own in budgets.items():
            arguments.of_kind(f"budgets: client {id!r}", own, Budget, arguments.A_BUDGET)
    else:
        budgets = dict.fromkeys(given, budgets or Budget())
    missing = sorted(set(given) - set(budgets))
    if missing:
        raise FedSieveError(f"budgets: none for client {missing[0]!r}")

    def rows_of(own: object) -> Dataset:
        return templates.filled(_rows(own, columns), texts)

    rows = _each(rows_of, given, left_out)
    rows = {id: own for id, own in rows.items() if len(own)}
    if not rows and not left_out:
        raise FedSieveError("clients: at least one data set with a row in it is needed")
    lora, training = lora or Lora(), training or Training()
    key = Key(seed)
    source = locate(str(model))
    refuse_quantised(source, held.quantization, method)
    tokenizer, note = load_reader(source, task)
    if note:
        warnings.warn(note, stacklevel=2)

    def bad(own: Dataset) -> Bad:
        return asked.bad(own, tokenizer, fields) | templates.bad(own, texts)

    sound = _each(lambda own: _sound(own, bad(own)), rows, left_out)
    if sound:
        # The labels of a client whose rows cannot be used make no classes.
        fields = fields._replace(classes=asked.classes(list(sound.values()), fields) or None)
        _check_lead(asked, metric, fields)

    def read(own: Dataset) -> Rows:
        refuse(templates.bad(own, texts))
        return asked.read(own, tokenizer, fields)

    made = _each(read, sound, left_out)
    examples: dict[str, Examples] = {id: unasked(each.examples) for id, each in made.items()}
    if not examples:
        raise FedSieveError(f"no client has rows that can be used: {reasons(left_out)}")
    if strict and left_out:
        raise stopped(left_out)
    try:
        tested = None if test is None else read(rows_of(test)).examples
    except FedSieveError as error:
        raise FedSieveError(f"test: {error}{also(left_out)}") from error
    pad = getattr(tokenizer, "pad_token_id", None)
    base = load_base(
        source,
        task,
        fields.classes or (),
        key=key,
        dtype=held.dtype,
        quantization=held.quantization,
        double_quantization=held.double_quantization,
        whole=lora.whole,
        pad_token_id=pad,
    )
    digest = base_digest(base, source)
    resident = set_up(
        base,
        task,
        lora,
        method.trains,
        key=key,
        device=pick_device(device),
        tokenizer=tokenizer,
    )
    resident = replace(resident, digest=digest)
    check_changes(resident, method)
    check_rows(resident, *examples.values(), tested)
    if isinstance(cohort, Sampling):
        sampling = cohort
    elif cohort is None:
        sampling = Sampling(kind="all", size=len(examples))
    else:
        sampling = Sampling(size=int(cohort))
    experiment = assemble(
        resident,
        method,
        examples.__getitem__,
        {id: count(examples[id]) if id in examples else 0 for id in given},
        budgets,
        training=training,
        rounds=rounds,
        sampling=sampling,
        seed=seed,
        test=tested,
        evaluate_every=evaluate_every,
        lead=metric,
        notes=[note] if note else [],
        left_out=left_out,
        norm_bound=_bound(norm_bound, method),
    )
    if method.private == "system":
        # A seed that somebody can guess would tell who took part.
        experiment = with_secret(experiment, secrets.randbits(256))
    return Run(experiment, rounds, callbacks)


def _check_lead(task: TaskRecord, metric: str | None, fields: Fields) -> None:
    try:
        check_lead(task, metric, fields.classes or ())
    except FedSieveError as error:
        raise FedSieveError(f"metric: {error}") from None


def _bound(given: float | None, method: Method) -> float:
    """What `norm_bound` says. Raises FedSieveError for none, or for one that privacy forbids."""
    if given is None:
        return math.inf if limits(method.server) else NORM_BOUND
    if isinstance(given, bool) or not isinstance(given, int | float) or not given >= 1:
        raise FedSieveError(f"norm_bound is {given!r}; it must be at least 1, or math.inf for none")
    if method.private is not None and given < math.inf:
        raise FedSieveError("norm_bound: leave it out: the method's own clip bounds every update")
    return given


def _by_id(given: Sequence[T] | Mapping[Any, T], what: str) -> dict[str, T]:
    """Values by the ids of their clients, which are names; in a list "0000", "0001", ..."""
    if not isinstance(given, Sequence | Mapping) or isinstance(given, str):
        raise FedSieveError(
            f"{what}: a list, or a dict by client, is needed, not one {type(given).__name__}"
        )
    if not isinstance(given, Mapping):
        return dict(zip(numbered(len(given)), given, strict=True))
    found: dict[str, T] = {}
    for key, value in given.items():
        try:
            id = name_of(key)
        except FedSieveError as error:
            raise FedSieveError(f"{what}: an id {error}") from None
        if id is None or id in found:
            raise FedSieveError(f"{what}: {key!r} is " + ("no id" if id is None else "there twice"))
        found[id] = value
    return found


def _each(
    make: Callable[[T], Made], rows: Mapping[str, T], left_out: dict[str, str]
) -> dict[str, Made]:
    """What is made of each client's rows; why it cannot be made of some is noted in `left_out`."""
    made: dict[str, Made] = {}
    for id, own in rows.items():
        try:
            made[id] = make(own)
        except FedSieveError as error:
            left_out[id] = str(error)
    return made


def _rows(given: object, columns: Columns) -> Dataset:
    """A client's data set, in memory."""
    if isinstance(given, Dataset):
        return given
    if isinstance(given, IterableDataset):
        return sources.gathered(given, columns)
    if isinstance(given, DatasetDict | IterableDatasetDict):
        raise FedSieveError(f"a data set of splits is given: choose one of {', '.join(given)}")
    raise FedSieveError(
        f"a datasets.Dataset or IterableDataset is needed, not {type(given).__name__} "
        "(Dataset.from_list, from_dict and from_pandas make one)"
    )


def _sound(rows: Dataset, bad: Bad) -> Dataset:
    """The rows themselves. Raises FedSieveError for the first that is no example."""
    for row in sorted(bad):
        raise bad[row]
    return rows
