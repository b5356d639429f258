"""Data sets by name, and several tests: over rows in the form in which the hub has GLUE's."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from fedsieve.errors import FedSieveError
from fedsieve.recipe import read as recipe
from fedsieve.recipe import sets
from fedsieve.recipe.experiment import from_recipe
from fedsieve.report import read as report
from fedsieve.run import rundir
from fedsieve.sites import federate
from fedsieve.sites.server import RoundPolicy
from fedsieve.study import plan
from tests import kinds, runs
from tests.conftest import LABELS, Command, Tiny, texts

HUB = "nyu-mll/glue"
VALIDATION = ("validation",)
TWO = ("validation_matched", "validation_mismatched")


class Glue(NamedTuple):
    """What the hub has. columns: the texts; classes: by their numbers; leads: GLUE's own score"""

    name: str
    columns: tuple[str, ...]
    classes: tuple[str, ...]
    leads: str
    splits: tuple[str, ...] = VALIDATION


ENTAILS = ("entailment", "not_entailment")
ALL = [
    Glue("cola", ("sentence",), ("unacceptable", "acceptable"), "matthews"),
    Glue("sst2", ("sentence",), ("negative", "positive"), "accuracy"),
    Glue("mrpc", ("sentence1", "sentence2"), ("not_equivalent", "equivalent"), "f1"),
    Glue("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), "f1"),
    Glue("stsb", ("sentence1", "sentence2"), (), "pearson"),
    Glue("mnli", ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), "accuracy",
         TWO),
    Glue("qnli", ("question", "sentence"), ENTAILS, "accuracy"),
    Glue("rte", ("sentence1", "sentence2"), ENTAILS, "accuracy"),
    Glue("wnli", ("sentence1", "sentence2"), ENTAILS[::-1], "accuracy"),
]  # fmt: skip
each = pytest.mark.parametrize("glue", ALL, ids=[glue.name for glue in ALL])


def rows(glue: Glue, count: int, seed: int) -> Dataset:
    """As the hub has them: texts, a number of a class or a score, and a number of the row."""
    made: dict[str, list[Any]] = {name: [] for name in (*glue.columns, "label", "idx")}
    for number, (text, _) in enumerate(texts(count, seed)):
        for name in glue.columns:
            made[name].append(text)
        made["label"].append(number % len(glue.classes) if glue.classes else number % 6 * 0.8)
        made["idx"].append(number)
    label = ClassLabel(names=list(glue.classes)) if glue.classes else Value("float32")
    kinds = {name: Value("string") for name in glue.columns}
    return Dataset.from_dict(
        made, features=Features({**kinds, "label": label, "idx": Value("int32")})
    )


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The hub's GLUE, as far as these tests ask for it; and what was asked for."""
    asked: list[tuple[str, ...]] = []

    def load(name: str, config: str | None = None, split: str | None = None) -> Any:
        asked.append((name, config or "", split or ""))
        found = {glue.name: glue for glue in ALL}
        if name != HUB or config not in found:
            raise FileNotFoundError(name)
        glue = found[config]
        there = {"train": 36, **dict.fromkeys(glue.splits, 24)}
        made = DatasetDict({s: rows(glue, n, seed) for seed, (s, n) in enumerate(there.items())})
        if split is not None and split not in made:
            raise ValueError(f"Unknown split {split!r}. Should be one of {list(made)}.")
        return made if split is None else made[split]

    monkeypatch.setattr("datasets.load_dataset", load)
    return asked


def table(tiny: Tiny, name: str, **changes: Any) -> dict[str, Any]:
    given = {"model": {"source": str(tiny.bert)}, "data": {"set": name, "max_length": 16}}
    return tiny.table(**given, partition={"kind": "iid", "clients": 3}, rounds=1, **changes)


def test_every_set_of_glue_is_here() -> None:
    here = [name for name in sets.known() if name.startswith("glue/")]
    assert sorted(here) == sorted(f"glue/{glue.name}" for glue in ALL)


@pytest.mark.filterwarnings("ignore:the model's head is for")
@each
def test_a_name_is_a_whole_recipe(
    tiny: Tiny, tmp_path: Path, glue: Glue, hub: list[tuple[str, ...]], no_report: None
) -> None:
    runs.start_from(recipe.check(table(tiny, f"glue/{glue.name}")), tmp_path / "run")
    assert hub == [(HUB, glue.name, split) for split in ("train", *glue.splits)]
    first, last = runs.lines(tmp_path / "run")
    for line in (first, last):
        assert next(iter(line["metrics"])) == glue.leads
        assert line["eval_examples"] == 24
    labels = tmp_path / "run" / rundir.ADAPTER / "labels.json"
    if glue.classes:
        names = json.loads(labels.read_text())["id2label"]
        assert names == {str(n): name for n, name in enumerate(glue.classes)}
    more = {f"mismatched_{name}" for name in ("accuracy", "macro_f1", "matthews")}
    assert {n for n in last["metrics"] if "mismatched" in n} == (
        more if len(glue.splits) > 1 else set()
    )
    assert report.load(tmp_path / "run").rounds[-1].metrics == last["metrics"]


def test_a_runs_recipe_is_an_ordinary_one(tiny: Tiny, tmp_path: Path, no_report: None) -> None:
    runs.start_from(recipe.check(table(tiny, "glue/mnli")), tmp_path / "run")
    path = tmp_path / "run" / rundir.RECIPE
    told = recipe.read(str(path))
    assert told["data"].items() >= {"train": HUB, "config": "mnli", "text_b": "hypothesis"}.items()
    assert told["data"]["more_tests"] == {
        "mismatched": {"test": HUB, "test_split": "validation_mismatched"}
    }
    assert "set" not in told["data"]
    again = recipe.load(str(path))
    runs.start_from(again, tmp_path / "again")
    first, second = (runs.lines(tmp_path / name)[-1] for name in ("run", "again"))
    assert first["metrics"] == second["metrics"]
    # With all keys there, another name would change nothing.
    with pytest.raises(FedSieveError, match=r"data\.set: 'glue/cola' is nyu-mll/glue with the"):
        recipe.load(str(path), ["data.set=glue/cola"])


def filled(**data: Any) -> dict[str, Any]:
    given = {"model": {}, "data": data}
    return dict(sets.filled(given))


OWN = {"train": "own.tsv", "test": "dev.tsv"}


@pytest.mark.parametrize(
    ("data", "there", "gone"),
    [
        ({"set": "glue/mrpc"}, {"train": HUB, "config": "mrpc", "test_split": "validation"}, ()),
        ({"set": "glue/mrpc", "label": "other"}, {"label": "other", "text": "sentence1"}, ()),
        (
            {"set": "glue/mnli", **OWN},
            {**OWN, "text": "premise", "label": "label"},
            ("config", "train_split", "test_split", "more_tests"),
        ),
        (
            {"set": "glue/mnli", "test": "dev.tsv"},
            {"train": HUB, "config": "mnli", "test": "dev.tsv", "train_split": "train"},
            ("test_split", "more_tests"),
        ),
        ({"set": "glue/mnli", "more_tests": {}}, {"more_tests": {}}, ()),
        ({"set": "glue/rte", "text": "{sentence1} ? {sentence2}"}, {"label": "label"}, ("text_b",)),
        (
            {"set": "glue/qnli", "prompt": "{question}", "completion": "{sentence}"},
            {"train": HUB},
            ("text", "text_b"),
        ),
        ({"set": "glue/cola", "train_split": "validation"}, {"train_split": "validation"}, ()),
    ],
)
def test_the_recipes_own_keys_win(
    data: dict[str, Any], there: dict[str, Any], gone: tuple[str, ...]
) -> None:
    found = filled(**data)["data"]
    assert found.items() >= there.items()
    assert not {*gone, "set"} & set(found)
    assert data["set"]  # what was given is as it was


def test_own_task_and_metric_win() -> None:
    given = {"model": {"task": "causal-lm"}, "data": {"set": "glue/mrpc", "text": "sentence1"}}
    found = sets.filled(given)
    assert found["model"] == {"task": "causal-lm"}
    assert "classes" not in found["data"]
    assert "evaluation" not in found
    given = {"data": {"set": "glue/mrpc"}, "evaluation": {"metric": "accuracy"}}
    found = sets.filled(given)
    assert found["evaluation"] == {"metric": "accuracy"}
    assert found["model"] == {"task": "classification"}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("glue/mrcp", r"data\.set: no data set is called 'glue/mrcp' \(did you mean 'glue/mrpc'"),
        ("mnli", "did you mean 'glue/mnli'"),
        ("squad", r"known are commonsense/arc-challenge, "),
        (7, r"data\.set"),
        (["glue/cola"], r"data\.set"),
    ],
)
def test_an_unknown_name_is_refused_when_the_recipe_is_read(
    tiny: Tiny, name: Any, said: str
) -> None:
    with pytest.raises(FedSieveError, match=said):
        recipe.parse(table(tiny, name))


@pytest.mark.parametrize("odd", [{"data": 3}, {"data": {"set": "glue/cola"}, "model": 3}])
def test_tables_that_are_none_are_told_as_ever(tiny: Tiny, odd: dict[str, Any]) -> None:
    with pytest.raises(FedSieveError, match=r"(data|model)"):
        recipe.parse({**table(tiny, "glue/cola"), **odd})


def test_changes_on_the_command_line_and_sweeps_of_studies(tiny: Tiny, tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "recipe.toml", data={"set": "glue/mrpc"})
    changed = recipe.load(str(path), ["data.set=glue/stsb", "data.text=other"])
    assert (changed.model.task, changed.evaluation.metric) == ("regression", "pearson")
    assert (changed.data.config, changed.data.text) == ("stsb", "other")
    (tmp_path / "study.toml").write_text(
        'recipe = "recipe.toml"\n'
        '[[entry]]\nname = "a"\nset = { "data.set" = "glue/cola" }\n'
        '[[entry]]\nname = "b"\n'
        '[tune]\ngrid = { "data.set" = ["glue/rte", "glue/qnli"] }\n'
    )
    made = plan.plan(str(tmp_path / "study.toml"), tmp_path / "out")
    found = [job.recipe.data.config for job in plan.trial_jobs(made)]
    assert found == ["rte", "rte", "qnli", "qnli"]
    a, b = (plan.recipe_of(entry, {}, 0) for entry in made.entries)
    assert (a.data.config, a.evaluation.metric, b.data.config) == ("cola", "matthews", "mrpc")


def test_the_command_line_lists_them(command: Command) -> None:
    ran = command("sets")
    assert (ran.code, ran.err) == (0, "")
    for name, found in sets.known().items():
        assert name in ran.out
        assert found.what in ran.out


# Several tests.


def written(folder: Path, name: str, count: int, seed: int, labels: str = "") -> str:
    lines = [{"text": text, "label": labels or label} for text, label in texts(count, seed)]
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder / name)


def forms(folder: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Each form of `more_tests`, and what stands in the recipe afterwards."""
    other = written(folder, "other.jsonl", 9, 5)
    yield other, {"test": other}
    yield {"test": other}, {"test": other}
    yield {"test": str(folder), "test_split": "other"}, {"test": str(folder), "test_split": "other"}


@pytest.mark.parametrize("number", kinds.some_of(range(3)))
@pytest.mark.parametrize("method", ["fedit", "fedsa_lora"])
def test_other_rows_are_evaluated_on_beside_the_test_rows(
    tiny: Tiny, tmp_path: Path, number: int, method: str, no_report: None
) -> None:
    given, told = list(forms(tmp_path))[number]
    more: dict[str, Any] = {"data__more_tests": {"same": str(tiny.test), "other": given}}
    own: dict[str, Any] = {"method": {"name": method}, "budgets": [{}], "rounds": 2}
    own["evaluation"] = {"metric": "macro_f1"}
    runs.start(tiny, tmp_path / "run", **own, **more)
    runs.start(tiny, tmp_path / "plain", **own)
    for with_more, plain in zip(
        runs.lines(tmp_path / "run"), runs.lines(tmp_path / "plain"), strict=True
    ):
        metrics = with_more["metrics"]
        names = ["macro_f1", "accuracy", "matthews"]
        spread = [name for name in plain["metrics"] if name.startswith("client_")]
        beside = [f"{rows}_{name}" for rows in ("same", "other") for name in names]
        assert list(metrics) == [*names, *spread, *beside]
        assert {name: metrics[name] for name in plain["metrics"]} == plain["metrics"]
        assert with_more["eval_loss"] == plain["eval_loss"]
        assert all(metrics[f"same_{name}"] == metrics[name] for name in names)
    read = recipe.read(str(tmp_path / "run" / rundir.RECIPE))
    assert read["data"]["more_tests"]["other"] == told


def first_scores(tiny: Tiny, **changes: Any) -> Mapping[str, float]:
    ready = from_recipe(recipe.check(tiny.table(**changes)))
    assert ready.federation.evaluate is not None
    found = ready.federation.evaluate(ready.start)
    assert found is not None
    return found.metrics


def test_the_limit_and_the_validation_rows(tiny: Tiny) -> None:
    found = first_scores(tiny, data__more_tests={"same": str(tiny.test)}, evaluation__limit=7)
    assert found["same_accuracy"] == found["accuracy"]
    held: dict[str, Any] = {"data__validation": 0.2, "evaluation__on": "validation"}
    away = {"data__more_tests": {"other": "/no/such.csv"}}  # not read
    assert "other_accuracy" not in first_scores(tiny, **held, **away)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"other": "no.csv"}, r"data\.more_tests\.other: there is no file no\.csv"),
        ({"other": {"test": "/no/such.csv"}}, r"data\.more_tests\.other: there is no file"),
        ({"other": "second"}, r"data\.more_tests\.other: .* has no split 'second'"),
        ({"other": "BAD"}, r"data\.more_tests\.other: label 'boats' in row 0 .* none of the"),
        ({"other": "TEXTS"}, r"data\.more_tests\.other: .*no column 'label'"),
        ({"Other": "x"}, r"data\.more_tests"),
        ({"other": {}}, r"data\.more_tests\.other.*: give test"),
        ({"other": {"tests": "x"}}, r"tests: unknown key \(did you mean 'test'"),
        ({"other": 3}, r"data\.more_tests\.other"),
        ({"macro": "x.csv"}, "'macro_f1' would be two"),
        ({"a": "x.csv", "a_macro": "x.csv"}, "'a_macro_f1' would be two"),
        ({f"n{n}": "x.csv" for n in range(9)}, r"data\.more_tests"),
    ],
)
def test_bad_tests_are_named_before_the_model_is_loaded(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], said: str
) -> None:
    if more == {"other": "BAD"}:
        more = {"other": written(tmp_path, "bad.jsonl", 3, 1, "boats")}
    if more == {"other": "TEXTS"}:
        (tmp_path / "texts.jsonl").write_text('{"text": "a"}\n')
        more = {"other": str(tmp_path / "texts.jsonl")}
    monkeypatch.setattr("fedsieve.recipe.experiment.load_base", None)
    with pytest.raises(FedSieveError, match=said):
        from_recipe(recipe.check(tiny.table(data__more_tests=more)))


def test_they_stand_beside_others(tiny: Tiny) -> None:
    given = tiny.table(data__more_tests={"other": "x.csv"}, data__test=None)
    with pytest.raises(FedSieveError, match="more_tests: they stand beside the rows of test"):
        recipe.parse(given)


def test_where_sites_evaluate_there_are_no_others(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(federate, "check_installed", lambda: None)
    monkeypatch.setattr("fedsieve.run.rundir.environment", lambda _: {})
    policy, listen = RoundPolicy(2), federate.ServerAddress()
    with pytest.warns(UserWarning, match=r"data\.more_tests: the sites evaluate, on rows of their"):
        federate.prepare(
            recipe.check(table(tiny, "glue/mnli", cohort=2)), tmp_path / "run", policy, listen
        )
    assert "more_tests" not in recipe.read(str(tmp_path / "run" / rundir.RECIPE))["data"]
    # Rows of the server's own are read and evaluated on.
    given = recipe.check(
        tiny.table(data__more_tests={"same": str(tiny.test)}, data__classes=[*LABELS])
    )
    tokenizer = from_recipe(given).resident.tokenizer
    test, more = federate._test_rows(given, tokenizer)
    assert test is not None
    assert more["same"].labels.tolist() == test.labels.tolist()
