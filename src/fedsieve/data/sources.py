"""Where rows come from: files, folders, fetched names and the hub, all as a `datasets.Dataset`.

Files are read with pyarrow into memory rather than through `datasets`' builders: those write a copy
of every file into a cache, and read the words "NA", "None" and "null" in a text as missing values.
CSV follows RFC 4180 (quotes, quoted newlines). TSV is read without quoting, as GLUE's files need:
there a quotation mark is part of the sentence. `.tab` is Orange's format, with three header lines:
names, types, roles. Any of them may be gzipped.
"""

import gzip
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pa_parquet
from datasets import Dataset, DatasetDict

from fedsieve.data import fetch
from fedsieve.errors import FedSieveError, nearest

EXTENSIONS = (".csv", ".tsv", ".tab", ".json", ".jsonl", ".parquet")
_DELIMITED = {".csv": ",", ".tsv": "\t"}
_SPLITS = frozenset({"train", "test", "dev", "val", "valid", "validation", "eval"})
# Orange's names for a column's type; "a b c" (the values themselves) is allowed there as well.
_ORANGE_TEXT = frozenset({"d", "discrete", "s", "string"})
_ORANGE_TYPES = _ORANGE_TEXT | {"c", "continuous", "t", "time", ""}


def load(
    source: str | Path | Sequence[str | Path],
    split: str | None = None,
    *,
    config: str | None = None,
    names: Sequence[str] | None = None,
    separator: str | None = None,
) -> Dataset:
    """Rows from a file, a list of files, a folder, a fetched name, or a data set on the hub.

    source: a fetched name (`fedsieve fetch`) comes first, then a path that exists, then the hub;
        write `./name` for a folder that is called like a fetched name.
    split: which part. In a folder of files, those with this word in their name (`news-train.csv`);
        refused for files, which have no splits.
    config: the hub data set's configuration (`load_dataset(source, config)`).
    names: column names of CSV or TSV files that have no header line.
    separator: one character, instead of the comma of CSV or the tab of TSV.

    Raises FedSieveError: nothing there, an unknown extension, an empty or malformed file, an
    unknown split, an option that does not apply.
    """
    if not isinstance(source, str | Path):
        if not source:
            raise FedSieveError("the list of data files is empty")
        return _files([_existing(Path(path)) for path in source], split, names, separator)
    if isinstance(source, str) and source in fetch.PACKAGES:
        return _folder(fetch.cached(source), split, names, separator)
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path, split, names, separator)
    if path.is_file() or isinstance(source, Path) or _is_path(source):
        return _files([_existing(path)], split, names, separator)
    if names is not None or separator is not None:
        raise FedSieveError(f"{source}: names and separator are for CSV and TSV files")
    return _hub(source, config, split)


def column(dataset: Dataset, name: str) -> list[Any]:
    """The values of one column, in row order. Raises FedSieveError when there is no such column."""
    if name not in dataset.column_names:
        raise FedSieveError(f"no column {name!r}{nearest(name, dataset.column_names)}")
    values: list[Any] = dataset.with_format(None)[name][:]
    return values


def _files(
    paths: Sequence[Path],
    split: str | None,
    names: Sequence[str] | None,
    separator: str | None,
) -> Dataset:
    """The rows of all files, one file after another."""
    if split is not None:
        raise FedSieveError(
            f"{paths[0]} is a file and has no split {split!r}: leave the split out, "
            "or name the folder"
        )
    return _as_dataset(paths, [_table(path, names, separator) for path in paths])


def _folder(
    folder: Path,
    split: str | None,
    names: Sequence[str] | None,
    separator: str | None,
) -> Dataset:
    """A folder that `datasets` saved, or the data files directly in it."""
    if any((folder / mark).is_file() for mark in ("state.json", "dataset_dict.json")):
        with _no_progress_bars():
            return _pick(datasets.load_from_disk(str(folder)), split, str(folder))
    paths = [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and _extension(path) in EXTENSIONS and not path.name.startswith(".")
    ]
    if not paths:
        raise FedSieveError(f"no data file in {folder} (looked for {', '.join(EXTENSIONS)})")
    words = {path: set(re.split(r"[\W_]+", path.name.lower())) for path in paths}
    if split is None:
        found = sorted(_SPLITS.intersection(word for each in words.values() for word in each))
        if len(found) > 1:  # never mix training and test rows unasked
            raise FedSieveError(f"{folder} holds several splits: say which of {', '.join(found)}")
        chosen = paths
    else:
        chosen = [path for path in paths if split.lower() in words[path]]
        if not chosen:
            listed = ", ".join(path.name for path in paths)
            raise FedSieveError(
                f"no file in {folder} has {split!r} as a word of its name: it holds {listed}"
            )
    return _files(chosen, None, names, separator)


def _hub(name: str, config: str | None, split: str | None) -> Dataset:
    """A data set that `datasets.load_dataset` finds: on the hub or in its cache."""
    try:
        with _no_progress_bars():
            loaded = datasets.load_dataset(name, config, split=split)
    # Whatever goes wrong in there (network, scripts, parsers), the user has to see it.
    except Exception as error:
        raise FedSieveError(
            f"{name!r} is no file, folder or fetched name here{nearest(name, fetch.PACKAGES)}, "
            f"and loading it as a data set of the hub failed: {type(error).__name__}: {error}"
        ) from error
    return _pick(loaded, split if isinstance(loaded, DatasetDict) else None, name)


def _pick(loaded: Dataset | DatasetDict, split: str | None, where: str) -> Dataset:
    """One split of what was loaded: the named one, or the only one there is."""
    if isinstance(loaded, DatasetDict):
        if split is None and len(loaded) == 1:
            split = next(iter(loaded))
        if split not in loaded:
            said = f"no split {split!r} in {where}" if split else f"{where} holds several splits"
            raise FedSieveError(f"{said}: say which of {', '.join(loaded)}")
        loaded = loaded[split]
    elif split is not None:
        raise FedSieveError(f"{where} has no splits: leave {split!r} out")
    if loaded.num_rows == 0:
        raise FedSieveError(f"{where} holds no rows")
    return loaded


def _table(path: Path, names: Sequence[str] | None, separator: str | None) -> pa.Table:
    """The rows of one file."""
    extension = _extension(path)
    if extension not in EXTENSIONS:
        raise FedSieveError(
            f"{path} has the unknown extension {extension!r}: "
            f"FedSieve reads {', '.join(EXTENSIONS)}, all but the last also as .gz"
        )
    if path.stat().st_size == 0:
        raise FedSieveError(f"{path} is empty")
    if extension not in _DELIMITED and (names is not None or separator is not None):
        raise FedSieveError(f"{path}: names and separator are for CSV and TSV files")
    try:
        if extension in _DELIMITED:
            table = _delimited(path, names, separator or _DELIMITED[extension], extension == ".csv")
        elif extension == ".tab":
            table = _orange(path)
        elif extension == ".parquet":
            table = pa_parquet.read_table(path)
        else:
            table = _json(path)
    except (pa.ArrowException, UnicodeDecodeError, OSError, EOFError) as error:
        raise FedSieveError(f"{path} could not be read: {error}") from error
    twice = [name for name, times in Counter(table.column_names).items() if times > 1]
    if twice:
        raise FedSieveError(f"{path} has the column {twice[0]!r} more than once")
    if extension != ".parquet":
        for field in table.schema:
            if pa.types.is_binary(field.type):  # pyarrow's way to say that it could not decode it
                raise FedSieveError(f"{path}: column {field.name!r} is not UTF-8 text")
    if table.num_rows == 0:
        raise FedSieveError(f"{path} holds no rows")
    return table


def _delimited(path: Path, names: Sequence[str] | None, separator: str, quoted: bool) -> pa.Table:
    """CSV or TSV, with a header line unless the names are given. Types are inferred."""
    if len(separator) != 1:
        raise FedSieveError(f"separator {separator!r}: one character is needed")
    return pa_csv.read_csv(
        path,
        read_options=pa_csv.ReadOptions(column_names=None if names is None else list(names)),
        parse_options=pa_csv.ParseOptions(
            delimiter=separator, quote_char='"' if quoted else False, newlines_in_values=quoted
        ),
    )


def _orange(path: Path) -> pa.Table:
    """Orange's tab format. Lines two and three (types, roles) are no rows, nor are blank lines."""
    opened: Any = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8-sig") as file:
        header, types, roles = (file.readline().rstrip("\r\n").split("\t") for _ in range(3))
    if not len(header) == len(types) == len(roles) or not _ORANGE_TYPES.intersection(types):
        raise FedSieveError(
            f"{path} does not begin with Orange's three header lines (names, types, roles): "
            "name a plain tab-separated file .tsv"
        )
    text = {
        name: pa.string() for name, kind in zip(header, types, strict=True) if kind in _ORANGE_TEXT
    }
    table = pa_csv.read_csv(
        path,
        read_options=pa_csv.ReadOptions(skip_rows_after_names=2),
        parse_options=pa_csv.ParseOptions(delimiter="\t", newlines_in_values=True),
        convert_options=pa_csv.ConvertOptions(column_types=text),
    )
    blank = pa.scalar(True)
    for values in table.columns:
        blank = pc.and_(blank, pc.equal(pc.fill_null(pc.cast(values, pa.string()), ""), ""))
    return table.filter(pc.invert(blank))


def _json(path: Path) -> pa.Table:
    """A list of objects, or one object a line. A key that a row lacks is null there."""
    opened: Any = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8-sig") as file:
        content = file.read()
    rows: list[Any] = []
    if content.lstrip().startswith("["):
        try:
            rows = json.loads(content)
        except json.JSONDecodeError as error:
            raise FedSieveError(f"{path} is not valid JSON: {error}") from None
    else:
        # Only \n ends a line: str.splitlines would also cut at characters that JSON allows in text.
        for number, line in enumerate(content.split("\n"), start=1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise FedSieveError(
                        f"{path}, line {number}: not a JSON object ({error})"
                    ) from None
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise FedSieveError(f"{path}, row {number}: {type(row).__name__} instead of an object")
    keys = dict.fromkeys(key for row in rows for key in row)
    return pa.table({key: pa.array([row.get(key) for row in rows]) for key in keys})


def _as_dataset(paths: Sequence[Path], tables: Sequence[pa.Table]) -> Dataset:
    try:
        table = pa.concat_tables(tables, promote_options="default")
    except pa.ArrowException as error:
        listed = ", ".join(path.name for path in paths)
        raise FedSieveError(f"the columns of {listed} do not fit together: {error}") from error
    return Dataset(table)


def _extension(path: Path) -> str:
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def _is_path(source: str) -> bool:
    return source.startswith((".", "/", "~")) or _extension(Path(source)) in EXTENSIONS


def _existing(path: Path) -> Path:
    path = path.expanduser()
    if path.is_file():
        return path
    beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    where = "" if path.parent.is_dir() else f" (nor the folder {path.parent})"
    raise FedSieveError(f"there is no file {path}{where}{nearest(path.name, beside)}")


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Silence `datasets` while loading, and leave its setting as it was found."""
    were_on = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if were_on:
            datasets.enable_progress_bars()
