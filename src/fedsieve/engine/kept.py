"""What a masked message keeps of A, of B and of the head.

A mask ranks entries by size, and the sizes of unlike tensors say little of their worth: LoRA's A
starts at random and B at zero, so for many rounds the largest entries may all lie in A. Clients
then train B from zero every round and never see what was learned of it. Nothing in losses and bytes
shows this, so it is counted here: from a message's support and layout alone, whatever the method.
"""

from math import prod
from typing import NamedTuple

from fedsieve.algebra.adapter import Layout
from fedsieve.algebra.support import Support, narrowed


class Kept(NamedTuple):
    """Shares in [0, 1] of the entries, at the receiver's ranks, that a message carries.

    a, b: of all A and of all B together; head: of all tensors outside the pairs. None where no such
          tensor travels: what does not travel at all is no gap in a mask.
    """

    a: float | None = None
    b: float | None = None
    head: float | None = None


def kept(support: Support, layout: Layout) -> Kept | None:
    """What a message on this support keeps; None where it has no masks: it keeps all it is about.

    layout: the server's, at the full rank
    """
    if not support.masks:
        return None
    shapes = narrowed(layout, support.ranks).shapes
    counts: dict[str, list[int]] = {}
    for name in support.names:
        size = prod(shapes[name])
        count = counts.setdefault(_part(name, layout), [0, 0])
        count[0] += int(support.masks[name].sum()) if name in support.masks else size
        count[1] += size
    return Kept(**{part: some / size for part, (some, size) in counts.items() if size})


def starves_b(support: Support, layout: Layout) -> bool:
    """Whether the masks let pass no entry of B, though they do of tensors that B competes with.

    Masks that let nothing pass starve nobody: there was nothing to say.
    """
    found = kept(support, layout)
    if found is None or found.b != 0:
        return False
    return any(bool(mask.any()) for mask in support.masks.values())


def _part(name: str, layout: Layout) -> str:
    if name not in layout.rank_axis:
        return "head"
    return "ab"[layout.rank_axis[name][1]]
