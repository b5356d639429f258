"""Dropout that does not dominate a step on the CPU.

torch draws one 32-bit number for each entry that it may drop, one after another, and with dropout
its fused attention falls back to a slow path; together that is half of a small model's forward
pass.
Here four entries share one 64-bit draw. The drop probability is then a multiple of 2**-16 (0.1
becomes 0.10001), and the kept entries are scaled by that probability, so that the expectation is
exact. On an accelerator torch's own dropout is fast and stays.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import eager_mask

_LEVELS = 1 << 16
_ATTENTION = "fedsieve_dropout"


class Dropout(nn.Module):
    """Drops entries with probability p while training, as torch.nn.Dropout does."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        return x * keep_mask(x, self.p)


def keep_mask(x: Tensor, p: float) -> Tensor:
    """Zeros with probability p (to 2**-16), else 1 / (1 - p): of x's shape and dtype."""
    drop = round(p * _LEVELS)
    if drop >= _LEVELS:
        return torch.zeros_like(x)
    draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    levels = draws.view(torch.int16)[: x.numel()].view(x.shape)
    return (levels >= drop - _LEVELS // 2).to(x.dtype).mul_(_LEVELS / (_LEVELS - drop))


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention with fast dropout; without dropout it is transformers' own sdpa attention.

    query (batch, heads, length, width), key and value (batch, groups, length, width) ->
    (batch, length, heads, width). The mask is added to the scores, as in eager attention.
    """
    if dropout == 0:
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout=0.0, scaling=scaling, **rest
        )
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[-2]]
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    weights = weights * keep_mask(weights, dropout)
    return (weights @ value).transpose(1, 2).contiguous(), None


def speed_up(model: nn.Module) -> None:
    """Put the fast dropout, and attention that uses it, in place of torch's. In place; CPU only."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Dropout:
                parent.add_module(name, Dropout(child.p).train(child.training))
    config: Any = model.config
    drops = [getattr(config, n, 0) for n in _ATTENTION_RATES]
    if any(drops) and config._attn_implementation == "sdpa":
        AttentionInterface.register(_ATTENTION, attention)
        AttentionMaskInterface.register(_ATTENTION, eager_mask)
        model.set_attn_implementation(_ATTENTION)  # type: ignore[operator]


# What configurations call the dropout of attention weights.
_ATTENTION_RATES = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")
