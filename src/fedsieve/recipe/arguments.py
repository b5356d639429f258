"""What a notebook gives `finetune` in the place of a recipe, checked before anything is read.

A recipe's keys have a schema; here each argument has the kind of value that it must be, and an
error of one sentence that begins with the argument's name.
"""

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from numbers import Integral, Real
from os import PathLike, fspath
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, cast

from peft import LoraConfig, PeftConfig
from pydantic import ValidationError

from fedsieve import methods
from fedsieve.algebra.budget import Budget
from fedsieve.algebra.method import Method
from fedsieve.data.names import half_of_a_character, name_of, numbered
from fedsieve.disk import whole_way
from fedsieve.errors import FedSieveError, listed, nearest, quoted
from fedsieve.recipe.schema import Data, Model, Partition
from fedsieve.settings import Lora, Sampling, Training, as_float, is_number, whole
from fedsieve.tasks import catalogue
from fedsieve.tasks.task import Fields
from fedsieve.train import by_function
from fedsieve.train.by_function import Function
from fedsieve.train.peft_config import from_peft

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
    "budgets": (Budget | Mapping | Real | None, f"{A_BUDGET} or a dict of them by client"),
}
_LEAST = {"rounds": 1, "max_length": 1, "evaluate_every": 1, "seed": 0}


def check(given: Mapping[str, Any]) -> None:
    """Raises FedSieveError for the first argument that is not what it must be.

    given: the arguments of `finetune`, by name; its data sets are checked as they are read
    """
    method_given(given["method"])
    for name, (kind, needed) in _KINDS.items():
        of_kind(name, given[name], kind, needed)
        _refuse_half_characters(name, given[name])
    training_given(given["training"])
    lora_given(given["lora"], given["start"])
    for name, least in _LEAST.items():
        whole(name, given[name], least)
    if not isinstance(given["cohort"], Sampling | None):
        whole("cohort", given["cohort"], 1)
    of_kind("task", given["task"], str, f"one of {', '.join(catalogue.names())}")
    try:
        catalogue.known(given["task"])
    except FedSieveError as error:
        raise FedSieveError(f"task: {error}") from None


def _refuse_half_characters(name: str, value: object) -> None:
    """Raises FedSieveError for a text, or a list with one, that no file and no table could hold."""
    for each in value if isinstance(value, list | tuple) else [value]:
        if isinstance(each, str) and half_of_a_character(each):
            raise FedSieveError(f"{name}: {each[:80]!a} has half a character")


def by_id(given: Any, what: str) -> dict[str, Any]:
    """Values by the ids of their clients, which are names; in a list "0000", "0001", ..."""
    if not isinstance(given, Sequence | Mapping) or isinstance(given, str):
        raise FedSieveError(
            f"{what}: a list, or a dict by client, is needed, not one {type(given).__name__}"
        )
    if not isinstance(given, Mapping):
        return dict(zip(numbered(len(given)), given, strict=True))
    found: dict[str, Any] = {}
    for key, value in given.items():
        try:
            id = name_of(key)
        except FedSieveError as error:
            raise FedSieveError(f"{what}: an id {error}") from None
        if id is None or id in found:
            raise FedSieveError(
                f"{what}: {quoted(key)} is " + ("no id" if id is None else "there twice")
            )
        found[id] = value
    return found


def method_given(given: object) -> Method:
    """The method that is meant: one, or the name of one with its defaults.

    Raises FedSieveError for what is none, and says how it becomes one.
    """
    if isinstance(given, str) and given in methods.names():
        built: Method = methods.load(given)()
        return built
    _refuse_no_method(given)
    return cast(Method, given)


def lora_given(given: Lora | LoraConfig | None, start: object) -> Lora:
    """The settings of LoRA, with the folder to begin from.

    Raises FedSieveError for what is neither Lora nor PEFT's LoraConfig, or a LoraConfig with
    settings that have no equivalent.
    """
    told = Lora() if given is None else given
    lora = from_peft(told) if isinstance(told, PeftConfig) else told
    of_kind("lora", lora, Lora, "a fedsieve.Lora, such as Lora(rank=8), or a peft.LoraConfig")
    if start is None:
        return lora
    of_kind("start", start, str | PathLike, "a folder with an adapter")
    folder = os.fspath(cast(PathLike[str], start))
    if lora.start not in (None, folder):
        raise FedSieveError(f"start: {folder!r}, and lora says {lora.start!r}: give one of the two")
    return replace(lora, start=folder)


def budgets_given(given: Any, ids: Iterable[str], method: Method) -> dict[str, Budget]:
    """Each client's budget. A number is the ratio, or the density both ways: whichever the method
    uses.

    Raises FedSieveError, naming the client, for what is no budget, and for a client that has none.
    Warns of what budgets limit and the method makes no use of: one dict may serve several methods.
    """
    if isinstance(given, Mapping):
        found = {
            id: _budget(own, method, f"budgets: client {id!r}")
            for id, own in by_id(given, "budgets").items()
        }
    else:
        one = Budget() if given is None else _budget(given, method, "budgets")
        found = dict.fromkeys(ids, one)
    for id in ids:
        if id not in found:
            raise FedSieveError(f"budgets: none for client {id!r}")
    limited = [k for k in Budget._fields if any(getattr(found[id], k) != 1 for id in ids)]
    if unused := [knob for knob in limited if knob not in method.knobs]:
        warnings.warn(
            f"budgets: the method makes no use of {' and '.join(unused)}: clients get all of it",
            stacklevel=3,
        )
    return found


def _budget(given: Any, method: Method, place: str) -> Budget:
    if not is_number(given):
        of_kind(place, given, Budget, A_BUDGET)
        for knob, share in given._asdict().items():
            if not is_number(share):  # an array would not even be compared
                said = f"{knob} is {quoted(share)}; it must be a number above 0, at most 1"
                raise FedSieveError(f"{place}: {said}")
        # A fraction is a number too, and everything after this writes and multiplies floats.
        return Budget(*map(as_float, given))
    share, knobs = as_float(given), method.knobs
    if not 0 < share <= 1:
        raise FedSieveError(
            f"{place}: {quoted(given)} is no share: above 0 and at most 1 is needed"
        )
    if knobs == {"ratio"}:
        return Budget(ratio=share)
    if not knobs or "ratio" in knobs:
        either = "each of ratio, down and up" if knobs else "nothing: the method uses none"
        raise FedSieveError(
            f"{place}: {given!r} could be {either}: give a fedsieve.Budget, such as "
            "Budget(ratio=0.5)"
        )
    return Budget(down=share if "down" in knobs else 1.0, up=share if "up" in knobs else 1.0)


def partition_given(given: object) -> Partition | None:
    """How one table is divided, as a recipe's [partition] has it: a column's name, a number of
    equal parts, or such a table itself. None for anything else.

    Raises FedSieveError for a table that is none.
    """
    table = given
    if isinstance(given, str):
        table = {"kind": "column", "column": given}
    elif not isinstance(given, Mapping):
        if not isinstance(given, Integral):
            return None
        table = {"kind": "iid", "clients": whole("partition", given, 1)}
    try:
        return Partition.model_validate(table)
    except ValidationError as error:
        first = error.errors()[0]
        at = "".join(f".{part}" for part in first["loc"])
        said = first["msg"].removeprefix("Value error, ")
        raise FedSieveError(f"partition{at}: {said}") from None


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


def folder_given(name: str, given: object) -> Path:
    """A folder's path. Raises FedSieveError, naming the argument, for what can be none."""
    of_kind(name, given, str | PathLike, "a folder")
    path = fspath(given)  # type: ignore[call-overload]
    if not isinstance(path, str) or "\0" in path:
        raise FedSieveError(f"{name}: {str(path)[:80]!r} cannot be the name of a folder")
    try:
        whole_way(path)
    except FedSieveError as error:
        raise FedSieveError(f"{name}: {error}") from None
    return Path(path)


def classes_given(given: Any) -> tuple[str, ...]:
    """The classes as names. Raises FedSieveError for anything but two and more different ones."""
    if isinstance(given, str | Mapping) or not isinstance(given, Iterable):
        raise FedSieveError(f"classes: a list of names is needed, not {type(given).__name__}")
    names: list[str] = []
    for each in listed("classes", given):
        try:
            name = name_of(each)
        except FedSieveError as error:
            raise FedSieveError(f"classes: the list {error}") from None
        if name is None:
            raise FedSieveError(f"classes: the list holds {quoted(each)}, which is no name")
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
        near = nearest(given, methods.names())
        hint = "give the name of one, or a call of one, as in fedsieve.flasc()"
        raise FedSieveError(f"method: {quoted(given)} is no method: {hint}{near}")
    if isinstance(given, FunctionType | ModuleType):
        is_module = isinstance(given, ModuleType)
        name = (given.__name__ if is_module else given.__module__).rpartition(".")[2]
        call = f"fedsieve.{name}()" if name in methods.names() else f"{name}.method()"
        raise FedSieveError(
            f"method: it is a {'module' if is_module else 'function'}: call it, as in {call}"
        )
    of_kind("method", given, Method, "a method, such as fedsieve.flasc(),")
