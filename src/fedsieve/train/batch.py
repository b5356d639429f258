"""A batch as the base model wants it.

Examples are padded on the right with the tokenizer's padding token. Models differ: many find a
row's last token by the padding token of their own configuration, or count positions from it, a few
read the last column, and not all can tell the texts of a pair apart.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fedsieve.tasks.examples import Examples
from fedsieve.tasks.images import Images
from fedsieve.tasks.tokens import Texts


def inputs(model: Any, examples: Examples, device: torch.device) -> dict[str, Tensor]:
    """What the model's forward pass is given, on the device.

    Of images numbers, normalised as the model's image processor does it. Of texts:

    Padding holds the model's own padding token, and is on the left where a model reads the last
    column. Token types are left out where the model has no table that they fit.
    """
    if isinstance(examples, Images):
        return _of_images(examples, device)
    return {name: moved(value, device) for name, value in laid_out(model, examples).items()}


def laid_out(model: Any, examples: Texts) -> dict[str, Tensor]:
    """`inputs` of texts, where the examples are."""
    config = model.config
    given = {n: value for n, value in examples._asdict().items() if isinstance(value, Tensor)}
    mask = examples.attention_mask
    pad = getattr(config, "pad_token_id", None)
    if pad is not None:
        given["input_ids"] = examples.input_ids.masked_fill(mask == 0, pad)
    if examples.token_type_ids is not None and not _typed(config, examples.token_type_ids):
        del given["token_type_ids"]
    if getattr(config, "summary_type", None) == "last":
        given = {name: _right(value, mask) for name, value in given.items()}
    return given


def moved(value: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device. Nobody waits for a copy to a GPU: it is made from pinned memory,
    ahead of the kernels that use it.
    """
    if device.type == "cuda" and not value.is_cuda:
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)


def _of_images(examples: Images, device: torch.device) -> dict[str, Tensor]:
    low, high = (torch.tensor(each).view(1, -1, 1, 1) for each in (examples.low, examples.high))
    slope, low = moved((high - low) / 255, device), moved(low, device)
    pixels = moved(examples.pixels, device).float().mul_(slope).add_(low)
    return {"pixel_values": pixels, "labels": moved(examples.labels, device)}


def half_type(model: nn.Module) -> torch.dtype | None:
    """The type of a base in half precision, in which it multiplies with what is trained; or None.

    What is trained is float32, so such a model runs under autocast only.
    """
    half = {p.dtype for p in model.parameters()} & {torch.float16, torch.bfloat16}
    return min(half, key=str, default=None)


def _typed(config: Any, types: Tensor) -> bool:
    # XLNet only compares the types of two tokens, with any number of them. GPT-2 and its kin would
    # take a type for a word.
    kinds = getattr(config, "type_vocab_size", 0)
    return config.model_type == "xlnet" or int(types.max()) < kinds


def _right(value: Tensor, mask: Tensor) -> Tensor:
    """Each row moved to the right end, its padding to the left."""
    if value.ndim == 1 or value.is_floating_point():
        return value  # a row's
    width = mask.shape[1]
    columns = torch.arange(width, device=mask.device) + mask.sum(1, keepdim=True)
    return value.gather(1, columns % width)
