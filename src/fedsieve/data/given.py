"""What a notebook gives as rows, as a `datasets.Dataset`: whatever form they have there.

The columns that are used are read, and no others. Values are taken as `sources.gathered` takes
those of a stream: what is mixed in one column is told with its row.
"""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

from fedsieve.data import sources
from fedsieve.data.files import Columns, array_of, chosen, refuse_wild
from fedsieve.data.names import absent, name_of, numbered
from fedsieve.errors import FedSieveError, raise_of_memory, with_type

FORMS = (
    "a datasets.Dataset or IterableDataset, a pandas or polars DataFrame, a list of dicts, a dict "
    "of columns, or a file"
)


def rows_of(given: object, columns: Columns) -> Dataset:
    """Rows in memory, of any of `FORMS`.

    Raises FedSieveError for another form, a column that is not there or holds values of several
    kinds, a stream that breaks off or does not end, and a file that cannot be read.
    """
    if isinstance(given, Dataset):
        if given.format["type"] == "custom":
            raise FedSieveError(
                "it has a transform (with_transform, set_transform), and rows are read before they "
                "are trained on: make it part of them with `map`"
            )
        return given
    if isinstance(given, IterableDataset):
        return sources.gathered(given, columns)
    if isinstance(given, DatasetDict | IterableDatasetDict):
        raise FedSieveError(f"a data set of splits is given: choose one of {', '.join(given)}")
    if isinstance(given, str | PathLike):
        return sources.load(Path(given), columns=columns)
    if of_library(given, "pandas", "DataFrame") or of_library(given, "polars", "DataFrame"):
        return _of_frame(given, columns)
    if of_library(given, "polars", "LazyFrame"):
        raise FedSieveError("a polars LazyFrame is given, which has no rows yet: collect() it")
    if is_columns(given):
        return _of_columns(given, columns)  # type: ignore[arg-type]
    if is_listed(given):
        return sources.listed(given, columns)  # type: ignore[arg-type]
    if isinstance(given, list | tuple) and _has_rows(given):
        odd = next(n for n, row in enumerate(given) if not isinstance(row, Mapping))
        kind = type(given[odd]).__name__
        raise FedSieveError(f"row {odd} is no dict like the others, but of the type {kind}")
    raise FedSieveError(f"rows are needed ({FORMS}), not {type(given).__name__}")


def is_one_table(given: object) -> bool:
    """Whether it is one table of rows, and not the rows of each client."""
    if isinstance(given, Mapping):
        rows = any(is_listed(each) or _has_rows(each) for each in given.values())
        return bool(given) and is_columns(given) and not rows
    if isinstance(given, list | tuple):
        return bool(given) and is_listed(given) and not any(map(is_columns, given))
    return (
        isinstance(given, Dataset | IterableDataset | str | PathLike)
        or of_library(given, "pandas", "DataFrame")
        or of_library(given, "polars", "DataFrame", "LazyFrame")
    )


def is_listed(given: object) -> bool:
    """Whether it is rows, each a dict of its own."""
    return isinstance(given, list | tuple) and all(isinstance(row, Mapping) for row in given)


def _has_rows(given: object) -> bool:
    return isinstance(given, list | tuple) and any(isinstance(row, Mapping) for row in given)


def is_columns(given: object) -> bool:
    """Whether it is columns by name, each a list of values."""
    return isinstance(given, Mapping) and all(
        isinstance(name, str)
        and (isinstance(values, list | tuple) or (isinstance(values, np.ndarray) and values.ndim))
        for name, values in given.items()
    )


def of_library(given: object, library: str, *names: str) -> bool:
    """Whether it is one of these classes of a library that need not be installed."""
    kinds = type(given).__mro__
    return any(k.__name__ in names and k.__module__.split(".")[0] == library for k in kinds)


def _of_frame(frame: Any, columns: Columns) -> Dataset:
    """The columns of a pandas or polars DataFrame that are used; its index is none."""
    found = [str(name) for name in frame.columns]
    table = {}
    for name in chosen(found, columns):
        series = frame[frame.columns[found.index(name)]]
        if str(series.dtype).lower() == "object":
            refuse_wild(series.to_list(), f"column {name!r}", "row {}".format)
        try:
            table[name] = _array(series)
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            values = series.to_list() if hasattr(series, "to_list") else list(series)
            values = [None if absent(value) else value for value in values]
            table[name] = array_of(values, f"column {name!r}", "row {}".format)
    return Dataset(pa.table(table)) if len(frame) else Dataset.from_dict({key: [] for key in table})


def _array(series: Any) -> pa.Array:
    """A series as Arrow has it, where all its values are of one kind.

    Raises TypeError for a type of its library's own, whose values are others than are stored.
    """
    array = series.to_arrow() if hasattr(series, "to_arrow") else pa.Array.from_pandas(series)
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    if isinstance(array.type, pa.BaseExtensionType) or pa.types.is_fixed_size_binary(array.type):
        raise TypeError(f"a column of {array.type}")
    if pa.types.is_dictionary(array.type):
        array = array.cast(array.type.value_type)
    if pa.types.is_large_string(array.type) or pa.types.is_string_view(array.type):
        array = array.cast(pa.string())
    return array


def _of_columns(given: Mapping[str, Any], columns: Columns) -> Dataset:
    lengths = {name: len(values) for name, values in given.items()}
    if len({*lengths.values()}) > 1:
        (one, few), *_, (other, many) = sorted(lengths.items(), key=lambda each: each[1])
        raise FedSieveError(
            f"columns of different lengths: {one!r} has {few} values and {other!r} has {many}"
        )
    values = {
        n: given[n].tolist() if isinstance(given[n], np.ndarray) else given[n]
        for n in chosen(list(given), columns)
    }
    table = {n: array_of(own, f"column {n!r}", "row {}".format) for n, own in values.items()}
    return Dataset(pa.table(table))


def of_partitioner(given: Any) -> dict[str, Dataset] | None:
    """The partitions of a `flwr_datasets` partitioner, or of a `FederatedDataset`, each a client's;
    None for anything else. Ids are those of its natural clients where it knows them.

    Raises FedSieveError for one that cannot be read, or of several splits.
    """
    if not callable(getattr(given, "load_partition", None)):
        return None
    if hasattr(given, "partitioners"):
        splits = list(given.partitioners)
        if len(splits) != 1:
            raise FedSieveError(
                f"clients: the FederatedDataset partitions {', '.join(splits)}: give one of its "
                "partitioners, such as fds.partitioners['train'], once it has loaded a partition"
            )
        try:
            given.load_partition(0, splits[0])  # which gives the partitioner its rows
        except Exception as error:  # whatever the library or the hub may raise
            raise_of_memory(error)
            raise FedSieveError(
                f"clients: the FederatedDataset fails: {with_type(error)}"
            ) from error
        given = given.partitioners[splits[0]]
    try:
        count = int(given.num_partitions)
        parts = [given.load_partition(number) for number in range(count)]
        natural = getattr(given, "partition_id_to_natural_id", None) or {}
        names = [name_of(natural[n]) if n in natural else None for n in range(count)]
    except FedSieveError:
        raise
    except Exception as error:  # a partitioner of one's own too
        raise_of_memory(error)
        raise FedSieveError(
            f"clients: the partitioner fails: {with_type(error)} (it needs its `dataset` first)"
        ) from error
    known = [name for name in names if name is not None]
    ids = known if len({*known}) == count else numbered(count)
    return dict(zip(ids, parts, strict=True))
