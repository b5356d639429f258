"""Image classification: an image and its class."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from fedsieve.data.files import Columns
from fedsieve.tasks import classification
from fedsieve.tasks.classes import bad_labels, classes_in, numbered
from fedsieve.tasks.images import bad_images, images
from fedsieve.tasks.task import Bad, Fields, Reader, Rows, needed, one_label
from fedsieve.tasks.tokens import check_rows


def _columns(fields: Fields) -> Columns:
    needed(image=fields.image)
    assert fields.image is not None
    return Columns((fields.image,), (one_label(fields),))


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


TASK = replace(
    classification.TASK,
    title="image classification",
    auto="AutoModelForImageClassification",
    peft=None,
    reads="images",
    uses=("image", "label", "classes"),
    columns=_columns,
    classes=_classes,
    bad=_bad,
    read=_read,
    labels=_labels,
)
