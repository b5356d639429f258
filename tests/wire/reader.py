"""A second reader of messages, in plain Python, from docs/wire.md and from nothing else.

It shares no line with the package and uses neither numpy nor constriction, so it shows that the
page is enough to write a decoder, and that our bytes do not depend on a library's float arithmetic.
It is slow, and it trusts its message: hostile bytes are the other decoder's business.
"""

import hashlib
import json
import struct
from itertools import accumulate
from math import ceil, pi, prod, sin
from typing import NamedTuple
from zlib import crc32

Shape = tuple[int, ...]

SHARES = [round(2**20 / 2 ** ((level + 0.5) / 2)) for level in range(30)]
WEIGHTS = [round(2**20 / 2 ** (level / 2)) for level in range(31)] + [0]
DENSITIES = [round(65536 * sin(pi * (2 * s - 1) / 56) ** 2) for s in range(1, 15)]
SLOPES = [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256]


class Spec(NamedTuple):
    """The layout as docs/wire.md tells it: shapes by name, pairs (module, A, B), and r."""

    shapes: dict[str, Shape]
    pairs: list[tuple[str, str, str]]
    rank: int


class Message(NamedTuple):
    """What a message says; numbers are floats, ints for int8, masks are flat lists."""

    names: list[str]
    ranks: list[list[int]] | None
    masks: dict[str, list[int]]
    values: list[float]
    scales: list[float]


class Stack:
    def __init__(self, data: bytes) -> None:
        padded = data + bytes(-len(data) % 4)
        self.words = list(struct.unpack(f"<{len(padded) // 4}I", padded))
        self.state = self.words.pop() if self.words else 0
        if self.words:
            self.state = self.state << 32 | self.words.pop()

    def take(self, shares: list[int]) -> int:
        assert sum(shares) == 2**24
        u = self.state % 2**24
        below = [0, *accumulate(shares)]
        symbol = max(s for s in range(len(shares)) if below[s] <= u)
        self.state = (self.state >> 24) * shares[symbol] + u - below[symbol]
        if self.state < 2**32 and self.words:
            self.state = self.state << 32 | self.words.pop()
        return symbol


def shares(weights: list[int]) -> list[int]:
    rest = 2**24 - len(weights)
    result = [1 + w * rest // sum(weights) for w in weights]
    result[weights.index(max(weights))] += 2**24 - sum(result)
    return result


def uniform(size: int) -> list[int]:
    return [2**24 // size] * size


def histogram(stack: Stack, count: int, size: int) -> list[int]:
    if count == 0:
        return []
    low = stack.take(uniform(size))
    span = stack.take(uniform(size))
    if span == 0:
        return [low] * count
    steps = shares([2 + (64 >> min(d, 32 - d)) for d in range(32)])
    levels = [0]
    for _ in range(span + 1):
        levels.append((levels[-1] + stack.take(steps)) % 32)
    model = shares([WEIGHTS[level] for level in levels[1:]])
    return [low + stack.take(model) for _ in range(count)]


def bits_of(data: bytes, count: int) -> list[int]:
    bits = [byte >> i & 1 for byte in data for i in range(8)]
    assert not any(bits[count:])
    return bits[:count]


def packed(bits: list[int]) -> bytes:
    filled = bits + [0] * (-len(bits) % 8)
    return bytes(
        sum(b << i for i, b in enumerate(filled[p : p + 8])) for p in range(0, len(filled), 8)
    )


def draw(seed: int, pair: int, rank: int, keep: int) -> list[int]:
    tickets = [
        hashlib.blake2b(struct.pack("<QII", seed, pair, i), digest_size=8).digest()
        for i in range(rank)
    ]
    return sorted(sorted(range(rank), key=lambda i: tickets[i])[:keep])


def read(
    data: bytes,
    spec: Spec,
    known_ranks: list[list[int]] | None = None,
    known_masks: dict[str, list[int]] | None = None,
) -> Message:
    """The content of a message; asserts that it is one."""
    names = sorted(spec.shapes)
    place = 10

    def take(size: int) -> bytes:
        nonlocal place
        place += size
        assert place <= len(data) - 4
        return data[place - size : place]

    assert data[:4] == b"FSV\1"
    text = json.dumps([spec.rank, [[n, list(spec.shapes[n])] for n in names], spec.pairs])
    assert data[6:10] == hashlib.blake2b(text.encode(), digest_size=4).digest()
    kind, ranks_code, masks_code, named = data[4] & 15, data[4] >> 4, data[5] & 15, data[5] >> 4

    pairs, rank = len(spec.pairs), spec.rank
    ranks: list[list[int]] | None = None
    if ranks_code == 0:
        ranks = known_ranks
    elif ranks_code in (2, 3):
        rows = 1 if ranks_code == 2 else pairs
        bits = bits_of(take(ceil(rows * rank / 8)), rows * rank)
        sets = [[i for i in range(rank) if bits[row * rank + i]] for row in range(rows)]
        ranks = sets * (pairs // rows)
    elif ranks_code in (4, 5):
        seed, keep = struct.unpack("<QH", take(10))
        if keep:
            ranks = [draw(seed, p if ranks_code == 5 else 0, rank, keep) for p in range(pairs)]
    if named:
        kept = bits_of(take(ceil(len(names) / 8)), len(names))
        names = [name for name, keep in zip(names, kept, strict=True) if keep]

    check = 0
    if ranks_code == 0 and ranks is not None:
        check = crc32(packed([int(i in row) for row in ranks for i in range(rank)]))
    masked: list[str] = []
    masks: dict[str, list[int]] = {}
    if masks_code == 0:
        masks = {n: known_masks[n] for n in names if n in known_masks} if known_masks else {}
        for mask in masks.values():
            check = crc32(packed(mask), check)
    elif masks_code == 2:
        masked = names
    elif masks_code == 3:
        has = bits_of(take(ceil(len(names) / 8)), len(names))
        masked = [name for name, bit in zip(names, has, strict=True) if bit]
    assert int.from_bytes(data[-4:], "little") == crc32(data[:-4], check)

    stack = Stack(take(int.from_bytes(take(4), "little")))
    shapes = {n: narrow(n, spec, len(ranks[0]) if ranks else rank) for n in names}
    if masked:
        masks = read_masks(stack, {n: shapes[n] for n in masked}, {b for _, _, b in spec.pairs})
    sizes = [sum(masks[n]) if n in masks else prod(shapes[n]) for n in names]
    raw = data[place:-4]
    values, scales = read_values(stack, kind, raw, sizes, masked=bool(masks))
    assert stack.state == 0
    assert not stack.words
    return Message(names, ranks, masks, values, scales)


class Envelope(NamedTuple):
    """A message with a change of the base: factors of the rank, or dense if it is 0."""

    since: int
    rank: int
    change: Message
    message: Message


def read_envelope(
    data: bytes,
    spec: Spec,
    known_ranks: list[list[int]] | None = None,
    known_masks: dict[str, list[int]] | None = None,
) -> Envelope:
    """The content of a message that starts with FSB; asserts that it is one."""
    assert data[:4] == b"FSB\1"
    since, rank, size = struct.unpack("<IHQ", data[4:18])
    assert int.from_bytes(data[-4:], "little") == crc32(data[:-4])
    theirs = base_spec(spec, rank)
    numbers = sum(map(prod, theirs.shapes.values()))
    stop = 18 + size + max(0, (numbers + 1) // 2 - sum(map(prod, spec.shapes.values())) - size)
    assert not any(data[18 + size : stop])
    base = data[18 : 18 + size]
    assert base[4] >> 4 == 0
    assert base[5] == 0
    change = read(base, theirs)
    return Envelope(since, rank, change, read(data[stop:-4], spec, known_ranks, known_masks))


def read_control(
    data: bytes,
    spec: Spec,
    known_ranks: list[list[int]] | None = None,
    known_masks: dict[str, list[int]] | None = None,
) -> tuple[Message, Message]:
    """The control variates and the message of what starts with FSC; asserts that it is one."""
    assert data[:4] == b"FSC\1"
    assert int.from_bytes(data[-4:], "little") == crc32(data[:-4])
    stop = 12 + int.from_bytes(data[4:12], "little")
    control = data[12:stop]
    assert control[4] >> 4 == 0
    assert control[5] == 0
    return read(control, spec), read(data[stop:-4], spec, known_ranks, known_masks)


def base_spec(spec: Spec, rank: int) -> Spec:
    if rank == 0:
        dense = {
            f"{module}.base": spec.shapes[b][:1] + spec.shapes[a][1:] for module, a, b in spec.pairs
        }
        return Spec(dense, [], 0)
    factors = {}
    for _, a, b in spec.pairs:
        factors[a] = (rank, *spec.shapes[a][1:])
        factors[b] = (spec.shapes[b][0], rank, *spec.shapes[b][2:])
    return Spec(factors, spec.pairs, rank)


def narrow(name: str, spec: Spec, keep: int) -> Shape:
    shape = list(spec.shapes[name])
    for _, a, b in spec.pairs:
        if name == a:
            shape[0] = keep
        if name == b:
            shape[1] = keep
    return tuple(shape)


def read_masks(stack: Stack, shapes: dict[str, Shape], turned: set[str]) -> dict[str, list[int]]:
    limits = [round(65536 * sin(pi * s / 28) ** 2) for s in range(1, 14)]
    lines: list[int] = []
    for name, shape in shapes.items():
        entries = prod(shape)
        if entries:
            rows = 1 if not shape else shape[1] if name in turned else shape[0]
            line = entries // rows * ceil(64 / (entries // rows))
            lines += [line] * (entries // line) + ([entries % line] if entries % line else [])
    steps = histogram(stack, len(lines), 16)
    bits: list[int] = []
    for step, line in zip(steps, lines, strict=True):
        if step in (0, 15):
            ones = [step // 15] * line
        else:
            density = DENSITIES[step - 1]
            model = shares(
                [
                    density ** s.bit_count() * (65536 - density) ** (4 - s.bit_count()) >> 32
                    for s in range(16)
                ]
            )
            fours = [stack.take(model) for _ in range(ceil(line / 4))]
            filled = [four >> i & 1 for four in fours for i in range(4)]
            assert not any(filled[line:])
            ones = filled[:line]
            assert step == 1 + sum(limit <= (sum(ones) << 16) // line for limit in limits)
        bits += ones
    masks: dict[str, list[int]] = {}
    for name, shape in shapes.items():
        part, bits = bits[: prod(shape)], bits[prod(shape) :]
        if name in turned:
            outer, inner, rest = shape[0], shape[1], prod(shape[2:])
            part = [
                part[(j * outer + i) * rest + x]
                for i in range(outer)
                for j in range(inner)
                for x in range(rest)
            ]
        masks[name] = part
    return masks


def groups(sizes: list[int], least: int) -> list[int]:
    result: list[int] = []
    size = 0
    for part in sizes:
        size += part
        if size >= least:
            result.append(size)
            size = 0
    return result + ([size] if size else [])


def read_values(
    stack: Stack, kind: int, raw: bytes, sizes: list[int], *, masked: bool
) -> tuple[list[float], list[float]]:
    count = sum(sizes)
    if kind < 2:
        return list(struct.unpack(f"<{count}{'df'[kind]}", raw)), []
    if kind == 2:
        exponents = [e for size in groups(sizes, 256) for e in histogram(stack, size, 256)]
        words = [
            (rest >> 7) << 31 | exponent << 23 | (rest & 127) << 16
            for rest, exponent in zip(raw, exponents, strict=True)
        ]
        return list(struct.unpack(f"<{count}f", struct.pack(f"<{count}I", *words))), []
    blocks = ceil(count / 128)
    width = 4 if kind == 3 else 2
    told, signs = raw[: width * blocks], raw[width * blocks :]
    if kind == 4:
        told = b"".join(b"\0\0" + told[i : i + 2] for i in range(0, len(told), 2))
    scales = list(struct.unpack(f"<{blocks}f", told))
    if masked:
        magnitudes = read_blocks(stack, count)
    else:
        magnitudes = [m for size in groups(sizes, 1024) for m in histogram(stack, size, 128)]
    negative = iter(bits_of(signs, sum(m > 0 for m in magnitudes)))
    return [-m if m and next(negative) else m for m in magnitudes], scales


def read_blocks(stack: Stack, count: int) -> list[int]:
    blocks = ceil(count / 128)
    lows = [stack.take(uniform(128)) for _ in range(blocks)]
    slopes = [stack.take(uniform(16)) for _ in range(blocks)]
    magnitudes: list[int] = []
    for block in range(blocks):
        size = min(128, count - 128 * block)
        low, slope = lows[block], slopes[block]
        span = 127 - low
        if span == 0:
            magnitudes += [127] * size
            continue
        keep = 0 if slope == 15 else max(0, 65536 - (SLOPES[slope] << 15) // span)
        weights = [2**32]
        for _ in range(span):
            weights.append(weights[-1] * keep >> 16)
        weights[span] += sum(weights) >> 7
        model = shares(weights)
        magnitudes += [low + stack.take(model) for _ in range(size)]
    return magnitudes
