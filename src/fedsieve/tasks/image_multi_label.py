"""Multi-label images: an image, and all the classes that hold of it.

FLASC's FLAIR is such a data set: 17 coarse labels (arXiv 2406.05233). Labels are as in
multi_label.py, and so is what is made of them.
"""

from dataclasses import replace

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from fedsieve.data.files import Columns
from fedsieve.tasks import multi_label
from fedsieve.tasks.images import bad_images, images
from fedsieve.tasks.task import Bad, Fields, Reader, Rows, needed
from fedsieve.tasks.tokens import check_rows


def _columns(fields: Fields) -> Columns:
    needed(image=fields.image, label=fields.label)
    assert fields.image is not None
    return multi_label.label_columns((fields.image,), fields.label)


def _bad(rows: Dataset, processor: Reader, fields: Fields) -> Bad:
    return bad_images(rows, _columns(fields).texts[0]) | multi_label.bad_sets(rows, fields)


def _read(rows: Dataset, processor: Reader, fields: Fields) -> Rows:
    check_rows(rows)
    name = _columns(fields).texts[0]
    labels, classes = multi_label.held(rows, fields)
    made = images(rows, processor, name)
    return Rows(made._replace(labels=labels), np.arange(len(rows)), classes)


def _labels(pixels: Tensor, mask: Tensor, classes: int) -> Tensor:
    rows, each = (torch.arange(n, device=pixels.device) for n in (len(pixels), classes))
    return ((rows[:, None] + each) % 2).float()


TASK = replace(
    multi_label.TASK,
    title="multi-label image classification",
    auto="AutoModelForImageClassification",
    peft=None,
    reads="images",
    uses=("image", "label", "classes"),
    columns=_columns,
    bad=_bad,
    read=_read,
    labels=_labels,
)
