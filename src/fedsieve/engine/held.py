"""What several clients keep alike, held once.

Clients that caught up with the same base (FLoRA) would otherwise hold a copy of it each, here and
in every checkpoint. A tensor is known by its place in a memory, its form and a checksum; only where
these agree are numbers compared, so a client's memory costs its own length, however many others
there are.
"""

import weakref
import zlib
from collections.abc import Iterable

import torch
from torch import Tensor

from fedsieve.algebra.method import Memory

Mark = tuple[str, str, torch.dtype, torch.Size, int]


class Held:
    """The tensors of memories that are alive somewhere; it keeps none of them alive itself.

    memories: those that are there; looked at when the first other comes, since a run that goes on
        brings its own after its engine was made
    """

    def __init__(self, memories: Iterable[Memory]) -> None:
        self._known: weakref.WeakValueDictionary[Mark, Tensor] = weakref.WeakValueDictionary()
        self._unseen = memories

    def once(self, memory: Memory) -> Memory:
        """The memory, with another one's tensor wherever that is the same, number for number."""
        unseen, self._unseen = self._unseen, ()
        for other in unseen:
            self.once(other)
        return {
            group: {name: self._one(group, name, tensor) for name, tensor in tree.items()}
            for group, tree in memory.items()
        }

    def _one(self, group: str, name: str, tensor: Tensor) -> Tensor:
        bytes_of = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        mark = (group, name, tensor.dtype, tensor.shape, zlib.crc32(bytes_of))
        found = self._known.get(mark)
        if found is not None and found.device == tensor.device and torch.equal(found, tensor):
            return found
        self._known[mark] = tensor
        return tensor
