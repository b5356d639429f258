"""A classifier's head and the classes of the data: its rows are matched by name.

A base that is a classifier already may have the same classes in another order. Its configuration
names them; the rows of the head are put into the order of the data's classes.
"""

import copy
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fedsieve.algebra.keys import Key, generator

_UNNAMED = "label_"  # transformers' own names: LABEL_0, LABEL_1, ...


def match_rows(
    model: PreTrainedModel,
    known: Mapping[int, str] | None,
    classes: Sequence[str],
    drawn: set[str],
    key: Key,
) -> None:
    """Put the rows of a classifier's head into the order of the classes. In place.

    known: the checkpoint's name of each row, where it has any
    drawn: the parameters that the checkpoint lacks

    Classes called 0, 1, 2, ... are the rows' numbers, and a head without names has its rows in the
    order of the classes. Where the head has as many rows but for other classes, those are drawn
    anew from the key, with a warning, and have a gradient as what was drawn has.
    """
    if known is None:
        return
    order = _order(known, classes)
    if len(known) != len(classes) or order == list(range(len(classes))):
        return
    sized = {name: axis for name, axis in _sized_by_classes(model).items() if name not in drawn}
    for name, axis in sized.items():
        weight = model.get_parameter(name)
        if order is not None:
            index = torch.tensor(order, device=weight.device)
            weight.data = weight.data.index_select(axis, index)
        else:
            weight.data.copy_(_fresh(weight, model.config, key.at(f"head/{name}")))
            weight.requires_grad_(True)
    if order is None and sized:
        warnings.warn(
            f"the model's head is for {_listing(known.values())}, the data has "
            f"{_listing(classes)}: its last layer is drawn anew (give the classes the head's names "
            "to keep it)",
            stacklevel=3,
        )


def _order(known: Mapping[int, str], classes: Sequence[str]) -> list[int] | None:
    """For each class the row that is its own; None if the names do not tell.

    As the names stand, else as people write them: capitals then do not count, nor LABEL_.
    """
    rows = [_composed(known[row]) for row in sorted(known)]
    wanted = [_composed(name) for name in classes]
    numbers = [str(number) for number in range(len(rows))]
    loose, asked = [*map(_loose, rows)], [*map(_loose, wanted)]
    for names, given in ((rows, wanted), (loose, asked), (numbers, asked)):
        if sorted(names) == sorted(given) and len(set(names)) == len(names):
            return [names.index(name) for name in given]
    return list(range(len(rows))) if loose == numbers else None


def _composed(name: str) -> str:
    """A name as those of rows are (data/names.py): Unicode's form C, without space around it."""
    return unicodedata.normalize("NFC", name).strip()


def _loose(name: str) -> str:
    return _composed(name.casefold()).removeprefix(_UNNAMED)


def _sized_by_classes(model: PreTrainedModel) -> dict[str, int]:
    """The parameters that have a row for each class, and along which axis.

    Found from a model of the same kind with one class more, on the meta device.
    """
    config: Any = copy.deepcopy(model.config)
    config.num_labels = model.config.num_labels + 1
    with torch.device("meta"):
        larger = dict(type(model)(config).named_parameters())
    return {
        name: [a == b for a, b in zip(one.shape, larger[name].shape, strict=True)].index(False)
        for name, one in model.named_parameters()
        # Quantised weights are packed into another shape, and are of no head.
        if one.is_floating_point() and one.shape != larger[name].shape
    }


def _fresh(weight: Tensor, config: Any, key: Key) -> Tensor:
    if weight.ndim == 1:
        return torch.zeros_like(weight)
    draws = torch.randn(weight.shape, generator=generator(key))
    return draws * getattr(config.get_text_config(), "initializer_range", 0.02)


def _listing(names: Any) -> str:
    shown = [str(name) for name in names]
    return ", ".join(shown[:5]) + (", ..." if len(shown) > 5 else "")
