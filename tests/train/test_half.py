"""A base in half precision trains and evaluates, whatever is trained and at either precision."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import View
from fedsieve.algebra.support import everything
from fedsieve.settings import Lora, Task, Training
from fedsieve.train import local
from fedsieve.train.local import evaluate
from fedsieve.train.model import ResidentModel, load_base, set_up
from tests import kinds
from tests.train import small
from tests.train.test_trial import CLASSES, CPU, classified, continued

# kind, task, targets, and a module in its body that is trained whole
BASES: list[tuple[str, Task, tuple[str, ...], str]] = [
    ("bert", "classification", ("query",), "LayerNorm"),
    ("deberta-v2", "classification", ("query_proj",), "LayerNorm"),
    ("bart", "classification", ("q_proj",), "self_attn_layer_norm"),
    ("t5", "classification", ("q",), "layer_norm"),
    ("gpt2", "causal-lm", ("c_attn",), "ln_f"),
    ("llama", "causal-lm", ("q_proj",), "norm"),
    ("opt", "causal-lm", ("q_proj",), "final_layer_norm"),
]


@pytest.mark.parametrize("dtype", kinds.some_of(["bfloat16", "float16"]))
@pytest.mark.parametrize(("kind", "task", "targets", "inside"), kinds.some_of(BASES, 2))
def test_a_base_in_half_precision(
    tmp_path: Path, kind: str, task: Task, targets: tuple[str, ...], inside: str, dtype: Any
) -> None:
    tokenizer = small.tokenizer()
    examples = classified(tokenizer) if task == "classification" else continued(tokenizer)
    folder = small.make(kind, task, tmp_path)
    classes = CLASSES if task == "classification" else ()
    lora = Lora(rank=2, dropout=0.0, targets=targets)

    def resident(what: Any, whole: tuple[str, ...], dtype: Any) -> ResidentModel:
        base = load_base(
            str(folder), task, classes, key=Key(0), dtype=dtype, pad_token_id=small.PAD
        )
        return set_up(base, task, replace(lora, whole=whole), what, key=Key(0), device=CPU)

    full = resident("lora", (), "float32")
    expected = evaluate(full, full.adapter(), examples, precision="fp32")
    kinds: list[tuple[Any, tuple[str, ...]]] = [("lora", ()), ("lora", (inside,)), ("all", ())]
    if task == "classification":
        kinds.append(("head", ()))
    for what, whole in kinds:
        made = resident(what, whole, dtype)
        start = made.adapter()
        layout = start.layout
        assert {t.dtype for t in start.tensors.values()} == {torch.float32}
        view = View(start, layout, everything(layout), everything(layout))
        for precision in ("fp32", "bf16"):
            once = Training(steps=1, batch=5, lr=1e-3, precision=precision)
            got = local.fit(made, view, examples, once, Key(1))
            assert got.loss == pytest.approx(expected.loss, rel=0.03)
            moved = {n for n, t in got.tensors.items() if not torch.equal(t, start.tensors[n])}
            # At the start B is zero, and so is A's gradient.
            assert moved >= {n for n in layout.names if "lora_" not in n and "head" in n}
            assert any("lora_B" in name for name in moved) or what != "lora"
            assert {t.dtype for t in got.tensors.values()} == {torch.float32}
            score = evaluate(made, start, examples, precision=precision)
            assert score.loss == pytest.approx(expected.loss, rel=0.03)
