"""Reading rows: each format with its traps, folders and splits, and errors that help."""

import contextlib
import gzip
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from fedsieve.data import fetch, sources
from fedsieve.data.files import Columns, field_of
from fedsieve.data.sources import column, load
from fedsieve.errors import FedSieveError
from tests import mapped

ROWS = [
    {"text": 'she said "NA"', "label": 1},
    {"text": "None", "label": 0},
    {"text": "naïve, with comma", "label": 1},
]
CSV = 'text,label\n"she said ""NA""",1\nNone,0\n"naïve, with comma",1\n'
TSV = 'text\tlabel\nshe said "NA"\t1\nNone\t0\nnaïve, with comma\t1\n'
ORANGE = (
    "text\tlabel\nstring\tcontinuous\nmeta\tclass\n"
    '\n"she said ""NA"""\t1\nNone\t0\n\t\nnaïve, with comma\t1\n'
)
TEXTS = [{**row, "label": str(row["label"])} for row in ROWS]  # a cell has no type
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS)


def damaged(content: str) -> bytes:
    """A gzip file of which one byte is another."""
    data = bytearray(gzip.compress(content.encode() * 100))
    data[15] ^= 0xFF
    return bytes(data)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        ("a.csv", CSV, TEXTS),
        ("a.csv", "\ufeff" + CSV.replace("\n", "\r\n"), TEXTS),
        ("a.csv", CSV.rstrip("\n"), TEXTS),
        ("a.tsv", TSV, TEXTS),
        ("a.tsv", "\ufeff" + TSV, TEXTS),
        ("a.tab", ORANGE, TEXTS),
        ("a.tab", ORANGE.rstrip("\n").replace("\n", "\r\n"), TEXTS),
        ("a.json", json.dumps(ROWS, indent=2), ROWS),
        ("a.json", JSONL, ROWS),
        ("a.jsonl", "\ufeff" + JSONL + "\r\n", ROWS),
        ("a.CSV", CSV, TEXTS),
    ],
)
def test_every_text_format_gives_the_same_rows(
    tmp_path: Path, name: str, content: str, rows: list[Any], zipped: bool
) -> None:
    path = tmp_path / (name + ".gz" if zipped else name)
    path.write_bytes(gzip.compress(content.encode()) if zipped else content.encode())
    assert load(path).to_list() == rows
    assert load(str(path)).to_list() == rows


def test_parquet_keeps_class_names(tmp_path: Path) -> None:
    names = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    Dataset.from_list(ROWS, features=names).to_parquet(tmp_path / "a.parquet")
    back = load(tmp_path / "a.parquet")
    assert back.to_list() == ROWS
    assert back.features["label"].names == ["no", "yes"]


def test_csv_fields_may_hold_newlines_and_tsv_fields_lone_quotes(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text\n"two\nlines"\nthird\n')
    assert column(load(tmp_path / "a.csv"), "text") == ["two\nlines", "third"]
    many = [f"{'long ' * 50}\nline {row}" for row in range(8000)]  # more than is read at once
    (tmp_path / "b.csv").write_text("text\n" + "".join(f'"{text}"\n' for text in many))
    assert column(load(tmp_path / "b.csv"), "text") == many
    long = "word " * 600_000
    (tmp_path / "c.csv").write_text(f"text\n{long}\nb\n")
    assert column(load(tmp_path / "c.csv"), "text") == [long, "b"]
    (tmp_path / "a.tsv").write_text('text\tlabel\n"unclosed\t0\nnext "\t1\n')
    assert column(load(tmp_path / "a.tsv"), "text") == ['"unclosed', 'next "']


def test_headerless_files_and_other_separators(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("g1\t1\tone\ng2\t0\ttwo\n")
    rows = load(tmp_path / "a.tsv", names=["id", "label", "text"])
    assert rows.to_list() == [
        {"id": "g1", "label": "1", "text": "one"},
        {"id": "g2", "label": "0", "text": "two"},
    ]
    (tmp_path / "a.csv").write_text("id;text\n1;a,b\n")
    assert load(tmp_path / "a.csv", separator=";").to_list() == [{"id": "1", "text": "a,b"}]


def test_cells_are_texts_however_far_they_look_like_numbers(tmp_path: Path) -> None:
    """More rows than a reader looks at before it decides on a type."""
    many = [str(row) for row in range(300_000)]
    (tmp_path / "a.csv").write_text("text\n" + "\n".join([*many, "x", "007"]))
    assert column(load(tmp_path / "a.csv"), "text") == [*many, "x", "007"]


def test_orange_numbers_in_a_text_column_stay_text(tmp_path: Path) -> None:
    (tmp_path / "a.tab").write_text("label\ttext\nd\tstring\nclass\tmeta\n01\t42\n1\t43\n")
    assert load(tmp_path / "a.tab").to_list() == [
        {"label": "01", "text": "42"},
        {"label": "1", "text": "43"},
    ]


def test_json_rows_may_lack_keys_and_hold_line_separators(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": "x\u2028y"}\n{"a": "z", "b": 2}\n', encoding="utf-8")
    assert load(tmp_path / "a.jsonl").to_list() == [
        {"a": "x\u2028y", "b": None},
        {"a": "z", "b": 2},
    ]


INSIDE = {"version": "1", "data": [{"text": "x"}, {"text": "y"}], "more": {"rows": [{"text": "z"}]}}


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("zipped", [False, True])
def test_rows_under_a_key_of_an_object(tmp_path: Path, indent: int | None, zipped: bool) -> None:
    path = tmp_path / ("a.json.gz" if zipped else "a.json")
    content = json.dumps(INSIDE, indent=indent).encode()
    path.write_bytes(gzip.compress(content) if zipped else content)
    assert load(path, field="data").to_list() == [{"text": "x"}, {"text": "y"}]
    assert load(path, field="more.rows").to_list() == [{"text": "z"}]
    assert field_of(path) == "data"
    with pytest.raises(FedSieveError, match=r"say data\.field = 'data' or .* 'more\.rows'"):
        load(path, columns=Columns(texts=("text",)))


def test_a_key_may_hold_a_dot(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a.b": [{"t": 1}], "a": {"b": [{"t": 2}]}}')
    assert load(tmp_path / "a.json", field="a.b").to_list() == [{"t": 1}]


def test_an_object_that_is_the_row_is_read_as_one(tmp_path: Path) -> None:
    """Turns of a conversation are objects in a list as well."""
    row = {"messages": [{"role": "user", "content": "x"}]}
    (tmp_path / "a.json").write_text(json.dumps(row))
    assert load(tmp_path / "a.json", columns=Columns(texts=("messages",))).to_list() == [row]


@pytest.mark.parametrize(
    ("name", "content", "field", "said"),
    [
        ("a.json", json.dumps(INSIDE), "date", "no field 'date' .*'data'"),
        ("a.json", json.dumps(INSIDE), "more", "there is an object, and no list of rows"),
        ("a.json", json.dumps(INSIDE), "version.x", "no field 'version.x'"),
        ("a.json", '[{"text": "x"}]', "data", "is a list and has no field 'data'"),
        ("a.json", '{"data": ["x"]}', "data", "row 0: str instead of an object"),
        ("a.json", '{"data": []}', "data", "holds no rows"),
        ("a.json", '{"data": ', "data", "not valid JSON"),
        ("a.jsonl", '{"text": "x"}', "data", "for JSON files"),
        ("a.csv", "text\nx\n", "data", "for JSON files"),
    ],
)
def test_a_field_that_holds_no_rows(
    tmp_path: Path, name: str, content: str, field: str, said: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(FedSieveError, match=said):
        load(tmp_path / name, field=field)


def test_files_are_joined_in_the_order_given(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.csv").write_text(f"text\n{name}\n")
    assert column(load([tmp_path / "b.csv", str(tmp_path / "a.csv")]), "text") == ["b", "a"]


def test_a_folder_of_files_has_the_splits_that_its_names_say(tmp_path: Path) -> None:
    for name in ("news-train", "news-test", "constraint-test"):
        (tmp_path / f"{name}.csv").write_text(f"text\n{name}\n")
    # "constraint" holds the letters of "train", but not the word.
    assert column(load(tmp_path, "train"), "text") == ["news-train"]
    assert column(load(str(tmp_path), "test"), "text") == ["constraint-test", "news-test"]
    with pytest.raises(FedSieveError, match="several splits: say which of test, train"):
        load(tmp_path)
    with pytest.raises(FedSieveError, match=r"'dev' as a word of its name.*news-train\.csv"):
        load(tmp_path, "dev")


def test_a_folder_of_files_without_splits_is_read_whole(tmp_path: Path) -> None:
    for name in ("part-0", "part-1"):
        (tmp_path / f"{name}.csv").write_text(f"text\n{name}\n")
    (tmp_path / "LICENSE").write_text("none")
    (tmp_path / ".hidden.json").write_text('{"text": "hidden"}')
    assert column(load(tmp_path), "text") == ["part-0", "part-1"]


def test_folders_that_datasets_saved(tmp_path: Path) -> None:
    one = Dataset.from_list(ROWS)
    one.save_to_disk(tmp_path / "one")
    DatasetDict({"train": one, "test": one.select([0])}).save_to_disk(tmp_path / "two")
    assert load(tmp_path / "one").to_list() == ROWS
    assert load(tmp_path / "two", "test").to_list() == ROWS[:1]
    for folder, split, message in (
        ("one", "train", "has no splits"),
        ("two", None, "several splits: say which of train, test"),
        ("two", "dev", "no split 'dev'"),
    ):
        with pytest.raises(FedSieveError, match=message):
            load(tmp_path / folder, split)


@pytest.mark.parametrize("spoil", [mapped.written_over, mapped.cut_off])
def test_what_becomes_of_a_saved_folder_concerns_nobody_who_read_it(
    tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    """`datasets` maps its files into memory: cut off, the process that reads them ends."""
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "set")
    read = load(tmp_path / "set")
    (file,) = (tmp_path / "set").glob("*.arrow")
    spoil(file)
    assert not mapped.is_mapped(file)
    assert read.to_list() == ROWS


def test_a_saved_folder_that_was_cut_off_between_two_parts_is_refused(tmp_path: Path) -> None:
    """Each part of a file has a thousand rows, and Arrow reads those that are there."""
    for name, rows in (("long", ROWS * 2000), ("short", ROWS)):
        Dataset.from_list(rows).save_to_disk(tmp_path / name)
    assert len(load(tmp_path / "long")) == len(ROWS) * 2000
    for name in ("long", "short"):
        (file,) = (tmp_path / name).glob("*.arrow")
        whole = file.read_bytes()
        stream = pa.BufferReader(whole)
        parts = pa.ipc.MessageReader.open_stream(stream)
        ends = []
        with contextlib.suppress(StopIteration):
            while parts.read_next_message():
                ends.append(stream.tell())
        assert len(ends) == (2 if name == "short" else 1 + len(ROWS) * 2)
        for end in ends:
            file.write_bytes(whole[:end])
            with pytest.raises(FedSieveError, match=rf"{file.name} is cut off: it has no end"):
                load(tmp_path / name)
        file.write_bytes(whole)
        load(tmp_path / name)


@pytest.mark.parametrize("times", [2, 1500])
def test_a_saved_folder_that_names_a_file_twice_is_refused(tmp_path: Path, times: int) -> None:
    """Each time, its rows would be there again: a small folder may ask for all of the memory."""
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "set")
    state = tmp_path / "set" / "state.json"
    told = json.loads(state.read_text(encoding="utf-8"))
    told["_data_files"] *= times
    state.write_text(json.dumps(told), encoding="utf-8")
    with pytest.raises(FedSieveError, match=r"state.json: it names 'data-.*arrow' twice"):
        load(tmp_path / "set")


def test_a_saved_folder_that_names_no_file_is_refused(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "set")
    (tmp_path / "set" / "state.json").write_text('{"_data_files": []}', encoding="utf-8")
    with pytest.raises(FedSieveError, match=r"state.json: it names no file of rows"):
        load(tmp_path / "set")


def test_a_selection_of_old_is_not_taken_for_all_rows(tmp_path: Path) -> None:
    """`datasets` 1 noted beside the rows which of them count, and no version since looks there."""
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "set")
    state = tmp_path / "set" / "state.json"
    told = json.loads(state.read_text(encoding="utf-8"))
    for noted, refused in (([], False), (None, False), ([{"filename": "indices.arrow"}], True)):
        state.write_text(json.dumps({**told, "_indices_data_files": noted}), encoding="utf-8")
        if not refused:
            assert load(tmp_path / "set").to_list() == ROWS
            continue
        with pytest.raises(FedSieveError, match=r"which of its rows count.*flatten_indices"):
            load(tmp_path / "set")


NO_FILES: dict[str, Callable[[Path], object]] = {
    "a link to nothing": lambda path: path.symlink_to("../annex/objects/SHA256"),
    "a link in circles": lambda path: path.symlink_to(path.name),
    "a folder": lambda path: path.mkdir(),
    "a pipe": lambda path: os.mkfifo(path),
}


@pytest.mark.parametrize("what", NO_FILES)
@pytest.mark.parametrize("name", ["b.csv", "b.csv.gz", "b.jsonl", "B.PARQUET"])
def test_a_folder_with_what_is_called_like_rows_and_is_no_file_is_refused(
    tmp_path: Path, what: str, name: str
) -> None:
    """What is not fetched yet, for example: its rows were missed by nobody."""
    (tmp_path / "a.csv").write_text(CSV, encoding="utf-8")
    rows = load(tmp_path).to_list()
    NO_FILES[what](tmp_path / name)
    with pytest.raises(FedSieveError, match=rf"{name} is (a link that leads nowhere|no file): "):
        load(tmp_path)
    (tmp_path / name).rename(tmp_path / f".{name}")
    assert load(tmp_path).to_list() == rows


def arrow(rows: int, *, legacy: bool = False) -> bytes:
    """A stream of so many rows, ten a part."""
    table = pa.table({"text": [f"row {number}" for number in range(rows)]})
    out = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(use_legacy_format=legacy)
    with pa.ipc.new_stream(out, table.schema, options=options) as stream:
        stream.write_table(table, max_chunksize=10)
    return bytes(out.getvalue())


@pytest.mark.parametrize("legacy", [False, True])
def test_a_saved_file_ends_where_its_rows_do(tmp_path: Path, legacy: bool) -> None:
    """Also in the form of before Arrow 0.15, whose end is a number of four bytes."""
    Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "set")
    (file,) = (tmp_path / "set").glob("*.arrow")
    whole, mark = arrow(30, legacy=legacy), 4 if legacy else 8
    file.write_bytes(whole)
    assert len(load(tmp_path / "set")) == 30
    for spoilt, said in {
        whole[:-mark]: "is cut off: it has no end",
        whole + whole: "goes on behind its end",
        whole + b"\0": "goes on behind its end",
        whole + bytes(64) + whole[-mark:]: "goes on behind its end",
    }.items():
        file.write_bytes(spoilt)
        with pytest.raises(FedSieveError, match=f"{file.name} {said}"):
            load(tmp_path / "set")
    for count in range(1, len(whole), 13):  # wherever it is cut, somebody says so
        file.write_bytes(whole[:count])
        with pytest.raises(FedSieveError, match=r"cut off|damaged"):
            load(tmp_path / "set")


def test_rows_of_a_saved_folder_that_lead_nowhere_are_refused(tmp_path: Path) -> None:
    """A file of the right length and layout, whose numbers say where each text begins."""
    Dataset.from_dict({"text": ["first", "second"]}).save_to_disk(tmp_path / "set")
    (file,) = (tmp_path / "set").glob("*.arrow")
    offsets = b"".join(number.to_bytes(4, "little") for number in (0, 5, 11))
    whole = file.read_bytes()
    assert whole.count(offsets) == 1
    file.write_bytes(whole.replace(offsets, offsets[:4] + b"\xff\xff\xff\x7f" + offsets[8:]))
    with pytest.raises(FedSieveError, match=r"set is damaged: ArrowInvalid"):
        load(tmp_path / "set")


def test_the_path_to_the_hub_with_a_local_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # `load_dataset` takes a folder where it takes a hub name, and needs no network for it.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.csv").write_text(CSV.replace("None", "nothing"))
    (folder / "test.csv").write_text("text,label\nlast,0\n")
    assert sources._hub(str(folder), None, "test").to_list() == [{"text": "last", "label": 0}]
    with pytest.raises(FedSieveError, match="several splits: say which of train, test"):
        sources._hub(str(folder), None, None)
    with pytest.raises(FedSieveError, match=r"hub failed.*: ValueError.*dev"):
        sources._hub(str(folder), None, "dev")


def test_a_failed_hub_name_suggests_a_fetched_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        FedSieveError, match=r"did you mean '20newsgroups'.*ConnectionError: no route"
    ):
        load("20newsgroup", "train")


def test_a_fetched_name_comes_before_a_folder_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = tmp_path / "stored"
    for folder, word in ((stored, "fetched"), (tmp_path / "reuters", "local")):
        folder.mkdir()
        (folder / "x-train.csv").write_text(f"text\n{word}\n")
    monkeypatch.setattr(fetch, "cached", lambda name: stored)
    monkeypatch.chdir(tmp_path)
    assert column(load("reuters", "train"), "text") == ["fetched"]
    assert column(load("./reuters", "train"), "text") == ["local"]


@pytest.mark.parametrize("on", [True, False])
def test_the_progress_bar_setting_is_left_as_found(tmp_path: Path, on: bool) -> None:
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    before = datasets.are_progress_bars_disabled()
    try:
        (datasets.enable_progress_bars if on else datasets.disable_progress_bars)()
        load(tmp_path / "one")
        assert datasets.are_progress_bars_disabled() is not on
    finally:
        (datasets.disable_progress_bars if before else datasets.enable_progress_bars)()


def test_column_names_the_nearest() -> None:
    rows = Dataset.from_list(ROWS)
    assert column(rows, "label") == [1, 0, 1]
    assert column(rows.select([2, 1]).with_format("torch"), "label") == [1, 0]
    with pytest.raises(FedSieveError, match=r"no column 'lable' \(did you mean 'label'"):
        column(rows, "lable")


def files(**contents: str | bytes) -> Callable[[Path], Path]:
    """Write the files (`__` for the dot) and give the last one's path."""

    def write(folder: Path) -> Path:
        path = folder
        for name, content in contents.items():
            path = folder / name.replace("__", ".")
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (
            lambda f: files(train__csv=CSV)(f).with_name("trian.csv"),
            {},
            r"did you mean 'train\.csv'",
        ),
        (lambda f: f / "no" / "a.csv", {}, "nor the folder"),
        (lambda f: str(f / "no.csv"), {}, "there is no file"),
        (lambda f: [], {}, "list of data files is empty"),
        (lambda f: f, {}, "no data file in"),
        (files(a__csv=""), {}, "is empty"),
        (files(a__csv="text,label\n"), {}, "holds no rows"),
        (files(a__csv="text,label"), {}, "holds no rows"),
        (files(a__csv="\ufeff"), {}, "holds no rows"),
        (files(a__csv__gz=gzip.compress(b"")), {}, "holds no rows"),
        (files(a__json="[]"), {}, "holds no rows"),
        (files(a__csv="a,b\n1,2\n".encode("utf-16")), {}, "is UTF-16 or UTF-32: save it as UTF-8"),
        (files(a__jsonl='{"a": 1}'.encode("utf-16")), {}, "is UTF-16 or UTF-32: save it as UTF-8"),
        (files(a__csv=CSV), {"columns": Columns(("text",), ("lable",))}, "no column 'lable'.*'la"),
        (files(a__json="{}"), {"columns": Columns(("text",))}, "no column 'text'"),
        (files(a__jsonl="\n"), {}, "holds no rows"),
        (files(a__xml="<a/>"), {}, r"unknown extension '\.xml'.*\.jsonl"),
        (files(a__csv="a,b\n1,2\n3\n"), {}, "Expected 2 columns, got 1$"),  # and no word of the row
        (
            files(a__csv="text;label\na, b;1\n" * 9),
            {},
            r"';' seems to stand between its columns: say so, data.separator = ';'",
        ),
        (files(a__csv="a,a\n1,2\n"), {}, "column 'a' more than once"),
        (files(a__csv=b"text\n\xff\xfe\n"), {}, "column 'text' is not UTF-8"),
        (files(a__csv=f"text,label\n{'x' * (1 << 25)},1\n"), {}, "a row of more than 16 MiB"),
        (files(a__csv=CSV), {"split": "train"}, "has no split 'train'"),
        (files(a__csv=CSV), {"separator": "::"}, "one character"),
        (files(a__jsonl=JSONL), {"names": ["a"]}, "are for CSV and TSV"),
        (
            files(a__jsonl='{"a": 1}\n{"a": \n'),
            {},
            r"line 2: not a JSON object \(Expecting value, at character 7\)",
        ),
        (files(a__jsonl="1\n"), {}, "row 0: int instead of an object"),
        (files(a__json='[{"a": 1},'), {}, "not valid JSON"),
        (files(a__jsonl='{"a": 1}\n{"a": "x"}\n'), {}, "could not be read"),
        (files(a__jsonl=b'{"a": "\xff"}\n'), {}, "could not be read"),
        (files(a__tab="a\tb\n1\t2\n"), {}, "Orange's three header lines"),
        (files(a__tab="a\tb\nx\ty\nz\tw\n"), {}, "Orange's three header lines"),
        (files(a__parquet="no"), {}, "could not be read"),
        (files(a__csv__gz="no"), {}, "could not be read"),
        (files(a__csv__gz=gzip.compress(CSV.encode())[:-9]), {}, "could not be read: Truncated"),
        (files(a__jsonl__gz=gzip.compress(JSONL.encode())[:-9]), {}, "could not be read: Trunc"),
        (files(a__jsonl__gz=damaged(JSONL)), {}, "could not be read"),
        (files(a__tab__gz=damaged(ORANGE)), {}, "could not be read"),
        (files(a__jsonl='{"a": "\\ud800"}\n'), {}, "line 1 has half a character in column 'a'"),
        (files(a__json='[{"a": 1, "a": 2}]'), {}, "the key 'a' more than once"),
    ],
)
def test_bad_files(
    tmp_path: Path, make: Callable[[Path], Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(FedSieveError, match=message):
        load(make(tmp_path), **options)


def test_files_that_do_not_fit_together(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"label": 1}\n')
    (tmp_path / "b.jsonl").write_text('{"label": "x"}\n')
    with pytest.raises(FedSieveError, match=r"a\.jsonl, b\.jsonl do not fit together"):
        load(tmp_path)


@pytest.mark.parametrize("separator", ["é", "\0", "\n", '"', "ab", ""])
def test_a_separator_that_is_none_is_refused(tmp_path: Path, separator: str) -> None:
    (tmp_path / "rows.csv").write_text("text,label\na,b\n")
    with pytest.raises(FedSieveError, match="one character of ASCII is needed"):
        load(tmp_path / "rows.csv", separator=separator)


def test_what_is_there_and_is_no_file_is_not_said_to_be_missing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.csv")
    (tmp_path / "loop.csv").symlink_to(tmp_path / "nowhere.csv")
    for name in ("rows.csv", "loop.csv"):
        with pytest.raises(FedSieveError, match="is no file to read"):
            load(tmp_path / name)


def test_what_is_twice_is_found_at_once(tmp_path: Path) -> None:
    """However many keys there are beside it."""
    keys = [f"k{n}" for n in range(60_000)]
    (tmp_path / "a.jsonl").write_text(json.dumps(dict.fromkeys([*keys, "z"], 1))[:-1] + ', "z": 2}')
    began = time.monotonic()
    with pytest.raises(FedSieveError, match="the key 'z' more than once"):
        load(tmp_path / "a.jsonl")
    assert time.monotonic() - began < 20
