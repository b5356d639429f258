"""One message: a payload as bytes, and back.

    magic, version, kinds, fingerprint    10 bytes: what this is and for which layout
    ranks, names, masks told              only what the receiver does not know
    size of the coded symbols             4 bytes
    coded symbols                         masks, exponents, magnitudes: one stack of the coder
    raw values                            floats, scales, signs and mantissas
    checksum                              4 bytes

Decoding is hostile ground. Sizes come from the receiver's own layout, never from the message, so
nothing larger than the layout is allocated; every check that can fail raises WireError; and each
payload has exactly one encoding, so a message that decodes is the one its payload encodes to.

What a message leaves out because the receiver knows it goes into the checksum all the same: two
ends that know different supports find out, at no cost.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import compress
from math import prod
from typing import Literal, NamedTuple
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from fedsieve.algebra.adapter import Layout
from fedsieve.algebra.payload import BLOCK, Payload, Seed
from fedsieve.algebra.support import Support, draw_ranks, narrowed
from fedsieve.errors import WireError
from fedsieve.wire.coder import Jobs, seal, unseal
from fedsieve.wire.mask import Bits, put_masks, take_masks
from fedsieve.wire.values import KINDS, Parts, put_values, take_values

Shapes = Mapping[str, tuple[int, ...]]

MAGIC = b"FSV"
VERSION = 1

# How the ranks are told, in the order of the codes. "all" is `ranks is None` in a payload that
# says "sent"; a payload that says "known" leaves even that to the receiver.
RANKS = ("known", "all", "one set", "a set a pair", "seed, one draw", "seed, a draw a pair")
MASKS = ("known", "none", "all", "some")

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}

FIXED = 10  # bytes up to and with the fingerprint
AROUND = FIXED + 4 + 4  # the fewest bytes of a message


class Unsaid(NamedTuple):
    """What a message leaves out because its receiver knows it; empty where the message tells."""

    ranks: Tensor | None
    masks: dict[str, Bits]


def encode(payload: Payload) -> bytes:
    """The message that says this payload. `decode` gives exactly the payload back.

    Raises WireError, naming the tensor, if a value is not finite, or if the payload does not fit
    its own layout or has something beside it, which only an envelope can carry.
    """
    layout, support, values, ranks_told, masks_told, base, control = payload
    if base is not None or control is not None:
        raise WireError("an envelope within an envelope: one message carries one at most")
    _check_names(layout, support.names)
    _check_ranks(layout, support.ranks)
    shapes = narrowed(layout, support.ranks).shapes
    masks = _checked_masks(support, shapes)
    parts = _parts(support.names, shapes, masks)
    _check_values(payload, sum(size for _, size in parts))

    ranks_code, ranks_bytes = _tell_ranks(layout, support.ranks, ranks_told)
    names_code, names_bytes = _tell_names(layout, support.names)
    masks_code, masks_bytes = _tell_masks(support.names, masks, masks_told)
    jobs: Jobs = []
    if masks_told == "sent":
        put_masks(jobs, list(masks.values()), _axes(layout, masks))
    kind, raw = put_values(jobs, values, parts, masked=bool(masks))
    coded = seal(jobs)
    message = b"".join(
        (
            MAGIC,
            bytes((VERSION, kind | ranks_code << 4, masks_code | names_code << 4)),
            layout.fingerprint.to_bytes(4, "little"),
            ranks_bytes,
            names_bytes,
            masks_bytes,
            len(coded).to_bytes(4, "little"),
            coded,
            raw,
        )
    )
    unsaid = Unsaid(
        support.ranks if ranks_told == "known" else None, masks if masks_told == "known" else {}
    )
    return message + _checksum(message, layout, unsaid)


def decode(data: bytes, layout: Layout, known: Support | None = None) -> Payload:
    """The payload that a message says, for a receiver that holds this layout.

    known: what the receiver knows already: its ranks stand in for ranks, and its masks for masks,
    that the message does not tell. None knows of all ranks and no masks.

    Raises WireError if the bytes are not a message for this layout and this knowledge.
    """
    data = bytes(data)
    reader = _Reader(memoryview(data))
    kind, ranks_code, masks_code, names_code = _read_fixed(reader, layout)
    ranks = known.ranks if known and ranks_code == 0 else None
    masks_known = known.masks if known and masks_code == 0 else {}
    _check_ranks(layout, ranks)

    # The names come after the ranks, and the checksum needs both to know what is left unsaid.
    ranks_told: Literal["known", "sent"] | Seed = "known"
    if ranks_code != 0:
        ranks, ranks_told = _read_ranks(reader, layout, ranks_code)
    names = _read_names(reader, layout, names_code)
    shapes = narrowed(layout, ranks).shapes
    kept = Support(names, ranks, {n: masks_known[n] for n in names if n in masks_known})
    masks = _checked_masks(kept, shapes)
    unsaid = Unsaid(ranks if ranks_code == 0 else None, masks)
    if data[-4:] != _checksum(data[:-4], layout, unsaid):
        raise WireError(
            "the checksum is wrong: the message is damaged, or its sender believes that this end "
            "knows other ranks or masks than it does"
        )

    masked = _read_masked(reader, names, masks_code)
    stack = unseal(bytes(reader.take(int.from_bytes(reader.take(4), "little"))))
    if masks_code != 0:
        told = take_masks(stack, [shapes[n] for n in masked], _axes(layout, masked))
        masks = dict(zip(masked, told, strict=True))
    raw = reader.rest()
    values = take_values(stack, kind, raw, _parts(names, shapes, masks), masked=bool(masks))
    if not stack.is_empty():
        raise WireError("coded symbols are left over: this message is damaged")
    tensors = kept.masks if masks_code == 0 else {n: torch.from_numpy(m) for n, m in masks.items()}
    masks_told: Literal["known", "sent"] = "known" if masks_code == 0 else "sent"
    return Payload(layout, Support(names, ranks, tensors), values, ranks_told, masks_told)


@dataclass
class _Reader:
    """The bytes of a message, taken from the front; the checksum is not for taking."""

    data: memoryview
    place: int = 0

    def take(self, size: int) -> memoryview:
        stop = self.place + size
        if stop > len(self.data) - 4:
            raise WireError(f"the message ends early: {len(self.data)} bytes")
        part = self.data[self.place : stop]
        self.place = stop
        return part

    def rest(self) -> memoryview:
        return self.take(len(self.data) - 4 - self.place)


def _read_fixed(reader: _Reader, layout: Layout) -> tuple[int, int, int, int]:
    if len(reader.data) < AROUND:
        raise WireError(f"{len(reader.data)} bytes are too few for a message")
    if reader.take(3) != MAGIC:
        raise WireError("these bytes are not a message: they do not start with FSV")
    version, first, second = reader.take(3)
    if version != VERSION:
        raise WireError(f"a message of version {version}; this program reads version {VERSION}")
    theirs = int.from_bytes(reader.take(4), "little")
    if theirs != layout.fingerprint:
        raise WireError(
            f"a message for the layout {theirs:08x}; this end holds {layout.fingerprint:08x} "
            f"({len(layout.names)} tensors, rank {layout.rank}): both must train the same adapter"
        )
    kind, ranks_code, masks_code, names_code = first & 15, first >> 4, second & 15, second >> 4
    codes = (kind, len(KINDS)), (ranks_code, len(RANKS)), (masks_code, len(MASKS)), (names_code, 2)
    if any(code >= count for code, count in codes):
        raise WireError(f"unknown codes {first:02x} {second:02x} in the head of a message")
    return kind, ranks_code, masks_code, names_code


def _checksum(message: bytes, layout: Layout, unsaid: Unsaid) -> bytes:
    """CRC-32 of what the message leaves unsaid, and then of the message."""
    check = 0
    if unsaid.ranks is not None:
        check = crc32(_pack(_index_bits(unsaid.ranks, layout.rank)))
    for mask in unsaid.masks.values():
        check = crc32(_pack(mask), check)
    return crc32(message, check).to_bytes(4, "little")


def _tell_ranks(
    layout: Layout, ranks: Tensor | None, told: Literal["known", "sent"] | Seed
) -> tuple[int, bytes]:
    if isinstance(told, Seed):
        code = RANKS.index("seed, one draw" if told.shared else "seed, a draw a pair")
        keep = 0 if ranks is None else ranks.shape[1]
        if not 0 <= told.word < 1 << 64:
            raise WireError(f"the seed {told.word} of the ranks is not an unsigned 64-bit word")
        if ranks is not None and not torch.equal(ranks, _drawn(layout, told, keep)):
            raise WireError("the ranks are not those that their seed draws")
        return code, told.word.to_bytes(8, "little") + keep.to_bytes(2, "little")
    if told == "known":
        return RANKS.index("known"), b""
    if ranks is None:
        return RANKS.index("all"), b""
    bits = _index_bits(ranks, layout.rank)
    if _all_same(bits):
        return RANKS.index("one set"), _pack(bits[0])
    return RANKS.index("a set a pair"), _pack(bits)


def _read_ranks(
    reader: _Reader, layout: Layout, code: int
) -> tuple[Tensor | None, Literal["sent"] | Seed]:
    how = RANKS[code]
    if how == "all":
        return None, "sent"
    if how.startswith("seed"):
        word = int.from_bytes(reader.take(8), "little")
        keep = int.from_bytes(reader.take(2), "little")
        seed = Seed(word, how == "seed, one draw")
        if keep > layout.rank or (keep and not layout.pairs):
            raise WireError(f"a seed for {keep} of {layout.rank} ranks")
        return (_drawn(layout, seed, keep) if keep else None), seed
    pairs, rank = len(layout.pairs), layout.rank
    if not pairs * rank:
        raise WireError("index sets for a layout without ranks")
    rows = 1 if how == "one set" else pairs
    bits = _unpack(reader, rows * rank).reshape(rows, rank)
    keep = int(np.count_nonzero(bits[0]))
    if keep == 0 or np.any(np.count_nonzero(bits, axis=1) != keep):
        raise WireError("index sets that are empty or differ in size")
    if how == "a set a pair" and _all_same(bits):
        raise WireError("equal index sets are not sent as one: this message is damaged")
    ranks = torch.from_numpy(np.nonzero(bits)[1].reshape(rows, keep).astype(np.int64))
    return ranks.expand(pairs, keep).contiguous(), "sent"


def _drawn(layout: Layout, seed: Seed, keep: int) -> Tensor:
    return draw_ranks(seed.word, len(layout.pairs), layout.rank, keep, shared=seed.shared)


def _index_bits(ranks: Tensor, rank: int) -> Bits:
    """Index sets as bits: (pairs, rank)."""
    bits = np.zeros((ranks.shape[0], rank), np.bool_)
    np.put_along_axis(bits, ranks.cpu().numpy(), True, axis=1)
    return bits


def _all_same(bits: Bits) -> bool:
    return bool((bits == bits[0]).all())


def _tell_names(layout: Layout, names: tuple[str, ...]) -> tuple[int, bytes]:
    if names == layout.names:
        return 0, b""
    kept = set(names)
    return 1, _pack(np.array([name in kept for name in layout.names]))


def _read_names(reader: _Reader, layout: Layout, code: int) -> tuple[str, ...]:
    if code == 0:
        return layout.names
    bits = _unpack(reader, len(layout.names))
    if bits.all():
        raise WireError("a list of names that leaves none out: this message is damaged")
    return tuple(compress(layout.names, bits))


def _tell_masks(
    names: tuple[str, ...], masks: dict[str, Bits], told: Literal["known", "sent"]
) -> tuple[int, bytes]:
    if told == "known":
        return MASKS.index("known"), b""
    if not masks:
        return MASKS.index("none"), b""
    if len(masks) == len(names):
        return MASKS.index("all"), b""
    return MASKS.index("some"), _pack(np.array([name in masks for name in names]))


def _read_masked(reader: _Reader, names: tuple[str, ...], code: int) -> tuple[str, ...]:
    """The tensors whose masks the message holds."""
    how = MASKS[code]
    if how in ("known", "none"):
        return ()
    if how == "all":
        if not names:
            raise WireError("masks of all of no tensors: this message is damaged")
        return names
    bits = _unpack(reader, len(names))
    if bits.all() or not bits.any():
        raise WireError("a list of masks that has all or none: this message is damaged")
    return tuple(compress(names, bits))


def _pack(bits: Bits) -> bytes:
    """Bits, eight a byte, the first in the lowest place; zeros fill the last byte."""
    return np.packbits(bits, bitorder="little").tobytes()


def _unpack(reader: _Reader, count: int) -> Bits:
    packed = np.frombuffer(reader.take((count + 7) // 8), np.uint8)
    bits = np.unpackbits(packed, bitorder="little").astype(np.bool_)
    if bits[count:].any():
        raise WireError("bits are set after the end of a list: this message is damaged")
    return bits[:count]


def _axes(layout: Layout, names: Iterable[str]) -> list[int]:
    """Of each tensor the axis along which its mask has rows: the ranks', or the first."""
    return [layout.rank_axis.get(name, (0, 0))[1] for name in names]


def _parts(names: tuple[str, ...], shapes: Shapes, masks: dict[str, Bits]) -> Parts:
    """How many values of each tensor travel."""
    return [
        (name, int(np.count_nonzero(masks[name])) if name in masks else prod(shapes[name]))
        for name in names
    ]


def _check_names(layout: Layout, names: tuple[str, ...]) -> None:
    strange = set(names) - set(layout.names)
    if strange:
        raise WireError(f"{min(strange)} is not in the layout")
    if names != tuple(sorted(set(names))):
        raise WireError("the names of a support must be sorted, each once")


def _check_ranks(layout: Layout, ranks: Tensor | None) -> None:
    if ranks is None:
        return
    pairs, rank = len(layout.pairs), layout.rank
    if ranks.dtype != torch.int64 or ranks.ndim != 2 or len(ranks) != pairs or not pairs:
        raise WireError(f"ranks must be ({pairs}, k) int64, not {tuple(ranks.shape)} {ranks.dtype}")
    keep = ranks.shape[1]
    if not 1 <= keep <= min(rank, 0xFFFF):
        raise WireError(
            f"{keep} ranks kept of {rank}: at least 1 and at most all of them, or 65535"
        )
    index = ranks.cpu().numpy()
    if index.min() < 0 or index.max() >= rank or (np.diff(index, axis=1) <= 0).any():
        raise WireError(f"the ranks of each pair must rise within 0..{rank - 1}")


def _checked_masks(support: Support, shapes: Shapes) -> dict[str, Bits]:
    """The masks as arrays, in the order of the names."""
    masks: dict[str, Bits] = {}
    for name in support.names:
        if name in support.masks:
            mask = support.masks[name]
            if mask.dtype != torch.bool or tuple(mask.shape) != shapes[name]:
                raise WireError(
                    f"the mask of {name} must be bool {shapes[name]}, "
                    f"not {mask.dtype} {tuple(mask.shape)}"
                )
            masks[name] = mask.cpu().numpy()
    if len(masks) < len(support.masks):
        strange = min(set(support.masks) - set(masks))
        raise WireError(f"a mask for {strange}, which does not travel")
    return masks


def _check_values(payload: Payload, count: int) -> None:
    form, data, scales = payload.values
    if form not in DTYPES or data.dtype != DTYPES[form] or tuple(data.shape) != (count,):
        raise WireError(
            f"the support holds {count} entries; the values are {tuple(data.shape)} {data.dtype} "
            f"in the form {form}"
        )
    blocks = -(-count // BLOCK) if form == "int8" else 0
    if tuple(scales.shape) != (blocks,) or scales.dtype != torch.float32:
        raise WireError(f"{blocks} float32 scales must come with {count} values in the form {form}")
