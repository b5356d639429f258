"""Which classes the clients' training rows are of: how unlike they are."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from fedsieve.tasks.tally import CLIENTS, MATRIX, Held
from fedsieve.tasks.tokens import by_token


def in_classes(labels: Tensor, classes: int) -> Tensor:
    """How many rows each class holds of, (classes,); a row may be of several."""
    if labels.ndim > 1:
        return (labels > 0).sum(0)
    return torch.bincount(labels, minlength=classes)


def held_by(
    labels: Tensor, classes: Sequence[str], parts: Mapping[str, Any], ids: Iterable[str]
) -> tuple[Held, ...]:
    """The classes of the first CLIENTS clients' rows; none where rows have none, or more than
    MATRIX.

    labels: of all rows; parts: id -> a client's row numbers
    """
    if not 0 < len(classes) <= MATRIX or by_token(labels):
        return ()
    return tuple(
        Held(id, tuple(in_classes(labels[torch.as_tensor(parts[id])], len(classes)).tolist()))
        for id in islice(ids, CLIENTS)
    )
