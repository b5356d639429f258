"""Beginning from an adapter that is there already, in the place of a random A and a B of zeros.

The folder is one that PEFT wrote, FedSieve or anybody: what `lora.start` names. Its product s B A
is what the run begins with: at another scale B is multiplied, and at a larger rank the ranks beyond
its own are as fresh as ever, with a product of zero. Its tensors are the run's start, so they enter
the digest by which checkpoints and workers know that they are of one run.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from fedsieve.algebra.adapter import Adapter, Tree
from fedsieve.algebra.method import Method
from fedsieve.disk import bytes_of, place, refuse_links_out, tensors_read
from fedsieve.errors import FedSieveError, nearest, printable, quoted, words
from fedsieve.settings import is_number
from fedsieve.train.digest import tensors_digest
from fedsieve.train.model import LABELS, ResidentModel

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_LARGEST = 1 << 23  # bytes of either file of JSON
_HEADER = 1 << 23  # and of what stands before the weights
_MOST_RANK, _MOST_ALPHA = 1 << 20, 1e9
# Ways to begin that change the base too: such an adapter is nothing without what they left of it.
_OTHER_BASES = ("pissa", "olora", "loftq", "corda", "lora_ga")
# PEFT's settings by which s B A, or the layer that it is added to, is another one.
_MORE_THAN_PAIRS = (
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "layer_replication"),
    *("alora_invocation_tokens", "kasa_config", "monteclora_config", "arrow_config"),
)


def begun(resident: ResidentModel, folder: str, method: Method) -> ResidentModel:
    """The resident with a folder's adapter in it, and a digest that knows.

    Raises FedSieveError, naming tensor and shapes, for an adapter that does not fit; for a folder
    that holds none; and for a method that would not begin with it.
    """
    where = f"lora.start: the adapter in {folder}"
    if method.trains != "lora":
        raise FedSieveError(
            "lora.start: this method trains no adapter to begin from: leave it out, or merge the "
            "adapter into the base"
        )
    numbers = sum(math.prod(shape) for shape in resident.layout.shapes.values())
    config, given = _read(folder, where, 8 * numbers + _HEADER)
    _refuse_other_classes(resident, place(folder) / LABELS, where)
    adapter = _fitted(resident, config, given, where)
    tree = method.init(adapter).trees["adapter"]
    if any(not torch.equal(tree[name], tensor) for name, tensor in adapter.tensors.items()):
        raise FedSieveError(
            "lora.start: this method begins with an adapter of its own (FLoRA's clients draw "
            "theirs), and would lose this one: merge it into the base, or choose another method"
        )
    resident.put(adapter)
    if resident.digest is None:
        return resident
    return replace(resident, digest=resident.digest._replace(start=tensors_digest(adapter.tensors)))


def _read(folder: str, where: str, most: int) -> tuple[Mapping[str, Any], Tree]:
    """What a folder says of its adapter, and the tensors. most: bytes that these may have"""
    at = place(folder)
    if not at.is_dir():
        raise FedSieveError(f"lora.start: there is no folder {folder}")
    refuse_links_out(at, where)
    for name in (_CONFIG, _WEIGHTS):
        if not (at / name).is_file():
            raise FedSieveError(
                f"lora.start: {folder} holds no adapter: there is no file {name} in it (give the "
                "folder that PEFT's save_pretrained, Run.save or `fedsieve export` wrote)"
            )
    try:
        config = json.loads(bytes_of(at / _CONFIG, _LARGEST))
        with tensors_read():
            tensors = safetensors.torch.load(bytes_of(at / _WEIGHTS, most))
    except (OSError, ValueError, KeyError, RecursionError) as error:
        said = words(error, 200)
        raise FedSieveError(f"{where} cannot be read: {said}") from error
    if not isinstance(config, dict):
        raise FedSieveError(f"{where} cannot be read: {_CONFIG} holds no table")
    if odd := [name for name, tensor in tensors.items() if not tensor.is_floating_point()]:
        raise FedSieveError(f"{where}: {printable(odd[0][:200])} holds no floating-point numbers")
    return config, {name: tensor.float() for name, tensor in tensors.items()}


def _fitted(resident: ResidentModel, config: Mapping[str, Any], given: Tree, where: str) -> Adapter:
    """The tensors at the run's rank and scale."""
    layout, fresh = resident.layout, resident.adapter().tensors
    rank, scale = _rank_and_scale(config, where)
    times = scale / layout.scale
    tensors: Tree = {}
    for name in layout.names:
        if name not in given:
            raise FedSieveError(
                f"{where} has no {name}, which this run trains{nearest(name, given)}: choose the "
                "lora.targets and lora.whole that it was trained with"
            )
        if not given[name].isfinite().all():
            raise FedSieveError(f"{where}: {name} holds numbers that are not finite")
        _, axis = layout.rank_axis.get(name, (0, None))
        shape, own = tuple(given[name].shape), tuple(layout.shapes[name])
        if axis is not None and len(shape) == len(own) and shape[axis] != rank:
            raise FedSieveError(
                f"{where}: {name} has rank {shape[axis]}, and {_CONFIG} says r = {rank}"
            )
        if axis is not None and len(shape) == len(own) and shape[axis] > own[axis]:
            raise FedSieveError(
                f"{where} has rank {shape[axis]} ({name}), and lora.rank is {own[axis]}: raise it"
            )
        fits = [n for n, (a, b) in enumerate(zip(shape, own, strict=False)) if a != b]
        if len(shape) != len(own) or fits not in ([], [axis]):
            raise FedSieveError(
                f"{where}: {name} has the shape {shape}, and this run's has {own}: it is of "
                "another model, or of other classes"
            )
        value = given[name] * times if axis == 1 and times != 1 else given[name]
        if not value.isfinite().all():
            raise FedSieveError(
                f"{where}: {name} holds numbers that are beyond float32 at this run's lora.alpha"
            )
        tensors[name] = value if axis is None else _filled(fresh[name], value, axis)
    # PEFT names every head that a model of its kind may have (classifier, score), not its own one.
    whole = _whole(config)
    if whole and not any(f".{module}." in f".{name}." for module in whole for name in given):
        raise FedSieveError(
            f"{where} holds nothing of {printable(', '.join(whole)[:200])}, which {_CONFIG} says "
            "was trained whole (modules_to_save): its file of weights is not all of it"
        )
    if surplus := sorted(set(given) - set(layout.names)):
        raise FedSieveError(
            f"{where} holds {printable(surplus[0][:200])}, which this run does not train: choose "
            "the lora.targets and lora.whole that it was trained with"
        )
    return Adapter(layout, tensors)


def _whole(config: Mapping[str, Any]) -> list[str]:
    named = config.get("modules_to_save")
    return [str(each) for each in named] if isinstance(named, list) else []


def _filled(fresh: Tensor, value: Tensor, axis: int) -> Tensor:
    """The first ranks are those that are given."""
    whole = fresh.clone()
    whole.narrow(axis, 0, value.shape[axis]).copy_(value)
    return whole


def _rank_and_scale(config: Mapping[str, Any], where: str) -> tuple[int, float]:
    """r, and s of its s B A. Raises FedSieveError where they are not one of each, or not all that
    there is.
    """
    if config.get("peft_type") != "LORA":
        kind = quoted(config.get("peft_type"))
        raise FedSieveError(f"{where} is of type {kind}, and LORA is needed")
    for key in ("rank_pattern", "alpha_pattern"):
        if config.get(key):
            raise FedSieveError(f"{where} has a {key}, and one rank and scale is needed everywhere")
    began = str(config.get("init_lora_weights")).lower()
    more = [key for key in _MORE_THAN_PAIRS if config.get(key)]
    if began.startswith(_OTHER_BASES):
        more.append(f"init_lora_weights {quoted(began)}")
    if more:
        raise FedSieveError(f"{where} was trained with {more[0]}, so it is more than its pairs")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or not 0 < rank < _MOST_RANK:
        raise FedSieveError(f"{where}: {_CONFIG} says no r that is a number of ranks")
    if alpha is None or not is_number(alpha) or not abs(alpha) <= _MOST_ALPHA:
        raise FedSieveError(f"{where}: {_CONFIG} says no lora_alpha that is a usable number")
    root = config.get("use_rslora", False)
    if root not in (None, False, True):
        raise FedSieveError(f"{where}: {_CONFIG} says use_rslora {quoted(root)}: true or false")
    return rank, float(alpha) / (rank**0.5 if root else rank)


def _refuse_other_classes(resident: ResidentModel, path: Path, where: str) -> None:
    """Raises FedSieveError where the rows of its head are known to be of other classes."""
    try:
        named = json.loads(bytes_of(path, _LARGEST))["id2label"]
        theirs = tuple(str(named[key]) for key in sorted(named, key=int))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return  # only what FedSieve wrote says it
    if resident.classes and theirs != resident.classes:
        raise FedSieveError(
            f"{where} tells the classes {printable(', '.join(theirs)[:80])}, in this order, and "
            f"this run {', '.join(resident.classes)[:80]}: give `classes` as the adapter has them"
        )
