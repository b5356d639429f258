"""Which class each row has and which it was taken for: what scores over classes are made of."""

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsieve.tasks.tally import MATRIX, OfClass, Tally

_PAIR = re.compile(r"([0-9]{1,9}) as ([0-9]{1,9})")


def sums(labels: Tensor, found: Tensor, classes: int) -> dict[str, float]:
    """How often rows of each class were taken for each class: "3 as 5"; those that occur."""
    pairs, counts = torch.unique(labels * classes + found, return_counts=True)
    told = zip(pairs.tolist(), counts.tolist(), strict=True)
    return {f"{pair // classes} as {pair % classes}": float(count) for pair, count in told}


def fits(tally: Tally, classes: tuple[str, ...]) -> bool:
    """Whether a tally holds such counts, for so many classes."""
    pairs = [_PAIR.fullmatch(name) for name in tally.sums]
    known = all(pair and max(map(int, pair.groups())) < len(classes) for pair in pairs)
    whole = all(value > 0 and value.is_integer() for value in tally.sums.values())
    return known and whole and sum(tally.sums.values()) == tally.counted


def metrics(tally: Tally, classes: tuple[str, ...]) -> dict[str, float]:
    """Accuracy, macro F1 over the classes that occur, and Matthews' correlation; of two classes
    also the F1 of the second, as GLUE has it for pairs that mean the same.
    """
    from sklearn import metrics as of  # takes a second to import

    true, found, count = _pairs(tally.sums)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a class that is never told: its F1 is 0
        told = {
            "accuracy": float(of.accuracy_score(true, found, sample_weight=count)),
            "macro_f1": float(of.f1_score(true, found, average="macro", sample_weight=count)),
            "matthews": _matthews(true, found, count),
        }
        if len(classes) == 2:
            second = of.f1_score(true, found, labels=[1], average="macro", sample_weight=count)
            told["f1"] = float(second)
        return told


def _matthews(true: Any, found: Any, count: Any) -> float:
    """Matthews' correlation over several classes (Gorodkin 2004, equation 8) from how often each
    class occurs and is told: scikit-learn's makes a table of all pairs of classes, gigabytes where
    there are many.
    """
    rows, told = np.bincount(true, count), np.bincount(found, count)
    both = min(len(rows), len(told))
    total, right = count.sum(), count[true == found].sum()
    together = right * total - rows[:both] @ told[:both]
    spread = (total**2 - rows @ rows) * (total**2 - told @ told)
    return float(together / np.sqrt(spread)) if spread > 0 else 0.0


def leads(classes: Sequence[str], by_row: bool) -> tuple[str, ...]:
    """Which of `metrics` are told of these classes; all where they are not known yet."""
    of_two = ("f1",) if len(classes) in (0, 2) else ()
    return "accuracy", "macro_f1", "matthews", *of_two


def by_class(tally: Tally, classes: tuple[str, ...]) -> tuple[OfClass, ...]:
    """Precision, recall and F1 of each class, and what it was taken for."""
    from sklearn import metrics as of

    true, found, count = _pairs(tally.sums)
    precision, recall, f1, rows = of.precision_recall_fscore_support(
        true, found, labels=range(len(classes)), sample_weight=count, zero_division=0.0
    )
    shown = len(classes) if len(classes) <= MATRIX else 0
    taken = np.zeros((len(classes), shown), dtype=np.int64)
    if shown:
        np.add.at(taken, (true, found), count.astype(np.int64))
    return tuple(
        OfClass(
            name,
            int(rows[n]),
            float(precision[n]),
            float(recall[n]),
            float(f1[n]),
            (*taken[n].tolist(),),
        )
        for n, name in enumerate(classes)
    )


def told(logits: Tensor, labels: Tensor, classes: tuple[str, ...]) -> list[tuple[str, str]]:
    """The class of each row, and the one that it is taken for."""
    both = zip(labels.tolist(), logits.argmax(-1).tolist(), strict=True)
    return [(classes[so], classes[said]) for so, said in both]


def names_of(classes: Sequence[str]) -> dict[str, Any]:
    """A model's configuration: the names of its outputs."""
    return {
        "id2label": dict(enumerate(classes)),
        "label2id": {label: number for number, label in enumerate(classes)},
    }


def _pairs(counts: Mapping[str, float]) -> tuple[Any, Any, Any]:
    pairs = [tuple(map(int, name.split(" as "))) for name in counts]
    true, found = np.array(pairs, dtype=np.int64).T
    return true, found, np.array(list(counts.values()))
