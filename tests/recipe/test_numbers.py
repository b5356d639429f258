"""Numbers that make no sense are refused when a recipe is read, by their key: every key that takes
a number, in every table, and every option of a method and of a server optimizer.

The keys are found in the schema and in the signatures, so that a new one is tried too.
"""

import inspect
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

import pytest

from fedsieve import methods
from fedsieve.algebra import optim
from fedsieve.errors import FedSieveError
from fedsieve.recipe import read as recipe
from fedsieve.recipe.schema import SERVERS, Recipe
from tests.conftest import Tiny

NAN, INF = float("nan"), float("inf")
ABSURD = (-1, -0.5, NAN, INF, -INF, True, False)
ZERO = (  # of those that may not be negative, the ones that may be zero
    "seed", "lora.layers_to_transform.0", "lora.dropout", "training.momentum",
    "training.weight_decay", "training.proximal", "data.first_option", "sampling.extra",
    "sampling.quorum", "privacy.noise_multiplier",
    "budgets.tiers.0.latency", "budgets.tiers.0.step_seconds", "server.momentum", "server.beta1",
    "server.beta2", "method.dense_rounds", "method.penalty",
)  # fmt: skip
MACHINE = {"memory": 100.0, "downlink": 10.0, "uplink": 10.0, "step_seconds": 0.1, "latency": 0.1}
PRIVACY = {
    "clip": 1.0, "delta": 1e-5, "epsilon": 8.0, "noise_multiplier": 1.0, "simulated_cohort": 10,
    "simulated_population": 100, "quantile": 0.5, "clip_rate": 0.2, "count_noise": 5.0,
}  # fmt: skip
# A table for each form that a part of a recipe can have.
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "private": {"privacy": PRIVACY, "method": {"name": "fedit"}, "budgets": [{}]},
    "clipped": {"method": {"name": "fedit"}, "budgets": [{}], "server__clip": 1.0},
    "list": {
        "budgets": {"kind": "list", "clients": [{"rank": 2, "down": 0.5, "up": 0.5}] * 12}
    },
    "shares of ranks": {"budgets": {"kind": "list", "clients": [{"ratio": 0.5}] * 12}},
    "tiers": {"budgets": {"kind": "tiers", "tiers": 2}},
    "ratios": {"budgets": {"kind": "ratios", "ratios": [0.5], "down": 0.5, "up": 0.5}},
    "law": {"budgets": {"kind": "normal", "low": 1, "high": 2, "down": 0.5, "up": 0.5}},
    "machines": {
        "budgets": {
            "kind": "resources", "deadline": 10.0, "least": 0.1,
            "tiers": [{"share": 1.0, **MACHINE}],
        },
        "sampling": {"extra": 1, "quorum": 1},
    },
    "there": {"sampling": {"availability": 0.5}},
    "workers": {"engine": {"kind": "processes", "workers": 2, "threads": 1}},
    "each there": {"sampling": {"availability": {"0000": 0.5}}},
}  # fmt: skip
FORMS |= {
    f"server {name}": {"method": {"name": "fedit"}, "budgets": [{}], "server": {"optimizer": name}}
    for name in SERVERS
}
FORMS |= {f"method {name}": {"method": {"name": name}, "budgets": [{}]} for name in methods.names()}


def numeric(hint: Any) -> bool:
    """Whether a number of some kind fits an annotation, whatever limits it has."""
    if hint in (int, float):
        return True
    return any(numeric(each) for each in get_args(hint) if not isinstance(each, str))


def options(name: str, given: Any) -> dict[str, Any]:
    """The numeric options of a method or an optimizer, each at its default or at one half."""
    hints = get_type_hints(given, include_extras=True)
    found = {
        option: parameter.default
        for option, parameter in inspect.signature(given).parameters.items()
        if option != "server" and numeric(hints[option])
    }
    return {option: 3 if value is None else value for option, value in found.items()}


def whole(tiny: Tiny, form: str) -> dict[str, Any]:
    """A recipe of this form that is right, in which every number that it can name is written."""
    table = tiny.table(**FORMS[form])
    kind, _, name = form.partition(" ")
    if kind == "server":
        table["server"] |= {**options(name, getattr(optim, name)), "decay": 0.9}
    if kind == "method":
        table["method"] |= options(name, methods.load(name))
    if form == "plain":
        told = recipe.check(table).model_dump(mode="json")
        table = {**told, **{key: table[key] for key in ("method", "server", "budgets")}}
        table["data"]["validation"] = 0.1
        table["server"] = {**table["server"], "norm_bound": 10.0}
        table["training"] |= {"steps": 3, "clip": 1.0, "last_lr": 0.01, "micro_batch": 2}
        table["lora"] |= {"layers_to_transform": [0], "clients": 3}
        table["evaluation"]["limit"] = 10
        table = without_none(table)
    return table


def without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_none(each) for key, each in value.items() if each is not None}
    return value


def numbers(table: Any, *path: str | int) -> Iterator[tuple[str | int, ...]]:
    """The places of a table that hold a number."""
    if isinstance(table, dict | list):
        places = table.items() if isinstance(table, dict) else enumerate(table)
        for key, value in places:
            yield from numbers(value, *path, key)
    elif isinstance(table, int | float) and not isinstance(table, bool):
        yield path


def changed(table: Any, path: tuple[str | int, ...], value: Any) -> Any:
    copied: Any = dict(table) if isinstance(table, dict) else list(table)
    first, *rest = path
    copied[first] = changed(copied[first], tuple(rest), value) if rest else value
    return copied


def refusal(table: Any) -> str:
    """What a recipe is refused with; nothing where it is taken."""
    try:
        recipe.check(table)
    except FedSieveError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("form", FORMS)
def test_a_number_that_makes_no_sense_is_refused_by_its_key(tiny: Tiny, form: str) -> None:
    table = whole(tiny, form)
    recipe.check(table)
    tried = 0
    for path in numbers(table):
        name = ".".join(map(str, path))
        for value in (*ABSURD, *([] if name in ZERO else [0])):
            if (name, value) == ("privacy.clip", INF):
                continue  # none at all, which is sensible where there is no noise either
            said = refusal(changed(table, path, value))
            steps = [str(step) for step in path if not isinstance(step, int)]
            assert all(step in said for step in steps), (form, name, value, said)
            tried += 1
    assert tried >= 5 * 10


def test_all_keys_are_tried(tiny: Tiny) -> None:
    """No key of the schema that takes a number is left out above."""

    def keys(table: Any, *path: str) -> Iterator[tuple[str, ...]]:
        for name, field in table.__pydantic_fields__.items():
            inner = [e for e in (field.annotation, *get_args(field.annotation)) if has_keys(e)]
            if inner:
                yield from keys(inner[0], *path, name)
            elif numeric(field.annotation):
                yield (*path, name)

    def has_keys(kind: Any) -> bool:
        return hasattr(kind, "__pydantic_fields__")

    seen = {
        tuple(step for step in path if not isinstance(step, int))
        for form in FORMS
        for path in numbers(whole(tiny, form))
    }
    assert {key for key in keys(Recipe) if key not in seen} == set()
