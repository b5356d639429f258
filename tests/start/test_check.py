"""`fedsieve check`: its numbers are those of the rows, and of the run that follows."""

import csv
import json
import shutil
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from fedsieve.algebra.budget import Budget
from fedsieve.costs import memory
from fedsieve.recipe import read as recipes
from fedsieve.recipe.experiment import from_recipe
from fedsieve.start import check as checking
from fedsieve.start import told
from fedsieve.start.check import Checked, check
from tests import kinds, runs
from tests.conftest import Command, Tiny, write_rows


def checked(tiny: Tiny, **changes: Any) -> Checked:
    return check(recipes.check(tiny.table(**changes)))


@pytest.mark.filterwarnings("ignore:.*reach data.max_length")
def test_rows_labels_and_texts_are_those_of_the_file(tiny: Tiny, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.csv", 90, seed=5, authors=["a", "a", "a", "b", "c"])
    with path.open("a", encoding="utf-8") as file:
        file.write(",wine,a\n  ,wine,c\n")  # two that say nothing
    rows = list(csv.DictReader(path.open(encoding="utf-8")))
    found = checked(
        tiny,
        data__train=str(path),
        data__max_length=9,
        partition={"kind": "column", "column": "author"},
        sampling={"kind": "all"},
    )
    own = Counter(row["author"] for row in rows)
    assert [*found.clients] == [min(own.values()), median(own.values()), max(own.values())]
    assert (found.many, found.rows, found.tested) == (3, 92, 60)
    labels = Counter(row["label"] for row in rows)
    assert found.labels is not None
    counted = labels.values()
    assert [*found.labels.rows] == [min(counted), median(counted), max(counted)]
    assert found.labels.commonest == ("wine", labels["wine"] / 92)
    assert [*found.labels.held] == [3, 3, 3]
    tokens = [min(9, len(row["text"].split()) + 2) for row in rows]  # [CLS], [SEP]
    assert found.texts is not None
    assert [*found.texts.tokens] == [min(tokens), median(tokens), max(tokens)]
    assert (found.texts.cut, found.texts.empty) == (tokens.count(9), 2)
    assert found.steps == sum(-(-n // 8) for n in own.values()) / 3  # one pass, batches of 8
    said = "\n".join(told.lines(found))
    assert f"{tokens.count(9)} " in said
    assert "2 are empty" in said


@pytest.mark.filterwarnings("ignore:.*no data")
def test_bytes_and_evaluations_are_those_of_the_run(tiny: Tiny, whole: Path) -> None:
    found, lines = checked(tiny), runs.lines(whole)
    assert found.bill.total == pytest.approx(lines[-1]["total_bytes"], rel=0.1)
    assert found.bill.dense == lines[-1]["dense_bytes"]
    assert found.evaluations == sum("metrics" in line for line in lines)
    assert found.seconds > 0
    assert found.speed.evaluation is not None
    assert found.speed.loss == pytest.approx(lines[1]["loss"], abs=1.0)


@pytest.mark.filterwarnings("ignore:.*no data")
def test_memory_is_that_of_the_table_of_methods(tiny: Tiny) -> None:
    budget = Budget(0.5, 1.0, 0.5)
    found = checked(tiny)
    assert found.texts is not None
    ((_, needs),) = memory.of_model(
        str(tiny.bert), 4, ("query", "value"), 3, budget, found.recipe.training,
        int(found.texts.tokens.most), memory.Base(), {"fslora_flasc"},
    )  # fmt: skip
    assert not isinstance(needs, str)
    own = found.needs[budget]
    assert own.peak == pytest.approx(needs.peak, rel=0.02)
    assert (own.base, own.trained) == (needs.base, needs.trained)


NOISE = {"clip": 1.0, "delta": 1e-5, "noise_multiplier": 0.5}
# (what the recipe says, what is told)
IDLE: list[tuple[dict[str, Any], str]] = [
    ({"data__test": None}, "nothing is evaluated"),
    ({"evaluation__every": 9}, "before the first and after the last alone"),
    ({"data__validation": 0.1}, "nothing reads them"),
    ({"data__validation": 0.1, "evaluation__on": "validation"}, "data.test is not used"),
    ({"training__steps": 1, "training__epochs": 3}, "training.epochs is not used"),
    ({"training__momentum": 0.5}, "training.momentum is not used"),
    ({"training__micro_batch": 8}, "saves no memory"),
    ({"privacy": {**NOISE, "clip_rate": 0.1}}, "privacy.clip_rate is not used"),
    ({"privacy": {**NOISE, "count_noise": 2.0}}, "privacy.count_noise is not used"),
    ({"training__steps": 1, "training__proximal": 0.1}, "training.proximal does nothing"),
    (
        {
            "method": {"name": "fedit"},
            "budgets": {
                "kind": "resources",
                "deadline": 1e6,
                "tiers": [{"memory": 1e3, "downlink": 1, "uplink": 1, "step_seconds": 0}],
            },
        },
        "[budgets] choose nothing: method 'fedit'",
    ),
]


@pytest.mark.filterwarnings("ignore:.*no data")
@pytest.mark.parametrize(("changes", "message"), IDLE, ids=[said for _, said in IDLE])
def test_what_would_do_nothing_is_told(tiny: Tiny, changes: dict[str, Any], message: str) -> None:
    given = recipes.check(tiny.table(**changes))
    experiment = from_recipe(given)
    assert any(message in each for each in checking.idle(given, experiment))


@pytest.mark.filterwarnings("ignore:.*no data")
def test_what_does_something_is_not_told(tiny: Tiny) -> None:
    given = recipes.check(tiny.table())
    assert checking.idle(given, from_recipe(given)) == []


def test_the_command_writes_nothing_and_ends_well(
    tiny: Tiny, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny.write(tmp_path / "mine.toml", cohort=50)
    monkeypatch.chdir(tmp_path)
    ran = command("check", "mine.toml", "rounds=2")
    assert ran.code == 0, ran.err
    assert [path.name for path in tmp_path.iterdir()] == [recipe.name]
    assert "rows       240 to train on, 60 to evaluate on" in ran.out
    assert "cohort is 50, and" in ran.err
    assert ran.out.splitlines()[-1] == "next       fedsieve run mine.toml rounds=2"
    ran = command("check", "mine.toml", "training.lr=fast")
    assert (ran.code, "training.lr" in ran.err) == (2, True)
    ran = command("check", "mine.toml", "data.label=lable")
    assert (ran.code, "did you mean 'label'" in ran.err) == (2, True)
    ran = command("check", "mine.toml", "training.lr=1e30")
    assert (ran.code, "cannot train" in ran.err) == (2, True)


@pytest.mark.filterwarnings("ignore:.*no data", "ignore:[Pp]rivacy", "ignore:.*epsilon")
def test_private_runs_and_other_engines_are_checked_too(tiny: Tiny) -> None:
    pytest.importorskip("dp_accounting")
    found = checked(
        tiny,
        method={"name": "fedit"},
        budgets=None,
        server={"optimizer": "fedadam"},
        sampling={"kind": "poisson"},
        privacy={"clip": 1.0, "epsilon": 8.0, "delta": 1e-3},
        engine={"kind": "processes", "workers": 2},
    )
    assert any("epsilon" in note for note in found.notes)
    assert found.bill.total > 0


def test_a_language_model_without_labels(tiny: Tiny) -> None:
    changes: dict[str, Any] = {"model": {"source": str(tiny.gpt2), "task": "causal-lm"}}
    with pytest.warns(UserWarning, match="no padding token"):
        found = checked(
            tiny,
            **changes,
            lora__targets=None,
            data__label=None,
            partition={"kind": "iid", "clients": 4},
        )
    assert found.labels is None
    assert found.values is None
    assert found.texts is not None
    assert found.texts.empty == 0


@pytest.mark.parametrize("longest", kinds.some_of(["x", "512", [1], {"a": 1}, None, True]))
def test_a_tokenizer_that_does_not_say_how_much_it_reads(
    tiny: Tiny, tmp_path: Path, longest: object
) -> None:
    """In a file that was edited. How much is read the recipe says: the run is as it was."""
    shutil.copytree(tiny.bert, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": longest}))
    found = checked(tiny, model__source=str(tmp_path / "model"))
    assert found.texts == checked(tiny).texts
