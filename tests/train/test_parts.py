"""What a checkpoint does not hold is trained whole and saved, or refused by name; ties are kept."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

import fedsieve
from fedsieve.algebra.adapter import Adapter
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import View
from fedsieve.algebra.support import everything
from fedsieve.errors import FedSieveError
from fedsieve.run import rundir, runner
from fedsieve.settings import Lora, Task, Training
from fedsieve.tasks.tokens import Texts
from fedsieve.train.local import fit
from fedsieve.train.model import ResidentModel, load_base, set_up
from tests import kinds, runs
from tests.conftest import LABELS, Tiny
from tests.train.families import ties
from tests.train.test_peft import check_against, logits_of

pytestmark = pytest.mark.usefixtures("no_report")

CPU = torch.device("cpu")
HEAD = ("classifier.weight", "classifier.bias")
POOLER = ("bert.pooler.dense.weight", "bert.pooler.dense.bias")
FULL: dict[str, Any] = {
    "method": {"name": "full"},
    "budgets": [{}],
    "training__lr": 1e-3,
    "server": {"optimizer": "sgd"},
    "rounds": 2,
}


def without(source: Path, folder: Path, *names: str) -> Path:
    """A copy of a model whose checkpoint lacks some parameters."""
    shutil.copytree(source, folder)
    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    for name in names:
        del tensors[name]
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    return folder


def resident_of(source: Path, task: Task, lora: Lora) -> ResidentModel:
    classes = LABELS if task == "classification" else ()
    base = load_base(str(source), task, classes, key=Key(0), pad_token_id=0)
    return set_up(base, task, lora, "lora", key=Key(0), device=CPU)


def plain(source: Path) -> PreTrainedModel:
    torch.manual_seed(99)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
        source, num_labels=len(LABELS)
    )
    return model


@pytest.mark.parametrize(
    "lacks",
    kinds.some_of(((names,) for names in (POOLER, HEAD, POOLER + HEAD, POOLER[:1], HEAD[1:])), 2),
)
@pytest.mark.parametrize("method", ["fedit", "ffa_lora", "head"])
def test_a_runs_accuracy_is_had_from_what_it_saved(
    tiny: Tiny, tmp_path: Path, lacks: tuple[str, ...], method: str
) -> None:
    source = without(tiny.bert, tmp_path / "base", *lacks)
    folder = tmp_path / "run"
    changes: dict[str, Any] = {"method": {"name": method}, "budgets": [{}], "rounds": 2}
    runs.start(tiny, folder, model__source=str(source), **changes)
    saved = folder / rundir.ADAPTER
    torch.manual_seed(99)
    if method == "head":
        model = AutoModelForSequenceClassification.from_pretrained(saved)
    else:
        model = AutoPeftModelForSequenceClassification.from_pretrained(saved, num_labels=3)
    check_against(folder, *logits_of(model, AutoTokenizer.from_pretrained(saved), tiny))


@pytest.mark.parametrize(
    ("lacks", "message"),
    [
        ("bert.encoder.layer.1.output.dense.weight", r"holds no bert\.encoder\.layer\.1"),
        ("bert.embeddings.word_embeddings.weight", r"holds no bert\.embeddings\.word"),
        ("bert.embeddings.LayerNorm.bias", r"holds no bert\.embeddings\.LayerNorm\.bias"),
        ("bert.embeddings.position_embeddings.weight", r"holds no bert\.embeddings\.position"),
    ],
)
def test_a_base_of_random_weights_is_refused(
    tiny: Tiny, tmp_path: Path, lacks: str, message: str
) -> None:
    source = without(tiny.bert, tmp_path / "base", lacks)
    with pytest.raises(FedSieveError, match=message):
        load_base(str(source), "classification", LABELS, key=Key(0))


def test_more_layers_than_the_checkpoint_has_are_refused(tiny: Tiny) -> None:
    settings = {"num_hidden_layers": 3}
    with pytest.raises(FedSieveError, match=r"holds no bert\.encoder\.layer\.2.*model\.settings"):
        load_base(str(tiny.bert), "classification", LABELS, key=Key(0), settings=settings)


def test_a_language_model_without_its_head_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.gpt2, tie_word_embeddings=False)
    model.transformer.save_pretrained(tmp_path)
    settings = {"tie_word_embeddings": False}
    with pytest.raises(FedSieveError, match=r"holds no lm_head\.weight, the head"):
        load_base(str(tmp_path), "causal-lm", key=Key(0), settings=settings)


# --- modules that the user names


@pytest.mark.parametrize(
    ("whole", "trained"),
    [
        (("pooler",), POOLER),
        (("bert.pooler.dense",), POOLER),
        (("layer.1.output.LayerNorm", "pooler"), POOLER),
        (("classifier",), ()),
    ],
)
def test_named_modules_are_trained_whole(
    tiny: Tiny, whole: tuple[str, ...], trained: tuple[str, ...]
) -> None:
    resident = resident_of(
        tiny.bert, "classification", Lora(rank=2, targets=("query",), whole=whole)
    )
    names = {f"base_model.model.{name}" for name in (*trained, *HEAD)}
    assert names <= set(resident.layout.names)


@pytest.mark.parametrize(
    ("source", "task", "lora", "message"),
    [
        ("bert", "classification", {"whole": ("poler",)}, "lora.whole names 'poler'.*'pooler'"),
        ("bert", "classification", {"whole": ("pooler", "poler")}, "lora.whole names 'poler'"),
        ("bert", "classification", {"whole": ("ooler",)}, "lora.whole names 'ooler'"),
        ("gpt2", "causal-lm", {"whole": ("lm_head",)}, r"lora\.whole takes in lm_head\.weight"),
        ("gpt2", "causal-lm", {"whole": ("wte",)}, r"lora\.whole takes in transformer\.wte"),
        ("gpt2", "causal-lm", {"targets": ("c_attn", "wte")}, r"lora\.targets takes in trans.*wte"),
        ("gpt2", "causal-lm", {"targets": ("lm_head",)}, r"lora\.targets takes in lm_head\.weight"),
    ],
)
def test_what_cannot_be_trained_whole(
    tiny: Tiny, source: str, task: Task, lora: dict[str, Any], message: str
) -> None:
    with pytest.raises(FedSieveError, match=message):
        resident_of(getattr(tiny, source), task, Lora(rank=2, **{"targets": None, **lora}))


# --- tied weights


def test_a_tied_head_is_trained_under_any_of_its_names(tiny: Tiny) -> None:
    trained = []
    for name in ("lm_head", "wte"):
        base = load_base(str(tiny.gpt2), "causal-lm", key=Key(0))
        lora = Lora(whole=(name,))
        resident = set_up(base, "causal-lm", lora, "head", key=Key(0), device=CPU)
        resident.put(resident.adapter())
        assert base.lm_head.weight is base.transformer.wte.weight
        trained.append(resident.layout.names)
    assert trained == [("transformer.wte.weight",)] * 2


def test_full_training_of_tied_weights_is_a_plain_loop(tiny: Tiny) -> None:
    """GPT-2's embedding is its head: the oracle is transformers with torch's SGD."""
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    base = load_base(str(tiny.gpt2), "causal-lm", key=Key(0), settings=still)
    resident = set_up(base, "causal-lm", Lora(), "all", key=Key(0), device=CPU)
    ids = torch.randint(5, 30, (4, 7), generator=torch.Generator().manual_seed(0))
    examples = Texts(ids, torch.ones_like(ids), ids)
    start, everywhere = resident.adapter(), everything(resident.layout)
    view = View(start, resident.layout, everywhere, everywhere)
    training = Training(lr=0.1, momentum=0.0, batch=4, steps=3, precision="fp32")
    got = fit(resident, view, examples, training, Key(0))

    model = AutoModelForCausalLM.from_pretrained(tiny.gpt2, **still).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert got.loss == pytest.approx(sum(losses) / 3, abs=1e-5)
    expected = dict(model.named_parameters())
    assert expected.keys() == got.tensors.keys()
    for name, tensor in got.tensors.items():
        torch.testing.assert_close(tensor, expected[name].detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("merge", [False, True])
def test_a_full_run_of_tied_weights_is_saved_tied(tiny: Tiny, tmp_path: Path, merge: bool) -> None:
    folder = tmp_path / "run"
    runs.start_language_model(
        tiny,
        folder,
        partition={"kind": "iid", "clients": 3},
        **FULL,
    )
    runner.export(folder, tmp_path / "out", merge=merge)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert ties(model) == ties(AutoModelForCausalLM.from_pretrained(tiny.gpt2))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loss_on_test_rows(model, tokenizer, tiny) == pytest.approx(
        runs.lines(folder)[-1]["eval_loss"], abs=1e-5
    )


def loss_on_test_rows(model: Any, tokenizer: Any, tiny: Tiny) -> float:
    """Of every token after the first, and the end; a row at a time, so that nothing is padded."""
    total, count = 0.0, 0
    for line in tiny.test.read_text(encoding="utf-8").splitlines()[1:]:
        ids = [*tokenizer(line.split(",")[0])["input_ids"], tokenizer.eos_token_id]
        row = torch.tensor([ids])
        with torch.no_grad():
            logits: Tensor = model(input_ids=row).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum").item()
        count += len(ids) - 1
    return total / count


# --- what lies beside an adapter


def test_an_adapters_folder_is_all_that_peft_needs(tiny: Tiny, whole: Path, tmp_path: Path) -> None:
    saved = whole / rundir.ADAPTER
    labels = json.loads((saved / "labels.json").read_text())
    assert labels == {
        "id2label": {str(number): label for number, label in enumerate(LABELS)},
        "label2id": {label: number for number, label in enumerate(LABELS)},
    }
    # The base has as many labels: nothing need be told.
    alone = AutoPeftModelForSequenceClassification.from_pretrained(saved)
    check_against(whole, *logits_of(alone, AutoTokenizer.from_pretrained(saved), tiny))
    # transformers itself makes the base and puts the adapter into it.
    native = AutoModelForSequenceClassification.from_pretrained(saved)
    check_against(whole, *logits_of(native, AutoTokenizer.from_pretrained(saved), tiny))
    runner.export(whole, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in saved.iterdir()}


def test_an_adapter_finds_its_base_from_everywhere(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it was named from where the run was started."""
    monkeypatch.chdir(tiny.bert.parent)
    recipe: dict[str, Any] = {"model__source": f"./{tiny.bert.name}", "rounds": 1}
    runs.start(tiny, tmp_path / "run", **recipe)
    clients = [Dataset.from_dict({"text": ["a", "b", "c"], "label": list(LABELS)})]
    run = fedsieve.finetune(f"./{tiny.bert.name}", clients, fedsieve.fslora(), rounds=1)
    run.save(tmp_path / "api")
    monkeypatch.chdir(tmp_path)
    for saved in (tmp_path / "run" / rundir.ADAPTER, tmp_path / "api"):
        AutoPeftModelForSequenceClassification.from_pretrained(saved)


def test_a_language_models_adapter_has_its_tokenizer(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    runs.start_language_model(
        tiny,
        folder,
        lora={"rank": 4, "targets": ["c_attn", "c_proj"]},
        partition={"kind": "iid", "clients": 3},
        rounds=2,
    )
    saved = folder / rundir.ADAPTER
    assert not (saved / "labels.json").exists()
    model = AutoPeftModelForCausalLM.from_pretrained(saved).eval()
    loss = loss_on_test_rows(model, AutoTokenizer.from_pretrained(saved), tiny)
    assert loss == pytest.approx(runs.lines(folder)[-1]["eval_loss"], abs=1e-5)


def test_random_numbers_elsewhere_do_not_reach_the_saved_adapter(
    tiny: Tiny, tmp_path: Path
) -> None:
    source = without(tiny.bert, tmp_path / "base", *POOLER, *HEAD)
    resident = resident_of(source, "classification", Lora(rank=2, dropout=0.0, targets=("query",)))
    draw = torch.Generator().manual_seed(2)
    shapes = resident.layout.shapes
    tensors = {name: torch.randn(shapes[name], generator=draw) for name in resident.layout.names}
    resident.save(Adapter(resident.layout, tensors), tmp_path / "adapter")
    loaded = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = AutoPeftModelForSequenceClassification.from_pretrained(
            tmp_path / "adapter", num_labels=3
        )
        loaded.append(model.merge_and_unload().state_dict())
    for name, tensor in loaded[0].items():
        assert torch.equal(tensor, loaded[1][name]), name
