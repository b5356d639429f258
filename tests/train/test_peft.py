"""What is on disk is what was evaluated: PEFT and transformers alone get our numbers from it."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from fedsieve.errors import FedSieveError
from fedsieve.run import rundir, runner
from tests import runs
from tests.conftest import LABELS, Tiny

pytestmark = pytest.mark.usefixtures("no_report")  # it has tests of its own


def logits_of(model: Any, tokenizer: Any, tiny: Tiny) -> tuple[Tensor, Tensor]:
    """Logits and labels of the test rows, read and tokenised without FedSieve."""
    with tiny.test.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    batch = tokenizer([row["text"] for row in rows], return_tensors="pt", padding=True)
    with torch.no_grad():
        logits: Tensor = model.eval()(**batch).logits
    return logits, torch.tensor([LABELS.index(row["label"]) for row in rows])


def check_against(folder: Path, logits: Tensor, labels: Tensor) -> None:
    last = runs.lines(folder)[-1]
    loss = torch.nn.functional.cross_entropy(logits.double(), labels).item()
    assert last["eval_loss"] == pytest.approx(loss, abs=1e-6)
    assert last["accuracy"] == (logits.argmax(-1) == labels).sum().item() / len(labels)
    assert last["eval_examples"] == len(labels)


@pytest.mark.parametrize(
    ("scaled", "alpha"), [({}, 8.0), ({"rslora": True}, 6.0), ({"clients": 4}, 12.0)]
)
def test_peft_loads_what_we_evaluated(
    tiny: Tiny, whole: Path, tmp_path: Path, scaled: dict[str, Any], alpha: float
) -> None:
    folder = whole
    if scaled:
        folder = tmp_path / "run"
        given = {f"lora__{key}": value for key, value in scaled.items()}
        runs.start(tiny, folder, lora__alpha=6.0, **given)
    base = AutoModelForSequenceClassification.from_pretrained(tiny.bert, num_labels=3)
    tokenizer = AutoTokenizer.from_pretrained(tiny.bert)
    before, _ = logits_of(base, tokenizer, tiny)
    model = PeftModel.from_pretrained(base, folder / rundir.ADAPTER)
    logits, labels = logits_of(model, tokenizer, tiny)
    assert (logits - before).abs().max() > 0.05
    check_against(folder, logits, labels)
    config = json.loads((folder / rundir.ADAPTER / "adapter_config.json").read_text())
    assert (config["r"], config["use_rslora"]) == (4, bool(scaled))
    assert config["lora_alpha"] == pytest.approx(alpha)
    assert config["base_model_name_or_path"] == str(folder / rundir.ADAPTER / "base")


def test_the_saved_configuration_does_not_depend_on_the_process(tiny: Tiny, tmp_path: Path) -> None:
    """PEFT keeps the names in sets, whose order differs from process to process."""
    targets = ["value", "query", "key", "output.dense", "intermediate.dense"]
    runs.start(tiny, tmp_path, lora__targets=targets, rounds=1)
    config = json.loads((tmp_path / rundir.ADAPTER / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(targets)


def test_export_writes_the_adapter_and_the_merged_model(
    tiny: Tiny, whole: Path, tmp_path: Path
) -> None:
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    merged.mkdir()  # empty: allowed
    assert runner.export(whole, adapter) == 4
    assert runner.export(whole, merged, merge=True) == 4
    runs.assert_same_adapter(adapter, whole / rundir.ADAPTER)
    # Nothing but transformers: no trace of PEFT, of our dropout or of our attention.
    assert "fedsieve" not in (merged / "config.json").read_text()
    names = safetensors.torch.load_file(merged / "model.safetensors").keys()
    original = safetensors.torch.load_file(tiny.bert / "model.safetensors").keys()
    assert names == original
    model = AutoModelForSequenceClassification.from_pretrained(merged)
    assert model.config.id2label == dict(enumerate(LABELS))
    logits, labels = logits_of(model, AutoTokenizer.from_pretrained(merged), tiny)
    base = AutoModelForSequenceClassification.from_pretrained(tiny.bert)
    with_adapter, _ = logits_of(
        PeftModel.from_pretrained(base, adapter), AutoTokenizer.from_pretrained(adapter), tiny
    )
    torch.testing.assert_close(logits, with_adapter, atol=1e-5, rtol=1e-5)
    check_against(whole, logits, labels)
    with pytest.raises(FedSieveError, match="is not empty"):
        runner.export(whole, merged)


def test_export_takes_the_newest_whole_checkpoint(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(runner.Stopped):
        runs.start(tiny, folder, runs.stop_at(2))
    assert runner.export(folder, tmp_path / "out") == 2
    (folder / rundir.CHECKPOINTS / "round-000002.safetensors").write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="round-000002.safetensors is damaged"):
        assert runner.export(folder, tmp_path / "out2") == 1


def test_a_merged_causal_model_speaks_as_the_adapter_does(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    runs.start_language_model(
        tiny,
        folder,
        lora={"rank": 4, "targets": ["c_attn", "c_proj"]},
        partition={"kind": "iid", "clients": 6},
        rounds=2,
    )
    runner.export(folder, tmp_path / "merged", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    base = AutoModelForCausalLM.from_pretrained(tiny.gpt2)
    ids = torch.tensor([[5, 6, 7, 30, 31, 32]])
    with torch.no_grad():
        plain = base.eval()(ids).logits
        expected = PeftModel.from_pretrained(base, folder / rundir.ADAPTER).eval()(ids).logits
        torch.testing.assert_close(merged(ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert (plain - expected).abs().max() > 0.01
