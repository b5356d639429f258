"""Whether a model's configuration asks for what its weights hold.

A configuration is a few lines, and may name any size: transformers makes all of the model before it
looks at the weights. So the sizes are compared first, over tensors without numbers (torch's meta
device). Of the hub's models nothing is known before they are there; folders are looked at.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fedsieve.errors import FedSieveError
from fedsieve.train.source import table_of

_TIMES = 4  # as many numbers: heads are drawn, and tied tensors are stored once
_MORE = 1 << 26  # numbers beyond that: a head of many classes over a small body
_PACKED = 8  # numbers of 4 bits in one of the 32 bits that GPTQ and AWQ store
_LAYERS = 8  # times as many as there are tensors: some architectures use one layer again and again
# The words of keys that count what is made again and again, whatever an architecture calls it, and
# of those that do not though they have one of them: `n_layer`, `depths`, but not `block_size`.
_COUNTS = {"layer", "layers", "depth", "depths", "block", "blocks", "group", "groups", "stages"}
_EXPERTS = {"expert", "experts"}  # many in one tensor, as often as not
_SIZES = {"size", "sizes", "types", "norm", "id", "ids", "freq", "interval", "window", "capacity"}


def refuse_larger(name: str, maker: Any, config: Any) -> None:
    """Raises FedSieveError for a folder whose configuration asks for a model far larger than its
    safetensors, or whose safetensors are damaged.

    maker: the Auto class that would load it
    """
    folder = Path(name)
    shapes = list(_shapes(folder)) if folder.is_dir() else []
    if not shapes:
        return
    _refuse_wider(name, table_of(folder / "adapter_config.json"), shapes)
    held = sum(map(math.prod, shapes))
    for key, number, most in _counted(config.to_dict()):
        if number > most * (len(shapes) + _LAYERS):
            raise _larger(name, f"{number} of {key}", f"{len(shapes)} tensors")
    with torch.device("meta"):
        asked = sum(p.numel() for p in maker.from_config(config).parameters())
    if getattr(config, "quantization_config", None) is not None:
        held *= _PACKED
    if asked > _TIMES * held + _MORE:
        raise _larger(name, f"{asked} numbers", f"{held}")


def _refuse_wider(name: str, told: Mapping[str, Any], shapes: Sequence[Sequence[int]]) -> None:
    """transformers takes an adapter that lies beside the weights, and makes its pairs first."""
    widest = max((size for shape in shapes for size in shape), default=0)
    ranks = told.get("rank_pattern")
    for rank in (told.get("r"), *(ranks.values() if isinstance(ranks, Mapping) else ())):
        if isinstance(rank, int) and rank > widest:
            raise FedSieveError(
                f"model {name!r}: its adapter_config.json has rank {rank:g}, and no tensor beside "
                f"it is wider than {widest}: take both of the adapter's files out"
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


def _shapes(folder: Path) -> Iterator[list[int]]:
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as tensors:
                for each in list(tensors.keys()):
                    yield tensors.get_slice(each).get_shape()
        except (OSError, SafetensorError) as error:
            raise FedSieveError(
                f"model {str(folder)!r}: {path.name} is damaged or cut off ({error}): fetch or "
                "copy it again"
            ) from error


def _larger(name: str, asked: str, held: str) -> FedSieveError:
    return FedSieveError(
        f"model {name!r}: its configuration asks for {asked}, and its weights hold {held}: "
        "config.json is not that of these weights"
    )
