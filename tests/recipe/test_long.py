"""No error of a recipe quotes it at length, whichever key holds a text of 10,000 characters.

The keys are those of the recipe's JSON schema, so that a new one is tried too.
"""

import json
import tomllib
from collections.abc import Iterator
from importlib import resources
from typing import Any

import pytest
import tomli_w

from fedsieve.errors import FedSieveError
from fedsieve.recipe import json_schema, read
from fedsieve.recipe.experiment import from_recipe
from tests.conftest import Tiny

SCHEMA = json.loads(json_schema.text())
LONG = "x" * 10_000
MOST = 2500  # characters of an error: some values of LONGEST_TOLD, and the keys that are known


def keys(
    schema: dict[str, Any], path: tuple[str | int, ...] = ()
) -> Iterator[tuple[str | int, ...]]:
    """The way to each key; 0 is the first of a list."""
    if "$ref" in schema:
        schema = SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]]
    for each in (one for kind in ("anyOf", "oneOf", "allOf") for one in schema.get(kind, [])):
        yield from keys(each, path)
    for name, inner in schema.get("properties", {}).items():
        yield (*path, name)
        yield from keys(inner, (*path, name))
    if "items" in schema:
        yield from keys(schema["items"], (*path, 0))


def put(table: Any, path: tuple[str | int, ...], value: Any) -> Any:
    """The table with this value there, and what is on the way to it where nothing was."""
    if not path:
        return value
    if isinstance(path[0], int):
        first = table[0] if isinstance(table, list) and table else None
        return [put(first, path[1:], value)]
    known = table if isinstance(table, dict) else {}
    return {**known, path[0]: put(known.get(path[0]), path[1:], value)}


PATHS = sorted(set(keys(SCHEMA)), key=str)


@pytest.mark.parametrize(
    "changes",
    [
        {"device": LONG},
        {"evaluation__metric": LONG},
        {"data__text": LONG},
        {"data__text": "{" + LONG + "}"},
        {"data__label": LONG},
        {"data__train_split": LONG},
        {"data__test_split": LONG},
        {"data__more_tests": {"a": LONG}},
        {"model__source": LONG},
        {"model__task": LONG},
        {"partition": {"kind": "column", "column": LONG}},
        {"training": {"function": f"{LONG}:f", "optimizer": "sgd", "lr": 0.1}},
        {"training": {"function": f"a:{LONG}", "lr": 0.1}},
        {"lora__targets": [LONG]},
        {"lora__targets": LONG[:1999]},
        {"lora__whole": [LONG[:200]]},
        {"lora__start": LONG},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_nor_does_one_that_is_found_later(tiny: Tiny, changes: dict[str, Any]) -> None:
    """Over the rows, the model and this machine."""
    with pytest.raises(FedSieveError) as caught:
        from_recipe(read.check(tiny.table(**changes), allow_code=True))
    assert len(str(caught.value)) < MOST


def test_the_keys_are_found() -> None:
    assert len(PATHS) > 100
    assert {("model", "task"), ("data", "set"), ("method", "name"), ("budgets", 0, "ratio")} <= {
        *PATHS
    }


def test_no_error_quotes_at_length() -> None:
    text = (resources.files("fedsieve.recipes") / "demo.toml").read_text("utf-8")
    given, long = tomllib.loads(text), set()
    for path in PATHS:
        for value in (LONG, [LONG], {LONG: LONG}):
            try:
                read.parse_text(tomli_w.dumps(put(given, path, value)), "recipe.toml")
            except FedSieveError as error:
                if len(str(error)) > MOST:
                    long.add(path)
    assert not long
