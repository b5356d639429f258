"""Randomness by name.

Every random choice of a run (a cohort, a sketch, the order of a client's examples, a rounding)
draws from its own stream, named by what the choice is for. Nothing draws from a stream that
another part has used before, so the order in which clients run changes nothing, and a resumed run
makes the same choices as one that was never stopped.
"""

import hashlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch


class Key(NamedTuple):
    """The name of a random stream. Two keys that differ in any field give independent streams."""

    seed: int
    round: int = 0
    client: str = ""
    purpose: str = ""

    def at(self, purpose: str) -> "Key":
        """The stream for another purpose, within the same round and client."""
        return self._replace(purpose=purpose)


def word(key: Key) -> int:
    """64 bits that only this key gives: an unsigned integer below 2**64."""
    return next(words(key, [key.client]))


def words(key: Key, clients: Iterable[str]) -> Iterator[int]:
    """The word of each client's key, in their order; all else of the keys is that of `key`."""
    front, back, blake = f"{key.seed}|{key.round}|", f"|{key.purpose}", hashlib.blake2b
    for client in clients:
        # The lengths keep ("ab", "c") and ("a", "bc") apart.
        text = f"{front}{len(client)}|{client}{back}"
        yield int.from_bytes(blake(text.encode(), digest_size=8).digest(), "little")


def generator(key: Key) -> torch.Generator:
    """A torch generator on the CPU, at the start of the key's stream."""
    # torch takes a signed 64-bit seed.
    return torch.Generator().manual_seed(word(key) >> 1)
