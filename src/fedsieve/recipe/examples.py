"""Rows to examples, as a recipe says: what is trained on, and what is evaluated on.

The same for a run in one process, for a site and for a server that evaluates, so that one recipe
means the same rows everywhere.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fedsieve.algebra.keys import Key, generator
from fedsieve.data import pictures, sources, templates
from fedsieve.data.files import Columns
from fedsieve.data.paths import is_path
from fedsieve.data.templates import filled
from fedsieve.errors import FedSieveError, quoted
from fedsieve.recipe.schema import Data, Recipe
from fedsieve.tasks import catalogue
from fedsieve.tasks.examples import Examples, take, unasked
from fedsieve.tasks.task import Fields, refuse, unread


class Prepared(NamedTuple):
    """A recipe's examples.

    train:   to train on; came: (n,) the row of each
    test:    to evaluate on: test rows, or the rows held back; None if there are none
    held:    (m,) the training row of each example of `test`, where those are rows held back
    owners:  the client that each example to evaluate on is of, where that was asked
    classes: in the order of the model's outputs; empty where those are no classes
    more:    other rows to evaluate on, by name (`data.more_tests`)
    """

    train: Examples
    came: Tensor
    test: Examples | None
    classes: tuple[str, ...]
    held: Tensor
    owners: tuple[str, ...] = ()
    more: Mapping[str, Examples] = {}


def fields_of(data: Data) -> Fields:
    """Which columns hold what, for a task."""
    return Fields(*(getattr(data, name) for name in Fields._fields))


def load_rows(data: Data, source: str, split: str | None, clients: str | None = None) -> Dataset:
    """Rows from a source of a recipe's or a site's [data]: the columns that it names, no others.

    clients: the column that names the clients, if one does
    Raises FedSieveError as `sources.load` does.
    """
    return as_read(data, stored_rows(data, source, split, clients), source)


def stored_rows(data: Data, source: str, split: str | None, clients: str | None = None) -> Dataset:
    """`load_rows` as they are stored: templates are not filled in, and paths are the file's own."""
    return sources.load(
        source,
        split,
        config=data.config,
        names=data.names,
        separator=data.separator,
        field=data.field,
        columns=columns_of(fields_of(data), clients),
    )


def as_read(data: Data, stored: Dataset, source: str) -> Dataset:
    """What `load_rows` makes of stored rows."""
    rows = filled(stored, columns_of(fields_of(data)).texts)
    if data.image is None:
        return rows
    return pictures.located(rows, data.image, sources.folder_of(source))


def load_more(data: Data) -> dict[str, Dataset]:
    """The rows of each of `data.more_tests`. Raises FedSieveError as `load_rows`, naming it."""
    found = {}
    for name, (source, split) in more_sources(data).items():
        with _of(f"data.more_tests.{name}"):
            found[name] = load_rows(data, source, split)
    return found


def more_sources(data: Data) -> dict[str, tuple[str, str | None]]:
    """Source and split of each of `data.more_tests`."""
    found: dict[str, tuple[str, str | None]] = {}
    for name, more in (data.more_tests or {}).items():
        split, usual = more.test_split, data.test or data.train
        if more.test is None and split is not None and is_path(split):
            found[name] = split, None
        else:
            found[name] = more.test or usual, split
    return found


@contextmanager
def _of(whose: str) -> Iterator[None]:
    """Errors that are raised here are told as those of these rows."""
    try:
        yield
    except FedSieveError as error:
        raise FedSieveError(f"{whose}: {error}") from error


def unused(recipe: Recipe) -> list[str]:
    """What was given in vain, by the task and by where the rows are, a sentence each."""
    task, data = catalogue.load(recipe.model.task), recipe.data
    found = [
        f"data.{name} is not used: a {recipe.model.task} task has no use for it"
        for name in unread(task, fields_of(data))
    ]
    if task.reads != "images" and recipe.training.augment != "none":
        found.append(
            f"training.augment is not used: it moves images, and a {recipe.model.task} task reads "
            "texts"
        )
    if task.reads == "images" and recipe.training.by_length:
        found.append("training.by_length is not used: all images have one size")
    places = {data.train, data.test or data.train, *(at for at, _ in more_sources(data).values())}
    if data.config is not None and all(map(sources.folder_of, places)):
        found.append(
            f"data.config is not used: it names a configuration of a data set of the hub, and "
            f"{quoted(data.train)} is read from this machine"
        )
    return found


def columns_of(fields: Fields, clients: str | None = None) -> Columns:
    """The columns that are read; templates among the texts are still to be filled in."""
    options = fields.options if isinstance(fields.options, tuple) else (fields.options,)
    texts = (fields.text, fields.text_b, fields.image, fields.prompt, fields.completion, *options)
    labels = fields.label if isinstance(fields.label, tuple) else (fields.label,)
    names = (*labels, clients)
    return Columns(*(tuple(c for c in kind if c is not None) for kind in (texts, names)))


def bad_rows(
    recipe: Recipe, rows: Dataset, tokenizer: PreTrainedTokenizerBase
) -> dict[int, FedSieveError]:
    """The rows that are no examples because of what they hold, and what is wrong with each."""
    task, fields = catalogue.load(recipe.model.task), fields_of(recipe.data)
    return task.bad(rows, tokenizer, fields) | templates.bad(rows, columns_of(fields).texts)


def prepare(
    recipe: Recipe,
    rows: Dataset,
    test_rows: Dataset | None,
    tokenizer: PreTrainedTokenizerBase,
    clients: str | None = None,
    more_rows: Mapping[str, Dataset] | None = None,
) -> Prepared:
    """The examples of the training rows, without those held back, and those to evaluate on.

    clients: the column that says whose each row is that is evaluated on, where that is asked
    more_rows: those of `load_more`, if they are to be evaluated on
    Raises FedSieveError for rows that do not fit the recipe.
    """
    data, on_validation = recipe.data, recipe.evaluation.on == "validation"
    train, came, classes = tensors(recipe, rows, tokenizer)
    test: Examples | None = None
    more: dict[str, Examples] = {}
    owners: list[str] = []
    from_train = torch.empty(0, dtype=torch.int64)
    if not on_validation and test_rows is not None:
        if classes:  # those of the training rows count
            told = recipe.data.model_copy(update={"classes": classes})
            recipe = recipe.model_copy(update={"data": told})
        some = sample(recipe, test_rows)
        with _of("the test rows"):
            test, of, _ = tensors(recipe, some, tokenizer)
        more = more_tensors(recipe, more_rows or {}, tokenizer)
        if clients is not None:
            known = owners_of(some, clients)
            owners = [known[row] for row in of.tolist()]
    if data.validation is not None:
        # After the texts became tensors: the classes are those of all rows, held back or not.
        held = held_back(len(rows), data.validation)[came]
        if on_validation and held.any():
            index = held.nonzero().flatten()
            index = index[_drawn(recipe, index.numel())]
            test, from_train = take(train, index), came[index]
            if clients is not None:
                known = owners_of(rows, clients)
                owners = [known[row] for row in from_train.tolist()]
        train, came = take(train, (~held).nonzero().flatten()), came[~held]
    return Prepared(unasked(train), came, test, classes, from_train, tuple(owners), more)


def more_tensors(
    recipe: Recipe, rows: Mapping[str, Dataset], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Examples]:
    """Examples of other rows to evaluate on; `data.classes` must be filled in.

    Raises FedSieveError, naming them, for rows that do not fit the recipe.
    """
    found = {}
    for name, own in rows.items():
        with _of(f"data.more_tests.{name}"):
            found[name], _, _ = tensors(recipe, sample(recipe, own), tokenizer)
    return found


def owners_of(rows: Dataset, column: str, what: str = "client") -> list[str]:
    """The client (or `what` else a column names) of each row. Raises FedSieveError, naming a row
    that has none.
    """
    owners: list[str] = []
    for row, name in enumerate(sources.names_in(rows, column)):
        if isinstance(name, FedSieveError):
            raise name
        if name is None:
            raise FedSieveError(f"row {row} has no {what}: column {column!r} is empty there")
        owners.append(name)
    return owners


def tensors(
    recipe: Recipe, rows: Dataset, tokenizer: PreTrainedTokenizerBase
) -> tuple[Examples, Tensor, tuple[str, ...]]:
    """Examples, the row that each came from, and the classes.

    Raises FedSieveError for rows that do not fit the recipe.
    """
    task, fields = catalogue.load(recipe.model.task), fields_of(recipe.data)
    try:
        task.columns(fields)
    except FedSieveError as error:
        raise FedSieveError(f"data.{error}") from None
    refuse(templates.bad(rows, columns_of(fields).texts))
    examples, came, classes = task.read(rows, tokenizer, fields)
    return examples, torch.from_numpy(came), classes


def sample(recipe: Recipe, rows: Dataset) -> Dataset:
    """As many of the rows as `evaluation.limit` lets be evaluated on."""
    limit = recipe.evaluation.limit
    if limit is None or limit >= len(rows):
        return rows
    return rows.select(_drawn(recipe, len(rows)).tolist())


def number_held_back(count: int, share: float) -> int:
    """How many of so many training rows `held_back` takes."""
    return min(max(1, round(share * count)), count - 1)


def held_back(count: int, share: float) -> Tensor:
    """Which of the training rows are for validation: (count,) bool, at least one, never all.

    The draw has a key of its own, without the run's seed: what was chosen on these rows with one
    seed has not been trained on with another.
    """
    number = number_held_back(count, share)
    held = torch.zeros(count, dtype=torch.bool)
    held[torch.randperm(count, generator=generator(Key(0, purpose="validation")))[:number]] = True
    return held


def _drawn(recipe: Recipe, count: int) -> Tensor:
    """The numbers of what is evaluated, in random order."""
    order = torch.randperm(count, generator=generator(Key(recipe.seed).at("evaluation")))
    return order[: recipe.evaluation.limit]
