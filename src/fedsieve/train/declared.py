"""Whether a model's configuration asks for what its weights hold.

A configuration is a few lines, and may name any size: transformers makes all of the model before it
looks at the weights. So the sizes are compared first, over tensors without numbers (torch's meta
device). Of the hub's models nothing is known before they are there; folders are looked at.
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from fedsieve.disk import tensors_read
from fedsieve.errors import FedSieveError, printable

_TIMES = 4  # as many numbers: heads are drawn, and tied tensors are stored once
_MORE = 1 << 26  # numbers beyond that: a head of many classes over a small body
_FLOAT = 4  # bytes of a number
_PACKED = 8  # numbers of 4 bits in one of the 32 bits that GPTQ and AWQ store
_LAYERS = 8  # times as many as there are tensors: some architectures use one layer again and again
# The words of keys that count what is made again and again, whatever an architecture calls it, and
# of those that do not though they have one of them: `n_layer`, `depths`, but not `block_size`.
_COUNTS = {"layer", "layers", "depth", "depths", "block", "blocks", "group", "groups", "stages"}
_EXPERTS = {"expert", "experts"}  # many in one tensor, as often as not
_SIZES = {
    *("size", "sizes", "types", "norm", "id", "ids", "freq", "interval", "window", "capacity"),
    "multiple",
}


def refuse_larger(name: str, maker: Any, config: Any) -> None:
    """Raises FedSieveError for a folder whose configuration asks for a model far larger than its
    safetensors, or whose safetensors are damaged.

    maker: the Auto class that would load it
    """
    folder = Path(name)
    tensors = list(_tensors(folder)) if folder.is_dir() else []
    shapes = [shape for _, shape, _ in tensors]
    if not shapes:
        return
    held = sum(map(math.prod, shapes))
    for key, number, most in _counted(config.to_dict()):
        if number > most * (len(shapes) + _LAYERS):
            raise _larger(name, f"{number} of {key}", f"{len(shapes)} tensors")
    with torch.device("meta"):
        made = maker.from_config(config)
    parameters = dict(made.named_parameters())
    # Buffers are made too: a mask over all pairs of positions has no weights to be compared with.
    asked = sum(p.numel() for p in parameters.values())
    asked += sum(b.numel() * b.element_size() for b in made.buffers()) // _FLOAT
    if getattr(config, "quantization_config", None) is not None:
        held *= _PACKED
    else:
        _refuse_no_floats(name, parameters, {n: kind for n, _, kind in tensors})
    if asked > _TIMES * held + _MORE:
        raise _larger(name, f"{asked} numbers", f"{held}")


# What safetensors calls floating-point types: F32, F16, BF16, F8_E4M3.
_FLOATS = re.compile(r"B?F\d")


def _refuse_no_floats(name: str, parameters: Collection[str], stored: Mapping[str, str]) -> None:
    """Raises FedSieveError where a weight is stored in whole numbers, of which nothing says what
    they stand for: loaded as they are, they would be taken for the weights themselves. Or in
    complex ones, of which torch would take the real part.

    stored: tensor -> its type, as safetensors calls it; of indices and masks it may be any
    """
    for held, kind in stored.items():
        if _FLOATS.match(kind):
            continue
        if any(f".{p}".endswith(f".{held}") or f".{held}".endswith(f".{p}") for p in parameters):
            raise FedSieveError(
                f"model {name!r}: the weights of {held} are stored as {kind}, which are no "
                "floating-point numbers, and its configuration has no quantization_config that "
                "says what they stand for: take a model that has, or weights in floating point"
            )


def _counted(config: Mapping[str, Any]) -> Iterator[tuple[str, int, int]]:
    """The keys that count parts of a model, how many, and how many a tensor may stand for."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _counted(value)
        words = set(re.split(r"[_0-9]+", str(key)))
        most = _LAYERS if words & _COUNTS else _LAYERS**2 if words & _EXPERTS else 0
        if most and not words & _SIZES:
            numbers = value if isinstance(value, list | tuple) else [value]
            yield str(key), sum(n for n in numbers if isinstance(n, int)), most


def names_held(name: str) -> set[str]:
    """The names of a folder's tensors; none of a model of the hub, or without safetensors."""
    return {*types_held(name)}


def types_held(name: str) -> dict[str, str]:
    """The types of a folder's tensors, as safetensors calls them (BF16, I8), by name."""
    folder = Path(name)
    return {held: kind for held, _, kind in _tensors(folder)} if folder.is_dir() else {}


def _tensors(folder: Path) -> Iterator[tuple[str, list[int], str]]:
    """Names, shapes and types (BF16, I8) of all in a folder's safetensors."""
    for path in sorted(folder.glob("*.safetensors")):
        if path.is_dir():
            raise FedSieveError(
                f"model {str(folder)!r}: {printable(path.name)} is a folder, and is called like a "
                "file of weights: give it another name, or move it away"
            )
        try:
            with tensors_read(), safe_open(path, "pt") as tensors:
                for each in list(tensors.keys()):
                    part = tensors.get_slice(each)
                    yield each, part.get_shape(), part.get_dtype()
        except (OSError, ValueError) as error:
            raise FedSieveError(
                f"model {str(folder)!r}: {path.name} is damaged or cut off ({error}): fetch or "
                "copy it again"
            ) from error


def _larger(name: str, asked: str, held: str) -> FedSieveError:
    return FedSieveError(
        f"model {name!r}: its configuration asks for {asked}, and its weights hold {held}: "
        "config.json is not that of these weights"
    )
