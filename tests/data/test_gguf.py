"""A GGUF file that is written here, as a folder that transformers loads: numbers and tokens."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedsieve.data import gguf as ours
from fedsieve.errors import FedSieveError

gguf = pytest.importorskip("gguf")

WIDTH, INNER = 8, 16
TOKENS = ["<unknown>", "<begin>", "<end>", "<fill>", "a", "b", "ab", "ba"]


def write(path: Path) -> dict[str, Any]:
    """A llama of one layer with two merges, and the tensors that are in it."""
    draw = np.random.default_rng(0)
    shapes = {
        "token_embd": (len(TOKENS), WIDTH),
        "output_norm": (WIDTH,),
        "blk.0.attn_norm": (WIDTH,),
        "blk.0.ffn_norm": (WIDTH,),
        **{f"blk.0.attn_{name}": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")},
        "blk.0.ffn_gate": (INNER, WIDTH),
        "blk.0.ffn_up": (INNER, WIDTH),
        "blk.0.ffn_down": (WIDTH, INNER),
    }
    tensors = {name: draw.normal(size=s).astype(np.float32) for name, s in shapes.items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(32)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3, 3, 1, 1, 1, 1])
    writer.add_token_merges(["a b", "b a"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(3)
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.mark.parametrize("confused", [False, True])
def test_a_file_becomes_a_folder_that_means_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, confused: bool
) -> None:
    """`confused`: some versions of transformers take one special token for another."""
    if confused:
        read = AutoTokenizer.from_pretrained

        def wrongly(*given: Any, **named: Any) -> Any:
            tokenizer = read(*given, **named)
            tokenizer.eos_token, tokenizer.pad_token = tokenizer.bos_token, None
            return tokenizer

        monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", wrongly)
    held = write(tmp_path / "small.gguf")
    folder = tmp_path / "model"
    folder.mkdir()
    ours.convert(tmp_path / "small.gguf", folder)
    monkeypatch.undo()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    special = (tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    assert special == ("<unknown>", "<begin>", "<end>", "<fill>")
    assert tokenizer("ab", add_special_tokens=False)["input_ids"] == [6]
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, theirs in (
        ("token_embd", "model.embed_tokens"),
        ("blk.0.ffn_down", "model.layers.0.mlp.down_proj"),
        ("blk.0.attn_v", "model.layers.0.self_attn.v_proj"),
    ):
        kept = state[f"{theirs}.weight"].float().numpy()
        np.testing.assert_allclose(kept, held[name], rtol=1e-3, atol=1e-6)  # kept as float16


def test_what_is_no_gguf_is_said(tmp_path: Path) -> None:
    (tmp_path / "small.gguf").write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(FedSieveError, match=r"small.gguf cannot be read as a GGUF model"):
        ours.convert(tmp_path / "small.gguf", tmp_path)
