"""Image classification: an image and its class."""

from collections.abc import Sequence

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from fedsieve.data.files import Columns
from fedsieve.errors import FedSieveError
from fedsieve.tasks import classification, confusion
from fedsieve.tasks.classes import bad_labels, classes_in, numbered
from fedsieve.tasks.images import bad_images, images
from fedsieve.tasks.task import Bad, Fields, Reader, Rows, Task, needed
from fedsieve.tasks.tokens import check_rows


def _columns(fields: Fields) -> Columns:
    needed(image=fields.image, label=fields.label)
    assert fields.image is not None
    if not isinstance(fields.label, str):
        raise FedSieveError("label: this task takes one column")
    return Columns((fields.image,), (fields.label,))


def _classes(parts: Sequence[Dataset], fields: Fields) -> tuple[str, ...]:
    return classes_in(parts, _columns(fields).names[0], fields.classes)


def _bad(rows: Dataset, processor: Reader, fields: Fields) -> Bad:
    columns = _columns(fields)
    return bad_images(rows, columns.texts[0]) | bad_labels(rows, columns.names[0], fields.classes)


def _read(rows: Dataset, processor: Reader, fields: Fields) -> Rows:
    check_rows(rows)
    columns = _columns(fields)
    labels, names = numbered(rows, columns.names[0], fields.classes)
    made = images(rows, processor, columns.texts[0])
    return Rows(made._replace(labels=labels), np.arange(len(rows)), names)


def _labels(pixels: Tensor, mask: Tensor, classes: int) -> Tensor:
    return torch.arange(len(pixels), device=pixels.device) % classes


TASK = Task(
    title="image classification",
    auto="AutoModelForImageClassification",
    peft=None,
    head=True,
    named=True,
    columns=_columns,
    classes=_classes,
    bad=_bad,
    read=_read,
    config=classification.TASK.config,
    labels=_labels,
    judge=classification.TASK.judge,
    fits=confusion.fits,
    leads=confusion.leads,
    metrics=confusion.metrics,
    reads="images",
    by_class=confusion.by_class,
    told=confusion.told,
)
