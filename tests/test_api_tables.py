"""One table for all clients, adapters that are there already, and what a run can be asked."""

import errno
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import peft
import pytest
import safetensors.torch
import torch
from datasets import Dataset
from flwr_datasets import FederatedDataset
from flwr_datasets.partitioner import IidPartitioner, NaturalIdPartitioner, PathologicalPartitioner
from hypothesis import given as given_that
from hypothesis import settings as budgeted
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

import fedsieve
from fedsieve import Budget, FedSieveError, Lora, methods, notebook
from fedsieve.algebra.adapter import Adapter
from fedsieve.algebra.mark import made_of
from fedsieve.data import sources
from fedsieve.disk import write_whole
from fedsieve.engine import loop
from fedsieve.recipe import read as recipes
from fedsieve.recipe.experiment import from_recipe
from fedsieve.run import checkpoint, rundir, runner
from fedsieve.train.card import called
from tests import kinds, runs
from tests.conftest import LABELS, Tiny
from tests.test_api import LORA, TRAINING, finetune, rows, same

pytestmark = pytest.mark.filterwarnings("ignore:.*pytest-of")


def owned(count: int = 24) -> Dataset:
    """Rows of three wards, in turn."""
    wards = [("north", "south", "east")[n % 3] for n in range(count)]
    return rows(count, 5).add_column("ward", wards)


def clients_of(run: fedsieve.Run) -> dict[str, int]:
    return {client.id: client.examples for client in run._experiment.federation.clients}


# --- one table


TABLES: list[Callable[[Dataset], Any]] = [
    lambda table: table,
    lambda table: table.to_pandas(),
    lambda table: table.to_list(),
    lambda table: table.to_dict(),
    lambda table: table.to_iterable_dataset(),
]


@pytest.mark.parametrize("number", range(len(TABLES)))
def test_a_column_says_whose_each_row_is(tiny: Tiny, number: int) -> None:
    table = owned()
    each = {w: table.filter(lambda row, w=w: row["ward"] == w) for w in ("north", "south", "east")}
    expected = finetune(tiny, each, rounds=1).finish()
    run = finetune(tiny, TABLES[number](table), partition="ward", rounds=1).finish()
    assert clients_of(run) == {"north": 8, "south": 8, "east": 8}
    assert same(run.adapter, expected.adapter)


@pytest.mark.parametrize(
    "table",
    [
        {"kind": "dirichlet", "clients": 6, "alpha": 0.5},
        {"kind": "dirichlet-by-client", "clients": 7, "alpha": 0.5},
        {"kind": "dirichlet", "clients": 6, "alpha": 0.5, "by": "author"},
        {"kind": "iid", "clients": 7},
    ],
)
def test_a_partition_is_that_of_a_recipe(tiny: Tiny, table: dict[str, Any]) -> None:
    recipe = recipes.check(tiny.table(partition=table, seed=3, budgets=None, method__name="fedit"))
    named = from_recipe(recipe)
    there = {client.id: client.examples for client in named.federation.clients}
    partition = table if "alpha" in table else np.int64(table["clients"])
    run = finetune(tiny, str(tiny.train), partition=partition, seed=3, max_length=16)
    assert clients_of(run) == there
    assert len(there) > 3


@pytest.mark.parametrize(
    "partition", ["ward", 4, {"kind": "dirichlet", "clients": 4, "alpha": 9, "by": "ward"}]
)
def test_a_bad_row_of_a_divided_table_is_named_as_the_table_has_it(
    tiny: Tiny, partition: Any
) -> None:
    table = owned().to_list()
    table[17]["text"] = None
    why = "^1 of . clients .* left out: client '[a-z0-9]+': row 17 of column 'text' holds nothing"
    with pytest.warns(UserWarning, match=why):
        left = clients_of(finetune(tiny, table, partition=partition, rounds=1))
    assert 0 < sum(left.values()) < 24
    with pytest.raises(FedSieveError, match=r"strict: .*: row 17 of column 'text' holds nothing"):
        finetune(tiny, table, partition=partition, rounds=1, strict=True)


def partitioned(partitioner: Any, table: Dataset) -> Any:
    partitioner.dataset = table
    return partitioner


def test_partitioners_of_flower_are_taken_as_they_are(tiny: Tiny, tmp_path: Path) -> None:
    table = owned()
    natural = partitioned(NaturalIdPartitioner(partition_by="ward"), table)
    run = finetune(tiny, natural, rounds=1)
    assert clients_of(run) == {"north": 8, "south": 8, "east": 8}
    even = partitioned(IidPartitioner(num_partitions=5), table)
    run = finetune(tiny, even, rounds=1)
    assert clients_of(run) == {f"000{n}": 5 if n < 4 else 4 for n in range(5)}
    pathological = PathologicalPartitioner(
        num_partitions=3, partition_by="label", num_classes_per_partition=1
    )
    run = finetune(tiny, table, partition=pathological, rounds=1)
    assert sum(clients_of(run).values()) == 24
    folder = tmp_path / "wards"
    folder.mkdir()
    table.to_csv(str(folder / "train.csv"))
    hub = FederatedDataset(dataset=str(folder), partitioners={"train": 4})
    assert clients_of(finetune(tiny, hub, rounds=1)) == {f"000{n}": 6 for n in range(4)}
    for clients, partition, said in (
        (IidPartitioner(num_partitions=5), None, "the partitioner fails: .*needs its `dataset`"),
        (even, "ward", "partition: the partitioner in `clients` says it"),
        (table, even, "partition: .*should be assigned only once"),
        (table, object(), "partition: a column's name, .* is needed"),
        (table, "wrad", "partition: no column 'wrad' .did you mean 'ward'"),
        (table, 0, "partition is 0"),
        (table, {"kind": "iid"}, "partition: .*needs 'clients'"),
        (table, {"kind": "iid", "clients": 99}, "99"),
        (table.select([]), "ward", "clients: at least one row"),
    ):
        with pytest.raises(FedSieveError, match=said) as caught:
            finetune(tiny, clients, partition=partition)
        assert "\n" not in str(caught.value)


def test_a_stream_without_an_end_is_refused(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MOST_ROWS", 50)
    endless = rows(6, 1).to_iterable_dataset().repeat(None)
    with pytest.raises(FedSieveError, match=r"more than 50 rows, if it ever ends: .*take"):
        finetune(tiny, [endless])
    assert clients_of(finetune(tiny, [endless.take(50)])) == {"0000": 50}


# --- what is meant


@pytest.mark.parametrize(
    ("method", "given", "budget"),
    [
        ("fslora", 0.5, Budget(ratio=0.5)),
        ("flasc", 0.25, Budget(down=0.25, up=0.25)),
        ("adapter_lth", 1, None),
        ("fslora_flasc", 0.5, None),
        ("fedit", np.float32(0.5), None),
    ],
)
def test_a_number_is_the_budget_that_the_method_uses(
    tiny: Tiny, method: str, given: Any, budget: Budget | None
) -> None:
    if budget is None:
        with pytest.raises(FedSieveError, match=r"budgets: .* could be (each of ratio|nothing)"):
            finetune(tiny, [rows(6, 1)], method, budgets=given)
        return
    for each in (given, {"0000": given}):
        run = finetune(tiny, [rows(6, 1)], method, budgets=each)
        assert [client.budget for client in run._experiment.federation.clients] == [budget]


# --- PEFT, both ways

NAMES = st.lists(st.sampled_from(["query", "value", "key", "dense"]), min_size=1, unique=True)
SETTINGS = st.builds(
    Lora,
    rank=st.integers(1, 64),
    alpha=st.floats(0.5, 64),
    dropout=st.floats(0, 0.5),
    targets=st.one_of(
        st.none(), st.just("all-linear"), NAMES.map(lambda names: tuple(sorted(names)))
    ),
    whole=st.lists(st.sampled_from(["pooler", "norm"]), unique=True).map(tuple),
    rslora=st.booleans(),
)


@budgeted(max_examples=50)
@given_that(SETTINGS)
def test_settings_go_to_peft_and_back(lora: Lora) -> None:
    config = fedsieve.to_peft(lora, "classification")
    assert fedsieve.from_peft(config) == lora
    assert config.task_type == "SEQ_CLS"
    again = fedsieve.to_peft(fedsieve.from_peft(config))
    assert {**again.to_dict(), "task_type": "SEQ_CLS"} == config.to_dict()


@pytest.mark.parametrize("other", [None, 16, {"r": 16}, LoraConfig(r=16)])
def test_what_are_no_settings_is_refused(other: Any) -> None:
    with pytest.raises(FedSieveError, match=r"lora: a fedsieve\.Lora is needed, not "):
        fedsieve.to_peft(other)


def test_the_scale_is_that_of_peft_and_grows_with_the_root_of_the_clients() -> None:
    """SFed-LoRA's gamma_z by hand; for one client it is rank-stabilised LoRA's."""
    for clients, scale in ((1, 2.0), (9, 6.0), (100, 20.0)):
        lora = Lora(rank=16, alpha=8.0, clients=clients)
        config = fedsieve.to_peft(lora)
        assert lora.scale == pytest.approx(scale)
        assert config.lora_alpha / config.r**0.5 == pytest.approx(scale)
        assert config.use_rslora
        assert fedsieve.from_peft(config).scale == pytest.approx(scale)
    assert Lora(rank=16, alpha=8.0, clients=1).scale == Lora(rank=16, alpha=8.0, rslora=True).scale
    with pytest.raises(FedSieveError, match="clients says the scale already"):
        Lora(rslora=True, clients=2)


def test_layers_go_to_peft_and_back() -> None:
    for pattern in (None, "layer", ("layer", "h")):
        lora = Lora(targets=("query",), layers_to_transform=(0, 1), layers_pattern=pattern)
        assert fedsieve.from_peft(fedsieve.to_peft(lora)) == lora


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (LoraConfig(use_dora=True), "lora: PEFT's use_dora = True has no equivalent"),
        (LoraConfig(rank_pattern={"query": 2}), "lora: PEFT's rank_pattern"),
        (LoraConfig(bias="all"), "lora: PEFT's bias = 'all'"),
        (LoraConfig(init_lora_weights="gaussian"), "lora: PEFT's init_lora_weights"),
        (LoraConfig(exclude_modules=["key"]), "lora: PEFT's exclude_modules"),
        (LoraConfig(alpha_pattern=np.array([1, 2])), "lora: PEFT's alpha_pattern = array"),
        (LoraConfig(target_modules={"query", 1}), "lora: targets|Lora: targets"),
        (peft.IA3Config(), "lora: a peft.LoraConfig is needed, not IA3Config"),
    ],
)
def test_what_has_no_equivalent_is_refused_by_name(tiny: Tiny, config: Any, said: str) -> None:
    with pytest.raises(FedSieveError, match=said):
        finetune(tiny, [rows(6, 1)], lora=config)


def test_a_config_is_taken_as_its_settings(tiny: Tiny) -> None:
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["value", "query"], task_type="SEQ_CLS")
    expected = finetune(tiny, [rows(9, 1)], lora=LORA, rounds=1).finish()
    run = finetune(tiny, [rows(9, 1)], lora=config, rounds=1).finish()
    assert same(run.adapter, expected.adapter)


# --- an adapter to begin from


@pytest.fixture(scope="module")
def first(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[fedsieve.Run, Path]:
    """A run of two rounds at rank 4, and where its adapter is saved."""
    folder = tmp_path_factory.mktemp("first") / "adapter"
    run = finetune(tiny, [rows(30, 1)], fedsieve.fedit(), rounds=2, test=rows(30, 9)).finish()
    run.save(folder)
    return run, folder


def products(adapter: Adapter) -> dict[str, Any]:
    layout, tensors = adapter.layout, adapter.tensors
    return {p.module: layout.scale * tensors[p.b] @ tensors[p.a] for p in layout.pairs}


@pytest.mark.parametrize(
    "lora",
    [
        LORA,
        Lora(rank=4, targets=("query", "value"), alpha=3.0, dropout=0.0),
        Lora(rank=8, targets=("query", "value"), alpha=16.0, dropout=0.0, rslora=True),
    ],
    ids=["alike", "another scale", "more ranks"],
)
def test_a_run_begins_where_an_adapter_ended(
    tiny: Tiny, first: tuple[fedsieve.Run, Path], lora: Lora, tmp_path: Path
) -> None:
    before, folder = first
    run = finetune(tiny, [rows(30, 1)], fedsieve.flasc(), lora=lora, start=folder, test=rows(30, 9))
    started = run._experiment.start
    if lora is LORA:
        assert same(started, before.adapter)
    then, now = products(before.adapter), products(started)
    for module, product in then.items():
        torch.testing.assert_close(now[module], product, rtol=1e-5, atol=1e-6)
    assert run.metrics[0].eval_loss == pytest.approx(before.metrics[-1].eval_loss, rel=1e-4)
    assert run.finish().metrics[-1].eval_loss != run.metrics[0].eval_loss
    run.save(tmp_path / "after")
    card = (tmp_path / "after" / "README.md").read_text(encoding="utf-8")
    assert f"- begun from: the adapter `{called(folder)}`, weights " in card


def test_an_adapter_of_peft_s_own_is_a_start(tiny: Tiny, tmp_path: Path) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(tiny.bert)
    config = fedsieve.to_peft(Lora(rank=4, targets=("query",)), "classification")
    config.init_lora_weights = "gaussian"
    model = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path)
    lora = Lora(rank=4, targets=("query",))
    text = rows(5, 1)
    run = finetune(tiny, [text], lora=lora, start=tmp_path, classes=LABELS, test=text)
    batch = AutoTokenizer.from_pretrained(tiny.bert)(
        text["text"][:], return_tensors="pt", padding=True
    )
    labels = torch.tensor([LABELS.index(label) for label in text["label"]])
    loss = torch.nn.functional.cross_entropy(model.eval()(**batch).logits, labels).item()
    assert run.metrics[0].eval_loss == pytest.approx(loss, rel=2e-2)  # bfloat16, maybe


def edited(folder: Path, to: Path, **changes: Any) -> Path:
    """A copy of an adapter whose configuration says something else."""
    to.mkdir()
    for path in folder.glob("*.*"):
        if path.is_file():
            (to / path.name).write_bytes(path.read_bytes())
    config = json.loads((to / "adapter_config.json").read_text(encoding="utf-8"))
    (to / "adapter_config.json").write_text(json.dumps({**config, **changes}), encoding="utf-8")
    return to


def reshaped(folder: Path, to: Path, change: Callable[[Any], Any]) -> Path:
    """A copy of an adapter whose A is something else."""
    path = edited(folder, to) / "adapter_model.safetensors"
    held = safetensors.torch.load_file(path)
    changed = {n: change(t).contiguous() if "lora_A" in n else t for n, t in held.items()}
    safetensors.torch.save_file(changed, path)
    return to


MORE_THAN_PAIRS: dict[str, Any] = {
    "use_qalora": True,
    "use_bdlora": {"target_modules_bd_a": ["query"]},
    "lora_bias": True,
    "layer_replication": [[0, 1], [0, 2]],
    "alora_invocation_tokens": [5, 6],
    "kasa_config": {"beta": 1e-4},
    "monteclora_config": {"num_samples": 4},
    "arrow_config": {"top_k": 2},
}


def test_an_adapter_that_does_not_fit_is_refused(
    tiny: Tiny, first: tuple[fedsieve.Run, Path], tmp_path: Path
) -> None:
    _, folder = first
    (tmp_path / "empty").mkdir()
    damaged = edited(folder, tmp_path / "damaged")
    (damaged / "adapter_model.safetensors").write_bytes(b"no tensors")
    other = edited(folder, tmp_path / "other")
    labels = {"id2label": {"0": "wine", "1": "space", "2": "cars"}}
    (other / "labels.json").write_text(json.dumps(labels), encoding="utf-8")
    rank2 = Lora(rank=2, targets=("query", "value"))
    key = Lora(rank=4, targets=("query", "key"))
    less = Lora(rank=4, targets=("query",))
    two = [rows(30, 1).filter(lambda row: row["label"] != "wine")]
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (folder, {"lora": rank2}, r"has rank 4 \(base.*lora_A.weight\), and lora.rank is 2"),
        (folder, {"lora": key}, r"has no base_model.*key.lora_A.weight, which this run trains"),
        (folder, {"lora": less}, r"holds base_model.*value.lora_A.weight, which this run does not"),
        (tmp_path / "empty", {}, "holds no adapter: there is no file adapter_config.json"),
        (tmp_path / "gone", {}, "there is no folder .*gone"),
        (damaged, {}, "cannot be read"),
        (other, {}, "tells the classes wine, space, cars, in this order"),
        (folder, {"clients": two}, "tells the classes cars, space, wine"),
        (folder, {"method": fedsieve.head()}, "this method trains no adapter"),
        (folder, {"method": fedsieve.flora()}, "begins with an adapter of its own"),
        (edited(folder, tmp_path / "a", alpha_pattern={"query": 2}), {}, "has a alpha_pattern"),
        (edited(folder, tmp_path / "b", use_dora=True), {}, "trained with use_dora"),
        (edited(folder, tmp_path / "c", peft_type="IA3"), {}, "is of type 'IA3'"),
        (edited(folder, tmp_path / "d", r="many"), {}, "says no r that is a number"),
        (edited(folder, tmp_path / "e", r=True), {}, "says no r that is a number"),
        (
            edited(folder, tmp_path / "f", r=8),
            {},
            r"has rank 4, and .* says r = 8",
        ),
        *(
            (edited(folder, tmp_path / key, **{key: value}), {}, f"was trained with {key}, so it")
            for key, value in MORE_THAN_PAIRS.items()
        ),
        (edited(folder, tmp_path / "l", use_rslora="no"), {}, "says use_rslora 'no'"),
        (
            edited(folder, tmp_path / "m", modules_to_save=["scorer"]),
            {},
            "holds nothing of scorer, which .* says was trained whole",
        ),
        (edited(folder, tmp_path / "g", lora_alpha=10**400), {}, "says no lora_alpha"),
        (edited(folder, tmp_path / "h", lora_alpha=float("nan")), {}, "says no lora_alpha"),
        (reshaped(folder, tmp_path / "i", lambda t: t[:2]), {}, "lora_A.weight has rank 2"),
        (reshaped(folder, tmp_path / "j", lambda t: t.to(torch.int64)), {}, "no floating-point"),
        (reshaped(folder, tmp_path / "k", lambda t: t.repeat(1, 10**5)), {}, "more than .* bytes"),
    ]
    for start, given, said in cases:
        given = {"clients": [rows(30, 1)], **given}
        with pytest.raises(FedSieveError, match=said) as caught:
            finetune(tiny, given.pop("clients"), given.pop("method", None), start=start, **given)
        assert str(caught.value).startswith("lora.start: ")
        assert "\n" not in str(caught.value)
    with pytest.raises(FedSieveError, match=r"start: .*give one of the two"):
        finetune(tiny, [rows(6, 1)], lora=Lora(start="a"), start="b")


@pytest.mark.usefixtures("no_report")
def test_a_run_that_began_from_an_adapter_is_resumed_with_that_alone(
    tiny: Tiny, first: tuple[fedsieve.Run, Path], tmp_path: Path
) -> None:
    start = edited(first[1], tmp_path / "start")
    changes: dict[str, Any] = {"lora__start": str(start), "lora__alpha": 16.0, "rounds": 2}
    runs.start(tiny, tmp_path / "whole", **changes)
    with pytest.raises(runner.Stopped):
        runs.start(tiny, tmp_path / "run", runs.stop_at(1), **changes)
    weights = start / "adapter_model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-4] + b"\0\0\0\0")
    with pytest.raises(FedSieveError, match=r"the adapter that the run began from .* has changed"):
        runner.resume(tmp_path / "run", runs.quiet)
    weights.write_bytes(kept)
    runner.resume(tmp_path / "run", runs.quiet)
    runs.assert_same(tmp_path / "run", tmp_path / "whole")


# --- what a run can be asked


def test_predictions_are_those_of_the_saved_adapter(
    tiny: Tiny, first: tuple[fedsieve.Run, Path]
) -> None:
    run, folder = first
    texts = rows(20, 4)["text"][:]
    base = AutoModelForSequenceClassification.from_pretrained(tiny.bert)
    model = PeftModel.from_pretrained(base, folder)
    names = pipeline("text-classification", model=model, tokenizer=str(folder))(texts)
    found = run.predict([{"text": text} for text in texts])
    assert found == [LABELS[int(each["label"].rpartition("_")[2])] for each in names]
    assert run.predict(pd.DataFrame({"text": texts, "label": "odd"})) == found
    assert run.predict(rows(20, 4).select(range(5, 9))) == found[5:9]
    assert run.predict([]) == []
    assert len({*found}) > 1
    with pytest.raises(FedSieveError, match=r"^predict: .*row 1 of column 'text'"):
        run.predict([{"text": "a"}, {"text": None}])
    with pytest.raises(FedSieveError, match=r"^predict: no column 'text'"):
        run.predict([{"txt": "a"}])


def test_scores_are_those_of_the_rounds(tiny: Tiny) -> None:
    test = {"north": rows(20, 8), "south": rows(30, 9)}
    table = Dataset.from_list([*test["north"], *test["south"]])
    run = finetune(tiny, [rows(30, 1)], rounds=1, test=table, metric="macro_f1").finish()
    score = run.score(table)
    assert score.metrics == run.metrics[-1].metrics
    assert score.loss == run.metrics[-1].eval_loss
    assert next(iter(score.metrics)) == "macro_f1"
    each = run.score_by_client(test)
    assert {id: own.counted for id, own in each.items()} == {"north": 20, "south": 30}
    mean = (20 * each["north"].loss + 30 * each["south"].loss) / 50
    assert score.loss == pytest.approx(mean, rel=1e-6)
    right = sum(n * each[id].metrics["accuracy"] for id, n in (("north", 20), ("south", 30)))
    assert score.metrics["accuracy"] == pytest.approx(right / 50)
    hits = sum(a == b for a, b in zip(run.predict(table), table["label"], strict=True))
    assert score.metrics["accuracy"] == pytest.approx(hits / 50)
    with pytest.raises(FedSieveError, match=r"^score_by_client: client 'north': no column 'text'"):
        run.score_by_client({"north": [{"txt": "a"}]})
    with pytest.raises(FedSieveError, match=r"^score: label 'beer' in row 0"):
        run.score([{"text": "a", "label": "beer"}])


def test_a_client_is_scored_with_what_is_its_own(tiny: Tiny) -> None:
    clients = {"north": rows(30, 1), "south": rows(30, 2)}
    run = finetune(tiny, clients, fedsieve.fedsa_lora(), rounds=2).finish()
    each = run.score_by_client(clients)
    assert each["north"].loss != run.score(clients["north"]).loss
    assert run.score_by_client({"stranger": clients["north"]})["stranger"].loss == (
        run.score(clients["north"]).loss
    )


@pytest.mark.parametrize("task", ["regression", "multi-label", "causal-lm"])
def test_other_tasks_tell_or_say_that_they_do_not(tiny: Tiny, task: str) -> None:
    texts = rows(6, 1)["text"][:]
    labels: dict[str, Any] = {
        "regression": [float(n) for n in range(6)],
        "multi-label": [["a"], [], ["a", "b"], ["b"], [], ["a"]],
    }
    model = tiny.gpt2 if task == "causal-lm" else tiny.bert
    table = {"text": texts, **({"label": labels[task]} if task in labels else {})}
    run = fedsieve.finetune(
        model, [table], "fedit", rounds=1, task=task, device="cpu", training=TRAINING,
        lora=Lora(rank=2, targets=("c_attn",) if task == "causal-lm" else ("query",)),
    )  # fmt: skip
    if task == "causal-lm":
        with pytest.raises(FedSieveError, match=r"tells nothing of single rows"):
            run.predict({"text": texts})
        return
    found = run.predict({"text": texts})
    assert len(found) == 6
    for each in found:
        assert {*each.split(", ")} <= {"a", "b", ""} if task == "multi-label" else float(each) < 99


def test_a_run_is_reported(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clients = [rows(16, n) for n in range(3)]
    run = finetune(tiny, clients, "fslora", budgets=0.5, test=rows(20, 9))
    with pytest.raises(FedSieveError, match=r"report: no round has ended"):
        run.report(tmp_path / "page")
    next(iter(run))
    with monkeypatch.context() as quick:
        quick.setattr("fedsieve.report.write", lambda *_: [tmp_path])
        assert run.report(tmp_path / "page") == tmp_path
    assert len(runs.lines(tmp_path / "page", rundir.CLIENTS)) == 3
    page = run.finish().report(tmp_path / "page", name="wards")
    text = page.read_text(encoding="utf-8")
    assert page == tmp_path / "page" / "report.html"
    assert "wards" in text
    assert "fslora" in text
    assert runs.lines(tmp_path / "page", rundir.METRICS)[-1]["round"] == 3
    assert len(runs.lines(tmp_path / "page", rundir.CLIENTS)) == 9
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "recipe.toml").write_text("mine", encoding="utf-8")
    with pytest.raises(FedSieveError, match=r"holds no run, and has recipe\.toml"):
        run.report(tmp_path / "mine")
    with pytest.raises(FedSieveError, match=r"cannot be written"):
        run.report(tmp_path / "mine" / "recipe.toml" / "below")
    with pytest.raises(FedSieveError, match=r"report: a folder is needed"):
        run.report(5)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", [fedsieve.fslora_flasc(), fedsieve.fedsa_lora()])
def test_a_run_that_was_kept_goes_on_as_if_it_had_never_stopped(
    tiny: Tiny, tmp_path: Path, method: Any
) -> None:
    clients = [rows(16, n) for n in range(4)]
    given: dict[str, Any] = {"cohort": 2, "test": rows(20, 9)}
    whole = finetune(tiny, clients, method, **given).finish()
    parts = finetune(tiny, clients, method, **given)
    for each in parts:
        parts.keep(tmp_path / "kept")
        if each.round == 2:
            break
    again = finetune(tiny, clients, method, **given).go_on(tmp_path / "kept")
    assert [each.round for each in again.metrics] == [0, 1, 2]
    again.finish()
    assert same(again.adapter, whole.adapter)
    for one, two in zip(again.metrics, whole.metrics, strict=True):
        assert (one.loss, one.metrics, one.total_bytes) == (two.loss, two.metrics, two.total_bytes)
    assert [r.client for r in again.receipts] == [r.client for r in whole.receipts]
    with pytest.raises(FedSieveError, match=r"go_on: this run has begun already"):
        again.go_on(tmp_path / "kept")
    for changes, said in (
        ({"seed": 1}, "seed was 0 in .* and is 1"),
        ({"cohort": 3}, r"federation\.sampling\.size was 2"),
        ({"training": fedsieve.Training(lr=0.5)}, r"training\.batch was 8"),
        ({"lora": Lora(rank=2, targets=("query",))}, "another adapter"),
        ({"clients": clients[:3]}, r"federation\.clients was 4"),
        ({"clients": [*clients[:3], rows(16, 7)]}, r"federation\.rows was"),
    ):
        changed = {"clients": clients, **given, **changes}
        other = finetune(tiny, changed.pop("clients"), method, **changed)
        with pytest.raises(FedSieveError, match=said):
            other.go_on(tmp_path / "kept")
    others: list[dict[str, Any]] = [
        {"test": rows(20, 8)},
        {"test": None},
        {"method": built("fedit")},
    ]
    for changes in others:
        changed = {"method": method, **given, **changes}
        other = finetune(tiny, clients, changed.pop("method"), **changed)
        with pytest.raises(FedSieveError, match=r"go_on: federation\.(test|method) was"):
            other.go_on(tmp_path / "kept")
    with pytest.raises(FedSieveError, match=r"holds no checkpoint"):
        finetune(tiny, clients, method, **given).go_on(tmp_path / "nowhere")
    for key, value, said in (
        ("norm_bound", 7.0, r"federation\.norm_bound was"),
        ("evaluate_every", 2, r"evaluation\.every was 1"),
    ):
        other = finetune(tiny, clients, method, **{**given, key: value})
        with pytest.raises(FedSieveError, match=said):
            other.go_on(tmp_path / "kept")


def test_a_run_that_was_kept_goes_on_to_more_rounds(tiny: Tiny, tmp_path: Path) -> None:
    clients, folder = [rows(16, n) for n in range(3)], tmp_path / "kept"
    whole = finetune(tiny, clients, rounds=4).finish()
    finetune(tiny, clients, rounds=2).finish().keep(folder)
    again = finetune(tiny, clients, rounds=4).go_on(folder).finish()
    assert same(again.adapter, whole.adapter)
    again.keep(folder)
    with pytest.raises(FedSieveError, match=r"holds round 4, and this run is to have 2: make it"):
        finetune(tiny, clients, rounds=2).go_on(folder)
    assert finetune(tiny, clients, rounds=4).go_on(folder).finish().metrics[-1].round == 4


def test_a_method_that_knows_how_clients_train_may_have_more_rounds(
    tiny: Tiny, tmp_path: Path
) -> None:
    clients = [rows(16, n) for n in range(2)]
    given: dict[str, Any] = {"training": fedsieve.Training(optimizer="sgd", lr=0.1, batch=8)}
    for name in methods.names():
        if built(name).trained_by is None:
            continue
        whole = finetune(tiny, clients, built(name), rounds=2, **given).finish()
        folder = tmp_path / name
        finetune(tiny, clients, built(name), rounds=1, **given).finish().keep(folder)
        again = finetune(tiny, clients, built(name), rounds=2, **given).go_on(folder)
        assert same(again.finish().adapter, whole.adapter)


@pytest.mark.parametrize("half", [False, True])
def test_a_kept_round_that_has_become_the_last_is_evaluated(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, half: bool
) -> None:
    clients = [rows(16, n) for n in range(2)]
    given: dict[str, Any] = {"test": rows(20, 9), "evaluate_every": 5}
    whole = finetune(tiny, clients, rounds=2, **given).finish()
    run = finetune(tiny, clients, rounds=5, **given)
    with monkeypatch.context() as patch:
        evaluated = loop.evaluated

        def stopping(federation: Any, waits: Any) -> Any:
            if half and waits.summary.round == 2:
                raise KeyboardInterrupt
            return evaluated(federation, waits)

        patch.setattr(loop, "evaluated", stopping)
        with suppress(KeyboardInterrupt):
            while run._next() is not None and run._progress.round < 2:
                pass
    run.keep(tmp_path / "kept")
    again = finetune(tiny, clients, rounds=2, **given).go_on(tmp_path / "kept")
    assert [each.round for each in again] == [2]
    assert again.metrics[-1].metrics == whole.metrics[-1].metrics
    assert [r.client for r in again.receipts] == [r.client for r in whole.receipts]


def test_a_rate_that_falls_over_other_rounds_is_warned_of(tiny: Tiny, tmp_path: Path) -> None:
    clients, folder = [rows(16, n) for n in range(2)], tmp_path / "kept"
    given: dict[str, Any] = {"training": fedsieve.Training(lr=0.1, last_lr=0.01, batch=8)}
    finetune(tiny, clients, rounds=1, **given).finish().keep(folder)
    with pytest.warns(UserWarning, match="falls over 2 rounds from here on; so far it fell over 1"):
        finetune(tiny, clients, rounds=2, **given).go_on(folder)


def test_a_kept_runs_base_may_lie_elsewhere(tiny: Tiny, tmp_path: Path) -> None:
    clients, moved = [rows(16, n) for n in range(2)], tmp_path / "moved"
    run = finetune(tiny, clients, rounds=2)
    next(iter(run))
    run.keep(tmp_path / "kept")
    shutil.copytree(tiny.bert, moved)
    again = finetune(tiny._replace(bert=moved), clients, rounds=2).go_on(tmp_path / "kept")
    assert same(again.finish().adapter, run.finish().adapter)
    weights = load_file(moved / "model.safetensors")
    save_file({n: 2 * t for n, t in weights.items()}, moved / "model.safetensors", {"format": "pt"})
    with pytest.raises(FedSieveError, match="base"):
        finetune(tiny._replace(bert=moved), clients, rounds=2).go_on(tmp_path / "kept")


def test_a_setting_that_was_not_there_is_said_to_have_been_none(tiny: Tiny, tmp_path: Path) -> None:
    clients = [rows(16, n) for n in range(2)]
    own = fedsieve.sgd(0.5)._replace(table={})
    finetune(tiny, clients, built("fedit", server=own), rounds=1).keep(tmp_path / "kept")
    other = finetune(tiny, clients, built("fedit", server=fedsieve.sgd(0.5)), rounds=1)
    with pytest.raises(
        FedSieveError, match=r"federation\.server\.lr was not set in .* and is 0\.5"
    ):
        other.go_on(tmp_path / "kept")


# What somebody does to a kept run's log -> what is said of it.
LOGS: dict[str, tuple[str, Any, str]] = {
    "a text for bytes": ("metrics.jsonl", lambda row: {**row, "down_bytes": "x"}, "line 2"),
    "a list for metrics": ("metrics.jsonl", lambda row: {**row, "metrics": [1, 2]}, "line 2"),
    "a text for a loss": ("metrics.jsonl", lambda row: {**row, "loss": "x"}, "line 2"),
    "half a round": ("metrics.jsonl", lambda row: {**row, "round": 1.5}, "line 2"),
    "no clients": ("clients.jsonl", lambda row: None, "clients of round 1"),
    "a text for its bytes": ("clients.jsonl", lambda row: {**row, "down_bytes": "x"}, "line 2"),
}


@pytest.mark.parametrize("kind", LOGS)
def test_a_kept_log_that_was_changed_is_refused(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    log, change, said = LOGS[kind]
    clients = [rows(16, n) for n in range(2)]
    run = finetune(tiny, clients, rounds=2)
    next(iter(run))
    run.keep(tmp_path / "kept")
    path = tmp_path / "kept" / log
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    changed = [lines[0], *map(change, lines[1:])]
    if changed[-1] is None:
        changed = []
    path.write_text("".join(json.dumps(row) + "\n" for row in changed), encoding="utf-8")
    with pytest.raises(FedSieveError, match=said):
        finetune(tiny, clients, rounds=2).go_on(tmp_path / "kept")


@pytest.mark.parametrize("what", ["keep", "save", "report", "go_on"])
def test_a_folder_that_can_have_no_name_is_refused(tiny: Tiny, what: str) -> None:
    run = finetune(tiny, [rows(16, 0)], rounds=1)
    with pytest.raises(FedSieveError, match=f"{what}: .* cannot be the name of a folder"):
        getattr(run, what)("a\0b")


def frame_of(name: str, values: Any) -> Any:
    frame = pd.DataFrame({"text": [f"cars{n}" for n in range(6)], "label": ["cars", "space"] * 3})
    frame[name] = values
    return frame


FRAMES: dict[str, tuple[str, Any]] = {
    "NA among numbers and texts": ("label", pd.Series([1, "a", pd.NA] * 2, dtype=object)),
    "arrays in cells": ("text", [np.array([1, 2]) if n % 2 else "x" for n in range(6)]),
    "months": ("label", pd.period_range("2026-01", periods=6, freq="M")),
    "ranges": ("label", pd.interval_range(0, 6)),
}


@pytest.mark.parametrize("kind", FRAMES)
def test_a_frame_of_odd_values_is_refused_by_row_and_column(tiny: Tiny, kind: str) -> None:
    name, values = FRAMES[kind]
    with pytest.raises(FedSieveError, match=f"row [0-9].*{name}|{name}.*row [0-9]"):
        finetune(tiny, [frame_of(name, values)], rounds=1)


def test_a_column_of_one_value_is_none(tiny: Tiny) -> None:
    with pytest.raises(FedSieveError):
        finetune(tiny, [rows(16, 0)], rounds=1).predict({"text": np.array("a")})


def built(name: str, **options: Any) -> Any:
    return import_module(f"fedsieve.methods.{name}").method(**options)


@pytest.mark.parametrize("name", methods.names())
def test_each_method_has_a_mark_of_its_own(name: str) -> None:
    assert made_of(built(name)) == made_of(built(name))
    others = [made_of(built(other)) for other in methods.names() if other != name]
    assert made_of(built(name)) not in others


def test_an_option_of_a_method_changes_its_mark() -> None:
    options: list[dict[str, Any]] = [{}, {"up_values": "int8"}, {"head": "whole"}]
    marks = [made_of(built("flasc", **each)) for each in options]
    assert len(set(marks)) == 3
    # What the server's optimizer is, is compared by its own settings.
    assert made_of(built("flasc", server=fedsieve.sgd(lr=0.5))) == marks[0]


def test_what_is_kept_is_never_replaced_by_another_run(tiny: Tiny, tmp_path: Path) -> None:
    clients = [rows(16, n) for n in range(2)]
    run = finetune(tiny, clients, rounds=2).finish()
    run.keep(tmp_path / "kept")
    runs.start(tiny, tmp_path / "run", rounds=1)
    (tmp_path / "links").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "links" / "checkpoints").symlink_to(tmp_path / "elsewhere")
    for folder, other, said in (
        (
            "kept",
            finetune(tiny, clients, rounds=2),
            "holds round 2 of this run",
        ),
        ("kept", finetune(tiny, clients, rounds=2, seed=1), "holds another run"),
        ("run", run, "holds another run"),
        ("links", run, "link"),
    ):
        before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
        with pytest.raises(FedSieveError, match=said):
            other.keep(tmp_path / folder)
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SystemExit()])
@pytest.mark.parametrize("written", kinds.some_of(range(4)))
@pytest.mark.parametrize("before", [None, 1])
def test_a_keep_that_broke_off_is_kept_over(
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: int | None,
    written: int,
    error: BaseException,
) -> None:
    """At each of its files, on a full disk or killed; by the same run, or made again. What was kept
    before is whole.
    """
    clients = [rows(16, n) for n in range(2)]
    folder, files = tmp_path / "kept", []
    run = finetune(tiny, clients, rounds=2)
    if before is not None:
        for _, _ in zip(range(before), run, strict=False):
            pass
        run.keep(folder)
    next(iter(run))

    def full(path: Path, *given: Any, **how: Any) -> None:
        files.append(path.name)
        if len(files) > written:
            raise error
        write_whole(path, *given, **how)

    with monkeypatch.context() as patched:
        patched.setattr(notebook, "write_whole", full)
        patched.setattr(checkpoint, "write_whole", full)
        if before is not None and written == 3:
            run.keep(folder)  # only a first keep has a file more
        else:
            with pytest.raises((FedSieveError, SystemExit)) as caught:
                run.keep(folder)
            assert not isinstance(error, OSError) or "keep: " in str(caught.value)
            assert "fedsieve resume" not in str(caught.value)
    if before is not None:
        finetune(tiny, clients, rounds=2).go_on(folder)
    elif written > 1:
        with pytest.raises(
            FedSieveError, match=r"keep: .* choose another folder, or move it away$"
        ):
            finetune(tiny, clients, rounds=2, seed=1).keep(folder)
    again = finetune(tiny, clients, rounds=2)
    while repr(again) != repr(run):
        next(iter(again))
    for each in (again, run):
        each.keep(folder)
        assert not (folder / ".fedsieve.keep").exists()
    gone_on = finetune(tiny, clients, rounds=2).go_on(folder)
    assert same(gone_on.finish().adapter, run.finish().adapter)


@pytest.mark.parametrize("log", rundir.LOGS)
def test_what_no_keep_left_is_never_kept_over(tiny: Tiny, tmp_path: Path, log: str) -> None:
    """Also where the words are Python's: there is no --out."""
    run = finetune(tiny, [rows(16, 0)], rounds=1).finish()
    (tmp_path / log).write_text("mine\n")
    for what in ("keep", "report"):
        with pytest.raises(FedSieveError) as caught:
            getattr(run, what)(tmp_path)
        assert str(caught.value).startswith(f"{what}: {tmp_path} holds no run, and has {log}")
        assert "--" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [log]


def test_the_public_names_are_listed() -> None:
    assert {name for name in dir(fedsieve) if not name.startswith("__")} == {*fedsieve.__all__}
    for name in fedsieve.__all__:
        assert getattr(fedsieve, name).__doc__ or name in ("Budget",)
