"""Adapters of several clients in the one resident model, side by side.

The rows of a batch lie client by client. Frozen layers see one large batch; where a layer is
trained, each client's rows meet the client's own weights in one batched product:

    x: (c b, ..., n)  ->  (c, b ..., n) @ W: (c, m, n)^T  ->  (c b, ..., m)

Clients of different ranks are filled up with zeros to the largest. These take no gradient, since A
meets a column of zeros of B and B a row of zeros of A, and what is zero does not decay: they stay
zero to the bit, whatever the optimizer.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fedsieve.algebra.adapter import Adapter, Tree
from fedsieve.train.model import ResidentModel


class StackedLinear(nn.Module):
    """A linear layer with weights (c, m, n) of c clients, whose rows lie one client after another.

    bias: (c, m) or None; scale: (c), by which the result is multiplied, or None
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias, self.scale = weight, bias, scale

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(len(self.weight), -1, x.shape[-1])
        if self.scale is not None:
            rows = rows * self.scale.to(rows.dtype)[:, None, None]  # narrower than the result
        out = torch.bmm(rows, self.weight.mT)
        if self.bias is not None:
            out = out + self.bias[:, None]
        return out.view(*x.shape[:-1], out.shape[-1])


def obstacle(resident: ResidentModel) -> str | None:
    """What of the model cannot be trained for several clients at once; None where all can."""
    if resident.ties:
        return f"{min(resident.ties)} is one weight with another"
    for name, (module, _) in resident.slots.items():
        if type(module) is not nn.Linear:
            return f"{name} belongs to a layer of kind {type(module).__name__}, and not Linear"
    return None


def stack_of(adapters: Sequence[Adapter], device: torch.device) -> Tree:
    """The adapters' tensors side by side, filled up to the largest rank."""
    first = max((adapter.layout for adapter in adapters), key=lambda layout: layout.rank)
    made = {}
    for name in first.names:
        whole = torch.zeros(len(adapters), *first.shapes[name], device=device)
        for own, adapter in zip(whole, adapters, strict=True):
            part = adapter.tensors[name]
            own[tuple(slice(n) for n in part.shape)] = part.to(device, torch.float32)
        made[name] = whole
    return made


def unstacked(stack: Mapping[str, Tensor], number: int, adapter: Adapter) -> Tree:
    """A client's own tensors of a stack, of its own rank: views."""
    shapes = adapter.layout.shapes
    return {n: t[number][tuple(slice(k) for k in shapes[n])] for n, t in stack.items()}


@contextmanager
def stacked(resident: ResidentModel, stack: Mapping[str, Tensor], scales: Tensor) -> Iterator[None]:
    """The model with a stack in the place of its adapter. scales: (c), of each client's layout."""
    second = {pair.b for pair in resident.layout.pairs}
    modules = {id(module): module for module, _ in resident.slots.values()}
    made: dict[int, nn.Module] = {}
    for key in modules:
        own = {a: n for n, (m, a) in resident.slots.items() if id(m) == key}
        name = own["weight"]
        bias = stack[own["bias"]] if "bias" in own else None
        made[key] = StackedLinear(stack[name], bias, scales if name in second else None)
    places = [
        (parent, name, child)
        for parent in list(resident.model.modules())
        for name, child in parent._modules.items()
        if id(child) in modules
    ]
    before = [layer.scaling["default"] for layer in resident.loras]
    try:
        for parent, name, child in places:
            parent._modules[name] = made[id(child)]
        for layer in resident.loras:
            layer.scaling["default"] = 1.0
        yield
    finally:
        for parent, name, child in places:
            parent._modules[name] = child
        for layer, scale in zip(resident.loras, before, strict=True):
            layer.scaling["default"] = scale
