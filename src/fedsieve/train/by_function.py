"""A client's local training by a function of the user's own, in the place of `local.fit`.

The function is given the resident model with the client's adapter in it, the client's rows and a
seed, and moves the parameters that require gradients, however it likes: with a `Trainer` of
transformers (`with_trainer`), TRL's, or a loop of its own. What comes before and after it in a
round is the same as always.

One model serves all clients, so what such libraries leave in a model does not stay: random states,
the configuration, what modules compute by beside their weights, gradients and checkpointing are put
back as they were.
"""

import copy
import importlib
import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import PreTrainedConfig

from fedsieve.algebra.keys import Key, word
from fedsieve.algebra.method import View
from fedsieve.errors import (
    THEIRS,
    FedSieveError,
    beside,
    cannot_take,
    of_memory,
    raise_of_memory,
    with_type,
    words,
)
from fedsieve.tasks.examples import Examples
from fedsieve.tasks.images import Images
from fedsieve.tasks.tokens import by_token
from fedsieve.train.batch import half_type, inputs, laid_out
from fedsieve.train.local import Fit, allocated
from fedsieve.train.model import ResidentModel
from fedsieve.train.seeded import seeded

# The resident model, the client's rows, a seed below 2**31 -> the mean training loss, if it is told
Function = Callable[[Any, Dataset, int], float | None]
_NEEDED = "a function (model, rows, seed) is needed"


def load(name: str) -> Function:
    """The function that `training.function = "module:name"` names; the module is run.

    Raises FedSieveError if there is none, or it cannot be called as one is.
    """
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function, None)
    except THEIRS as error:
        raise_of_memory(error)
        said = f"{module!r} cannot be imported: {with_type(error)}{beside(error)}"
        raise FedSieveError(f"training.function: {said}") from error
    if found is None:
        raise FedSieveError(f"training.function: the module {module!r} has no {function!r}")
    check(found, f"training.function: {name!r}")
    return found  # type: ignore[no-any-return]


def check(function: object, what: str = "training") -> None:
    """Raises FedSieveError, beginning with `what`, for what cannot be called with three values."""
    if isinstance(function, type):
        raise FedSieveError(f"{what}: {_NEEDED}, not the class itself")
    _refuse_other_arguments(function, what)


def _refuse_other_arguments(function: object, what: str) -> None:
    if not callable(function):
        raise FedSieveError(f"{what}: {_NEEDED}, not {type(function).__name__}")
    if why := cannot_take(function, None, None, 0):
        raise FedSieveError(f"{what}: it must take (model, rows, seed), and does not: {why}")


def with_trainer(make: Callable[[Any, Dataset, int], Any]) -> Function:
    """Local training by a `Trainer` of transformers, or TRL's `SFTTrainer`, that `make` makes.

    make: (model, rows, seed) -> a trainer over this very model that is not trained yet. rows are
          tokens already, without padding (`fedsieve.finetune` says which columns): give the trainer
          `processing_class=tokenizer`, whose collator pads them. Optimizer, learning rate, epochs
          and batches are the trainer's own; set `save_strategy="no"` and `report_to="none"`, or
          each client of each round leaves checkpoints and reports

    Training fails with a FedSieveError, naming the client, if the trainer has another model than it
    was given (a `peft_config`, say, puts a second adapter around it). Raises FedSieveError at once
    for what cannot be called so; a class whose instances are such trainers can.
    """
    _refuse_other_arguments(make, "with_trainer")

    @wraps(make, updated=())
    def function(model: Any, rows: Dataset, seed: int) -> float | None:
        trainer = make(model, rows, seed)
        if not callable(getattr(trainer, "train", None)):
            raise FedSieveError(
                f"with_trainer: a trainer is needed, and the function made a "
                f"{type(trainer).__name__}"
            )
        if getattr(trainer, "model", model) is not model:
            raise FedSieveError(
                "with_trainer: the trainer has another model than it was given: make it without "
                "peft_config, and of the model itself"
            )
        told = getattr(trainer.train(), "training_loss", None)
        return None if told is None else float(told)

    return function


def fit(
    resident: ResidentModel, view: View, examples: Examples, function: Function, key: Key
) -> Fit:
    """Train a client's adapter by a function. The adapter's own tensors are left as they are.

    What the view does not let move comes back to the bit, whatever the function did: single entries
    are set back after each step of an optimizer of torch, and all at the end. Steps are those of
    optimizers of torch. The loss is what the function returned, or None.
    Raises FedSieveError, naming client and round, if the function raises, if it changed the base
    that all clients share, or if the method adds a penalty to the local loss.
    """
    where = f"client {key.client!r}, round {key.round}"
    if view.penalty is not None:
        raise FedSieveError(
            "training: this method adds a penalty to the local loss (HetLoRA's pruning), which a "
            "function of your own does not know: turn it off, or leave the training to FedSieve"
        )
    resident.put(view.adapter)
    model, parameters = resident.model, dict(resident.parameters())
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in view.moves.names)
    held = [
        (name, mask.to(resident.device), view.adapter.tensors[name].to(resident.device).float())
        for name, mask in view.moves.masks.items()
    ]
    for name, mask, _ in held:  # so that what stays counts for nothing in a gradient's norm
        parameters[name].register_hook(lambda gradient, mask=mask: gradient * mask)
    frozen = _frozen(model, parameters)
    rows, seed = rows_of(model, examples), word(key.at("own training")) >> 33
    steps = memory = 0

    def stepped(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        nonlocal steps, memory
        steps += 1
        for name, mask, own in held:
            parameters[name].data = torch.where(mask, parameters[name].data, own)
        memory = memory or allocated([*parameters.values()], optimizer)

    start = time.perf_counter()
    with (
        _blamed(where, "left a model that cannot be read"),
        seeded(seed, resident.device),
        _as_it_was(resident),
        ExitStack() as stack,
    ):
        stack.callback(register_optimizer_step_post_hook(stepped).remove)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        with _blamed(where, "failed"):
            told = function(model, rows, seed)
    with _blamed(where, "left a model that cannot be read"):
        tensors = _trained(resident, view, parameters, frozen, where)
    loss = _loss(told, where)
    return Fit(
        tensors,
        math.nan if loss is None else loss,
        steps,
        time.perf_counter() - start,
        memory,
        told=loss is not None,
    )


class FunctionFailed(FedSieveError):
    """One that names the client already."""


@contextmanager
def _blamed(where: str, what: str) -> Iterator[None]:
    """What the user's own code raises, or leaves behind for others to raise, is told as its own.
    Too little memory is not: a worker process ends over it.
    """
    try:
        yield
    except THEIRS as error:
        if isinstance(error, FunctionFailed) or of_memory(error):
            raise
        said = words(error) if isinstance(error, FedSieveError) else with_type(error)
        raise FunctionFailed(f"{where}: the function that trains {what}: {said}") from error


def _trained(
    resident: ResidentModel,
    view: View,
    parameters: dict[str, Tensor],
    frozen: "dict[str, _Frozen | int]",
    where: str,
) -> dict[str, Tensor]:
    """The adapter's tensors after the function, where it has moved nothing else.

    frozen: what may not have changed, as it was before
    """
    after = _frozen(resident.model, parameters)
    if odd := [name for name in frozen | after if frozen.get(name) != after.get(name)]:
        raise FunctionFailed(
            f"{where}: the function that trains changed {odd[0]}, which all clients share: it may "
            "move what requires gradients alone (and not merge the adapter into the base); begin "
            "the run again"
        )
    trained = dict(resident.parameters())
    tensors = {}
    for name, own in view.adapter.tensors.items():
        if name not in trained or not trained[name].is_floating_point():
            raise FunctionFailed(f"{where}: the function that trains left no numbers in {name}")
        value = trained[name].detach().cpu().float()
        if value.shape != own.shape:
            raise FunctionFailed(
                f"{where}: the function that trains left {name} in the shape {tuple(value.shape)}, "
                f"and it was {tuple(own.shape)}"
            )
        if name not in view.moves.names:
            value = own.detach().cpu().float()
        elif name in view.moves.masks:
            value = torch.where(view.moves.masks[name].cpu(), value, own.cpu().float())
        tensors[name] = value
    return tensors


def rows_of(model: Any, examples: Examples) -> Dataset:
    """A client's examples as a function is given them: what the model's forward pass takes, a row
    as long as its own tokens are.

    Of texts `input_ids`, `attention_mask`, `token_type_ids` where the model has such, and `labels`:
    a class's number, a value, a list of ones and zeros, or a label of each token, -100 where there
    is nothing to learn. Of images `pixel_values` (3, height, width), as torch's tensors, and
    `labels`.
    """
    if isinstance(examples, Images):
        given = inputs(model, examples, torch.device("cpu"))
        table = {name: value.numpy() for name, value in given.items()}
        return Dataset.from_dict(table).with_format("torch")
    given = laid_out(model, examples)
    masks = given["attention_mask"].bool()
    return Dataset.from_dict(
        {
            name: value.tolist()
            if name == "labels" and not by_token(value)
            else [row[mask].tolist() for row, mask in zip(value, masks, strict=True)]
            for name, value in given.items()
        }
    )


def _loss(told: object, where: str) -> float | None:
    if told is None:
        return None
    try:
        return float(told)  # type: ignore[arg-type]
    except THEIRS:
        raise FedSieveError(
            f"{where}: the function that trains returned a {type(told).__name__}: return the mean "
            "loss, or nothing"
        ) from None


class _Frozen(NamedTuple):
    """A tensor that nobody may change: which, torch's count of the changes to it, and a sum of its
    bits, for those that torch does not count (`.data`, NumPy, one in another's place).
    """

    id: int
    dtype: torch.dtype
    version: int
    bits: int


def _frozen(model: nn.Module, parameters: dict[str, Tensor]) -> dict[str, _Frozen | int]:
    """By name, also of the modules: whoever puts another in a place changes it too."""
    own = {id(p) for p in parameters.values()}
    named = [*model.named_parameters(), *model.named_buffers()]
    found: dict[str, _Frozen | int] = {
        n: _Frozen(id(t), t.dtype, t._version, _bits(t)) for n, t in named if id(t) not in own
    }
    return found | {f"the module {n}": id(module) for n, module in model.named_modules()}


def _bits(tensor: Tensor) -> int:
    flat = tensor.detach().contiguous().flatten()
    wide = {8: torch.int64, 4: torch.int32, 2: torch.int16}.get(flat.element_size(), torch.uint8)
    return int(flat.view(wide).sum(dtype=torch.int64)) if flat.numel() else 0


@contextmanager
def _as_it_was(resident: ResidentModel) -> Iterator[None]:
    """The model in training mode; afterwards it, and what is random, as they were before."""
    model: Any = resident.model
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    configs = [(each, dict(vars(each))) for each in _configs(base)]
    modules = [(each, _settings(each)) for each in model.modules()]
    dtype = torch.get_default_dtype()
    checkpointing = _checkpoints(base)
    # A trainer calls `train()` before each step, and batch norm is not to learn (mode.py).
    still = [m for m in model.modules() if isinstance(getattr(m, "running_mean", None), Tensor)]
    half = half_type(model)
    try:
        model.train()
        for module in still:
            module.eval()
            module.train = _stays.__get__(module)
        with (
            torch.enable_grad(),
            torch.autocast(resident.device.type, half, enabled=half is not None),
        ):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        for module in still:
            vars(module).pop("train", None)
        for module, before in modules:
            _put_back(module, before)
        torch.set_default_dtype(dtype)
        if _checkpoints(base) and not checkpointing:
            # transformers is to drop the older name with 6, and has the newer only of late.
            off = getattr(base, "activation_checkpointing_disable", None)
            (off or base.gradient_checkpointing_disable)()
        for config, before in configs:
            vars(config).clear()
            vars(config).update(before)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
        if any(p.device.type != resident.device.type for _, p in resident.parameters()):
            model.to(resident.device)  # a trainer chose another
        model.eval()


# What torch itself keeps in a module: weights are looked at by `_frozen`, the mode is set anew.
_OF_TORCH = {"_parameters", "_buffers", "_modules", "training"}


class _Setting(NamedTuple):
    """An attribute of a module; of a table or a list also what it holds, for it may be shared."""

    value: Any
    held: Any


def _settings(module: nn.Module) -> dict[str, _Setting]:
    """All that a module computes by beside its weights: an epsilon, a number of heads, its hooks, a
    pair's scale, its forward pass.
    """
    return {
        name: _Setting(value, copy.copy(value) if isinstance(value, dict | list | set) else None)
        for name, value in vars(module).items()
        if name not in _OF_TORCH
    }


def _put_back(module: nn.Module, before: dict[str, _Setting]) -> None:
    for name in vars(module).keys() - before.keys() - _OF_TORCH:
        del vars(module)[name]
    for name, (value, held) in before.items():
        if isinstance(value, dict | set):
            value.clear()
            value.update(held)
        elif isinstance(value, list):
            value[:] = held
        vars(module)[name] = value


def _checkpoints(base: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in base.modules())


def _configs(base: Any) -> list[Any]:
    """A model's configurations, with those inside of them."""
    found = [each for each in (base.config, getattr(base, "generation_config", None)) if each]
    for each in found:  # which grows
        found += [inner for inner in vars(each).values() if isinstance(inner, PreTrainedConfig)]
    return found


def _stays(module: nn.Module, mode: bool = True) -> nn.Module:
    return module
