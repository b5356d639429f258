"""Whatever bytes come, `decode` gives a payload that fits the layout, or a WireError.

The checksum keeps out damage, but not malice: here it is mended after each change, so that what
stands behind it must hold by itself. benchmarks/hostile.py tries a great many more.
"""

import random
import struct
import tracemalloc
from contextlib import suppress
from zlib import crc32

import pytest
import torch

from fedsieve.algebra.adapter import Layout, base_layout
from fedsieve.algebra.payload import Base, Payload, Seed, Values
from fedsieve.algebra.support import Support, draw_ranks
from fedsieve.errors import WireError
from fedsieve.wire import decode, encode
from tests import kinds
from tests.wire.cases import (
    counted,
    golden_payloads,
    layout_of_pairs,
    random_base,
    random_control,
    random_masks,
    random_values,
    same,
    silent,
)
from tests.wire.reader import packed

SMALL = layout_of_pairs(2, 3, 6, 5, (4,))


def small_messages() -> dict[str, bytes]:
    """Short messages that tell all they can, in all forms."""
    messages = {}
    ranks = torch.tensor([[0, 2], [1, 2]])
    seeded = draw_ranks(5, 2, 3, 2, shared=False)
    some = Support(SMALL.names[1:], ranks, {})
    half = random_masks(SMALL, some, 0.4, 1)
    half.masks.pop(SMALL.names[1])
    for form in ("float32", "bfloat16", "int8"):
        for name, support, told in (
            ("half", half, "sent"),
            ("seed", random_masks(SMALL, Support(SMALL.names, seeded, {}), 0.4, 2), Seed(5, False)),
            ("dense", Support(SMALL.names, None, {}), "known"),
        ):
            values = random_values(form, counted(SMALL, support), 3)
            payload = Payload(SMALL, support, values, told, "sent")  # type: ignore[arg-type]
            messages[f"{name}-{form}"] = encode(payload)
    return messages


def mended(data: bytes) -> bytes:
    """The message with the checksum that belongs to it, for a receiver that knows nothing."""
    return data[:-4] + crc32(data[:-4]).to_bytes(4, "little")


def refused_or_whole(data: bytes, layout: Layout) -> bool:
    """True if the bytes are accepted; then they are the one message of a payload that fits."""
    try:
        payload = decode(data, layout)
    except WireError:
        return False
    assert payload.layout == layout
    assert payload.values.data.numel() == counted(layout, payload.support)
    if payload.base is not None:
        change = payload.base.change
        assert change.layout == base_layout(layout, change.layout.rank)
        assert all(tensor.shape == change.layout.shapes[n] for n, tensor in change.tree().items())
        assert all(tensor.isfinite().all() for tensor in change.tree().values())
    if payload.control is not None:
        assert payload.control.layout == layout
        assert {n: t.shape for n, t in payload.control.tree().items()} == layout.shapes
        assert all(tensor.isfinite().all() for tensor in payload.control.tree().values())
    assert all(tensor.isfinite().all() for tensor in payload.tree().values())
    assert encode(payload) == data
    return True


@pytest.mark.parametrize("name", kinds.some_of(small_messages()))
def test_every_flipped_bit(name: str) -> None:
    data = small_messages()[name]
    assert refused_or_whole(data, SMALL)
    for place in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        with pytest.raises(WireError):  # the checksum sees every single flip
            decode(bytes(flipped), SMALL)
        if place < 8 * (len(data) - 4):
            refused_or_whole(mended(bytes(flipped)), SMALL)


@pytest.mark.parametrize("name", small_messages())
def test_every_truncation_and_one_byte_more(name: str) -> None:
    data = small_messages()[name]
    for size in range(len(data)):
        with pytest.raises(WireError):
            decode(data[:size], SMALL)
        if size >= 4:
            with pytest.raises(WireError):
                decode(mended(data[:size]), SMALL)
    for more in (b"\0", b"\1", b"\0\0\0\0"):
        with pytest.raises(WireError):
            decode(data + more, SMALL)
        with pytest.raises(WireError):
            decode(mended(data[:-4] + more + data[-4:]), SMALL)


def test_random_bytes() -> None:
    draws = random.Random(0)
    for _ in range(500):
        assert not refused_or_whole(draws.randbytes(draws.randrange(60)), SMALL)


def test_random_bytes_behind_a_true_head() -> None:
    draws = random.Random(1)
    heads = [data[:10] for data in small_messages().values()]
    for _ in range(3000):
        body = draws.randbytes(draws.randrange(40))
        coded = draws.randrange(12).to_bytes(4, "little") + body
        refused_or_whole(mended(draws.choice(heads) + coded + bytes(4)), SMALL)


def test_random_changes_of_larger_messages() -> None:
    draws = random.Random(2)
    payloads = [p for p in golden_payloads().values() if p.masks_told == "sent"]
    messages = [encode(p) for p in payloads if p.ranks_told != "known" or p.support.ranks is None]
    layout = payloads[0].layout
    for _ in range(2000):
        changed = bytearray(draws.choice(messages))
        for _ in range(draws.randint(1, 3)):
            changed[draws.randrange(len(changed))] = draws.randrange(256)
        refused_or_whole(mended(bytes(changed)), layout)


def test_random_changes_of_a_message_to_one_who_knows() -> None:
    payload = golden_payloads()["known-int8"]
    known, data = payload.support, encode(payload)
    assert known.ranks is not None
    sets = [int(rank in row) for row in known.ranks.tolist() for rank in range(4)]
    check = crc32(packed(sets))
    for mask in known.masks.values():
        check = crc32(packed(mask.reshape(-1).int().tolist()), check)
    assert crc32(data[:-4], check).to_bytes(4, "little") == data[-4:]
    draws = random.Random(4)
    for _ in range(2000):
        changed = bytearray(data[:-4])
        changed[draws.randrange(len(changed))] = draws.randrange(256)
        message = bytes(changed) + crc32(changed, check).to_bytes(4, "little")
        try:
            decoded = decode(message, payload.layout, known)
        except WireError:
            continue
        assert encode(decoded) == message


def test_no_message_makes_the_decoder_allocate_beyond_its_layout() -> None:
    """Sizes that a message claims are held against the layout before anything is made of them."""
    draws = random.Random(3)
    full = Support(SMALL.names, None, {})
    dense = encode(Payload(SMALL, full, random_values("float32", SMALL.size, 0), "known", "sent"))
    messages = list(small_messages().values())
    for data in [dense, *messages]:
        for place in range(4, len(data) - 8):  # 4 GiB claimed wherever a size may stand
            messages.append(mended(data[:place] + b"\xff\xff\xff\xff" + data[place + 4 :]))
    for _ in range(500):
        head = draws.choice(messages[:9])[:10]
        messages.append(mended(head + draws.randbytes(300)))
    for data in messages:  # models are made once, and kept
        refused_or_whole(data, SMALL)
    tracemalloc.start()
    try:
        for data in messages:
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            with suppress(WireError):
                decode(data, SMALL)
            peak = tracemalloc.get_traced_memory()[1] - before
            assert peak < 64 * 1024  # names, shapes and views; nothing that a message could size
    finally:
        tracemalloc.stop()


def test_a_tiny_message_for_a_large_layout_stays_within_a_few_times_its_size() -> None:
    layout = layout_of_pairs(2, 16, 4096, 4096)
    full = {name: torch.ones(layout.shapes[name], dtype=torch.bool) for name in layout.names}
    count = layout.size
    values = Values("int8", torch.zeros(count, dtype=torch.int8), torch.zeros(-(-count // 128)))
    payload = Payload(layout, Support(layout.names, None, full), values, "known", "sent")
    data = encode(payload)
    assert same(decode(data, layout), payload)
    tracemalloc.start()
    decode(data, layout)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 8 * count


def enveloped(since: int, rank: int, base: bytes, zeros: int, message: bytes) -> bytes:
    """An envelope around two messages, whatever they are, with a true checksum."""
    body = b"FSB\1" + struct.pack("<IHQ", since, rank, len(base)) + base + bytes(zeros) + message
    return body + crc32(body).to_bytes(4, "little")


def small_envelopes() -> dict[str, Payload]:
    plain = Payload(SMALL, Support(SMALL.names, None, {}), random_values("int8", SMALL.size, 3),
                    "known", "sent")  # fmt: skip
    return {
        "factors": plain._replace(base=random_base(SMALL, 5, 2, "bfloat16", 1)),
        "more ranks": plain._replace(base=random_base(SMALL, 5, 4, "int8", 2)),
        "dense": plain._replace(base=random_base(SMALL, 0, 0, "float32", 3)),
        "filled": plain._replace(base=silent(random_base(SMALL, 5, 20, "int8", 4))),
        "control": plain._replace(control=random_control(SMALL, "bfloat16", 5)),
        "control int8": plain._replace(control=random_control(SMALL, "int8", 6)),
    }


@pytest.mark.parametrize("name", kinds.some_of(small_envelopes()))
def test_every_flipped_bit_of_an_envelope(name: str) -> None:
    payload = small_envelopes()[name]
    beside = payload.control if payload.base is None else payload.base.change
    assert beside is not None
    data = encode(payload)
    head = 12 if payload.base is None else 18
    size = len(encode(beside))
    message = len(encode(payload._replace(base=None, control=None)))
    assert refused_or_whole(data, SMALL)
    for place in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        with pytest.raises(WireError):
            decode(bytes(flipped), SMALL)
        # All three checksums mended, where the sizes stand that were there before.
        flipped[head : head + size] = mended(bytes(flipped[head : head + size]))
        flipped[-4 - message : -4] = mended(bytes(flipped[-4 - message : -4]))
        refused_or_whole(mended(bytes(flipped)), SMALL)


@pytest.mark.parametrize("name", small_envelopes())
def test_every_truncation_of_an_envelope_and_more(name: str) -> None:
    data = encode(small_envelopes()[name])
    for size in range(len(data)):
        with pytest.raises(WireError):
            decode(data[:size], SMALL)
        if size >= 4:
            with pytest.raises(WireError):
                decode(mended(data[:size]), SMALL)
    for place in (18, len(data) // 2, len(data) - 4):
        with pytest.raises(WireError):
            decode(mended(data[:place] + b"\0" + data[place:]), SMALL)
    with pytest.raises(WireError):
        decode(data + b"\0", SMALL)


def test_envelopes_that_a_writer_would_not_make() -> None:
    payload = small_envelopes()["filled"]
    assert payload.base is not None
    base, message = encode(payload.base.change), encode(payload._replace(base=None))
    zeros = len(encode(payload)) - 22 - len(base) - len(message)
    assert zeros > 0
    assert enveloped(5, 20, base, zeros, message) == encode(payload)
    whole = payload.base.change
    ranks = whole._replace(ranks_told="sent")
    masks = whole._replace(masks_told="sent")
    some = Support(whole.layout.names[:1], None, {})
    part = whole._replace(
        support=some, values=random_values("int8", counted(whole.layout, some), 1)
    )
    dense = encode(random_base(SMALL, 0, 0, "float32", 1).change)
    for bad in (
        enveloped(5, 20, base, zeros - 1, message),
        enveloped(5, 20, base, zeros + 1, message),
        enveloped(5, 20, base, 0, message),
        enveloped(5, 21, base, zeros, message),  # the base message is for another rank
        enveloped(5, 20, base, zeros, base),
        enveloped(5, 20, message, zeros, message),
        enveloped(5, 20, encode(payload), zeros, message),  # envelopes do not nest
        enveloped(5, 20, base, zeros, encode(payload)),
        enveloped(5, 20, encode(ranks), zeros, message),
        enveloped(5, 20, encode(masks), zeros, message),
        enveloped(5, 20, encode(part), zeros, message),
        enveloped(5, 0, dense, 0, message),  # dense changes count from the start
        b"FSB\2" + enveloped(5, 20, base, zeros, message)[4:],
    ):
        with pytest.raises(WireError):
            decode(bad, SMALL)
        with pytest.raises(WireError):
            decode(mended(bad), SMALL)
    refused_or_whole(enveloped(0, 0, dense, 0, message), SMALL)


def test_envelopes_with_control_variates_that_a_writer_would_not_make() -> None:
    payload = small_envelopes()["control int8"]
    assert payload.control is not None
    control, message = encode(payload.control), encode(payload._replace(control=None))

    def around(control: bytes, message: bytes, size: int | None = None) -> bytes:
        told = len(control) if size is None else size
        body = b"FSC\1" + struct.pack("<Q", told) + control + message
        return body + crc32(body).to_bytes(4, "little")

    assert around(control, message) == encode(payload)
    some = Support(SMALL.names[:1], None, {})
    part = Payload(SMALL, some, random_values("int8", counted(SMALL, some), 1), "known", "known")
    for bad in (
        around(control, message, len(control) - 1),
        around(control, message, len(control) + 1),
        around(control, message, 2**64 - 1),
        around(control, b""),
        around(b"", message),
        around(encode(payload), message),  # envelopes do not nest
        around(control, encode(payload)),
        around(encode(small_envelopes()["dense"]), message),
        around(control, encode(small_envelopes()["dense"])),
        around(encode(part), message),
        around(encode(payload.control._replace(ranks_told="sent")), message),
        around(encode(payload.control._replace(masks_told="sent")), message),
        b"FSC\2" + around(control, message)[4:],
        b"FSC\1",
    ):
        with pytest.raises(WireError):
            decode(bad, SMALL)
        with pytest.raises(WireError):
            decode(mended(bad), SMALL)


def test_control_variates_that_do_not_fit_are_refused() -> None:
    good = small_envelopes()["control"]
    control = good.control
    assert control is not None
    some = Support(SMALL.names[:1], None, {})
    numbers = control.values.data.clone()
    numbers[3] = float("inf")
    other = layout_of_pairs(2, 3, 6, 7)
    masks = {SMALL.names[0]: torch.ones(SMALL.shapes[SMALL.names[0]]).bool()}
    for bad in (
        random_control(other, "int8", 1),
        control._replace(support=some, values=random_values("int8", counted(SMALL, some), 1)),
        control._replace(support=control.support._replace(masks=masks)),
        control._replace(ranks_told="sent"),
        control._replace(masks_told="sent"),
        control._replace(values=control.values._replace(data=numbers)),
        control._replace(control=control),
        control._replace(base=small_envelopes()["dense"].base),
    ):
        with pytest.raises(WireError):
            encode(good._replace(control=bad))
    with pytest.raises(WireError, match="one message carries one"):
        encode(good._replace(base=small_envelopes()["dense"].base))


def test_base_changes_that_do_not_fit_are_refused() -> None:
    good = small_envelopes()["factors"]
    assert good.base is not None
    since, change = good.base
    name = change.layout.names[0]
    some = Support(change.layout.names[:1], None, {})
    masked = change.support._replace(masks={name: torch.ones(change.layout.shapes[name]).bool()})
    numbers = change.values.data.clone()
    numbers[3] = float("nan")
    other = layout_of_pairs(2, 3, 6, 7)
    heads = layout_of_pairs(0, 0, 0, 0, (4,))
    narrow = change.support._replace(ranks=torch.zeros(2, 1, dtype=torch.int64))
    fewer = random_values("bfloat16", counted(change.layout, some), 1)
    scaled = Layout(change.layout.shapes, change.layout.pairs, 2, 2.0)
    changes = (
        change._replace(base=good.base),
        change._replace(ranks_told="sent"),
        change._replace(masks_told="sent"),
        change._replace(ranks_told=Seed(1, True)),
        change._replace(support=masked),
        change._replace(support=narrow),
        change._replace(support=some, values=fewer),
        change._replace(values=change.values._replace(data=numbers)),
        change._replace(layout=scaled),
        random_base(SMALL, 0, 0, "float32", 1).change,  # dense, but not since the start
        random_base(other, 0, 2, "float32", 1).change,
        good._replace(base=None),  # with the heads
    )
    for base in (Base(-1, change), Base(2**32, change), *(Base(since, bad) for bad in changes)):
        with pytest.raises(WireError):
            encode(good._replace(base=base))
    plain = Payload(heads, Support(heads.names, None, {}), random_values("int8", 4, 0),
                    "known", "sent")  # fmt: skip
    with pytest.raises(WireError, match="without pairs"):
        encode(plain._replace(base=random_base(heads, 1, 1, "float32", 1)))
    with pytest.raises(WireError, match="without pairs"):
        decode(enveloped(1, 1, encode(plain), 0, encode(plain)), heads)


def test_a_claimed_rank_must_be_paid_for_in_bytes() -> None:
    """The rank is the one size that comes from outside: few bytes must not make many numbers."""
    layout = layout_of_pairs(2, 4, 512, 512)
    dense = Support(layout.names, None, {})
    values = random_values("int8", layout.size, 0)
    message = encode(Payload(layout, dense, values, "known", "known"))
    for rank in (0, 200):  # what an int8 of zeros at this rank would need, without its zeros
        base = encode(silent(random_base(layout, 0, rank, "int8", 0)).change)
        data = enveloped(0, rank, base, 0, message)
        huge = enveloped(0, 65535, base, 0, message)
        for bad in (data, huge):
            with pytest.raises(WireError, match="takes"):
                decode(bad, layout)  # models are made once, and kept
            tracemalloc.start()
            with pytest.raises(WireError):
                decode(bad, layout)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 64 * 1024
        paid = Payload(layout, dense, values, "known", "known", silent(
            random_base(layout, 0, rank, "int8", 0)))  # fmt: skip
        data = encode(paid)
        decode(data, layout)
        tracemalloc.start()
        decode(data, layout)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 32 * max(len(data), layout.size)


def test_another_layout_is_refused_by_name() -> None:
    data = small_messages()["dense-int8"]
    other = layout_of_pairs(2, 4, 6, 5, (4,))
    with pytest.raises(WireError, match=f"for the layout {SMALL.fingerprint:08x}"):
        decode(data, other)


def test_other_knowledge_is_refused_by_the_checksum() -> None:
    """Two ends that hold different ranks or masks for known find out before they use the values."""
    ranks = torch.tensor([[0, 2], [0, 2]])
    sketch = random_masks(SMALL, Support(SMALL.names, ranks, {}), 0.5, 0)
    values = random_values("float32", counted(SMALL, sketch), 0)
    data = encode(Payload(SMALL, sketch, values, "known", "known"))
    decode(data, SMALL, sketch)
    moved = dict(sketch.masks)
    name = SMALL.names[1]
    moved[name] = moved[name].flip(1)
    assert not torch.equal(moved[name], sketch.masks[name])
    for other in (
        None,
        sketch._replace(ranks=torch.tensor([[0, 1], [0, 1]])),
        sketch._replace(ranks=None, masks={}),
        sketch._replace(masks=moved),
    ):
        with pytest.raises(WireError, match="knows other ranks or masks"):
            decode(data, SMALL, other)


@pytest.mark.parametrize("form", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused_by_name(form: str, wrong: float) -> None:
    support = Support(SMALL.names, None, {})
    values = random_values(form, SMALL.size, 0)  # type: ignore[arg-type]
    place = SMALL.shapes[SMALL.names[0]][0] + 2
    values.data[place] = wrong
    payload = Payload(SMALL, support, values, "known", "sent")
    with pytest.raises(WireError, match=f"{SMALL.names[1]} is not finite"):
        encode(payload)


@pytest.mark.parametrize(("form", "width"), [("float64", 8), ("float32", 4)])
def test_a_message_cannot_carry_what_is_not_finite(form: str, width: int) -> None:
    values = random_values(form, SMALL.size, 0)  # type: ignore[arg-type]
    data = encode(Payload(SMALL, Support(SMALL.names, None, {}), values, "known", "sent"))
    for last in (b"\x7f\xf0", b"\xff\xf8", b"\x7f\x80", b"\xff\xc0"):
        nan = bytes(width - 2) + last[::-1]
        bad = torch.frombuffer(bytearray(nan), dtype=values.data.dtype)
        if not bad.isfinite().all():
            with pytest.raises(WireError, match="not finite"):
                decode(mended(data[: -4 - width] + nan + data[-4:]), SMALL)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -1.0, -0.0, 3e36])
def test_scales_that_are_not_usable_are_refused(scale: float) -> None:
    values = random_values("int8", SMALL.size, 0)
    payload = Payload(SMALL, Support(SMALL.names, None, {}), values, "known", "sent")
    data = encode(payload)
    with pytest.raises(WireError, match="scale of"):
        encode(payload._replace(values=values._replace(scales=torch.tensor([scale]))))
    true = values.scales.numpy().tobytes()
    assert data.count(true) == 1
    false = torch.tensor([scale]).numpy().tobytes()
    with pytest.raises(WireError, match="scale"):
        decode(mended(data.replace(true, false)), SMALL)


def test_payloads_that_do_not_fit_their_layout_are_refused() -> None:
    support = Support(SMALL.names, None, {})
    values = random_values("int8", SMALL.size, 0)
    good = Payload(SMALL, support, values, "known", "sent")
    encode(good)
    name = SMALL.names[1]
    shape = SMALL.shapes[name]
    ranks = draw_ranks(5, 2, 3, 2, shared=True)
    low = values.data.clone()
    low[0] = -128
    for bad in (
        good._replace(values=values._replace(data=values.data[:-1])),
        good._replace(values=values._replace(data=values.data.float())),
        good._replace(values=values._replace(data=low)),
        good._replace(values=values._replace(scales=torch.ones(2))),
        good._replace(support=support._replace(names=(*SMALL.names[::-1],))),
        good._replace(support=support._replace(names=(*SMALL.names, "zebra"))),
        good._replace(support=support._replace(masks={"zebra": torch.ones(1, dtype=torch.bool)})),
        good._replace(support=support._replace(masks={name: torch.ones(shape)})),
        good._replace(support=support._replace(masks={name: torch.ones(1, dtype=torch.bool)})),
        good._replace(support=support._replace(ranks=torch.tensor([[0, 1]]))),
        good._replace(support=support._replace(ranks=torch.tensor([[1, 0], [0, 1]]))),
        good._replace(support=support._replace(ranks=torch.tensor([[0, 3], [0, 1]]))),
        good._replace(support=support._replace(ranks=ranks), ranks_told=Seed(6, True)),
        good._replace(ranks_told=Seed(2**64, True)),
    ):
        with pytest.raises(WireError):
            encode(bad)
