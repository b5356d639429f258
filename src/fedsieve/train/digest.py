"""Whether a base model is still, or also elsewhere, the same."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What saving and loading writes into a configuration, and no number of the model depends on.
_BOOKKEEPING = ("_name_or_path", "_commit_hash", "architectures", "transformers_version")


class BaseDigest(NamedTuple):
    """Of a base model.

    weights: of all that was loaded; what was drawn follows from the seed
    config:  of its configuration's file
    start:   of the adapter over it that a run began from, where that was given (start.py)
    """

    weights: str
    config: str
    start: str | None = None

    @property
    def whole(self) -> str:
        """Of all, in one word."""
        return "-".join(part for part in self if part is not None)


def tensors_digest(tensors: Mapping[str, torch.Tensor], text: str = "") -> str:
    """Of tensors by name, and of what is said of them."""
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        # As it lies there, which for a file's tensors is in the file: not a second time in memory.
        flat = tensor.cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
    return digest.hexdigest()


def base_digest(base: "PreTrainedModel", source: str) -> BaseDigest:
    """Of a base model as `load_base` gives it, before anything is put into it.

    source: where it was loaded from
    """
    from transformers import PreTrainedConfig  # takes seconds: not for who reads a digest only

    config, _ = PreTrainedConfig.get_config_dict(source)
    plain = {key: value for key, value in config.items() if key not in _BOOKKEEPING}
    text = json.dumps(plain, sort_keys=True, default=str)
    of_config = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return BaseDigest(_hashed(_loaded(base)), of_config)


def _loaded(base: "PreTrainedModel") -> list[tuple[str, torch.Tensor]]:
    """By name, and in this order; what was drawn still has a gradient."""
    from fedsieve.train.quantise import hidden

    kept = base.state_dict(keep_vars=True)
    every = sorted([*base.named_parameters(), *base.named_buffers(), *hidden(base)])
    return [(name, tensor) for name, tensor in every if name in kept and not tensor.requires_grad]


def _hashed(tensors: Sequence[tuple[str, torch.Tensor]]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors:
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(name.encode())
        digest.update(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
    return digest.hexdigest()
