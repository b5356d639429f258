"""Which layers get LoRA pairs: PEFT's own choice, names, a pattern, or all linear layers.

PEFT passes over a name that fits no layer as long as another one fits. Here every name counts: a
misspelt layer would otherwise be found missing after the training, if at all. And a pattern is
matched here, by a library that can stop, and PEFT gets the names.
"""

import re
import time
from collections.abc import Sequence

import regex
from peft import LoraConfig
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedsieve.errors import FedSieveError, nearest, quoted, words
from fedsieve.settings import Lora, Task
from fedsieve.train.peft_config import to_peft

PATIENCE = 10.0  # seconds for a regular expression over the names of a model's modules
# How experts were called while each was a module of its own.
_OF_EXPERTS = ("w1", "w2", "w3", "gate_proj", "up_proj", "down_proj")
FOR_EXPERTS = (
    "layers that PEFT takes for experts in this kind of model, by their names (gate_proj, up_proj, "
    "down_proj, ...): experts are stacked in parameters that take no LoRA here; name layers of "
    "attention, such as ['q_proj', 'v_proj']"
)
_VISION = (("q_proj", "v_proj"), ("query", "value"), ("qkv",), ("pwconv1", "pwconv2"))


def check_names(base: nn.Module, lora: Lora) -> None:
    """Raises FedSieveError for what can be told before PEFT changes the model."""
    able = {
        name.rpartition(".")[2]
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d | Conv1D)
    }
    if not able:
        raise FedSieveError("the model has no module that can take LoRA (linear, embedding, conv)")
    kind = getattr(getattr(base, "config", None), "model_type", None)
    known = kind in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING or _of_images(base)
    if lora.targets is None and not known:
        raise FedSieveError(
            f"lora.targets: PEFT has no choice for models of type {kind!r}: name the layers, or "
            f"take 'all-linear'{convolutions(base)}"
        )
    for target in lora.targets if isinstance(lora.targets, tuple) else ():
        last = target.rpartition(".")[2]
        if last in able:
            continue
        for name in _stacked(base):
            if last in name.split("."):
                raise FedSieveError(
                    f"lora.targets names {target!r}: the experts of a mixture; {_no_experts(name)}"
                )
        raise FedSieveError(
            f"lora.targets names {target!r}, which no module that can take LoRA is called"
            + nearest(last, able)
        )


def _stacked(base: nn.Module) -> list[str]:
    """The parameters that hold the experts of a mixture, all in one."""
    return [name for name, parameter in base.named_parameters() if parameter.ndim == 3]


def _no_experts(name: str) -> str:
    return (
        f"they are stacked in one parameter ({name}), which takes no LoRA here; name layers of "
        "attention"
    )


def _named(base: nn.Module, pattern: str) -> set[str] | str:
    """The modules that a regular expression names, as PEFT takes them.

    Raises FedSieveError where it names none, or experts, which PEFT would find by other names.
    """
    found = _matched(pattern, [name for name, _ in base.named_modules() if name])
    if not found:
        raise FedSieveError(
            "lora.targets: no module's whole name matches the regular expression "
            f"{quoted(pattern)}: begin it with '.*', or give a list of names{_meant(base, pattern)}"
        )
    for name in _stacked(base):  # a kernel or a position's embedding has three sides as well
        parent = name.rpartition(".")[0]
        if "experts" in name.split(".") and _matched(
            pattern, [name, *(f"{parent}.0.{each}" for each in _OF_EXPERTS)]
        ):
            raise FedSieveError(
                f"lora.targets takes in the experts of a mixture: {_no_experts(name)}"
            )
    return _by_name(base, found)


def _meant(base: nn.Module, pattern: str) -> str:
    """Where a text is no expression, but the name of a layer without its list, or nearly one."""
    if not re.fullmatch(r"[\w.-]+", pattern):
        return ""
    called = {name.rpartition(".")[2] for name, _ in base.named_modules() if name}
    if pattern in called:
        return f", here [{quoted(pattern)}]"
    return nearest(pattern, {*called, "all-linear"}) if len(pattern) < 100 else ""


def _matched(pattern: str, names: Sequence[str]) -> list[str]:
    """The names that a regular expression matches whole.

    Raises FedSieveError where that takes more than `PATIENCE` seconds: some expressions of a few
    letters would take for ever, and a recipe may come from somebody else.
    """
    until, found = time.monotonic() + PATIENCE, []
    for name in names:
        try:
            left = max(1e-3, until - time.monotonic())
            if regex.fullmatch(pattern, name, timeout=left):
                found.append(name)
        except TimeoutError:
            raise FedSieveError(
                f"lora.targets: {quoted(pattern)} was not through the names of the modules in "
                f"{PATIENCE:g} s: write it without repetitions of repetitions, or name the modules"
            ) from None
        except (regex.error, RecursionError) as error:
            raise FedSieveError(f"lora.targets: not a regular expression: {words(error)}") from None
    return found


def _by_name(base: nn.Module, names: Sequence[str]) -> set[str] | str:
    """These modules and no others, as PEFT takes them: to PEFT a name is also the end of others."""
    chosen = set(names)
    for name, _ in base.named_modules():
        parts = name.split(".")
        if name not in chosen and not chosen.isdisjoint(
            ".".join(parts[at:]) for at in range(len(parts))
        ):
            return "|".join(map(re.escape, names))
    return chosen


def _of_images(base: nn.Module) -> list[str] | None:
    """The layers of a vision model that get pairs where none are named: query and value, as the
    papers have it, by the names that they go by; ConvNeXt, which has none, gets them on its two.
    """
    if getattr(base, "main_input_name", None) != "pixel_values":
        return None
    last = {name.rpartition(".")[2] for name, m in base.named_modules() if isinstance(m, nn.Linear)}
    return next((list(names) for names in _VISION if last.issuperset(names)), None)


def convolutions(base: nn.Module) -> str:
    """What may be named in a vision model, whose layers may all be none that are linear: the end of
    a sentence; empty of other models.
    """
    if getattr(base, "main_input_name", None) != "pixel_values":
        return ""
    names = {
        name.rpartition(".")[2]
        for name, each in base.named_modules()
        if isinstance(each, nn.Conv2d) and each.groups == 1
    }
    names = {name for name in names if not name.isdigit()}  # a place in a row of layers
    shown = ", ".join(map(repr, sorted(names)[:5]))
    return (
        f"; where it has no linear layer, name its convolutions, such as {shown}" if names else ""
    )


def config_of(base: nn.Module, task: Task, lora: Lora, whole: list[str]) -> LoraConfig:
    """PEFT's configuration; whole: the modules that are trained whole."""
    config = to_peft(lora, task)
    if lora.targets is None:
        own = _of_images(base)
        config.target_modules = None if own is None else set(own)
    if lora.pattern is not None:
        config.target_modules = _named(base, lora.pattern)
    config.modules_to_save = whole or None
    config.fan_in_fan_out = any(isinstance(module, Conv1D) for module in base.modules())
    return config


def check_found(lora: Lora, config: LoraConfig, found: Sequence[str]) -> None:
    """Raises FedSieveError where PEFT found other layers than those that were asked for.

    config: PEFT's, as it became; found: the names of the layers that got pairs
    """
    if config.target_parameters:
        experts = ", ".join(sorted(config.target_parameters))
        raise FedSieveError(
            f"lora.targets takes in the experts of a mixture ({experts}), or {FOR_EXPERTS}"
        )
    for target in lora.targets if isinstance(lora.targets, tuple) else ():
        if any(called(name, target) for name in found):
            continue
        if any(called(module, target) for module in config.modules_to_save or ()):
            raise FedSieveError(
                f"lora.targets names {target!r}, which is trained whole already: leave it out"
            )
        among = "" if lora.layers_to_transform is None else " among lora.layers_to_transform"
        raise FedSieveError(
            f"LoRA cannot be added to the model: lora.targets names {target!r}, and no layer"
            f"{among} is called so"
        )
    for number in lora.layers_to_transform or ():
        if not any(str(number) in name.split(".") for name in found):
            raise FedSieveError(
                f"lora.layers_to_transform names layer {number}, and no target is in a layer of "
                "that number"
            )


def called(name: str, target: str) -> bool:
    """PEFT's rule: a module goes by its whole name, and by the last parts of it."""
    return name == target or name.endswith(f".{target}")
