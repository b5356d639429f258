"""Regression: a text, or a pair of texts, and a number."""

import math
import warnings
from collections.abc import Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from fedsieve.data.files import Columns
from fedsieve.data.names import NUMBER, kind_of
from fedsieve.data.sources import column
from fedsieve.errors import FedSieveError
from fedsieve.tasks import classification
from fedsieve.tasks.classes import cells
from fedsieve.tasks.tally import Tally
from fedsieve.tasks.task import Bad, Fields, Rows, Task, no_classes, refuse
from fedsieve.tasks.tokens import bad_texts, check_rows, texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LARGEST = 1e6  # beyond it a squared error in float32 is no help to anybody
_SUMS = ("x", "y", "xx", "yy", "xy")
_NEAR = 1e-9  # of a sum of squares, within which an honest site's sums agree with each other
_ROUNDING = 1e-13  # of one, below which a spread is none


def _columns(fields: Fields) -> Columns:
    # The numbers are read as they are: as names, those with a fraction would be none.
    columns = classification.columns_of(fields)
    return Columns((*columns.texts, *columns.names))


def _number(value: Any) -> float:
    """Raises ValueError, with the end of a sentence that begins with the value's place."""
    if isinstance(value, bool) or not isinstance(value, int | float | str | Decimal):
        raise ValueError("holds " + ("nothing" if value is None else kind_of(value)))
    shown = str(value)[:40]
    # Python's `float` reads 1_0 and digits of all scripts, too.
    if isinstance(value, str) and not NUMBER.fullmatch(value.strip().casefold()):
        raise ValueError("has no label" if not shown.strip() else f"holds {shown!r}")
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(f"holds {shown!r}") from None
    if not abs(number) <= LARGEST:
        raise ValueError(f"holds {number:g}")
    return number


def _bad(rows: Dataset, tokenizer: "PreTrainedTokenizerBase", fields: Fields) -> Bad:
    columns = classification.columns_of(fields)
    (label,) = columns.names
    found: Bad = {}
    for row, value in enumerate(cells(rows, label)):
        try:
            _number(value)
        except ValueError as error:
            found[row] = FedSieveError(
                f"row {row} of column {label!r} {error}, where a number from {-LARGEST:g} to "
                f"{LARGEST:g} is needed"
            )
    for name in columns.texts:
        found = bad_texts(column(rows, name), name) | found
    return found


def _read(rows: Dataset, tokenizer: "PreTrainedTokenizerBase", fields: Fields) -> Rows:
    check_rows(rows)
    columns = classification.columns_of(fields)
    refuse(_bad(rows, tokenizer, fields))
    numbers = [_number(value) for value in cells(rows, columns.names[0])]
    examples = texts(rows, tokenizer, columns.texts[0], fields.text_b, fields.max_length)
    labels = torch.tensor(numbers, dtype=torch.float32)
    return Rows(examples._replace(labels=labels), np.arange(len(rows)), ())


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.squeeze(-1) - labels).square()


def _judge(logits: Tensor, labels: Tensor, classes: tuple[str, ...]) -> Tally:
    x, y = logits.squeeze(-1).double().cpu().numpy(), labels.double().cpu().numpy()
    with np.errstate(all="ignore"):  # of a model that has diverged
        sums = {"x": x.sum(), "y": y.sum(), "xx": x @ x, "yy": y @ y, "xy": x @ y}
        loss = float(((x - y) ** 2).sum())
    told = {name: float(value) for name, value in sums.items()}
    return Tally(loss, len(x), told, {"told": x, "label": y})


def _fits(tally: Tally, classes: tuple[str, ...]) -> bool:
    s, n = tally.sums, tally.counted
    if set(s) != set(_SUMS):
        return False
    if not n:
        return not any(s.values())
    if not s["xx"] >= 0 or not 0 <= s["yy"] <= n * LARGEST**2 * (1 + _NEAR):
        return False
    of_x, of_y, both = _spreads(tally)
    # What rounding may have left of the difference of two sums that are nearly equal.
    near_x, near_y = _NEAR * s["xx"], _NEAR * s["yy"]
    if of_x < -near_x or of_y < -near_y or both**2 > (of_x + near_x) * (of_y + near_y):
        return False
    apart = tally.loss - (s["xx"] - 2 * s["xy"] + s["yy"])
    return math.isnan(tally.loss) or abs(apart) <= near_x + near_y


def _metrics(tally: Tally, classes: tuple[str, ...]) -> dict[str, float]:
    """Pearson's and Spearman's correlations, and the mean squared error.

    Sums alone, which are all that sites send, give no ranks: then there is no Spearman, and
    Pearson's is that of the sums. A correlation with a constant is 0.
    """
    error = tally.loss / tally.counted
    if not tally.kept:
        return {"pearson": _of_sums(tally), "mse": error}
    from scipy import stats

    x, y = tally.kept["told"], tally.kept["label"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a constant
        pearson, spearman = stats.pearsonr(x, y)[0] if len(x) > 1 else 0.0, stats.spearmanr(x, y)[0]
    return {"pearson": _or_none(pearson), "spearman": _or_none(spearman), "mse": error}


def _spreads(tally: Tally) -> tuple[float, float, float]:
    """Sums of (x - mean)^2, of (y - mean)^2 and of their product, as rounding leaves them."""
    n, s = tally.counted, tally.sums
    mean_x, mean_y = s["x"] / n, s["y"] / n
    return s["xx"] - s["x"] * mean_x, s["yy"] - s["y"] * mean_y, s["xy"] - s["x"] * mean_y


def _of_sums(tally: Tally) -> float:
    of_x, of_y, both = _spreads(tally)
    if of_x <= _ROUNDING * tally.sums["xx"] or of_y <= _ROUNDING * tally.sums["yy"]:
        return 0.0
    return max(-1.0, min(1.0, both / (math.sqrt(of_x) * math.sqrt(of_y))))


def _or_none(value: Any) -> float:
    return float(value) if math.isfinite(value) else 0.0


def _config(classes: Sequence[str]) -> dict[str, Any]:
    return {"problem_type": "regression", "num_labels": 1}


def _told(logits: Tensor, labels: Tensor, classes: tuple[str, ...]) -> list[tuple[str, str]]:
    both = zip(labels.tolist(), logits[:, 0].tolist(), strict=True)
    return [(f"{so:.4g}", f"{said:.4g}") for so, said in both]


TASK = Task(
    title="regression over texts",
    auto="AutoModelForSequenceClassification",
    peft="SEQ_CLS",
    head=True,
    named=False,
    uses=("text", "text_b", "label"),
    columns=_columns,
    classes=no_classes,
    bad=_bad,
    read=_read,
    config=_config,
    labels=lambda ids, mask, _: ids[:, 0] / 8.0,
    losses=_losses,
    judge=_judge,
    fits=_fits,
    leads=lambda _, by_row: ("pearson", "spearman") if by_row else ("pearson",),
    metrics=_metrics,
    told=_told,
)
