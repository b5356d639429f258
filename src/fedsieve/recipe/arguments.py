"""What a notebook gives `finetune` in the place of a recipe, checked before anything is read.

A recipe's keys have a schema; here each argument has the kind of value that it must be, and an
error of one sentence that begins with the argument's name.
"""

from collections.abc import Iterable, Mapping
from os import PathLike
from types import FunctionType, ModuleType
from typing import Any, cast

from pydantic import ValidationError

from fedsieve import methods
from fedsieve.algebra.budget import Budget
from fedsieve.algebra.method import Method
from fedsieve.data.names import name_of
from fedsieve.errors import FedSieveError, nearest
from fedsieve.recipe.schema import Data, Model
from fedsieve.settings import Lora, Sampling, Training, whole
from fedsieve.tasks import catalogue
from fedsieve.tasks.task import Fields
from fedsieve.train import by_function
from fedsieve.train.by_function import Function

A_BUDGET = "a fedsieve.Budget, such as Budget(ratio=0.5),"
_COLUMN = "a column's name"
_KINDS: dict[str, tuple[Any, str]] = {
    "model": (str | PathLike, "a name or a folder"),
    "text": (str | None, _COLUMN),
    "label": (str | list | tuple, "a column's name, or a list of them,"),
    "prompt": (str | None, _COLUMN),
    "completion": (str | None, _COLUMN),
    "metric": (str | None, "a metric's name"),
    "device": (str, "a name, such as 'cpu',"),
    "strict": (bool, "True or False"),
    "lora": (Lora | None, "a fedsieve.Lora, such as Lora(rank=8),"),
    "budgets": (Budget | Mapping | None, f"{A_BUDGET} or a dict of them by client"),
}
_LEAST = {"rounds": 1, "max_length": 1, "evaluate_every": 1, "seed": 0}


def check(given: Mapping[str, Any]) -> None:
    """Raises FedSieveError for the first argument that is not what it must be.

    given: the arguments of `finetune`, by name; its data sets are checked as they are read
    """
    _refuse_no_method(given["method"])
    for name, (kind, needed) in _KINDS.items():
        of_kind(name, given[name], kind, needed)
    training_given(given["training"])
    for name, least in _LEAST.items():
        whole(name, given[name], least)
    if not isinstance(given["cohort"], Sampling | None):
        whole("cohort", given["cohort"], 1)
    of_kind("task", given["task"], str, f"one of {', '.join(catalogue.names())}")
    try:
        catalogue.known(given["task"])
    except FedSieveError as error:
        raise FedSieveError(f"task: {error}") from None


def training_given(given: object) -> tuple[Training, Function | None]:
    """The settings of local training, and the function that trains in its place, if one does.

    Raises FedSieveError for what is neither.
    """
    if given is None or isinstance(given, Training):
        training = given or Training()
        name = training.function
        return training, None if name is None else by_function.load(name)
    if not callable(given) or isinstance(given, type):
        a_training = "a fedsieve.Training, such as Training(lr=0.1), or a function"
        of_kind("training", given, Training, a_training)
    by_function.check(given)
    return Training(), cast(Function, given)


def of_kind(name: str, value: object, kind: Any, needed: str) -> None:
    """Raises FedSieveError, naming the argument, for a value of another kind."""
    if not isinstance(value, kind):
        what = "the class itself" if isinstance(value, type) else type(value).__name__
        raise FedSieveError(f"{name}: {needed} is needed, not {what}")


def classes_given(given: Any) -> tuple[str, ...]:
    """The classes as names. Raises FedSieveError for anything but two and more different ones."""
    if isinstance(given, str | Mapping) or not isinstance(given, Iterable):
        raise FedSieveError(f"classes: a list of names is needed, not {type(given).__name__}")
    names: list[str] = []
    for each in given:
        try:
            name = name_of(each)
        except FedSieveError as error:
            raise FedSieveError(f"classes: the list {error}") from None
        if name is None:
            raise FedSieveError(f"classes: the list holds {each!r}, which is no name")
        names.append(name)
    if len(names) < 2 or len(set(names)) < len(names):
        raise FedSieveError(f"classes: at least two different ones are needed, not {names}")
    return tuple(names)


def fields_given(given: Mapping[str, Any]) -> dict[str, Any]:
    """What else says what rows hold, as a recipe's [data] has it. Raises FedSieveError, naming the
    argument, for one that is none, or that is not what it must be.
    """
    further = sorted(set(Fields._fields) - {*_KINDS, "classes", "max_length"})
    for name in given:
        if name not in further:
            raise FedSieveError(f"{name}: finetune takes no such argument{nearest(name, further)}")
    try:
        checked = Data(train="", **given)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][:1])
        raise FedSieveError(f"{place}: {first['msg']}") from None
    return {name: getattr(checked, name) for name in given}


def model_given(**given: Any) -> Model:
    """How the base is held, as a recipe's [model] has it. Raises FedSieveError, naming the
    argument, for what it cannot be.
    """
    try:
        return Model(source="", **given)
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"{part}: " for part in first["loc"][:1])
        raise FedSieveError(f"{place}{first['msg'].removeprefix('Value error, ')}") from None


def _refuse_no_method(given: object) -> None:
    """Raises FedSieveError for what is no method, and says how it becomes one."""
    if isinstance(given, str):
        ours = given in methods.names()
        hint = f"give fedsieve.{given}()" if ours else "give a call of one, as in fedsieve.flasc()"
        near = "" if ours else nearest(given, methods.names())
        raise FedSieveError(f"method: {given!r} is no method: {hint}{near}")
    if isinstance(given, FunctionType | ModuleType):
        is_module = isinstance(given, ModuleType)
        name = (given.__name__ if is_module else given.__module__).rpartition(".")[2]
        call = f"fedsieve.{name}()" if name in methods.names() else f"{name}.method()"
        raise FedSieveError(
            f"method: it is a {'module' if is_module else 'function'}: call it, as in {call}"
        )
    of_kind("method", given, Method, "a method, such as fedsieve.flasc(),")
