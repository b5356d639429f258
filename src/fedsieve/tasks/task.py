"""What a task is: a record of functions, from rows to examples and from outputs to scores.

A file of this package is a task if it has a `TASK`. Loading, training, evaluation, the wire and the
report ask the record, and know no task by name.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor

from fedsieve.data.files import Columns
from fedsieve.errors import FedSieveError
from fedsieve.tasks.asked import Asked, Speaker
from fedsieve.tasks.examples import Examples
from fedsieve.tasks.tally import OfClass, Tally

Reader = Any  # a tokenizer of transformers, or an image processor


class Fields(NamedTuple):
    """Which columns hold what, and how long a row may be. A task uses some of them.

    text, text_b: what is read; image: what is looked at
    label: what is to be told, one column or several
    prompt, completion: of a causal LM
    options: of multiple choice: a column of lists, or one column an option
    option_word: what the options are listed and answered as: "answer" makes answer1, answer2, ...
    answer: what is written for an option, with `{option}` in it; first_option: the first's number
    new_tokens, stop: how many tokens a written answer may have, and the texts that end one
    classes: the names in the order of the model's outputs; None is those of the rows
    """

    text: str | None = None
    text_b: str | None = None
    label: str | tuple[str, ...] | None = None
    prompt: str | None = None
    completion: str | None = None
    classes: tuple[str, ...] | None = None
    max_length: int = 128
    options: str | tuple[str, ...] | None = None
    option_word: str | None = None
    answer: str | None = None
    first_option: int = 0
    new_tokens: int = 32
    stop: tuple[str, ...] = ()
    image: str | None = None


class Rows(NamedTuple):
    """What a task makes of a data set.

    came: (n,) int64 ascending, the row of each example
    """

    examples: Examples
    came: NDArray[np.int64]
    classes: tuple[str, ...]


Bad = dict[int, FedSieveError]  # row -> what is wrong with it


@dataclass(frozen=True)
class Task:
    """A task.

    title:  in words
    reads:  what its model reads, and so whether a tokenizer or an image processor reads its rows
    auto:   transformers' class that loads its models; peft: PEFT's name of such tasks
    head:   whether all outside the model's body is a head, trained whole
    named:  whether the outputs are classes with names
    uses:   those of `Fields` that it reads, `max_length` beside them
    columns: the columns that it uses. Raises FedSieveError where one that it needs is not given
    classes: those of all these data sets together, in the order of the model's outputs
    bad:    the rows that are no examples because of what they hold. Where classes are given, a
            label outside them is bad
    read:   the examples. Raises FedSieveError, naming row and column
    config: changes to a model's configuration, for so many classes
    labels: made-up labels for token numbers and their mask, to try a model with
    counts: labels of a batch -> over how many of them its mean loss is
    losses: outputs in float32 and labels of a batch, (b, ...) each -> the loss of each label, one
            after another, (n,); 0 where there is none. Their sum over `counts` is what is learned
    picked: of a task that learns a few of many tokens: labels (b, L) -> which of the b L outputs,
            row after row, have one to tell, (n,) ascending, and these labels, (n,); `losses` and
            `judge` then take these outputs (n, ...) and labels alone. None takes them all
    judge:  outputs, labels and classes of a batch -> what is counted
    fits:   whether sums can be those of this task: a site may send anything
    leads:  the metrics that may lead, being better when higher, the usual one first: of these
            classes (none are those of no rows yet), with each row's outputs or from sums alone
    metrics: of what was counted, which is not nothing; the first leads
    by_class: how each class was told, where the outputs are classes
    told:   logits, labels and classes -> each row in words: what is so, and what the model told
    ask:    of a task that asks (asked.py), in the place of `judge` at evaluation
    """

    title: str
    auto: str
    peft: str | None
    head: bool
    named: bool
    uses: tuple[str, ...]
    columns: Callable[[Fields], Columns]
    classes: Callable[[Sequence[Dataset], Fields], tuple[str, ...]]
    bad: Callable[[Dataset, Reader, Fields], Bad]
    read: Callable[[Dataset, Reader, Fields], Rows]
    config: Callable[[Sequence[str]], dict[str, Any]]
    labels: Callable[[Tensor, Tensor, int], Tensor]
    losses: Callable[[Tensor, Tensor], Tensor]
    judge: Callable[[Tensor, Tensor, tuple[str, ...]], Tally]
    fits: Callable[[Tally, tuple[str, ...]], bool]
    leads: Callable[[Sequence[str], bool], tuple[str, ...]]
    metrics: Callable[[Tally, tuple[str, ...]], dict[str, float]]
    reads: Literal["texts", "images"] = "texts"
    counts: Callable[[Tensor], int] = len
    picked: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    by_class: Callable[[Tally, tuple[str, ...]], tuple[OfClass, ...]] | None = None
    told: Callable[[Tensor, Tensor, tuple[str, ...]], list[tuple[str, str]]] | None = None
    ask: Callable[[Sequence[Asked], Speaker], Tally] | None = None


def needed(**given: Any) -> None:
    """Raises FedSieveError, naming the first of the fields that is not given."""
    for name, value in given.items():
        if value is None:
            raise FedSieveError(f"{name}: this task needs it: say which column that is")


def unread(task: Task, fields: Fields) -> tuple[str, ...]:
    """Those of the fields that were given and that the task does not look at."""
    usual = Fields()._asdict()
    given = [name for name, value in fields._asdict().items() if value != usual[name]]
    return tuple(name for name in given if name not in (*task.uses, "max_length"))


def one_label(fields: Fields) -> str:
    """The column of labels. Raises FedSieveError where none is given, or several are."""
    needed(label=fields.label)
    if not isinstance(fields.label, str):
        raise FedSieveError("label: this task takes one column")
    return fields.label


def refuse(bad: Bad) -> None:
    """Raises the error of the first row that is no example, if any is none."""
    for row in sorted(bad):
        raise bad[row]


def no_classes(*_: Any) -> tuple[str, ...]:
    """The classes of a task that has none."""
    return ()
