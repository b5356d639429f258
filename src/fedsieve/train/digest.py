"""Whether a base model is still, or also elsewhere, the same."""

import hashlib
import json
from collections.abc import Mapping
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
    return BaseDigest(_weights(base), hashlib.blake2b(text.encode(), digest_size=16).hexdigest())


def body_digest(base: "PreTrainedModel") -> str:
    """Of the weights below a classifier's head, which is drawn from the seed where it is for other
    classes (head.py), so that runs of several seeds have the same.
    """
    return _weights(base, f"{base.base_model_prefix}.")


def _weights(base: "PreTrainedModel", within: str = "") -> str:
    """Of all that was loaded under names that begin so."""
    from fedsieve.train.quantise import hidden

    digest = hashlib.blake2b(digest_size=16)
    kept = base.state_dict(keep_vars=True)
    for name, tensor in sorted([*base.named_parameters(), *base.named_buffers(), *hidden(base)]):
        if name in kept and name.startswith(within) and not tensor.requires_grad:
            flat = tensor.detach().cpu().contiguous().flatten()
            digest.update(name.encode())
            digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()
