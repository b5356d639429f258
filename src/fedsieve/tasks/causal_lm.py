"""Causal language modelling: texts to continue, or prompts and their completions."""

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor

from fedsieve.data.files import Columns
from fedsieve.data.sources import column
from fedsieve.errors import FedSieveError
from fedsieve.tasks import chat
from fedsieve.tasks.tally import Tally
from fedsieve.tasks.task import Bad, Fields, Rows, Task, no_classes
from fedsieve.tasks.tokens import (
    IGNORED,
    Texts,
    bad_texts,
    check_rows,
    pad_id,
    parts,
    read_by,
    rectangle,
    text_column,
    tokenise,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ENDLESS = 1 << 30  # tokens: no text is as long
_AT_ONCE = 1 << 20  # letters: of each, a tokenizer takes a hundred bytes before anything is cut


def causal_lm(
    dataset: Dataset,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    text: str | None = None,
    prompt: str | None = None,
    completion: str | None = None,
    max_length: int,
) -> tuple[Texts, NDArray[np.int64]]:
    """Texts to continue, with the loss on every token of `text`, or on those of `completion` only.

    Give the column `text`, or the columns `prompt` and `completion`, which are joined as they are
    (put the space or newline between them into the data). A token that holds characters of both
    counts as completion; with a tokenizer that cannot tell where its tokens lie in the text (a
    slow one), completion is all from the first token that the prompt alone would not have.

    A row is what the tokenizer puts in front of a text, the text, what the tokenizer puts behind
    it, and the end-of-sequence token, each unless the text has it already, cut at max_length. The
    end is learned in every row that has room for it, whoever put it there; a text that is cut short
    on the right has none.

    Returns the examples and the row of `dataset` that each came from, (n,) int64 ascending: rows
    with nothing to learn (an empty text, a prompt that fills max_length) are dropped, with a
    warning that counts them.

    Raises FedSieveError: no rows, a missing column, a text that is not a string, nothing to learn
    in any row.
    """
    check_rows(dataset)
    if text is not None and prompt is None and completion is None:
        texts, prompts = text_column(dataset, text), None
    elif text is None and prompt is not None and completion is not None:
        prompts = text_column(dataset, prompt)
        texts = [a + b for a, b in zip(prompts, text_column(dataset, completion), strict=True)]
    else:
        raise FedSieveError("a causal language model needs either text, or prompt and completion")
    rows = _rows(tokenizer, texts, prompts, max_length)
    left = tokenizer.truncation_side == "left"
    framed = _framed(tokenizer, rows, whole=prompts is None)
    made = [_cut(*each, max_length, left=left) for each in framed]
    return learned(made, pad_id(tokenizer), max_length)


def pairs(
    tokenizer: "PreTrainedTokenizerBase",
    prompts: list[str],
    completions: list[str],
    max_length: int,
    *,
    ended: bool,
    left: bool = True,
) -> list[tuple[list[int], list[int]]]:
    """Tokens and targets of each prompt with its completion.

    ended: whether the end of sequence follows, to be learned
    left: whether what does not fit is cut at the beginning of the prompt, so that there always is
        something to learn, or else at the end
    """
    found: list[tuple[list[int], list[int]]] = []
    for some in parts(prompts, completions, _AT_ONCE):
        own = prompts[some]
        texts = [a + b for a, b in zip(own, completions[some], strict=True)]
        framed = _framed(tokenizer, _rows(tokenizer, texts, own, None), whole=False, ended=ended)
        found += [_cut(*each, max_length, left=left) for each in framed]
    return found


def prompts(
    tokenizer: "PreTrainedTokenizerBase", texts: list[str], max_length: int
) -> list[list[int]]:
    """The tokens of prompts to go on from; what does not fit is cut at their beginning."""
    rows = _rows(tokenizer, texts, None, None)
    framed = _framed(tokenizer, rows, whole=False, ended=False)
    return [_cut(*each, max_length, left=True)[0] for each in framed]


def begin(targets: list[int]) -> int:
    """Where the first token to learn stands; behind the last where there is none."""
    return next((at for at, target in enumerate(targets) if target != IGNORED), len(targets))


def _framed(
    tokenizer: "PreTrainedTokenizerBase",
    rows: list[tuple[list[int], int]],
    *,
    whole: bool,
    ended: bool = True,
) -> Iterator[tuple[list[int], list[int], int]]:
    """Each text's tokens and targets with what the tokenizer puts around, and how many of them are
    in front.

    whole: whether that is learned as well
    """
    before, after = frame(tokenizer)
    end = tokenizer.eos_token_id
    if end is None:
        end = after[-1] if after else None  # BERT's tokenizers call it the separator only
    elif end not in after:
        after = [*after, end]
    for tokens, first in rows:
        # A text that was made by a template brings its own begin and end.
        opening = [] if tokens[: len(before)] == before else before
        closing = [] if tokens[-1:] == [end] or not ended else after
        targets = [
            *(opening if whole else [IGNORED] * len(opening)),
            *[IGNORED] * first,
            *tokens[first:],
            *(token if whole or token == end else IGNORED for token in closing),
        ]
        yield [*opening, *tokens, *closing], targets, len(opening)


def _cut(
    tokens: list[int], targets: list[int], opening: int, most: int, *, left: bool
) -> tuple[list[int], list[int]]:
    if left:
        # The beginning of the text goes, not what is in front of every text.
        gone = slice(opening, opening + max(0, len(tokens) - most))
        del tokens[gone]
        del targets[gone]
    return tokens[:most], targets[:most]


def conversations(
    dataset: Dataset,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    text: str | None = None,
    prompt: str | None = None,
    completion: str | None = None,
    max_length: int,
) -> tuple[Texts, NDArray[np.int64]]:
    """`causal_lm` of columns that hold messages: the assistant's turns are learned, those of
    `completion` alone where it is given. What is cut is the end, or the beginning, as the tokenizer
    has it.
    """
    check_rows(dataset)
    chat.check(tokenizer)
    left = tokenizer.truncation_side == "left"
    kept = slice(-max_length, None) if left else slice(max_length)
    rows = []
    for made in _chats(dataset, tokenizer, text, prompt, completion):
        if isinstance(made, FedSieveError):
            raise made
        tokens, targets = made
        rows.append((tokens[kept], targets[kept]))
    return learned(rows, pad_id(tokenizer), max_length)


def _chats(
    dataset: Dataset,
    tokenizer: "PreTrainedTokenizerBase",
    text: str | None,
    prompt: str | None,
    completion: str | None,
) -> Iterator[tuple[list[int], list[int]] | FedSieveError]:
    """Each row's tokens and targets, or what is wrong with it."""
    names = [name for name in (text, prompt, completion) if name is not None]
    for row, values in enumerate(zip(*(column(dataset, n) for n in names), strict=True)):
        name = names[-1]
        try:
            parts = []
            for name, value in zip(names, values, strict=True):  # noqa: B007
                parts.append(chat.messages_of(value))
            first = 0 if len(parts) == 1 else len(parts[0])
            yield chat.encode(tokenizer, [m for part in parts for m in part], first)
        except FedSieveError as error:
            yield FedSieveError(f"row {row} of column {name!r} {error}")


def learned(
    rows: Sequence[tuple[list[int], list[int]]], pad: int, max_length: int
) -> tuple[Texts, NDArray[np.int64]]:
    """The rows that have a token to learn, of tokens and targets each, and which those are."""
    # The model predicts from the second token on: the first target is never used.
    kept = [n for n, (_, labels) in enumerate(rows) if any(t != IGNORED for t in labels[1:])]
    if not kept:
        raise FedSieveError(
            f"none of the {len(rows)} rows has a token to learn within the first "
            f"{max_length}: raise max_length, or check the columns (what is learned of "
            "conversations are the turns whose role is 'assistant')"
        )
    if len(kept) < len(rows):
        warnings.warn(
            f"{len(rows) - len(kept)} of {len(rows)} rows dropped: no token to learn "
            f"within the first {max_length}",
            stacklevel=3,
        )
    input_ids, mask = rectangle([rows[n][0] for n in kept], pad)
    targets, _ = rectangle([rows[n][1] for n in kept], IGNORED)
    return Texts(input_ids, mask, targets), np.array(kept, dtype=np.int64)


def frame(tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    """The tokens that a tokenizer puts in front of a text, and those that it puts behind it."""
    for text in ("a", "the", "0"):
        bare = read_by(tokenizer, text, add_special_tokens=False)["input_ids"]
        full = read_by(tokenizer, text)["input_ids"]
        for at in range(len(full) - len(bare) + 1):
            if bare and full[at : at + len(bare)] == bare:
                return full[:at], full[at + len(bare) :]
    return [], []


def _rows(
    tokenizer: "PreTrainedTokenizerBase",
    texts: list[str],
    prompts: list[str] | None,
    max_length: int | None,
) -> list[tuple[list[int], int]]:
    """Each text's tokens, without those around it, and which of them is the first to learn.

    max_length: how many tokens are needed, from the side that the tokenizer keeps; None is all
    """
    max_length = max_length or ENDLESS
    if prompts is None:
        rows = tokenise(tokenizer, texts, None, max_length, special=False)
        return [(tokens, 0) for tokens in rows.ids]
    if tokenizer.is_fast:
        rows = tokenise(tokenizer, texts, None, max_length, offsets=True, special=False)
        firsts = [
            next((at for at, end in enumerate(ends) if end > len(prompt) or not prompt), len(ends))
            for prompt, ends in zip(prompts, rows.ends, strict=True)
        ]
        return list(zip(rows.ids, firsts, strict=True))
    # Where the prompt ends is counted from the left, so nothing may be cut there yet.
    most = max_length if tokenizer.truncation_side == "right" else ENDLESS
    rows = tokenise(tokenizer, texts, None, most, special=False)
    heads = tokenise(tokenizer, prompts, None, most, special=False)
    return [
        (tokens, _shared(tokens, head)) for tokens, head in zip(rows.ids, heads.ids, strict=True)
    ]


def _shared(one: list[int], other: list[int]) -> int:
    """How many tokens two lists have in common at their beginning."""
    for at, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return at
    return min(len(one), len(other))


def _columns(fields: Fields) -> Columns:
    names = (fields.text, fields.prompt, fields.completion)
    if [name is not None for name in names] not in ([True, False, False], [False, True, True]):
        raise FedSieveError("text: a causal-lm task needs it, or else prompt and completion")
    return Columns(tuple(name for name in names if name is not None))


def _bad(rows: Dataset, tokenizer: "PreTrainedTokenizerBase", fields: Fields) -> Bad:
    names = _columns(fields).texts
    if chat.are(column(rows, names[-1])):
        chat.check(tokenizer)
        made = enumerate(_chats(rows, tokenizer, fields.text, fields.prompt, fields.completion))
        return {row: each for row, each in made if isinstance(each, FedSieveError)}
    found: Bad = {}
    for name in names:
        found = bad_texts(column(rows, name), name) | found
    return found


def examples_of(
    rows: Dataset, tokenizer: "PreTrainedTokenizerBase", fields: Fields
) -> tuple[Texts, NDArray[np.int64]]:
    """`causal_lm` or `conversations`, as the columns hold texts or messages."""
    read = conversations if chat.are(column(rows, _columns(fields).texts[-1])) else causal_lm
    return read(
        rows,
        tokenizer,
        text=fields.text,
        prompt=fields.prompt,
        completion=fields.completion,
        max_length=fields.max_length,
    )


def _read(rows: Dataset, tokenizer: "PreTrainedTokenizerBase", fields: Fields) -> Rows:
    return Rows(*examples_of(rows, tokenizer, fields), ())


def _picked(labels: Tensor) -> tuple[Tensor, Tensor]:
    """A token is told from the one before it, so the first of a row never is."""
    after = labels.roll(-1, 1)
    after[:, -1] = IGNORED
    at = (after.flatten() != IGNORED).nonzero().flatten()
    return at, after.flatten()[at]


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")


def _judge(logits: Tensor, labels: Tensor, classes: tuple[str, ...]) -> Tally:
    loss = _losses(logits, labels).sum().item()
    return Tally(loss, labels.numel(), {"right": float((logits.argmax(-1) == labels).sum())})


def _fits(tally: Tally, classes: tuple[str, ...]) -> bool:
    right = tally.sums.get("right", -1.0)
    return set(tally.sums) == {"right"} and right.is_integer() and 0 <= right <= tally.counted


def _metrics(tally: Tally, classes: tuple[str, ...]) -> dict[str, float]:
    """The share of tokens that the model would have written next, and e to the mean loss."""
    loss = tally.loss / tally.counted
    return {
        "token_accuracy": tally.sums["right"] / tally.counted,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
    }


TASK = Task(
    title="causal language model",
    auto="AutoModelForCausalLM",
    peft="CAUSAL_LM",
    head=False,
    named=False,
    uses=("text", "prompt", "completion"),
    columns=_columns,
    classes=no_classes,
    bad=_bad,
    read=_read,
    config=lambda _: {},
    labels=lambda ids, mask, _: ids.where(mask == 1, IGNORED),
    counts=lambda labels: int((labels[:, 1:] != IGNORED).sum()),
    losses=_losses,
    picked=_picked,
    judge=_judge,
    fits=_fits,
    leads=lambda *_: ("token_accuracy",),
    metrics=_metrics,
)
