"""Where images lie: a folder of them by class, and the paths that a file's rows name.

A row of somebody's file may name any path. Only what lies in the file's own folder is read.
"""

from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset

from fedsieve.data.files import refuse_no_text
from fedsieve.data.templates import values_of
from fedsieve.disk import bytes_of, everything_in
from fedsieve.errors import FedSieveError, nearest, words

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")
SPLITS = frozenset({"train", "test", "dev", "val", "valid", "validation", "eval"})
COLUMNS = ("image", "label")
LARGEST = 1 << 29  # bytes of an image's file: of as many pixels as are read, as they are


def by_class(folder: Path, split: str | None) -> Dataset | None:
    """The images of `folder/<class>/...`, or of `folder/<split>/<class>/...`: rows of a column
    `image`, their paths, and a column `label`, their class's name. None where there are none.

    Raises FedSieveError for splits of which none is named, and for a split that is not there.
    """
    folder = folder.resolve()
    inner = _folders(folder)
    if names := splits(folder):
        if split is None and len(names) > 1:
            raise FedSieveError(f"{folder} holds several splits: say which of {', '.join(names)}")
        chosen = [n for n in names if split is None or n.lower() == split.lower()]
        if not chosen:
            raise FedSieveError(f"no split {split!r} in {folder}{nearest(split or '', names)}")
        inner = _folders(folder / chosen[0])
    elif split is not None:
        return None
    found = [
        (str(path), kind.name)
        for kind in inner
        if _within(kind, folder)  # else all below is outside, which may be much
        for path in sorted(everything_in(kind))
        if path.suffix.lower() in EXTENSIONS and _within(path, folder)
    ]
    if not found:
        return None
    for name, _ in found:
        refuse_no_text(name)
    return Dataset(
        pa.table(
            {
                name: list(values)
                for name, values in zip(COLUMNS, zip(*found, strict=True), strict=True)
            }
        )
    )


def _within(path: Path, folder: Path) -> Path | None:
    """Where a path leads, if that is in the folder; None for what leads out, in circles or nowhere.

    folder: without links
    """
    try:
        whole = path.resolve()
    except (OSError, RuntimeError, ValueError):
        return None
    return whole if whole.is_relative_to(folder) else None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is longer than a file system takes
        return False


def splits(folder: Path) -> tuple[str, ...]:
    """The folders in it, where all of them are called as splits are."""
    names = tuple(path.name for path in _folders(folder))
    return names if all(name.lower() in SPLITS for name in names) else ()


def _folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def located(rows: Dataset, name: str, folder: Path | None) -> Dataset:
    """The rows with whole paths in a column of images, where it holds paths.

    folder: where the rows' file lies, which paths begin from and may not leave; None leaves all as
        it is, for what `datasets` has loaded
    What leads out, or is not there, has its path under `missing`: a bad row (tasks/images.py).
    """
    if folder is None or name not in rows.column_names:
        return rows
    home = folder.resolve()
    values = values_of(rows, name)
    if all(isinstance(value, bytes) or _bytes(value) for value in values):
        return rows
    cells: list[dict[str, Any]] = []
    for value in values:
        path = value.get("path") if isinstance(value, dict) else value
        data = value if isinstance(value, bytes) else _bytes(value)
        if data is None and isinstance(path, str):
            whole = _within(home / path, home)
            if whole is None or not _is_file(whole):
                cells.append({"missing": path})
                continue
            path = str(whole)
        cells.append({"bytes": data, "path": path if isinstance(path, str) else None})
    kinds = {"bytes": pa.binary(), "path": pa.string(), "missing": pa.string()}
    kind = pa.struct(list(kinds.items()))
    return rows.remove_columns(name).add_column(name, pa.array(cells, kind))


def inlined(rows: Dataset, name: str) -> Dataset:
    """The rows of `located` with the files' bytes in the place of their paths: to be moved.

    Raises FedSieveError, naming row and column, for a file that no image has.
    """
    cells = []
    for row, value in enumerate(values_of(rows, name)):
        path = value.get("path") if isinstance(value, dict) else None
        data = value if isinstance(value, bytes) else _bytes(value)
        if data is None and path is not None:
            try:
                data = bytes_of(Path(path), LARGEST)
            except OSError as error:
                raise FedSieveError(f"row {row} of column {name!r}: {words(error)}") from error
        cells.append({"bytes": data, "path": None})
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    return rows.remove_columns(name).add_column(name, pa.array(cells, kind))


def _bytes(value: Any) -> bytes | None:
    data = value.get("bytes") if isinstance(value, dict) else None
    return data if isinstance(data, bytes) else None
