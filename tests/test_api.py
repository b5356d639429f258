"""`fedsieve.finetune`, as a notebook uses it."""

import warnings
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import fedsieve
from fedsieve import Budget, FedSieveError, Lora, Training
from tests.conftest import LABELS, Tiny, texts

pytestmark = pytest.mark.usefixtures("no_report")  # it has tests of its own

TRAINING = Training(optimizer="adamw", lr=0.03, batch=8, precision="fp32")
LORA = Lora(rank=4, targets=("query", "value"), dropout=0.0)


def rows(count: int, seed: int) -> Dataset:
    text, label = zip(*texts(count, seed), strict=True)
    return Dataset.from_dict({"text": text, "label": label})


def finetune(tiny: Tiny, clients: Any, method: Any = None, **options: Any) -> fedsieve.Run:
    given = {"rounds": 3, "lora": LORA, "training": TRAINING, "device": "cpu", **options}
    return fedsieve.finetune(str(tiny.bert), clients, method or fedsieve.fslora(), **given)


def same(one: Any, two: Any) -> bool:
    return all(torch.equal(one.tensors[name], two.tensors[name]) for name in one.tensors)


def test_a_list_of_data_sets(tiny: Tiny, tmp_path: Any) -> None:
    clients = [rows(20 + number, seed=number) for number in range(6)]
    test = rows(40, seed=99)
    run = finetune(
        tiny,
        clients,
        fedsieve.fslora_flasc(server=fedsieve.adam(0.02)),
        test=test,
        cohort=3,
        budgets=Budget(ratio=0.5, up=0.5),
    )
    assert [each.round for each in run.metrics] == [0]
    before = run.adapter
    seen = [(each.round, each.total_bytes) for each in run]
    assert [number for number, _ in seen] == [1, 2, 3]
    assert [each.round for each in run.metrics] == [0, 1, 2, 3]
    assert not same(before, run.adapter)
    assert {each.client for each in run.receipts} <= {f"{number:04d}" for number in range(6)}
    assert len(run.receipts) == 9
    assert {each.rank for each in run.receipts} == {2}
    assert {each.examples for each in run.receipts} <= {20, 21, 22, 23, 24, 25}
    assert list(run) == []  # nothing is left to train
    run.save(tmp_path / "adapter")
    base = AutoModelForSequenceClassification.from_pretrained(tiny.bert)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny.bert)
    batch = tokenizer(test["text"][:], return_tensors="pt", padding=True)
    labels = torch.tensor([LABELS.index(label) for label in test["label"]])
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(**batch).logits, labels).item()
    assert run.metrics[-1].eval_loss == pytest.approx(loss, abs=1e-6)


def test_a_mapping_with_a_budget_each_and_an_empty_client(tiny: Tiny) -> None:
    clients = {"north": rows(20, 1), "south": rows(30, 2), "east": rows(20, 3).select([])}
    budgets = {"north": Budget(), "south": Budget(ratio=0.25), "east": Budget()}
    with pytest.warns(UserWarning, match="1 of 3 clients have no data and are left out: east"):
        run = finetune(tiny, clients, budgets=budgets, rounds=1).finish()
    assert [(r.client, r.rank, r.examples) for r in run.receipts] == [
        ("north", 4, 20),
        ("south", 1, 30),
    ]
    with pytest.raises(FedSieveError, match="budgets: none for client 'south'"):
        finetune(tiny, clients, budgets={"north": Budget(), "east": Budget()})
    nobodies: list[Any] = [[], {}, [clients["east"]]]
    for nobody in nobodies:
        with pytest.raises(FedSieveError, match="at least one data set with a row"):
            finetune(tiny, nobody)


def test_a_run_that_is_looked_at_in_between_is_the_same(tiny: Tiny) -> None:
    clients = [rows(16, seed=number) for number in range(4)]
    whole = finetune(tiny, clients).finish()
    parts = finetune(tiny, clients)
    for each in parts:
        assert each.round == 1
        break
    halfway = parts.adapter
    assert not same(halfway, whole.adapter)
    parts.finish()
    assert same(parts.adapter, whole.adapter)
    assert [m.loss for m in parts.metrics] == [m.loss for m in whole.metrics]
    assert not same(finetune(tiny, clients, seed=1).finish().adapter, whole.adapter)


def test_labels_of_every_kind(tiny: Tiny) -> None:
    """Names of a ClassLabel, integers in their own order, and classes that no client has."""
    named = rows(30, 1).cast_column("label", ClassLabel(names=list(LABELS)))
    numbered = named.map(lambda row: {"number": [2, 10, 9][row["label"]]})
    for clients, options in (
        ([named, named], {}),
        ([numbered, numbered], {"label": "number"}),
        ([rows(30, 1), rows(3, 2).select([0])], {"classes": (*LABELS, "boats")}),
    ):
        run = finetune(tiny, clients, rounds=1, test=clients[0], **options).finish()
        assert run.metrics[-1].eval_examples == 30
    config = finetune(tiny, [numbered], label="number")._experiment.resident.model.config
    assert config.id2label == {0: "2", 1: "9", 2: "10"}
    with pytest.raises(FedSieveError, match="label 'wine' in row 2"):
        finetune(tiny, [rows(30, 1)], classes=("cars", "space"))


@pytest.mark.parametrize("name", ["flasc", "fslora_flasc", "sparse_adapter", "adapter_lth"])
def test_a_run_warns_once_while_clients_get_nothing_of_b(tiny: Tiny, name: str) -> None:
    """Found from the messages alone: no method is named where it is found."""
    slow = fedsieve.adam(1e-4)
    method, budget = {
        "flasc": (fedsieve.flasc(server=slow), Budget(down=0.2)),
        "fslora_flasc": (fedsieve.fslora_flasc(server=slow), Budget(down=0.2, ratio=0.5)),
        "sparse_adapter": (fedsieve.sparse_adapter(server=slow, density=0.2), None),
        "adapter_lth": (fedsieve.adapter_lth(server=slow, keep=0.2), None),
    }[name]
    clients = [rows(16, seed=number) for number in range(3)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = finetune(tiny, clients, method, budgets=budget, rounds=4).finish()
    (said,) = [str(each.message) for each in caught if each.category is UserWarning]
    assert "nothing of B pass down to 3 of 3 clients (kept A 0." in said
    assert "B 0, head 0." in said
    assert said.startswith("round 2:")
    assert {each.starved for each in run.metrics[2:]} == {3}
    assert all(each.down_b == 0 for each in run.receipts[3:])


@pytest.mark.parametrize("make", [fedsieve.flasc, fedsieve.fslora_flasc])
def test_with_the_change_ranked_b_passes_and_nothing_warns(tiny: Tiny, make: Any) -> None:
    clients = [rows(16, seed=number) for number in range(3)]
    budget = Budget(down=0.2, up=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        method = make(server=fedsieve.adam(1e-4), ranked="change")
        run = finetune(tiny, clients, method, budgets=budget, rounds=3).finish()
    assert [each.starved for each in run.metrics] == [None, 0, 0, 0]
    assert min(each.down_b for each in run.metrics[2:]) > 0


def test_causal_language_models(tiny: Tiny) -> None:
    def replies(seed: int) -> Dataset:
        text, label = zip(*texts(24, seed), strict=True)
        return Dataset.from_dict(
            {"ask": [f"{each} " for each in text], "reply": [f"{each}0" for each in label]}
        )

    with pytest.warns(UserWarning, match="The tokenizer has no padding token"):
        run = fedsieve.finetune(
            str(tiny.gpt2),
            [replies(1), replies(2)],
            fedsieve.flasc(),
            rounds=4,
            task="causal-lm",
            prompt="ask",
            completion="reply",
            test=replies(3),
            lora=Lora(rank=4, targets=("c_attn", "c_proj", "c_fc")),
            training=TRAINING,
            device="cpu",
        )
    run.finish()
    assert run.metrics[0].eval_loss is not None
    assert run.metrics[-1].eval_loss is not None
    assert run.metrics[-1].eval_loss < run.metrics[0].eval_loss - 0.5
    assert run.metrics[-1].eval_examples == 48  # the reply and the end of each
    with pytest.raises(FedSieveError, match="either text, or prompt and completion"):
        fedsieve.finetune(
            str(tiny.bert), [replies(1)], fedsieve.flasc(), rounds=1, task="causal-lm",
            completion="reply",
        )  # fmt: skip


def test_what_a_notebook_gets_wrong(tiny: Tiny) -> None:
    for options, message in (
        ({"text": "txt"}, "no column 'txt'"),
        ({"label": "labl"}, "no column 'labl'"),
        ({"lora": Lora(rank=99, targets=("query",))}, "lora.rank 99 is larger"),
        ({"device": "nowhere"}, "device 'nowhere'"),
    ):
        with pytest.raises(FedSieveError, match=message):
            finetune(tiny, [rows(10, 1)], **options)
    with pytest.raises(FedSieveError, match="model 'no/such' cannot be loaded"):
        fedsieve.finetune("no/such", [rows(10, 1)], fedsieve.fedit(), rounds=1)
