"""From files to examples, as a recipe says: labels and clients keep their names in every format,
and a client whose rows are bad is left out by name.
"""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from fedsieve.data import partition, sources
from fedsieve.data.files import Columns
from fedsieve.errors import FedSieveError
from fedsieve.recipe import read as recipe
from fedsieve.recipe.examples import Prepared, load_rows, prepare
from fedsieve.recipe.experiment import Experiment, from_recipe
from fedsieve.run import rundir
from fedsieve.tasks.tokens import Texts
from tests import runs
from tests.conftest import Command, Tiny, texts, tokenizer

Table = list[dict[str, Any]]


def write(path: Path, rows: Table) -> Path:
    """Rows in the format that the path's ending says."""
    frame = pd.DataFrame(rows)
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".tab":
        head = ["\t".join(rows[0]), "\t".join("string" for _ in rows[0]), "\t" * (len(rows[0]) - 1)]
        body = ["\t".join(map(str, row.values())) for row in rows]
        path.write_text("\n".join([*head, *body]) + "\n", encoding="utf-8")
    else:
        frame.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    return path


def rows_of(labels: list[Any], count: int = 24, clients: Any = "one two three") -> Table:
    made = [text for text, _ in texts(count, seed=3)]
    owners = clients.split() if isinstance(clients, str) else clients
    return [
        {"text": text, "label": labels[n % len(labels)], "site": owners[n % len(owners)]}
        for n, text in enumerate(made)
    ]


BY_SITE = {"kind": "column", "column": "site"}


def experiment(tiny: Tiny, train: Path, test: Path | None = None, **changes: Any) -> Experiment:
    changes = {
        "data__train": str(train),
        "data__test": None if test is None else str(test),
        "partition": BY_SITE,
        "budgets": [{}],
        **changes,
    }
    return from_recipe(recipe.check(tiny.table(**changes)))


def classes(made: Experiment) -> tuple[str, ...]:
    assert made.recipe is not None
    return made.recipe.data.classes or ()


def examples(tiny: Tiny, train: Path, test: Path) -> Prepared:
    """What is trained and evaluated on, without a model."""
    told = recipe.check(tiny.table())
    rows = load_rows(told.data, str(train), None, "site")
    tests = load_rows(told.data, str(test), None)
    return prepare(told, rows, tests, tokenizer(bert=True))


ONES = "ignore:labels. these classes differ in spelling alone. '01' and '1':UserWarning"
ENDINGS = ("csv", "tsv", "tab", "jsonl", "parquet")


@pytest.mark.filterwarnings(ONES)
@pytest.mark.parametrize("tested", ENDINGS)
@pytest.mark.parametrize("trained", ENDINGS)
@pytest.mark.parametrize(
    ("train", "test"),
    [
        (["01", "02", "A3"], ["01", "02"]),
        (["1", "2", "01"], ["1", "2"]),
        (["1e5", "250.00", "x"], ["250.00", "1e5"]),
        (["true", "false", "unknown"], ["false", "true"]),
        (["NA", "None", "nan", "text"], ["NA", "None", "nan"]),
        (["2024-01-05", "later"], ["2024-01-05"]),
    ],
    ids=lambda labels: labels[0],
)
def test_training_and_test_rows_are_read_alike(
    tiny: Tiny, tmp_path: Path, trained: str, tested: str, train: list[str], test: list[str]
) -> None:
    """Whatever is beside a name, and whatever format either file has."""
    made = examples(
        tiny,
        write(tmp_path / f"train.{trained}", rows_of(train)),
        write(tmp_path / f"test.{tested}", rows_of(test, 6)),
    )
    assert made.classes == tuple(sorted(train))
    assert made.test is not None
    assert [made.classes[n] for n in made.test.labels] == [test[n % len(test)] for n in range(6)]


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ([1, 2, 10], ["1", "2", "10"]),
        ([True, False], ["true", "false"]),
        ([False, True], ["False", "True"]),
        ([1.0, 2.0], ["1", "2"]),
    ],
    ids=["int", "bool", "Bool", "float"],
)
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_type_in_one_file_and_words_in_the_other(
    tiny: Tiny, tmp_path: Path, typed: list[Any], words: list[str], ending: str
) -> None:
    one = write(tmp_path / f"a.{ending}", rows_of(typed))
    two = write(tmp_path / "b.csv", rows_of(words))
    for train, test in ((one, two), (two, one), (one, one)):
        made = examples(tiny, train, test)
        assert len(made.classes) == len(typed)
        assert made.test is not None
        assert torch.equal(made.test.labels, made.train.labels)


def test_the_same_table_in_another_format_is_the_same_run(tiny: Tiny, tmp_path: Path) -> None:
    table = rows_of(["01", "2", "10", "A"], clients=["007", "1e3", "true"])
    numbers = rows_of(["2", "1", "10"])  # which are sorted as numbers, whoever wrote them
    for rows, names in ((table, ("01", "10", "2", "A")), (numbers, ("1", "2", "10"))):
        outcomes = []
        for ending in ENDINGS:
            path = write(tmp_path / f"rows.{ending}", rows)
            outcomes.append(examples(tiny, path, path))
        assert outcomes[0].classes == names
        for other in outcomes[1:]:
            assert other.classes == names
            assert torch.equal(other.train.labels, outcomes[0].train.labels)
            assert isinstance(other.train, Texts)
            assert isinstance(outcomes[0].train, Texts)
            assert torch.equal(other.train.input_ids, outcomes[0].train.input_ids)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("ids", [["01", "1"], ["007", "1e3"], ["true", "NA"], ["250.00", "250.0"]])
def test_clients_keep_their_names(tmp_path: Path, ending: str, ids: list[str]) -> None:
    path = write(tmp_path / f"rows.{ending}", rows_of(["a", "b", "c"], clients=ids))
    rows = sources.load(path, columns=Columns((), ("site",)))
    assert list(partition.natural(rows["site"][:])) == sorted(ids)


def test_names_stay_as_they_are_in_a_runs_files(
    tiny: Tiny, tmp_path: Path, command: Command, no_report: None
) -> None:
    rows = rows_of(["01", "02", "10"], clients=["01", "1"])
    path = tiny.write(
        tmp_path / "tiny.toml",
        data__train=str(write(tmp_path / "train.csv", rows)),
        data__test=str(write(tmp_path / "test.csv", rows_of(["01", "02"], 6))),
        partition=BY_SITE,
        rounds=1,
        cohort=2,
    )
    ran = command("run", path, "--out", tmp_path / "run")
    assert ran.code == 0, ran.err
    assert {each["client"] for each in runs.lines(tmp_path / "run", rundir.CLIENTS)} == {"01", "1"}
    assert (
        'classes = [\n    "01",\n    "02",\n    "10",\n]'
        in (tmp_path / "run" / rundir.RECIPE).read_text()
    )


def test_classes_that_differ_in_spelling_alone_are_named(
    tiny: Tiny, tmp_path: Path, command: Command, no_report: None
) -> None:
    changes: dict[str, Any] = {
        "data__train": str(write(tmp_path / "train.csv", rows_of(["true", "1", "True", "01"]))),
        "data__test": None,
        "partition": BY_SITE,
        "rounds": 1,
    }
    ran = command("run", tiny.write(tmp_path / "a.toml", **changes), "--out", tmp_path / "a")
    assert ran.code == 0, ran.err
    said = "classes differ in spelling alone: '01' and '1'; 'True' and 'true'"
    assert ran.err.count(said) == 1
    # Whoever lists them means it.
    changes["data__classes"] = ["01", "1", "True", "true"]
    ran = command("run", tiny.write(tmp_path / "b.toml", **changes), "--out", tmp_path / "b")
    assert ran.code == 0, ran.err
    assert "spelling" not in ran.err


# --- what is not used does not matter


def test_columns_that_are_not_used_do_not_matter(tiny: Tiny, tmp_path: Path) -> None:
    """Of types that a data set cannot have, or there twice, or of many kinds, or no UTF-8."""
    rows = rows_of(["a", "b", "c"], 6)
    plain = {key: [row[key] for row in rows] for key in rows[0]}
    odd = {
        "bytes": pa.array([b"ab"] * 6, pa.binary(2)),
        "map": pa.array([[("a", 1)]] * 6, pa.map_(pa.string(), pa.int32())),
        "view": pa.array([["a"]] * 6, pa.list_view(pa.string())),
        "uuid": pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"0" * 16] * 6, pa.binary(16))),
        "nested": pa.array([{"text": {"label": [1]}}] * 6),
        "text.label": pa.array(range(6)),
        "decimal": pa.array([1] * 6, pa.decimal256(60, 2)),
        "nothing": pa.nulls(6),
    }
    table = pa.table({**odd, **plain}).append_column("odd", [["x"] * 6])
    pq.write_table(table.append_column("odd", [["x"] * 6]), tmp_path / "a.parquet")
    lines = [
        {"mixed": [1, "x", None, [2], {"y": 1}, 2**70][n], **row} for n, row in enumerate(rows)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "a.csv").write_bytes(
        b"id,id,latin,text,label,site\n"
        + b"".join(b"1,x,\xff,%s,%s,%s\n" % tuple(v.encode() for v in r.values()) for r in rows)
    )
    for ending in ("parquet", "jsonl", "csv"):
        made = experiment(tiny, tmp_path / f"a.{ending}", tmp_path / f"a.{ending}")
        assert classes(made) == ("a", "b", "c")
        assert sum(client.examples for client in made.federation.clients) == 6


@pytest.mark.parametrize(
    ("column", "array", "said"),
    [
        ("label", pa.array([["a"]] * 6), "row 0 of column 'label' holds a list"),
        ("label", pa.array([b"a"] * 6), "row 0 of column 'label' holds bytes"),
        ("label", pa.array([0.5] * 6), "row 0 of column 'label' holds 0.5"),
        ("text", pa.array([b"a"] * 6), "row 0 of column 'text' holds bytes"),
        ("label", pa.array([b"ab"] * 6, pa.binary(2)), "a column of a type that cannot be used"),
        ("site", pa.array([{"a": 1}] * 6), "row 0 of column 'site' holds an object"),
        ("site", pa.array([1.5] * 6), "row 0 of column 'site' holds 1.5"),
    ],
)
def test_a_used_column_of_an_odd_type_is_one_sentence(
    tiny: Tiny, tmp_path: Path, column: str, array: pa.Array, said: str
) -> None:
    rows = rows_of(["a", "b", "c"], 6)
    table = {key: pa.array([row[key] for row in rows]) for key in rows[0]}
    pq.write_table(pa.table({**table, column: array}), tmp_path / "a.parquet")
    drawn: dict[str, Any] = {} if column == "site" else {"partition": {"kind": "iid", "clients": 2}}
    with pytest.raises(FedSieveError, match=said) as raised:
        experiment(tiny, tmp_path / "a.parquet", **drawn)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (['"label": "a"', '"label": 7'], "line 4 has a number in column 'label', and line 2 has a"),
        (['"label": 1', '"label": true'], "line 4 has true or false .* line 2 has a number"),
        (['"label": null', '"label": 1', '"label": "x"'], "line 6 has a text .* line 4 has a num"),
        (['"label": "a"', '"label": ["a"]'], "line 4 has a list in column 'label'"),
        (['"label": "a"', '"label": "\\ud800"'], "line 4 has half a character"),
        (['"label": "a"', '"label": "a", "label": "b"'], "line 4: .*'label' more than once"),
        (['"label": "a"', '"label": ' + "9" * 5000], "line 4: not a JSON object"),
        (['"label": "a"', '"label": ' + "[" * 100000], "line 4: not a JSON object"),
    ],
)
def test_json_lines_of_several_kinds_name_the_line(
    tiny: Tiny, tmp_path: Path, lines: list[str], said: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'\n{{"text": "t", "site": "s", {line}}}\n' for line in lines))
    with pytest.raises(FedSieveError, match=f"a.jsonl.*{said}"):
        experiment(tiny, path)


# --- clients with bad rows

NEEDED = {"label": "row 4 of column 'label' has no label", "text": "row 4 of column 'text' holds"}


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize("column", ["label", "text"])
def test_a_client_with_a_bad_row_is_named_and_left_out(
    tiny: Tiny, tmp_path: Path, ending: str, column: str
) -> None:
    rows = rows_of(["a", "b", "c"], clients=["north", "south", "east"])
    good = [row for row in rows if row["site"] != "south"]
    rows[4][column] = None
    path = write(tmp_path / f"a.{ending}", rows)
    budgets = {"kind": "list", "clients": {id: {} for id in ("north", "south", "east")}}
    with pytest.warns(UserWarning, match="1 of 3 clients have rows that cannot be used") as warned:
        made = experiment(
            tiny, path, budgets=budgets, sampling={"availability": {"south": 0.5, "north": 1.0}}
        )
    (said,) = [str(w.message) for w in warned if "left out" in str(w.message)]
    assert f"client 'south': {NEEDED[column]}" in said
    assert said in made.notes
    # The federation that it would be without that client.
    other = experiment(tiny, write(tmp_path / f"good.{ending}", good))
    assert made.federation.clients == other.federation.clients
    assert classes(made) == classes(other)
    for one, two in zip(made.start.tensors.values(), other.start.tensors.values(), strict=True):
        assert torch.equal(one, two)


BEYOND = {  # Arrow has them, and Python does not
    "a second": pa.timestamp("s"),
    "a second of a zone": pa.timestamp("s", "Europe/Paris"),
    "a day": pa.date32(),
    "a duration": pa.duration("s"),
}


@pytest.mark.parametrize("kind", BEYOND)
@pytest.mark.parametrize("column", ["label", "text", "{text} {when}", "site"])
def test_a_cell_beyond_python_is_a_bad_row_of_its_client(
    tiny: Tiny, tmp_path: Path, column: str, kind: str
) -> None:
    rows = rows_of(["a", "b", "c"], clients=["north", "south", "east"])
    table = {key: pa.array([row[key] for row in rows]) for key in rows[0]}
    cells = [0 if n % 2 else 1 for n in range(len(rows))]
    cells[4] = 2**31 - 1 if pa.types.is_date(BEYOND[kind]) else 2**53
    told = "when" if "when" in column else column
    table[told] = pa.array(cells, BEYOND[kind])
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    changes: dict[str, Any] = {} if column in ("label", "site") else {"data__text": column}
    said = f"row 4 of column '{told}' holds a .* that cannot be read: "
    if column in ("label", "{text} {when}") and kind != "a duration":
        with pytest.warns(UserWarning, match=f"1 of 3 clients .*client 'south': {said}"):
            made = experiment(tiny, tmp_path / "a.parquet", **changes)
        assert {client.id for client in made.federation.clients} == {"north", "east"}
    else:  # whose row it is, it does not say; or no other row is what the column is for
        with pytest.raises(FedSieveError, match=f"row [04] of column '{told}' holds"):
            experiment(tiny, tmp_path / "a.parquet", **changes)


@pytest.mark.parametrize("column", ["label", "text"])
def test_a_strict_run_stops_at_a_bad_row(tiny: Tiny, tmp_path: Path, column: str) -> None:
    rows = rows_of(["a", "b", "c"], clients=["north", "south", "east"])
    rows[4][column] = None
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(
        FedSieveError, match=f"strict: rows of 1 clients.*'south': {NEEDED[column]}"
    ):
        experiment(tiny, path, strict=True)


def test_labels_outside_of_the_classes_are_bad_rows_too(tiny: Tiny, tmp_path: Path) -> None:
    rows = rows_of(["a", "b", "c"], clients=["north", "south", "east"])
    rows[1]["label"] = "z"
    path = write(tmp_path / "a.csv", rows)
    with pytest.warns(UserWarning, match="client 'south': label 'z' in row 1 of column 'label' is"):
        made = experiment(tiny, path, data__classes=["a", "b", "c"])
    assert [client.id for client in made.federation.clients] == ["east", "north"]


def test_a_client_without_any_example_is_left_out_by_name(tiny: Tiny, tmp_path: Path) -> None:
    rows = rows_of(["a"], clients=["north", "south", "east"])
    for row in rows:
        row["text"] = row["text"] if row["site"] != "south" else ""
    path = write(tmp_path / "a.jsonl", rows)
    lm: dict[str, Any] = {
        "model": {"source": str(tiny.gpt2), "task": "causal-lm"},
        "lora": {"rank": 4, "targets": ["c_attn"]},
        "data__label": None,
    }
    with pytest.warns(UserWarning, match="client 'south': none of its rows has anything to learn"):
        made = experiment(tiny, path, **lm)
    assert [client.id for client in made.federation.clients] == ["east", "north"]
    with pytest.raises(FedSieveError, match=r"strict: rows of 1 clients .*'south': none of"):
        experiment(tiny, path, **lm, strict=True)


@pytest.mark.parametrize(
    ("spoil", "changes", "said"),
    [
        (lambda row: row.update(label=None), {}, "no client has rows that can be used: client 'ea"),
        (
            lambda row: row.update(label=None),
            {"partition": {"kind": "iid", "clients": 3}},
            "^row 0 of column 'label' has no label",
        ),
        (lambda row: row.update(site=""), {}, "row 0 has no client: column 'site' is empty there"),
        (lambda row: row.update(site=None), {}, "row 0 has no client"),
    ],
)
def test_where_no_client_can_be_left_out_it_is_one_sentence(
    tiny: Tiny,
    tmp_path: Path,
    spoil: Callable[[dict[str, Any]], None],
    changes: dict[str, Any],
    said: str,
) -> None:
    rows = rows_of(["a", "b", "c"], clients=["north", "south", "east"])
    for row in rows:
        spoil(row)
    rows[-1]["text"] = None
    with pytest.raises(FedSieveError, match=said) as raised:
        experiment(tiny, write(tmp_path / "a.jsonl", rows), **changes)
    assert "\n" not in str(raised.value)


def test_bad_test_rows_are_an_error(tiny: Tiny, tmp_path: Path) -> None:
    rows = rows_of(["a", "b", "c"], 6)
    rows[2]["label"] = None
    good = write(tmp_path / "a.jsonl", rows_of(["a", "b", "c"]))
    with pytest.raises(FedSieveError, match="row 2 of column 'label' has no label"):
        experiment(tiny, good, write(tmp_path / "b.jsonl", rows))


def test_texts_that_are_cut_are_counted_and_told(tiny: Tiny, tmp_path: Path) -> None:
    lengths, labels = (2, 5, 6, 7, 12), ("cars", "wine", "cars", "wine", "cars")
    train = write(  # and a token at each end
        tmp_path / "train.jsonl",
        [{"text": "word1 " * n, "label": name} for n, name in zip(lengths, labels, strict=True)],
    )
    changes: dict[str, Any] = {"partition": {"kind": "iid", "clients": 2}, "cohort": 2}
    changes |= {"data__train": str(train), "data__test": None}
    said = "3 of 5 training texts reach data.max_length (8 tokens): what is beyond it is cut"
    with pytest.warns(UserWarning, match="3 of 5 training texts"):
        assert said in from_recipe(recipe.check(tiny.table(**changes, data__max_length=8))).notes
    made = from_recipe(recipe.check(tiny.table(**changes, data__max_length=16)))
    assert not [note for note in made.notes if "max_length" in note]


@pytest.mark.parametrize("on", ["test", "validation"])
@pytest.mark.parametrize("method", ["fedit", "fedsa_lora"])
def test_each_clients_own_rows_are_scored(tiny: Tiny, tmp_path: Path, on: str, method: str) -> None:
    """Also with what it keeps to itself, where it keeps something."""
    made = [*texts(90, seed=4)]
    table = [{"text": t, "label": n, "site": f"s{i % 3}"} for i, (t, n) in enumerate(made)]
    changes: dict[str, Any] = {
        "data__train": str(write(tmp_path / "train.jsonl", table[:60])),
        "data__test": str(write(tmp_path / "test.jsonl", table[60:])),
        "partition": {"kind": "column", "column": "site"},
        "evaluation": {"on": on, "by_client": True, "every": 1},
        "method": {"name": method},
        "budgets": [{}],
        "cohort": 3,
        "rounds": 2,
        **({"data__validation": 0.4} if on == "validation" else {}),
    }
    runs.start(tiny, tmp_path / "run", **changes)
    last = runs.lines(tmp_path / "run")[-1]
    spread = [last["metrics"][f"client_{name}"] for name in ("worst", "p10", "mean")]
    assert spread == sorted(spread)
    assert last["eval_examples"] == (30 if on == "test" else 24)
    assert list(last["metrics"])[:3] == ["accuracy", "macro_f1", "matthews"]
    kept = json.loads((tmp_path / "run" / "details.json").read_text(encoding="utf-8"))
    scores = [each["score"] for each in kept["clients"]]
    assert sorted(each["name"] for each in kept["clients"]) == ["s0", "s1", "s2"]
    assert sum(each["rows"] for each in kept["clients"]) == last["eval_examples"]
    assert scores == sorted(scores)
    assert (scores[0], np.mean(scores)) == pytest.approx((spread[0], spread[2]))
    trained = {each["name"]: each["rows"] for each in kept["held"]}
    names = [each["name"] for each in kept["classes"]]
    if on == "test":
        for n, (id, counts) in enumerate(trained.items()):
            own = Counter(label for _, label in made[:60][n::3])
            assert (id, counts) == (f"s{n}", [own[name] for name in names])
    plain = {**changes, "evaluation": {"on": on, "every": 1}}
    runs.start(tiny, tmp_path / "plain", **plain)
    joint = runs.lines(tmp_path / "plain")[-1]
    if method == "fedit":  # the rows are the same, and so is the model
        assert joint["metrics"] == {n: last["metrics"][n] for n in list(last["metrics"])[:3]}
        assert joint["eval_loss"] == pytest.approx(last["eval_loss"], rel=1e-5)
    with pytest.raises(FedSieveError, match=r"evaluation\.by_client: it needs"):
        from_recipe(recipe.check(tiny.table(evaluation={"by_client": True})))
    bare = write(tmp_path / "bare.jsonl", [{"text": "cars1", "label": "cars"}])
    if on == "test":
        with pytest.raises(FedSieveError, match="no column 'site'"):
            runs.start(tiny, tmp_path / "bare", **{**changes, "data__test": str(bare)})


def test_a_cohort_of_more_than_there_are_is_told(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="cohort is 40, and 6 clients have data: a round has no"):
        runs.start(
            tiny, tmp_path / "run", cohort=40, rounds=1, partition={"kind": "iid", "clients": 6}
        )
    assert "cohort is 40" in (tmp_path / "run" / rundir.RECIPE).read_text()
