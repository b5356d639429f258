"""Tiny models of the families that transformers maps to our two tasks, each from a configuration.

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


class Family(NamedTuple):
    """A family's name in transformers, the tasks that it is tried on, and what makes it tiny.

    tasks:   "c" for classification, "l" for causal language models; none where all are refused
    start:   the class of its base
    targets: of its LoRA pairs, where "all-linear" is refused
    """

    name: str
    tasks: str
    start: Any
    settings: dict[str, Any]
    targets: tuple[str, ...] | str = "all-linear"


FAMILIES = (
    Family("albert", "c", AutoModelForMaskedLM, {**_BERT, "embedding_size": 8}),
    Family("bart", "c", AutoModelForSeq2SeqLM, _BART),
    Family("bert", "c", AutoModelForMaskedLM, _BERT),
    Family("big_bird", "c", AutoModelForMaskedLM, {**_BERT, "attention_type": "original_full"}),
    Family("bloom", "cl", AutoModelForCausalLM, {"hidden_size": 16, "n_layer": 2, "n_head": 2}),
    Family("camembert", "c", AutoModelForMaskedLM, _BERT),
    Family("canine", "", AutoModel, {**_BERT, "num_hash_buckets": 64}),
    Family("cohere", "l", AutoModelForCausalLM, _LLAMA),
    Family("convbert", "", AutoModelForMaskedLM, {**_BERT, "embedding_size": 16, "head_ratio": 1}),
    Family("deberta", "c", AutoModelForMaskedLM, _BERT),
    Family("deberta-v2", "c", AutoModelForMaskedLM, _BERT),
    Family(
        "distilbert",
        "c",
        AutoModelForMaskedLM,
        {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 64},
    ),
    Family("electra", "c", AutoModelForMaskedLM, {**_BERT, "embedding_size": 8}),
    Family("esm", "c", AutoModelForMaskedLM, _BERT, ("query", "value")),
    Family("eurobert", "c", AutoModelForMaskedLM, _LLAMA),
    Family(
        "falcon",
        "cl",
        AutoModelForCausalLM,
        {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    ),
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
    Family("gemma", "cl", AutoModelForCausalLM, _LLAMA),
    Family("gemma2", "c", AutoModelForCausalLM, _LLAMA),
    Family("gemma3_text", "l", AutoModelForCausalLM, _LLAMA),
    Family("gpt2", "cl", AutoModelForCausalLM, _GPT),
    Family("gpt_bigcode", "l", AutoModelForCausalLM, _GPT),
    Family(
        "gpt_neo",
        "c",
        AutoModelForCausalLM,
        {
            "hidden_size": 16,
            "num_layers": 2,
            "num_heads": 2,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 64,
        },
    ),
    Family("gpt_neox", "cl", AutoModelForCausalLM, _BERT),
    Family("gpt_oss", "c", AutoModelForCausalLM, {**_EXPERTS, "num_local_experts": 4}),
    Family("gptj", "cl", AutoModelForCausalLM, {**_GPT, "rotary_dim": 4}),
    Family("granite", "l", AutoModelForCausalLM, _LLAMA),
    Family("ibert", "", AutoModelForMaskedLM, _BERT),
    Family("llama", "cl", AutoModelForCausalLM, _LLAMA),
    Family(
        "llama4_text",
        "",
        AutoModelForCausalLM,
        {**_EXPERTS, "intermediate_size_mlp": 32, "num_local_experts": 4},
    ),
    Family("longformer", "c", AutoModelForMaskedLM, {**_BERT, "attention_window": 4}),
    Family(
        "mamba",
        "l",
        AutoModelForCausalLM,
        {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 4},
        ("in_proj", "x_proj"),
    ),
    Family("mbart", "c", AutoModelForSeq2SeqLM, _BART),
    Family("mistral", "c", AutoModelForCausalLM, _LLAMA),
    Family("mixtral", "cl", AutoModelForCausalLM, {**_EXPERTS, "num_local_experts": 4}, _ATTENTION),
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
    Family("modernbert", "c", AutoModelForMaskedLM, _BERT),
    Family("mpnet", "c", AutoModelForMaskedLM, _BERT),
    Family(
        "mpt",
        "c",
        AutoModelForCausalLM,
        {"d_model": 16, "n_layers": 2, "n_heads": 2, "expansion_ratio": 2, "max_seq_len": 64},
    ),
    Family("olmo", "l", AutoModelForCausalLM, _LLAMA),
    Family("olmo2", "c", AutoModelForCausalLM, _LLAMA),
    Family("olmoe", "l", AutoModelForCausalLM, {**_EXPERTS, "num_experts": 4}, _ATTENTION),
    Family("openai-gpt", "c", AutoModelForCausalLM, _GPT),
    Family(
        "opt",
        "cl",
        AutoModelForCausalLM,
        {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "ffn_dim": 32,
            "word_embed_proj_dim": 16,
            "max_position_embeddings": 64,
        },
    ),
    Family("phi", "l", AutoModelForCausalLM, _LLAMA),
    Family("phi3", "l", AutoModelForCausalLM, _LLAMA),
    Family("phimoe", "", AutoModelForCausalLM, {**_EXPERTS, "num_local_experts": 4}),
    Family("qwen2", "cl", AutoModelForCausalLM, _LLAMA),
    Family(
        "qwen2_moe",
        "l",
        AutoModelForCausalLM,
        {
            **_EXPERTS,
            "num_experts": 4,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
        _ATTENTION,
    ),
    Family("qwen3", "c", AutoModelForCausalLM, _LLAMA),
    Family(
        "qwen3_moe",
        "c",
        AutoModelForCausalLM,
        {**_EXPERTS, "num_experts": 4, "moe_intermediate_size": 16},
        _ATTENTION,
    ),
    Family(
        "rembert",
        "c",
        AutoModelForMaskedLM,
        {**_BERT, "input_embedding_size": 16, "output_embedding_size": 16},
    ),
    Family("roberta", "c", AutoModelForMaskedLM, _BERT),
    Family("roformer", "c", AutoModelForMaskedLM, _BERT),
    Family("smollm3", "l", AutoModelForCausalLM, _LLAMA),
    Family("squeezebert", "c", AutoModelForMaskedLM, {**_BERT, "embedding_size": 16}),
    Family("stablelm", "c", AutoModelForCausalLM, _LLAMA),
    Family("starcoder2", "l", AutoModelForCausalLM, _LLAMA),
    Family("t5", "c", AutoModelForSeq2SeqLM, _T5),
    Family("xlm", "c", AutoModelForMaskedLM, _XLM),
    Family("xlm-roberta", "c", AutoModelForMaskedLM, _BERT),
    Family(
        "xlnet",
        "c",
        AutoModelForCausalLM,
        {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32},
    ),
)

# What is refused, in one sentence: family, task, targets, and part of what is said.
REFUSED: tuple[tuple[str, Task, Any, str], ...] = (
    # Convolutions, spectra, summaries or relative positions over a whole row, padding too.
    ("canine", "classification", "all-linear", "depend on how far the row is padded"),
    ("convbert", "classification", "all-linear", "depend on how far the row is padded"),
    ("fnet", "classification", "all-linear", "depend on how far the row is padded"),
    ("xlnet", "causal-lm", "all-linear", "depend on how far the row is padded"),
    # transformers' own ties are lost between the two classes: it draws the embeddings.
    ("bart", "causal-lm", "all-linear", "holds no model.decoder.embed_tokens.weight"),
    ("mbart", "causal-lm", "all-linear", "holds no model.decoder.embed_tokens.weight"),
    # PEFT takes the name that it knows for the experts' linear layers of old.
    ("mixtral", "causal-lm", "all-linear", "takes in the experts of a mixture"),
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
)


def write(family: Family, folder: Path) -> Path:
    """Make a family's base, from a fixed seed, and save it."""
    config = AutoConfig.for_model(
        family.name,
        vocab_size=WORDS,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        **family.settings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = family.start.from_config(config)
        # A real model's start is near zero; here everything should matter to the logits.
        for parameter in model.parameters():
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return folder


def rows() -> dict[str, Tensor]:
    """Three texts of eight tokens without padding, each with one end."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(5, WORDS, (3, 8), generator=draw)
    ids[:, -1] = 3
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def ties(model: nn.Module) -> set[frozenset[str]]:
    """The groups of names that stand for one parameter."""
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return {frozenset(group) for group in names.values() if len(group) > 1}


def outside_body(model: PreTrainedModel) -> set[str]:
    """The names of the parameters that no task but this one has."""
    body = {id(parameter) for parameter in model.base_model.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) not in body}
