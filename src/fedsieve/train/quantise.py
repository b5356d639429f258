"""Bases whose frozen weights are held in 4 or 8 bits: made so when they are loaded, or found so.

The linear layers of the body are quantised by bitsandbytes, one after another, while they are read,
so the whole base is never there in another form. Embeddings, norms, the output embedding, a head,
what is trained whole and what the checkpoint lacks stay in the model's own type: what is trained
must be able to take a step. That is also why nothing may be added to a quantised weight: a sum
would have to be rounded to 16 or 256 values again, and the small changes of a round vanish in that.

    nf4   16 values, one scale for 64 weights (Dettmers et al. 2023, arXiv 2305.14314); weights are
          multiplied in the base's own type, and double quantisation rounds the scales too
    int8  256 values, one scale a row (Dettmers et al. 2022, arXiv 2208.07339)
"""

import importlib.util
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedsieve.data import hub
from fedsieve.errors import FedSieveError
from fedsieve.settings import Quantization
from fedsieve.train import without_bitsandbytes
from fedsieve.train.source import in_a_file

EXTRA = "pip install 'fedsieve[quant]'"
_FLOAT = 4  # bytes
# Others' forms that transformers loads for training, and the packages that it takes for each. Forms
# that are not named here would run programs from the hub, or cannot train LoRA.
_PACKAGES = {"gptq": ("optimum", "gptqmodel"), "awq": ("gptqmodel",)}


def ready() -> bool:
    """Whether bitsandbytes can be used here. Imports it, without the program from the hub that it
    runs where `kernels` is installed, and without its line for each product of an 8-bit layer.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if "bitsandbytes" in sys.modules:
        return sys.modules["bitsandbytes"] is not None
    if importlib.util.find_spec("bitsandbytes") is None:
        return False
    others = {n: m for n, m in sys.modules.items() if n.split(".")[0] == "kernels"}
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        importlib.import_module("bitsandbytes")
    except (ImportError, OSError):
        return False
    finally:
        del sys.modules["kernels"]
        sys.modules.update(others)
    return True


def sparing(base: nn.Module) -> AbstractContextManager[None]:
    """Around what PEFT does with a base: only a quantised one has it import bitsandbytes."""
    return nullcontext() if is_quantised(base) else without_bitsandbytes()


def form_in(name: str) -> str | None:
    """The form in which a base comes: "nf4", "fp4", "int8", another name; None where it is not
    quantised.
    """
    return form(_told(name))


def _told(name: str) -> Any:
    """What a base's configuration says of its quantisation; None for nothing."""
    try:
        with hub.asked(name):
            config, _ = PreTrainedConfig.get_config_dict(name)
        return config.get("quantization_config")
    except Exception:  # who loads the model says what is wrong
        return None


def form(told: Any) -> str | None:
    """The form that a configuration of quantisation tells; None for none."""
    if told is None:
        return None
    if not isinstance(told, Mapping):
        return "unknown"
    if told.get("load_in_4bit"):
        return str(told.get("bnb_4bit_quant_type", "fp4"))[:40]
    return "int8" if told.get("load_in_8bit") else str(told.get("quant_method"))[:40]


def form_of(
    name: str, settings: Mapping[str, Any], quantization: Quantization, double: bool
) -> str | None:
    """The form in which a base is to be held; None where it is not quantised.

    Raises FedSieveError for a base that cannot be had in the form that is asked, and where the
    package that it takes is missing.
    """
    for key in ("quantization_config", "load_in_4bit", "load_in_8bit"):
        if key in settings:
            raise FedSieveError(f"model.settings.{key}: say it by model.quantization")
    if double and quantization != "nf4":
        raise FedSieveError(
            "model.double_quantization: it rounds the scales of nf4, and model.quantization is "
            f"{quantization!r}"
        )
    told = _told(name)
    own = form(told)
    if own is None:
        if quantization == "none":
            return None
        _refuse_without(quantization)
        return quantization
    if own not in ("nf4", "fp4", "int8"):
        _refuse_others(name, own)
    if quantization not in ("none", own):
        raise FedSieveError(
            f"model {name!r} is quantised already, in {own}: leave model.quantization = "
            f"{quantization!r} out, or give the base that is not quantised"
        )
    if double and not told.get("bnb_4bit_use_double_quant"):
        raise FedSieveError(
            f"model {name!r} is quantised already, and its scales are not: leave "
            "model.double_quantization out"
        )
    if own not in _PACKAGES:
        _refuse_without(own)
    return own


def _refuse_without(form: str) -> None:
    if not ready():
        raise FedSieveError(
            f"a base in {form} needs the package bitsandbytes, which is not installed here: {EXTRA}"
        )


def _refuse_others(name: str, form: str) -> None:
    needed = _PACKAGES.get(form)
    if needed is None:
        raise FedSieveError(
            f"model {name!r} is quantised by {form!r}, and no LoRA is trained over that here: give "
            "a base that is not quantised, with model.quantization, or one of bitsandbytes, GPTQ "
            "or AWQ"
        )
    missing = [each for each in needed if importlib.util.find_spec(each) is None]
    if missing:
        raise FedSieveError(
            f"model {name!r} is quantised by {form!r}, which needs the package {missing[0]}, and "
            f"that is not installed here: pip install {missing[0]}"
        )


def kept_whole(shape: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """The modules that are not quantised: those that transformers leaves out, and those with a
    parameter of these names.

    shape: of the base, before it is quantised
    """
    from transformers.quantizers.base import get_keys_to_not_convert

    return sorted({*get_keys_to_not_convert(shape), *(n.rpartition(".")[0] for n in names)})


def loading(form: str, double: bool, dtype: torch.dtype, kept: Sequence[str]) -> dict[str, Any]:
    """What `from_pretrained` is given for a base in a form. Its layers are quantised on the CPU,
    whatever the device, so that a base is the same one everywhere.
    """
    if form == "int8":
        asked = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=[*kept])
    else:
        asked = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=form,
            bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=[*kept],
        )
    return {"quantization_config": asked, "device_map": {"": "cpu"}}


def leaving(
    form: str, own: Mapping[str, Any], kept: Sequence[str], beside: Iterable[str]
) -> dict[str, Any]:
    """How a base that comes quantised says so, with the modules that it does not hold quantised.

    kept: modules that are not to be; beside: what the checkpoint holds beside weights, such as
    scales: a module that has some is quantised, whatever is wished
    """
    if form in _PACKAGES:
        return dict(own)
    scaled = {name.rpartition(".weight.")[0] or name.removesuffix(".SCB") for name in beside}
    known = own.get("llm_int8_skip_modules") or ()
    if not isinstance(known, list | tuple) or not all(isinstance(name, str) for name in known):
        raise FedSieveError(
            "the base's quantization_config has llm_int8_skip_modules that are no list of names"
        )
    left = {*known, *(module for module in kept if module not in scaled)}
    return {**own, "llm_int8_skip_modules": sorted(left)}


def settle(model: nn.Module, dtype: torch.dtype) -> None:
    """After loading: 4-bit weights are multiplied in this type, and stay as they are.

    On some processors bitsandbytes would pack them anew before the first evaluation, with scales in
    bfloat16: another base from then on.
    """
    for _, layer in layers(model):
        if bits_of(layer) == 4:
            layer.compute_dtype, layer.compute_type_is_set = dtype, True
            layer.support_avx512bf16_for_cpu = False


def layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """bitsandbytes' layers, by name."""
    for name, module in model.named_modules():
        if bits_of(module):
            yield name, module


def is_quantised(model: nn.Module) -> bool:
    """Whether any weight of a model is held in another form, by bitsandbytes or by others."""
    return getattr(model, "hf_quantizer", None) is not None or any(True for _ in layers(model))


@contextmanager
def row_by_row(model: nn.Module) -> Iterator[None]:
    """While looking at what a model makes of single tokens: 8-bit layers round each by itself.

    They leave the features as they are in which any token of a batch is large, so that one token
    decides how the others are rounded.
    """
    eight = [layer for _, layer in layers(model) if bits_of(layer) == 8]
    before = [layer.state.threshold for layer in eight]
    for layer in eight:
        layer.state.threshold = 0.0
    try:
        yield
    finally:
        for layer, own in zip(eight, before, strict=True):
            layer.state.threshold = own


def bits_of(module: nn.Module) -> int:
    # By name: nothing here imports bitsandbytes where no base is quantised.
    kind = type(module)
    if not kind.__module__.startswith("bitsandbytes."):
        return 0
    return {"Linear4bit": 4, "Linear8bitLt": 8}.get(kind.__name__, 0)


def hidden(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What belongs to quantised weights and is neither a parameter nor a buffer: scales, by name,
    and the values that 4 bits stand for.
    """
    for name, layer in layers(model):
        if bits_of(layer) == 8:
            yield f"{name}.SCB", scales_of(layer)
            continue
        for key, value in sorted(layer.weight.quant_state.as_dict(packed=True).items()):
            yield f"{name}.weight.{key}", value


def held_bytes(model: nn.Module) -> int:
    """Of all parameters and buffers, and of what quantised weights have beside them."""
    plain = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return sum(t.nbytes for t in [*plain.values(), *(t for _, t in hidden(model))])


def shared(model: nn.Module) -> dict[int, Any]:
    """What a copy of the model's modules is to share with it, beside parameters, as a memo of
    `copy.deepcopy`.
    """
    found: dict[int, Any] = {}
    for _, layer in layers(model):
        own = layer.state if bits_of(layer) == 8 else layer.weight.quant_state
        found[id(own)] = own
    return found


def move(model: nn.Module, device: torch.device) -> None:
    """To a device, with the scales of 8-bit layers, which torch knows nothing of. In place."""
    eight = [layer for _, layer in layers(model) if bits_of(layer) == 8]
    scales = [scales_of(layer) for layer in eight]
    model.to(device)
    for layer, own in zip(eight, scales, strict=True):
        layer.state.CB, layer.state.SCB = layer.weight.data, own.to(device)
        layer.weight.CB = layer.weight.SCB = None


def own_memory(model: nn.Module) -> None:
    """Take what layers hold beside their weights, of a base that came quantised, out of the file
    that it was read from (see source.py).
    """
    for _, layer in layers(model):
        state = layer.state if bits_of(layer) == 8 else getattr(layer.weight, "quant_state", None)
        for part in (layer.weight, state, getattr(state, "state2", None)):
            for name, held in vars(part).items() if part is not None else ():
                if isinstance(held, Tensor) and in_a_file(held):
                    setattr(part, name, held.clone())


def scales_of(layer: Any) -> Tensor:
    """(rows,) of an 8-bit layer, which has them in another place after its first pass."""
    scales: Tensor = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
    return scales


def refuse_trained(base: nn.Module, names: Iterable[str]) -> None:
    """Raises FedSieveError for a parameter that is to be trained and came quantised."""
    for name in names:
        if not base.get_parameter(name).is_floating_point():
            raise FedSieveError(
                f"{name} is to be trained whole, and the base holds it quantised: give a base that "
                "is not quantised already (model.quantization leaves such weights as they are)"
            )


def refuse_merge(model: nn.Module) -> None:
    """Raises FedSieveError for a base whose weights cannot be had back."""
    method = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    if method is not None and not any(True for _ in layers(model)):
        raise FedSieveError(
            "a pair cannot be merged into the weights of this quantised base: export the adapter, "
            "without --merge"
        )


def dequantise(model: Any, adapter: str) -> None:
    """Put float weights in the place of quantised ones: those that they stand for, so that the
    model computes what it did. In place, before pairs are merged.

    adapter: PEFT's name of the pairs; those of quantised layers are merged here
    """
    from peft.tuners.lora import LoraLayer

    refuse_merge(model)
    done: set[str] = set()
    for name, module in [*model.named_modules()]:
        pair = isinstance(module, LoraLayer)
        layer = module.get_base_layer() if pair else module
        if not bits_of(layer) or any(name.startswith(f"{each}.") for each in done):
            continue
        weight = _values(layer)
        if pair:
            weight = weight.float() + module.get_delta_weight(adapter).detach()
            done.add(name)
        model.set_submodule(name, _plain(layer, weight))
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(base, "hf_quantizer", None) is not None:
        base.hf_quantizer.remove_quantization_config(base)
    # The last is how packed weights were read, which saving would do the other way round.
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit", "_weight_conversions"):
        base.__dict__.pop(flag, None)


def _values(layer: Any) -> Tensor:
    """(out, in): the numbers that a quantised weight stands for."""
    import bitsandbytes

    if bits_of(layer) == 8:
        values: Tensor = bitsandbytes.functional.int8_vectorwise_dequant(
            layer.weight.data, scales_of(layer)
        )
    else:
        values = bitsandbytes.functional.dequantize_4bit(
            layer.weight.data, layer.weight.quant_state
        )
    return values


def _plain(layer: Any, weight: Tensor) -> nn.Module:
    """The layer that a quantised one was made from, with these numbers, in the model's type."""
    kind = layer.compute_dtype if bits_of(layer) == 4 else None
    dtype = kind or (torch.float32 if layer.bias is None else layer.bias.dtype)
    turned = issubclass(getattr(layer, "source_cls", nn.Linear), Conv1D)
    with torch.device("meta"):
        plain: Any = (
            Conv1D(layer.out_features, layer.in_features)
            if turned
            else nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        )
    value = (weight.T if turned else weight).to(dtype).contiguous()
    plain.weight = nn.Parameter(value, requires_grad=False)
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.data.to(dtype), requires_grad=False)
    made: nn.Module = plain
    return made


def beside(model: nn.Module, quantization: Quantization, rows: int, length: int) -> int:
    """Bytes that a step takes for quantised weights beside the base itself and activations.

    model: not quantised, and of shapes alone: the largest weight is there once more as floats while
    it is multiplied, and 8-bit layers keep what they are given until the backward pass.
    """
    if quantization == "none":
        return 0
    linear = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D)]
    largest = max((m.weight.numel() for m in linear), default=0)
    kept = sum(m.in_features if isinstance(m, nn.Linear) else m.nx for m in linear)
    return _FLOAT * (largest + (rows * length * kept if quantization == "int8" else 0))
