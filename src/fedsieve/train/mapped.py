"""A frozen base in a file that several processes map into memory, so that it is there once.

transformers maps a checkpoint's own file where the numbers stay what they are; a base in another
type than its checkpoint's (a bfloat16 checkpoint in float32) would be a copy in every process.

Where a tensor lies can change the last bit of a product: on some processors the order of a sum
begins at the next whole line of the cache. So each parameter lies as far from one in the file as it
does in the process that wrote it. The file is a length (8 bytes, little-endian), a header of that
length in JSON (name -> type, shape, first byte), and the parameters.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedsieve.train.model import ResidentModel

LINE = 64  # bytes: of a cache, and what torch's own tensors begin at a multiple of


def store(resident: ResidentModel, path: Path) -> None:
    """Write the parameters that are not trained, but for those that are held packed (quantised)."""
    own = {n: p.data.contiguous() for n, p in _frozen(resident).items()}
    header, end = {}, 0
    for name, tensor in own.items():
        begin = end + (tensor.data_ptr() - end) % LINE
        header[name] = [*_form(tensor), begin]
        end = begin + tensor.nbytes
    told = json.dumps(header).encode()
    first = _first(len(told))
    with path.open("wb") as file:
        file.write(len(told).to_bytes(8, "little") + told)
        for name, tensor in own.items():
            file.seek(first + header[name][-1])
            file.write(tensor.flatten().view(torch.uint8).numpy().data)


def use(resident: ResidentModel, path: Path) -> None:
    """Let the same base's parameters lie in the file; a change of one is this process's own.

    Raises ValueError if the file is of another base.
    """
    own = _frozen(resident)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: Mapping[str, Any] = json.loads(file.read(length))
        size = file.seek(0, 2)
    if header.keys() != own.keys():
        raise ValueError("the file holds other parameters")
    first = _first(length)
    mapped: Any = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=size)
    for name, parameter in own.items():
        *form, begin = header[name]
        if form != _form(parameter.data):
            raise ValueError(f"{name} has another shape or type in the file")
        place = (first + begin) // parameter.element_size()
        there = torch.empty(0, dtype=parameter.dtype).set_(
            mapped, place, (parameter.numel(),), (1,)
        )
        parameter.data = there.view(parameter.shape)


def _first(header: int) -> int:
    """Where the parameters begin, behind a header of so many bytes: at a line."""
    return -(-(8 + header) // LINE) * LINE


def _form(tensor: Tensor) -> list[Any]:
    return [str(tensor.dtype), list(tensor.shape)]


def _frozen(resident: ResidentModel) -> dict[str, nn.Parameter]:
    # What is drawn beside the base is small, and each process's own.
    own = resident if resident.pairs is None else resident.pairs
    drawn = {id(p) for each in (resident, own) for _, p in each.parameters()}
    return {
        name: parameter
        for name, parameter in resident.model.named_parameters()
        if id(parameter) not in drawn
        and type(parameter) is nn.Parameter
        and parameter.is_floating_point()
        and parameter.device.type == "cpu"
    }
