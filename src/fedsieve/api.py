"""Federated fine-tuning from a notebook: data sets in, an adapter and its metrics out."""

import math
import secrets
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from datasets import Dataset
from peft import LoraConfig

from fedsieve.algebra.blame import guarded, trained
from fedsieve.algebra.budget import Budget
from fedsieve.algebra.keys import Key
from fedsieve.algebra.mark import made_of
from fedsieve.algebra.method import Method
from fedsieve.algebra.optim import limits
from fedsieve.data import given as given_rows
from fedsieve.data import sources
from fedsieve.data.partition import Partition
from fedsieve.engine.callbacks import OnRound, as_list
from fedsieve.errors import FedSieveError, quoted
from fedsieve.notebook import Reading, Run, bad, read, rows_of
from fedsieve.recipe import arguments
from fedsieve.recipe.examples import owners_of
from fedsieve.recipe.experiment import (
    also,
    assemble,
    divided,
    locate,
    reasons,
    stopped,
    with_secret,
)
from fedsieve.settings import (
    NORM_BOUND,
    Dtype,
    Lora,
    Quantization,
    Sampling,
    Task,
    Training,
    as_float,
    in_round,
    is_number,
)
from fedsieve.tasks import catalogue
from fedsieve.tasks.digest import named_digest
from fedsieve.tasks.examples import Examples, count, unasked
from fedsieve.tasks.tally import check_lead
from fedsieve.tasks.task import Bad, Fields
from fedsieve.tasks.task import Task as TaskRecord
from fedsieve.train.by_function import Function
from fedsieve.train.changes import check_changes, refuse_quantised
from fedsieve.train.digest import base_digest
from fedsieve.train.lengths import check_rows
from fedsieve.train.model import load_base, pick_device, set_up
from fedsieve.train.reader import load_reader
from fedsieve.train.start import begun

__all__ = ["Run", "finetune"]

T = TypeVar("T")
Made = TypeVar("Made")


class Divided(NamedTuple):
    """One table, and the numbers of each client's rows in it."""

    table: Dataset
    split: Partition


def finetune(
    model: str | Path,
    clients: Any,
    method: Method | str,
    *,
    rounds: int,
    cohort: int | Sampling | None = None,
    test: Any = None,
    partition: Any = None,
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
    lora: Lora | LoraConfig | None = None,
    start: str | PathLike[str] | None = None,
    training: Training | Function | None = None,
    budgets: Mapping[Any, Budget | float] | Budget | float | None = None,
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
    clients: the rows of each client, by id or in a list (ids "0000", "0001", ...): each a
             `datasets.Dataset`, a pandas or polars DataFrame, a list of dicts, a dict of columns, a
             file, or a stream (IterableDataset) that ends. Or one of these with `partition`; or a
             partitioner of flwr-datasets with its data set, each of whose partitions is a client.
             A client whose rows cannot be used is left out, with a warning that names it, the row
             (of the data set or the table as it was given; the first is 0) and the column
    partition: how one table is divided: the column whose values are the clients, so many equal
             parts, a table as a recipe's [partition], or a partitioner of flwr-datasets
    method:  e.g. `fedsieve.flasc(server=fedsieve.adam(1e-3))`, or a name for its defaults
    cohort:  clients a round, or a `Sampling` that says how they are drawn; default all
    test:    rows to evaluate on, in any of these forms
    task:    one of those of docs/tasks.md, which says what columns each reads
    text, label, prompt, completion: columns. For causal-lm give `text`, or the other two (then
             text is not used). `classes` defaults to the labels that the clients hold. Labels
             are names (data/names.py), 1 and "1" alike
    dtype, quantization, double_quantization: how the base is held, as a recipe's [model] says it
    data:    what else of a recipe's [data] says what rows hold, such as `text_b`, `options`,
             `option_word` (docs/recipes.md)
    lora:    settings of the pairs, or a `peft.LoraConfig`, of which what has no equivalent here is
             refused
    start:   a folder with an adapter in PEFT's format to begin from
    training: the local training's settings; or a function of your own in its place, called with the
             resident model (the client's adapter in it: only what it may move requires gradients),
             the client's rows and a seed. Its rows are a `datasets.Dataset` of tokens, without
             padding: `input_ids`, `attention_mask`, `token_type_ids` where the model has such, and
             `labels` (classes by number); of images `pixel_values` and `labels`. What it returns is
             its mean loss, or nothing. What the method does not let a client move comes back to the
             bit, whatever the function did; random states and the model's settings are put back. A
             result that is not finite leaves the client out; an error names client and round.
             `fedsieve.with_trainer` makes one of a `Trainer` of transformers
    budgets: what each client can afford, by id; or one budget for all. A number is the ratio, or
             the density both ways, whichever the method uses
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
    name = method if isinstance(method, str) else None
    method = arguments.method_given(method)
    lora = arguments.lora_given(lora, start)
    training, function = arguments.training_given(training)
    mark = made_of(method)  # before it knows of rounds, of which a run may have more later
    if method.trained_by is not None:
        if function is not None:
            raise FedSieveError(
                "training: a function trains in its own way, and this method has to know how far "
                "its steps go: give a fedsieve.Training"
            )
        method = trained(method, partial(in_round, training, rounds=rounds))
    method = guarded(method)
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
    reading = Reading(asked, fields, None, metric, training.precision)
    asked.columns(fields)  # or it raises: a column that the task needs is not said
    _check_lead(asked, metric, fields)
    left_out: dict[str, str] = {}
    given, divided_table = _by_client(clients, partition, reading, Key(seed))
    allowed = arguments.budgets_given(budgets, given, method)
    rows = _each(lambda own: rows_of(reading, own), given, left_out)
    rows = {id: own for id, own in rows.items() if len(own)}
    if not rows and not left_out:
        raise FedSieveError("clients: at least one data set with a row in it is needed")
    key = Key(seed)
    source = locate(str(model))
    refuse_quantised(source, held.quantization, method)
    tokenizer, note = load_reader(source, task)
    if note:
        warnings.warn(note, stacklevel=2)
    reading = reading._replace(tokenizer=tokenizer)
    found = _bad_by_client(reading, rows, divided_table, left_out)
    sound = _each(lambda own: _sound(*own), {id: (rows[id], found[id]) for id in found}, left_out)
    if sound:
        # The labels of a client whose rows cannot be used make no classes.
        fields = fields._replace(classes=asked.classes(list(sound.values()), fields) or None)
        _check_lead(asked, metric, fields)
    reading = reading._replace(fields=fields)
    made = _each(lambda own: read(reading, own), sound, left_out)
    examples: dict[str, Examples] = {id: unasked(each.examples) for id, each in made.items()}
    if not examples:
        raise FedSieveError(f"no client has rows that can be used: {reasons(left_out)}")
    if strict and left_out:
        raise stopped(left_out)
    try:
        tested = None if test is None else read(reading, rows_of(reading, test)).examples
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
    if lora.start is not None:
        resident = begun(resident, lora.start, method)
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
        allowed,
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
        function=function,
    )
    if method.private == "system":
        # A seed that somebody can guess would tell who took part.
        experiment = with_secret(experiment, secrets.randbits(256))
    settings = {
        **({} if name is None else {"method": name}),
        "rounds": rounds,
        "seed": seed,
        "model": {"source": str(model), "task": task},
        "lora": _plain(lora),
        "training": _plain(training) if function is None else {"by": _called(function)},
        "evaluation": {
            "every": int(evaluate_every),
            **({} if metric is None else {"metric": metric}),
        },
        "federation": {
            "clients": len(examples),
            "rows": named_digest((f"{id}, {allowed[id]}", examples[id]) for id in sorted(examples)),
            "sampling": asdict(sampling),
            "server": dict(method.server.table),
            "norm_bound": _bound(norm_bound, method),
            "method": mark,
            **({} if tested is None else {"test": named_digest([("test", tested)])}),
        },
    }
    return Run(experiment, rounds, reading, settings, callbacks)


def _check_lead(task: TaskRecord, metric: str | None, fields: Fields) -> None:
    try:
        check_lead(task, metric, fields.classes or ())
    except FedSieveError as error:
        raise FedSieveError(f"metric: {error}") from None


def _bound(given: float | None, method: Method) -> float:
    """What `norm_bound` says. Raises FedSieveError for none, or for one that privacy forbids."""
    if given is None:
        return math.inf if limits(method.server) else NORM_BOUND
    if not is_number(given) or not (bound := as_float(given)) >= 1:
        said = "it must be at least 1, or math.inf for none"
        raise FedSieveError(f"norm_bound is {quoted(given)}; {said}")
    if method.private is not None and bound < math.inf:
        raise FedSieveError("norm_bound: leave it out: the method's own clip bounds every update")
    return bound


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


def _bad_by_client(
    reading: Reading,
    rows: Mapping[str, Dataset],
    divided_table: Divided | None,
    left_out: dict[str, str],
) -> dict[str, Bad]:
    """Which rows of each client are no examples: told as rows of the table that was divided, where
    one was. Why it cannot be told of some is noted in `left_out`.
    """
    if divided_table is None:
        return _each(lambda own: bad(reading, own), rows, left_out)
    table, split = divided_table
    try:
        found = bad(reading, rows_of(reading, table))
    except FedSieveError as error:
        raise FedSieveError(f"clients: {error}") from error
    return {id: {row: found[row] for row in split[id] if row in found} for id in rows}


def _sound(rows: Dataset, bad: Bad) -> Dataset:
    """The rows themselves. Raises FedSieveError for the first that is no example."""
    for row in sorted(bad):
        raise bad[row]
    return rows


def _called(function: Function) -> str:
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', function)}"


def _plain(settings: Lora | Training) -> dict[str, Any]:
    return {key: value for key, value in asdict(settings).items() if value is not None}


def _by_client(
    clients: Any, partition: Any, reading: Reading, key: Key
) -> tuple[dict[str, Any], Divided | None]:
    """What was given of each client, by id; and the table that it was divided from, by a column or
    a number of parts.
    """
    parts = given_rows.of_partitioner(clients)
    if parts is not None:
        if partition is not None:
            raise FedSieveError("partition: the partitioner in `clients` says it: leave it out")
        return parts, None
    if partition is None:
        if given_rows.is_one_table(clients):
            raise FedSieveError(
                f"clients: one table is given ({type(clients).__name__}): say with `partition` "
                "which rows are whose (a column's name, or how many equal parts), or give a list, "
                "or a dict by client"
            )
        return arguments.by_id(clients, "clients"), None
    if isinstance(clients, Mapping | list | tuple) and not given_rows.is_one_table(clients):
        raise FedSieveError(
            "partition: it divides one table, and `clients` has the rows of each: leave it out"
        )
    said = arguments.partition_given(partition)
    columns = reading.columns
    more = () if said is None or said.reads is None else (said.reads,)
    try:
        table = given_rows.rows_of(clients, columns._replace(names=(*columns.names, *more)))
    except FedSieveError as error:
        raise FedSieveError(f"clients: {error}") from error
    if not len(table):
        raise FedSieveError("clients: at least one row is needed")
    if said is None:
        return _by_partitioner(partition, table), None
    values, classes = partial(owners_of, table), partial(_classes_of, table, reading)
    try:
        split = divided(said, len(table), values, classes, key)
    except FedSieveError as error:
        raise FedSieveError(f"partition: {error}") from error
    return {id: table.select(rows) for id, rows in split.items()}, Divided(table, split)


def _by_partitioner(partition: Any, table: Dataset) -> dict[str, Any]:
    try:
        partition.dataset = table
        parts = given_rows.of_partitioner(partition)
    except (AttributeError, TypeError, ValueError) as error:
        raise FedSieveError(
            f"partition: a column's name, a number of parts, a dict as a recipe's [partition], or "
            f"a partitioner of flwr-datasets without a data set is needed: {error}"
        ) from error
    if parts is None:
        raise FedSieveError(
            "partition: a column's name, a number of parts, a dict as a recipe's [partition], or a "
            f"partitioner of flwr-datasets is needed, not {type(partition).__name__}"
        )
    return parts


def _classes_of(table: Dataset, reading: Reading) -> list[int]:
    """The number of each row's class, in the order of the model's outputs."""
    label = reading.fields.label
    if not reading.task.named or not isinstance(label, str):
        raise FedSieveError(
            "it splits by label, and this task has none that are classes: use a column or a number "
            "of parts"
        )
    classes = reading.task.classes([table], reading.fields)
    number = {name: n for n, name in enumerate(classes)}
    found = []
    for row, name in enumerate(sources.names_in(table, label)):
        if isinstance(name, FedSieveError) or name not in number:
            why = name if isinstance(name, FedSieveError) else f"row {row} has no label"
            raise FedSieveError(str(why))
        found.append(number[name])
    return found
