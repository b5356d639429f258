"""Whether packed weights go with their layers, which is asked before bitsandbytes reads them.

Its code takes scales, block size and shape as they come, and reads as much memory as they ask for:
what does not fit ends the process, or is another base in each.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedsieve.errors import FedSieveError, printable, quoted
from fedsieve.train.quantise import bits_of, layers, scales_of


def refuse_other_types(name: str, config: Any, stored: Mapping[str, str]) -> None:
    """Raises FedSieveError for packed weights that are stored in another type than they are loaded
    in: transformers would convert their numbers, which are none by themselves.

    stored: tensor -> its type, as safetensors calls it; nothing of a model of the hub
    """
    own = getattr(config, "quantization_config", None)
    if not isinstance(own, Mapping):
        return
    packed = str(own.get("bnb_4bit_quant_storage") or "uint8").removeprefix("torch.")
    for held in stored:
        module, _, last = held.rpartition(".")
        expected = {"SCB": "int8", "absmax": packed}.get(last)
        weight = f"{module}.weight" if last == "SCB" else module
        kind = stored.get(weight)
        if expected and kind and _TYPES.get(kind) != expected:
            raise _unfit(name, weight, f"it is stored as {kind}, and packed weights as {expected}")


# What safetensors calls the types that bitsandbytes packs weights in.
_TYPES = {"U8": "uint8", "I8": "int8", "F16": "float16", "BF16": "bfloat16", "F32": "float32"}


def refuse_unfit(model: nn.Module, name: str, form: str | None) -> None:
    """Raises FedSieveError for a quantised weight that does not go with its layer, or with what is
    beside it: bitsandbytes reads as much memory as the layer's shape asks for, whosever that is.

    form: which the model's configuration says
    """
    for module, layer in layers(model):
        shape = (layer.out_features, layer.in_features)
        if bits_of(layer) == 8:
            _refuse_eight(name, module, layer, shape)
        else:
            _refuse_four(name, f"{module}.weight", layer.weight, shape, form)


def _refuse_eight(name: str, module: str, layer: Any, shape: tuple[int, int]) -> None:
    weight, scales = layer.weight, scales_of(layer)
    if weight.dtype != torch.int8 or tuple(weight.shape) != shape:
        raise _unfit(name, f"{module}.weight", f"it is {_said(weight)}, and {shape} int8 is needed")
    _refuse_other(name, f"{module}.SCB", scales, shape[0], torch.float32)


def _refuse_four(name: str, at: str, weight: Any, shape: tuple[int, int], form: str | None) -> None:
    state, numbers = getattr(weight, "quant_state", None), math.prod(shape)
    if state is None:
        raise _unfit(name, at, "nothing beside it says what its bits stand for")
    if state.shape is None or tuple(state.shape) != shape:
        raise _unfit(
            name, at, f"it says the shape {quoted(state.shape)}, and its layer has {shape}"
        )
    if weight.nbytes != math.ceil(numbers / 2):
        raise _unfit(name, at, f"{numbers} weights of 4 bits are not {weight.nbytes} bytes")
    if state.quant_type != form:
        raise _unfit(
            name, at, f"it is in {quoted(state.quant_type)}, and config.json says {form!r}"
        )
    if state.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise _unfit(name, at, f"it says the type {quoted(state.dtype)}, which no weights have")
    blocks = _blocks(name, at, state, numbers)
    _refuse_other(name, f"{at}.quant_map", state.code, 16, torch.float32)
    if not torch.allclose(state.code.cpu(), _values_of(state.quant_type), atol=1e-3):
        raise _unfit(name, f"{at}.quant_map", f"its values are not those of {form}")
    scales = torch.uint8 if state.nested else torch.float32
    _refuse_other(name, f"{at}.absmax", state.absmax, blocks, scales)
    if not state.nested:
        return
    blocks = _blocks(name, f"{at}.absmax", state.state2, blocks)
    _refuse_other(name, f"{at}.nested_absmax", state.state2.absmax, blocks, torch.float32)
    _refuse_other(name, f"{at}.nested_quant_map", state.state2.code, 256, torch.float32)
    if state.state2.dtype != torch.float32:
        raise _unfit(
            name, f"{at}.absmax", f"it says the type {quoted(state.state2.dtype)}, and is float32"
        )


_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # numbers that bitsandbytes gives one scale


def _blocks(name: str, at: str, state: Any, numbers: int) -> int:
    """How many scales a state has for so many numbers. Raises FedSieveError for no such state."""
    if type(state.blocksize) is not int or state.blocksize not in _BLOCKS:
        raise _unfit(
            name, at, f"it says the blocksize {quoted(state.blocksize)}: it is one of {_BLOCKS}"
        )
    return math.ceil(numbers / state.blocksize)


def _refuse_other(name: str, at: str, held: Any, length: int, dtype: torch.dtype) -> None:
    """Raises FedSieveError for anything but so many numbers of this type."""
    if not isinstance(held, Tensor) or held.dtype != dtype or tuple(held.shape) != (length,):
        needed = f"({length},) {str(dtype).removeprefix('torch.')}"
        raise _unfit(name, at, f"it is {_said(held)}, and {needed} is needed")


def _said(held: Any) -> str:
    if not isinstance(held, Tensor):
        return "not there"
    return f"{tuple(held.shape)} {str(held.dtype).removeprefix('torch.')}"


def _values_of(form: str) -> Tensor:
    import bitsandbytes

    values: Tensor = bitsandbytes.functional.get_4bit_type(form, device="cpu")
    return values


def _unfit(name: str, at: str, why: str) -> FedSieveError:
    return FedSieveError(
        f"model {name!r}: its quantised {printable(at[:200])} is damaged or not of this model "
        f"({why}): fetch or copy it again, or quantise the base anew"
    )
