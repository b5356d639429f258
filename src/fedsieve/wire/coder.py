"""The entropy coder of the wire, and its models: probabilities that are whole numbers.

One stack of `constriction` (asymmetric numeral systems) holds all coded symbols of a message. Its
models are tables of whole numbers that sum to 2**24, made by integer arithmetic alone, so that any
machine and any language finds the same ones (docs/wire.md has the rules and the coder's steps).

A stack is a bijection: the symbols that a reader takes off an emptied stack are exactly those that
a writer must push to get the same bytes. So a message has one meaning and a meaning one message,
if only the reader checks that the stack is empty at the end and that each model is the one which
the writer would have chosen for these symbols.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import constriction
import numpy as np
from numpy.typing import NDArray

from fedsieve.errors import WireError

Model = Any  # constriction has no types of its own
Stack = Any
Symbols = NDArray[np.int32]
Counts = NDArray[np.int64]
Jobs = list[tuple[Symbols, Model]]  # what to push, in the order in which a reader takes it off

UNIT = 1 << 24  # probabilities are counted in units of 2**-24, constriction's precision

# A histogram gives each symbol a level: about 2 log2(largest count / its count), 31 if it is
# absent. A symbol of level l is above SHARES[l] / 2**20 of the largest count, and SHARES[l - 1] is
# not; it gets the weight WEIGHTS[l].
SHARES = np.array([
    881744, 623487, 440872, 311744, 220436, 155872, 110218, 77936, 55109, 38968, 27554, 19484,
    13777, 9742, 6889, 4871, 3444, 2435, 1722, 1218, 861, 609, 431, 304, 215, 152, 108, 76, 54,
    38,
])  # fmt: skip
WEIGHTS = np.array([
    1048576, 741455, 524288, 370728, 262144, 185364, 131072, 92682, 65536, 46341, 32768, 23170,
    16384, 11585, 8192, 5793, 4096, 2896, 2048, 1448, 1024, 724, 512, 362, 256, 181, 128, 91,
    64, 45, 32,
    0,
])  # fmt: skip
ABSENT = 31


def table(weights: Sequence[int] | Counts) -> Counts:
    """Probabilities in units of 2**-24, none of them 0, in proportion to whole weights.

    Each symbol gets 1 and its share, rounded down, of the rest; the first of the heaviest symbols
    gets what the rounding left over.
    """
    heavy = np.asarray(weights, dtype=np.int64)
    shares: Counts = 1 + heavy * (UNIT - heavy.size) // heavy.sum()
    shares[heavy.argmax()] += UNIT - shares.sum()
    return shares


def model(shares: Counts) -> Model:
    """The model that has exactly these probabilities.

    constriction gives each of n symbols 1 and spreads 2**24 - n over them by the floats it is
    told. Floats that are whole and sum to 2**24 - n are taken as they are: its factor is 1.0.
    """
    return constriction.stream.model.Categorical((shares - 1).astype(np.float64), perfect=False)


@lru_cache(maxsize=16)
def uniform(size: int) -> Model:
    """The model under which `size` (a power of 2, at least 2) symbols cost the same."""
    return model(np.full(size, UNIT // size))


# From one level of a histogram to the next: small steps up or down, modulo 32, are the likely ones.
STEPS = model(table([2 + (64 >> min(step, 32 - step)) for step in range(32)]))


def seal(jobs: Jobs) -> bytes:
    """The bytes of a stack from which a reader takes the jobs' symbols, first job first.

    Words of 32 bits, little-endian, the top of the stack at the end; zeros at the very end are
    left out.
    """
    stack = constriction.stream.stack.AnsCoder()
    for symbols, its_model in reversed(jobs):
        stack.encode_reverse(symbols, its_model)
    words: NDArray[np.uint32] = stack.get_compressed()
    return words.astype("<u4").tobytes().rstrip(b"\0")


def unseal(data: bytes) -> Stack:
    """The stack that `seal` made these bytes of. Raises WireError if they end in a zero."""
    if data.endswith(b"\0"):
        raise WireError("the coded symbols end in a zero byte: this message is damaged")
    padded = data + bytes(-len(data) % 4)
    return constriction.stream.stack.AnsCoder(np.frombuffer(padded, "<u4").astype(np.uint32))


def put_histogram(jobs: Jobs, symbols: Symbols, size: int) -> None:
    """Code symbols below `size` (a power of 2) by a histogram of their own, which goes first.

    It is told as the smallest symbol, how far the largest lies above it, and the levels of those
    between, each as its difference to the one before.
    """
    if symbols.size == 0:
        return
    low, span = int(symbols.min()), int(np.ptp(symbols))
    jobs.append((np.array([low, span], np.int32), uniform(size)))
    if span > 0:
        levels = _levels(symbols - low, span)
        jobs.append((np.diff(levels, prepend=np.int32(0)) & ABSENT, STEPS))
        jobs.append((symbols - low, model(table(WEIGHTS[levels]))))


def take_histogram(stack: Stack, count: int, size: int) -> Symbols:
    """The `count` symbols that `put_histogram` coded.

    Raises WireError if the histogram is not that of the symbols.
    """
    if count == 0:
        return np.zeros(0, np.int32)
    low, span = stack.decode(uniform(size), 2).tolist()
    if low + span >= size:
        raise WireError("a histogram of symbols that do not exist: this message is damaged")
    if span == 0:
        return np.full(count, low, np.int32)
    levels: Symbols = np.cumsum(stack.decode(STEPS, span + 1), dtype=np.int32) & ABSENT
    if levels.min() > 0:
        raise WireError("a histogram without a most frequent symbol: this message is damaged")
    symbols: Symbols = stack.decode(model(table(WEIGHTS[levels])), count)
    true_levels = _levels(symbols, span)
    if not np.array_equal(true_levels, levels) or ABSENT in true_levels[[0, -1]]:
        raise WireError("a histogram that is not that of its symbols: this message is damaged")
    symbols += low
    return symbols


def _levels(symbols: Symbols, span: int) -> Symbols:
    counts = np.bincount(symbols, minlength=span + 1)
    shares = (counts << 20) // counts.max()
    # The limits fall; with their signs turned both rise, as searchsorted wants it.
    levels: Symbols = np.searchsorted(-SHARES, -shares, side="right").astype(np.int32)
    levels[counts == 0] = ABSENT
    return levels
