"""Values on the wire: floats as they are, or as few bits as their sizes need.

float32 and float64 stay raw, exactly 4 and 8 bytes a number: dense float32 is what savings are
quoted against, so it must cost what anybody's float32 costs. Of a bfloat16 the sign and mantissa
are noise and stay raw; its exponent is coded with a histogram per group of tensors. Of an int8 the
sign stays raw. Its magnitude is coded with a histogram per group of tensors if no tensor is masked,
else block by block with a falling slope that starts at the block's smallest magnitude: top-k leaves
no small ones, so the blocks start at different heights, and few values are left to count.
"""

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsieve.algebra.payload import BLOCK, Form, Values
from fedsieve.errors import WireError
from fedsieve.wire.coder import (
    Jobs,
    Model,
    Stack,
    Symbols,
    model,
    put_histogram,
    table,
    take_histogram,
    uniform,
)

Parts = list[tuple[str, int]]  # names of tensors, and how many values of each travel

# The kinds of value sections. An int8 section is "short" if its scales all fit bfloat16.
KINDS = ("float64", "float32", "bfloat16", "int8", "int8 short")
FORMS: tuple[Form, ...] = ("float64", "float32", "bfloat16", "int8", "int8")
BFLOAT16, INT8, SHORT = 2, 3, 4
RAW = (np.dtype("<f8"), np.dtype("<f4"))

GROUP = {BFLOAT16: 256, INT8: 1024}  # values: smaller tensors share a histogram
NOT_FINITE = 255  # the exponent of infinities and of what is not a number
TOP = 127  # the largest magnitude of the int8 form

# Slope s falls by about a factor exp(-SLOPES[s] / 2) from a block's smallest magnitude to 127; the
# 16th has the smallest only. FALLS[s] is the mean place between the two, in units of 2**-16, at
# which slope s ends and s + 1 begins.
SLOPES = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256)
FALLS = np.array(
    [31404, 28938, 26241, 23750, 20562, 16801, 12885, 9395, 6685, 4730, 3344, 2365, 1448, 724, 128]
)


def put_values(jobs: Jobs, values: Values, parts: Parts, *, masked: bool) -> tuple[int, bytes]:
    """Code values: the kind of the section, and the bytes that stay raw.

    Raises WireError if a value or a scale is not finite, naming the tensor, or not of the form.
    """
    kind = FORMS.index(values.form)
    if kind < BFLOAT16:
        numbers = values.data.numpy()
        _refuse(~np.isfinite(numbers), parts, "is not finite")
        return kind, numbers.astype(RAW[kind]).tobytes()
    if kind == BFLOAT16:
        return kind, _put_bfloat16(jobs, values.data, parts)
    return _put_int8(jobs, values, parts, masked=masked)


def take_values(stack: Stack, kind: int, raw: memoryview, parts: Parts, *, masked: bool) -> Values:
    """The values that `put_values` coded. Raises WireError for other bytes, or too many or few."""
    count = sum(size for _, size in parts)
    if kind < BFLOAT16:
        _exact_size(raw, count * RAW[kind].itemsize)
        numbers = np.frombuffer(raw, RAW[kind]).astype(RAW[kind].newbyteorder("="))
        _refuse(~np.isfinite(numbers), parts, "is not finite")
        return Values(FORMS[kind], torch.from_numpy(numbers), torch.empty(0))
    if kind == BFLOAT16:
        return Values("bfloat16", _take_bfloat16(stack, raw, parts), torch.empty(0))
    return _take_int8(stack, kind, raw, parts, masked=masked)


def _put_bfloat16(jobs: Jobs, data: Tensor, parts: Parts) -> bytes:
    words = data.view(torch.int16).numpy()
    exponents = (words >> 7).astype(np.int32) & 255
    _refuse(exponents == NOT_FINITE, parts, "is not finite")
    start = 0
    for size in _groups(parts, GROUP[BFLOAT16]):
        put_histogram(jobs, exponents[start : start + size], 256)
        start += size
    return ((words >> 8 & 128) | (words & 127)).astype(np.uint8).tobytes()


def _take_bfloat16(stack: Stack, raw: memoryview, parts: Parts) -> Tensor:
    _exact_size(raw, sum(size for _, size in parts))
    rest = np.frombuffer(raw, np.uint8).astype(np.int16)
    exponents = np.zeros(rest.size, np.int16)
    start = 0
    for size in _groups(parts, GROUP[BFLOAT16]):
        exponents[start : start + size] = take_histogram(stack, size, 256)
        start += size
    _refuse(exponents == NOT_FINITE, parts, "is not finite")
    words = (rest & 128) << 8 | exponents << 7 | (rest & 127)
    return torch.from_numpy(words).view(torch.bfloat16)


def _groups(parts: Parts, least: int) -> list[int]:
    """Sizes of the runs of tensors that share a histogram: `least` or more, but for the last."""
    groups: list[int] = []
    open_size = 0
    for _, size in parts:
        open_size += size
        if open_size >= least:
            groups.append(open_size)
            open_size = 0
    return [*groups, open_size] if open_size else groups


def _put_int8(jobs: Jobs, values: Values, parts: Parts, *, masked: bool) -> tuple[int, bytes]:
    scales = values.scales.numpy()
    _refuse_scales(scales, parts)
    data = values.data.numpy()
    _refuse(data < -TOP, parts, "is -128, which the int8 form does not have")
    magnitudes = np.abs(data).astype(np.int32)
    if masked:
        _put_blocks(jobs, magnitudes)
    else:
        start = 0
        for size in _groups(parts, GROUP[INT8]):
            put_histogram(jobs, magnitudes[start : start + size], TOP + 1)
            start += size
    signs = np.packbits(data[magnitudes > 0] < 0, bitorder="little").tobytes()
    halves = scales.astype("<f4").view("<u2").reshape(-1, 2)
    if halves[:, 0].any():
        return INT8, halves.tobytes() + signs
    return SHORT, halves[:, 1].tobytes() + signs


def _put_blocks(jobs: Jobs, magnitudes: Symbols) -> None:
    if magnitudes.size == 0:
        return
    sizes = _block_sizes(magnitudes.size)
    lows, slopes = _shapes(magnitudes, sizes)
    jobs.append((lows, uniform(128)))
    jobs.append((slopes, uniform(16)))
    heights = magnitudes - np.repeat(lows, sizes)
    for block, (low, slope) in enumerate(zip(lows.tolist(), slopes.tolist(), strict=True)):
        if low < TOP:
            symbols = heights[block * BLOCK : (block + 1) * BLOCK]
            jobs.append((symbols, _slope(TOP - low, slope)))


def _take_blocks(stack: Stack, count: int) -> Symbols:
    heights = np.zeros(count, np.int32)
    if count == 0:
        return heights
    sizes = _block_sizes(count)
    lows: Symbols = stack.decode(uniform(128), sizes.size)
    slopes: Symbols = stack.decode(uniform(16), sizes.size)
    shapes = zip(lows.tolist(), slopes.tolist(), sizes.tolist(), strict=True)
    for block, (low, slope, size) in enumerate(shapes):
        start = block * BLOCK
        if low < TOP:
            heights[start : start + size] = stack.decode(_slope(TOP - low, slope), size)
    magnitudes: Symbols = heights + np.repeat(lows, sizes)
    true_lows, true_slopes = _shapes(magnitudes, sizes)
    if not (np.array_equal(lows, true_lows) and np.array_equal(slopes, true_slopes)):
        raise WireError("a block of values is not as it says: this message is damaged")
    return magnitudes


def _take_int8(stack: Stack, kind: int, raw: memoryview, parts: Parts, *, masked: bool) -> Values:
    count = sum(size for _, size in parts)
    sizes = _block_sizes(count)
    width = 4 if kind == INT8 else 2
    if len(raw) < width * sizes.size:
        raise WireError("the message ends before its scales do")
    halves = np.zeros((sizes.size, 2), "<u2")
    told = np.frombuffer(raw[: width * sizes.size], "<u2").reshape(-1, width // 2)
    halves[:, -width // 2 :] = told
    if kind == INT8 and not halves[:, 0].any():
        raise WireError("scales that fit bfloat16 are not sent short: this message is damaged")
    scales = halves.view("<f4").reshape(-1).astype(np.float32)
    _refuse_scales(scales, parts)
    if masked:
        magnitudes = _take_blocks(stack, count)
    else:
        groups = [take_histogram(stack, n, TOP + 1) for n in _groups(parts, GROUP[INT8])]
        magnitudes = np.concatenate([np.zeros(0, np.int32), *groups])
    present = magnitudes > 0
    signed = int(np.count_nonzero(present))
    packed = raw[width * sizes.size :]
    _exact_size(packed, (signed + 7) // 8)
    bits = np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little")
    if bits[signed:].any():
        raise WireError("bits are set after the last sign: this message is damaged")
    data = magnitudes.astype(np.int8)
    data[present] *= 1 - 2 * bits[:signed].astype(np.int8)
    return Values("int8", torch.from_numpy(data), torch.from_numpy(scales))


def _block_sizes(count: int) -> NDArray[np.int64]:
    sizes = np.full(-(-count // BLOCK), BLOCK)
    if count % BLOCK:
        sizes[-1] = count % BLOCK
    return sizes


def _shapes(magnitudes: Symbols, sizes: NDArray[np.int64]) -> tuple[Symbols, Symbols]:
    """Of each block its smallest magnitude and its slope.

    The slope follows from the mean height above the smallest. One entry of 127 is left out of it:
    the largest entry of a block makes the scale, so it is 127 whatever the slope.
    """
    starts = np.arange(0, magnitudes.size, BLOCK)
    lows = np.minimum.reduceat(magnitudes, starts)
    spans = (TOP - lows).astype(np.int64)
    peaks = np.maximum.reduceat(magnitudes, starts) == TOP
    heights = np.add.reduceat(magnitudes, starts, dtype=np.int64) - lows * sizes - spans * peaks
    places = (heights << 16) // np.maximum(spans * (sizes - peaks), 1)
    return lows, np.searchsorted(-FALLS, -places, side="right").astype(np.int32)


@lru_cache(maxsize=TOP * 16)
def _slope(span: int, slope: int) -> Model:
    """The model of the heights 0..span above a block's smallest magnitude."""
    keep = max(0, (1 << 16) - (SLOPES[slope] << 15) // span) if slope < len(SLOPES) else 0
    weights = [1 << 32]
    for _ in range(span):
        weights.append(weights[-1] * keep >> 16)
    weights[span] += sum(weights) >> 7  # the block's largest entry, one in BLOCK
    return model(table(weights))


def _refuse(wrong: NDArray[np.bool_], parts: Parts, what: str) -> None:
    if wrong.any():
        raise WireError(f"a value of {_name(parts, int(wrong.argmax()))} {what}")


def _refuse_scales(scales: NDArray[np.float32], parts: Parts) -> None:
    # Not a number compares as False, so it is refused too; -0.0 would be a second 0.
    with np.errstate(over="ignore", invalid="ignore"):
        good = (scales * np.float32(TOP) < np.inf) & ~np.signbit(scales)
    if not good.all():
        name = _name(parts, int(good.argmin()) * BLOCK)
        raise WireError(f"a scale of {name} is negative, or it times 127 is not finite")


def _name(parts: Parts, place: int) -> str:
    for name, size in parts:
        if place < size:
            return name
        place -= size
    return "the last tensor"


def _exact_size(raw: memoryview, size: int) -> None:
    if len(raw) != size:
        raise WireError(f"{size} bytes of raw values must end the message, not {len(raw)}")
