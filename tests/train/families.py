"""Tiny models of the families that transformers maps to our tasks, each from a configuration.

A family's base is the checkpoint that its pretraining leaves: a language model of the masked, the
causal or the translating kind where the family has one, else the bare body. So a classifier made
from it lacks a head, and often a pooler, as ordinary checkpoints do.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)

from fedsieve.settings import Task
from fedsieve.tasks.examples import Examples
from fedsieve.tasks.images import Images
from fedsieve.tasks.tokens import Texts
from fedsieve.train.lengths import image_size

WORDS = 60  # of every family's vocabulary; 0 pads, 2 begins, 3 ends

_BERT: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "type_vocab_size": 2,
}
_LLAMA: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}
_BART: dict[str, Any] = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 64,
}
_T5: dict[str, Any] = {
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
_GPT: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
_XLM: dict[str, Any] = {"emb_dim": 16, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 64}
_EXPERTS: dict[str, Any] = {**_LLAMA, "num_experts_per_tok": 2}
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_FINE: dict[str, Any] = {**_EXPERTS, "num_experts": 4, "moe_intermediate_size": 16}
_DEEPSEEK: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
_LATENT = ("q_b_proj", "kv_b_proj", "o_proj")
_MAMBA: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "state_size": 4,
    "time_step_rank": 4,
}
_DELTA: dict[str, Any] = {
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
_CONV: dict[str, Any] = {
    "layer_types": ["conv", "full_attention"],
    "block_auto_adjust_ff_dim": False,
}
_OPT: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "ffn_dim": 32,
    "word_embed_proj_dim": 16,
    "max_position_embeddings": 64,
}
_WORDY: dict[str, Any] = {**_LLAMA, "vocab_size": WORDS, "eos_token_id": 3, "pad_token_id": 0}
_SHARED: dict[str, Any] = {**_FINE, "shared_expert_intermediate_size": 16}
_SSM: dict[str, Any] = {
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_d_state": 4,
    "mamba_n_groups": 1,
}
_GRANITE_HYBRID: dict[str, Any] = {
    **_EXPERTS,
    **_SSM,
    "num_local_experts": 4,
    "layer_types": ["mamba", "attention"],
    "mamba_expand": 2,
    "shared_intermediate_size": 16,
}
_JAMBA: dict[str, Any] = {
    **_EXPERTS,
    "num_experts": 4,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "mamba_d_state": 4,
    "mamba_dt_rank": 4,
    "use_mamba_kernels": False,
}
_VIT: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}
_SWIN: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [1, 2],
    "window_size": 4,
}
_STAGES: dict[str, Any] = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "image_size": 32}
_RESNET: dict[str, Any] = {
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "image_size": 32,
    "layer_type": "basic",
}
_MOBILEVIT: dict[str, Any] = {
    "image_size": 32,
    "hidden_sizes": [8, 16, 16],
    "neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 16],
    "num_attention_heads": 2,
}
_PYRAMID: dict[str, Any] = {
    **_STAGES,
    "num_attention_heads": [1, 1, 2, 2],
    "sr_ratios": [2, 2, 1, 1],
    "mlp_ratios": [2, 2, 2, 2],
}
_TWO: dict[str, Any] = {
    "projection_dim": 16,
    "vision_config": _VIT,
    "text_config": {
        "vocab_size": WORDS,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    },
}


TASKS: dict[str, Task] = {
    "c": "classification",
    "l": "causal-lm",
    "i": "image-classification",
}


class Family(NamedTuple):
    """A family's name in transformers, the tasks that it is tried on, and what makes it tiny.

    tasks:   "c" for classification, "l" for causal language models, "i" for image classification;
             none where all are refused
    start:   the class of its base
    targets: of its LoRA pairs, where "all-linear" is refused
    """

    name: str
    tasks: str
    start: Any
    settings: dict[str, Any]
    targets: tuple[str, ...] | str = "all-linear"


FAMILIES = (
    # encoders
    Family("albert", "c", AutoModelForMaskedLM, {**_BERT, "embedding_size": 8}),
    Family("bert", "c", AutoModelForMaskedLM, _BERT),
    Family("camembert", "c", AutoModelForMaskedLM, _BERT),
    Family("deberta-v2", "c", AutoModelForMaskedLM, _BERT),
    Family(
        "distilbert",
        "c",
        AutoModelForMaskedLM,
        {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 64},
    ),
    Family("electra", "c", AutoModelForMaskedLM, {**_BERT, "embedding_size": 8}),
    Family("eurobert", "c", AutoModelForMaskedLM, _LLAMA),
    Family("longformer", "c", AutoModelForMaskedLM, {**_BERT, "attention_window": 4}),
    Family("modernbert", "c", AutoModelForMaskedLM, _BERT),
    Family("mpnet", "c", AutoModelForMaskedLM, _BERT),
    Family("nomic_bert", "c", AutoModelForMaskedLM, _BERT),
    Family("roberta", "c", AutoModelForMaskedLM, _BERT),
    Family("xlm-roberta", "c", AutoModelForMaskedLM, _BERT),
    # encoder-decoders
    Family("bart", "c", AutoModelForSeq2SeqLM, _BART),
    Family("mbart", "c", AutoModelForSeq2SeqLM, _BART),
    Family("mt5", "c", AutoModelForSeq2SeqLM, _T5),
    Family("t5", "c", AutoModelForSeq2SeqLM, _T5),
    # decoders
    Family("bloom", "cl", AutoModelForCausalLM, {"hidden_size": 16, "n_layer": 2, "n_head": 2}),
    Family("gpt2", "cl", AutoModelForCausalLM, _GPT),
    Family("gpt_neox", "cl", AutoModelForCausalLM, _BERT),
    Family("cohere2", "l", AutoModelForCausalLM, _LLAMA),
    Family("granite", "l", AutoModelForCausalLM, _LLAMA),
    Family("lfm2", "l", AutoModelForCausalLM, {**_LLAMA, **_CONV}),
    *(
        Family(name, "cl", AutoModelForCausalLM, _LLAMA)
        for name in (
            *("exaone4", "gemma2", "gemma3_text", "glm4", "llama", "ministral3", "mistral"),
            *("nemotron", "olmo2", "phi3", "qwen2", "qwen3", "smollm3", "starcoder2"),
        )
    ),
    Family("opt", "cl", AutoModelForCausalLM, _OPT),
    # states instead of attention, or beside it
    Family("granitemoehybrid", "l", AutoModelForCausalLM, _GRANITE_HYBRID, _ATTENTION),
    Family("mamba", "l", AutoModelForCausalLM, _MAMBA, ("in_proj", "x_proj")),
    Family("qwen3_next", "cl", AutoModelForCausalLM, {**_SHARED, **_DELTA}, _ATTENTION),
    # mixtures of experts
    Family("deepseek_v3", "cl", AutoModelForCausalLM, _DEEPSEEK, _LATENT),
    Family("gpt_oss", "cl", AutoModelForCausalLM, {**_EXPERTS, "num_local_experts": 4}),
    Family("mixtral", "cl", AutoModelForCausalLM, {**_EXPERTS, "num_local_experts": 4}, _ATTENTION),
    Family("olmoe", "l", AutoModelForCausalLM, {**_EXPERTS, "num_experts": 4}, _ATTENTION),
    Family("qwen2_moe", "cl", AutoModelForCausalLM, _SHARED, _ATTENTION),
    Family("qwen3_moe", "cl", AutoModelForCausalLM, _FINE, _ATTENTION),
    # vision
    Family("beit", "i", AutoModel, _VIT),
    Family("clip", "i", AutoModel, _TWO),
    Family("convnext", "i", AutoModel, {**_STAGES, "patch_size": 2}),
    Family("deit", "i", AutoModel, _VIT),
    Family("dinov2", "i", AutoModel, _VIT),
    Family("resnet", "i", AutoModel, _RESNET, ".*encoder.*convolution"),
    Family("segformer", "i", AutoModel, _PYRAMID),
    Family("siglip", "i", AutoModel, _TWO),
    Family("swin", "i", AutoModel, _SWIN),
    Family("vit", "i", AutoModel, _VIT),
    Family("big_bird", "c", AutoModelForMaskedLM, {**_BERT, "attention_type": "original_full"}),
    Family("canine", "", AutoModel, {**_BERT, "num_hash_buckets": 64}),
    Family("convbert", "", AutoModelForMaskedLM, {**_BERT, "embedding_size": 16, "head_ratio": 1}),
    Family("data2vec-text", "c", AutoModelForMaskedLM, _BERT),
    Family("deberta", "c", AutoModelForMaskedLM, _BERT),
    Family("ernie", "c", AutoModelForMaskedLM, _BERT),
    Family("esm", "c", AutoModelForMaskedLM, _BERT, ("query", "value")),
    Family("flaubert", "c", AutoModelForMaskedLM, _XLM),
    Family("fnet", "", AutoModelForMaskedLM, {k: _BERT[k] for k in _BERT if "heads" not in k}),
    Family(
        "funnel",
        "c",
        AutoModelForMaskedLM,
        {
            "d_model": 16,
            "block_sizes": [1, 1],
            "num_decoder_layers": 1,
            "n_head": 2,
            "d_head": 8,
            "d_inner": 32,
        },
    ),
    Family("gte", "c", AutoModelForMaskedLM, _BERT),
    Family("ibert", "", AutoModelForMaskedLM, _BERT),
    Family("jina_embeddings_v3", "c", AutoModelForMaskedLM, _BERT),
    Family("layoutlm", "c", AutoModelForMaskedLM, _BERT),
    Family("luke", "c", AutoModelForMaskedLM, {**_BERT, "entity_vocab_size": 4}),
    Family("markuplm", "c", AutoModel, _BERT),
    Family("megatron-bert", "c", AutoModelForMaskedLM, _BERT),
    Family(
        "mobilebert",
        "c",
        AutoModelForMaskedLM,
        {
            **_BERT,
            "embedding_size": 16,
            "intra_bottleneck_size": 16,
            "true_hidden_size": 16,
            "num_feedforward_networks": 1,
        },
    ),
    Family("mra", "c", AutoModelForMaskedLM, _BERT),
    Family("nystromformer", "", AutoModelForMaskedLM, _BERT),
    Family(
        "rembert",
        "c",
        AutoModelForMaskedLM,
        {**_BERT, "input_embedding_size": 16, "output_embedding_size": 16},
    ),
    Family("roformer", "c", AutoModelForMaskedLM, _BERT),
    Family("squeezebert", "c", AutoModelForMaskedLM, {**_BERT, "embedding_size": 16}),
    Family("xlm", "c", AutoModelForMaskedLM, _XLM),
    Family("xlm-roberta-xl", "c", AutoModelForMaskedLM, _BERT),
    Family(
        "xlnet",
        "c",
        AutoModelForCausalLM,
        {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32},
    ),
    Family("yoso", "", AutoModelForMaskedLM, _BERT),
    # encoder-decoders
    Family(
        "bigbird_pegasus", "c", AutoModelForSeq2SeqLM, {**_BART, "attention_type": "original_full"}
    ),
    Family(
        "led",
        "",
        AutoModelForSeq2SeqLM,
        {
            **{key: _BART[key] for key in _BART if "position" not in key},
            "attention_window": 4,
            "max_encoder_position_embeddings": 64,
            "max_decoder_position_embeddings": 64,
        },
    ),
    Family("mvp", "c", AutoModelForSeq2SeqLM, _BART),
    Family("pegasus", "", AutoModelForSeq2SeqLM, _BART),
    Family("plbart", "c", AutoModelForSeq2SeqLM, _BART),
    Family("t5gemma", "", AutoModelForSeq2SeqLM, {"encoder": _WORDY, "decoder": _WORDY}),
    Family("umt5", "c", AutoModelForSeq2SeqLM, _T5),
    # decoders
    Family("biogpt", "cl", AutoModelForCausalLM, _BERT),
    Family("codegen", "l", AutoModelForCausalLM, {**_GPT, "rotary_dim": 4, "n_head": 4}),
    Family("ctrl", "cl", AutoModelForCausalLM, {**_GPT, "dff": 32}),
    Family(
        "falcon",
        "cl",
        AutoModelForCausalLM,
        {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    ),
    Family("gpt_bigcode", "cl", AutoModelForCausalLM, _GPT),
    Family(
        "gpt_neo",
        "cl",
        AutoModelForCausalLM,
        {
            "hidden_size": 16,
            "num_layers": 2,
            "num_heads": 2,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 64,
        },
    ),
    Family("gptj", "cl", AutoModelForCausalLM, {**_GPT, "rotary_dim": 4}),
    *(
        Family(name, "cl", AutoModelForCausalLM, _LLAMA)
        for name in (
            *("arcee", "gemma", "glm", "helium", "hunyuan_v1_dense", "ministral", "olmo", "olmo3"),
            *("persimmon", "phi", "seed_oss", "stablelm"),
        )
    ),
    *(
        Family(name, "l", AutoModelForCausalLM, _LLAMA)
        for name in ("apertus", "cohere", "ernie4_5")
    ),
    Family(
        "gemma4_text",
        "l",
        AutoModelForCausalLM,
        {**_LLAMA, "vocab_size_per_layer_input": WORDS, "hidden_size_per_layer_input": 4},
    ),
    Family("modernbert-decoder", "cl", AutoModelForCausalLM, _BERT),
    Family(
        "mpt",
        "cl",
        AutoModelForCausalLM,
        {"d_model": 16, "n_layers": 2, "n_heads": 2, "expansion_ratio": 2, "max_seq_len": 64},
    ),
    Family("openai-gpt", "cl", AutoModelForCausalLM, _GPT),
    Family(
        "xglm",
        "l",
        AutoModelForCausalLM,
        {
            "d_model": 16,
            "num_layers": 2,
            "attention_heads": 2,
            "ffn_dim": 32,
            "max_position_embeddings": 64,
        },
    ),
    # states
    Family("bamba", "l", AutoModelForCausalLM, {**_LLAMA, **_SSM, "attn_layer_indices": [1]}),
    Family(
        "falcon_h1",
        "l",
        AutoModelForCausalLM,
        {**_LLAMA, **_SSM, "mamba_d_ssm": 32},
        _ATTENTION,
    ),
    Family("falcon_mamba", "l", AutoModelForCausalLM, _MAMBA, ("in_proj", "x_proj")),
    Family("jamba", "cl", AutoModelForCausalLM, _JAMBA, _ATTENTION),
    Family(
        "mamba2",
        "l",
        AutoModelForCausalLM,
        {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "state_size": 4,
            "num_heads": 4,
            "head_dim": 8,
            "n_groups": 1,
            "chunk_size": 8,
        },
        ("in_proj",),
    ),
    Family("qwen3_5_text", "cl", AutoModelForCausalLM, {**_LLAMA, **_DELTA}, _ATTENTION),
    Family(
        "recurrent_gemma",
        "l",
        AutoModelForCausalLM,
        {
            **_LLAMA,
            "lru_width": 16,
            "attention_window_size": 8,
            "block_types": ["recurrent", "attention"],
        },
    ),
    Family(
        "rwkv",
        "l",
        AutoModelForCausalLM,
        {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "attention_hidden_size": 16,
            "intermediate_size": 32,
            "context_length": 64,
        },
    ),
    # mixtures
    Family("deepseek_v2", "cl", AutoModelForCausalLM, _DEEPSEEK, _LATENT),
    Family(
        "ernie4_5_moe",
        "l",
        AutoModelForCausalLM,
        {**_FINE, "moe_num_experts": 4, "moe_k": 2},
        _ATTENTION,
    ),
    Family(
        "glm4_moe",
        "l",
        AutoModelForCausalLM,
        {
            **_FINE,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
        },
        _ATTENTION,
    ),
    Family("granitemoe", "l", AutoModelForCausalLM, {**_EXPERTS, "num_local_experts": 4}),
    Family(
        "llama4_text",
        "l",
        AutoModelForCausalLM,
        {**_EXPERTS, "intermediate_size_mlp": 32, "num_local_experts": 4},
        _ATTENTION,
    ),
    Family(
        "minimax",
        "cl",
        AutoModelForCausalLM,
        {
            **_EXPERTS,
            "num_local_experts": 4,
            "layer_types": ["full_attention", "linear_attention"],
        },
        _ATTENTION,
    ),
    Family("phimoe", "cl", AutoModelForCausalLM, {**_EXPERTS, "num_local_experts": 4}, _ATTENTION),
    # vision
    Family("convnextv2", "i", AutoModel, {**_STAGES, "patch_size": 2}),
    Family(
        "cvt",
        "i",
        AutoModel,
        {
            "embed_dim": [8, 8, 16],
            "num_heads": [1, 1, 2],
            "depth": [1, 2, 3],
            "drop_path_rate": [0.0] * 3,
        },
    ),
    Family("data2vec-vision", "i", AutoModel, _VIT),
    Family("dinov2_with_registers", "i", AutoModel, _VIT),
    Family(
        "efficientnet",
        "i",
        AutoModel,
        {
            "image_size": 32,
            "width_coefficient": 0.1,
            "depth_coefficient": 0.1,
            "hidden_dim": 128,
        },
        ("expand_conv", "project_conv"),
    ),
    Family(
        "focalnet",
        "i",
        AutoModel,
        {**_SWIN, "focal_levels": [2, 2], "focal_windows": [3, 3], "hidden_sizes": [8, 16]},
    ),
    Family(
        "hiera",
        "i",
        AutoModel,
        {
            "image_size": [32, 32],
            "embed_dim": 8,
            "depths": [1, 1],
            "num_heads": [1, 2],
            "masked_unit_size": [2, 2],
            "query_stride": [2, 2],
            "num_query_pool": 1,
        },
    ),
    Family("ijepa", "i", AutoModel, _VIT),
    Family("imagegpt", "", AutoModel, _GPT),
    Family(
        "levit",
        "i",
        AutoModel,
        {
            "image_size": 64,
            "hidden_sizes": [16, 16, 16],
            "num_attention_heads": [2, 2, 2],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
        },
    ),
    Family("metaclip_2", "i", AutoModel, _TWO),
    Family(
        "mobilenet_v2",
        "",
        AutoModel,
        {"image_size": 32, "depth_multiplier": 0.1, "min_depth": 8},
    ),
    Family("mobilevit", "i", AutoModel, _MOBILEVIT, ("query", "value")),
    Family("poolformer", "i", AutoModel, _STAGES, ("conv1", "conv2")),
    Family(
        "pvt",
        "",
        AutoModel,
        {
            **_PYRAMID,
            "num_encoder_blocks": 4,
            "sequence_reduction_ratios": [2, 2, 1, 1],
        },
    ),
    Family("pvt_v2", "i", AutoModel, _PYRAMID),
    Family(
        "regnet",
        "i",
        AutoModel,
        {
            "image_size": 32,
            "embedding_size": 8,
            "hidden_sizes": [8, 16],
            "depths": [1, 1],
            "groups_width": 8,
        },
        ".*encoder.*(shortcut|layer.[02]).convolution",
    ),
    Family("siglip2", "", AutoModel, {**_TWO, "vision_config": {**_VIT, "num_patches": 16}}),
    Family(
        "swiftformer",
        "i",
        AutoModel,
        {"image_size": 64, "embed_dims": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
    ),
    Family("swinv2", "i", AutoModel, _SWIN, ("query", "key", "value", "dense")),
    Family("vit_msn", "i", AutoModel, _VIT),
)

# What people download most, and on which of its tasks: tried in every run of the tests. The rest is
# tried by `make test-all`.
EVERY_RUN = {
    **dict.fromkeys(("albert", "bert", "deberta-v2", "distilbert", "modernbert", "mpnet"), "c"),
    **dict.fromkeys(("bart", "roberta", "t5", "xlm-roberta"), "c"),
    **dict.fromkeys(("gpt2", "llama", "qwen2"), "cl"),
    **dict.fromkeys(("gemma3_text", "lfm2", "mistral", "olmo2", "opt", "phi3", "qwen3"), "l"),
    **dict.fromkeys(("granitemoehybrid", "mamba", "smollm3"), "l"),
    **dict.fromkeys(("deepseek_v3", "gpt_oss", "mixtral", "qwen2_moe", "qwen3_moe"), "l"),
    **dict.fromkeys(("clip", "convnext", "dinov2", "resnet", "siglip", "swin", "vit"), "i"),
}

# What is refused, in one sentence: family, task, targets, and part of what is said.
REFUSED: tuple[tuple[str, Task, Any, str], ...] = (
    # Convolutions, spectra, summaries or relative positions over a whole row, padding too.
    ("canine", "classification", "all-linear", "depend on how far the row is padded"),
    ("convbert", "classification", "all-linear", "depend on how far the row is padded"),
    ("fnet", "classification", "all-linear", "depend on how far the row is padded"),
    ("nystromformer", "classification", "all-linear", "depend on how far the row is padded"),
    ("t5gemma", "classification", "all-linear", "depend on how far the row is padded"),
    ("yoso", "classification", "all-linear", "depend on how far the row is padded"),
    ("xlnet", "causal-lm", "all-linear", "depend on how far the row is padded"),
    # transformers' own ties are lost between the two classes: it draws the embeddings.
    ("bart", "causal-lm", "all-linear", "holds no model.decoder.embed_tokens.weight"),
    ("mbart", "causal-lm", "all-linear", "holds no model.decoder.embed_tokens.weight"),
    # PEFT takes the name that it knows for the experts' linear layers of old.
    ("mixtral", "causal-lm", "all-linear", "takes in the experts of a mixture"),
    ("mixtral", "causal-lm", None, "no choice for this mixture of experts"),
    ("mixtral", "causal-lm", ("q_proj", "w1"), "names 'w1'"),
    ("mixtral", "causal-lm", ("q_proj", "experts"), "names 'experts': the experts"),
    ("mixtral", "causal-lm", ("q_proj", "gate_up_proj"), "names 'gate_up_proj': the experts"),
    ("qwen2_moe", "classification", "all-linear", r"shared_expert_gate \(1\)"),
    ("qwen3_moe", "causal-lm", ("q_proj", "down_proj"), "names 'down_proj': the experts"),
    ("olmoe", "causal-lm", ".*(q_proj|down_proj)", "takes in the experts of a mixture"),
    # Routers that are linear layers, and give scores and a choice.
    ("phimoe", "causal-lm", "all-linear", r"takes in .*router, a layer that gives more than one"),
    ("phimoe", "causal-lm", ("q_proj", "router"), r"takes in .*router, a layer that gives"),
    ("llama4_text", "causal-lm", "all-linear", r"takes in .*router, a layer that gives"),
    # A layer that only another task has any use for.
    ("esm", "classification", "all-linear", r"contact_head.regression \(1\): lower it, or list"),
    # Its layers are of its own kind.
    ("ibert", "classification", "all-linear", "no layer outside the head can take LoRA"),
    # PEFT's own word: their kernels pass by the layers' forward.
    ("mamba", "causal-lm", "all-linear", "'out_proj' is incompatible with Mamba"),
    ("falcon_h1", "causal-lm", "all-linear", "'out_proj' is incompatible with Mamba"),
    # A name that transformers' head does not take.
    ("pvt", "image-classification", None, "has 1000 outputs however many classes"),
    # They take something else than one image, or one row of tokens.
    ("imagegpt", "image-classification", None, "cannot be trained on images alone"),
    ("siglip2", "image-classification", None, "cannot be trained on images alone"),
    # Convolutions that are called by code of their own, or all there is.
    ("mobilenet_v2", "image-classification", ".*expand_1x1.convolution", "does not run with LoRA"),
    ("mobilenet_v2", "image-classification", None, "name its convolutions, such as 'convolution'"),
    (
        "resnet",
        "image-classification",
        "all-linear",
        "name its convolutions, such as 'convolution'",
    ),
    ("poolformer", "image-classification", "all-linear", "such as 'conv1', 'conv2', 'projection'"),
    # No such model.
    ("led", "classification", "all-linear", "is of no kind"),
    ("pegasus", "classification", "all-linear", "is of no kind"),
    ("pegasus", "causal-lm", "all-linear", "holds no model.decoder.embed_tokens.weight"),
)


def write(family: Family, folder: Path) -> Path:
    """Make a family's base, from a fixed seed, and save it."""
    words: dict[str, Any] = {
        "vocab_size": WORDS,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
    }
    config = AutoConfig.for_model(family.name, **{**words, **family.settings})
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = family.start.from_config(config)
        # A real model's start is near zero; here everything should matter to the logits.
        for parameter in model.parameters():
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return folder


def examples(model: PreTrainedModel, task: Task) -> Examples:
    """Three rows: images, or texts of 8, 5 and 3 tokens with one end each, padded on the right."""
    draw = torch.Generator().manual_seed(1)
    if task == "image-classification":
        high, wide = image_size(model.config) or (32, 32)
        pixels = torch.randint(256, (3, 3, high, wide), generator=draw, dtype=torch.uint8)
        return Images(pixels, torch.arange(3), (-1.0,) * 3, (1.0,) * 3)
    ids, mask = torch.randint(5, WORDS, (3, 8), generator=draw), torch.ones(3, 8, dtype=torch.int64)
    for row, length in enumerate((8, 5, 3)):
        ids[row, length - 1] = 3
        ids[row, length:] = mask[row, length:] = 0
    labels = torch.arange(3) if task == "classification" else ids.masked_fill(mask == 0, -100)
    return Texts(ids, mask, labels)


def alone(model: PreTrainedModel, task: Task, row: int) -> dict[str, Tensor]:
    """One of the three rows as transformers itself takes it, without padding, with its labels."""
    three = examples(model, task)
    labels = three.labels[row : row + 1]
    if isinstance(three, Images):
        pixels = three.pixels[row : row + 1].float() / 127.5 - 1
        return {"pixel_values": pixels, "labels": labels}
    assert isinstance(three, Texts)
    length = int(three.attention_mask[row].sum())
    ids = three.input_ids[row : row + 1, :length]
    labels = labels if task == "classification" else labels[:, :length]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def ties(model: nn.Module) -> set[frozenset[str]]:
    """The groups of names that stand for one parameter."""
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return {frozenset(group) for group in names.values() if len(group) > 1}


def outside_body(model: PreTrainedModel) -> set[str]:
    """The names of the parameters that no task but this one has."""
    body: Any = getattr(model, "vision_model", model.base_model)  # CLIP's kin name no body
    inside = {id(parameter) for parameter in body.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) not in inside}
