"""What all bytes are compared with: dense float32 LoRA at the recipe's rank, whatever is trained.

The oracle is PEFT itself: the numbers that it would save of an adapter of that rank, 4 bytes each.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import fedsieve
from fedsieve import methods
from fedsieve.engine import loop
from fedsieve.engine.loop import Receipt, Round
from fedsieve.recipe import read as recipes
from fedsieve.recipe.experiment import from_recipe
from tests import kinds, runs, toy
from tests.conftest import LABELS, Command, Tiny, texts

HEAD = 64  # bytes of a message beside its numbers, at most


def numbers(tiny: Tiny, rank: int, targets: list[str], *, lm: bool = False) -> int:
    kind = AutoModelForCausalLM if lm else AutoModelForSequenceClassification
    base = kind.from_pretrained(tiny.gpt2 if lm else tiny.bert)
    config = LoraConfig(task_type="CAUSAL_LM" if lm else "SEQ_CLS", r=rank, target_modules=targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layers that lie transposed
        state = get_peft_model_state_dict(get_peft_model(base, config))
    return sum(tensor.numel() for tensor in state.values())


def one_message(summary: Round, receipts: Sequence[Receipt]) -> float:
    sent = len(receipts) + sum(r.up_bytes > 0 for r in receipts)
    return summary.dense_bytes / sent


def trained(tiny: Tiny, **changes: Any) -> tuple[Round, list[Receipt]]:
    experiment = from_recipe(recipes.check(tiny.table(**changes)))
    _, progress = loop.begin(experiment.federation, experiment.start)
    summary, receipts, _ = toy.one_round(experiment.federation, progress)
    return summary, receipts


CASES: list[dict[str, Any]] = [{"name": name} for name in methods.names()]
CASES += [{"name": "flasc", "weights": "all"}, {"name": "fedit", "down_values": "int8"}]


@pytest.mark.parametrize("method", kinds.some_of(CASES), ids=lambda m: "-".join(m.values()))
def test_the_reference_is_dense_lora_whatever_is_trained(
    tiny: Tiny, method: dict[str, Any]
) -> None:
    server = {"optimizer": "sgd"}
    summary, receipts = trained(tiny, method=method, server=server, budgets=[{}], rounds=1)
    size = one_message(summary, receipts)
    assert 0 <= size - 4 * numbers(tiny, 4, ["query", "value"]) <= HEAD


def test_it_follows_the_rank_and_the_targets_of_the_recipe(tiny: Tiny) -> None:
    lora = {"rank": 7, "alpha": 8.0, "targets": ["key"]}
    for name in ("head", "full"):
        changes = {"lora": lora, "method": {"name": name}, "budgets": [{}], "rounds": 1}
        size = one_message(*trained(tiny, **changes))
        assert 0 <= size - 4 * numbers(tiny, 7, ["key"]) <= HEAD


def test_causal_models_too(tiny: Tiny) -> None:
    changes: dict[str, Any] = {
        "model": {"source": str(tiny.gpt2), "task": "causal-lm"},
        "lora": {"rank": 4, "targets": ["c_attn"]},
        "data__label": None,
        "partition": {"kind": "iid", "clients": 4},
        "method": {"name": "full"},
        "budgets": [{}],
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the padding token
        size = one_message(*trained(tiny, **changes))
    assert 0 <= size - 4 * numbers(tiny, 4, ["c_attn"], lm=True) <= HEAD


def test_from_a_notebook(tiny: Tiny) -> None:
    rows = [{"text": text, "label": LABELS.index(label)} for text, label in texts(40, 3)]
    lora = fedsieve.Lora(rank=4, alpha=8.0, targets=("query", "value"))
    run = fedsieve.finetune(
        str(tiny.bert), [Dataset.from_list(rows)], methods.load("head")(), rounds=1, lora=lora
    ).finish()
    size = one_message(run.metrics[-1], run.receipts)
    assert 0 <= size - 4 * numbers(tiny, 4, ["query", "value"]) <= HEAD


@pytest.mark.parametrize(("name", "word"), [("head", "fewer"), ("full", "more")])
def test_the_console_says_fewer_or_more(
    tiny: Tiny, tmp_path: Path, command: Command, name: str, word: str
) -> None:
    path = tiny.write(
        tmp_path / "a.toml", method={"name": name}, budgets=[{}], rounds=1, server={"lr": 1.0}
    )
    ran = command("run", path, "--out", tmp_path / "run")
    assert ran.code == 0, ran.err
    last = runs.lines(tmp_path / "run")[-1]
    sent, dense = last["total_bytes"], last["dense_bytes"]
    ratio = max(sent, dense) / min(sent, dense)
    assert ratio > 1.5
    size = f"{ratio:.1f}" if ratio < 9.95 else f"{ratio:.0f}"
    assert f"{size}x {word}" in ran.out
    assert f"{size}x {word}" in (tmp_path / "run" / "report.html").read_text()


def test_a_model_without_a_place_for_lora_has_no_reference(
    tiny: Tiny, tmp_path: Path, command: Command
) -> None:
    """All weights of a model can be trained though no adapter of this rank fits into it."""
    lora = {"rank": 17, "targets": ["query"]}  # a side of its weights is 16
    path = tiny.write(
        tmp_path / "a.toml", method={"name": "full"}, budgets=[{}], rounds=1, lora=lora
    )
    ran = command("run", path, "--out", tmp_path / "run")
    assert ran.code == 0, ran.err
    assert runs.lines(tmp_path / "run")[-1]["dense_bytes"] == 0
    assert "dense LoRA     cannot be had" in ran.out
    assert "no ratio" not in (tmp_path / "run" / "report.html").read_text()
