"""decode(encode(p)) == p for every payload, and what the parts of a message cost."""

from typing import Literal

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsieve.algebra.adapter import Layout
from fedsieve.algebra.payload import BLOCK, Base, Form, Payload, Seed, Values
from fedsieve.algebra.support import Support, draw_ranks, narrowed
from fedsieve.wire import decode, encode
from tests.wire.cases import (
    DTYPES,
    counted,
    knowledge,
    layout_of_pairs,
    random_base,
    random_control,
    random_masks,
    random_values,
    same,
    silent,
)

Told = Literal["known", "sent"]
MASKS_TOLD: tuple[Told, ...] = ("known", "sent")
FIXED = 18  # bytes: docs/wire.md


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    side = st.integers(1, 40)
    rank = draw(st.integers(1, 9))
    pairs = draw(st.integers(0, 3))
    heads = draw(st.lists(st.lists(st.integers(0, 12), max_size=3), max_size=3))
    whole = [tuple(head) for head in heads]
    layout = layout_of_pairs(pairs, rank if pairs else 0, draw(side), draw(side), *whole)
    if pairs and draw(st.booleans()):  # LoRA of a convolution: the rank is axis 0 of A, 1 of B
        pair = layout.pairs[0]
        shapes = {**layout.shapes, pair.a: (rank, 5, 3, 3), pair.b: (draw(side), rank, 1, 1)}
        layout = Layout(shapes, layout.pairs, rank, layout.scale)
    return layout


@st.composite
def payloads(draw: st.DrawFn) -> Payload:
    layout = draw(layouts())
    seed = Seed(draw(st.integers(0, 2**64 - 1)), draw(st.booleans()))
    tellings: list[Told | Seed] = ["known", "sent", seed]
    ranks = None
    if layout.rank and draw(st.booleans()):
        keep = draw(st.integers(1, layout.rank))
        ranks = draw_ranks(seed.word, len(layout.pairs), layout.rank, keep, shared=seed.shared)
    names = tuple(sorted(draw(st.sets(st.sampled_from(layout.names))))) if layout.names else ()
    names = layout.names if draw(st.booleans()) else names
    shapes = narrowed(layout, ranks).shapes
    masks = {}
    noise = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    for name in names:
        density = draw(st.sampled_from([None, 0.0, 0.03, 0.3, 0.97, 1.0]))
        if density is not None:
            masks[name] = torch.rand(shapes[name], generator=noise) < density
    support = Support(names, ranks, masks)
    values = draw(finite_values(counted(layout, support)))
    masks_told = draw(st.sampled_from(MASKS_TOLD))
    base = draw(st.none() | bases(layout)) if layout.pairs else None
    control = None
    if base is None and draw(st.booleans()):
        whole = draw(finite_values(layout.size))
        control = random_control(layout, "float32", 0)._replace(values=whole)
    ranks_told = draw(st.sampled_from(tellings))
    return Payload(layout, support, values, ranks_told, masks_told, base, control)


@st.composite
def bases(draw: st.DrawFn, layout: Layout) -> Base:
    rank = draw(st.sampled_from([0, 1, layout.rank, 12]))
    since = draw(st.integers(0, 2**32 - 1)) if rank else 0
    base = random_base(layout, since, rank, "float32", 0)
    values = draw(finite_values(base.change.layout.size))
    base = base._replace(change=base.change._replace(values=values))
    return silent(base) if draw(st.booleans()) else base


@st.composite
def finite_values(draw: st.DrawFn, count: int) -> Values:
    form: Form = draw(st.sampled_from(["float64", "float32", "bfloat16", "int8"]))
    seed = draw(st.integers(0, 1000))
    if draw(st.booleans()):
        return random_values(form, count, seed)
    noise = torch.Generator().manual_seed(seed)
    if form == "int8":
        low = draw(st.integers(0, 127))
        high = draw(st.integers(low, 127))
        data = torch.randint(low, high + 1, (count,), generator=noise).to(torch.int8)
        data[torch.rand(count, generator=noise) < 0.5] *= -1
        largest = draw(st.sampled_from([0.0, 1e-42, 1.0, 2.6e36]))
        scales = (largest * torch.rand(-(-count // BLOCK), generator=noise)).float()
        return Values(form, data, scales.bfloat16().float() if draw(st.booleans()) else scales)
    # Any bits at all, so that there are subnormals and zeros of both signs; but finite.
    words = torch.randint(0, 256, (count, DTYPES[form].itemsize), generator=noise).to(torch.uint8)
    data = words.view(DTYPES[form]).reshape(-1)
    data[~data.isfinite()] = -0.0
    return Values(form, data, torch.empty(0))


@settings(max_examples=300)
@given(payloads())
def test_what_is_encoded_is_decoded(payload: Payload) -> None:
    data = encode(payload)
    decoded = decode(data, payload.layout, knowledge(payload))
    assert same(decoded, payload)
    assert encode(decoded) == data


def test_a_base_change_costs_its_message_and_22_bytes() -> None:
    layout = layout_of_pairs(4, 8, 100, 60, (20, 100), (20,))
    values = random_values("float32", layout.size, 0)
    payload = Payload(layout, Support(layout.names, None, {}), values, "known", "sent")
    for rank, numbers in ((11, 4 * 11 * (100 + 60)), (0, 4 * 60 * 100)):
        for form, width in (("float32", 4), ("float64", 8)):
            base = random_base(layout, 0, rank, form, 1)  # type: ignore[arg-type]
            cost = len(encode(payload._replace(base=base))) - len(encode(payload))
            assert cost == 22 + FIXED + width * numbers
        for form in ("bfloat16", "int8"):  # no zeros are filled in where a change says something
            base = random_base(layout, 0, rank, form, 1)  # type: ignore[arg-type]
            cost = len(encode(payload._replace(base=base))) - len(encode(payload))
            assert cost == 22 + len(encode(base.change))


def test_a_base_change_of_int8_zeros_costs_half_a_byte_a_number_beyond_the_layout() -> None:
    layout = layout_of_pairs(2, 4, 100, 60, (7,))
    values = random_values("float32", layout.size, 0)
    payload = Payload(layout, Support(layout.names, None, {}), values, "known", "sent")
    for rank in (1, 4, 50, 200):
        base = silent(random_base(layout, 3, rank, "int8", 1))
        numbers = 2 * rank * (100 + 60)
        cost = len(encode(payload._replace(base=base))) - len(encode(payload)) - 22
        assert cost == max(len(encode(base.change)), numbers // 2 - layout.size)


def test_control_variates_cost_their_message_and_16_bytes() -> None:
    layout = layout_of_pairs(4, 8, 100, 60, (20, 100), (20,))
    values = random_values("float32", layout.size, 0)
    payload = Payload(layout, Support(layout.names, None, {}), values, "known", "sent")
    for form in ("float64", "float32", "bfloat16", "int8"):
        control = random_control(layout, form, 1)
        cost = len(encode(payload._replace(control=control))) - len(encode(payload))
        assert cost == 16 + len(encode(control))


def test_dense_float32_costs_four_bytes_a_number() -> None:
    layout = layout_of_pairs(4, 8, 100, 60, (20, 100), (20,))
    support = Support(layout.names, None, {})
    values = random_values("float32", layout.size, 0)
    assert len(encode(Payload(layout, support, values, "known", "sent"))) == FIXED + 4 * layout.size
    values = random_values("float64", layout.size, 0)
    assert len(encode(Payload(layout, support, values, "known", "sent"))) == FIXED + 8 * layout.size


def test_ranks_that_the_server_knows_cost_nothing() -> None:
    """FSLoRA's upload: as long as that of a layout which has this rank."""
    layout = layout_of_pairs(4, 8, 100, 60, (20, 100))
    ranks = draw_ranks(1, 4, 8, 3, shared=True)
    sketch = random_masks(layout, Support(layout.names, ranks, {}), 0.2, 0)
    values = random_values("int8", counted(layout, sketch), 0)
    narrow = narrowed(layout, ranks)
    assert len(encode(Payload(layout, sketch, values, "known", "sent"))) == len(
        encode(Payload(narrow, sketch._replace(ranks=None), values, "known", "sent"))
    )


def test_a_seed_costs_eight_bytes_and_the_number_of_ranks() -> None:
    layout = layout_of_pairs(4, 8, 100, 60, (20, 100))
    for shared, index in ((True, 1), (False, 4)):
        seed = Seed(99, shared)
        support = Support(layout.names, draw_ranks(99, 4, 8, 3, shared=shared), {})
        values = random_values("float32", counted(layout, support), 0)
        known = len(encode(Payload(layout, support, values, "known", "sent")))
        assert len(encode(Payload(layout, support, values, seed, "sent"))) == known + 10
        assert len(encode(Payload(layout, support, values, "sent", "sent"))) == known + index


def test_masks_that_the_receiver_knows_cost_nothing() -> None:
    layout = layout_of_pairs(2, 4, 30, 20)
    support = random_masks(layout, Support(layout.names, None, {}), 0.3, 0)
    count = counted(layout, support)
    values = random_values("float32", count, 0)
    assert len(encode(Payload(layout, support, values, "known", "known"))) == FIXED + 4 * count


def test_rows_of_a_mask_that_are_all_the_same_cost_next_to_nothing() -> None:
    layout = layout_of_pairs(2, 8, 500, 500)
    empty = {name: torch.zeros(layout.shapes[name], dtype=torch.bool) for name in layout.names}
    for name, mask in empty.items():
        mask.select(layout.rank_axis[name][1], 1).fill_(True)
    support = Support(layout.names, None, empty)
    values = random_values("float32", counted(layout, support), 0)
    cost = len(encode(Payload(layout, support, values, "known", "sent"))) - FIXED
    assert cost - 4 * counted(layout, support) < 24


def test_a_mask_costs_less_than_its_entropy_when_ranks_differ() -> None:
    """A mask of which some ranks are dense and most are empty, as real updates make them."""
    layout = layout_of_pairs(6, 16, 384, 384)
    draws = torch.Generator().manual_seed(0)
    masks = {}
    for name in layout.names:
        _, axis = layout.rank_axis[name]
        density = 0.8 * torch.rand(16, generator=draws) ** 6
        noise = torch.rand(layout.shapes[name], generator=draws)
        masks[name] = noise < (density[:, None] if axis == 0 else density)
    support = Support(layout.names, None, masks)
    count = counted(layout, support)
    values = random_values("float32", count, 0)
    cost = len(encode(Payload(layout, support, values, "known", "sent"))) - 4 * count
    density = torch.tensor([count / layout.size, 1 - count / layout.size])
    entropy = float(-(density * density.log2()).sum()) * layout.size / 8
    assert cost < 0.8 * entropy


def test_noise_costs_hardly_more_than_it_would_raw() -> None:
    """There is no raw fallback, for there is nothing that it could save."""
    layout = layout_of_pairs(2, 8, 500, 500)
    draws = torch.Generator().manual_seed(0)
    masks = {n: torch.rand(s, generator=draws) < 0.5 for n, s in layout.shapes.items()}
    for kept, bits in ((masks, layout.size), ({}, 0)):
        support = Support(layout.names, None, kept)
        count = counted(layout, support)
        data = torch.randint(-127, 128, (count,), generator=draws).to(torch.int8)
        scales = torch.rand(-(-count // BLOCK), generator=draws)
        payload = Payload(layout, support, Values("int8", data, scales), "known", "sent")
        raw = bits / 8 + count + 4 * scales.numel()
        assert raw < len(encode(payload)) < 1.02 * raw
