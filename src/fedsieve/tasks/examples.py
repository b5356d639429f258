"""Examples of either kind: texts as tokens, or images as pixels."""

from typing import overload

from torch import Tensor

from fedsieve.tasks.images import Images
from fedsieve.tasks.tokens import Texts, by_token

Examples = Texts | Images


def count(examples: Examples) -> int:
    """How many examples there are (`len` of a NamedTuple counts its fields)."""
    return examples.labels.shape[0]


def unasked(examples: Examples) -> Examples:
    """The examples without what is to be asked (asked.py): of those to train on nothing is."""
    return examples._replace(asked=None) if isinstance(examples, Texts) else examples


@overload
def take(examples: Texts, index: Tensor) -> Texts: ...
@overload
def take(examples: Images, index: Tensor) -> Images: ...
@overload
def take(examples: Examples, index: Tensor) -> Examples: ...
def take(examples: Examples, index: Tensor) -> Examples:
    """The examples with these numbers, of texts without the padding that none of them needs.

    index: (b,) int64, in any order, on the examples' device.
    """
    if isinstance(examples, Images):
        pixels, labels = (t.index_select(0, index) for t in (examples.pixels, examples.labels))
        return examples._replace(pixels=pixels, labels=labels)
    mask = examples.attention_mask.index_select(0, index)
    width = int(mask.sum(1).max()) if index.numel() else 0
    # Columns first (a view), rows second: index_select then returns contiguous tensors.
    labels = examples.labels[:, :width] if by_token(examples.labels) else examples.labels
    types, asked = examples.token_type_ids, examples.asked
    return Texts(
        examples.input_ids[:, :width].index_select(0, index),
        mask[:, :width].contiguous(),
        labels.index_select(0, index),
        None if types is None else types[:, :width].index_select(0, index),
        None if asked is None else tuple(asked[row] for row in index.tolist()),
    )
