"""The card beside what is saved: it says what is there, and its code loads it."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from huggingface_hub import metadata_load
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification

import fedsieve
from fedsieve.errors import FedSieveError
from fedsieve.run import rundir, runner
from fedsieve.train import card
from fedsieve.train.card import CARD, Saved, Told
from fedsieve.train.origin import Origin
from tests import runs
from tests.conftest import LABELS, Tiny, texts
from tests.pages import fenced

pytestmark = pytest.mark.usefixtures("no_report")

NAMES = (*LABELS, "a `b` | *c*", "01")  # names that Markdown would take for something else
METHODS = {
    "fedit": fedsieve.fedit(),
    "full": fedsieve.full(),
    "head": fedsieve.head(),
    "flora": fedsieve.flora(),
}


def rows(count: int = 20) -> Dataset:
    made = [text for text, _ in texts(count, 3)]
    return Dataset.from_dict(
        {"text": made, "label": [NAMES[number % len(NAMES)] for number in range(count)]}
    )


def loaded_as_the_card_says(folder: Path) -> dict[str, Any]:
    """What the card's code makes, with the folder's own place in it."""
    (code,) = fenced(folder / CARD, "python")
    assert '"path/to/this/folder"' in code
    code = code.replace('"path/to/this/folder"', repr(str(folder)))
    scope: dict[str, Any] = {}
    exec(compile(code, str(folder / CARD), "exec"), scope)
    return scope


def outputs(model: Any, tokenizer: Any) -> torch.Tensor:
    batch = tokenizer([text for text, _ in texts(8, 4)], padding=True, return_tensors="pt")
    with torch.no_grad():
        out: torch.Tensor = model.eval()(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits
    return out


@pytest.mark.parametrize("name", METHODS)
def test_a_classifier_is_loaded_by_its_cards_code(tiny: Tiny, tmp_path: Path, name: str) -> None:
    """The base has 3 labels, what is saved has 5; every other loader must be told so."""
    run = fedsieve.finetune(
        tiny.bert, [rows()], METHODS[name], rounds=1, lora=fedsieve.Lora(rank=2, targets=("query",))
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        run.finish().save(tmp_path / "saved")
    scope = loaded_as_the_card_says(tmp_path / "saved")
    resident = run._experiment.resident
    resident.put(run.adapter)
    expected = outputs(resident.model, scope["tokenizer"])
    assert expected.shape == (8, len(NAMES))
    torch.testing.assert_close(outputs(scope["model"], scope["tokenizer"]), expected)
    assert [scope["labels"][number] for number in range(len(NAMES))] == sorted(NAMES)
    assert scope["model"].config.id2label == dict(enumerate(sorted(NAMES)))
    assert scope["model"].config.label2id["01"] == 0
    text = (tmp_path / "saved" / CARD).read_text(encoding="utf-8")
    assert f"`{tiny.bert.name}`" in text
    assert str(tiny.bert.parent) not in text
    assert "`` a `b` | *c* ``" in text
    assert "text classification" in text


def test_a_language_model_is_loaded_by_its_cards_code(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    runs.start_language_model(
        tiny, folder, lora={"rank": 2}, partition={"kind": "iid", "clients": 3}, rounds=1
    )
    saved = folder / rundir.ADAPTER
    scope = loaded_as_the_card_says(saved)
    assert outputs(scope["model"], scope["tokenizer"].__class__.from_pretrained(saved)).ndim == 3
    text = (saved / CARD).read_text(encoding="utf-8")
    assert "`fslora_flasc`" in text
    assert "language model" in text
    assert "labels" not in text


def test_a_runs_card_names_its_method_and_its_export_has_the_same(
    whole: Path, tmp_path: Path
) -> None:
    card = (whole / rundir.ADAPTER / CARD).read_text(encoding="utf-8")
    assert "`fslora_flasc`" in card
    assert all(f"`{label}`" in card for label in LABELS)
    assert "More Information Needed" not in card
    runner.export(whole, tmp_path / "out")
    assert (tmp_path / "out" / CARD).read_text(encoding="utf-8") == card
    runner.export(whole, tmp_path / "merged", merge=True)
    scope = loaded_as_the_card_says(tmp_path / "merged")
    assert isinstance(scope["model"], type(AutoModelForSequenceClassification.from_config(
        AutoConfig.from_pretrained(tmp_path / "merged")
    )))  # fmt: skip


def test_a_card_tells_what_the_run_logged(tiny: Tiny, tmp_path: Path) -> None:
    """Scores, bytes and epsilon of the very round, for people, for the hub and for programs."""
    privacy = {"clip": 1.0, "delta": 1e-3, "noise_multiplier": 1.0}
    privacy |= {"quantile": 0.5, "count_noise": 1.0}
    folder = tmp_path / "run"
    given: dict[str, Any] = {"method": {"name": "fedit"}, "budgets": [{}], "privacy": privacy}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of what epsilon does not cover
        runs.start(tiny, folder, rounds=2, **given)
    rows, saved = runs.lines(folder), folder / rundir.ADAPTER
    text = (saved / CARD).read_text(encoding="utf-8")
    down, up = (sum(row[f"{way}_bytes"] for row in rows) for way in ("down", "up"))
    assert f"{down:,} payload bytes down, {up:,} up" in text
    assert f"epsilon {rows[-1]['epsilon']:.4g} at delta 0.001" in text
    assert "(clip 1 at first, then the 0.5 quantile of the updates' norms, noise multi" in text
    assert "in simulation" in text
    assert f"`{tiny.train.name}`" in text
    assert str(tiny.train.parent) not in text
    front: Any = metadata_load(saved / CARD)
    (result,) = front["model-index"][0]["results"]
    assert {each["type"]: each["value"] for each in result["metrics"]} == rows[-1]["metrics"]
    assert front["pipeline_tag"] == result["task"]["type"] == "text-classification"
    assert "base_model" not in front  # a folder
    facts = json.loads((saved / "provenance.json").read_text(encoding="utf-8"))
    assert (facts["rounds"], facts["metrics"]) == (2, rows[-1]["metrics"])
    assert (facts["method"], facts["recipe"]) == ("fedit", "tiny")
    config = json.loads((saved / "adapter_config.json").read_text(encoding="utf-8"))
    assert (facts["rank"], facts["written_by"]["torch"]) == (config["r"], torch.__version__)


def test_a_card_names_the_adapter_that_training_began_from(tiny: Tiny, tmp_path: Path) -> None:
    given: dict[str, Any] = {"method": {"name": "fedit"}, "budgets": [{}]}
    runs.start(tiny, tmp_path / "first", rounds=1, **given)
    start = tmp_path / "first" / rundir.ADAPTER
    assert "begun from" not in (start / CARD).read_text(encoding="utf-8")
    runs.start(tiny, tmp_path / "second", rounds=1, lora__start=str(start), **given)
    saved = tmp_path / "second" / rundir.ADAPTER
    text = (saved / CARD).read_text(encoding="utf-8")
    assert "- begun from: the adapter `first/adapter`, weights `" in text
    assert str(start.parent) not in text
    facts = json.loads((saved / "provenance.json").read_text(encoding="utf-8"))
    assert facts["start"] == "first/adapter"
    assert f"weights `{facts['start_weights']}` (BLAKE2b); rounds and bytes here" in text


def test_no_name_of_a_file_is_markup_or_steers_a_terminal(tiny: Tiny, tmp_path: Path) -> None:
    odd = "te`st\n# head <b>x\x1b[31m | a.csv"
    origin = Origin(str(tiny.bert), odd, False, None, None)
    told = Told(method=odd, recipe=odd, data=odd, tested=odd, start=odd, metrics={"accuracy": 0.5})
    card.write(tmp_path, Saved("classification", origin, None, [odd], rank=4), told)
    body = (tmp_path / CARD).read_text(encoding="utf-8").split("\n---\n", 1)[1]
    assert "\x1b" not in body
    for line in body.splitlines():
        assert line.count("# head") == line.count("`` te`st # head <b>x?[31m | a.csv ``")
    assert body.count("# head") > 4


def test_scores_of_models_that_stay_with_clients_are_not_the_adapters(
    tiny: Tiny, tmp_path: Path
) -> None:
    """FedSA-LoRA's B never leaves its client, and scores are of what each has."""
    folder = tmp_path / "run"
    runs.start(tiny, folder, rounds=2, method={"name": "fedsa_lora"}, budgets=[{}])
    text = (folder / rundir.ADAPTER / CARD).read_text(encoding="utf-8")
    assert "of the clients' own models, parts of which stay with them and are not here" in text
    front: Any = metadata_load(folder / rundir.ADAPTER / CARD)
    assert "model-index" not in front


def test_a_card_tells_what_was_tested_and_what_was_changed_in_the_base(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its code, over a base of the hub, makes the model that was trained."""
    folder = tmp_path / "run"
    changed = {"hidden_act": "relu"}
    given: dict[str, Any] = {"method": {"name": "fedit"}, "budgets": [{}]}
    runs.start(tiny, folder, rounds=1, model__settings=changed, **given)
    saved = folder / rundir.ADAPTER
    front: Any = metadata_load(saved / CARD)
    assert front["model-index"][0]["results"][0]["dataset"]["name"] == tiny.test.name
    text = (saved / CARD).read_text(encoding="utf-8")
    assert "- changed in the base's configuration: `hidden_act = 'relu'`" in text
    origin = Origin(str(tiny.bert), str(tiny.bert), True, None, None)
    told = Told(settings={"hidden_act": "relu"})
    card.write(saved, Saved("classification", origin, None, LABELS, rank=4, alone=False), told)
    model = loaded_as_the_card_says(saved)["model"]
    assert model.config.hidden_act == "relu"


@pytest.mark.parametrize("change", ["rewritten", "gone"])
def test_a_base_that_changed_while_it_was_trained_is_saved_as_it_was(
    tiny: Tiny, tmp_path: Path, change: str
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny.bert, base)
    run = fedsieve.finetune(base, [rows()], fedsieve.fedit(), rounds=1)
    run.finish()
    expected = run.adapter
    if change == "gone":
        shutil.rmtree(base)
    else:
        tensors = load_file(base / "model.safetensors")
        (base / "model.safetensors").unlink()
        save_file(
            {n: t + 1 for n, t in tensors.items()}, base / "model.safetensors", {"format": "pt"}
        )
    run.save(tmp_path / "saved")
    held = load_file(tmp_path / "saved" / "base" / "model.safetensors")
    own = load_file(tiny.bert / "model.safetensors")
    same = [name for name in held if name in own and torch.equal(held[name], own[name])]
    assert len(same) >= len(own) - 2  # but for a head of another size
    assert expected.tensors.keys() == run.adapter.tensors.keys()


def test_a_folder_of_somebodys_is_not_taken_for_an_adapters_base(
    tiny: Tiny, tmp_path: Path
) -> None:
    """Nothing is removed, and nothing written beside it."""
    run = fedsieve.finetune(tiny.bert, [rows()], fedsieve.fedit(), rounds=1)
    mine = tmp_path / "saved" / "base"
    mine.mkdir(parents=True)
    (mine / "thesis.tex").write_text("years of work")
    (tmp_path / "saved" / "provenance.json").write_text("{}")
    with pytest.raises(FedSieveError, match="is there already"):
        run.save(tmp_path / "saved")
    (tmp_path / "saved" / "provenance.json").unlink()
    with pytest.raises(FedSieveError, match="is there already, and the adapter's base would go"):
        run.save(tmp_path / "saved")
    assert sorted(p.name for p in (tmp_path / "saved").rglob("*")) == [
        "base", "thesis.tex",
    ]  # fmt: skip
    run.save(tmp_path / "other")
    run.save(tmp_path / "other")


@pytest.mark.parametrize("part", [(), ("bert.pooler",)])
def test_a_module_that_is_trained_whole_is_named_once(
    tiny: Tiny, tmp_path: Path, part: tuple[str, ...]
) -> None:
    run = fedsieve.finetune(
        tiny.bert,
        [rows()],
        fedsieve.fedit(),
        rounds=1,
        lora=fedsieve.Lora(rank=2, targets=("query",), whole=part),
    )
    run.save(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    for key in ("modules_to_save", "target_modules"):
        assert len(config[key]) == len(set(config[key])), key
