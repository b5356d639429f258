"""`fedsieve.finetune`, as a notebook uses it."""

import copy
import pickle
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pandas as pd
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDataset, Value
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import fedsieve
from fedsieve import Budget, FedSieveError, Lora, Training
from fedsieve.algebra.keys import Key
from fedsieve.algebra.optim import sgd
from fedsieve.clients.noise import private
from tests import kinds
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


@pytest.mark.parametrize("rounds", [0, 1])
def test_what_is_done_to_the_adapter_of_a_run_is_not_done_to_the_run(
    tiny: Tiny, rounds: int
) -> None:
    clients = [rows(16, seed=number) for number in range(4)]
    run, plain = finetune(tiny, clients), finetune(tiny, clients).finish()
    for _ in range(rounds):
        next(iter(run))
    given = run.adapter
    with torch.no_grad():
        for tensor in given.tensors.values():
            tensor.mul_(3)
    given.tensors.clear()
    assert same(run.finish().adapter, plain.adapter)


def test_threads_that_share_a_run_take_turns(tiny: Tiny) -> None:
    """They trained over one model: other losses each time, and rounds that were there twice."""
    clients = [rows(16, seed=number) for number in range(4)]
    whole, shared = (finetune(tiny, clients, rounds=6) for _ in range(2))
    whole.finish()
    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(shared.finish) for _ in range(3)]:
            done.result()
    assert [summary.round for summary in shared.metrics] == [*range(7)]
    assert same(shared.adapter, whole.adapter)


def test_saves_and_what_is_kept_at_once_are_whole(tiny: Tiny, tmp_path: Path) -> None:
    """One took the other's half-written files for those of a save that was killed."""
    clients = [rows(16, seed=number) for number in range(4)]
    shared = finetune(tiny, clients, rounds=1).finish()
    with ThreadPoolExecutor(4) as pool:
        acts = [shared.save, lambda folder: shared.keep(folder / "kept")] * 6
        for done in [pool.submit(act, tmp_path) for act in acts]:
            done.result()
    AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    with (
        filelock.FileLock(tmp_path / ".fedsieve.lock").acquire(timeout=0),
        pytest.raises(FedSieveError, match="another save is at work in "),
    ):
        shared.save(tmp_path)


def test_a_callback_may_wait_for_a_thread_that_asks_the_run(tiny: Tiny) -> None:
    clients, scores = [rows(16, seed=number) for number in range(4)], []
    with ThreadPoolExecutor(1) as pool:

        def asking(summary: Any) -> None:
            scores.append(pool.submit(run.score, clients[0]).result(timeout=60).loss)

        run = finetune(tiny, clients, rounds=2, on_round=asking)
        run.finish()
    assert len(scores) == 3


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_run_is_not_copied(tiny: Tiny, copied: Callable[[Any], Any]) -> None:
    """Its copy had the same model and memories, and moved them under the run's feet."""
    run = finetune(tiny, [rows(16, 1)], fedsieve.flasc(feedback=True))
    with pytest.raises(FedSieveError, match="cannot be copied or pickled"):
        copied(run)


def test_a_warning_that_is_raised_loses_no_round(tiny: Tiny) -> None:
    method = fedsieve.flasc(server=fedsieve.adam(1e-4))
    run = finetune(tiny, [rows(16, 1)], method, budgets=Budget(down=0.2), rounds=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with pytest.raises(UserWarning, match="round 2: the masks let nothing of B"):
            run.finish()
        run.finish()
    assert [each.round for each in run.metrics] == [0, 1, 2, 3, 4]
    assert [each.round for each in run.receipts] == [1, 2, 3, 4]


def test_runs_in_several_threads_are_those_of_one(tiny: Tiny) -> None:
    """Dropout and fresh heads are drawn from torch's own generator, which threads share."""

    dropping = Lora(rank=4, targets=("query", "value"), dropout=0.5)

    def one(_: int) -> Any:
        run = finetune(tiny, [rows(16, 1), rows(16, 2)], rounds=2, lora=dropping)
        return run.finish().adapter

    with ThreadPoolExecutor(3) as pool:
        alone, *beside = one(0), *pool.map(one, range(3))
    assert all(same(each, alone) for each in beside)


def test_a_transform_that_would_not_be_called_is_refused(tiny: Tiny) -> None:
    changed = rows(16, 1).with_transform(lambda some: {**some, "text": ["wine"] * 16})
    said = r"transform .*part of them with `map`"
    with pytest.raises(FedSieveError, match=said):
        finetune(tiny, [changed])
    with pytest.warns(UserWarning, match=f"1 of 2 clients .*: client '0001': .*{said}"):
        finetune(tiny, [rows(16, 2), changed])


@pytest.mark.parametrize("noise_from", ["seed", "system"])
def test_the_seed_does_not_tell_who_takes_part_where_the_noise_is_fresh(
    tiny: Tiny, noise_from: Any
) -> None:
    clients = [rows(16, seed=number) for number in range(4)]
    drawn = []
    for _ in range(2):
        server = private(
            sgd(), clip=0.1, noise_multiplier=1, expected=2, key=Key(0), noise_from=noise_from
        )
        run = finetune(tiny, clients, fedsieve.fedit(server=server), rounds=12, cohort=2)
        run.finish()
        drawn.append([(receipt.round, receipt.client) for receipt in run.receipts])
    assert (drawn[0] == drawn[1]) == (noise_from == "seed")


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
    assert min(each.down_b or 0.0 for each in run.metrics[2:]) > 0


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
    with pytest.raises(FedSieveError, match="text: a causal-lm task needs it, or else prompt"):
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
        ({"evaluate_every": 0}, "evaluate_every is 0; it must be at least 1"),
        ({"evaluate_every": -1}, "evaluate_every is -1"),
    ):
        with pytest.raises(FedSieveError, match=message):
            finetune(tiny, [rows(10, 1)], **options)
    with pytest.raises(FedSieveError, match="model 'no/such' was not found"):
        fedsieve.finetune("no/such", [rows(10, 1)], fedsieve.fedit(), rounds=1)


# --- rows of every kind


def stream(rows: list[dict[str, Any]]) -> IterableDataset:
    """A stream of rows, of which nothing is known before they come."""

    def give() -> Iterator[dict[str, Any]]:
        yield from rows

    return IterableDataset.from_generator(give)


STREAMS: list[Callable[[Dataset], Any]] = [
    lambda data: data.to_iterable_dataset(num_shards=2),
    lambda data: stream(data.to_list()),
    lambda data: data.cast_column("label", ClassLabel(names=list(LABELS))).to_iterable_dataset(),
    lambda data: data.to_iterable_dataset().map(lambda row: {**row, "odd": [row["text"], 1]}),
    lambda data: data.to_iterable_dataset().with_format("torch"),
    lambda data: data.with_format("pandas"),
    lambda data: Dataset.from_pandas(
        pd.DataFrame({**data.to_dict(), "label": pd.Categorical(data["label"][:])})
    ),
    lambda data: data.cast_column("label", Value("large_string")),
    lambda data: data.to_list(),
    lambda data: tuple(data.to_list()),
    lambda data: data.to_dict(),
    lambda data: {"text": np.array(data["text"][:], object), "label": np.array(data["label"][:])},
    lambda data: data.to_pandas(),
    lambda data: data.to_pandas().set_index("label", drop=False).assign(odd=[object()] * len(data)),
    lambda data: data.to_pandas().assign(label=pd.Categorical(data["label"][:])),
    lambda data: data.to_pandas().convert_dtypes(dtype_backend="pyarrow"),
    lambda data: written(data, "csv"),
    lambda data: str(written(data, "parquet")),
    lambda data: polars().from_dicts(data.to_list()),
    lambda data: polars().from_dicts(data.to_list()).cast({"label": polars().Categorical}),
]


def polars() -> Any:
    return pytest.importorskip("polars")


def written(data: Dataset, kind: str) -> Path:
    path = Path(tempfile.mkdtemp()) / f"rows.{kind}"
    getattr(data, f"to_{kind}")(str(path))
    return path


@pytest.mark.parametrize("number", kinds.some_of(range(len(STREAMS))))
def test_streams_and_other_forms_of_the_same_rows(tiny: Tiny, number: int) -> None:
    plain = [rows(12, 1), rows(9, 2)]
    expected = finetune(tiny, plain, rounds=1, test=rows(6, 3)).finish()
    other = [STREAMS[number](each) for each in plain]
    run = finetune(tiny, other, rounds=1, test=STREAMS[number](rows(6, 3))).finish()
    assert same(run.adapter, expected.adapter)
    assert run.metrics[-1].eval_loss == expected.metrics[-1].eval_loss


def test_streams_of_prompts(tiny: Tiny) -> None:
    replies = [{"ask": "cars1 ", "reply": "word1", "score": 1}] * 3
    options: dict[str, Any] = {
        "rounds": 1, "task": "causal-lm", "prompt": "ask", "completion": "reply", "lora": LORA,
    }  # fmt: skip
    options["lora"] = Lora(rank=4, targets=("c_attn",))
    run = fedsieve.finetune(
        str(tiny.gpt2), {"a": stream(replies)}, fedsieve.fedit(), device="cpu", **options
    )
    assert [client.examples for client in run._experiment.federation.clients] == [3]


GOOD: list[Any] = [{"text": f"word{n}", "label": LABELS[n % 3]} for n in range(6)]
NUMBERED = Features({"text": Value("string"), "label": Value("int64")})
NAMED = Features({"text": Value("string"), "label": ClassLabel(names=list(LABELS))})


def changed(row: int, **values: Any) -> list[dict[str, Any]]:
    return [{**each, **(values if n == row else {})} for n, each in enumerate(GOOD)]


BAD: list[tuple[Any, str]] = [
    (stream(changed(2, label=None)), "row 2 of column 'label' has no label"),
    (stream(changed(2, label=float("nan"))), "row 2 has a number in column 'label', and row 0 has"),
    (stream(changed(2, label=7)), "row 2 has a number in column 'label', and row 0 has a text"),
    (stream(changed(2, label=["cars"])), "row 2 has a list in column 'label', and row 0 has a t"),
    (stream(changed(2, text=3.5)), "row 2 has a number in column 'text', and row 0 has a text"),
    (stream(changed(2, text=None)), "row 2 of column 'text' holds nothing instead of a text"),
    (stream(changed(2, label=b"cars")), "row 2 has bytes in column 'label', and row 0 has a text"),
    (stream([{"text": "a", "label": {"is": "cars"}}]), "row 0 of column 'label' holds an object"),
    (stream([{"text": "a"}]), "no column 'label'"),
    (stream([{"text": "a", "label": "a\nb"}]), "row 0 of column 'label' holds 'a.nb', and a name"),
    (stream(changed(2, label="x")).cast(NUMBERED), "the stream breaks off after . rows: .*'cars'"),
    (Dataset.from_list(changed(2, label=None)), "row 2 of column 'label' has no label"),
    (Dataset.from_list(changed(2, label=" ")), "row 2 of column 'label' has no label"),
    (Dataset.from_list(changed(2, text=None)), "row 2 of column 'text' holds nothing instead"),
    (Dataset.from_dict({"text": ["a"], "label": [["cars"]]}), "row 0 of column 'label' holds a l"),
    (Dataset.from_dict({"text": ["a"], "label": [0.5]}), "row 0 of column 'label' holds 0.5"),
    (Dataset.from_dict({"text": ["a"], "lable": ["cars"]}), "no column 'label' .did you mean"),
    (
        Dataset.from_dict({"text": ["a"], "label": [-1]}, features=NAMED),
        "row 0 of column 'label' holds -1, and its 3 classes have the numbers 0 to 2",
    ),
    (
        Dataset.from_dict({"text": ["a"], "label": [0]}),
        "label '0' in row 0 of column 'label' is none of the 3 classes: cars, space, wine",
    ),
    (5, "rows are needed .a datasets.Dataset .*, a list of dicts, .* not int"),
    ([*GOOD, 5], f"row {len(GOOD)} is no dict like the others, but of the type int"),
    (iter(GOOD), "rows are needed .* not list_iterator"),
    (pd.DataFrame(changed(2, label=7)), "row 2 has a number in column 'label', and row 0 has a t"),
    (
        pd.DataFrame(GOOD).rename(columns={"label": "labl"}),
        "no column 'label' .did you mean 'labl'",
    ),
    (changed(2, text=5), "row 2 has a number in column 'text', and row 0 has a text"),
    ({"text": ["a", "b"], "label": ["cars"]}, "columns of different lengths: 'label' has 1 values"),
    ("no/such/file.csv", "there is no file no/such/file.csv"),
    (DatasetDict({"train": Dataset.from_list(GOOD)}), "a data set of splits is given: choose one"),
    (None, "not NoneType"),
]


@pytest.mark.parametrize("number", kinds.some_of(range(len(BAD))))
def test_a_client_with_bad_rows_is_named_and_left_out(tiny: Tiny, number: int) -> None:
    bad, said = BAD[number]
    named = Dataset.from_list(GOOD).cast_column("label", ClassLabel(names=list(LABELS)))
    clients = {"north": named, "south": bad, "east": named}
    why = f"1 of 3 clients have rows that cannot be used and are left out: client 'south': .*{said}"
    with pytest.warns(UserWarning, match=why):
        run = finetune(tiny, clients, rounds=1).finish()
    assert [receipt.client for receipt in run.receipts] == ["east", "north"]
    assert same(
        run.adapter, finetune(tiny, {"north": named, "east": named}, rounds=1).finish().adapter
    )
    with pytest.raises(
        FedSieveError, match=f"no client has rows .*client 'south': .*{said}"
    ) as all_:
        finetune(tiny, {"south": bad}, classes=LABELS)
    assert "\n" not in str(all_.value)
    if bad is not None:
        with pytest.raises(FedSieveError, match=f"test: .*{said}"):
            finetune(tiny, [named], test=bad)


def test_strict_stops_at_a_client_with_bad_rows(tiny: Tiny) -> None:
    bad = Dataset.from_dict({"text": ["a"], "label": [None]})
    with pytest.raises(FedSieveError, match=r"strict: rows of 1 clients .*client '0001': row 0 of"):
        finetune(tiny, [Dataset.from_list(GOOD), bad], strict=True)


def test_a_class_that_only_bad_rows_have_is_none(tiny: Tiny) -> None:
    strange = [{"text": "a", "label": "boats"}, {"text": None, "label": "cars"}]
    with pytest.warns(UserWarning, match="client '0001': row 1 of column 'text' holds nothing"):
        run = finetune(tiny, [Dataset.from_list(GOOD), Dataset.from_list(strange)])
    config = run._experiment.resident.model.config
    assert tuple(config.id2label.values()) == LABELS


def test_many_bad_clients_are_counted_and_three_are_named(tiny: Tiny) -> None:
    bad = [Dataset.from_dict({"text": ["a"], "label": [None]}) for _ in range(5)]
    with pytest.warns(UserWarning, match=r"^5 of 6 clients .*'0001': .*'0003': .*; 2 more$"):
        run = finetune(tiny, [Dataset.from_list(GOOD), *bad], cohort=6, rounds=1).finish()
    assert len(run.receipts) == 1


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([["01", "02"], ["02", "10"]], ("01", "02", "10")),
        ([["1", "2"], [2, 10]], ("1", "2", "10")),
        ([[1.0, 2.0], [1, 2]], ("1", "2")),
        ([[True, False], ["True", "False"]], ("False", "True")),
        ([["a", " b"], ["b ", "a"]], ("a", "b")),
        ([["e\u0301", "x"], ["\u00e9", "x"]], ("x", "\u00e9")),
        ([np.array([3, 1], dtype=np.uint8), np.array([2, 1])], ("1", "2", "3")),
    ],
)
def test_clients_whose_labels_have_other_types_agree(
    tiny: Tiny, labels: list[Any], names: tuple[str, ...]
) -> None:
    clients = [Dataset.from_dict({"text": ["a", "b"], "label": each}) for each in labels]
    config = finetune(tiny, clients)._experiment.resident.model.config
    assert tuple(config.id2label.values()) == names


def test_clients_whose_class_labels_have_another_order_agree(tiny: Tiny) -> None:
    """The number is not the name: 0 is "cars" here and "wine" there."""
    one = Dataset.from_list(GOOD).cast_column("label", ClassLabel(names=list(LABELS)))
    two = Dataset.from_list(GOOD).cast_column("label", ClassLabel(names=list(LABELS[::-1])))
    run = finetune(tiny, [one, two], rounds=1).finish()
    plain = finetune(tiny, [Dataset.from_list(GOOD)] * 2, rounds=1).finish()
    assert same(run.adapter, plain.adapter)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([[True, False], ["true", "false"]], "'False' and 'false'; 'True' and 'true'"),
        ([["0.0", "1.0"], [0, 1]], "'0' and '0.0'; '1' and '1.0'"),
        ([["Cars", "wine"], ["cars", "wine"]], "'Cars' and 'cars'"),
        ([["cars", "wine", "CARS"]], "'CARS' and 'cars'"),
    ],
)
def test_classes_that_differ_in_spelling_alone_are_named(
    tiny: Tiny, labels: list[Any], said: str
) -> None:
    clients = [Dataset.from_dict({"text": ["a"] * len(each), "label": each}) for each in labels]
    with pytest.warns(UserWarning, match=f"differ in spelling alone: {said} .write them alike"):
        finetune(tiny, clients)


def test_a_number_that_names_nothing_is_no_class_beside_other_class_labels(tiny: Tiny) -> None:
    """Neither -1, which is no class of its own, nor the numbers of a client without names."""

    def named(names: Any, labels: list[int]) -> Dataset:
        kinds = Features({"text": Value("string"), "label": ClassLabel(names=list(names))})
        return Dataset.from_dict({"text": ["a"] * len(labels), "label": labels}, features=kinds)

    clients = {"one": named(LABELS, [0, 1, 2]), "two": named(LABELS[::-1], [2, 0])}
    for bad, why in (
        (named(("cars", "wine"), [0, -1]), "row 1 of column 'label' holds -1, and its 2 classes"),
        (
            Dataset.from_dict({"text": ["a", "b"], "label": [0, 2]}),
            "label '0' in row 0 of column 'label' is none of the 3 classes: cars, space, wine",
        ),
    ):
        with pytest.warns(UserWarning, match=f"client 'bad': {why}"):
            run = finetune(tiny, {**clients, "bad": bad})
        assert tuple(run._experiment.resident.model.config.id2label.values()) == LABELS
    # Numbers that are the names of classes are names.
    both = [named(["0", "1"], [0, 1]), named(["1", "2"], [0, 1])]
    run = finetune(tiny, [*both, Dataset.from_dict({"text": ["a", "b"], "label": [0, 2]})])
    assert len(run._experiment.federation.clients) == 3


def test_ids_of_clients_are_names(tiny: Tiny) -> None:
    run = finetune(
        tiny,
        {7: rows(9, 1), "01": rows(9, 2), " ward ": rows(9, 3)},
        budgets={"7": Budget(), "01": Budget(ratio=0.5), "ward": Budget()},
        rounds=1,
    ).finish()
    assert [(r.client, r.rank) for r in run.receipts] == [("01", 2), ("7", 4), ("ward", 4)]
    wrong: list[tuple[Any, str]] = [
        ({1: rows(9, 1), "1": rows(9, 2)}, "clients: '1' is there twice"),
        ({None: rows(9, 1)}, "clients: None is no id"),
        ({(1, 2): rows(9, 1)}, "clients: an id holds a list"),
        (rows(9, 1), r"clients: one table is given \(Dataset\): say with `partition` which"),
        ("data.csv", r"clients: one table is given \(str\)"),
        (GOOD, r"clients: one table is given \(list\)"),
        (rows(9, 1).to_dict(), r"clients: one table is given \(dict\)"),
        (pd.DataFrame(GOOD), r"clients: one table is given \(DataFrame\)"),
        (5, "clients: a list, or a dict by client, is needed, not one int"),
    ]
    for clients, said in wrong:
        with pytest.raises(FedSieveError, match=said):
            finetune(tiny, clients)
    with pytest.raises(FedSieveError, match="text: this task needs it: say which column that is"):
        finetune(tiny, [rows(9, 1)], text=None)


def test_what_docstrings_call_is_there(tmp_path: Any) -> None:
    """In a process that has imported no more than a user's: here the tests' own imports help."""
    told = [
        call
        for name in fedsieve.__all__
        for call in re.findall(r"`(fedsieve\.[^`]*\))`", getattr(fedsieve, name).__doc__ or "")
    ]
    assert any("flasc" in call for call in told)
    lines = ["import fedsieve", *(f"print({call} is not None)" for call in told)]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True"] * len(told)
