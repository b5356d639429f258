"""A frozen base in a file that several processes map into memory, so that it is there once.

transformers maps a checkpoint's own file where the numbers stay what they are; a base in another
type than its checkpoint's (a bfloat16 checkpoint in float32) would be a copy in every process.
"""

from pathlib import Path

import safetensors
import safetensors.torch
from torch import nn

from fedsieve.train.model import ResidentModel


def store(resident: ResidentModel, path: Path) -> None:
    """Write the parameters that are not trained, but for those that are held packed (quantised)."""
    safetensors.torch.save_file(
        {n: p.data.contiguous() for n, p in _frozen(resident).items()}, path
    )


def use(resident: ResidentModel, path: Path) -> None:
    """Let the same base's parameters lie in the file; a change of one is this process's own.

    Raises ValueError if the file is of another base.
    """
    own = _frozen(resident)
    with safetensors.safe_open(path, framework="pt") as file:
        if {*file.keys()} != own.keys():
            raise ValueError("the file holds other parameters")
        for name, parameter in own.items():
            there = file.get_tensor(name)
            if there.shape != parameter.shape or there.dtype != parameter.dtype:
                raise ValueError(f"{name} has another shape or type in the file")
            parameter.data = there


def _frozen(resident: ResidentModel) -> dict[str, nn.Parameter]:
    # What is drawn beside the base is small, and each process's own: where a tensor lies can change
    # the last bit of a small product.
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
