"""Sequence classification: a text, or a pair of texts, and its class."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from datasets import ClassLabel, Dataset

from fedsieve.data.sources import column
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

    text, text_b, label: column names. Labels may be strings, integers, booleans or a ClassLabel.
    classes: the names in the order of the model's outputs (pass on what the training data gave);
        by default a ClassLabel's own names, else the labels that occur, sorted as what they are
        (2 before 10).

    Raises FedSieveError: no rows, a missing column, an empty label, a text that is not a string,
    a label outside of the classes (naming label and row), fewer than two classes.
    """
    check_rows(dataset)
    found, order = _labels(dataset, label)
    names = tuple(order if classes is None else classes)
    if len(names) < 2 or len(set(names)) < len(names):
        raise FedSieveError(
            f"column {label!r}: at least two different classes are needed, not {list(names)}"
        )
    numbers = {name: number for number, name in enumerate(names)}
    for row, name in enumerate(found):
        if name not in numbers:
            raise FedSieveError(
                f"label {name!r} in row {row} of column {label!r} is none of the "
                f"{len(names)} classes: {_listing(names)}"
            )
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


def _labels(dataset: Dataset, name: str) -> tuple[list[str], list[str]]:
    """Every row's label as a string, and the classes in their own order."""
    values = column(dataset, name)
    if None in values:
        raise FedSieveError(f"row {values.index(None)} of column {name!r} has no label")
    feature = dataset.features[name]
    if isinstance(feature, ClassLabel):
        known = dict(enumerate(feature.names))  # hub test sets hold -1 for "not given"
        return [known.get(value, str(value)) for value in values], list(feature.names)
    if not isinstance(values[0], str | int):
        raise FedSieveError(
            f"column {name!r} holds {type(values[0]).__name__} values: "
            "a class is a string or an integer"
        )
    return [str(value) for value in values], [str(value) for value in sorted(set(values))]


def _listing(names: Sequence[str]) -> str:
    shown = ", ".join(names[:20])
    return shown if len(names) <= 20 else f"{shown}, ..."
