"""Multiple choice: a question, some options, and which of them is right.

Trained as a causal language model is, on the right option after the question. Judged in three ways,
which differ and are told under their names: which option is the likeliest to follow, plainly and a
character, as is usual (Brown et al. 2020, arXiv 2005.14165); and which option is the first to occur
in what the model writes, as FSLoRA scores its commonsense tasks (arXiv 2501.19389, appendix G).
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from datasets import ClassLabel, Dataset

from fedsieve.data.files import Columns
from fedsieve.data.names import clean, each_among, kind_of
from fedsieve.data.sources import column, names_in
from fedsieve.data.templates import LETTERS
from fedsieve.errors import FedSieveError
from fedsieve.tasks import causal_lm
from fedsieve.tasks.asked import UNSPACED, Asked, Speaker, written
from fedsieve.tasks.tally import SHOWN, Answer, Tally
from fedsieve.tasks.task import Bad, Fields, Rows, needed, one_label
from fedsieve.tasks.tokens import bad_texts, check_rows, pad_id, too_long

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LISTED = "the correct answer is {option}"  # FSLoRA's sentence
_AROUND = 4  # tokens that a tokenizer puts around a text, at most
MOST_OPTIONS = 1000  # of a question
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class _Question(NamedTuple):
    """said: the prompt; options: as they are told from each other; answers: as they are written."""

    said: str
    options: tuple[str, ...]
    answers: tuple[str, ...]
    right: int


def _columns(fields: Fields) -> Columns:
    needed(text=fields.text)
    assert fields.text is not None
    label = one_label(fields)
    if fields.text_b is not None:
        raise FedSieveError("text_b: a question is one column: join two by a template, as text")
    if (not fields.options) == (fields.classes is None):
        raise FedSieveError(
            "options: a multiple-choice task needs the columns that hold them, or, where all rows "
            "have the same, classes: one of the two"
        )
    if fields.answer is not None and fields.answer.count("{option}") != 1:
        raise FedSieveError("answer: it says where the option stands: {option}, once")
    return Columns((fields.text, *_option_columns(fields)), (label,))


def _option_columns(fields: Fields) -> tuple[str, ...]:
    options = fields.options or ()
    return (options,) if isinstance(options, str) else options


def _questions(rows: Dataset, fields: Fields) -> Iterator[_Question | FedSieveError]:
    """Each row's question, or what is wrong with it."""
    columns = _columns(fields)
    (label,) = columns.names
    names = _option_columns(fields)
    texts, labels = column(rows, columns.texts[0]), names_in(rows, label)
    # A float is a name where it is whole, and then it is that integer (names.py).
    counted = str(getattr(rows.features[label], "dtype", "")).startswith(("int", "uint", "float"))
    # Of options that are the same in all rows, a label is the name of one, as of a class.
    counted = counted and bool(names) and not isinstance(rows.features[label], ClassLabel)
    classes = _named_marks(rows.features.get(names[0])) if len(names) == 1 else None
    odd = bad_texts(texts, columns.texts[0])
    of_rows: Iterator[Any] = (
        zip(*(column(rows, name) for name in names), strict=True)
        if names
        else iter([()] * len(rows))
    )
    for row, (text, told, cells) in enumerate(zip(texts, labels, of_rows, strict=True)):
        try:
            if row in odd:
                raise odd[row]
            if isinstance(told, FedSieveError):
                raise told
            where = f"row {row} of column {', '.join(map(repr, names))}"
            options, marks = _options(cells, fields, where, classes)
            if told is None:
                raise FedSieveError(f"row {row} of column {label!r} does not say which is right")
            if not text.strip():
                raise FedSieveError(f"row {row} of column {columns.texts[0]!r} holds no question")
            try:
                known = marks or (() if names else options)
                right = _right(told, options, known, fields.first_option, counted=counted)
            except ValueError as error:
                raise FedSieveError(f"row {row} of column {label!r} {error}") from None
            yield _question(text, options, right, fields)
        except FedSieveError as error:
            yield error


def _named_marks(feature: Any) -> list[str] | None:
    """The classes of which the labels of options are numbers, where they are."""
    marks = feature.get("label") if isinstance(feature, Mapping) else None
    kind = getattr(marks, "feature", None)
    return [*map(clean, kind.names)] if isinstance(kind, ClassLabel) else None


def _options(
    cells: Sequence[Any], fields: Fields, where: str, classes: list[str] | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """A row's options, and what they are called where the data says so (ARC: A, B, C, D).

    classes: those of which the data's own labels of options are numbers
    """
    marks: Any = None
    if not cells:
        options: Any = fields.classes
    elif len(cells) > 1:
        options = list(cells)
    else:
        options = cells[0]
        if isinstance(options, Mapping) and {"text", "label"} <= options.keys():
            options, marks = options["text"], options["label"]
        if not isinstance(options, list):
            raise FedSieveError(f"{where} holds no list of options")
    if len(options) > MOST_OPTIONS:
        raise FedSieveError(f"{where} holds {len(options)} options: at most {MOST_OPTIONS}")
    for number, option in enumerate(options):
        if not isinstance(option, str) or not option.strip():
            raise FedSieveError(f"{where}: option {number + 1} is empty, or no text")
    if len(options) < 2:
        raise FedSieveError(f"{where} holds {len(options)} options: at least two are needed")
    if (letters := sum(map(len, options))) > LETTERS:
        raise FedSieveError(f"{where} {too_long(letters)}")
    found = tuple(option.strip() for option in options)
    called = [] if marks is None else _marks(marks, len(options), where, classes)
    for kind, names in (("option", found), ("label", called)):
        name, times = Counter(names).most_common(1)[0] if names else ("", 0)
        if times > 1:
            raise FedSieveError(f"{where} has the {kind} {name[:40]!r} twice")
    return found, tuple(called)


def _marks(marks: Any, count: int, where: str, classes: list[str] | None) -> list[str]:
    """The names that a row gives its options. Raises FedSieveError for what is no list of names."""
    if not isinstance(marks, list):
        raise FedSieveError(
            f"{where} holds {kind_of(marks)} as the labels of its options, and a list is needed"
        )
    if len(marks) != count:
        raise FedSieveError(f"{where} has {count} options and {len(marks)} labels for them")
    empty = f"{where} has an option without a label"
    return each_among(marks, classes, lambda n: f"{where}, label {n + 1},", empty)


def _right(
    told: str, options: Sequence[str], marks: Sequence[str], first: int, *, counted: bool
) -> int:
    """Which option a label means: by its mark, its text, its number, or its letter.

    counted: whether the labels are whole numbers, and so no option's text
    Raises ValueError, with the end of a sentence that begins with the label's place, where it means
    none, or two.
    """
    looks, number = _looks(told), None
    if looks == "a number":
        number = int(told) - first
    elif looks == "a letter":
        number = _LETTERS.index(told.upper())
    by_number = {number} if number is not None and 0 <= number < len(options) else set()
    if looks in map(_looks, marks):
        by_number = set()  # with marks of its kind it means one of those, or none
    by_mark = _called(told, marks)
    by_text = set() if counted else _called(told, [clean(each) for each in options])
    two = told.isdecimal() and by_text and by_number and by_text != by_number
    if two and not by_mark:
        raise ValueError(
            f"holds {told[:40]!r}, which is one option's text and another's number: write the "
            "option's letter, or whole numbers that are no texts"
        )
    for found in (by_mark, by_text, by_number):
        if len(found) > 1:
            raise ValueError(f"holds {told[:40]!r}, which is several of its options")
        if found:
            return found.pop()
    raise ValueError(
        f"holds {told[:40]!r}, which is none of its {len(options)} options, nor a number from "
        f"{first} on (data.first_option says what the first one's is)"
    )


def _looks(name: str) -> str:
    """What a name could be taken for beside itself: a number, or a letter."""
    if re.fullmatch(r"[0-9]{1,6}", name):
        return "a number"
    return "a letter" if len(name) == 1 and name.upper() in _LETTERS else name


def _called(told: str, names: Sequence[str]) -> set[int]:
    """Which are called so: in these very letters, or else in any case."""
    same = {n for n, each in enumerate(names) if each == told}
    return same or {n for n, each in enumerate(names) if each.casefold() == told.casefold()}


def _question(text: str, options: tuple[str, ...], right: int, fields: Fields) -> _Question:
    word, answer = fields.option_word, fields.answer
    if word is not None:
        called = tuple(f"{word}{number}" for number in range(1, len(options) + 1))
        title = word[:1].upper() + word[1:]
        listed = "\n".join(f"{title}{n}: {option}" for n, option in enumerate(options, 1))
        text = f"{text.rstrip()}\n\n{listed}\n\nAnswer format: {'/'.join(called)}\n"
        options, answer = called, answer or _LISTED
    written = [(answer or "{option}").replace("{option}", option) for option in options]
    gap = "" if not text or text[-1].isspace() else " "
    return _Question(text, options, tuple(gap + each for each in written), right)


def _bad(rows: Dataset, tokenizer: "PreTrainedTokenizerBase", fields: Fields) -> Bad:
    found: Bad = {}
    for row, each in enumerate(_questions(rows, fields)):
        if isinstance(each, FedSieveError):
            found[row] = each
            continue
        # A token has at least a byte: of most options it need not be counted how many they have.
        long = [a for a in each.answers if len(a.encode()) >= fields.max_length - _AROUND]
        made = causal_lm.pairs(tokenizer, [""] * len(long), long, causal_lm.ENDLESS, ended=False)
        if any(len(ids) >= fields.max_length for ids, _ in made):
            found[row] = FedSieveError(
                f"row {row} has an option that leaves no room for a token of its question within "
                f"data.max_length ({fields.max_length}): raise it"
            )
    return found


def _read(rows: Dataset, tokenizer: "PreTrainedTokenizerBase", fields: Fields) -> Rows:
    check_rows(rows)
    questions = []
    for each in _questions(rows, fields):
        if isinstance(each, FedSieveError):
            raise each
        questions.append(each)
    most = fields.max_length
    made = causal_lm.pairs(
        tokenizer,
        [each.said for each in questions],
        [each.answers[each.right] for each in questions],
        most,
        ended=True,
    )
    examples, came = causal_lm.learned(made, pad_id(tokenizer), most)
    options = causal_lm.pairs(
        tokenizer,
        [each.said for each in questions for _ in each.answers],
        [answer for each in questions for answer in each.answers],
        most,
        ended=False,
    )
    prompts = causal_lm.prompts(tokenizer, [each.said for each in questions], most)
    rest = iter(options)
    asked = []
    for each, prompt in zip(questions, prompts, strict=True):
        own = [next(rest) for _ in each.answers]
        asked.append(
            Asked(
                np.array(prompt, np.int32),
                tuple(np.array(ids, np.int32) for ids, _ in own),
                tuple(causal_lm.begin(targets) for _, targets in own),
                each.options,
                each.right,
                each.said,
                fields.new_tokens,
                fields.stop,
            )
        )
    return Rows(examples._replace(asked=tuple(asked[row] for row in came)), came, ())


def _ask(asked: Sequence[Asked], speaker: Speaker) -> Tally:
    options = [pair for each in asked for pair in zip(each.options, each.begins, strict=True)]
    likely = iter(speaker.likelihoods(options))
    loss, plain, by_character = 0.0, 0, 0
    for each in asked:
        chances = np.array([next(likely) for _ in each.options])
        lengths = np.array([len(text) for text in each.texts])
        loss -= float(chances[each.right])
        chances = np.nan_to_num(chances, nan=-np.inf)
        plain += int(chances.argmax()) == each.right
        by_character += int((chances / lengths).argmax()) == each.right
    texts, found, right = written(asked, speaker), 0, 0
    for each, text in zip(asked, texts, strict=True):
        taken = first_of(each.texts, text)
        found += taken is not None
        right += taken == each.right
    sums = {"plain": plain, "by_character": by_character, "right": right, "found": found}
    answers = tuple(
        Answer(each.said, each.texts[each.right], text)
        for each, text in zip(asked[:SHOWN], texts, strict=False)
    )
    counts = {name: float(count) for name, count in sums.items()}
    return Tally(loss, len(asked), counts, answers=answers)


def first_of(options: Sequence[str], text: str) -> int | None:
    """Which option is the first to occur in a text, as words of their own, in any case where that
    tells them apart; of two that begin at one place the longer. None where there is none.
    """
    found = []
    told_by_case = len({option.casefold() for option in options}) < len(options)
    for number, option in enumerate(options):
        # Letters and digits on either side would make another word of it: answer1, answer10.
        before = r"(?<!\w)" if _parted(option[:1]) else ""
        after = r"(?!\w)" if _parted(option[-1:]) else ""
        words = before + re.escape(option) + after
        if match := re.search(words, text, 0 if told_by_case else re.IGNORECASE):
            found.append((match.start(), -len(option), number))
    return min(found)[-1] if found else None


def _parted(letter: str) -> bool:
    """Whether it is of a word that spaces or signs part from others."""
    return bool(re.fullmatch(r"\w", letter)) and not re.fullmatch(UNSPACED, letter)


def _fits(tally: Tally, classes: tuple[str, ...]) -> bool:
    known = set(tally.sums) == {"plain", "by_character", "right", "found"}
    whole = all(v.is_integer() and 0 <= v <= tally.counted for v in tally.sums.values())
    return known and whole and tally.sums["right"] <= tally.sums["found"]


def _metrics(tally: Tally, classes: tuple[str, ...]) -> dict[str, float]:
    """The shares of questions whose right option is the likeliest, and the likeliest a character;
    of which the right one is written, and of which any is.
    """
    return {
        "accuracy": tally.sums["plain"] / tally.counted,
        "accuracy_by_character": tally.sums["by_character"] / tally.counted,
        "accuracy_written": tally.sums["right"] / tally.counted,
        "answered": tally.sums["found"] / tally.counted,
    }


TASK = replace(
    causal_lm.TASK,
    title="multiple choice",
    uses=(
        "text",
        "options",
        "classes",
        "label",
        "option_word",
        "answer",
        "first_option",
        "new_tokens",
        "stop",
    ),
    columns=_columns,
    classes=lambda _, fields: fields.classes or (),
    bad=_bad,
    read=_read,
    fits=_fits,
    leads=lambda *_: ("accuracy", "accuracy_by_character", "accuracy_written", "answered"),
    metrics=_metrics,
    ask=_ask,
)
