"""A model's folder of somebody else's: refused in a sentence, before anything large is made."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from datasets import Dataset

from fedsieve.algebra.keys import Key
from fedsieve.errors import FedSieveError
from fedsieve.recipe.examples import tensors
from fedsieve.recipe.read import check
from fedsieve.train.model import load_base
from fedsieve.train.reader import load_reader
from tests.conftest import LABELS, Tiny
from tests.hostile.test_recipes_to_a_site import MEGA, peak

CONFIG: dict[str, Any] = {
    "hidden_size": 1 << 17,
    "vocab_size": 200_000_000,
    "max_position_embeddings": 200_000_000,
    "intermediate_size": 200_000_000,
    "num_hidden_layers": 3_000_000,
    "num_attention_heads": 0,
    "hidden_act": "foo",
    "layer_norm_eps": "x",
    "hidden_dropout_prob": 7,
    "id2label": [1],
    "dtype": "os",
    "pad_token_id": 10**9,
    "attn_implementation": "flash_attention_2",
    "_attn_implementation": "somebody/kernel",
}
FILES: dict[str, Callable[[Path], object]] = {
    "weights cut": lambda p: halved(p / "model.safetensors"),
    "weights empty": lambda p: (p / "model.safetensors").write_bytes(b""),
    "weights of another kind": lambda p: (p / "model.safetensors").write_bytes(b"x" * 200),
    "a header without end": lambda p: (p / "model.safetensors").write_bytes(
        (2**62).to_bytes(8, "little") + b"{}"
    ),
    "an index that is a list": lambda p: index(p, []),
    "an index of nothing": lambda p: index(p, {"weight_map": {}}),
    "weights a pipe": lambda p: pipe(p / "model.safetensors"),
    "configuration a pipe": lambda p: pipe(p / "config.json"),
    "tokenizer a pipe": lambda p: pipe(p / "tokenizer.json"),
    "configuration a list": lambda p: (p / "config.json").write_text("[]"),
    "configuration endless": lambda p: longer(p / "config.json"),
    "tokenizer's settings a list": lambda p: (p / "tokenizer_config.json").write_text("[]"),
    "tokenizer of nothing": lambda p: (p / "tokenizer.json").write_text("{}"),
    "adapter a list": lambda p: (p / "adapter_config.json").write_text("[]"),
    "tokens a list": lambda p: (p / "special_tokens_map.json").write_text("[]"),
    "a vocabulary of nothing": lambda p: without_words(p),
}


def halved(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def longer(path: Path) -> None:
    path.write_text(path.read_text() + " " * (1 << 24))


def index(folder: Path, table: object) -> None:
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(table))


def without_words(folder: Path) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def used(tiny: Tiny, folder: Path) -> None:
    """All that a run makes of a model before it trains."""
    reader, _ = load_reader(str(folder), "classification")
    rows = Dataset.from_dict({"text": ["one", "two"], "label": ["cars", "food"]})
    tensors(check(tiny.table(model={"source": str(folder)})), rows, reader)
    load_base(str(folder), "classification", LABELS, key=Key(0))


@pytest.mark.parametrize("case", [*CONFIG, *FILES])
def test_a_folder_that_is_not_a_models_is_refused_in_a_sentence(
    tiny: Tiny, tmp_path: Path, case: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny.bert, folder)
    if case in CONFIG:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, case: CONFIG[case]}))
    else:
        FILES[case](folder)
    before, began = peak(reset=True), time.monotonic()
    with pytest.raises(FedSieveError) as refused:
        used(tiny, folder)
    said = str(refused.value)
    assert "model" in said
    assert len(said) < 1000
    assert peak() - before < 200 * MEGA
    assert time.monotonic() - began < 20


def test_what_real_models_do_is_taken(tiny: Tiny, tmp_path: Path) -> None:
    """Parts of a head that are drawn, tied tensors, weights in several files, links to them."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in tiny.bert.iterdir():
        (folder / path.name).symlink_to(path)  # as the hub's cache has them
    used(tiny, folder)
    tensors_of = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors_of)
    parts = {f"model-{n}-of-2.safetensors": names[n - 1 :: 2] for n in (1, 2)}
    for file, own in parts.items():
        safetensors.torch.save_file(
            {n: tensors_of[n] for n in own}, folder / file, {"format": "pt"}
        )
    where = {name: file for file, own in parts.items() for name in own}
    table = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(table))
    used(tiny, folder)
    load_base(str(tiny.gpt2), "causal-lm", key=Key(0), pad_token_id=0)
    base = load_base(str(folder), "classification", LABELS, key=Key(0))
    assert all(torch.isfinite(p).all() for p in base.parameters())
