"""Recipes: a TOML file that names a whole experiment.

Every key has one place here, with its default and its limits. An unknown key is refused and the
nearest known one is named, because a misspelt setting that is silently ignored costs a day of
training. docs/recipes.md describes the keys.
"""

import inspect
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import tomli_w
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from fedsieve import methods, optim
from fedsieve.errors import FedSieveError, nearest
from fedsieve.method import Method
from fedsieve.train.local import Training
from fedsieve.train.model import Lora

Share = Annotated[float, Field(gt=0, le=1)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(_Table):
    """The pretrained model: a hub name, a folder, or a name that `fedsieve fetch` knows.

    settings: changes to the model's configuration, such as its dropout rates
    """

    source: str
    task: Literal["classification", "causal-lm"] = "classification"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    settings: dict[str, Any] = {}


class Data(_Table):
    """Rows to train and to evaluate on, and the columns that matter.

    train, test: a hub data set, a file, a folder, or a fetched name; test defaults to train's
    names, separator: for CSV and TSV files without a header line, or with another separator
    classes: the labels in the order of the model's outputs; by default those that train holds
    """

    train: str
    test: str | None = None
    config: str | None = None
    train_split: str | None = None
    test_split: str | None = None
    names: tuple[str, ...] | None = None
    separator: str | None = None
    text: str | None = None
    text_b: str | None = None
    label: str | None = None
    prompt: str | None = None
    completion: str | None = None
    classes: tuple[str, ...] | None = None
    max_length: PositiveInt = 128


class Partition(_Table):
    """Which rows go to which client.

    dirichlet: `clients` clients whose label shares are drawn with concentration `alpha`
    iid: `clients` equal parts at random; column: one client for each value of `column`
    """

    kind: Literal["dirichlet", "iid", "column"]
    clients: PositiveInt | None = None
    alpha: PositiveFloat | None = None
    column: str | None = None

    @model_validator(mode="after")
    def _complete(self) -> "Partition":
        needs = {"dirichlet": ("clients", "alpha"), "iid": ("clients",), "column": ("column",)}
        for key in ("clients", "alpha", "column"):
            given = getattr(self, key) is not None
            if given != (key in needs[self.kind]):
                verb = "does not use" if given else "needs"
                raise ValueError(f"a partition of kind {self.kind!r} {verb} {key!r}")
        return self


class Tier(_Table):
    """A kind of client: its share of all clients and what it can afford (see budget.Budget)."""

    share: PositiveFloat = 1.0
    ratio: Share = 1.0
    down: Share = 1.0
    up: Share = 1.0


class MethodTable(BaseModel):
    """The method's name; its options stand beside it and are checked against its signature."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str


class ServerTable(BaseModel):
    """The server optimizer's name; its parameters stand beside it.

    decay: its learning rate is multiplied by this after every round
    """

    model_config = ConfigDict(extra="allow", frozen=True)
    optimizer: Literal["sgd", "adam", "fedadam"] = "sgd"
    decay: Share = 1.0


class Evaluation(_Table):
    """every: rounds between evaluations (the last round is always evaluated)

    limit: evaluate on the first so many rows, after a shuffle by the seed; None takes all
    """

    every: PositiveInt = 1
    batch: PositiveInt = 64
    limit: PositiveInt | None = None


class Checkpoint(_Table):
    """every: rounds between checkpoints (the last round always leaves one)."""

    every: PositiveInt = 1


class Recipe(_Table):
    """A whole experiment."""

    name: str = "run"
    seed: NonNegativeInt = 0
    rounds: PositiveInt
    cohort: PositiveInt
    device: str = "auto"
    model: Model
    lora: Lora = Lora()
    data: Data
    partition: Partition
    budgets: tuple[Tier, ...] = (Tier(),)
    method: MethodTable
    server: ServerTable = ServerTable()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()


def load(source: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a file, or one that ships with FedSieve by its name.

    overrides: "key=value" each; the key is dotted ("training.lr"), the value is TOML, or plain text
    Raises FedSieveError for anything that is not right, naming the key.
    """
    path = Path(source)
    if path.suffix == ".toml" or path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise FedSieveError(f"the recipe {source} cannot be read: {error}") from error
    elif source in shipped():
        text = shipped()[source]
    else:
        raise FedSieveError(f"no recipe is called {source!r}{nearest(source, shipped())}")
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise FedSieveError(f"the recipe {source} is not valid TOML: {error}") from error
    for override in overrides:
        _override(table, override)
    table.pop("environment", None)
    return check(table, source)


def check(table: Mapping[str, Any], source: str = "the recipe") -> Recipe:
    """The recipe that a table of plain values describes; raises FedSieveError, naming the key."""
    try:
        recipe = Recipe.model_validate(table)
    except ValidationError as error:
        lines = "\n".join(f"  {_explain(detail)}" for detail in error.errors())
        raise FedSieveError(f"{source}:\n{lines}") from error
    build_method(recipe)  # its options are checked now, not after the data are loaded
    return recipe


def dump(recipe: Recipe, environment: Mapping[str, Any]) -> str:
    """The recipe with every default written out, as TOML; `environment` is a table of its own."""
    table = _without_none(recipe.model_dump(mode="json"))
    text: str = tomli_w.dumps({**table, "environment": dict(environment)})
    return text


def shipped() -> dict[str, str]:
    """The recipes that ship with FedSieve: name -> text."""
    folder = resources.files("fedsieve") / "recipes"
    return {
        entry.name.removesuffix(".toml"): entry.read_text(encoding="utf-8")
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name)
        if entry.name.endswith(".toml")
    }


def build_method(recipe: Recipe) -> Method:
    """The method that the recipe's [method], [server] and [[budgets]] tables describe.

    Raises FedSieveError for an option that the method lacks, a value that it does not take, or
    budgets that it would ignore.
    """
    server_options = dict(recipe.server.model_extra or {})
    make_server = getattr(optim, recipe.server.optimizer)
    server = make_server(**_options(make_server, server_options, "server"))
    if recipe.server.decay < 1:
        server = optim.fading(server, recipe.server.decay)
    build = methods.load(recipe.method.name)
    options = dict(recipe.method.model_extra or {})
    method: Method = build(server=server, **_options(build, options, "method"))
    for knob in ("ratio", "down", "up"):
        values = {getattr(tier, knob) for tier in recipe.budgets}
        if values != {1.0} and knob not in method.knobs:
            raise FedSieveError(
                f"budgets.{knob}: the method {recipe.method.name!r} makes no use of it (clients "
                f"would get {knob} 1 whatever the recipe says): remove it or choose another method"
            )
    return method


def _options(build: Any, given: Mapping[str, Any], table: str) -> dict[str, Any]:
    hints = get_type_hints(build)
    known = [name for name in inspect.signature(build).parameters if name != "server"]
    checked = {}
    for name, value in given.items():
        if name not in known:
            raise FedSieveError(f"{table}.{name}: unknown key{nearest(name, known)}")
        try:
            checked[name] = TypeAdapter(hints[name]).validate_python(value)
        except ValidationError as error:
            raise FedSieveError(f"{table}.{name}: {error.errors()[0]['msg']}") from error
    return checked


def _override(table: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise FedSieveError(f"{override!r} is not of the form key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *path, last = key.strip().split(".")
    place: Any = table
    for step in path:
        if isinstance(place, list) and step.isdigit() and int(step) < len(place):
            place = place[int(step)]
        elif isinstance(place, dict):
            place = place.setdefault(step, {})
        else:
            raise FedSieveError(f"{override!r}: {step!r} is not a table of the recipe")
    if not isinstance(place, dict):
        raise FedSieveError(f"{override!r}: {last!r} is not a key of a table")
    place[last] = value


def _explain(detail: Any) -> str:
    place = ".".join(str(step) for step in detail["loc"])
    if detail["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{place}: unknown key{nearest(str(detail['loc'][-1]), keys_of(detail['loc'][:-1]))}"
    if detail["type"] in ("missing", "missing_argument"):
        return f"{place}: this key is needed"
    message = detail["msg"].removeprefix("Value error, ")
    if isinstance(detail["input"], str | int | float):
        message += f" (it is {detail['input']!r})"
    return f"{place}: {message}" if place else message


def keys_of(path: Sequence[str | int]) -> list[str]:
    """The keys of the table at a place of the recipe."""
    table: Any = Recipe
    for step in path:
        if isinstance(step, int):
            continue  # an entry of a list has the list's own type
        table = table.__pydantic_fields__[step].annotation
        table = Tier if step == "budgets" else table
    return list(table.__pydantic_fields__)


def _without_none(value: Any) -> Any:
    """TOML has no null: a key that is not set is left out."""
    if isinstance(value, dict):
        return {key: _without_none(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list):
        return [_without_none(entry) for entry in value]
    return value
