"""Causal language modelling: texts to continue, or prompts and their completions."""

import warnings
from typing import TYPE_CHECKING

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from fedsieve.errors import FedSieveError
from fedsieve.tasks.tokens import (
    IGNORED,
    Examples,
    check_rows,
    pad_id,
    rectangle,
    text_column,
    tokenise,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
    check_rows(dataset)
    if text is not None and prompt is None and completion is None:
        texts, starts = text_column(dataset, text), [0] * dataset.num_rows
    elif text is None and prompt is not None and completion is not None:
        prompts = text_column(dataset, prompt)
        texts = [a + b for a, b in zip(prompts, text_column(dataset, completion), strict=True)]
        starts = [len(one) for one in prompts]
    else:
        raise FedSieveError("a causal language model needs either text, or prompt and completion")
    rows = tokenise(tokenizer, texts, None, max_length, offsets=True)
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
    input_ids, mask = rectangle(ids, pad_id(tokenizer))
    return Examples(input_ids, mask, rectangle(labels, IGNORED)[0]), np.array(kept, dtype=np.int64)
