"""Masks on the wire: which entries of a tensor travel, in much less than a bit each.

What tells the density of a mask is its row along the rank: on real updates most rows of a factor
are empty and a few are nearly full, since each rank is one direction that is learned or not. So
every row is sent with its own density, rounded to one of 14 steps, and its bits are coded with
that density, four at a time. Whole rows of zeros or ones cost nothing more.
"""

from itertools import pairwise
from math import ceil, prod

import numpy as np
from numpy.typing import NDArray

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
)

Bits = NDArray[np.bool_]

# Step s in 1..14 stands for the density sin(pi (2 s - 1) / 56)**2 and ends at sin(pi s / 28)**2,
# both in units of 2**-16: steps of equal width in the angle lose equally much everywhere.
DENSITIES = (
    *(206, 1839, 5023, 9598, 15334, 21945, 29099),
    *(36437, 43591, 50202, 55938, 60513, 63697, 65330),
)
LIMITS = np.array(
    [822, 3245, 7149, 12337, 18550, 25476, 32768, 40060, 46986, 53199, 58387, 62291, 64714]
)
EMPTY, FULL = 0, 15
SHORTEST = 64  # entries; shorter rows share a step, which costs some bits itself


def _fours(density: int) -> Model:
    """The model of four bits at once, the first in the lowest place: four times fewer symbols."""
    weights = [
        density ** four.bit_count() * (65536 - density) ** (4 - four.bit_count()) >> 32
        for four in range(16)
    ]
    return model(table(weights))


MODELS = tuple(_fours(density) for density in DENSITIES)


def put_masks(jobs: Jobs, masks: list[Bits], axes: list[int]) -> None:
    """Code masks; `axes`, 0 or 1, says along which axis of each its rows are counted."""
    sizes = _line_sizes([mask.shape for mask in masks], axes)
    if sizes.size == 0:
        return
    turned = [m.swapaxes(0, axis) if axis else m for m, axis in zip(masks, axes, strict=True)]
    bits = np.concatenate([mask.ravel() for mask in turned])
    steps = _steps(bits, sizes)
    put_histogram(jobs, steps, 16)
    fours = _to_fours(bits, sizes)
    for step, start, stop in _runs(steps, sizes):
        if EMPTY < step < FULL:
            jobs.append((fours[start:stop], MODELS[step - 1]))


def take_masks(stack: Stack, shapes: list[tuple[int, ...]], axes: list[int]) -> list[Bits]:
    """The masks of these shapes that `put_masks` coded. Raises WireError for any other bytes."""
    sizes = _line_sizes(shapes, axes)
    bits = np.zeros(0, np.bool_)
    if sizes.size:
        steps = take_histogram(stack, sizes.size, 16)
        fours = np.zeros(_fours_in(sizes).sum(), np.int32)
        for step, start, stop in _runs(steps, sizes):
            if EMPTY < step < FULL:
                fours[start:stop] = stack.decode(MODELS[step - 1], stop - start)
        bits = _from_fours(fours, sizes)
        bits[np.repeat(steps == FULL, sizes)] = True
        if not np.array_equal(_steps(bits, sizes), steps):
            raise WireError("a row of a mask is not as dense as it says: this message is damaged")
    masks: list[Bits] = []
    start = 0
    for shape, axis in zip(shapes, axes, strict=True):
        stop = start + prod(shape)
        part = bits[start:stop]
        if axis:
            turned = part.reshape(shape[1], shape[0], *shape[2:])
            part = np.ascontiguousarray(turned.swapaxes(0, 1))
        masks.append(part.reshape(shape))
        start = stop
    return masks


def _line_sizes(shapes: list[tuple[int, ...]], axes: list[int]) -> NDArray[np.int64]:
    """The lengths of all lines: rows, or as many short rows together as make SHORTEST entries."""
    sizes: list[int] = []
    for shape, axis in zip(shapes, axes, strict=True):
        count = prod(shape)
        if count == 0:
            continue
        row = count // shape[axis] if shape else 1
        line = row * ceil(SHORTEST / row)
        sizes += [line] * (count // line)
        if count % line:
            sizes.append(count % line)
    return np.array(sizes, dtype=np.int64)


def _fours_in(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    return (sizes + 3) // 4


def _to_fours(bits: Bits, sizes: NDArray[np.int64]) -> Symbols:
    """Bits four by four; zeros fill the last four of a line."""
    if (sizes % 4).any():
        padded = np.zeros(4 * _fours_in(sizes).sum(), np.bool_)
        padded[_places(sizes)] = bits
        bits = padded
    pairs = np.packbits(bits, bitorder="little")
    fours = np.empty((pairs.size, 2), np.int32)
    np.bitwise_and(pairs, 15, out=fours[:, 0])
    np.right_shift(pairs, 4, out=fours[:, 1])
    return fours.reshape(-1)[: bits.size // 4]


def _from_fours(fours: Symbols, sizes: NDArray[np.int64]) -> Bits:
    pairs = np.append(fours, np.zeros(fours.size % 2, np.int32)).astype(np.uint8).reshape(-1, 2)
    packed = (pairs[:, 0] | pairs[:, 1] << 4).astype(np.uint8)
    bits: Bits = np.unpackbits(packed, count=4 * fours.size, bitorder="little").view(np.bool_)
    if not (sizes % 4).any():
        return bits
    kept = bits[_places(sizes)]
    if np.count_nonzero(kept) != np.count_nonzero(bits):
        raise WireError("bits are set after the end of a row: this message is damaged")
    return kept


def _places(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each bit stands once every line starts at a multiple of four."""
    starts = np.cumsum(sizes) - sizes
    starts_of_fours = 4 * (np.cumsum(_fours_in(sizes)) - _fours_in(sizes))
    places: NDArray[np.int64] = np.arange(sizes.sum()) + np.repeat(starts_of_fours - starts, sizes)
    return places


def _steps(bits: Bits, sizes: NDArray[np.int64]) -> Symbols:
    """The step of each line's density; EMPTY and FULL where all its bits are the same."""
    ones = np.add.reduceat(bits, np.cumsum(sizes) - sizes, dtype=np.int64)
    steps = 1 + np.searchsorted(LIMITS, (ones << 16) // sizes, side="right").astype(np.int32)
    steps[ones == 0] = EMPTY
    steps[ones == sizes] = FULL
    return steps


def _runs(steps: Symbols, sizes: NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """(step, start, stop), counted in fours, of neighbouring lines of one step: one call each."""
    ends = np.append(np.flatnonzero(np.diff(steps)) + 1, steps.size)
    stops = np.cumsum(_fours_in(sizes))[ends - 1].tolist()
    return [
        (step, start, stop)
        for step, (start, stop) in zip(steps[ends - 1].tolist(), pairwise([0, *stops]), strict=True)
    ]
