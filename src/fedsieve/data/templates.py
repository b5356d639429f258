"""Texts with columns filled in, where a column is asked for: "question: {ask} passage: {text}".

A template makes a column of its own, which is called as it is written, before a task sees the rows:
to a task it is a column like any other. `{{` and `}}` are braces. A column's plain name stands
between braces, and nothing is done with its value: a text is put there as it is, and a number, a
Boolean, a date or a number of a `ClassLabel` as the name that it is (names.py).

A column whose very name has braces, and that exists, is no template.
"""

import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from typing import Any

import pyarrow as pa
from datasets import ClassLabel, Dataset

from fedsieve.data.names import Unread, clean, name_among
from fedsieve.errors import FedSieveError, nearest, printable, quoted, raise_of_memory, with_type

_PIECES = re.compile(r"(\{\{|\}\})|\{([^{}]*)\}|([{}])|[^{}]+")
# Of a row: letters that are read, of which a tokenizer takes hundreds of bytes each. Two books.
LETTERS = 4_000_000
_PIECES_MOST = 1000
# What pyarrow, and Python's own dates and zones, raise for a value that Python cannot have.
_BEYOND = (pa.ArrowException, ArithmeticError, LookupError, ValueError)
_MORE = re.compile(r"[.\[\]!:]")  # what Python's own templates would take for more than a name


def columns_in(template: str) -> tuple[str, ...]:
    """The columns that a template names, in their order; none where it is a plain name.

    Raises FedSieveError for a brace that is alone, and for what is no plain name.
    """
    return tuple(dict.fromkeys(name for name, _ in _parts(template) if name is not None))


def is_plain(name: str) -> bool:
    """Whether a template can name a column of this name."""
    return not _MORE.search(name) and not {"{", "}"} & {*name}


def used(names: Iterable[str], there: Collection[str]) -> list[str]:
    """The columns that are read for these, of those that are there; once each.

    What is neither there nor a template stays, for the caller to miss. Raises FedSieveError, with
    the nearest, where a template names a column that is not there.
    """
    found: dict[str, None] = {}
    for name in names:
        parts = () if name in there else columns_in(name)
        for part in parts:
            if part not in there:
                raise FedSieveError(
                    f"no column {quoted(part)}, which {shown(name)} names{nearest(part, there)}"
                )
        found |= dict.fromkeys(parts or (name,))
    return list(found)


def possible(names: Iterable[str]) -> Iterator[str]:
    """The columns that might be read for these, where it is not known yet what is there."""
    for name in names:
        yield name
        with suppress(FedSieveError):
            yield from columns_in(name)


def filled(rows: Dataset, names: Iterable[str]) -> Dataset:
    """The rows with a column for each of the names that is a template.

    A row is null there if what would be filled in cannot be: `bad` says why. Raises FedSieveError
    as `used` does.
    """
    for name in dict.fromkeys(names):
        if name not in rows.column_names and columns_in(name):
            used([name], rows.column_names)
            values = [None if bad else text for text, bad in _texts(rows, name)]
            if rows._indices is not None:
                rows = rows.flatten_indices(keep_in_memory=True)  # or it would be done on the disk
            rows = rows.add_column(name, pa.array(values, pa.large_string()))
    return rows


def bad(rows: Dataset, names: Iterable[str]) -> dict[int, FedSieveError]:
    """The rows in which a filled template lacks a value, and what stands in its place."""
    found: dict[int, FedSieveError] = {}
    for name in names:
        if name in rows.column_names and rows.data.column(name).null_count:
            with suppress(FedSieveError):  # of a column that is only called so
                used([name], {*rows.column_names} - {name})
                told = enumerate(_texts(rows, name))
                found = {row: wrong for row, (_, wrong) in told if wrong is not None} | found
    return found


def shown(template: str) -> str:
    """A template as an error quotes it."""
    return repr(template if len(template) <= 60 else f"{template[:57]}...")


def _parts(template: str) -> Iterator[tuple[str | None, str]]:
    """The pieces of a template: a column's name, or a text as it stands."""
    for piece in _PIECES.finditer(template):
        brace, name, alone = piece.groups()
        if alone is not None:
            raise FedSieveError(
                f"{shown(template)} has a brace that belongs to no {{column}}: write "
                f"{alone * 2} for one in the text"
            )
        if name is not None and (not name.strip() or _MORE.search(name)):
            raise FedSieveError(
                f"{shown(template)}: {{{name}}} is no plain name of a column, and nothing else "
                "stands between braces (no parts of values, no formats): write {{ for a brace"
            )
        yield name, brace[0] if brace else piece[0]


def _texts(rows: Dataset, template: str) -> Iterator[tuple[str, FedSieveError | None]]:
    """Each row's text, or what is wrong with the row."""
    values = {name: _values(rows, name) for name in columns_in(template)}
    parts = list(_parts(template))
    if len(parts) > _PIECES_MOST:
        raise FedSieveError(
            f"{shown(template)} has {len(parts):,} pieces: a template has at most {_PIECES_MOST:,}"
        )
    for row in range(len(rows)):
        own = {name: column[row] for name, column in values.items()}
        wrong = next((each for each in own.values() if isinstance(each, FedSieveError)), None)
        pieces = [part if name is None else str(own[name]) for name, part in parts]
        if wrong is None and sum(map(len, pieces)) > LETTERS:
            wrong = FedSieveError(
                f"row {row} of {shown(template)} would have {sum(map(len, pieces)):,} letters: at "
                f"most {LETTERS:,} are read"
            )
        yield "" if wrong else "".join(pieces), wrong


def values_of(rows: Dataset, name: str) -> list[Any]:
    """A column's values as they are stored, and `Unread` for what Python cannot have: dates beyond
    its own, zones that it does not know. Raises FedSieveError where the column is damaged.

    What a file's own note takes for an image, a sound, a film or a page is not decoded: that would
    run decoders over it, open files of this machine, and ask other machines.
    """
    try:
        stored = rows.with_format("arrow")[name][:]
        stored.validate(full=True)  # what leads out of its own bytes would end the process
        try:
            values: list[Any] = stored.to_pylist()
        except _BEYOND as error:
            raise_of_memory(error)
            values = [_one(value) for value in stored]  # so that one cell is not all of them
    except Exception as error:  # whatever pyarrow, `datasets` and its decoders may raise
        raise_of_memory(error)
        why = f"holds values that cannot be read: {with_type(error)}"
        raise FedSieveError(f"column {name!r} {why}") from error
    return values


def _one(stored: Any) -> Any:
    try:
        return stored.as_py()
    except _BEYOND as error:
        raise_of_memory(error)
        return Unread(
            f"a {printable(str(stored.type))[:60]} that cannot be read: {with_type(error)}"
        )


def _values(rows: Dataset, name: str) -> list[str | FedSieveError]:
    """A column's values as they are filled in, or what is wrong with them."""
    feature = rows.features[name]
    told = [*map(clean, feature.names)] if isinstance(feature, ClassLabel) else None
    made: list[str | FedSieveError] = []
    for row, value in enumerate(values_of(rows, name)):
        try:
            made.append(_value(value, told))
        except FedSieveError as error:
            made.append(FedSieveError(f"row {row} of column {name!r} {error}"))
    return made


def _value(value: Any, told: list[str] | None) -> str:
    if isinstance(value, str):
        return value
    text = name_among(value, told)
    if text is None:
        raise FedSieveError("holds nothing, where a template fills in a text")
    return text
