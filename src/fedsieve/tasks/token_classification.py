"""Token classification: words, and a tag for each (names of entities, parts of speech).

A word's tag is told at the first of its tokens. Where the tags begin and go on (B-PER, I-PER),
what counts are whole entities, as in CoNLL's evaluation (Tjong Kim Sang and Buchholz, 2000).
"""

import re
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from datasets import ClassLabel, Dataset
from torch import Tensor

from fedsieve.data.files import Columns
from fedsieve.data.names import clean, each_among, in_order
from fedsieve.data.sources import column
from fedsieve.data.templates import LETTERS
from fedsieve.errors import FedSieveError
from fedsieve.tasks import confusion
from fedsieve.tasks.classes import listed, listing
from fedsieve.tasks.tally import OfClass, Tally
from fedsieve.tasks.task import Bad, Fields, Rows, Task, needed, refuse
from fedsieve.tasks.tokens import (
    IGNORED,
    IN_FILES,
    Texts,
    check_rows,
    pad_id,
    read_by,
    rectangle,
    refuse_no_room,
    too_long,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_COUNTS = ("right", "told", "there")  # entities
_SCHEME = re.compile(r"([BIESLU])-(.+)")
_SPELLED = {"L": "E", "U": "S"}


def _columns(fields: Fields) -> Columns:
    needed(text=fields.text, label=fields.label)
    if fields.text is None or not isinstance(fields.label, str):
        raise FedSieveError(
            "this task takes a column of lists of words (text) and one of lists of tags (label)"
        )
    return Columns((fields.text, fields.label))


def _rows(rows: Dataset, fields: Fields) -> list[tuple[list[str], list[str]] | FedSieveError]:
    """The words and tags of each row, or what is wrong with it."""
    text, label = _columns(fields).texts
    feature = getattr(rows.features.get(label), "feature", None)
    told = [*map(clean, feature.names)] if isinstance(feature, ClassLabel) else None
    found: list[tuple[list[str], list[str]] | FedSieveError] = []
    for row, (words, tags) in enumerate(zip(column(rows, text), column(rows, label), strict=True)):
        try:
            found.append((_words(words, text), _tags(tags, told, label, words)))
        except FedSieveError as error:
            found.append(FedSieveError(f"row {row} of column {error}"))
    return found


def _words(words: Any, name: str) -> list[str]:
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise FedSieveError(f"{name!r} holds no list of words{IN_FILES}")
    if (letters := len(words) + sum(map(len, words))) > LETTERS:
        raise FedSieveError(f"{name!r} {too_long(letters)}")
    return words


def _tags(tags: Any, told: list[str] | None, name: str, words: list[str]) -> list[str]:
    if not isinstance(tags, list):
        raise FedSieveError(f"{name!r} holds no list of tags{IN_FILES}")
    if len(tags) != len(words):
        raise FedSieveError(f"{name!r} holds {len(tags)} tags for {len(words)} words")
    return each_among(tags, told, lambda _: repr(name), f"{name!r} has an empty tag")


def _classes(parts: Sequence[Dataset], fields: Fields) -> tuple[str, ...]:
    if fields.classes is not None:
        return fields.classes
    if isinstance(fields.label, str) and (names := listed(parts, fields.label)) is not None:
        return names
    found: set[str] = set()
    for rows in parts:
        for each in _rows(rows, fields):
            if isinstance(each, FedSieveError):
                raise each
            found.update(each[1])
    return tuple(in_order(found))


def _bad(rows: Dataset, tokenizer: "PreTrainedTokenizerBase", fields: Fields) -> Bad:
    found: Bad = {}
    known = None if fields.classes is None else set(map(clean, fields.classes))
    for row, each in enumerate(_rows(rows, fields)):
        if isinstance(each, FedSieveError):
            found[row] = each
        elif known is not None and (odd := set(each[1]) - known):
            found[row] = FedSieveError(
                f"row {row} of column {fields.label!r} has the tag {min(odd)!r}, none of the "
                f"{len(known)} classes: {listing(fields.classes or ())}"
            )
    return found


def _read(rows: Dataset, tokenizer: "PreTrainedTokenizerBase", fields: Fields) -> Rows:
    check_rows(rows)
    fields = fields._replace(classes=tuple(map(clean, _classes([rows], fields))))
    names = fields.classes or ()
    if len(names) < 2 or len(set(names)) < len(names):
        raise FedSieveError(f"label: at least two different tags are needed, not {list(names)}")
    refuse(_bad(rows, tokenizer, fields))
    if not tokenizer.is_fast:
        raise FedSieveError(
            "token classification needs a tokenizer that tells which word each token is of (a "
            "fast one), and this model's does not"
        )
    refuse_no_room(tokenizer, fields.max_length)
    before = _space(tokenizer)
    pairs = [each for each in _rows(rows, fields) if not isinstance(each, FedSieveError)]
    number_of = {name: number for number, name in enumerate(names)}
    ids, labels, came = [], [], []
    for row, (words, tags) in enumerate(pairs):
        made = read_by(
            tokenizer,
            [before + word if word else word for word in words],
            is_split_into_words=True,
            truncation=True,
            max_length=fields.max_length,
        )
        of = made.word_ids()
        targets = [
            IGNORED if word is None or word == before else number_of[tags[word]]
            for before, word in zip([None, *of], of, strict=False)
        ]
        if any(target != IGNORED for target in targets):
            ids.append(made["input_ids"])
            labels.append(targets)
            came.append(row)
    if not came:
        raise FedSieveError(f"none of the {len(rows)} rows has a word in it")
    if len(came) < len(rows):
        warnings.warn(f"{len(rows) - len(came)} of {len(rows)} rows dropped: no word", stacklevel=2)
    input_ids, mask = rectangle(ids, pad_id(tokenizer))
    examples = Texts(input_ids, mask, rectangle(labels, IGNORED)[0])
    return Rows(examples, np.array(came, dtype=np.int64), names)


def _space(tokenizer: "PreTrainedTokenizerBase") -> str:
    """What goes before each word for it to be read as in a text: tokenizers whose tokens hold the
    space before a word (RoBERTa's, GPT-2's) put none before words that come one by one.
    """
    text = read_by(tokenizer, "the the", add_special_tokens=False)["input_ids"]
    for before in ("", " "):
        words = [before + "the"] * 2
        made = read_by(tokenizer, words, is_split_into_words=True, add_special_tokens=False)
        second = [n for n, word in zip(made["input_ids"], made.word_ids(), strict=True) if word]
        if second and text[-len(second) :] == second and len(text) <= len(made["input_ids"]):
            return before
    return ""


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )


def _judge(logits: Tensor, labels: Tensor, classes: tuple[str, ...]) -> Tally:
    there = labels != IGNORED
    loss = _losses(logits, labels).sum().item()
    told, tags = logits.argmax(-1), [_tag(name) for name in classes]
    counts = {f"{name} {kind}": 0.0 for kind in _kinds(classes) for name in _COUNTS}
    if counts:
        for mask, true, found in zip(there, labels, told, strict=True):
            so = entities([tags[n] for n in true[mask].tolist()])
            said = entities([tags[n] for n in found[mask].tolist()])
            for name, of in zip(_COUNTS, (so & said, said, so), strict=True):
                for entity in of:
                    counts[f"{name} {entity.kind}"] += 1
    counts["tokens"] = float((told == labels)[there].sum())
    return Tally(loss, int(there.sum()), counts)


class Entity(NamedTuple):
    """What its words are, and the places of its first and last."""

    kind: str
    first: int
    last: int


def entities(tags: Sequence[tuple[str, str]]) -> set[Entity]:
    """The entities of a row of (mark, kind), marks those of BIOES, as CoNLL's evaluation finds
    them: where the scheme is broken too, for what a model says may be in any order.
    """
    found: list[Entity] = []
    before = ("O", "")
    for place, (mark, kind) in enumerate(tags):
        if mark in ("I", "E") and before in (("B", kind), ("I", kind)):
            found[-1] = found[-1]._replace(last=place)
        elif mark != "O":
            found.append(Entity(kind, place, place))
        before = (mark, kind)
    return set(found)


def _tag(name: str) -> tuple[str, str]:
    """A tag's mark and kind: BILOU's as those of BIOES, and O for one of no such scheme, which
    begins no entity.
    """
    found = _SCHEME.fullmatch(name)
    return ("O", "") if found is None else (_SPELLED.get(found[1], found[1]), found[2])


def _kinds(classes: Sequence[str]) -> list[str]:
    """The kinds of entities that the tags tell; none where no tag begins one or goes on."""
    return sorted({found[2] for name in classes if (found := _SCHEME.fullmatch(name))})


def _fits(tally: Tally, classes: tuple[str, ...]) -> bool:
    sums, kinds = tally.sums, _kinds(classes)
    if set(sums) != {"tokens", *(f"{name} {kind}" for kind in kinds for name in _COUNTS)}:
        return False
    told, there = (sum(sums[f"{name} {k}"] for k in kinds) for name in _COUNTS[1:])
    return (
        all(value.is_integer() and 0 <= value <= tally.counted for value in sums.values())
        and all(sums[f"right {k}"] <= min(sums[f"told {k}"], sums[f"there {k}"]) for k in kinds)
        and max(told, there) <= tally.counted  # each has a token of its own
    )


def _leads(classes: Sequence[str], by_row: bool) -> tuple[str, ...]:
    entities = ("entity_f1", "entity_precision", "entity_recall")
    return (*(entities if _kinds(classes) or not classes else ()), "token_accuracy")


def _metrics(tally: Tally, classes: tuple[str, ...]) -> dict[str, float]:
    """F1, precision and recall of entities, where tags tell such; and the share of right tags."""
    kinds = _kinds(classes)
    tokens = {"token_accuracy": tally.sums["tokens"] / tally.counted}
    if not kinds:
        return tokens
    right, told, there = (sum(tally.sums[f"{name} {k}"] for k in kinds) for name in _COUNTS)
    return {
        "entity_f1": 2 * right / max(1.0, told + there),
        "entity_precision": right / max(1.0, told),
        "entity_recall": right / max(1.0, there),
    } | tokens


def _by_class(tally: Tally, classes: tuple[str, ...]) -> tuple[OfClass, ...]:
    """Of entities, by their kind."""
    found = []
    for kind in _kinds(classes):
        right, told, there = (tally.sums[f"{name} {kind}"] for name in _COUNTS)
        shares = right / max(1.0, told), right / max(1.0, there)
        found.append(OfClass(kind, int(there), *shares, 2 * right / max(1.0, told + there)))
    return tuple(found)


def _told(logits: Tensor, labels: Tensor, classes: tuple[str, ...]) -> list[tuple[str, str]]:
    def words(tags: Tensor) -> str:
        return " ".join(classes[n] for n in tags.tolist())

    there, told = labels != IGNORED, logits.argmax(-1)
    return [(words(labels[n][there[n]]), words(told[n][there[n]])) for n in range(len(labels))]


TASK = Task(
    title="token classification",
    auto="AutoModelForTokenClassification",
    peft="TOKEN_CLS",
    head=True,
    named=True,
    uses=("text", "label", "classes"),
    columns=_columns,
    classes=_classes,
    bad=_bad,
    read=_read,
    config=confusion.names_of,
    labels=lambda ids, mask, classes: (ids % classes).where(mask == 1, IGNORED),
    counts=lambda labels: int((labels != IGNORED).sum()),
    losses=_losses,
    judge=_judge,
    fits=_fits,
    leads=_leads,
    metrics=_metrics,
    by_class=_by_class,
    told=_told,
)
