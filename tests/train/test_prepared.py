"""The base beside an adapter: the base's own weights, once on the disk, with the task's labels."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import fedsieve
from fedsieve.errors import FedSieveError
from tests.conftest import LABELS, Tiny, texts


def trained(base: Path, classes: tuple[str, ...]) -> fedsieve.Run:
    rows = {"text": [text for text, _ in texts(20, 3)]}
    rows["label"] = [classes[number % len(classes)] for number in range(20)]
    lora = fedsieve.Lora(rank=2, targets=("query",))
    return fedsieve.finetune(
        base, [Dataset.from_dict(rows)], fedsieve.fedit(), rounds=1, lora=lora
    ).finish()


def check(run: fedsieve.Run, saved: Path) -> None:
    """PEFT's loader gives the outputs of the model that was trained."""
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(saved).eval()
    batch = AutoTokenizer.from_pretrained(saved)(next(texts(1, 5))[0], return_tensors="pt")
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    resident = run._experiment.resident
    resident.put(run.adapter)
    with torch.no_grad():
        expected = resident.model.eval()(**given).logits
        torch.testing.assert_close(loaded(**given).logits, expected)


@pytest.mark.parametrize("classes", [LABELS, ("a", "b", "c", "d", "e")], ids=["3", "5"])
@pytest.mark.parametrize("shards", [1, 8])
def test_the_weights_are_the_bases_own_files(
    tiny: Tiny, tmp_path: Path, classes: tuple[str, ...], shards: int
) -> None:
    """Linked; but for the file that has a head of another size in it, which is written anew."""
    base, size = tmp_path / "model", (tiny.bert / "model.safetensors").stat().st_size
    model = AutoModelForSequenceClassification.from_pretrained(tiny.bert)
    model.save_pretrained(base, max_shard_size=size // shards + 1000)
    AutoTokenizer.from_pretrained(tiny.bert).save_pretrained(base)
    files = sorted(path.name for path in base.glob("*.safetensors"))
    assert (len(files) > 1) == (shards > 1)
    run = trained(base, classes)
    run.save(tmp_path / "saved")
    saved = tmp_path / "saved" / "base"
    assert sorted(path.name for path in saved.glob("*.safetensors")) == files
    anew = [name for name in files if not (saved / name).samefile(base / name)]
    heads = [name for name in files if "classifier.weight" in load_file(base / name)]
    assert anew == ([] if classes == LABELS else heads)
    assert all("classifier.weight" not in load_file(saved / name) for name in anew)
    check(run, tmp_path / "saved")
    run.save(tmp_path / "saved")  # once more, in the place of the first
    check(run, tmp_path / "saved")


def test_where_there_are_no_links_there_are_copies(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("another file system")

    monkeypatch.setattr(os, "link", refuse)
    run = trained(tiny.bert, LABELS)
    run.save(tmp_path / "saved")
    one, two = (each / "model.safetensors" for each in (tmp_path / "saved" / "base", tiny.bert))
    assert not one.samefile(two)
    assert one.read_bytes() == two.read_bytes()
    check(run, tmp_path / "saved")


def test_a_base_that_went_away_meanwhile_is_written_from_memory(tiny: Tiny, tmp_path: Path) -> None:
    base = tmp_path / "model"
    shutil.copytree(tiny.bert, base)
    run = trained(base, ("a", "b", "c", "d"))
    shutil.rmtree(base)
    run.save(tmp_path / "saved")
    check(run, tmp_path / "saved")
    kept = load_file(tmp_path / "saved" / "base" / "model.safetensors")
    original = load_file(tiny.bert / "model.safetensors")
    assert kept.keys() == original.keys()
    body = [name for name in original if not name.startswith("classifier")]
    assert all(torch.equal(kept[name], original[name]) for name in body)


def test_a_base_that_has_the_labels_is_named_itself(tiny: Tiny, tmp_path: Path) -> None:
    base = tmp_path / "model"
    names = dict(enumerate(LABELS))
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny.bert, id2label=names, label2id={label: n for n, label in names.items()}
    )
    model.save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny.bert).save_pretrained(base)
    run = trained(base, LABELS)
    run.save(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert not (tmp_path / "saved" / "base").exists()
    check(run, tmp_path / "saved")


def test_what_lies_where_the_base_would_go_is_left_alone(tiny: Tiny, tmp_path: Path) -> None:
    """`run.save(".")` beside a model in `./base`."""
    base = tmp_path / "base"
    shutil.copytree(tiny.bert, base)
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    run = trained(base, LABELS)
    for _ in range(2):
        with pytest.raises(FedSieveError, match=r"save: the base .* is in .*, and its files"):
            run.save(tmp_path)
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before


def test_a_base_with_an_adapter_in_it_is_no_base(tiny: Tiny, tmp_path: Path) -> None:
    """transformers puts it into the model: PEFT would mix it with the one that is trained."""
    base = tmp_path / "model"
    shutil.copytree(tiny.bert, base)
    trained(tiny.bert, LABELS).save(tmp_path / "saved")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tmp_path / "saved" / name, base)
    with pytest.raises(FedSieveError, match=r"it holds an adapter.*merge"):
        trained(base, LABELS)


# What vLLM reads of an adapter's configuration (vllm/lora/peft_helper.py), and what it refuses.
@pytest.mark.parametrize(
    ("rank", "alpha", "rslora"), [(2, 8.0, False), (3, 5.0, True), (3, 2.5, False)]
)
def test_a_language_models_adapter_is_as_servers_take_them(
    tiny: Tiny, tmp_path: Path, rank: int, alpha: float, rslora: bool
) -> None:
    rows = Dataset.from_dict({"text": [text for text, _ in texts(20, 3)]})
    lora = fedsieve.Lora(rank=rank, alpha=alpha, rslora=rslora, targets=("c_attn", "c_proj"))
    with pytest.warns(UserWarning, match="no padding token"):
        run = fedsieve.finetune(
            tiny.gpt2, [rows], fedsieve.fedit(), rounds=1, lora=lora, task="causal-lm"
        )
    run.finish().save(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"]) == ("LORA", "CAUSAL_LM")
    assert (config["r"], config["lora_alpha"]) == (rank, alpha)
    assert type(config["lora_alpha"]) is (float if alpha % 1 else int)
    assert config["use_rslora"] is rslora
    assert run.adapter.layout.scale == pytest.approx(alpha / (rank**0.5 if rslora else rank))
    assert config["target_modules"] == ["c_attn", "c_proj"]
    assert (config["bias"], config["use_dora"], config["modules_to_save"]) == ("none", False, None)
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    tensors = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    ends = (".lora_A.weight", ".lora_B.weight")
    assert all(name.startswith("base_model.model.") and name.endswith(ends) for name in tensors)
    assert {min(each.shape) for each in tensors.values()} == {rank}
