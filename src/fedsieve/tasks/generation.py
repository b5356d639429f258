"""Generation: what a model writes after a prompt, held against the text that is expected.

Trained as a causal language model is, on the expected text after the prompt. Exact match and token
F1 are SQuAD's (Rajpurkar et al. 2016, arXiv 1606.05250): without case, punctuation and articles.
ROUGE-L and chrF come from the packages that are usual for them; chrF is that of all texts together.
"""

import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from datasets import Dataset

from fedsieve.data.sources import column
from fedsieve.errors import FedSieveError
from fedsieve.tasks import causal_lm, chat
from fedsieve.tasks.asked import UNSPACED, Asked, Speaker, until, written
from fedsieve.tasks.tally import SHOWN, Answer, Tally
from fedsieve.tasks.task import Bad, Fields, Rows, refuse
from fedsieve.tasks.tokens import check_rows, pad_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHARES = ("exact", "f1", "rouge")
_LETTERS = 1 << 20  # of one text, at most
_CHRF = 18  # numbers that chrF is made of: n-grams of either text and of both, for six lengths
_NO_MARKS = str.maketrans("", "", string.punctuation)


class _Item(NamedTuple):
    """said, expected: the prompt and the answer in words; turn: of a conversation, else None."""

    said: str
    expected: str
    turn: chat.Turn | None = None


def _items(
    rows: Dataset, tokenizer: "PreTrainedTokenizerBase", fields: Fields
) -> Iterator[_Item | FedSieveError]:
    """Each row's prompt and what is expected after it; or what is wrong with the row."""
    names = causal_lm.TASK.columns(fields).texts
    chats = _chats(rows, fields)
    for row, cells in enumerate(zip(*(column(rows, name) for name in names), strict=True)):
        where = f"row {row} of column {names[-1]!r}"
        try:
            turn = chat.last_turn(tokenizer, cells) if chats else None
            item = _Item(*cells) if turn is None else _Item(turn.said, turn.content, turn)
            if not item.expected.strip():
                raise FedSieveError("holds nothing that could be expected")
            if not item.said.strip():
                where = f"row {row} of column {names[0]!r}"
                raise FedSieveError("holds no prompt to go on from")
            yield item
        except FedSieveError as error:
            yield FedSieveError(f"{where} {error}")


def _chats(rows: Dataset, fields: Fields) -> bool:
    return chat.are(column(rows, causal_lm.TASK.columns(fields).texts[-1]))


def _bad(rows: Dataset, tokenizer: "PreTrainedTokenizerBase", fields: Fields) -> Bad:
    return _sorted(rows, tokenizer, fields)[1]


def _sorted(
    rows: Dataset, tokenizer: "PreTrainedTokenizerBase", fields: Fields
) -> tuple[list[_Item], Bad]:
    """What is asked, row by row, and the rows that cannot be."""
    if not _chats(rows, fields) and fields.prompt is None:
        raise FedSieveError(
            "text: a generation task needs conversations in it, or else prompt and completion"
        )
    bad = causal_lm.TASK.bad(rows, tokenizer, fields)
    sound = [row for row in range(len(rows)) if row not in bad]
    items = []
    for row, each in zip(sound, _items(rows.select(sound), tokenizer, fields), strict=True):
        if isinstance(each, FedSieveError):
            bad[row] = each
        else:
            items.append(each)
    return items, bad


def _read(rows: Dataset, tokenizer: "PreTrainedTokenizerBase", fields: Fields) -> Rows:
    check_rows(rows)
    _scorers()
    items, bad = _sorted(rows, tokenizer, fields)
    refuse(bad)
    most = fields.max_length
    if _chats(rows, fields):  # every turn of the assistant is learned, and not the last one alone
        turns = [each.turn for each in items if each.turn is not None]
        made = [(turn.tokens[-most:], turn.targets[-most:]) for turn in turns]
        examples, came = causal_lm.examples_of(rows, tokenizer, fields)
    else:
        said, expected = [each.said for each in items], [each.expected for each in items]
        left = tokenizer.truncation_side == "left"  # as in the task that it is trained as
        made = causal_lm.pairs(tokenizer, said, expected, most, ended=True, left=left)
        examples, came = causal_lm.learned(made, pad_id(tokenizer), most)
    prompts = causal_lm.prompts(tokenizer, [each.said for each in items], most)
    asked = tuple(
        Asked(
            np.array(prompts[row], np.int32),
            (np.array(made[row][0], np.int32),),
            (causal_lm.begin(made[row][1]),),
            (until(items[row].expected, fields.stop),),
            0,
            items[row].said,
            fields.new_tokens,
            *_ends(items[row].turn, fields),
        )
        for row in came.tolist()
    )
    return Rows(examples._replace(asked=asked), came, ())


def _ends(turn: chat.Turn | None, fields: Fields) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The texts, and the tokens, at which an answer ends beside the end of sequence."""
    if turn is None:
        return fields.stop, ()
    return (*fields.stop, *([turn.mark] if turn.mark else [])), turn.ends


def _ask(asked: Sequence[Asked], speaker: Speaker) -> Tally:
    if not asked:
        return Tally()
    loss = -sum(speaker.likelihoods([(each.options[0], each.begins[0]) for each in asked]))
    told = written(asked, speaker)
    rouge, chrf = _scorers()
    sums = dict.fromkeys([*_SHARES, *(f"chrf{n}" for n in range(_CHRF))], 0.0)
    for each, text in zip(asked, told, strict=True):
        expected = each.texts[0]
        sums["exact"] += _plain(text) == _plain(expected)
        sums["f1"] += _f1(_plain(text).split(), _plain(expected).split())
        sums["rouge"] += rouge.score(expected, text)["rougeL"].fmeasure
        (parts,) = chrf._extract_corpus_statistics([text], [[expected]])
        for n, count in enumerate(parts):
            sums[f"chrf{n}"] += count
    answers = tuple(
        Answer(each.said, each.texts[0], text)
        for each, text in zip(asked[:SHOWN], told, strict=False)
    )
    return Tally(loss, len(asked), sums, answers=answers)


def _plain(text: str) -> str:
    """A text without case, punctuation, articles and more than single spaces."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_NO_MARKS)).split())


def _f1(told: Sequence[str], expected: Sequence[str]) -> float:
    """Of the words that two texts have in common; two without any word are alike."""
    if not told or not expected:
        return float(told == expected)
    common = (Counter(told) & Counter(expected)).total()
    return 2 * common / (len(told) + len(expected))


def _scorers() -> tuple[Any, Any]:
    """Those of ROUGE-L and of chrF. Raises FedSieveError where they are not installed."""
    try:
        from rouge_score import rouge_scorer
        from sacrebleu.metrics import CHRF
    except ImportError:
        raise FedSieveError(
            "a generation task needs the packages that score texts: "
            "run `pip install 'fedsieve[generation]'`"
        ) from None
    return rouge_scorer.RougeScorer(["rougeL"], tokenizer=_Words()), CHRF()


class _Words:
    """As rouge-score's own, which knows Latin letters alone: other scripts' words are words too,
    and where no spaces part them, letters.
    """

    def tokenize(self, text: str) -> list[str]:
        return re.findall(rf"{UNSPACED}|[^\W_]+?(?={UNSPACED}|[\W_]|$)", text.lower())


def _fits(tally: Tally, classes: tuple[str, ...]) -> bool:
    if set(tally.sums) != {*_SHARES, *(f"chrf{n}" for n in range(_CHRF))}:
        return False
    counts = [tally.sums[f"chrf{n}"] for n in range(_CHRF)]
    shares = all(0 <= tally.sums[name] <= tally.counted * (1 + 1e-9) for name in _SHARES)
    both = all(counts[n + 2] <= min(counts[n : n + 2]) for n in range(0, _CHRF, 3))
    most = tally.counted * _LETTERS
    whole = all(count.is_integer() and 0 <= count <= most for count in counts)
    exact = tally.sums["exact"]  # what is told exactly has all its words in common
    return shares and both and whole and exact.is_integer() and exact <= tally.sums["f1"] + 1e-6


def _metrics(tally: Tally, classes: tuple[str, ...]) -> dict[str, float]:
    """Means over the prompts from 0 to 1, and chrF from 0 to 1 as well."""
    _, chrf = _scorers()
    counts = [int(tally.sums[f"chrf{n}"]) for n in range(_CHRF)]
    return {
        "token_f1": tally.sums["f1"] / tally.counted,
        "exact_match": tally.sums["exact"] / tally.counted,
        "rouge_l": tally.sums["rouge"] / tally.counted,
        "chrf": float(chrf._compute_score_from_stats(counts).score) / 100,
    }


TASK = replace(
    causal_lm.TASK,
    title="generation",
    uses=("text", "prompt", "completion", "new_tokens", "stop"),
    bad=_bad,
    read=_read,
    fits=_fits,
    leads=lambda *_: ("token_f1", "exact_match", "rouge_l", "chrf"),
    metrics=_metrics,
    ask=_ask,
)
