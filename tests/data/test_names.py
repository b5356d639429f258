"""Names (labels, clients): the same in every format, in whatever company they come."""

import datetime
import gzip
import json
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetInfo, Features, Value

from fedsieve.data import sources
from fedsieve.data.files import Columns
from fedsieve.data.names import alike, in_order, name_of, numbers_of
from fedsieve.data.sources import load, names_in
from fedsieve.errors import FedSieveError

USED = Columns(("text",), ("label",))
# Each of them is something else to some reader of CSV.
CELLS = [
    "01", "02", "10", "A3", "1e5", "250.00", "0x10", "1_000", "+1", "-0", "1.", ".5", "007",
    "1234567890123456789012345678901234567890", "true", "False", "TRUE", "yes", "NA", "N/A", "None",
    "nan", "NaN", "null", "inf", "-inf", "2024-01-05", "2024-01-05 10:00:00", "05/01/2024", "12:30",
    "1,5", "#N/A", "-", "?", "no news",
]  # fmt: skip
FAMILIES = [CELLS, ["01", "02"], ["1e5", "2e5"], ["true", "false"], ["250.00", "250.10"],
            ["2024-01-05", "2024-02-05"], ["NA", "None"], ["1", "2"]]  # fmt: skip


def texts(labels: Sequence[str]) -> list[tuple[str, str]]:
    return [(f"text {number}", label) for number, label in enumerate(labels)]


def csv(path: Path, labels: Sequence[str]) -> None:
    quoted = [(text, f'"{label}"' if "," in label else label) for text, label in texts(labels)]
    path.write_text("text,label\n" + "".join(f"{a},{b}\n" for a, b in quoted), encoding="utf-8")


def windows_csv(path: Path, labels: Sequence[str]) -> None:
    """A byte-order mark, quotes around everything, CRLF, and no end of the last line."""
    lines = ['"text","label"', *(f'"{text}","{label}"' for text, label in texts(labels))]
    path.write_bytes("\r\n".join(lines).encode("utf-8-sig"))


def tsv(path: Path, labels: Sequence[str]) -> None:
    path.write_text("text\tlabel\n" + "".join(f"{a}\t{b}\n" for a, b in texts(labels)))


def orange(path: Path, labels: Sequence[str]) -> None:
    head = "text\tlabel\nstring\tcontinuous\nmeta\tclass\n"
    path.write_text(head + "".join(f"{a}\t{b}\n" for a, b in texts(labels)))


def jsonl(path: Path, labels: Sequence[Any]) -> None:
    rows = [json.dumps({"text": text, "label": label}) for text, label in texts(labels)]
    path.write_text("\n".join(rows))


def json_list(path: Path, labels: Sequence[str]) -> None:
    path.write_text(json.dumps([{"text": text, "label": label} for text, label in texts(labels)]))


def parquet(make: Callable[[list[Any]], pa.Array]) -> Callable[[Path, Sequence[Any]], None]:
    def write(path: Path, labels: Sequence[Any]) -> None:
        text = [text for text, _ in texts(labels)]
        pq.write_table(pa.table({"text": text, "label": make(list(labels))}), path)

    return write


def class_label(path: Path, labels: Sequence[str]) -> None:
    names = [*dict.fromkeys(labels)]
    kinds = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    rows = [{"text": text, "label": names.index(label)} for text, label in texts(labels)]
    Dataset.from_list(rows, features=kinds).to_parquet(path)


def pandas_parquet(path: Path, labels: Sequence[str]) -> None:
    text = [text for text, _ in texts(labels)]
    pd.DataFrame({"text": text, "label": pd.Categorical(labels)}).to_parquet(path)


FORMATS: list[tuple[str, Callable[[Path, Sequence[str]], None]]] = [
    ("a.csv", csv),
    ("b.csv", windows_csv),
    ("a.tsv", tsv),
    ("a.tab", orange),
    ("a.jsonl", jsonl),
    ("a.json", json_list),
    ("a.parquet", parquet(pa.array)),
    ("large.parquet", parquet(lambda labels: pa.array(labels, pa.large_string()))),
    ("view.parquet", parquet(lambda labels: pa.array(labels, pa.string_view()))),
    ("dictionary.parquet", parquet(lambda labels: pa.array(labels).dictionary_encode())),
    ("pandas.parquet", pandas_parquet),
    ("hub.parquet", class_label),
]


@pytest.mark.parametrize(("name", "write"), FORMATS, ids=[name for name, _ in FORMATS])
@pytest.mark.parametrize("cells", FAMILIES, ids=lambda cells: cells[0])
def test_texts_are_names_as_they_stand_there_alone_or_among_others(
    tmp_path: Path, name: str, write: Callable[[Path, Sequence[str]], None], cells: list[str]
) -> None:
    write(tmp_path / name, cells)
    assert names_in(load(tmp_path / name, columns=USED), "label") == cells
    if not name.endswith("parquet"):
        zipped = tmp_path / f"{name}.GZ"
        zipped.write_bytes(gzip.compress((tmp_path / name).read_bytes()))
        assert names_in(load(zipped, columns=USED), "label") == cells


@pytest.mark.parametrize(
    ("write", "values", "names"),
    [
        (parquet(pa.array), [1, 2, 10], ["1", "2", "10"]),
        (parquet(lambda v: pa.array(v, pa.uint8())), [1, 2], ["1", "2"]),
        (parquet(lambda v: pa.array(v, pa.uint64())), [2**64 - 1], [str(2**64 - 1)]),
        (parquet(lambda v: pa.array(v).dictionary_encode()), [1, 2, 1], ["1", "2", "1"]),
        (parquet(pa.array), [True, False], ["True", "False"]),
        (parquet(pa.array), [1.0, 2.0, -0.0], ["1", "2", "0"]),
        (parquet(lambda v: pa.array(v, pa.decimal128(5, 2))), [Decimal("250.00")], ["250.00"]),
        (parquet(pa.array), [datetime.date(2024, 1, 5)], ["2024-01-05"]),
        (
            parquet(lambda v: pa.array(v, pa.timestamp("ns"))),
            [datetime.datetime(2024, 1, 5, 10)],
            ["2024-01-05 10:00:00"],
        ),
        (jsonl, [1, 2], ["1", "2"]),
        (jsonl, [2**70, -(2**65)], [str(2**70), str(-(2**65))]),
        (jsonl, [True, False], ["True", "False"]),
        (jsonl, [1.0, 2], ["1", "2"]),
        (jsonl, ["a", None, ""], ["a", None, None]),
        (parquet(pa.array), ["a", None, " \t"], ["a", None, None]),
        (parquet(pa.array), [1.0, None, float("nan")], ["1", None, None]),
    ],
)
def test_values_that_have_a_type_have_one_spelling(
    tmp_path: Path, write: Callable[[Path, Sequence[Any]], None], values: list[Any], names: Any
) -> None:
    path = tmp_path / ("a.jsonl" if write is jsonl else "a.parquet")
    write(path, values)
    assert names_in(load(path, columns=USED), "label") == names


def test_what_pandas_writes_is_the_same_in_every_format(tmp_path: Path) -> None:
    """The law that decides the spellings: pandas' own words for the same table."""
    columns: dict[str, list[Any]] = {
        "integer": [1, 20, -3],
        "code": ["01", "1e5", "250.00"],
        "word": ["true", "NA", "None"],
        "boolean": [True, False, True],
        "date": [datetime.date(2024, 1, day) for day in (1, 2, 3)],
    }
    table = pd.DataFrame(columns)
    table.to_csv(tmp_path / "a.csv", index=False)
    table.to_csv(tmp_path / "a.tsv", index=False, sep="\t")
    table.astype({"date": str}).to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    table.to_parquet(tmp_path / "a.parquet")
    for name in columns:
        used = Columns((), (name,))
        found = [names_in(load(path, columns=used), name) for path in sorted(tmp_path.iterdir())]
        assert found == [found[0]] * 4
        assert found[0] == [str(value) for value in columns[name]]


def test_space_around_and_composition_do_not_make_another_name() -> None:
    composed, apart = "caf\u00e9", "cafe\u0301"
    assert composed != apart
    for text in (composed, apart, f" {apart}\t", f"\u00a0{composed}\r"):
        assert name_of(text) == composed
    assert name_of("\ufb01") == "\ufb01"  # only what is the same text: a ligature is not
    assert name_of(np.int64(3)) == name_of(np.str_("3")) == "3"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.5, r"holds 0\.5, and float values are names only where they are whole"),
        (float("inf"), "holds inf"),
        (float(2**53 + 2), "holds .*, and float values beyond 2.53 stand for several"),
        (["a"], "holds a list, and a name is one text"),
        ({"a": 1}, "holds an object"),
        (b"a", "holds bytes"),
        (datetime.timedelta(1), "holds a value of type timedelta"),
        ("a\nb,1\nc", "a name has no line break .is a quotation mark left open"),
        ("word " * 300, "holds a text of 1,499 letters, 'word .* and a name has at most 1,000"),
        ("a\ud800", r"holds 'a.ud800', which has half a character"),
        (10**1000, "holds a number of more than 1,000 digits"),
        pytest.param(-(10**5000), "holds a number of more than 1,000 digits", id="huge"),
    ],
)
def test_values_that_are_no_names(value: Any, said: str) -> None:
    with pytest.raises(FedSieveError, match=said):
        name_of(value)


def test_the_longest_name_is_one() -> None:
    assert name_of("a" * 1000 + " ") == "a" * 1000
    assert name_of(10**1000 - 1) == "9" * 1000


def test_order_depends_on_the_names_alone() -> None:
    assert in_order(["10", "2", "-1", "10"]) == ["-1", "2", "10"]
    assert in_order(["10", "02", "01"]) == ["01", "02", "10"]
    assert in_order(["10", "2", "a"]) == ["10", "2", "a"]
    assert in_order([]) == []


def test_booleans_and_words_for_them_agree_where_no_other_spelling_is_a_class() -> None:
    for names in (["False", "True"], ["false", "true"], ["FALSE", "TRUE"]):
        found = numbers_of(names)
        assert [found[name] for name in ("False", "false", "FALSE")] == [0, 0, 0]
        assert [found[name] for name in ("True", "true", "TRUE")] == [1, 1, 1]
    assert numbers_of(["True", "true", "yes"]) == {"True": 0, "true": 1, "yes": 2}
    assert set(numbers_of(["cars", "Wine"])) == {"cars", "Wine"}


@pytest.mark.parametrize(
    ("names", "pairs"),
    [
        (["True", "no", "true"], [("True", "true")]),
        (["0", "0.0", "1"], [("0", "0.0")]),
        (["-0", "0", "+0", "00"], [("-0", "0", "+0", "00")]),
        (["01", "1", "10", "10.50", "10.5"], [("01", "1"), ("10.50", "10.5")]),
        (["1e5", "100000", "1E5", "1e6"], [("1e5", "100000", "1E5")]),
        (["Cars", "cars", "CARS", "car"], [("Cars", "cars", "CARS")]),
        (["stra\u00dfe", "STRASSE"], [("stra\u00dfe", "STRASSE")]),
        (["new york", "new  york", "New\u00a0York"], [("new york", "new  york", "New\u00a0York")]),
        (["\ufb01n", "fin"], [("\ufb01n", "fin")]),
        (["cafe", "caf\u00e9"], []),
        (["1", "true", "yes", "nan", "inf", "1_0", "10", "0x10", "16"], []),
        (["1e999999999999999999999", "9" * 400, "a-b", "a b"], []),
    ],
)
def test_names_that_differ_in_spelling_alone(names: list[str], pairs: list[Any]) -> None:
    assert alike(names) == pairs


def test_a_number_that_the_class_label_does_not_name_is_no_name(tmp_path: Path) -> None:
    """-1 is how the hub's test sets say that a label is not given."""
    kinds = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    for number in (-1, 2):
        table = pa.table({"text": ["a", "b", "c"], "label": [0, number, None]})
        rows = Dataset(table.cast(kinds.arrow_schema), info=DatasetInfo(features=kinds))
        found = names_in(rows, "label")
        assert (found[0], found[2]) == ("no", None)
        said = f"row 1 of column 'label' holds {number}, and its 2 classes have the numbers 0 to 1"
        assert said in str(found[1])
        assert isinstance(found[1], FedSieveError)
        rows.to_parquet(tmp_path / "a.parquet")
        jsonl(tmp_path / "b.jsonl", ["no"])
        with pytest.raises(FedSieveError, match=rf"a\.parquet: {said}"):
            load(tmp_path, columns=USED)


# --- several files, one column


def test_files_of_other_types_are_one_column_of_names(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", [1, 2])
    csv(tmp_path / "b.csv", ["1", "01"])
    parquet(lambda v: pa.array(v, pa.int32()))(tmp_path / "c.parquet", [2, None])
    parquet(lambda v: pa.array(v, pa.large_string()))(tmp_path / "d.parquet", ["x"])
    class_label(tmp_path / "e.parquet", ["y", "x"])
    paths = sorted(tmp_path.iterdir())
    expected = ["1", "2", "1", "01", "2", None, "x", "y", "x"]
    with pytest.raises(FedSieveError, match=r"e\.parquet names the classes .* a\.jsonl numbers"):
        load(paths, columns=USED)
    assert names_in(load(paths[:-1], columns=USED), "label") == expected[:-2]
    for order in (1, -1):  # whichever file comes first
        some = [paths[1], *paths[3:]][::order]
        found = names_in(load(some, columns=USED), "label")
        assert sorted(map(str, found)) == ["01", "1", "x", "x", "y"]


def test_files_whose_classes_have_other_numbers(tmp_path: Path) -> None:
    class_label(tmp_path / "a.parquet", ["no", "yes"])
    class_label(tmp_path / "b.parquet", ["yes", "no"])
    assert names_in(load(tmp_path, columns=USED), "label") == ["no", "yes", "yes", "no"]
    with pytest.raises(FedSieveError, match="do not fit together"):
        load(tmp_path)  # where nobody says that it is a name


def test_numbers_are_no_texts_in_some_file(tmp_path: Path) -> None:
    """One file whose texts are numbers is an error, not a text for being beside other files."""
    (tmp_path / "a.jsonl").write_text('{"text": "x", "label": "a"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": 5, "label": "b"}\n')
    with pytest.raises(FedSieveError, match=r"a\.jsonl, b\.jsonl do not fit together.*text"):
        load(tmp_path, columns=USED)


@pytest.mark.parametrize(
    ("values", "feature", "names"),
    [
        ([1, 0], ClassLabel(names=["no", "yes"]), ["yes", "no"]),
        ([1, 0], Value("int8"), ["1", "0"]),
        ([True, False], Value("bool"), ["True", "False"]),
        ([1.0, 0.0], Value("float32"), ["1", "0"]),
        (["01", "1"], Value("large_string"), ["01", "1"]),
    ],
)
def test_types_of_the_hub(
    monkeypatch: pytest.MonkeyPatch, values: list[Any], feature: Any, names: list[str]
) -> None:
    features = Features({"text": Value("string"), "label": feature, "odd": [Value("int64")]})
    rows = Dataset.from_dict(
        {"text": ["a", "b"], "label": values, "odd": [[1], []]}, features=features
    )
    monkeypatch.setattr(sources, "_hub", lambda *_: rows)
    found = load("someone/something", columns=USED)
    assert found.column_names == ["text", "label"]
    assert names_in(found, "label") == names
    with pytest.raises(FedSieveError, match=r"someone/something: no column 'lable'.*label"):
        load("someone/something", columns=Columns(("text",), ("lable",)))


def test_an_object_that_answers_nothing_is_no_name() -> None:
    class Wild:
        def __getattr__(self, name: str) -> object:
            raise RuntimeError("not mine")

    with pytest.raises(FedSieveError, match="a value of type Wild, and a name is one text"):
        name_of(Wild())
