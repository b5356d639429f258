"""Sequence classification: a text, or a pair of texts, and its class."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from fedsieve.data.files import Columns
from fedsieve.data.sources import column
from fedsieve.tasks import confusion
from fedsieve.tasks.classes import bad_labels, classes_in, numbered
from fedsieve.tasks.tally import Tally
from fedsieve.tasks.task import Bad, Fields, Rows, Task, needed, one_label
from fedsieve.tasks.tokens import Texts, bad_texts, check_rows, texts

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
) -> tuple[Texts, tuple[str, ...]]:
    """Texts, or pairs of texts, and the class of each; returned with the names of the classes.

    text, text_b, label: column names. A label is a name, as names.py has it: a text, an integer, a
        Boolean, or a number of a ClassLabel.
    classes: the names in the order of the model's outputs (pass on what the training data gave);
        by default those of `classes_of`.

    Raises FedSieveError: no rows, a missing column, an empty label, a text that is not a string,
    a label outside of the classes (naming label and row), fewer than two classes.
    """
    check_rows(dataset)
    labels, names = numbered(dataset, label, classes)
    return texts(dataset, tokenizer, text, text_b, max_length)._replace(labels=labels), names


def columns_of(fields: Fields) -> Columns:
    """A text or two, and one column of labels."""
    needed(text=fields.text)
    label = one_label(fields)
    return Columns(tuple(n for n in (fields.text, fields.text_b) if n is not None), (label,))


def of_all(parts: Sequence[Dataset], fields: Fields) -> tuple[str, ...]:
    """The classes of several data sets; those that were given come first."""
    return classes_in(parts, columns_of(fields).names[0], fields.classes)


def bad(rows: Dataset, tokenizer: "PreTrainedTokenizerBase", fields: Fields) -> Bad:
    """Rows whose label or text cannot be used."""
    columns = columns_of(fields)
    found = bad_labels(rows, columns.names[0], fields.classes)
    for name in columns.texts:
        found = bad_texts(column(rows, name), name) | found
    return found


def _read(rows: Dataset, tokenizer: "PreTrainedTokenizerBase", fields: Fields) -> Rows:
    columns = columns_of(fields)
    examples, classes = classification(
        rows,
        tokenizer,
        text=columns.texts[0],
        text_b=fields.text_b,
        label=columns.names[0],
        max_length=fields.max_length,
        classes=fields.classes,
    )
    return Rows(examples, np.arange(len(rows)), classes)


def _config(classes: Sequence[str]) -> dict[str, Any]:
    return {"problem_type": "single_label_classification", **confusion.names_of(classes)}


def _labels(ids: Tensor, mask: Tensor, classes: int) -> Tensor:
    return ids[:, 0] % classes


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Of each row, (b,)."""
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")


def _judge(logits: Tensor, labels: Tensor, classes: tuple[str, ...]) -> Tally:
    loss = losses(logits, labels).sum().item()
    sums = confusion.sums(labels, logits.argmax(-1), logits.shape[-1])
    return Tally(loss, labels.numel(), sums)


TASK = Task(
    title="text classification",
    auto="AutoModelForSequenceClassification",
    peft="SEQ_CLS",
    head=True,
    named=True,
    uses=("text", "text_b", "label", "classes"),
    columns=columns_of,
    classes=of_all,
    bad=bad,
    read=_read,
    config=_config,
    labels=_labels,
    losses=losses,
    judge=_judge,
    fits=confusion.fits,
    leads=confusion.leads,
    metrics=confusion.metrics,
    by_class=confusion.by_class,
    told=confusion.told,
)
