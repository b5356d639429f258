"""Multi-label classification: a text, or a pair of texts, and all the classes that hold of it.

The labels are one column of lists of names, or a column for each class that says whether it holds.
"""

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset
from torch import Tensor

from fedsieve.data.files import Columns
from fedsieve.data.names import clean, in_order, name_among, name_of
from fedsieve.data.sources import column
from fedsieve.errors import FedSieveError
from fedsieve.tasks import confusion
from fedsieve.tasks.classes import cells, listed, listing, refuse_few
from fedsieve.tasks.tally import OfClass, Tally
from fedsieve.tasks.task import Bad, Fields, Rows, Task, needed, refuse
from fedsieve.tasks.tokens import IN_FILES, bad_texts, check_rows, texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HOLDS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
_COUNTS = ("right", "false", "missed")  # of a class: told and so, told and not so, so and not told


def label_columns(given: tuple[str, ...], label: str | tuple[str, ...] | None) -> Columns:
    """The columns that are read as they are, and those of the labels. Lists of names are read as
    they are too; cells that say yes or no are names like others.
    """
    if isinstance(label, str):
        return Columns((*given, label))
    names = tuple(map(clean, label or ()))
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise FedSieveError(f"label: it names the column {twice[0]!r} twice")
    return Columns(given, label or ())


def _columns(fields: Fields) -> Columns:
    needed(text=fields.text, label=fields.label)
    kept = tuple(name for name in (fields.text, fields.text_b) if name is not None)
    return label_columns(kept, fields.label)


def _sets(rows: Dataset, fields: Fields) -> list[set[str] | FedSieveError]:
    """The names that hold of each row, or what is wrong with it."""
    if isinstance(fields.label, str):
        return _of_lists(rows, fields.label)
    found: list[set[str] | FedSieveError] = [set() for _ in range(len(rows))]
    for name in fields.label or ():
        for row, value in enumerate(cells(rows, name)):
            told = _holds(value)
            known = found[row]
            if told is None and isinstance(known, set):
                found[row] = FedSieveError(
                    f"row {row} of column {name!r} holds {str(value)[:40]!r}, where 1 or 0 (true "
                    "or false, yes or no) says whether the class holds"
                )
            elif told and isinstance(known, set):
                known.add(clean(name))
    return found


def _holds(value: Any) -> bool | None:
    """What a cell says of a class; None where it says neither."""
    try:
        name = name_of(value) or ""
    except FedSieveError:
        return None
    return _HOLDS.get(name.casefold().removesuffix(".0"))  # 1.0 is what pandas writes of 1


def _of_lists(rows: Dataset, name: str) -> list[set[str] | FedSieveError]:
    feature = getattr(rows.features.get(name), "feature", None)
    told = [*map(clean, feature.names)] if isinstance(feature, ClassLabel) else None
    found: list[set[str] | FedSieveError] = []
    for row, value in enumerate(column(rows, name)):
        try:
            if not isinstance(value, list):
                raise FedSieveError(f"holds no list of names{IN_FILES}")
            names = [name_among(each, told) for each in value]
            if None in names:
                raise FedSieveError("holds an empty name in its list")
            found.append({each for each in names if each is not None})
        except FedSieveError as error:
            found.append(FedSieveError(f"row {row} of column {name!r} {error}"))
    return found


def classes_in(parts: Sequence[Dataset], fields: Fields) -> tuple[str, ...]:
    """Those that are given, those that have a column, or those that occur."""
    if fields.classes is not None:
        return fields.classes
    if isinstance(fields.label, tuple):
        return tuple(map(clean, fields.label))
    if fields.label is not None and (names := listed(parts, fields.label)) is not None:
        return names
    found: set[str] = set()
    for rows in parts:
        for each in _sets(rows, fields):
            if isinstance(each, FedSieveError):
                raise each
            found |= each
    return tuple(in_order(found))


def bad_sets(rows: Dataset, fields: Fields) -> Bad:
    """Rows whose labels cannot be used."""
    found: Bad = {}
    known = None if fields.classes is None else set(map(clean, fields.classes))
    for row, names in enumerate(_sets(rows, fields)):
        if isinstance(names, FedSieveError):
            found[row] = names
        elif known is not None and names - known:
            where = f"column {fields.label!r}" if isinstance(fields.label, str) else "its columns"
            found[row] = FedSieveError(
                f"row {row} of {where}: label {min(names - known)!r} is none of the {len(known)} "
                f"classes: {listing(fields.classes or ())}"
            )
    return found


def held(rows: Dataset, fields: Fields) -> tuple[Tensor, tuple[str, ...]]:
    """Which classes hold of each row, (n, C) float32, and the classes.

    Raises FedSieveError for labels that cannot be used, and for fewer than two classes.
    """
    names = tuple(map(clean, classes_in([rows], fields)))
    refuse_few("label" if not isinstance(fields.label, str) else fields.label, names)
    refuse(bad_sets(rows, fields._replace(classes=names)))
    sets = [each for each in _sets(rows, fields) if isinstance(each, set)]
    place = {name: number for number, name in enumerate(names)}
    labels = torch.zeros(len(sets), len(names))
    for row, each in enumerate(sets):
        labels[row, [place[name] for name in each]] = 1.0
    return labels, names


def _bad(rows: Dataset, tokenizer: "PreTrainedTokenizerBase", fields: Fields) -> Bad:
    found = bad_sets(rows, fields)
    for name in (fields.text, fields.text_b):
        if name is not None:
            found = bad_texts(column(rows, name), name) | found
    return found


def _read(rows: Dataset, tokenizer: "PreTrainedTokenizerBase", fields: Fields) -> Rows:
    check_rows(rows)
    _columns(fields)
    labels, names = held(rows, fields)
    assert fields.text is not None
    examples = texts(rows, tokenizer, fields.text, fields.text_b, fields.max_length)
    return Rows(examples._replace(labels=labels), np.arange(len(rows)), names)


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    each = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return each.mean(1)


def _judge(logits: Tensor, labels: Tensor, classes: tuple[str, ...]) -> Tally:
    loss = _losses(logits, labels).sum().item()
    told, so = logits > 0, labels > 0.5
    counts = {"right": told & so, "false": told & ~so, "missed": ~told & so}
    sums = {
        f"{name} {number}": float(count)
        for name in _COUNTS
        for number, count in enumerate(counts[name].sum(0).tolist())
    }
    kept = {"told": logits.double().cpu().numpy(), "label": labels.double().cpu().numpy()}
    return Tally(loss, len(labels), sums, kept)


def _fits(tally: Tally, classes: tuple[str, ...]) -> bool:
    if set(tally.sums) != {f"{n} {number}" for n in _COUNTS for number in range(len(classes))}:
        return False
    each = np.array([[tally.sums[f"{n} {c}"] for n in _COUNTS] for c in range(len(classes))])
    whole = (each >= 0).all() and (each == np.rint(each)).all()
    return bool(whole and (each.sum(1) <= tally.counted).all())


def _metrics(tally: Tally, classes: tuple[str, ...]) -> dict[str, float]:
    """Micro and macro F1 where an output above 0 (a half, as a probability) says that a class
    holds; and the mean over the classes that occur of their average precision, which needs every
    row's outputs and so is not told over sites.
    """
    from sklearn import metrics as of

    # Each class as rows of four kinds, so many of each. Those neither told nor so count for no F1:
    # one stands for all, since the library refuses weights that are all zero.
    nothing = np.zeros(len(classes), dtype=np.int64)
    true, said, count = [nothing], [nothing], [1.0]
    for number in range(len(classes)):
        for so, is_told, name in ((1, 1, "right"), (0, 1, "false"), (1, 0, "missed")):
            row = np.zeros((2, len(classes)), dtype=np.int64)
            row[:, number] = so, is_told
            true.append(row[0])
            said.append(row[1])
            count.append(tally.sums[f"{name} {number}"])
    scores = {
        f"{kind}_f1": float(
            of.f1_score(true, said, average=kind, sample_weight=count, zero_division=0.0)
        )
        for kind in ("micro", "macro")
    }
    if tally.kept:
        labels = tally.kept["label"] > 0.5
        there = np.flatnonzero(labels.any(0))
        told = np.nan_to_num(tally.kept["told"])  # of a model that has diverged
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            means = [of.average_precision_score(labels[:, c], told[:, c]) for c in there]
        scores["map"] = float(np.mean(means)) if means else 0.0
    return scores


def _by_class(tally: Tally, classes: tuple[str, ...]) -> tuple[OfClass, ...]:
    from sklearn import metrics as of

    found = []
    for number, name in enumerate(classes):
        right, false, missed = (tally.sums[f"{kind} {number}"] for kind in _COUNTS)
        precision, recall, f1, _ = of.precision_recall_fscore_support(
            [1, 0, 1, 0],
            [1, 1, 0, 0],
            average="binary",
            sample_weight=[right, false, missed, 1.0],  # as above
            zero_division=0.0,
        )
        scores = float(precision), float(recall), float(f1)
        found.append(OfClass(name, int(right + missed), *scores))
    return tuple(found)


def _told(logits: Tensor, labels: Tensor, classes: tuple[str, ...]) -> list[tuple[str, str]]:
    def words(holds: Tensor) -> str:
        return ", ".join(classes[n] for n in holds.nonzero().flatten().tolist())

    return [(words(so), words(said)) for so, said in zip(labels > 0.5, logits > 0, strict=True)]


def _config(classes: Sequence[str]) -> dict[str, Any]:
    return {"problem_type": "multi_label_classification", **confusion.names_of(classes)}


def _labels(ids: Tensor, mask: Tensor, classes: int) -> Tensor:
    each = torch.arange(classes, device=ids.device)
    return ((ids[:, :1] + each) % 2).float()


TASK = Task(
    title="multi-label text classification",
    auto="AutoModelForSequenceClassification",
    peft="SEQ_CLS",
    head=True,
    named=True,
    uses=("text", "text_b", "label", "classes"),
    columns=_columns,
    classes=classes_in,
    bad=_bad,
    read=_read,
    config=_config,
    labels=_labels,
    losses=_losses,
    judge=_judge,
    fits=_fits,
    leads=lambda _, by_row: ("micro_f1", "macro_f1", *(("map",) if by_row else ())),
    metrics=_metrics,
    by_class=_by_class,
    told=_told,
)
