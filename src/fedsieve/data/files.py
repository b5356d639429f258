"""One data file as a `datasets.Dataset`.

Files are read with pyarrow into memory rather than through `datasets`' builders: those write a copy
of every file into a cache, and read the words "NA", "None" and "null" in a text as missing values.
CSV follows RFC 4180 (quotes, quoted newlines). TSV is read without quoting, as GLUE's files need:
there a quotation mark is part of the sentence. `.tab` is Orange's format, with three header lines:
names, types, roles. In all three every cell is a text: nothing is guessed from how it looks
(names.py says what follows for labels and clients). JSON and Parquet have types, which stay. All
but Parquet may be gzipped.

Of a file only the columns that are used are read: the others may be nested, binary, damaged or
there twice.
"""

import codecs
import csv
import io
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pa_parquet
from datasets import Dataset, DatasetInfo, Features

from fedsieve.data.names import kind_of
from fedsieve.data.paths import EXTENSIONS, extension_of
from fedsieve.data.templates import used
from fedsieve.disk import refuse_holes
from fedsieve.errors import FedSieveError, TooWide, nearest, quoted, raise_of_memory, words

# A file may unpack to so many times its size: real rows do to 20 times, one letter to 1,000.
_TIMES, _SMALL = 200, 1 << 25  # and to so many bytes in any case
_ROWS = 256  # of a Parquet file, that are looked at together
_FEW = 5  # lines of a cell of which nothing is said
_WIDEST = 10_000  # columns of a table of texts
_ROW = 1 << 24  # bytes of a row of a table of texts
MOST_LOOKED_AT = 1_000  # where none are named
_NESTS = (Mapping, list, tuple, np.ndarray)
DEEPEST = 32  # lists and objects in one another
MOST_NESTED = 1_000_000  # at one depth of one value
MOST_CELLS = 50_000_000  # of a column: its values, times the keys that its objects have
_KEYS = 1000  # so many any column may have
_DELIMITED = {".csv": ",", ".tsv": "\t"}
_SEPARATORS, _HEAD = (",", ";", "\t", "|"), 1 << 16  # that are looked for, in so many bytes
# Orange's names for a column's type; "a b c" (the values themselves) is allowed there as well.
_ORANGE_TYPES = frozenset({"d", "discrete", "s", "string", "c", "continuous", "t", "time", ""})


class Columns(NamedTuple):
    """The columns of a table that are used: as texts, and as names (labels, clients: names.py).

    A template (templates.py) among the texts stands for the columns that it names.
    """

    texts: tuple[str, ...] = ()
    names: tuple[str, ...] = ()


def read(
    path: Path,
    *,
    names: Sequence[str] | None = None,
    separator: str | None = None,
    field: str | None = None,
    columns: Columns | None = None,
) -> Dataset:
    """The rows of one file.

    names, separator: for CSV and TSV, and field: for JSON, as in `sources.load`
    columns: those that are read; by default all
    Raises FedSieveError: an unknown extension, an empty or malformed file, an option that does not
    apply, a column that is not there, twice there, or of a type that no column can have.
    """
    extension = extension_of(path)
    if extension not in EXTENSIONS:
        raise FedSieveError(
            f"{path} has the unknown extension {extension!r}: "
            f"FedSieve reads {', '.join(EXTENSIONS)}, all but the last also as .gz"
        )
    if path.stat().st_size == 0:
        raise FedSieveError(f"{path} is empty")
    refuse_no_text(str(path))
    if extension not in _DELIMITED and (names is not None or separator is not None):
        raise FedSieveError(f"{path}: names and separator are for CSV and TSV files")
    if extension != ".json" and field is not None:
        raise FedSieveError(f"{path}: field {field[:40]!r} is for JSON files (.json)")
    try:
        refuse_holes(path)
        if extension != ".parquet":
            _refuse_utf16(path)
            _refuse_endless_zip(path)
        if extension in _DELIMITED:
            mark = _DELIMITED[extension] if separator is None else separator
            table = _delimited(path, columns, names, mark, quoted=extension == ".csv")
        elif extension == ".tab":
            table = _orange(path, columns)
        elif extension == ".parquet":
            table = _parquet(path, columns)
        else:
            table = _json(path, columns, field)
    except (pa.ArrowException, UnicodeError, OSError) as error:  # of what it holds, or is called
        if "Empty CSV file" in str(error):
            raise FedSieveError(f"{path} holds no rows") from error
        if "straddling object" in str(error):
            raise FedSieveError(
                f"{path} has a row of more than {_ROW >> 20} MiB: a CSV's rows are shorter. If it "
                "is right, give it as Parquet or JSONL"
            ) from error
        other = separator_of(path) if separator is None else None
        if other is not None:
            raise FedSieveError(
                f"{path} could not be read: {other!r} seems to stand between its columns: say so, "
                f"data.separator = {other!r}"
            ) from error
        # pyarrow quotes the row after what is wrong with it.
        why = re.sub(r"(Expected \d+ columns, got \d+): .*", r"\1", words(error))
        raise FedSieveError(f"{path} could not be read: {why}") from error
    if table.num_rows == 0:
        raise FedSieveError(f"{path} holds no rows")
    return _dataset(path, table)


def refuse_no_text(name: str) -> None:
    """Raises FedSieveError for a path that no text can hold, and so no table or recipe."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise FedSieveError(
            f"{name!a} could not be read: its name is no UTF-8: rename it"
        ) from None


def separator_of(path: Path) -> str | None:
    """The separator of a CSV or TSV file, by its first lines, where it is not the usual one of such
    files; else None.
    """
    usual = _DELIMITED.get(extension_of(path))
    if usual is None:
        return None
    try:
        with _opened(path) as file:
            head = file.read(_HEAD).decode("utf-8-sig", errors="replace")
    except OSError:  # `read` says so
        return None
    if len(head) >= _HEAD // 4:  # the last line may be part of one
        head = head.rpartition("\n")[0] or head
    widths = {mark: _width(head, mark) for mark in dict.fromkeys((usual, *_SEPARATORS))}
    best = max(widths, key=lambda mark: widths[mark])
    return None if best == usual else best


def _width(head: str, mark: str) -> int:
    """How many columns these lines have with a separator, if nearly all have as many as the first.

    One column is no sign of a separator: 0.
    """
    lines = io.StringIO(head)
    # In TSV a quotation mark is part of the text.
    quoting: Literal[0, 3] = csv.QUOTE_NONE if mark == "\t" else csv.QUOTE_MINIMAL
    try:
        widths = [len(row) for row in csv.reader(lines, delimiter=mark, quoting=quoting) if row]
    except csv.Error:
        return 0
    alike = bool(widths) and widths.count(widths[0]) >= 0.9 * len(widths)
    return widths[0] if alike and widths[0] > 1 else 0


def array_of(values: Sequence[Any], what: str, place: Callable[[int], str]) -> pa.Array:
    """A column from Python's values, which are all of one kind, or None.

    what: the column, in an error; place: of a value, by its number, in an error
    Raises FedSieveError naming the first value that is of another kind than those before it, or
    that a column cannot hold.
    """
    refuse_wild(values, what, place)
    first: tuple[str, int] | None = None
    for number, value in enumerate(values):
        if value is None:
            continue
        kind = kind_of(value)
        if first is None:
            first = kind, number
        elif kind != first[0]:
            raise FedSieveError(
                f"{place(number)} has {kind} in {what}, and {place(first[1])} has {first[0]}: "
                "write all of them alike"
            )
    try:
        return _array(values)
    except UnicodeEncodeError as error:
        odd = next(n for n, value in enumerate(values) if value == error.object)
        raise FedSieveError(f"{place(odd)} has half a character in {what}: {error}") from None
    except (pa.ArrowException, ArithmeticError, TypeError, ValueError) as error:
        odd = _first_odd(values)
        why = words(error)
        raise FedSieveError(
            f"{place(odd)} has a value in {what} that no column can hold: {why}"
        ) from None


def refuse_wild(values: Iterable[Any], what: str, place: Callable[[int], str]) -> None:
    """Raises FedSieveError, naming the value, for lists and objects that are nested too deep, or
    hold too many keys for how many values there are: as a column each key takes room in each value,
    and what makes columns goes down without looking where it ends.
    """
    keys: dict[tuple[int, str], int] = {}  # under a key, a key -> the number of both
    for number, value in enumerate(values):
        if not isinstance(value, _NESTS):
            continue
        level: list[tuple[int, Any]] = [(0, value)]
        for _ in range(DEEPEST):
            inner = (one for under, each in level for one in _inside(under, each, keys))
            level = list(islice(inner, MOST_NESTED))
            if not level or len(level) == MOST_NESTED:
                break
        if level:
            raise FedSieveError(
                f"{place(number)} has lists or objects in {what} that are nested more than "
                f"{DEEPEST} deep, or {MOST_NESTED:,} and more of them"
            )
        if len(keys) > _KEYS and len(keys) * (number + 1) > MOST_CELLS:
            raise FedSieveError(
                f"{what} holds objects of {len(keys):,} different keys by {place(number)}, and a "
                "column has room for each key in each row: write such objects as texts"
            )


def _inside(under: int, value: Any, keys: dict[tuple[int, str], int]) -> Iterator[tuple[int, Any]]:
    """What nests in a list or an object, each under its key."""
    if isinstance(value, np.ndarray) and value.dtype != object:
        return
    if isinstance(value, Mapping):
        for key, inner in value.items():
            below = keys.setdefault((under, str(key)), len(keys) + 1)
            if isinstance(inner, _NESTS):
                yield below, inner
        return
    for inner in value:
        if isinstance(inner, _NESTS):
            yield under, inner


def _array(values: Sequence[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except OverflowError:  # integers of more than 64 bits
        return pa.array([None if value is None else Decimal(value) for value in values])


def _first_odd(values: Sequence[Any]) -> int:
    """The first value that cannot be in one column with those before it."""
    low, high = 0, len(values) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if _can_be(values[: middle + 1]) else (low, middle)
    return low


def _can_be(values: Sequence[Any]) -> bool:
    """Whether values can be a column."""
    try:
        _array(values)
    except Exception:  # whatever a value's own code may raise
        return False
    return True


def _chosen(path: Path, found: Sequence[str], columns: Columns | None) -> list[str]:
    """The columns to read of those that a file has."""
    if columns is None and len(found) > MOST_LOOKED_AT:
        raise TooWide(
            f"{path} has {len(found):,} columns, too many to take all: a recipe names those that "
            "are used, and no others are read (`fedsieve init` is told them by --text and --label)"
        )
    try:
        return chosen(found, columns)
    except FedSieveError as error:
        raise FedSieveError(f"{path}: {error}") from None


def chosen(found: Sequence[str], columns: Columns | None) -> list[str]:
    """The columns that are used of those that are found; None takes all.

    Raises FedSieveError, with the nearest, for one that is not there, and for one that is twice.
    """
    names = found if columns is None else (*used(columns.texts, found), *columns.names)
    there = Counter(found)
    for name in (each := list(dict.fromkeys(names))):
        if name not in there:
            raise FedSieveError(f"no column {quoted(name)}{nearest(name, there)}")
        if there[name] > 1:
            raise FedSieveError(f"it has the column {name!r} more than once")
    return each


def _delimited(
    path: Path, columns: Columns | None, names: Sequence[str] | None, separator: str, quoted: bool
) -> pa.Table:
    """CSV or TSV, with a header line unless the names are given."""
    if len(separator) != 1 or not separator.isascii() or separator in '\0\r\n"':
        raise FedSieveError(
            f"separator {separator[:20]!r}: one character of ASCII is needed, and none that ends a "
            "line or quotes a cell"
        )
    return _texts(
        path,
        columns,
        pa_csv.ReadOptions(column_names=None if names is None else list(names)),
        pa_csv.ParseOptions(
            delimiter=separator, quote_char='"' if quoted else False, newlines_in_values=quoted
        ),
    )


def _orange(path: Path, columns: Columns | None) -> pa.Table:
    """Orange's tab format. Lines two and three (types, roles) are no rows, nor are blank lines."""
    head = _content(path).split("\n", 3)[:3]
    header, types, roles = ([*(line.rstrip("\r").split("\t") for line in head), [], [], []])[:3]
    if not len(header) == len(types) == len(roles) or not _ORANGE_TYPES.intersection(types):
        raise FedSieveError(
            f"{path} does not begin with Orange's three header lines (names, types, roles): "
            "name a plain tab-separated file .tsv"
        )
    table = _texts(
        path,
        columns,
        pa_csv.ReadOptions(skip_rows_after_names=2),
        pa_csv.ParseOptions(delimiter="\t", newlines_in_values=True),
    )
    blank = pa.scalar(True)
    for values in table.columns:
        blank = pc.and_(blank, pc.equal(values, ""))
    return table.filter(pc.invert(blank))


def _texts(path: Path, columns: Columns | None, reading: Any, parsing: Any) -> pa.Table:
    """A table of texts that a character separates."""
    reading.block_size = _ROW
    _refuse_wide(path, parsing.delimiter, quoted=bool(parsing.quote_char))
    if parsing.quote_char:
        _refuse_stray_marks(path, parsing.delimiter)
    with _opened(path) as file, pa_csv.open_csv(file, reading, parsing) as first:
        found = first.schema.names
    chosen = _chosen(path, found, columns)
    with _opened(path) as file:
        # As bytes, so that what is no UTF-8 does not matter in a column that is not used.
        kinds = {"column_types": dict.fromkeys(found, pa.binary()), "include_columns": chosen}
        table = pa_csv.read_csv(file, reading, parsing, pa_csv.ConvertOptions(**kinds))
    for place, name in enumerate(chosen):
        try:
            table = table.set_column(place, name, table[name].cast(pa.string()))
        except pa.ArrowInvalid:
            raise FedSieveError(
                f"{path}: column {name!r} is not UTF-8 text: save it as UTF-8"
            ) from None
    return table


def _refuse_wide(path: Path, separator: str, *, quoted: bool) -> None:
    """Raises FedSieveError for more columns than a table of rows has: each takes room of its own
    while a file is read, also those that are not used.
    """
    with _opened(path) as file:
        head = io.StringIO(file.read(_SMALL).removeprefix(codecs.BOM_UTF8).decode("latin-1"))
    # As many as the first line with anything in it has, which a cell's line break may be part of.
    before = csv.field_size_limit(1 << 62)
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    try:
        cells = csv.reader(head, delimiter=separator, quoting=quoting)
        found = next((len(line) for line in cells if line), 0)
    except csv.Error:  # a stray mark, which is told elsewhere
        found = 0
    finally:
        csv.field_size_limit(before)
    if found > _WIDEST:
        raise FedSieveError(
            f"{path} has {found:,} columns: at most {_WIDEST:,} are read. If they are one each for "
            "words or pixels, give the texts or images themselves"
        )


def _refuse_stray_marks(path: Path, separator: str) -> None:
    """Raises FedSieveError where something follows the mark that ends a cell in quotation marks,
    or where none ends it: pyarrow goes on to some later mark, and makes one cell of many rows.

    Warns of a cell whose lines all look like rows: of two marks astray, each can end the other's.
    """
    with _opened(path) as file:
        if not any(b'"' in part for part in iter(lambda: file.read(1 << 24), b"")):
            return
    with _opened(path) as file, io.TextIOWrapper(file, "latin-1", newline="") as text:
        before = csv.field_size_limit(1 << 62)
        cells = csv.reader(text, delimiter=separator, strict=True)
        try:
            stray = _read_all(path, cells, separator)
        finally:
            csv.field_size_limit(before)
    if stray is None:
        return
    if (other := separator_of(path)) not in (None, separator):
        raise FedSieveError(
            f"{path}: {other!r} seems to stand between its columns: say so, data.separator = "
            f"{other!r}"
        )
    first, last, why = stray
    where = f"line {first}" if first == last else f"lines {first} to {last}, read as one row"
    raise FedSieveError(
        f"{path}, {where}: a quotation mark is astray ({why}): a cell that begins with one ends "
        'with one, and each inside of it is doubled ("")'
    )


def _read_all(path: Path, cells: Any, separator: str) -> tuple[int, int, csv.Error] | None:
    """The first and the last line of the row that cannot be read, and why, if there is one.

    Warns of the first cell that seems to hold rows itself.
    """
    width, found, before = 0, None, 0
    try:
        for row in cells:
            for cell in row if found is None and width > 1 else ():
                if inside := _rows_inside(cell, separator, width):
                    found = (cells.line_num, inside)
            width, before = width or len(row), cells.line_num
    except csv.Error as error:
        return before + 1, max(before + 1, cells.line_num), error
    if found is not None:
        line, swallowed = found
        warnings.warn(
            f"{path}, line {line}: the cell that ends here has {swallowed:,} lines inside, each "
            "with as many columns as the table: where two quotation marks are astray, those are "
            'rows that are read as one text. A mark that belongs to a text is doubled ("")',
            stacklevel=2,
        )
    return None


def _rows_inside(cell: str, separator: str, width: int) -> int:
    """How many lines a cell has between its first and its last; 0 where one has another number of
    columns, or they are few. Line by line, since a cell may be as long as the file.
    """
    ends = cell.count("\n")
    if ends <= _FEW:
        return 0
    start = cell.index("\n") + 1
    for _ in range(ends - 1):
        end = cell.index("\n", start)
        if cell.count(separator, start, end) != width - 1:
            return 0
        start = end + 1
    return ends - 1


def _refuse_endless(path: Path, sizes: Iterator[int]) -> None:
    """Raises FedSieveError for a file that unpacks to far more than it has.

    sizes: bytes of its parts, unpacked one after another
    """
    most, found = max(_SMALL, _TIMES * path.stat().st_size), 0
    for size in sizes:
        found += size
        if found > most:
            raise FedSieveError(
                f"{path} unpacks to more than {_TIMES} times its {path.stat().st_size} bytes: it "
                "is damaged, or made to fill the memory. If its rows are what they should be, give "
                "it unpacked, as CSV or JSONL"
            )


def _refuse_endless_zip(path: Path) -> None:
    if path.name.lower().endswith(".gz"):
        with _opened(path) as file:
            _refuse_endless(path, iter(lambda: len(file.read(1 << 20)), 0))


def _parquet(path: Path, columns: Columns | None) -> pa.Table:
    file = pa_parquet.ParquetFile(path)
    chosen = _chosen(path, file.schema_arrow.names, columns)
    _refuse_lies(path, file.metadata)
    # What a file says of its size leaves out how often each entry of a dictionary occurs.
    parts = _parts(path, file, chosen or None)
    found = 0

    def counted(part: pa.RecordBatch) -> int:
        nonlocal found
        found += part.num_rows
        return _unpacked(part)

    _refuse_endless(path, map(counted, parts))
    if found != file.metadata.num_rows:  # `read` would make room for as many as are said
        raise FedSieveError(
            f"{path} is damaged: it is said to have {file.metadata.num_rows} rows, and has {found}"
        )
    table = file.read(chosen) if chosen else file.read()
    for place, (name, values) in enumerate(zip(table.column_names, table.columns, strict=True)):
        if pa.types.is_dictionary(values.type):  # pandas' categories
            table = table.set_column(place, name, values.cast(values.type.value_type))
        _refuse_other_bytes(path, name, table.column(name))
    return table.select(chosen)  # `read` takes a.b for the column b inside of a, too


def _parts(path: Path, file: Any, chosen: list[str] | None) -> Iterator[pa.RecordBatch]:
    """The rows of a Parquet file, some at a time.

    In each part of the file the entries of dictionaries are looked at first, and where one is long
    they are not written out: few bytes say how often it occurs, and 256 times is too often already.
    """
    paths = [file.schema.column(number).path for number in range(len(file.schema))]
    short = pa_parquet.ParquetFile(path, metadata=file.metadata, read_dictionary=paths)
    for number in range(file.metadata.num_row_groups):
        told = {"row_groups": [number], "columns": chosen}
        one = next(short.iter_batches(batch_size=1, **told), None)
        if one is None:
            continue
        rows = max(1, min(_ROWS, _SMALL // max(1, _unpacked(one))))
        some = next(short.iter_batches(batch_size=rows, **told))  # a first list may be empty
        entries = [each.dictionary for column in some.columns for each in _dictionaries(column)]
        longest = max(map(_longest, entries), default=0)
        source = file if longest * _ROWS <= _SMALL else short
        yield from source.iter_batches(batch_size=rows, **told)


def _refuse_lies(path: Path, told: Any) -> None:
    """Raises FedSieveError for numbers of rows that do not go together, or for more than such a
    file holds: room would be made for them. What is told of single columns is not looked at:
    pyarrow ends the process over some of what may stand there.
    """
    parts = [told.row_group(number).num_rows for number in range(told.num_row_groups)]
    rows, size = max(told.num_rows, sum(parts)), path.stat().st_size
    if rows > max(_SMALL, _TIMES * size):
        raise FedSieveError(
            f"{path} is said to have {rows} rows, and unpacks to more than {_TIMES} times its "
            f"{size} bytes: it is damaged, or made to fill the memory"
        )
    if told.num_rows != sum(parts) or min(parts, default=0) < 0:
        raise FedSieveError(
            f"{path} is damaged: it is said to have {rows} rows, in parts of {sum(parts)} together"
        )


def _refuse_other_bytes(path: Path, name: str, values: pa.ChunkedArray) -> None:
    """Raises FedSieveError for what the file calls a text, or whatever it is, and is none."""
    row = 0
    for chunk in values.chunks:
        try:
            chunk.validate(full=True)
        except pa.ArrowInvalid as error:
            raise FedSieveError(
                f"{path}: column {name!r} is damaged in rows {row} to {row + len(chunk) - 1}: "
                f"{words(error, 200)}"
            ) from None
        row += len(chunk)


_TEXTS = (
    *(pa.types.is_string, pa.types.is_large_string),
    *(pa.types.is_binary, pa.types.is_large_binary),
)
_LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)


def _unpacked(part: pa.RecordBatch) -> int:
    """Bytes of some rows where every entry is written out."""
    # Of a column of nulls nothing else counts than its rows.
    found: int = part.nbytes + part.num_rows + sum(map(_of_dictionaries, part.columns))
    return found


def _of_dictionaries(values: pa.Array) -> int:
    """Bytes that the entries of dictionaries take where each is written out, at any depth, beyond
    those of the dictionaries themselves.
    """
    return sum(_written_out(each) - int(each.dictionary.nbytes) for each in _dictionaries(values))


def _written_out(values: pa.Array) -> int:
    entries = values.dictionary
    if _is_text(entries):
        lengths = pc.take(pc.binary_length(entries), values.indices)
        return int(pc.sum(lengths).as_py() or 0)
    return len(values) * math.ceil(int(entries.nbytes) / max(1, len(entries)))


def _longest(entries: pa.Array) -> int:
    """Bytes of a dictionary's longest entry; 0 for one of no texts."""
    return int(pc.max(pc.binary_length(entries)).as_py() or 0) if _is_text(entries) else 0


def _is_text(values: pa.Array) -> bool:
    return any(is_a(values.type) for is_a in _TEXTS)


def _dictionaries(values: pa.Array) -> Iterator[pa.Array]:
    """Those in a column, at any depth, with the numbers of their entries."""
    kind = values.type
    if pa.types.is_dictionary(kind):
        yield values
    elif isinstance(values, pa.ExtensionArray):
        yield from _dictionaries(values.storage)
    elif pa.types.is_struct(kind):
        for each in values.flatten():
            yield from _dictionaries(each)
    elif pa.types.is_map(kind):
        yield from _dictionaries(values.keys)
        yield from _dictionaries(values.items)
    elif any(is_a(kind) for is_a in _LISTS):
        yield from _dictionaries(values.flatten())


def _json(path: Path, columns: Columns | None, field: str | None) -> pa.Table:
    """A list of objects, which may lie in an object, or one object a line. A key that a row lacks
    is null there.
    """
    content = _content(path)
    rows: list[Any] = []
    lines: list[int] = []  # of each row, where there is one a line
    if field is not None:
        rows = _under(path, _parsed(path, content), field)
    elif content.lstrip().startswith("["):
        rows = _parsed(path, content)
    else:
        if columns is not None and extension_of(path) == ".json":
            _refuse_rows_inside(path, content, columns)
        # Only \n ends a line: str.splitlines would also cut at characters that JSON allows in text.
        for number, line in enumerate(content.split("\n"), start=1):
            if line.strip():
                try:
                    rows.append(json.loads(line, object_pairs_hook=_object))
                except json.JSONDecodeError as error:  # which has lines of its own
                    raise FedSieveError(
                        f"{path}, line {number}: not a JSON object ({error.msg}, at character "
                        f"{error.colno})"
                    ) from None
                except (ValueError, RecursionError) as error:
                    raise FedSieveError(
                        f"{path}, line {number}: not a JSON object ({error})"
                    ) from None
                lines.append(number)
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise FedSieveError(f"{path}, row {number}: {type(row).__name__} instead of an object")
    if not rows:
        raise FedSieveError(f"{path} holds no rows")

    def place(number: int) -> str:
        return f"line {lines[number]}" if lines else f"row {number}"

    table = {}
    chosen_keys = _chosen(path, list(dict.fromkeys(key for row in rows for key in row)), columns)
    for key in chosen_keys:
        try:
            table[key] = array_of([row.get(key) for row in rows], f"column {key!r}", place)
        except FedSieveError as error:
            raise FedSieveError(f"{path} could not be read: {error}") from None
    return pa.table(table)


def _parsed(path: Path, content: str) -> Any:
    try:
        return json.loads(content, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise FedSieveError(f"{path} is not valid JSON: {words(error)}") from None


def _under(path: Path, whole: Any, field: str) -> list[Any]:
    """The rows under a key of the object that a file is, or under keys joined by dots."""
    if not isinstance(whole, dict):
        raise FedSieveError(f"{path} is a list and has no field {field[:40]!r}: leave it out")
    found: Any = whole
    for key in [field] if field in whole else field.split("."):
        if not isinstance(found, dict) or key not in found:
            raise FedSieveError(
                f"{path} has no field {field[:40]!r}{nearest(field, _fields(whole))}"
            )
        found = found[key]
    if not isinstance(found, list):
        raise FedSieveError(
            f"{path}: under {field[:40]!r} there is {kind_of(found)}, and no list of rows"
            f"{nearest(field, _fields(whole))}"
        )
    return found


def _fields(whole: Any, before: str = "", depth: int = 3) -> dict[str, int]:
    """The keys, joined by dots, under which an object holds rows, and how many."""
    found: dict[str, int] = {}
    for key, value in whole.items() if isinstance(whole, dict) else ():
        if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            found[before + key] = len(value)
        elif isinstance(value, dict) and depth > 1:
            found |= _fields(value, f"{before}{key}.", depth - 1)
    return found


def field_of(path: Path) -> str | None:
    """The key under which a JSON file that is one object holds rows, the most of them; else None.

    Keys of objects in objects are joined by dots.
    """
    if extension_of(path) != ".json":
        return None
    try:
        _refuse_endless_zip(path)
        found = _fields(_one(_content(path)))
    except (OSError, UnicodeDecodeError):  # `read` says so
        return None
    return max(found, key=lambda field: found[field], default=None)


def _one(content: str) -> Any:
    """What a text is as JSON, where it is a single object; None where it is anything else."""
    if not content.lstrip().startswith("{"):
        return None
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _refuse_rows_inside(path: Path, content: str, columns: Columns) -> None:
    """Raises FedSieveError for an object that holds rows, and is none with these columns."""
    whole = _one(content)
    found = _fields(whole)
    if not found:
        return
    try:
        chosen(list(whole), columns)
    except FedSieveError:
        places = " or ".join(f"data.field = {field!r}" for field in list(found)[:4])
        raise FedSieveError(
            f"{path} is one object, whose rows lie under a key of it: say {places}"
        ) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"it has the key {twice[:80]!r} more than once")
    return found


def _dataset(path: Path, table: pa.Table) -> Dataset:
    """The table with the features that `datasets` noted in it (names of classes), where it did."""
    for field in table.schema:
        level = [field.type]
        for _ in range(DEEPEST):
            level = [each.field(n).type for each in level for n in range(each.num_fields)]
        if level:
            raise FedSieveError(
                f"{path} has a column {field.name[:80]!r} whose type is nested more than {DEEPEST} "
                "deep"
            )
    try:
        features = Features.from_arrow_schema(table.schema)
        return Dataset(table.replace_schema_metadata(None), info=DatasetInfo(features=features))
    except Exception as error:  # whatever `datasets` may raise over a stranger's note
        raise_of_memory(error)
        raise FedSieveError(
            f"{path} has a column of a type that cannot be used: {words(error)}"
        ) from error


def _refuse_utf16(path: Path) -> None:
    with _opened(path) as file:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise FedSieveError(f"{path} is UTF-16 or UTF-32: save it as UTF-8")


def _opened(path: Path) -> Any:
    """A file's bytes, unzipped."""
    zipped = path.name.lower().endswith(".gz")
    return pa.input_stream(str(path), compression="gzip" if zipped else None)


def _content(path: Path) -> str:
    with _opened(path) as file:
        return str(file.read().decode("utf-8-sig"))
