"""Where rows come from: files, folders, fetched names and the hub, all as a `datasets.Dataset`.

files.py reads a single file; here is which files, which split, and what becomes of several. Data
sets of the hub have the types that `datasets` gives them.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
from datasets import ClassLabel, Dataset, DatasetDict, IterableDataset, Value
from datasets.table import InMemoryTable

from fedsieve.data import fetch, files, hub, pictures
from fedsieve.data.files import Columns, array_of
from fedsieve.data.names import clean, name_among
from fedsieve.data.paths import EXTENSIONS, extension_of, is_path
from fedsieve.data.templates import possible, used, values_of
from fedsieve.disk import bytes_of, parsed, place, refuse_links_out
from fedsieve.errors import FedSieveError, nearest, quoted, raise_of_memory, with_type, words

MOST_ROWS = 10_000_000  # of a stream
_TEXTS = frozenset({"string", "large_string", "string_view"})


def load(
    source: str | Path | Sequence[str | Path],
    split: str | None = None,
    *,
    config: str | None = None,
    names: Sequence[str] | None = None,
    separator: str | None = None,
    field: str | None = None,
    columns: Columns | None = None,
) -> Dataset:
    """Rows from a file, a list of files, a folder, a fetched name, or a data set on the hub.

    source: a fetched name (`fedsieve fetch`) comes first, then a path that exists, then the hub;
        write `./name` for a folder that is called like a fetched name.
    split: which part. In a folder of files, those with this word in their name (`news-train.csv`);
        refused for files, which have no splits.
    config: the hub data set's configuration (`load_dataset(source, config)`).
    names: column names of CSV or TSV files that have no header line.
    separator: one character, instead of the comma of CSV or the tab of TSV.
    field: the key of a JSON file under which its rows lie, where it is one object; keys of objects
        in objects are joined by dots.
    columns: those that are read; by default all. One that is used as a name and has another type in
        each of several files is read as text from all of them.

    Raises FedSieveError: nothing there, an unknown extension, an empty or malformed file, an
    unknown split, an option that does not apply, a column that is not there, is there twice, or
    cannot be one column because of its types.
    """
    reading = _Reading(split, names, separator, field, columns)
    if not isinstance(source, str | Path):
        if not source:
            raise FedSieveError("the list of data files is empty")
        return _files([_existing(Path(path)) for path in source], reading)
    if isinstance(source, str) and source in fetch.PACKAGES:
        return _folder(fetch.cached(source), reading)
    path = place(source)
    if path.is_dir():
        return _folder(path, reading)
    if path.is_file() or isinstance(source, Path) or is_path(source):
        return _files([_existing(path)], reading)
    if names is not None or separator is not None or field is not None:
        raise FedSieveError(
            f"{source}: names and separator are for CSV and TSV files, and field for JSON files"
        )
    return _only(_hub(source, config, split), columns, source)


def splits_of(source: str, config: str | None = None) -> tuple[str, ...]:
    """The splits that `load` knows of a source by their names; none where it has no splits.

    In a folder of files these are the words for splits in their names. Raises FedSieveError as
    `load` does where a data set of the hub cannot be found.
    """
    folder = fetch.cached(source) if source in fetch.PACKAGES else place(source)
    if not folder.is_dir():
        return () if folder.is_file() or is_path(source) else _hub_splits(source, config)
    if _is_saved(folder):
        saved = _saved(folder)
        return tuple(saved) if isinstance(saved, DatasetDict) else ()
    words = [word for path in _data_files(folder) for word in _words(path)]
    return tuple(dict.fromkeys(w for w in words if w in pictures.SPLITS)) or pictures.splits(folder)


def outside(source: str, splits: Sequence[str]) -> list[str]:
    """The names of a folder's data files that are in none of these splits, and so are not read."""
    folder = place(source)
    if source in fetch.PACKAGES or not folder.is_dir() or not splits or _is_saved(folder):
        return []
    asked = {split.lower() for split in splits}
    return [path.name for path in _data_files(folder) if not asked & {*_words(path)}]


def refuse_absent(name: str, config: str | None) -> None:
    """Raises FedSieveError, as `load` does, where a data set of the hub cannot be found. Its rows
    are not loaded.
    """
    with _looked_up(name):
        datasets.load_dataset_builder(name, config)


def _hub_splits(name: str, config: str | None) -> tuple[str, ...]:
    with _looked_up(name):
        return tuple(datasets.get_dataset_split_names(name, config))


def gathered(stream: IterableDataset, columns: Columns) -> Dataset:
    """The columns of a stream that are used, as a data set: the stream is read to its end.

    Raises FedSieveError for a column that no row has, or that has values of several kinds, naming
    the row; where the stream, or a function in it, raises anything; and for one that does not end.
    """
    return _gathered(stream.with_format(None), stream.features or {}, columns)


def listed(rows: Iterable[Mapping[str, Any]], columns: Columns) -> Dataset:
    """The columns of rows that are used, as a data set. Raises FedSieveError as `gathered` does."""
    return _gathered(rows, {}, columns)


def _gathered(
    rows: Iterable[Mapping[str, Any]], told: Mapping[str, Any], columns: Columns
) -> Dataset:
    """told: what is known of the columns' types"""
    values: dict[str, list[Any]] = {n: [] for n in (*possible(columns.texts), *columns.names)}
    seen: dict[str, None] = dict.fromkeys(told)
    count = 0
    try:
        for row in rows:
            count += 1
            if count > MOST_ROWS:
                break
            seen |= dict.fromkeys(row)
            for name, of_rows in values.items():
                of_rows.append(row.get(name))
    except Exception as error:  # values of other types than told; whatever its functions raise
        raise_of_memory(error)
        why = f"the stream breaks off after {count} rows: {with_type(error)}"
        raise FedSieveError(why) from error
    if count > MOST_ROWS:
        raise FedSieveError(
            f"the stream has more than {MOST_ROWS:,} rows, if it ever ends: give its beginning, as "
            "in stream.take(10_000)"
        )
    if not count:
        return Dataset.from_dict({})
    chosen = dict.fromkeys((*used(columns.texts, seen), *columns.names))
    for name in chosen:
        if name not in seen:
            raise FedSieveError(f"no column {quoted(name)}{nearest(name, seen)}")
    table = {n: array_of(values[n], f"column {n!r}", "row {}".format) for n in chosen}
    made = Dataset(pa.table(table))
    for name, feature in told.items():
        if name in chosen and isinstance(feature, ClassLabel):
            try:
                made = made.cast_column(name, feature)
            except (pa.ArrowException, LookupError, TypeError, ValueError) as error:
                raise FedSieveError(
                    f"column {name!r} holds what its {len(feature.names)} classes do not name: "
                    f"{with_type(error)}"
                ) from error
    return made


def column(dataset: Dataset, name: str) -> list[Any]:
    """The values of one column, in row order. Raises FedSieveError when there is no such column."""
    if name not in dataset.column_names:
        raise FedSieveError(f"no column {quoted(name)}{nearest(name, dataset.column_names)}")
    return values_of(dataset, name)


def names_in(dataset: Dataset, name: str) -> list[str | FedSieveError | None]:
    """The name in each row of a column (names.py): None where it is empty, and an error, naming the
    row, for a value that cannot be a name.
    """
    values, feature = column(dataset, name), dataset.features[name]
    told = [*map(clean, feature.names)] if isinstance(feature, ClassLabel) else None
    found: list[str | FedSieveError | None] = []
    for row, value in enumerate(values):
        try:
            found.append(name_among(value, told))
        except FedSieveError as error:
            found.append(FedSieveError(f"row {row} of column {name!r} {error}"))
    return found


class _Reading(NamedTuple):
    """How files are read; the fields are those of `load`."""

    split: str | None
    names: Sequence[str] | None
    separator: str | None
    field: str | None
    columns: Columns | None


def folder_of(source: str | Path) -> Path | None:
    """Where the files of a source lie; None for a data set of the hub."""
    if isinstance(source, str) and source in fetch.PACKAGES:
        return fetch.cache_folder() / source
    path = place(source)
    if path.is_dir():
        return path
    return path.parent if path.is_file() else None


def _files(paths: Sequence[Path], how: _Reading) -> Dataset:
    """The rows of all files, one file after another."""
    if how.split is not None:
        raise FedSieveError(
            f"{paths[0]} is a file and has no split {quoted(how.split)}: leave the split out, "
            "or name the folder"
        )
    read = partial(
        files.read,
        names=how.names,
        separator=how.separator,
        field=how.field,
        columns=how.columns,
    )
    return _joined({path: read(path) for path in paths}, how.columns)


def _folder(folder: Path, how: _Reading) -> Dataset:
    """A folder that `datasets` saved, or the data files directly in it."""
    split = how.split
    if _is_saved(folder):
        rows = _only(_pick(_saved(folder), split, str(folder)), how.columns, str(folder))
        try:
            return _in_memory(rows)
        except pa.ArrowInvalid as error:
            raise FedSieveError(f"{folder} is damaged: {with_type(error)}") from None
    paths = _data_files(folder)
    if not paths:
        images = pictures.by_class(folder, split)
        if images is not None:
            return _only(images, how.columns, str(folder))
        raise FedSieveError(
            f"no data file in {folder} (looked for {', '.join(EXTENSIONS)}, and for folders of "
            "images, one a class)"
        )
    words = {path: set(_words(path)) for path in paths}
    if split is None:
        found = sorted(
            pictures.SPLITS.intersection(word for each in words.values() for word in each)
        )
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
    refuse_links_out(folder, str(folder), chosen)
    return _files(chosen, how._replace(split=None))


def _data_files(folder: Path) -> list[Path]:
    """Raises FedSieveError for one that is called like a file of rows, and is none: what is passed
    over in silence are rows that are missed by nobody.
    """
    found = [
        path
        for path in sorted(folder.iterdir())
        if extension_of(path) in EXTENSIONS and not path.name.startswith(".")
    ]
    for path in found:
        if not path.is_file():
            gone = path.is_symlink() and not path.exists()
            what = "a link that leads nowhere" if gone else "no file"
            raise FedSieveError(
                f"{path} is {what}: fetch what belongs there, or take it out of the folder"
            )
    return found


def _is_saved(folder: Path) -> bool:
    """Whether `datasets` saved it."""
    return any((folder / mark).is_file() for mark in ("state.json", "dataset_dict.json"))


def _words(path: Path) -> list[str]:
    """Those that a file's name is made of."""
    return re.split(r"[\W_]+", path.name.lower())


_NOTED = 1 << 26  # bytes of what `datasets` notes of a data set: the names of a million classes


def _saved(folder: Path) -> Dataset | DatasetDict:
    """What `datasets` saved. Raises FedSieveError where it is damaged, or names other files."""
    refuse_links_out(folder, str(folder))
    for noted in ("dataset_dict.json", "state.json", "dataset_info.json"):
        for path in (folder / noted, *sorted(folder.glob(f"*/{noted}"))):
            if path.exists() and not path.is_file():
                raise FedSieveError(f"{path} is no file")
            if path.is_file() and path.stat().st_size > _NOTED:
                raise FedSieveError(
                    f"{path} has {path.stat().st_size:,} bytes: at most {_NOTED:,} are read"
                )
    splits = folder / "dataset_dict.json"
    told = parsed(bytes_of(splits, _NOTED), str(splits)) if splits.is_file() else {}
    named = told.get("splits", [])
    for name in named if isinstance(named, list) else [named]:
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".."):
            raise FedSieveError(f"{splits}: it names {str(name)[:80]!r}, which is no split in it")
    for state in (folder / "state.json", *sorted(folder.glob("*/state.json"))):
        if not state.exists():
            continue
        told = parsed(bytes_of(state, _NOTED), str(state)) if state.is_file() else {}
        listed, seen = told.get("_data_files"), set[str]()
        if told.get("_indices_data_files"):
            raise FedSieveError(
                f"{state}: another file says which of its rows count, as `datasets` 1 wrote it "
                "after a selection, and no version since reads that: load it with the version that "
                "wrote it, and save what `flatten_indices()` gives"
            )
        if listed == []:
            raise FedSieveError(f"{state}: it names no file of rows, so that there are none")
        for each in listed if isinstance(listed, list) else [None]:
            name = each.get("filename") if isinstance(each, dict) else None
            inside = isinstance(name, str) and Path(name).name == name
            if not inside or not (state.parent / str(name)).is_file():
                raise FedSieveError(
                    f"{state}: it names {str(name)[:80]!r}, which is no file in its folder"
                )
            if name in seen:
                raise FedSieveError(f"{state}: it names {str(name)[:80]!r} twice: take one out")
            seen.add(str(name))
            _refuse_cut(state.parent / str(name))
    try:
        with _no_progress_bars():
            return datasets.load_from_disk(str(folder))
    except Exception as error:  # whatever it may raise over what is there
        raise_of_memory(error)
        why = f"is not as `datasets` saved it, or damaged: {with_type(error)}"
        raise FedSieveError(f"{folder} {why}") from None


def _refuse_cut(path: Path) -> None:
    """Raises FedSieveError for a file of rows that ends elsewhere than its rows: what was cut off
    between two parts, or joined of several, Arrow takes for a whole one of fewer rows.
    """
    size = path.stat().st_size
    with pa.memory_map(str(path)) if size else pa.BufferReader(b"") as file:
        try:
            parts, at = pa.ipc.MessageReader.open_stream(file), 0
            for _ in parts:
                at = file.tell()
            end = file.tell()
        except (pa.ArrowException, OSError):
            return  # who reads the rows says what is wrong
    if at == end:
        raise FedSieveError(f"{path} is cut off: it has no end. Save or copy the rows again")
    if end != size:
        raise FedSieveError(
            f"{path} goes on behind its end, as files do that were joined: {size - end} bytes "
            "would be read by nobody. Save or copy the rows again"
        )


def _in_memory(rows: Dataset) -> Dataset:
    """A copy of rows that are mapped: they would be what the file is at any time, and where it is
    cut off, the end of the process. But not of images, of which there may be more than room for.
    """
    table = rows.data.table
    table.validate(full=True)  # numbers of a file that is damaged may lead anywhere
    if any("binary" in str(kind) for kind in table.schema.types):
        return rows
    out = pa.BufferOutputStream()
    with pa.ipc.new_stream(out, table.schema) as stream:
        stream.write_table(table)
    own = InMemoryTable(pa.ipc.open_stream(out.getvalue()).read_all())
    return Dataset(own, info=rows.info, split=rows.split)


def _hub(name: str, config: str | None, split: str | None) -> Dataset:
    """A data set that `datasets.load_dataset` finds: on the hub or in its cache."""
    with _looked_up(name):
        loaded = datasets.load_dataset(name, config, split=split)
    return _pick(loaded, split if isinstance(loaded, DatasetDict) else None, name)


@contextmanager
def _looked_up(name: str) -> Iterator[None]:
    """Around what asks the hub, or its cache, for a data set."""
    try:
        with _no_progress_bars(), hub.asked(name):
            yield
    # Whatever goes wrong in there (network, scripts, parsers), the user has to see it.
    except Exception as error:
        raise_of_memory(error)
        raise FedSieveError(_not_found(name, error)) from error


def _not_found(name: str, error: Exception) -> str:
    return (
        f"{name!r} is no file, folder or fetched name here"
        f"{nearest(name, {*fetch.PACKAGES} - {*fetch.MODELS} | _files_beside(name))}, "
        f"and {_why(error)}"
    )


def _files_beside(name: str) -> set[str]:
    """The files of rows in the folder that a name would be in, as they would be named."""
    folder = Path(name).parent
    try:
        found = [path for path in folder.iterdir() if extension_of(path) in EXTENSIONS]
    except (OSError, ValueError):
        return set()
    return {str(folder / path.name) for path in found[:1000]}


def _why(error: Exception) -> str:
    looked = "" if hub.reachable() else f" (looked up {hub.places()})"
    return f"loading it as a data set of the hub failed{looked}: {with_type(error, 500)}"


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


def _joined(parts: Mapping[Path, Dataset], columns: Columns | None) -> Dataset:
    """The rows of all files, one file after another."""
    if len(parts) == 1:
        return next(iter(parts.values()))
    for name in dict.fromkeys(name for rows in parts.values() for name in rows.column_names):
        features = [rows.features[name] for rows in parts.values() if name in rows.column_names]
        if all(feature == features[0] for feature in features):
            continue
        if all(getattr(feature, "dtype", "") in _TEXTS for feature in features):
            large = Value("large_string")
            parts = {path: rows.cast_column(name, large) for path, rows in parts.items()}
        elif columns and name in columns.names:
            _refuse_numbers_beside_names(parts, name)
            parts = {path: _as_names(path, rows, name) for path, rows in parts.items()}
    try:
        return datasets.concatenate_datasets(list(parts.values()))
    except ValueError as error:
        listed = ", ".join(path.name for path in parts)
        raise FedSieveError(
            f"the columns of {listed} do not fit together: {words(error)}"
        ) from error


def _refuse_numbers_beside_names(parts: Mapping[Path, Dataset], name: str) -> None:
    """1 in a file that names its classes is the second of them, and in another it may be any."""
    features = {path: rows.features[name] for path, rows in parts.items()}
    named = [path for path, feature in features.items() if isinstance(feature, ClassLabel)]
    numbered = [p for p, f in features.items() if isinstance(f, Value) and "int" in f.dtype]
    if named and numbered:
        raise FedSieveError(
            f"{named[0].name} names the classes of column {name!r} and {numbered[0].name} numbers "
            "them: write names, or numbers, in all files"
        )


def _as_names(path: Path, rows: Dataset, name: str) -> Dataset:
    found = names_in(rows, name)
    for each in found:
        if isinstance(each, FedSieveError):
            raise FedSieveError(f"{path}: {each}")
    return rows.remove_columns(name).add_column(name, pa.array(found, pa.string()))


def _only(rows: Dataset, columns: Columns | None, where: str) -> Dataset:
    """The columns that are used."""
    if columns is None:
        return rows
    try:
        chosen = [*dict.fromkeys((*used(columns.texts, rows.column_names), *columns.names))]
    except FedSieveError as error:
        raise FedSieveError(f"{where}: {error}") from None
    for name in chosen:
        if name not in rows.column_names:
            raise FedSieveError(
                f"{where}: no column {quoted(name)}{nearest(name, rows.column_names)}"
            )
    return rows.select_columns(chosen)


def _existing(path: Path) -> Path:
    path = place(path)
    if path.is_file():
        return path
    if path.exists() or path.is_symlink():
        raise FedSieveError(f"{path} is no file to read: a pipe, a device, or a link to nothing")
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
