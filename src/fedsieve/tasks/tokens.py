"""From rows of text to tensors that a model can train on.

All texts are tokenised once, many in one call to the tokenizer, and kept as rectangles of token
numbers padded on the right. A batch is then a few tensor slices, some twenty microseconds: nothing
in the training loop touches text. Padding is always on the right, whatever the tokenizer
would do, because only then can a batch be trimmed to its longest row by dropping columns.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from fedsieve.data.names import kind_of
from fedsieve.data.sources import column
from fedsieve.data.templates import LETTERS
from fedsieve.errors import FedSieveError, raise_of_memory, words
from fedsieve.tasks.asked import Asked

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that torch's cross entropy, and so every transformers loss, leaves out

IN_FILES = " (files of JSON, JSONL and Parquet have lists)"
_AT_ONCE = 1000  # texts that the tokenizer is given in one call: it holds all their tokens, uncut
_AT_ONCE_LETTERS = 4_000_000  # and so many letters of them, or one text


class Texts(NamedTuple):
    """n examples, padded on the right to the longest of them.

    input_ids: (n, L) int64.
    attention_mask: (n, L) int64, one on tokens, zero on padding.
    labels: a row's: (n,) int64 class numbers, (n,) float32 values, or (n, C) float32, one where a
        class holds; or each token's: (n, L) int64 classes or next tokens, with -100 where there is
        no loss (padding, prompts).
    token_type_ids: (n, L) int64 where the tokenizer tells parts apart (sentence pairs; XLNet's
        summary token), zero on padding; else None.
    asked: (n) what is asked at evaluation, of a task that asks (asked.py); else None.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    token_type_ids: Tensor | None = None
    asked: tuple[Asked, ...] | None = None


def by_token(labels: Tensor) -> bool:
    """Whether each token has a label, and not the row as a whole."""
    return labels.ndim == 2 and not labels.is_floating_point()


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


class Tokens(NamedTuple):
    ids: list[list[int]]
    types: list[list[int]] | None  # which part of the row; None where all are zero
    ends: list[list[int]]  # where each token ends in its text, in characters; [] unless asked for


def tokenise(
    tokenizer: "PreTrainedTokenizerBase",
    texts: list[str],
    second: list[str] | None,
    max_length: int,
    offsets: bool = False,
    special: bool = True,
) -> Tokens:
    """Token numbers of each text (or pair), at most max_length of them, without padding.

    The tokenizer reads every text to its end, however little of it is kept: a text shortened before
    has other tokens (half a word, another share of a pair).

    special: with the tokens that the tokenizer puts around a text
    """
    refuse_no_room(tokenizer, max_length, pair=second is not None, special=special)
    typed = second is not None or "token_type_ids" in tokenizer.model_input_names
    rows = Tokens([], [] if typed else None, [])
    for some in parts(texts, second, _AT_ONCE_LETTERS):
        made = read_by(
            tokenizer,
            texts[some],
            None if second is None else second[some],
            truncation=True,
            max_length=max_length,
            add_special_tokens=special,
            return_attention_mask=False,
            return_token_type_ids=typed,
            return_offsets_mapping=offsets,
        )
        rows.ids.extend(made["input_ids"])
        if rows.types is not None:
            rows.types.extend(made["token_type_ids"])
        if offsets:
            rows.ends.extend([end for _, end in row] for row in made["offset_mapping"])
    around = _around(tokenizer, second is not None) if special else 0
    if max(map(len, rows.ids), default=1) <= around:
        if not any(text.strip() for text in texts):
            raise FedSieveError(
                f"all of the {len(texts):,} texts are empty: there is nothing to read in them"
            )
        raise FedSieveError(
            "the model's tokenizer makes no token of any of these texts: its files are not those "
            "of a tokenizer for them"
        )
    if rows.types is not None and not any(map(any, rows.types)):
        return rows._replace(types=None)
    return rows


def parts(texts: Sequence[str], second: Sequence[str] | None, most: int) -> Iterator[slice]:
    """All of them in order, as many at a time as the tokenizer is given: so many letters at most,
    those of `second` included, or one row.
    """
    first, letters = 0, 0
    for at, text in enumerate(texts):
        own = len(text) + (0 if second is None else len(second[at]))
        if at > first and (at - first == _AT_ONCE or letters + own > most):
            yield slice(first, at)
            first, letters = at, 0
        letters += own
    if texts:
        yield slice(first, len(texts))


def refuse_no_room(
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    *,
    pair: bool = False,
    special: bool = True,
) -> None:
    """Raises FedSieveError where what the tokenizer puts around a text leaves nothing for it."""
    around = _around(tokenizer, pair) if special else 0
    if max_length <= around:
        raise FedSieveError(f"max_length is {max_length}: no room for a token of the text")


def _around(tokenizer: "PreTrainedTokenizerBase", pair: bool) -> int:
    """How many tokens stand around a text, or two."""
    return int(_asked(partial(tokenizer.num_special_tokens_to_add, pair=pair)))


def read_by(tokenizer: "PreTrainedTokenizerBase", *texts: Any, **how: Any) -> Any:
    """What the tokenizer makes of texts. Raises FedSieveError where that fails."""
    return _asked(partial(tokenizer, *texts, **how))


def _asked(question: Callable[[], Any]) -> Any:
    """What a tokenizer answers. Raises FedSieveError where that fails."""
    try:
        return question()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # whatever it may raise over what its own files say, or a panic
        raise_of_memory(error)
        why = words(error, 200)
        raise FedSieveError(
            f"the model's tokenizer cannot read texts: its files do not fit together ({why})"
        ) from error


def texts(
    dataset: Dataset,
    tokenizer: "PreTrainedTokenizerBase",
    text: str,
    text_b: str | None,
    max_length: int,
) -> Texts:
    """Texts, or pairs of texts, with labels of zero that a task puts its own in place of."""
    rows = tokenise(
        tokenizer,
        text_column(dataset, text),
        None if text_b is None else text_column(dataset, text_b),
        max_length,
    )
    pad = pad_id(tokenizer)
    # A text without any token (an empty one, where no special token is added) would leave nothing
    # to attend to, and a softmax over nothing is NaN: it gets one padding token, attended. A
    # padding token that was added to the vocabulary may have no embedding: then it is the end's.
    added, end = pad >= tokenizer.vocab_size, tokenizer.eos_token_id
    alone = end if added and end is not None else pad
    ids, mask = rectangle([row or [alone] for row in rows.ids], pad)
    types = None if rows.types is None else rectangle([row or [0] for row in rows.types], 0)[0]
    return Texts(ids, mask, torch.zeros(len(ids), dtype=torch.int64), types)


def rectangle(rows: Sequence[Sequence[int]], fill: int) -> tuple[Tensor, Tensor]:
    """Rows of unequal length as (n, longest) int64, filled on the right; and where they were."""
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    inside = np.arange(lengths.max()) < lengths[:, None]
    values = np.full(inside.shape, fill, dtype=np.int64)
    values[inside] = np.fromiter(chain.from_iterable(rows), dtype=np.int64, count=lengths.sum())
    return torch.from_numpy(values), torch.from_numpy(inside.astype(np.int64))


def text_column(dataset: Dataset, name: str) -> list[str]:
    values: list[Any] = column(dataset, name)
    for wrong in bad_texts(values, name).values():
        raise wrong
    return values


def bad_texts(values: Sequence[Any], name: str) -> dict[int, FedSieveError]:
    """The rows of a column that hold no text, and what is wrong with each."""
    bad: dict[int, FedSieveError] = {}
    for row, value in enumerate(values):
        if not isinstance(value, str):
            what = "nothing" if value is None else kind_of(value)
            bad[row] = FedSieveError(f"row {row} of column {name!r} holds {what} instead of a text")
        elif len(value) > LETTERS:
            bad[row] = FedSieveError(f"row {row} of column {name!r} {too_long(len(value))}")
    return bad


def too_long(letters: int) -> str:
    """The end of a sentence that begins with a row's place."""
    return f"holds {letters:,} letters: at most {LETTERS:,} are read; cut it, or make rows of it"


def check_rows(dataset: Dataset) -> None:
    if dataset.num_rows == 0:
        raise FedSieveError("the data set has no rows")


def pad_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    if tokenizer.pad_token_id is None:
        raise FedSieveError("the tokenizer has no padding token: call ensure_pad_token first")
    return int(tokenizer.pad_token_id)
