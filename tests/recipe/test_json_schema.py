"""The JSON Schema of recipes: it takes what is a recipe, and marks what an editor should mark."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator
from pydantic import BaseModel

from fedsieve.methods import catalogue
from fedsieve.recipe import json_schema, schema
from fedsieve.recipe import read as recipes
from fedsieve.recipe.json_schema import parts
from fedsieve.study import figures
from tests.conftest import Command, Tiny
from tests.pages import DOCS, code_of

SCHEMA = json_schema.recipe()
FOLDER = Path(recipes.__file__).parents[1] / "recipes"
# Figures are files of their own kind, and lie beside the settings that they run on.
SHIPPED = [
    path
    for path in sorted(FOLDER.rglob("*.toml"))
    if path.parent == FOLDER or path.parent.name == "settings"
]


def problems(table: Any) -> list[str]:
    """The places that are wrong; of JSON, as the table may have come from TOML."""
    found = Draft7Validator(SCHEMA).iter_errors(json.loads(json.dumps(table)))
    return sorted(error.json_path for error in found)


def test_it_is_a_schema_and_what_the_command_prints(command: Command) -> None:
    Draft7Validator.check_schema(SCHEMA)
    assert json.loads(command("schema").out) == SCHEMA


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_recipe_that_ships_fits(path: Path) -> None:
    assert problems(tomllib.loads(path.read_text("utf-8"))) == []


def test_there_are_recipes_of_both_kinds() -> None:
    assert set(recipes.shipped()) <= {path.stem for path in SHIPPED}
    assert any(path.parent.name == "settings" for path in SHIPPED)
    assert figures.shipped()


def test_every_recipe_on_the_pages_fits() -> None:
    """Whole ones, that is: those that say how many rounds there are, and whose."""
    whole = []
    for page in DOCS:
        for code in code_of(page):
            try:
                table = tomllib.loads(code)
            except tomllib.TOMLDecodeError:
                continue
            if {"rounds", "cohort", "data", "partition"} <= set(table):
                whole.append(page.name)
                # The tutorial's own task is not one that ships.
                own = ["$.model.task"] if page.name == "own-task.md" else []
                assert problems(table) == own, (page.name, code)
    assert len(whole) >= 9


def test_a_recipe_that_a_run_wrote_fits(whole: Path) -> None:
    assert problems(tomllib.loads((whole / "recipe.toml").read_text("utf-8"))) == []


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"rounds": 0}, ["$.rounds"]),
        ({"rounds": "many"}, ["$.rounds"]),
        ({"round": 3}, ["$"]),
        ({"model__sorce": "x"}, ["$.model"]),
        ({"model__task": "clasification"}, ["$.model.task"]),
        ({"data__train": None}, ["$.data"]),
        ({"lora__rank": 0}, ["$.lora.rank"]),
        ({"training__optimizer": "sdg"}, ["$.training.optimizer"]),
        ({"training__epoch": 1}, ["$.training"]),
        ({"budgets": [{"ratio": 1.5}]}, ["$.budgets"]),
        ({"budgets": {"kind": "normal", "low": 1}}, ["$.budgets"]),
        ({"method": {"name": "flsac"}}, ["$.method.name"]),
        ({"method": {"name": "fedit", "feedback": True}}, ["$.method"]),
        ({"server": {"optimizer": "sgd", "beta1": 0.9}}, ["$.server"]),
        ({"server": {"learning_rate": 0.9}}, ["$.server"]),
        ({"rounds": None}, ["$"]),
    ],
)
def test_what_is_wrong_is_marked_where_it_is(
    tiny: Tiny, change: dict[str, Any], where: list[str]
) -> None:
    assert problems(tiny.table()) == []
    assert problems(tiny.table(**change)) == where


@pytest.mark.parametrize(
    "change",
    [
        {"method": {"name": "flasc", "feedback": True, "ranked": "change"}},
        {"method": {"name": "mine.random_entries", "share": 3}},
        {"server": {"lr": 0.1, "beta1": 0.8, "norm_bound": "none"}},
        {"data": {"set": "glue/mrpc"}},
        {"data__more_tests": {"late": "late.csv", "other": {"test": "o.csv"}}},
        {"lora__layers_to_transform": 3},
        {"lora__layers_to_transform": [0, 1]},
        {"budgets": {"kind": "list", "clients": {"north": {"rank": 2}}}},
        {"budgets": {"kind": "list", "clients": [{"rank": 2}]}},
        {"budgets": {"kind": "heavy-tail", "low": 1, "high": 4}},
        {"sampling": {"availability": {"0001": 0.5}}},
        {"tracking": {"kind": "wandb"}},
    ],
)
def test_what_a_recipe_may_say_in_short_fits(tiny: Tiny, change: dict[str, Any]) -> None:
    table = tiny.table(**change)
    assert problems(table) == []
    recipes.parse(table)


def test_keys_say_what_they_mean() -> None:
    tables = SCHEMA["$defs"]
    said = tables["Training"]["properties"]["packing"]["description"]
    assert said.startswith("of a language model: texts of a client joined")
    assert (
        "passes over the client's examples"
        in tables["Training"]["properties"]["epochs"]["description"]
    )
    assert SCHEMA["properties"]["strict"]["description"].startswith("a client whose rows")
    least = tables["ResourceBudgets"]["properties"]
    assert least["deadline"]["description"] == "seconds"
    assert least["least"]["description"] == "the smallest density that may be chosen"
    assert "feedback" in tables["MethodTable"]["properties"]
    for each in map(catalogue.known, catalogue.names()):
        assert set(each.options) <= set(tables["MethodTable"]["properties"])


def test_every_key_of_a_recipe_is_in_the_schema() -> None:
    tables: list[type[BaseModel]] = [schema.Model, schema.Data, schema.Privacy, schema.Engine]
    for table in tables:
        assert set(table.model_fields) == set(SCHEMA["$defs"][table.__name__]["properties"])
    assert set(schema.Recipe.model_fields) | {"environment"} == set(SCHEMA["properties"])


def test_a_docstring_is_taken_apart() -> None:
    told = """What it is: a table.

    a, b: of both,
        and more
    c: alone; d: beside it; e: not a key
    plain words
    """
    prose, said = parts(told, ["a", "b", "c", "d"])
    assert prose == "What it is: a table. plain words"
    both = "of both, and more"
    assert said == {"a": both, "b": both, "c": "alone", "d": "beside it; e: not a key"}
