"""Payloads for the tests of the wire: small ones by hand, and the comparison of two, bit by bit."""

import hashlib
import struct

import torch
from torch import Tensor

from fedsieve.algebra.adapter import Layout, Pair, base_layout
from fedsieve.algebra.payload import BLOCK, Base, Form, Payload, Seed, Values
from fedsieve.algebra.support import Support, draw_ranks, narrowed

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}


def layout_of_pairs(
    pairs: int, rank: int, inner: int, outer: int, *heads: tuple[int, ...]
) -> Layout:
    """A layout with so many pairs of the shapes (rank, inner) and (outer, rank), and heads."""
    shapes: dict[str, tuple[int, ...]] = {f"head.{i}": shape for i, shape in enumerate(heads)}
    modules = [f"layer.{i}.query" for i in range(pairs)]
    for module in modules:
        shapes[f"{module}.lora_A.weight"] = (rank, inner)
        shapes[f"{module}.lora_B.weight"] = (outer, rank)
    made = tuple(Pair(m, f"{m}.lora_A.weight", f"{m}.lora_B.weight") for m in modules)
    return Layout(shapes, made, rank, 1.0)


def counted(layout: Layout, support: Support) -> int:
    """How many values a support lets through."""
    shapes = narrowed(layout, support.ranks).shapes
    whole = {name: torch.Size(shapes[name]).numel() for name in support.names}
    return sum(whole.values()) + sum(int(m.sum()) - whole[n] for n, m in support.masks.items())


def noise(name: str, count: int) -> Tensor:
    """Numbers in [0, 1), float64, that are the same on every machine and with every library."""
    digest = hashlib.shake_128(name.encode()).digest(4 * count)
    return torch.tensor(struct.unpack(f"<{count}I", digest), dtype=torch.float64) / 2**32


def random_masks(layout: Layout, support: Support, density: float, seed: int) -> Support:
    """The support with masks on all its tensors, some rows denser than others."""
    shapes = narrowed(layout, support.ranks).shapes
    masks = {}
    for name in support.names:
        shape = torch.Size(shapes[name])
        rows = noise(f"rows {seed} {name}", shape[0]).reshape(-1, *[1] * (len(shape) - 1))
        bits = noise(f"bits {seed} {name}", shape.numel()).reshape(shape)
        masks[name] = bits < 2 * density * rows
    return support._replace(masks=masks)


def random_values(form: Form, count: int, seed: int) -> Values:
    """Finite values of a form, of many sizes; some are zero."""
    size = noise(f"size {seed}", count)
    numbers = size * size * size * torch.where(noise(f"sign {seed}", count) < 0.5, -1.0, 1.0)
    numbers[noise(f"zero {seed}", count) < 0.1] = 0
    if form == "int8":
        scales = noise(f"scale {seed}", -(-count // BLOCK)).float()
        return Values(form, (127 * numbers).round().to(torch.int8), scales)
    return Values(form, numbers.to(DTYPES[form]), torch.empty(0))


def random_base(layout: Layout, since: int, rank: int, form: Form, seed: int) -> Base:
    """A change of the base under a layout: factors of some rank, or a dense one for rank 0."""
    theirs = base_layout(layout, rank)
    values = random_values(form, theirs.size, seed)
    return Base(since, Payload(theirs, Support(theirs.names, None, {}), values, "known", "known"))


def random_control(layout: Layout, form: Form, seed: int) -> Payload:
    """Control variates for a layout."""
    values = random_values(form, layout.size, seed)
    return Payload(layout, Support(layout.names, None, {}), values, "known", "known")


def silent(base: Base) -> Base:
    """The same change with all its values zero: what int8 sends in next to no bytes."""
    _, data, scales = base.change.values
    values = Values(base.change.values.form, data * 0, scales * 0)
    return base._replace(change=base.change._replace(values=values))


def golden_payloads() -> dict[str, Payload]:
    """The payloads whose bytes are kept in tests/wire/golden, by the names of their files."""
    layout = layout_of_pairs(3, 4, 70, 50, (5, 9), (5,))
    full = Support(layout.names, None, {})
    sketch = full._replace(ranks=draw_ranks(2**63 + 5, 3, 4, 2, shared=False))
    ranked = full._replace(ranks=torch.tensor([[0, 3], [0, 3], [0, 3]]))
    uneven = full._replace(ranks=torch.tensor([[0, 3], [1, 2], [0, 3]]))
    factors = tuple(name for name in layout.names if "lora" in name)
    sieved = random_masks(layout, ranked, 0.2, 1)
    partly = random_masks(layout, Support(factors, uneven.ranks, {}), 0.3, 2)
    partly.masks.pop(factors[0])
    partly.masks[factors[1]][:] = True
    partly.masks[factors[2]][:] = False

    def payload(support: Support, form: Form, ranks: str | Seed, masks: str, seed: int) -> Payload:
        values = random_values(form, counted(layout, support), seed)
        return Payload(layout, support, values, ranks, masks)  # type: ignore[arg-type]

    dense = payload(full, "int8", "known", "sent", 11)
    known = payload(sieved, "int8", "known", "known", 12)
    factors_base = random_base(layout, 2**31 + 3, 6, "bfloat16", 13)
    dense_base = random_base(layout, 0, 0, "int8", 14)
    return {
        "dense-float64": payload(full, "float64", "known", "known", 3),
        "dense-float32": payload(full, "float32", "known", "sent", 4),
        "dense-bfloat16": payload(full, "bfloat16", "sent", "sent", 5),
        "dense-int8": payload(full, "int8", "known", "sent", 6),
        "seed-bfloat16": payload(sketch, "bfloat16", Seed(2**63 + 5, False), "sent", 7),
        "known-int8": payload(sieved, "int8", "known", "known", 8),
        "sieved-int8": payload(sieved, "int8", "sent", "sent", 9),
        "partly-bfloat16": payload(partly, "bfloat16", "sent", "sent", 10),
        "base-bfloat16": known._replace(base=factors_base),
        "base-dense-int8": dense._replace(base=dense_base),
        "base-filled-int8": dense._replace(base=silent(random_base(layout, 4, 20, "int8", 15))),
        "control-bfloat16": known._replace(control=random_control(layout, "bfloat16", 16)),
        "control-int8": dense._replace(control=random_control(layout, "int8", 17)),
    }


def knowledge(payload: Payload) -> Support | None:
    """What the receiver must know for this payload; None where it needs to know nothing."""
    ranks = payload.support.ranks if payload.ranks_told == "known" else None
    masks = payload.support.masks if payload.masks_told == "known" else {}
    return None if ranks is None and not masks else Support((), ranks, masks)


def same(one: Payload, other: Payload) -> bool:
    """Equal in every bit: also the signs of zeros and the order of the masks."""
    return (
        one.layout == other.layout
        and one.support.names == other.support.names
        and _same_ranks(one.support.ranks, other.support.ranks)
        and list(one.support.masks) == list(other.support.masks)
        and all(_same(m, other.support.masks[name]) for name, m in one.support.masks.items())
        and one.values.form == other.values.form
        and _same(one.values.data, other.values.data)
        and _same(one.values.scales, other.values.scales)
        and one[3:5] == other[3:5]
        and _same_base(one.base, other.base)
        and (one.control is None) == (other.control is None)
        and (one.control is None or other.control is None or same(one.control, other.control))
    )


def _same_base(one: Base | None, other: Base | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.since == other.since and same(one.change, other.change)


def _same_ranks(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return _same(one, other)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and _bytes(one) == _bytes(other)


def _bytes(tensor: Tensor) -> bytes:
    words = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
    return words.numpy().tobytes()
