"""Labels that are names, and the classes that they make."""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from datasets import ClassLabel, Dataset
from torch import Tensor

from fedsieve.data.names import alike, clean, in_order, numbers_of
from fedsieve.data.sources import column, names_in
from fedsieve.errors import FedSieveError


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


def numbered(
    dataset: Dataset, name: str, classes: Sequence[str] | None
) -> tuple[Tensor, tuple[str, ...]]:
    """The number of each row's class, (n,) int64, and the classes, by default those that occur.

    Raises FedSieveError for a label that is none of them, naming it and its row, and for fewer than
    two classes.
    """
    found = labels_of(dataset, name)
    names = classes_in([dataset], name, classes)
    refuse_few(name, names)
    for wrong in bad_labels(dataset, name, names).values():
        raise wrong
    numbers = numbers_of(names)
    return torch.tensor([numbers[label] for label in found], dtype=torch.int64), names


def cells(dataset: Dataset, name: str) -> list[Any]:
    """A column's values; of a ClassLabel the names, since its numbers count classes and no more."""
    values, feature = column(dataset, name), dataset.features[name]
    if not isinstance(feature, ClassLabel):
        return values
    known = dict(enumerate(feature.names))
    return [known.get(value) for value in values]


def listed(parts: Sequence[Dataset], name: str) -> tuple[str, ...] | None:
    """The names of the ClassLabel whose lists a column holds, the same in all these data sets; None
    where it is no such column.
    """
    features = [getattr(rows.features.get(name), "feature", None) for rows in parts]
    first = features[0] if features else None
    if isinstance(first, ClassLabel) and all(each == first for each in features):
        return tuple(map(clean, first.names))
    return None


def classes_in(parts: Sequence[Dataset], name: str, given: Sequence[str] | None) -> tuple[str, ...]:
    """The classes of all these data sets together; those that were given come first."""
    if given is not None:
        return tuple(map(clean, given))
    return tuple(classes_of([(rows.features[name], labels_of(rows, name)) for rows in parts]))


def refuse_few(name: str, classes: Sequence[str]) -> None:
    """Raises FedSieveError unless there are two different classes, and none twice."""
    if len(classes) < 2 or len(set(classes)) < len(classes):
        raise FedSieveError(
            f"column {name!r}: at least two different classes are needed, not {list(classes)}"
        )


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
                f"{len(classes or ())} classes: {listing(classes or ())}"
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


def listing(names: Sequence[str]) -> str:
    shown = ", ".join(names[:20])
    return shown if len(names) <= 20 else f"{shown}, ..."
