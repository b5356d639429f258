"""Models of many kinds, a few thousand numbers each, made from transformers' own configurations.

Every one has the same vocabulary: padding, unknown, begin and end, then words.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from fedsieve.settings import Task

WORDS = [f"w{number}" for number in range(56)]
VOCABULARY = ["<spare>", "<pad>", "<s>", "</s>", "<unk>", *WORDS]
PAD, BEGIN, END, UNKNOWN = 1, 2, 3, 4
POSITIONS = 40

# What configurations call their sizes; a kind takes those that it has.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim"), 32),
    **dict.fromkeys(("embedding_size", "word_embed_proj_dim", "d_embed"), 32),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "d_ff", "d_inner", "hidden_dim", "dff"), 48),
    **dict.fromkeys(("ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "moe_intermediate_size"), 48),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), POSITIONS),
    **dict.fromkeys(("num_experts", "num_local_experts"), 4),
    **dict.fromkeys(("initializer_range", "init_std"), 0.2),
    **dict.fromkeys(("d_kv", "head_dim", "rotary_dim"), 8),
    "num_key_value_heads": 4,
    "num_experts_per_tok": 2,
    "n_inner": 48,
    "vocab_size": len(VOCABULARY),
    "bos_token_id": BEGIN,
    "eos_token_id": END,
    "pad_token_id": PAD,
    "sep_token_id": END,
    "cls_token_id": BEGIN,
    "decoder_start_token_id": BEGIN,
}
_OWN: dict[str, dict[str, Any]] = {
    "falcon": {"num_kv_heads": 4, "new_decoder_architecture": True, "head_dim": None},
    "falcon-alibi": {"alibi": True, "head_dim": None},
    "funnel": {"block_sizes": [1, 1], "num_hidden_layers": None, "d_head": 8},
    "gemma2": {"sliding_window": 16},
    "gemma3_text": {"sliding_window": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "longformer": {"attention_window": 4},
    "roberta": {"type_vocab_size": 1},
    "mobilebert": {"true_hidden_size": 32, "intra_bottleneck_size": 32},
    "modernbert": {"global_attn_every_n_layers": 2, "local_attention": 8},
    **{kind: {"decoder_start_token_id": BEGIN} for kind in ("t5", "mt5", "umt5")},
    "xlnet": {"max_position_embeddings": None, "head_dim": None, "d_head": 8},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
}


def make(kind: str, task: Task, folder: Path, seed: int = 0, **settings: Any) -> Path:
    """Save a model of a kind with random weights, large enough for its outputs to differ."""
    config_class = CONFIG_MAPPING[kind.removesuffix("-alibi")]
    usual = config_class()
    given = {name: value for name, value in _SIZES.items() if _has(usual, name)}
    given = {**given, **_OWN.get(kind, {}), **settings}
    config = config_class(**{n: v for n, v in given.items() if v is not None})
    if task == "classification":
        config.num_labels = settings.get("num_labels", 3)
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    maker = AutoModelForCausalLM if task == "causal-lm" else AutoModelForSequenceClassification
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = maker.from_config(config)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "bias" in name:  # zero in a new model, never in a real one
                parameter.data.normal_(std=0.05)
    model.save_pretrained(folder)
    return folder


def tokenizer(begin: bool = True, end: bool = True, **special: Any) -> PreTrainedTokenizerFast:
    """One word, one token, between the begin and the end."""
    words = Tokenizer(WordLevel({w: n for n, w in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    words.post_processor = TemplateProcessing(
        single=f"{'<s> ' * begin}$A{' </s>' * end}",
        pair="<s> $A </s> $B:1 </s>:1",
        special_tokens=[("<s>", BEGIN), ("</s>", END)],
    )
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **{**names, **special})


def _has(config: Any, name: str) -> bool:
    try:
        return hasattr(config, name)
    except Exception:  # some refuse to say
        return False
