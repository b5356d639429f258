"""From rows of text to tensors that a model can train on.

All texts are tokenised once, in one call to the fast tokenizer, and kept as rectangles of token
numbers padded on the right. A batch is then a few tensor slices (`take`), some twenty microseconds:
nothing in the training loop touches text. Padding is always on the right, whatever the tokenizer
would do, because only then can a batch be trimmed to its longest row by dropping columns.
"""

import warnings
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from datasets import ClassLabel, Dataset
from numpy.typing import NDArray
from torch import Tensor

from fedsieve.data.sources import column
from fedsieve.errors import FedSieveError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that torch's cross entropy, and so every transformers loss, leaves out

# A tokenizer reads a text to its end before it truncates, and a mail may be a thousand times longer
# than what is kept. Tokens of prose hold 4 to 5 characters; 10 leave a margin (shortening makes 20
# Newsgroups at 64 tokens three times as fast), and where even that is too little (see _tokenise)
# the whole text is read after all.
CHARACTERS_PER_TOKEN = 10


class Examples(NamedTuple):
    """n examples, padded on the right to the longest of them.

    input_ids: (n, L) int64.
    attention_mask: (n, L) int64, one on tokens, zero on padding.
    labels: (n,) int64 class numbers, or (n, L) int64 next-token targets with -100 where there is
        no loss (padding, prompts).
    token_type_ids: (n, L) int64 for sentence pairs, zero on the first text and on padding;
        else None.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    token_type_ids: Tensor | None = None


def count(examples: Examples) -> int:
    """How many examples there are (`len` of a NamedTuple counts its fields)."""
    return examples.input_ids.shape[0]


def take(examples: Examples, index: Tensor) -> Examples:
    """The examples with these row numbers, without the padding that none of them needs.

    index: (b,) int64, in any order, on the examples' device.
    """
    mask = examples.attention_mask.index_select(0, index)
    width = int(mask.sum(1).max()) if index.numel() else 0
    # Columns first (a view), rows second: index_select then returns contiguous tensors.
    labels = examples.labels if examples.labels.ndim == 1 else examples.labels[:, :width]
    types = examples.token_type_ids
    return Examples(
        examples.input_ids[:, :width].index_select(0, index),
        mask[:, :width].contiguous(),
        labels.index_select(0, index),
        None if types is None else types[:, :width].index_select(0, index),
    )


def classification(
    dataset: Dataset,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    text: str,
    label: str,
    text_b: str | None = None,
    max_length: int,
    classes: Sequence[str] | None = None,
) -> tuple[Examples, tuple[str, ...]]:
    """Texts, or pairs of texts, and the class of each; returned with the names of the classes.

    text, text_b, label: column names. Labels may be strings, integers, booleans or a ClassLabel.
    classes: the names in the order of the model's outputs (pass on what the training data gave);
        by default a ClassLabel's own names, else the labels that occur, sorted as what they are
        (2 before 10).

    Raises FedSieveError: no rows, a missing column, an empty label, a text that is not a string,
    a label outside of the classes (naming label and row), fewer than two classes.
    """
    _check_rows(dataset)
    found, order = _labels(dataset, label)
    names = tuple(order if classes is None else classes)
    if len(names) < 2 or len(set(names)) < len(names):
        raise FedSieveError(
            f"column {label!r}: at least two different classes are needed, not {list(names)}"
        )
    numbers = {name: number for number, name in enumerate(names)}
    for row, name in enumerate(found):
        if name not in numbers:
            raise FedSieveError(
                f"label {name!r} in row {row} of column {label!r} is none of the "
                f"{len(names)} classes: {_listing(names)}"
            )
    rows = _tokenise(
        tokenizer,
        _texts(dataset, text),
        None if text_b is None else _texts(dataset, text_b),
        max_length,
    )
    labels = torch.tensor([numbers[name] for name in found], dtype=torch.int64)
    pad = _pad_id(tokenizer)
    # A text without any token (an empty one, where no special token is added) would leave nothing
    # to attend to, and a softmax over nothing is NaN: it gets one padding token, attended.
    ids, mask = _rectangle([row or [pad] for row in rows.ids], pad)
    types = None if rows.types is None else _rectangle([row or [0] for row in rows.types], 0)[0]
    return Examples(ids, mask, labels, types), names


def causal_lm(
    dataset: Dataset,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    text: str | None = None,
    prompt: str | None = None,
    completion: str | None = None,
    max_length: int,
) -> tuple[Examples, NDArray[np.int64]]:
    """Texts to continue, with the loss on every token of `text`, or on those of `completion` only.

    Give the column `text`, or the columns `prompt` and `completion`, which are joined as they are
    (put the space or newline between them into the data). A token that holds characters of both
    counts as completion. The end-of-sequence token is appended, and learned, when it still fits in
    max_length.

    Returns the examples and the row of `dataset` that each came from, (n,) int64 ascending: rows
    with nothing to learn (an empty text, a prompt that fills max_length) are dropped, with a
    warning that counts them.

    Raises FedSieveError: no rows, a missing column, a text that is not a string, nothing to learn
    in any row.
    """
    _check_rows(dataset)
    if text is not None and prompt is None and completion is None:
        texts, starts = _texts(dataset, text), [0] * dataset.num_rows
    elif text is None and prompt is not None and completion is not None:
        prompts = _texts(dataset, prompt)
        texts = [a + b for a, b in zip(prompts, _texts(dataset, completion), strict=True)]
        starts = [len(one) for one in prompts]
    else:
        raise FedSieveError("a causal language model needs either text, or prompt and completion")
    rows = _tokenise(tokenizer, texts, None, max_length, offsets=True)
    eos = tokenizer.eos_token_id
    ids, labels, kept = [], [], []
    for number, (tokens, ends, start) in enumerate(zip(rows.ids, rows.ends, starts, strict=True)):
        # Special tokens have the empty span (0, 0): part of the prompt when there is one.
        targets = [
            token if start == 0 or end > start else IGNORED
            for token, end in zip(tokens, ends, strict=True)
        ]
        if eos is not None and len(tokens) < max_length and tokens[-1:] != [eos]:
            tokens, targets = [*tokens, eos], [*targets, eos]
        # The model predicts from the second token on: the first target is never used.
        if any(target != IGNORED for target in targets[1:]):
            ids.append(tokens)
            labels.append(targets)
            kept.append(number)
    if not kept:
        raise FedSieveError(
            f"none of the {dataset.num_rows} rows has a token to learn within the first "
            f"{max_length}: raise max_length, or check the columns"
        )
    if len(kept) < dataset.num_rows:
        warnings.warn(
            f"{dataset.num_rows - len(kept)} of {dataset.num_rows} rows dropped: no token to learn "
            f"within the first {max_length}",
            stacklevel=2,
        )
    input_ids, mask = _rectangle(ids, _pad_id(tokenizer))
    return Examples(input_ids, mask, _rectangle(labels, IGNORED)[0]), np.array(kept, dtype=np.int64)


def ensure_pad_token(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """Give the tokenizer a padding token if it has none: its end-of-sequence, or unknown, token.

    Changes the tokenizer. Returns a sentence that says so, for the caller to show, or None when
    there was nothing to do. The model's `config.pad_token_id` is the caller's to set. Raises
    FedSieveError when the tokenizer has neither token.
    """
    if tokenizer.pad_token is not None:
        return None
    for kind, token in (
        ("end-of-sequence", tokenizer.eos_token),
        ("unknown", tokenizer.unk_token),
    ):
        if token is not None:
            tokenizer.pad_token = token
            return f"The tokenizer has no padding token: its {kind} token {token!r} is used."
    raise FedSieveError(
        "the tokenizer has no padding token, and no end-of-sequence or unknown token to take "
        "its place: set tokenizer.pad_token"
    )


class _Tokens(NamedTuple):
    ids: list[list[int]]
    types: list[list[int]] | None  # which text of the pair
    ends: list[list[int]]  # where each token ends in its text, in characters; [] unless asked for


def _tokenise(
    tokenizer: "PreTrainedTokenizerBase",
    texts: list[str],
    second: list[str] | None,
    max_length: int,
    offsets: bool = False,
) -> _Tokens:
    """Token numbers of each text (or pair), at most max_length of them, without padding."""
    if max_length <= tokenizer.num_special_tokens_to_add(pair=second is not None):
        raise FedSieveError(f"max_length is {max_length}: no room for a token of the text")
    limit = CHARACTERS_PER_TOKEN * max_length
    # Truncation on the left keeps the end of a text; shortening it would keep the wrong part.
    if tokenizer.truncation_side == "left":
        limit = max([limit, *map(len, texts), *map(len, second or ())])

    def call(first: list[str], other: list[str] | None) -> _Tokens:
        made = tokenizer(
            first,
            other,
            truncation=True,
            max_length=max_length,
            return_attention_mask=False,
            return_token_type_ids=other is not None,
            return_offsets_mapping=offsets,
        )
        spans = made["offset_mapping"] if offsets else []
        return _Tokens(
            made["input_ids"],
            made["token_type_ids"] if other is not None else None,
            [[end for _, end in row] for row in spans],
        )

    short = [text[:limit] for text in texts]
    short_second = None if second is None else [text[:limit] for text in second]
    rows = call(short, short_second)
    # A shortened text that leaves room had long tokens (spaces, one endless word): read it whole.
    for number, ids in enumerate(rows.ids):
        pair = texts[number], "" if second is None else second[number]
        if len(ids) < max_length and max(map(len, pair)) > limit:
            whole = call([pair[0]], None if second is None else [pair[1]])
            rows.ids[number] = whole.ids[0]
            if rows.types is not None and whole.types is not None:
                rows.types[number] = whole.types[0]
            if offsets:
                rows.ends[number] = whole.ends[0]
    return rows


def _rectangle(rows: Sequence[Sequence[int]], fill: int) -> tuple[Tensor, Tensor]:
    """Rows of unequal length as (n, longest) int64, filled on the right; and where they were."""
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    inside = np.arange(lengths.max()) < lengths[:, None]
    values = np.full(inside.shape, fill, dtype=np.int64)
    values[inside] = np.fromiter(chain.from_iterable(rows), dtype=np.int64, count=lengths.sum())
    return torch.from_numpy(values), torch.from_numpy(inside.astype(np.int64))


def _labels(dataset: Dataset, name: str) -> tuple[list[str], list[str]]:
    """Every row's label as a string, and the classes in their own order."""
    values = column(dataset, name)
    if None in values:
        raise FedSieveError(f"row {values.index(None)} of column {name!r} has no label")
    feature = dataset.features[name]
    if isinstance(feature, ClassLabel):
        known = dict(enumerate(feature.names))  # hub test sets hold -1 for "not given"
        return [known.get(value, str(value)) for value in values], list(feature.names)
    if not isinstance(values[0], str | int):
        raise FedSieveError(
            f"column {name!r} holds {type(values[0]).__name__} values: "
            "a class is a string or an integer"
        )
    return [str(value) for value in values], [str(value) for value in sorted(set(values))]


def _texts(dataset: Dataset, name: str) -> list[str]:
    values: list[Any] = column(dataset, name)
    for row, value in enumerate(values):
        if not isinstance(value, str):
            what = "nothing" if value is None else f"a value of type {type(value).__name__}"
            raise FedSieveError(f"row {row} of column {name!r} holds {what} instead of a text")
    return values


def _check_rows(dataset: Dataset) -> None:
    if dataset.num_rows == 0:
        raise FedSieveError("the data set has no rows")


def _pad_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    if tokenizer.pad_token_id is None:
        raise FedSieveError("the tokenizer has no padding token: call ensure_pad_token first")
    return int(tokenizer.pad_token_id)


def _listing(names: Sequence[str]) -> str:
    shown = ", ".join(names[:20])
    return shown if len(names) <= 20 else f"{shown}, ..."
