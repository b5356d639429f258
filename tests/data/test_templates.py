"""Templates: what a column is made of, what is refused, and that they work wherever rows are."""

import datetime
import json
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDataset, Value

import fedsieve
from fedsieve.data import sources, templates
from fedsieve.data.files import Columns
from fedsieve.errors import FedSieveError
from fedsieve.recipe import examples
from fedsieve.recipe.schema import Data
from fedsieve.sites import resident
from tests import runs
from tests.conftest import LABELS, Tiny, texts
from tests.sites.sites import settled

MIXED: dict[str, list[Any]] = {
    "ask": ["why ?", " spaced  ", "two\nlines", "", "{x}"],
    "n": [1, 2, 3, 40, 5],
    "yes": [True, False, True, True, False],
    "whole": [1.0, 2.0, -3.0, 0.0, 1e6],
    "day": [datetime.date(2024, 5, 1)] * 5,
    "price": [Decimal("2.50")] * 5,
    "kind": [0, 1, 0, 1, 1],
    "a column": list("vwxyz"),
    "#1": list("abcde"),
}
KIND = ClassLabel(names=["no", "yes"])


def mixed() -> Dataset:
    return Dataset.from_dict(MIXED).cast_column("kind", KIND)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            "q: {ask} n: {n}",
            [f"q: {a} n: {n}" for a, n in zip(MIXED["ask"], MIXED["n"], strict=True)],
        ),
        ("{yes}|{whole}", ["True|1", "False|2", "True|-3", "True|0", "False|1000000"]),
        ("{day} {price}", ["2024-05-01 2.50"] * 5),
        ("{kind}", ["no", "yes", "no", "yes", "yes"]),
        ("{a column}{#1}", ["va", "wb", "xc", "yd", "ze"]),
        ("{{{n}}} {{n}}", [f"{{{n}}} {{n}}" for n in MIXED["n"]]),
        ("{n}{n}\n{n}", [f"{n}{n}\n{n}" for n in MIXED["n"]]),
    ],
)
@pytest.mark.parametrize("parted", [False, True])
def test_columns_are_filled_in(template: str, expected: list[str], parted: bool) -> None:
    rows = mixed()
    if parted:
        rows, expected = rows.select([3, 1]), [expected[3], expected[1]]
    made = templates.filled(rows, [template, "ask"])
    assert sources.column(made, template) == expected
    assert set(made.column_names) == {*MIXED, template}
    assert templates.bad(made, [template]) == {}


@pytest.mark.parametrize(
    "template",
    ["{}", "{ }", "{n.real}", "{n[0]}", "{n!r}", "{n:>3}", "{n:}", "{n", "n}", "{n}}", "{a{n}}",
     "{ask.__class__.__mro__}", "}{", "{n}{"],
)  # fmt: skip
def test_anything_but_plain_names_is_refused_in_a_sentence(template: str) -> None:
    with pytest.raises(FedSieveError, match=r"brace") as refused:
        templates.filled(mixed(), [template])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("template", "near"), [("a {asc}", "'ask'"), ("{ask} {Price}", "'price'")])
def test_a_column_that_is_missing_names_the_nearest(template: str, near: str) -> None:
    with pytest.raises(FedSieveError, match=f"no column .*did you mean {near}"):
        templates.filled(mixed(), [template])


@pytest.mark.parametrize("name", ["{n}", "is {n} {odd", "{n.x}", "}", "{{a}}"])
def test_a_column_that_is_called_so_is_taken_as_it_is(name: str, tmp_path: Path) -> None:
    rows = [{name: "as it is", "n": "1", "label": "a"}, {name: "so", "n": "2", "label": "b"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = examples.load_rows(Data(train="x", text=name, label="label"), str(path), None)
    assert sources.column(read, name) == ["as it is", "so"]
    assert set(read.column_names) == {name, "label"}
    stream = IterableDataset.from_generator(lambda: iter(rows))
    assert set(sources.gathered(stream, Columns((name,), ("label",))).column_names) == {
        name,
        "label",
    }


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "holds nothing"),
        (0.5, "holds 0.5, and float values are names only where they are whole"),
        (float("nan"), "holds nothing"),
        (["a"], "holds a list"),
        ({"a": 1}, "holds an object"),
        (b"a", "holds bytes"),
    ],
)
def test_a_value_that_is_no_text_makes_a_bad_row(value: Any, said: str) -> None:
    good: Any = {float: 1.0, list: None, dict: None, bytes: None}.get(type(value), "fine")
    given = [value if row == 2 else good for row in range(3)]
    rows = Dataset.from_dict({"n": list("abc"), "odd": given})
    made = templates.filled(rows, ["{n} {odd}"])
    bad = templates.bad(made, ["{n} {odd}"])
    assert 2 in bad
    assert f"row 2 of column 'odd' {said}" in str(bad[2])
    assert (0 in bad) == (good is None)


WORDS: list[dict[str, Any]] = [
    {"one": t, "n": n, "label": label} for n, (t, label) in enumerate(texts(60, 1))
]
TEXT = "n {n} : {one}"


def jsonl(folder: Path) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row | {"other": {"deep": 1}}) + "\n" for row in WORDS))
    return str(path)


def csv(folder: Path) -> str:
    path = folder / "rows.csv"
    path.write_text(
        "one,n,label,other\n" + "".join(f"{r['one']},{r['n']},{r['label']},x\n" for r in WORDS)
    )
    return str(path)


def tsv(folder: Path) -> str:
    path = folder / "rows.tsv"
    path.write_text(
        "one\tn\tlabel\n" + "".join(f"{r['one']}\t{r['n']}\t{r['label']}\n" for r in WORDS)
    )
    return str(path)


def parquet(folder: Path) -> str:
    Dataset.from_list(WORDS).to_parquet(folder / "rows.parquet")
    return str(folder / "rows.parquet")


def files(folder: Path) -> str:
    home = folder / "files"
    home.mkdir()
    for number in (0, 1):
        Dataset.from_list(WORDS[number::2]).to_parquet(home / f"{number}.parquet")
    return str(home)


def saved(folder: Path) -> str:
    Dataset.from_list(WORDS).save_to_disk(folder / "saved")
    return str(folder / "saved")


@pytest.mark.parametrize("write", [jsonl, csv, tsv, parquet, files, saved])
def test_any_rows_are_read_for_a_template_and_only_the_columns_it_names(
    tmp_path: Path, write: Callable[[Path], str]
) -> None:
    data = Data(train=write(tmp_path), text=TEXT, label="label")
    rows = examples.load_rows(data, data.train, None)
    assert set(rows.column_names) == {"one", "n", "label", TEXT}
    expected = {f"n {row['n']} : {row['one']}" for row in WORDS}
    assert set(sources.column(rows, TEXT)) == expected
    with pytest.raises(FedSieveError, match=r"no column 'on'.*did you mean 'one'"):
        examples.load_rows(data.model_copy(update={"text": "{on}"}), data.train, None)


def test_a_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    made = DatasetDict(train=Dataset.from_list(WORDS))
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: made)
    rows = examples.load_rows(Data(train="x", text=TEXT, label="label"), "some/set", "train")
    assert sources.column(rows, TEXT)[0] == f"n 0 : {WORDS[0]['one']}"


def kinds(tiny: Tiny) -> Iterator[tuple[str, dict[str, Any], list[dict[str, Any]]]]:
    """Each task that reads texts: what is told beside the rows."""
    yield "classification", {"text": TEXT, "label": "label"}, WORDS
    yield "classification", {"text": "{one}", "text_b": "{n}", "label": "label"}, WORDS
    yield "regression", {"text": TEXT, "label": "n"}, WORDS
    sets = [row | {"label": [row["label"]]} for row in WORDS]
    yield "multi-label", {"text": TEXT, "label": "label"}, sets
    yield "causal-lm", {"text": TEXT}, WORDS
    yield "causal-lm", {"prompt": "n {n} : {one} ?", "completion": " {label} ."}, WORDS


@pytest.mark.filterwarnings("ignore:.*no padding token", "ignore:the model's head is for")
@pytest.mark.parametrize("number", range(6))
def test_every_task_reads_the_same_as_with_the_text_in_a_column(
    tiny: Tiny, tmp_path: Path, number: int, no_report: None
) -> None:
    task, data, rows = list(kinds(tiny))[number]
    plain, own = [dict(row) for row in rows], dict(data)
    for name in {"text", "text_b", "prompt", "completion"} & set(data):
        own[name] = name
        for row in plain:
            row[name] = data[name].format(**{key: row[key] for key in ("n", "one", "label")})
    scores = []
    for place, columns, written in (("made", data, rows), ("plain", own, plain)):
        path = tmp_path / f"{place}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in written))
        base = tiny.gpt2 if task == "causal-lm" else tiny.bert
        runs.start(
            tiny,
            tmp_path / place,
            model={"source": str(base), "task": task},
            data={"train": str(path), "test": str(path), "max_length": 20, **columns},
            lora__targets=None,
            partition={"kind": "iid", "clients": 3},
            rounds=1,
        )
        scores.append([(row["eval_loss"], row["metrics"]) for row in runs.lines(tmp_path / place)])
    assert scores[0] == scores[1]


@pytest.mark.parametrize("partition", ["iid", "column"])
def test_a_row_without_one_of_the_columns_is_a_bad_row(
    tiny: Tiny, tmp_path: Path, partition: str, no_report: None
) -> None:
    rows = [row | {"who": f"site{n % 3}"} for n, row in enumerate(WORDS)]
    rows[7]["n"] = None
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given: dict[str, Any] = {
        "data": {"train": str(path), "text": TEXT, "label": "label"},
        "cohort": 2,
        "rounds": 1,
    }
    said = "row 7 of column 'n' holds nothing"
    if partition == "iid":
        with pytest.raises(FedSieveError, match=said):
            runs.start(tiny, tmp_path / "run", **given, partition={"kind": "iid", "clients": 3})
        return
    own: dict[str, Any] = {"partition": {"kind": "column", "column": "who"}}
    with pytest.warns(UserWarning, match=f"client 'site1': {said}"):
        runs.start(tiny, tmp_path / "run", **given, **own)
    assert {row["client"] for row in runs.lines(tmp_path / "run", "clients.jsonl")} <= {
        "site0",
        "site2",
    }


@pytest.mark.parametrize("stream", [False, True])
def test_in_a_notebook(tiny: Tiny, stream: bool) -> None:
    def given(rows: list[dict[str, Any]]) -> Dataset | IterableDataset:
        made = Dataset.from_list(rows)
        return made.to_iterable_dataset() if stream else made

    odd: list[dict[str, Any]] = [*WORDS[:5], {"one": None, "n": 3, "label": LABELS[0]}]
    clients = {"good": given(WORDS[:30]), "fine": given(WORDS[30:]), "odd": given(odd)}
    with pytest.warns(UserWarning, match="'odd': row 5 of column 'one' holds nothing"):
        run = fedsieve.finetune(
            tiny.bert, clients, fedsieve.fedit(), rounds=1, text=TEXT, test=given(WORDS[:9])
        )
    assert run.metrics[0].eval_examples == 9
    with pytest.raises(FedSieveError, match="test: row 5 of column 'one' holds nothing"):
        fedsieve.finetune(
            tiny.bert, [given(WORDS)], fedsieve.fedit(), rounds=1, text=TEXT, test=given(odd)
        )
    with pytest.raises(FedSieveError, match=r"no column 'on'.*did you mean 'one'"):
        fedsieve.finetune(tiny.bert, [given(WORDS)], fedsieve.fedit(), rounds=1, text="{on}")


def test_at_a_site(tmp_path: Path) -> None:
    jsonl(tmp_path)
    (tmp_path / "site.toml").write_text(
        f'name = "north"\n[data]\ntrain = "rows.jsonl"\ntext = "{TEXT}"\nlabel = "label"\n'
    )
    state: resident.Resident = settled(tmp_path / "site.toml")
    assert sources.column(state.rows, TEXT)[1] == f"n 1 : {WORDS[1]['one']}"


def test_classes_of_the_hub_keep_their_names_in_texts_and_as_labels() -> None:
    features = Features({"one": Value("string"), "label": ClassLabel(names=["b", "a"])})
    rows = Dataset.from_dict({"one": ["x", "y"], "label": [0, 1]}, features=features)
    made = templates.filled(rows, ["{label}: {one}"])
    assert sources.column(made, "{label}: {one}") == ["b: x", "a: y"]
    assert made.features["label"] == features["label"]


def test_what_a_template_makes_is_bounded_before_it_is_made() -> None:
    rows = Dataset.from_dict({"t": ["x" * 5_000] * 40 + ["y"]})
    long = "{t}" * 900
    made = templates.filled(rows, [long])
    assert made[long] == [None] * 40 + ["y" * 900]
    assert "would have 4,500,000 letters" in str(templates.bad(made, [long])[0])
    with pytest.raises(FedSieveError, match="has 1,001 pieces: a template has at most 1,000"):
        templates.filled(rows, ["{t}" * 1001])
