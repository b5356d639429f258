"""Whether the examples that a run trains and is evaluated on are still the same."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:  # who reads a digest only has no use for torch
    from fedsieve.tasks.examples import Examples


class RowsDigest(NamedTuple):
    """Of the examples to train on, with whose they are where the rows say it; and of all others,
    to evaluate on. Of the examples as they were made: tokens or pixels, labels, what is asked.
    """

    train: str
    test: str


def rows_digest(
    train: "Examples",
    owned: Mapping[str, np.ndarray],
    tests: "Iterable[tuple[str, Examples | None]]",
) -> RowsDigest:
    """owned: the numbers of each client's examples; tests: those to evaluate on, by name"""
    own = hashlib.blake2b(digest_size=16)
    _add(own, train)
    for name, numbers in owned.items():
        own.update(f"{name!r}|{len(numbers)}|".encode())
        own.update(np.asarray(numbers, dtype=np.int64).tobytes())
    return RowsDigest(own.hexdigest(), named_digest(tests))


def named_digest(parts: "Iterable[tuple[str, Examples | None]]") -> str:
    """Of several sets of examples, in their order, and of what each is called."""
    found = hashlib.blake2b(digest_size=16)
    for name, examples in parts:
        found.update(f"{name!r}|".encode())
        if examples is not None:
            _add(found, examples)
    return found.hexdigest()


def _add(digest: hashlib.blake2b, examples: "Examples") -> None:
    for name, value in examples._asdict().items():
        if hasattr(value, "dtype"):
            digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
            digest.update(value.contiguous().numpy().data)
        else:
            digest.update(f"{name}|{value!r}|".encode())
