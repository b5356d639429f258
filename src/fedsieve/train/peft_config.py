"""Settings of LoRA to and from PEFT's `LoraConfig`: nothing of either is lost without a word."""

import math
from dataclasses import fields
from typing import Any

from peft import LoraConfig

from fedsieve.errors import FedSieveError, quoted
from fedsieve.settings import Lora, Task
from fedsieve.tasks import catalogue

_SAME = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "layers_to_transform": "layers_to_transform",
    "layers_pattern": "layers_pattern",
    "modules_to_save": "whole",
    "use_rslora": "rslora",
}
# What says where an adapter came from, and what PEFT or FedSieve find out by themselves.
_NO_SETTINGS = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
    *("revision", "inference_mode", "fan_in_fan_out", "runtime_config"),
}


def from_peft(config: LoraConfig) -> Lora:
    """The settings that a `peft.LoraConfig` has, with its target modules in alphabetical order.

    Raises FedSieveError, naming it, for a setting that has no equivalent here (DoRA, a rank or a
    scale for each module, biases, ...), and for a configuration of another kind than LoRA.
    """
    if not isinstance(config, LoraConfig):
        kind = type(config).__name__
        raise FedSieveError(f"lora: a peft.LoraConfig is needed, not {kind}: only LoRA is trained")
    usual = LoraConfig()
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name not in {*_SAME, *_NO_SETTINGS} and _differs(
            value, getattr(usual, field.name)
        ):
            raise FedSieveError(
                f"lora: PEFT's {field.name} = {quoted(value)} has no equivalent here: leave it out"
            )
    given: dict[str, Any] = {ours: getattr(config, theirs) for theirs, ours in _SAME.items()}
    for name, value in given.items():
        if isinstance(value, set | list):
            given[name] = tuple(sorted(value, key=str) if isinstance(value, set) else value)
    return Lora(**{**given, "whole": given["whole"] or ()})


def _differs(value: Any, usual: Any) -> bool:
    try:
        return bool(value != usual)
    except Exception:  # an array has no such answer, and an object of the user's may have none
        return True


def to_peft(lora: Lora, task: Task | None = None) -> LoraConfig:
    """PEFT's configuration of these settings, for `get_peft_model` of a model of one's own.

    task: says its task_type, as `fedsieve.finetune` has tasks. `from_peft` gives the settings back,
          but for `start`, which a configuration does not have, and `clients`, which is in its alpha
    Raises FedSieveError for what are no settings, and for an unknown task.
    """
    if not isinstance(lora, Lora):
        raise FedSieveError(f"lora: a fedsieve.Lora is needed, not {type(lora).__name__}")
    given = {theirs: getattr(lora, ours) for theirs, ours in _SAME.items()}
    given = {k: list(value) if isinstance(value, tuple) else value for k, value in given.items()}
    given["modules_to_save"] = given["modules_to_save"] or None
    if lora.clients is not None:
        given |= {"lora_alpha": lora.alpha * math.sqrt(lora.clients), "use_rslora": True}
    kind = None if task is None else catalogue.load(catalogue.known(task)).peft
    return LoraConfig(task_type=kind, **given)
