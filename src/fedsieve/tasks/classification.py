"""Sequence classification: a text, or a pair of texts, and its class."""

import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from datasets import ClassLabel, Dataset

from fedsieve.data.names import alike, clean, in_order, numbers_of
from fedsieve.data.sources import names_in
from fedsieve.errors import FedSieveError
from fedsieve.tasks.tokens import Examples, check_rows, pad_id, rectangle, text_column, tokenise

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def classification(
    dataset: Dataset,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    text: str,
    label: str,
    text_b: str | None = None,
    max_length: int,
    classes: Sequence[str] | None = None,
) -> tuple[Examples, tuple[str, ...]]:
    """Texts, or pairs of texts, and the class of each; returned with the names of the classes.

    text, text_b, label: column names. A label is a name, as names.py has it: a text, an integer, a
        Boolean, or a number of a ClassLabel.
    classes: the names in the order of the model's outputs (pass on what the training data gave);
        by default those of `classes_of`.

    Raises FedSieveError: no rows, a missing column, an empty label, a text that is not a string,
    a label outside of the classes (naming label and row), fewer than two classes.
    """
    check_rows(dataset)
    found = labels_of(dataset, label)
    names = tuple(
        classes_of([(dataset.features[label], found)]) if classes is None else map(clean, classes)
    )
    if len(names) < 2 or len(set(names)) < len(names):
        raise FedSieveError(
            f"column {label!r}: at least two different classes are needed, not {list(names)}"
        )
    numbers = numbers_of(names)
    for wrong in bad_labels(dataset, label, names).values():
        raise wrong
    rows = tokenise(
        tokenizer,
        text_column(dataset, text),
        None if text_b is None else text_column(dataset, text_b),
        max_length,
    )
    labels = torch.tensor([numbers[name] for name in found], dtype=torch.int64)
    pad = pad_id(tokenizer)
    # A text without any token (an empty one, where no special token is added) would leave nothing
    # to attend to, and a softmax over nothing is NaN: it gets one padding token, attended. A
    # padding token that was added to the vocabulary may have no embedding: then it is the end's.
    added, end = pad >= tokenizer.vocab_size, tokenizer.eos_token_id
    alone = end if added and end is not None else pad
    ids, mask = rectangle([row or [alone] for row in rows.ids], pad)
    types = None if rows.types is None else rectangle([row or [0] for row in rows.types], 0)[0]
    return Examples(ids, mask, labels, types), names


def labels_of(dataset: Dataset, name: str) -> list[str]:
    """The label of each row. Raises FedSieveError, naming the row, where there is none."""
    found: list[str] = []
    for label in _labels(dataset, name, None):
        if isinstance(label, FedSieveError):
            raise label
        found.append(label)
    return found


def bad_labels(
    dataset: Dataset, name: str, classes: Sequence[str] | None
) -> dict[int, FedSieveError]:
    """The rows without a label, or with none of the classes, and what is wrong with each."""
    found = enumerate(_labels(dataset, name, classes))
    return {row: label for row, label in found if isinstance(label, FedSieveError)}


def _labels(
    dataset: Dataset, name: str, classes: Sequence[str] | None
) -> Iterator[str | FedSieveError]:
    known = None if classes is None else numbers_of([clean(each) for each in classes])
    for row, label in enumerate(names_in(dataset, name)):
        if label is None:
            yield FedSieveError(f"row {row} of column {name!r} has no label")
        elif isinstance(label, str) and known is not None and label not in known:
            yield FedSieveError(
                f"label {label!r} in row {row} of column {name!r} is none of the "
                f"{len(classes or ())} classes: {_listing(classes or ())}"
            )
        else:
            yield label


def classes_of(columns: Sequence[tuple[Any, Sequence[str]]]) -> list[str]:
    """The classes in their order: a ClassLabel's own names, else the labels that occur, as
    `names.in_order` sorts them. Warns of those that differ in spelling alone.

    columns: the feature and the labels of the label's column, in each of the data sets that go
        together. If their ClassLabels are not the same, they only name the labels; integers beside
        them are no classes unless they are such names
    """
    told = [feature for feature, _ in columns if isinstance(feature, ClassLabel)]
    if told and all(each == told[0] for each in told):
        return [clean(name) for name in told[0].names]
    named = {clean(name) for feature in told for name in feature.names}
    classes = in_order(
        label
        for feature, labels in columns
        for label in labels
        if label in named or not (named and "int" in getattr(feature, "dtype", ""))
    )
    if same := alike(classes):
        shown = "; ".join(" and ".join(map(repr, group)) for group in same[:5])
        warnings.warn(
            f"labels: these classes differ in spelling alone: {shown}"
            + (f"; {len(same) - 5} more" if len(same) > 5 else "")
            + " (write them alike if they are the same, or give the classes)",
            stacklevel=3,
        )
    return classes


def _listing(names: Sequence[str]) -> str:
    shown = ", ".join(names[:20])
    return shown if len(names) <= 20 else f"{shown}, ..."
