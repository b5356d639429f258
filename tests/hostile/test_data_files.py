"""Data files of somebody else's: small ones that unpack without end, and notes that are none."""

import contextlib
import gzip
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from fedsieve.data import files, sources
from fedsieve.data.files import Columns
from fedsieve.data.given import rows_of
from fedsieve.disk import write_whole
from fedsieve.errors import FedSieveError
from fedsieve.recipe import read as recipe
from fedsieve.recipe.experiment import from_recipe
from tests import kinds
from tests.conftest import Command, Tiny
from tests.hostile.test_recipes_to_a_site import MEGA, peak


def endless() -> dict[str, Callable[[Path], None]]:
    line = b'{"text": "a", "label": "b"}\n'

    def zipped(head: bytes, line: bytes) -> Callable[[Path], None]:
        def write(path: Path) -> None:
            with gzip.open(path, "wb") as file:
                file.write(head)
                for _ in range(40):
                    file.write(line * ((1 << 20) // len(line)))

        return write

    def dictionary(path: Path) -> None:
        texts = pa.DictionaryArray.from_arrays(
            pa.array([0] * 3000, pa.int32()), pa.array(["x" * 10**6])
        )
        table = pa.table({"text": texts, "label": ["a"] * 3000})
        pq.write_table(table, path, compression="zstd")

    def repeated(path: Path) -> None:
        table = pa.table({"text": ["x" * 10**5] * 500, "label": ["a"] * 500})
        pq.write_table(table, path, compression="zstd")

    return {
        "rows.csv.gz": zipped(b"text,label\n", b"a,b\n"),
        "rows.tsv.gz": zipped(b"text\tlabel\n", b"a\tb\n"),
        "rows.tab.gz": zipped(b"text\tlabel\nstring\td\nmeta\tclass\n", b"a\tb\n"),
        "rows.jsonl.gz": zipped(b"", line),
        "rows.json.gz": zipped(b"[", line.replace(b"\n", b",")),
        "categories.parquet": dictionary,
        "rows.parquet": repeated,
    }


@pytest.mark.parametrize("name", endless())
def test_a_small_file_that_unpacks_without_end_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    endless()[name](path)
    began = time.monotonic()
    with pytest.raises(FedSieveError, match="unpacks to more than 200 times"):
        files.read(path, columns=Columns(("text",), ("label",)))
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("rows", [2**62, 2**40, 2**33, 1238])
@pytest.mark.parametrize("where", ["file", "part", "both", "all"])
def test_a_parquet_file_that_lies_about_its_rows_is_refused(
    tmp_path: Path, rows: int, where: str
) -> None:
    """In its foot, as what writes it would: zigzag numbers of seven bits a byte."""
    count = 1237
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["a"] * count, "label": ["b"] * count}), path)
    data = path.read_bytes()
    length = int.from_bytes(data[-8:-4], "little")
    body, foot = data[: -8 - length], data[-8 - length : -8]
    parts = foot.split(_zigzag(count))
    assert len(parts) == 9  # the first is the file's, the last its part's, two are the columns'
    told = {"file": (0,), "part": (7,), "both": (0, 7), "all": (0, 1, 4, 7)}[where]
    numbers = [_zigzag(rows if n in told else count) for n in range(8)]
    foot = parts[0] + b"".join(n + part for n, part in zip(numbers, parts[1:], strict=True))
    path.write_bytes(body + foot + len(foot).to_bytes(4, "little") + b"PAR1")
    columns = Columns(("text",), ("label",))
    said = f"is said to have {rows} rows"
    with pytest.raises(
        FedSieveError, match=f"{said}|could not be read" if where == "all" else said
    ):
        files.read(path, columns=columns)


def _zigzag(number: int) -> bytes:
    number, found = 2 * number, []
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


def test_rows_of_nothing_without_end_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    nothing = pa.chunked_array([pa.nulls(10**7)] * 6)
    pq.write_table(pa.table({"text": nothing, "label": nothing}), path)
    assert path.stat().st_size < 3 * 10**5
    with pytest.raises(FedSieveError, match="unpacks to more than 200 times"):
        files.read(path, columns=Columns(("text",), ("label",)))


INSIDE: dict[str, Callable[[pa.Array], pa.Array]] = {
    "a struct": lambda a: pa.StructArray.from_arrays([a], ["a"]),
    "a list": lambda a: pa.ListArray.from_arrays(pa.array(range(len(a) + 1), pa.int32()), a),
    "a long list": lambda a: pa.LargeListArray.from_arrays(
        pa.array(range(len(a) + 1), pa.int64()), a
    ),
    "a struct in a list": lambda a: INSIDE["a list"](INSIDE["a struct"](a)),
}


@pytest.mark.parametrize("where", INSIDE)
def test_texts_of_a_dictionary_that_lies_deeper_are_counted_as_often_as_they_occur(
    tmp_path: Path, where: str
) -> None:
    path = tmp_path / "rows.parquet"
    one = pa.DictionaryArray.from_arrays(pa.array([0] * 50_000, pa.int32()), ["x" * 10_000])
    pq.write_table(pa.table({"text": INSIDE[where](one), "label": ["b"] * 50_000}), path)
    assert path.stat().st_size < 50_000
    before = peak(reset=True)
    with pytest.raises(FedSieveError, match="unpacks to more than 200 times"):
        files.read(path, columns=Columns(("text",), ("label",)))
    assert peak() - before < 200 * MEGA
    few = pa.DictionaryArray.from_arrays(pa.array([0, 1] * 20, pa.int32()), ["x", "y"])
    pq.write_table(pa.table({"text": INSIDE[where](few), "label": ["b"] * 40}), path)
    assert len(files.read(path, columns=Columns(("text",), ("label",)))) == 40


LONG = "w1 " * (3 << 20)  # 9 MiB, which is there once in the file
WRITTEN_OUT: dict[str, Callable[[int], pa.Array]] = {
    "texts": lambda rows: pa.array([LONG] * rows),
    "long texts": lambda rows: pa.array([LONG] * rows, pa.large_string()),
    "bytes": lambda rows: pa.array([LONG.encode()] * rows),
    "bytes of one length": lambda rows: pa.array([LONG.encode()] * rows, pa.binary(len(LONG))),
    "after short ones": lambda rows: pa.array(["a"] * 300 + [LONG] * rows),
    "after none": lambda rows: pa.array([None] * 300 + [LONG] * rows),
    "lists": lambda rows: pa.array([[LONG]] * rows),
    "one list": lambda rows: pa.array([[], [LONG] * rows]),
    "structs": lambda rows: pa.array([{"a": LONG}] * rows),
    "maps": lambda rows: pa.array([[("a", LONG)]] * rows, pa.map_(pa.string(), pa.string())),
}


@pytest.mark.parametrize("kind", kinds.some_of(WRITTEN_OUT))
def test_a_long_text_is_not_written_out_for_each_row_before_it_is_counted(
    tmp_path: Path, kind: str
) -> None:
    """256 rows of it took 256 times its memory before the first of them was counted."""
    path = tmp_path / "rows.parquet"
    pq.write_table(
        pa.table({"text": WRITTEN_OUT[kind](64)}), path, compression="zstd", store_schema=False
    )
    assert path.stat().st_size < 40_000
    before = peak(reset=True)
    with pytest.raises(FedSieveError, match="unpacks to more than 200 times"):
        files.read(path)
    assert peak() - before < 200 * MEGA
    if kind not in ("bytes of one length", "maps"):  # of which `datasets` knows nothing
        pq.write_table(pa.table({"text": WRITTEN_OUT[kind](2)}), path, compression="zstd")
        files.read(path)


def test_a_dictionary_counts_as_often_as_its_entries_occur(tmp_path: Path) -> None:
    """Not once more for each of the parts that are looked at, of which all have it."""
    path = tmp_path / "rows.parquet"
    entries = [f"{number} " + "x" * 200_000 for number in range(4)]
    texts = pa.DictionaryArray.from_arrays(pa.array([0, 1, 2, 3] + [None] * 50_000), entries)
    pq.write_table(pa.table({"text": texts}), path, compression="zstd")
    assert len(files.read(path)) == 50_004


def test_many_parts_of_short_rows_are_read_256_rows_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, sizes = tmp_path / "rows.parquet", []
    texts = [f"{number} of many" for number in range(2000)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=1000)
    unpacked = files._unpacked

    def spy(part: pa.RecordBatch) -> int:
        sizes.append(part.num_rows)
        return unpacked(part)

    monkeypatch.setattr(files, "_unpacked", spy)
    assert files.read(path)["text"][:] == texts
    assert sizes == [1, 256, 256, 256, 232] * 2  # the first of each to see what is in it


STRAY = {
    "left open": ('text,label\n"a,b\nc,d\n"e,f\n', "lines 2 to 4, read as one row"),
    "to the end": ('text,label\na,b\n"c,d\ne,f\n', "lines 3 to 4, read as one row"),
    "far from the end": ('text,label\na,b\nc,"d\n' + "e,f\n" * 99, "lines 3 to 102, read"),
    "in the head": ('text,"label\na,b\n', "lines 1 to 2, read as one row"),
    "followed": ('text,label\na,b\n"c"d,e\n', "line 3"),
    "escaped": ('text,label\na,b\n"c\\"d",e\n', "line 3"),
}


@pytest.mark.parametrize("kind", STRAY)
def test_a_stray_quotation_mark_swallows_no_rows(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "rows.csv"
    text, where = STRAY[kind]
    path.write_text(text, encoding="utf-8")
    with pytest.raises(FedSieveError, match=rf"rows.csv, {where}.*: a quotation mark is astray"):
        files.read(path, columns=Columns(("text",), ("label",)))


@pytest.mark.parametrize("text", ["text", "хорошо Å ą", "a\x0b\x0c\x1c\u2028b"])
@pytest.mark.parametrize("head", ["", "\n"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("rows", [6, 1000])
def test_two_quotation_marks_astray_are_said(
    tmp_path: Path, rows: int, end: str, head: str, text: str
) -> None:
    """A text begins with one and another, rows later, ends with one: the file is in order."""
    between = "".join(f"{text} {number},b\n" for number in range(rows))
    path = tmp_path / "rows.csv"
    whole = f'{head}text,label\nfirst,a\n"so it begins,a\n{between}and ends",b\nlast,a\n'
    path.write_text(whole, encoding="utf-8", newline=end)
    line = rows + 4 + len(head)
    with pytest.warns(UserWarning, match=rf"line {line}: .* has {rows:,} lines inside"):
        found = files.read(path, columns=Columns(("text",), ("label",)))
    assert len(found) == 3


@pytest.mark.parametrize(
    "lines", ["a, b\n" * 4, "a\n" * 100, "a, b\n" * 100 + "c\n" * 2, "a, b, c\n" * 100]
)
@pytest.mark.filterwarnings("error")
def test_long_texts_are_said_to_be_nothing_else(tmp_path: Path, lines: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f'text,label\n"{lines}",a\nlast,b\n')
    assert len(files.read(path, columns=Columns(("text",), ("label",)))) == 2


def test_quotation_marks_in_their_place_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    long = "x" * 200_000
    path.write_text(f'text,label\r\n"a ""b"", c\nd",e\r\nf "g" h,i\r\n"{long}",j\r\n"",k\r\n')
    found = files.read(path, columns=Columns(("text",), ("label",)))
    assert found["text"][:] == ['a "b", c\nd', 'f "g" h', long, ""]


@pytest.mark.parametrize("end", ["csv", "tsv", "tab"])
def test_a_table_as_wide_as_a_picture_is_refused(tmp_path: Path, end: str) -> None:
    """pyarrow takes room for every column, read or not."""
    mark, wide = "," if end == "csv" else "\t", 20_000
    lines = [["text", "label", *(f"c{n}" for n in range(wide))], *[["a"] * (wide + 2)] * 3]
    if end == "tab":
        lines[1:1] = [["string"] * (wide + 2), ["meta"] * (wide + 2)]
    path = tmp_path / f"rows.{end}"
    path.write_text("\n".join(map(mark.join, lines)), encoding="utf-8")
    with pytest.raises(FedSieveError, match=rf"rows\.{end} has 20,002 columns: at most 10,000"):
        files.read(path, columns=Columns(("text",), ("label",)))


BEYOND = {
    "a date of no year": pa.array([2**31 - 1] * 3, pa.int32()).view(pa.date32()),
    "a time beyond all": pa.array([2**60] * 3, pa.int64()).view(pa.timestamp("ms")),
    "a zone on Mars": pa.array([0] * 3, pa.int64()).view(pa.timestamp("s", tz="Mars/X")),
}


@pytest.mark.parametrize("template", ["{text}", "say {text}"])
@pytest.mark.parametrize("odd", BEYOND)
def test_values_that_python_does_not_have_are_told_by_their_column(
    tiny: Tiny, tmp_path: Path, odd: str, template: str
) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": BEYOND[odd], "label": ["cars", "food", "cars"]}), path)
    given = tiny.table(data__train=str(path), data__test=str(path), data__text=template)
    with pytest.raises(FedSieveError, match=r"text.*(cannot be read|instead of a text)|no text"):
        from_recipe(recipe.check(given))


DECODED = ["Image", "Audio", "Video", "Pdf", "Nifti"]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", DECODED)
@pytest.mark.parametrize("column", ["text", "label", "author"])
def test_a_note_in_a_file_has_nothing_decoded(
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    column: str,
    kind: str,
    nested: bool,
) -> None:
    """A decoder would run Ghostscript over a stranger's EPS, open any file, and ask any address."""
    for each in DECODED:
        monkeypatch.setattr(getattr(datasets, each), "decode_example", None)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    cell: object = {"bytes": eps, "path": "/etc/hostname"}
    told: object = {"_type": kind}
    if nested:
        cell, told = [cell], {"_type": "List", "feature": told}
    values: dict[str, list[object]] = {
        "text": ["a"] * 3, "label": ["cars", "food", "cars"], "author": ["x"] * 3,
    }  # fmt: skip
    values[column] = [cell] * 3
    note = json.dumps({"info": {"features": {column: told}}})
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table(values).replace_schema_metadata({"huggingface": note}), path)
    own = {"kind": "column", "column": "author"}
    given = tiny.table(data__train=str(path), data__test=str(path), partition=own)
    with pytest.raises(FedSieveError, match=column):
        from_recipe(recipe.check(given))


@pytest.mark.parametrize("split", ["../other", "/etc", "..", "", 7, ["train"]])
def test_splits_that_lead_out_of_a_folder_are_refused(tmp_path: Path, split: object) -> None:
    Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "other")
    DatasetDict(train=Dataset.from_dict({"text": ["b"]})).save_to_disk(tmp_path / "mine")
    (tmp_path / "mine" / "dataset_dict.json").write_text(json.dumps({"splits": [split]}))
    with pytest.raises(FedSieveError, match=r"dataset_dict\.json.*which is no split"):
        sources.load(tmp_path / "mine", "train")


NOTES = ("[" * 100_000, "[]", "{", '{"info": 5}', '{"info": {"features": []}}')


@pytest.mark.parametrize("note", NOTES, ids=["deep", "list", "cut", "number", "features"])
def test_notes_in_a_parquet_file_may_be_anything(tmp_path: Path, note: str) -> None:
    path = tmp_path / "rows.parquet"
    table = pa.table({"text": ["a"], "label": ["b"]})
    pq.write_table(table.replace_schema_metadata({"huggingface": note}), path)
    with contextlib.suppress(FedSieveError):  # read, or refused by name
        assert len(files.read(path)) == 1


@pytest.mark.parametrize("categories", [False, True])
@pytest.mark.parametrize("odd", ["text", "label"])
def test_what_a_parquet_file_calls_a_text_and_is_none_is_named(
    tmp_path: Path, odd: str, categories: bool
) -> None:
    wrong = pa.array([b"fine", b"\xff\xfe"] * 2).view(pa.string())
    columns = {"text": pa.array(["a", "b"] * 2), "label": pa.array(["c", "d"] * 2), odd: wrong}
    if categories:
        indices = pa.array([0, 1, 0, 1], pa.int32())
        columns[odd] = pa.DictionaryArray.from_arrays(indices, wrong[:2])
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    with pytest.raises(FedSieveError, match=rf"rows\.parquet.*{odd}.*(UTF8|UTF-8)"):
        files.read(tmp_path / "rows.parquet", columns=Columns(("text",), ("label",)))


@pytest.mark.parametrize("odd", ["[7]", '[["a"]]', '[{"a": 1}]', '["a", 7]', '{"a": 1}', "7"])
@pytest.mark.parametrize("line", [2, 30, 40])
def test_a_value_of_another_kind_is_named_with_its_own_line(
    tmp_path: Path, odd: str, line: int
) -> None:
    rows = ['{"text": "t", "label": ["a", "b"]}'] * 40
    rows[line - 1] = f'{{"text": "t", "label": {odd}}}'
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    with pytest.raises(FedSieveError, match=rf"line {line} has .*label"):
        files.read(tmp_path / "rows.jsonl")


def damage_state(folder: Path, text: str) -> None:
    (folder / "state.json").write_text(text)


SAVED: dict[str, Callable[[Path], object]] = {
    "no JSON": lambda p: damage_state(p, "{cut"),
    "a list": lambda p: damage_state(p, "[]"),
    "nothing": lambda p: damage_state(p, "{}"),
    "a file elsewhere": lambda p: damage_state(
        p, '{"_data_files": [{"filename": "../../other.arrow"}]}'
    ),
    "no name": lambda p: damage_state(p, '{"_data_files": [7]}'),
    "no notes": lambda p: (p / "dataset_info.json").unlink(),
    "notes cut": lambda p: (p / "dataset_info.json").write_text("{"),
    "notes of an unknown kind": lambda p: (p / "dataset_info.json").write_text(
        '{"features": {"text": {"_type": "Nothing"}}}'
    ),
    "rows missing": lambda p: next(p.glob("*.arrow")).unlink(),
    "rows cut": lambda p: os.truncate(next(p.glob("*.arrow")), 99),
    "rows of other bytes": lambda p: next(p.glob("*.arrow")).write_bytes(b"x" * 999),
    "rows a pipe": lambda p: as_pipe(next(p.glob("*.arrow"))),
}


def as_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("damage", SAVED)
def test_a_folder_that_datasets_saved_and_that_is_damaged_is_named(
    tmp_path: Path, damage: str, parts: bool
) -> None:
    rows = Dataset.from_dict({"text": ["a"] * 50, "label": ["b"] * 50})
    folder = tmp_path / "saved"
    if parts:
        DatasetDict({"train": rows}).save_to_disk(folder)
    else:
        rows.save_to_disk(folder)
    SAVED[damage](folder / "train" if parts else folder)
    with pytest.raises(FedSieveError, match="saved"):
        sources.load(folder, "train" if parts else None)


@pytest.mark.parametrize("path", ["/" + "a" * 5000, "~nosuchuserhere/x.csv", "a\0b.csv"])
def test_what_can_be_no_path_is_named(tiny: Tiny, path: str) -> None:
    with pytest.raises(FedSieveError, match=r"path|no file"):
        sources.load(path)
    for changes in (
        {"data__train": path},
        {"data__test": path},
        {"model__source": path},
        {"data__more_tests": {"other": path}},
    ):
        with pytest.raises(FedSieveError):
            from_recipe(recipe.check(tiny.table(**changes)))


def test_what_a_library_says_of_a_file_is_one_line(tmp_path: Path) -> None:
    files = {
        "head.csv": b'te\0xt,label\n"a b",x\n"c d",y\n',
        "cut.parquet": b"PAR1" + bytes(500) + b"PAR1",
        "rows.json": b'{"a":\n\n [1,\n 2,,]}',
    }
    for name, held in files.items():
        (tmp_path / name).write_bytes(held)
        with pytest.raises(FedSieveError, match=name) as caught:
            sources.load(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "table.json").mkdir()
    with pytest.raises(FedSieveError, match=r"table\.json is a folder"):
        write_whole(tmp_path / "table.json", b"x")


# --- lists and objects without end in a cell


def deep(levels: int, fan: int = 1) -> str:
    """JSON of objects in objects, each with `fan` keys."""
    others = "".join(f'"{n}": 0, ' for n in range(fan - 1))
    return f'{{{others}"in": ' * levels + "0" + "}" * levels


NESTED: dict[str, tuple[str, str]] = {
    "deep": (f'{{"text": {deep(900)}}}\n' * 24, "line 1 .* column 'text' that are nested"),
    "deep and wide": (f'{{"text": {deep(900, 4)}}}\n' * 24, "nested more than"),
    "lists": ('{"text": ' + "[" * 400 + "]" * 400 + "}\n", "nested more than"),
    "another key in each row": (
        "".join(f'{{"text": {{"k{n}": 1}}}}\n' for n in range(9000)),
        "column 'text' holds objects of 7,0.. different keys by line 70..",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", NESTED)
def test_cells_without_end_are_refused_before_they_fill_the_memory(
    tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "rows.jsonl"
    text, said = NESTED[kind]
    path.write_text(text)
    with pytest.raises(FedSieveError, match=said):
        files.read(path)


def test_a_parquet_column_of_a_deep_type_is_refused(tmp_path: Path) -> None:
    of = pa.int64()
    for _ in range(40):
        of = pa.list_(of)
    pq.write_table(pa.table({"text": pa.array([None], of)}), tmp_path / "rows.parquet")
    with pytest.raises(FedSieveError, match=r"column 'text' whose type is nested more than"):
        files.read(tmp_path / "rows.parquet")


def _loop() -> list[object]:
    loop: list[object] = []
    loop += [loop, loop]
    return loop


def _deep(levels: int) -> list[object]:
    found: list[object] = []
    for _ in range(levels):
        found = [found]
    return found


@pytest.mark.parametrize("form", ["a list of dicts", "a dict of columns", "pandas"])
@pytest.mark.parametrize(
    "cell", [_loop(), _deep(50_000), _deep(900)], ids=["loop", "50,000", "900"]
)
def test_rows_in_python_without_end_are_refused(
    form: str, cell: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """pyarrow alone goes down until the stack ends, and the process with it."""
    monkeypatch.setattr(files, "MOST_NESTED", 1000)  # a million take the loop nine seconds
    columns = Columns(("text",), ("label",))
    given: dict[str, object] = {
        "a list of dicts": [{"text": cell, "label": 1}],
        "a dict of columns": {"text": [cell], "label": [1]},
        "pandas": pd.DataFrame({"text": [cell], "label": [1]}),
    }
    with pytest.raises(FedSieveError, match=r"row 0 .* column 'text' that are nested more than"):
        rows_of(given[form], columns)


def test_conversations_as_deep_as_they_are_in_practice_are_read(tmp_path: Path) -> None:
    """With a tool's schema in each."""
    said = {"role": "user", "tools": [{"function": {"parameters": {"a": {"items": [{"b": 1}]}}}}]}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": [said, said]}) + "\n" for _ in range(50)))
    assert len(files.read(path)) == 50


def test_keys_that_are_no_texts_are_told(tmp_path: Path) -> None:
    with pytest.raises(FedSieveError, match="no column 'text'"):
        rows_of([{("a", 1): 1}], Columns(("text",), ()))


WIDE = ",".join(f"c{n}" for n in range(20_000))


@pytest.mark.parametrize(
    "head", ["\n\n{}\n", '"a\nb",{}\n', '"a""b",{}\n', "{}\r\n", '"{}\n', "\ufeff\n{}\n"]
)
def test_a_wide_table_is_refused_wherever_its_first_line_ends(tmp_path: Path, head: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(head.format(WIDE) + "," * 19_999 + "\n", encoding="utf-8")
    with pytest.raises(FedSieveError, match=r"columns: at most|a quotation mark is astray"):
        files.read(path)


def test_rows_with_keys_of_their_own_each_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = (json.dumps({"text": "a", **{f"k{n}_{m}": 1 for m in range(20)}}) for n in range(3000))
    path.write_text("\n".join(lines))
    with pytest.raises(FedSieveError, match=r"has 60,001 columns, too many to take all"):
        files.read(path)
    assert len(files.read(path, columns=Columns(("text",), ()))) == 3000  # no others are made


@pytest.mark.parametrize("end", [".csv.gz", ".tsv.gz", ".tab.gz", ".json.gz", ".jsonl.gz"])
@pytest.mark.parametrize("damage", ["none", "cut", "flipped"])
def test_a_zipped_file_that_is_damaged_is_told_to_init_too(
    tmp_path: Path, command: Command, end: str, damage: str
) -> None:
    text = "".join(f"text {n},label\n" for n in range(5000)) if "csv" in end else "[{}]" * 9000
    data = bytearray(gzip.compress(text.encode()))
    if damage == "none":
        data = bytearray(b"no gz at all" * 100)
    elif damage == "cut":
        del data[len(data) // 2 :]
    else:
        data[40] ^= 0xFF
    (tmp_path / f"rows{end}").write_bytes(data)
    ran = command("init", tmp_path / f"rows{end}", "--out", tmp_path / "r.toml", "--yes")
    assert ran.code == 2
    assert "could not be read" in ran.err or "is not" in ran.err or "holds" in ran.err


def test_names_that_no_text_can_hold_are_told(tmp_path: Path, command: Command) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / os.fsdecode(b"caf\xe9.csv")).write_text("text,label\na,b\n")
    with pytest.raises(FedSieveError, match="could not be read"):
        sources.load(tmp_path / "rows")
    (tmp_path / "images" / "cats").mkdir(parents=True)
    (tmp_path / "images" / "cats" / os.fsdecode(b"caf\xe9.png")).write_bytes(b"x")
    with pytest.raises(FedSieveError, match="no UTF-8: rename it"):
        sources.load(tmp_path / "images")
    for name in (b"caf\xe9.csv", b"caf\xe9"):
        path = tmp_path / os.fsdecode(name)
        if path.suffix:
            path.write_text("text,label\na,b\n")
        else:
            path.mkdir()
        ran = command("init", path, "--out", tmp_path / "r.toml", "--yes")
        assert ran.code == 2
        assert "can be no path" in ran.err


@pytest.mark.parametrize("empty", ["", " ", "\t"])
def test_an_empty_name_is_not_the_folder_here(
    empty: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a variable of a shell leaves it that is not set: here could be anything."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny.bert, tmp_path, dirs_exist_ok=True)
    (tmp_path / "rows.csv").write_text("text,label\na,b\n")
    said = "can be no path: it is empty; the folder here is '.'"
    with pytest.raises(FedSieveError, match=said):
        sources.load(empty)
    for key in ("model.source", "data.train", "data.test", "lora.start"):
        given = tiny.table(**{key.replace(".", "__"): empty})
        with pytest.raises(FedSieveError, match=said):
            from_recipe(recipe.check(given))


def test_a_name_of_a_column_is_shown_in_part(tmp_path: Path, command: Command) -> None:
    long = "text" + "x" * 500_000
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({long: f"word {n} word", "label": n % 2}) + "\n" for n in range(50))
    )
    ran = command("init", tmp_path / "rows.jsonl", "--out", tmp_path / "r.toml", "--yes")
    assert len(ran.out) + len(ran.err) < 5000


def test_a_file_of_semicolons_and_marks_names_its_separator(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text;label\n" + '"one; ""two""";cars\n"it, is";food\n' * 5, encoding="utf-8")
    with pytest.raises(FedSieveError, match=r"data\.separator = ';'"):
        sources.load(path)
    assert sources.load(path, separator=";").num_rows == 10


def test_a_file_whose_name_is_misspelt_is_named_with_the_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bank.csv").write_text("text,label\na,b\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FedSieveError, match=r"did you mean 'bank\.csv'"):
        sources.load("bank.cvs")


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json"])
def test_a_wide_table_is_not_looked_at_column_by_column(
    tmp_path: Path, command: Command, kind: str
) -> None:
    """Reading all takes the square of their number; a recipe that names its columns reads those."""
    names = ["text", "label", *(f"c{n}" for n in range(9_000))]
    row = {name: str(n % 7) for n, name in enumerate(names)}
    path = tmp_path / f"rows.{kind}"
    lines = [",".join(names), *[",".join(row.values())] * 20]
    if kind != "csv":
        lines = [json.dumps(row)] * 20
    path.write_text(("[" + ",".join(lines) + "]") if kind == "json" else "\n".join(lines))
    began = time.monotonic()
    ran = command("init", path, "--out", tmp_path / "r.toml", "--yes")
    assert time.monotonic() - began < 10
    assert ran.code == 2
    assert "9,002 columns, too many to take all" in " ".join(ran.err.split())
    assert sources.load(path, columns=Columns(("text",), ("label",))).num_rows == 20


@pytest.mark.parametrize("kind", ["csv", "tsv", "tab", "json", "jsonl", "parquet", "jsonl.gz"])
def test_rows_that_are_holes_are_not_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"rows.{kind}"
    with path.open("wb") as file:
        file.truncate(30 << 30)
    began = time.monotonic()
    with pytest.raises(FedSieveError, match="holes"):
        sources.load(path)
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("name", ["dataset_info.json", "state.json", "dataset_dict.json"])
@pytest.mark.parametrize("how", ["holes", "a pipe"])
def test_what_datasets_noted_is_read_within_bounds(tmp_path: Path, name: str, how: str) -> None:
    folder = tmp_path / "saved"
    Dataset.from_dict({"text": ["a"], "label": ["b"]}).save_to_disk(str(folder))
    (folder / name).unlink(missing_ok=True)
    if how == "holes":
        with (folder / name).open("wb") as file:
            file.truncate(6 << 30)
    else:
        os.mkfifo(folder / name)
    with pytest.raises(FedSieveError, match=r"at most .* are read|is no file|is not as|not a JSON"):
        sources.load(folder)


def test_folders_of_images_that_lead_out_or_in_circles_are_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for name in ("cats", "dogs"):
        (folder / name).mkdir(parents=True)
    (folder / "cats" / "a.png").write_bytes(b"x")
    (folder / "cats" / "loop.png").symlink_to("loop.png")
    (folder / "dogs" / "out.png").symlink_to("/etc/passwd")
    (folder / "all").symlink_to("/")
    assert sources.load(folder)["label"] == ["cats"]


@pytest.mark.parametrize("stored", ["files", "saved", "saved splits"])
def test_files_of_rows_that_lead_out_of_their_folder_are_refused(
    tmp_path: Path, stored: str
) -> None:
    """Rows of the reader's own would be learned and quoted. A file that is named may be a link."""
    rows = Dataset.from_dict({"text": ["a", "b"], "label": ["x", "y"]})
    folder, elsewhere = tmp_path / "rows", tmp_path / "elsewhere"
    if stored == "files":
        folder.mkdir()
        rows.to_csv(str(folder / "rows.csv"))
    else:
        (rows if stored == "saved" else DatasetDict({"train": rows})).save_to_disk(str(folder))
    assert len(sources.load(folder, None if stored != "saved splits" else "train")) == 2
    file = next(path for path in folder.rglob("*") if path.suffix in (".csv", ".arrow"))
    file.rename(elsewhere)
    file.symlink_to(elsewhere)
    with pytest.raises(FedSieveError, match=f"{file.name} is a link that leads out of its folder"):
        sources.load(folder, None if stored != "saved splits" else "train")
    if stored == "files":
        assert len(sources.load(file)) == 2
    for place in ("datasets--some--rows/blobs", ".git/annex/objects/a/b"):
        file.unlink()
        (tmp_path / place).mkdir(parents=True)
        elsewhere = elsewhere.rename(tmp_path / place / "abc")
        file.symlink_to(elsewhere)
        assert len(sources.load(folder, None if stored != "saved splits" else "train")) == 2


def test_a_parquet_foot_that_ends_processes_does_not_end_this_one(tmp_path: Path) -> None:
    """pyarrow looks into statistics of columns without a net: every byte of the foot is changed."""
    path = tmp_path / "rows.parquet"
    table = pa.table({"text": ["a", None, "b"] * 9, "label": ["b"] * 27})
    pq.write_table(table, path, compression="none")
    data = path.read_bytes()
    length = int.from_bytes(data[-8:-4], "little")
    code = (
        "import sys; from pathlib import Path\nfrom fedsieve.data import files\n"
        "from fedsieve.errors import FedSieveError\n"
        "path = Path(sys.argv[1]); data = path.read_bytes(); length = int(sys.argv[2])\n"
        "for at in range(len(data) - 8 - length, len(data) - 8):\n"
        "    for bit in (1, 16):\n"
        "        path.write_bytes(data[:at] + bytes([data[at] ^ bit]) + data[at + 1:])\n"
        "        try: files.read(path)\n"
        "        except FedSieveError: pass\n"
        "print('done')"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(path), str(length)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert ran.stdout.strip().endswith("done"), ran.stderr[-500:]
