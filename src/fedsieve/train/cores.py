"""Cores in the resident model: PEFT's lora_B gives way to one that has them before it.

A and B become weights of the base, as far as anybody else is concerned: they take no gradient, are
in no message, and processes share them. To be saved as LoRA, the cores are multiplied into B, and
the model is an ordinary one of PEFT for as long as that takes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from fedsieve.algebra.adapter import Adapter, Pair
from fedsieve.algebra.cores import Cores, between, core_name, cored, gain_name, orthonormal
from fedsieve.algebra.keys import Key
from fedsieve.errors import FedSieveError
from fedsieve.train.parts import Place

if TYPE_CHECKING:
    from fedsieve.train.model import ResidentModel

_NAME = "default"  # PEFT's name of the adapter inside the model


class CoredB(nn.Module):
    """x (..., r) -> B (g_0 R_0 x_0, ..., g_h-1 R_h-1 x_h-1): each head has its share of x. In a
    convolution (b, r, ...), where B is a kernel of one point.

    Cores and gains are linear layers, so that clients can lie side by side in them (stacked.py).
    """

    def __init__(self, last: Any, cores: Cores) -> None:
        super().__init__()
        side, device = last.weight.shape[1] // cores.heads, last.weight.device
        self.side, self.last = side, last
        self.axis = -1 if isinstance(last, nn.Linear) else 1
        self.cores = nn.ModuleList(_linear(side, 0.0, device) for _ in range(cores.heads))
        self.gains = nn.ModuleList(
            _linear(1, 1.0, device) for _ in range(cores.heads if cores.gains else 0)
        )

    def forward(self, x: Tensor) -> Tensor:
        shares = x.movedim(self.axis, -1).split(self.side, -1)
        parts = [core(own) for core, own in zip(self.cores, shares, strict=True)]
        if self.gains:
            parts = [
                gain(own[..., None])[..., 0] for gain, own in zip(self.gains, parts, strict=True)
            ]
        out: Tensor = self.last(torch.cat(parts, -1).movedim(-1, self.axis))
        return out


def _linear(side: int, value: float, device: torch.device) -> nn.Linear:
    layer = skip_init(nn.Linear, side, side, bias=False, device=device)
    layer.weight = nn.Parameter(torch.full((side, side), value, device=device))
    return layer  # type: ignore[no-any-return]


def with_cores(resident: "ResidentModel", cores: Cores, key: Key) -> "ResidentModel":
    """A resident of LoRA pairs as one of cores between frozen factors, drawn from `key`.

    Raises FedSieveError for embeddings, and for a rank that the heads cannot share.
    """
    for pair in resident.layout.pairs:
        if resident.slots[pair.b][1] != "weight":
            raise FedSieveError(
                f"lora.targets takes in {pair.module}, an embedding, and this method has cores for "
                "linear layers and convolutions alone: leave it out, or choose another method"
            )
    try:
        layout = cored(resident.layout, cores)
    except ValueError as error:
        raise FedSieveError(
            f"method.heads: {error}: choose a lora.rank that {cores.heads} divides"
        ) from error
    slots = {n: slot for n, slot in resident.slots.items() if n in layout.shapes}
    for pair in resident.layout.pairs:
        (first, _), (last, _) = resident.slots[pair.a], resident.slots[pair.b]
        for holder, name in ((first, pair.a), (last, pair.b)):
            _draw(holder.weight, resident.layout.rank_axis[name][1], key.at(f"factor {name}"))
        made = CoredB(last, cores)
        _pairs_of(resident, pair)[_NAME] = made
        places = {core_name(pair.module, n): each for n, each in enumerate(made.cores)}
        places |= {gain_name(pair.module, n): each for n, each in enumerate(made.gains)}
        slots |= {name: (each, "weight") for name, each in places.items()}
    return replace(
        resident,
        layout=layout,
        slots=dict(sorted(slots.items())),
        loras=(),
        dense=resident.layout,
        pairs=resident,
    )


def _draw(factor: Any, axis: int, key: Key) -> None:
    """Freeze a factor, with vectors at right angles along the axis of its ranks."""
    factor.requires_grad_(False)
    if factor.device.type != "meta":
        rank = factor.shape[axis]
        vectors = orthonormal(factor.numel() // rank, rank, key)
        factor.data.copy_((vectors if axis else vectors.T).reshape(factor.shape))


@contextmanager
def as_pairs(
    resident: "ResidentModel", adapter: Adapter
) -> Iterator[tuple["ResidentModel", Adapter]]:
    """A resident of cores, and an adapter of its, as LoRA: (that resident, B R beside A).

    Afterwards the model has its cores again, if it is still there.
    """
    plain = resident.pairs
    assert plain is not None
    plain = replace(
        plain, tokenizer=resident.tokenizer, origin=resident.origin, digest=resident.digest
    )
    tensors = {n: t for n, t in adapter.tensors.items() if n in plain.layout.shapes}
    before: list[tuple[Place, Any]] = []
    places: list[tuple[Any, nn.Module]] = []
    for pair in plain.layout.pairs:
        a, b = (getattr(*plain.slots[name]) for name in (pair.a, pair.b))
        before += [(plain.slots[pair.a], a), (plain.slots[pair.b], b)]
        core = between(adapter.tensors, pair.module)
        tensors[pair.a] = a.detach().cpu()
        product = b.detach().cpu().flatten(1).double() @ core
        tensors[pair.b] = product.reshape(b.shape).to(b.dtype)
        holder = _pairs_of(plain, pair)
        places.append((holder, holder[_NAME]))
        holder[_NAME] = plain.slots[pair.b][0]
    try:
        yield plain, Adapter(plain.layout, dict(sorted(tensors.items())))
    finally:
        for (module, attribute), parameter in before:
            setattr(module, attribute, parameter)
        for holder, module in places:
            holder[_NAME] = module


def _pairs_of(resident: "ResidentModel", pair: Pair) -> Any:
    """Where PEFT keeps the B of a layer, by the adapter's name."""
    return resident.model.get_submodule(pair.module).lora_B
