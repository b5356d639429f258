"""What one message carries: values on a support, and how the other end learns that support.

A payload holds its values in the form in which they cross the network, already rounded, so that
encoding loses nothing: decode(encode(p)) == p. `rounded` is the one place where numbers are lost.
"""

import hashlib
import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fedsieve.algebra.adapter import Layout, Tree
from fedsieve.algebra.support import Support, add_back, scatter

Form = Literal["float64", "float32", "bfloat16", "int8"]
BLOCK = 128  # entries that share one int8 scale


class Values(NamedTuple):
    """Numbers as they travel.

    data:   (n,) of the form's dtype
    scales: (ceil(n / BLOCK),) float32 for int8: entry i stands for data[i] * scales[i // BLOCK];
            empty for the other forms
    """

    form: Form
    data: Tensor
    scales: Tensor


class Seed(NamedTuple):
    """The ranks are those that `support.draw_ranks` gives for this 64-bit word."""

    word: int
    shared: bool


# No number beyond this is merged: products, squares and sums must have a float32 too, and what
# training left out there is of no use.
LARGEST = 2.0**32


def magnitude(tensor: Tensor) -> float:
    """The largest magnitude of a tensor, 0 for an empty one; NaN where there is one. One pass."""
    return float(torch.linalg.vector_norm(tensor, math.inf)) if tensor.numel() else 0.0


class Base(NamedTuple):
    """A change of the frozen weights that the adapter's pairs sit on, for clients to catch up.

    Methods such as FLoRA and FedEx-LoRA fold products into these weights, and a client that was
    away must do the same before it trains.

    since:  the round from which the change counts: what the receiver's weights must stand at; 0 is
            the very start
    change: a whole payload (all names, all ranks, no masks, both told "known", no base of its own)
            on `adapter.base_layout(layout, K)` of the payload that it comes with: factors of rank
            K, whose product is added; or, for K = 0, the dense change since the very start, so
            that `since` is 0
    """

    since: int
    change: "Payload"


class Payload(NamedTuple):
    """Values on a support of a layout.

    ranks_told, masks_told: how the receiver learns the support. "known": it knows already, nothing
    is sent; "sent": the message holds it; a Seed: the message holds 8 bytes.
    base: a change of the frozen weights that travels beside the values; None, mostly, for none
    control: control variates: another number for each of the layout's entries. A whole payload on
        the same layout (all names, all ranks, no masks, both told "known", nothing beside it);
        None, mostly, for none
    """

    layout: Layout
    support: Support
    values: Values
    ranks_told: Literal["known", "sent"] | Seed
    masks_told: Literal["known", "sent"]
    base: "Base | None" = None
    control: "Payload | None" = None

    def tree(self) -> Tree:
        """The tensors, at the narrowed shapes, with zeros where nothing travelled."""
        return scatter(exact(self.values), self.support, self.layout)


def digest(payload: Payload) -> str:
    """Of what a payload says, in hexadecimal: the same however its support is told.

    Any change of a number, of its form or of its place is another digest. What travels
    beside the values has no part in it.
    """
    layout, tree = payload.layout, payload.tree()
    whole = {name: torch.zeros(layout.shapes[name], dtype=tree[name].dtype) for name in tree}
    add_back(whole, tree, layout, payload.support.ranks, 1.0)
    said = hashlib.blake2b(payload.values.form.encode(), digest_size=16)
    # What the numbers are, not how they are written: nothing has any scale, and a zero that travels
    # is as good as one that does not.
    for name in sorted(whole):
        numbers = whole[name].flatten()
        places = numbers.nonzero().flatten()
        if places.numel():
            said.update(repr((name, places.numel())).encode())
            said.update(places.numpy().tobytes() + numbers[places].numpy().tobytes())
    return said.hexdigest()


def rounded(numbers: Tensor, form: Form, draws: torch.Generator) -> Values:
    """Numbers (n,) in the form in which they travel.

    int8 rounds stochastically: a number between two steps goes up with the probability that makes
    the expectation exact, so averages over clients keep no bias. The other forms round to nearest.
    """
    if form == "int8":
        return _int8(numbers.float(), draws)
    return Values(form, numbers.to(getattr(torch, form)), torch.empty(0))


def exact(values: Values) -> Tensor:
    """The numbers (n,) that the values stand for: float64 for that form, else float32."""
    if values.form == "float64":
        return values.data
    if values.form != "int8":
        return values.data.float()
    steps = values.scales.repeat_interleave(BLOCK)[: values.data.numel()]
    return values.data.float() * steps


def _bfloat16_above(scales: Tensor) -> Tensor:
    """The next float32 at or above, for numbers from zero up, whose lower half is zero.

    The wire sends such a scale as 2 bytes instead of 4. Upwards, so that no entry needs more than
    127 steps.
    """
    return ((scales.view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)


def _int8(numbers: Tensor, draws: torch.Generator) -> Values:
    count = numbers.numel()
    blocks = -(-count // BLOCK)
    padded = torch.zeros(blocks * BLOCK)
    padded[:count] = numbers
    table = padded.view(blocks, BLOCK)
    scales = _bfloat16_above(table.abs().amax(dim=1) / 127)
    # A block of zeros, or of numbers so small that the step underflows, is sent as zeros.
    steps = torch.where(scales > 0, scales, torch.inf)
    lift = torch.rand(table.shape, generator=draws)
    data = (table / steps[:, None] + lift).floor().clamp(-127, 127).to(torch.int8)
    return Values("int8", data.reshape(-1)[:count].clone(), scales)
