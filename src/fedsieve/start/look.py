"""What rows are, column by column: read as a run would read them, and looked at in part.

Nothing is decided here; guess.py takes it from there.
"""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

from datasets import ClassLabel, Dataset, Image

from fedsieve.data import files, pictures, sources
from fedsieve.data.names import NUMBER, clean
from fedsieve.data.templates import values_of
from fedsieve.disk import place
from fedsieve.errors import TooWide, printable

MOST = 5000  # rows that are looked at, spread over all of them
SHOWN, LONGEST = 3, 40  # examples of a column, and letters of each
COLUMNS = 200  # that are looked at: a table of more is no table of texts
TRAIN = ("train", "training")
TESTS = ("test", "validation", "valid", "val", "dev", "eval")

Kind = Literal[
    "text", "number", "whole number", "true or false", "image", "messages", "words", "numbers",
    "options", "other", "nothing",
]  # fmt: skip


class Column(NamedTuple):
    """A column, as far as it was looked at.

    kind:     "words" are lists of texts, "numbers" lists of whole numbers, "options" lists of texts
              and of their labels
    filled:   rows that have a value, a share; nulls: whether a row has null
    distinct: different values; of lists, different lists
    words:    of a text, as many as most have, and as 19 of 20 have at most; of a conversation, in
              all of its turns
    lengths:  of lists, row by row
    examples: some of its values, cut short, fit for a terminal
    """

    name: str
    kind: Kind
    filled: float
    nulls: bool
    distinct: int
    words: tuple[int, int]
    lengths: tuple[int, ...]
    examples: tuple[str, ...]


class Looked(NamedTuple):
    """A source's rows.

    source, config, separator, field, train_split: as `sources.load` takes them
    test, test_split: rows beside them to evaluate on, where there are any
    rows: how many there are; looked: at how many of them
    only: the columns that were looked at, where there are more
    """

    source: str
    config: str | None
    separator: str | None
    field: str | None
    train_split: str | None
    test: str | None
    test_split: str | None
    rows: int
    looked: int
    columns: tuple[Column, ...]
    only: files.Columns | None = None

    def column(self, name: str) -> Column:
        return next(column for column in self.columns if column.name == name)


def look(source: str, config: str | None = None, columns: files.Columns | None = None) -> Looked:
    """Read a source, and look at its columns. Raises FedSieveError as `sources.load` does, and
    TooWide for more columns than a table of rows has.

    columns: those that are looked at; by default all
    """
    splits = sources.splits_of(source, config)
    train = next((s for name in TRAIN for s in splits if s.lower() == name), None)
    test = next((s for name in TESTS for s in splits if s.lower() == name), None)
    if train is None:
        test = None
        train = splits[0] if len(splits) == 1 else None
    path = place(source)
    separator = files.separator_of(path) if path.is_file() else None
    field = files.field_of(path) if path.is_file() else None
    rows = sources.load(
        source, train, config=config, separator=separator, field=field, columns=columns
    )
    if len(rows.column_names) > COLUMNS:
        raise TooWide(
            f"{source} has {len(rows.column_names):,} columns, too many to guess from: name those "
            "that are used, --text and --label (and --clients)"
        )
    # Drawn, and not each of so many: rows may come in turns.
    drawn = random.Random(0).sample(range(len(rows)), min(MOST, len(rows)))
    some = rows.select(sorted(drawn))
    return Looked(
        source=source,
        config=config,
        separator=separator,
        field=field,
        train_split=train,
        test=_beside(path),
        test_split=test,
        rows=len(rows),
        looked=len(some),
        columns=tuple(_column(some, name) for name in rows.column_names),
        only=columns,
    )


def _beside(path: Path) -> str | None:
    """The file of test rows beside one of training rows: `b-test.csv` of `b-train.csv`."""
    if not path.is_file() or "train" not in path.name:
        return None
    head, _, tail = path.name.rpartition("train")
    found = (path.with_name(f"{head}{name}{tail}") for name in TESTS)
    return next((str(each) for each in found if each.is_file()), None)


def _column(rows: Dataset, name: str) -> Column:
    feature = rows.features[name]
    values = values_of(rows, name)
    nulls = any(value is None for value in values)
    there = [value for value in values if value is not None and value != ""]
    if isinstance(feature, ClassLabel):
        names = [clean(each) for each in feature.names]
        there = [names[v] if 0 <= v < len(names) else str(v) for v in there]
    kind = "image" if isinstance(feature, Image) else _kind(there)
    said = [_end(v) if kind == "image" and isinstance(v, str) else _said(v) for v in there]
    counts = sorted(len(text.split()) for text in said)
    lists = kind in ("words", "numbers", "options")
    return Column(
        name=name,
        kind=kind,
        filled=len(there) / max(1, len(values)),
        nulls=nulls,
        distinct=len({repr(value) for value in there}),
        words=(int(median(counts)), counts[int(0.95 * (len(counts) - 1))]) if counts else (0, 0),
        lengths=tuple(_length(value) for value in there) if lists else (),
        examples=tuple(_short(text) for text in _some(said)),
    )


def _kind(values: Sequence[Any]) -> Kind:
    """Of values that are there: what all of them are."""
    kinds = {_of_one(value) for value in values}
    if not kinds:
        return "nothing"
    if kinds <= {"text", "number", "whole number", "true or false"} and "text" not in kinds:
        return kinds.pop() if len(kinds) == 1 else "number"
    if kinds <= {"text", "number", "whole number"} and all(isinstance(v, str) for v in values):
        return "text"
    if kinds <= {"image", "text"} and "image" in kinds and not all(map(_names_image, values)):
        return "text"
    return kinds.pop() if len(kinds) == 1 else "other"


def _of_one(value: Any) -> Kind:
    match value:
        case bool():
            return "true or false"
        case int():
            return "whole number"
        case float():
            return "number"
        case str():
            return _of_text(value.strip())
        case bytes():
            return "image"
        case {"bytes": _} | {"path": _}:
            return "image"
        case {"text": [*_], "label": [*_]}:
            return "options"
        case [{"role": _, "content": _}, *_]:
            return "messages"
        case [] | [str(), *_]:
            return "words"
        case [int(), *_]:
            return "numbers"
    return "other"


def _of_text(text: str) -> Kind:
    if NUMBER.fullmatch(text.lower()):
        return "whole number" if text.lstrip("+-").isdigit() else "number"
    return "image" if _names_image(text) else "text"


def _names_image(value: Any) -> bool:
    return not isinstance(value, str) or value.strip().lower().endswith(pictures.EXTENSIONS)


def _length(value: Any) -> int:
    return len(value["text"] if isinstance(value, Mapping) else value)


def _said(value: Any) -> str:
    """A value as it is shown, and as its words are counted."""
    match value:
        case str():
            return value
        case [{"role": _, "content": _}, *_]:
            return " ".join(f"{each.get('role')}: {each.get('content')}" for each in value)
        case [*_]:
            return "[" + ", ".join(map(str, value)) + "]"
        case bytes() | {"bytes": bytes()}:
            data = value if isinstance(value, bytes) else value["bytes"]
            return f"{len(data):,} bytes"
        case {"path": str(path)}:
            return _end(path)
    return str(value)


def _end(path: str) -> str:
    """An image's name, with its folder's."""
    return "/".join(Path(path).parts[-2:])


def _some(said: Sequence[str]) -> list[str]:
    """The first that differ."""
    found: dict[str, None] = {}
    for text in said:
        found.setdefault(text)
        if len(found) == SHOWN:
            break
    return list(found)


def _short(text: str) -> str:
    whole = printable(" ".join(text[: 10 * LONGEST].split()))
    return whole if len(whole) <= LONGEST else f"{whole[: LONGEST - 1]}…"
