"""Cores between frozen factors in a real model: what is saved is LoRA, and nothing else moves."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

import fedsieve
from fedsieve import FedSieveError, Lora, methods
from fedsieve.algebra.adapter import Adapter
from fedsieve.algebra.cores import Cores
from fedsieve.algebra.keys import Key
from fedsieve.run import rundir, runner
from fedsieve.settings import Task, Training
from fedsieve.train.local import evaluate, fit
from fedsieve.train.model import ResidentModel, load_base, set_up
from tests import runs, toy
from tests.conftest import LABELS, Tiny
from tests.test_api import TRAINING, rows
from tests.train.test_peft import check_against, logits_of
from tests.train.test_train import classified

pytestmark = pytest.mark.usefixtures("no_report")  # it has tests of its own

CPU = torch.device("cpu")
CORED = [n for n in methods.names() if isinstance(methods.load(n)().trains, Cores)]
KINDS = [Cores(), Cores(2, gains=True)]


def resident(tiny: Tiny, trains: Cores, targets: Any = ("query", "value")) -> ResidentModel:
    base = load_base(str(tiny.bert), "classification", LABELS, key=Key(0), pad_token_id=0)
    lora = Lora(rank=4, alpha=8.0, dropout=0.0, targets=targets)
    return set_up(base, "classification", lora, trains, key=Key(0), device=CPU)


def away(made: ResidentModel, seed: int = 1) -> Adapter:
    """An adapter that is not the start."""
    draws, start = torch.Generator().manual_seed(seed), made.adapter()
    noise = {n: torch.randn(t.shape, generator=draws) for n, t in start.tensors.items()}
    return start._replace(tensors={n: t + 0.3 * noise[n] for n, t in start.tensors.items()})


@pytest.mark.parametrize("name", CORED)
def test_peft_loads_what_we_evaluated_and_the_merged_model_is_it(
    tiny: Tiny, tmp_path: Path, name: str
) -> None:
    folder, merged = tmp_path / "run", tmp_path / "merged"
    runs.start(tiny, folder, method={"name": name}, budgets=[{}], server={}, training__lr=0.1)
    base = AutoModelForSequenceClassification.from_pretrained(tiny.bert, num_labels=3)
    tokenizer = AutoTokenizer.from_pretrained(tiny.bert)
    before, _ = logits_of(base, tokenizer, tiny)
    logits, labels = logits_of(
        PeftModel.from_pretrained(base, folder / rundir.ADAPTER), tokenizer, tiny
    )
    assert (logits - before).abs().max() > 0.05
    check_against(folder, logits, labels)
    config = json.loads((folder / rundir.ADAPTER / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8)
    runner.export(folder, merged, merge=True)
    model = AutoModelForSequenceClassification.from_pretrained(merged)
    check_against(folder, *logits_of(model, AutoTokenizer.from_pretrained(merged), tiny))


@pytest.mark.parametrize("trains", KINDS, ids=str)
def test_the_product_is_that_of_cores_and_factors(
    tiny: Tiny, tmp_path: Path, trains: Cores
) -> None:
    """Against the sum over heads, from what is in the model."""
    made = resident(tiny, trains)
    adapter, plain = away(made), made.pairs
    assert plain is not None
    made.save(adapter, tmp_path / "adapter")
    saved = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(tiny.bert, num_labels=3),
        tmp_path / "adapter",
    ).state_dict()
    side = 4 // trains.heads
    for pair in plain.layout.pairs:
        a, b = (getattr(*plain.slots[n]).detach() for n in (pair.a, pair.b))
        assert (a @ a.T - torch.eye(4)).abs().max() < 1e-5
        assert (b.T @ b - torch.eye(4)).abs().max() < 1e-5
        total = torch.zeros(b.shape[0], a.shape[1])
        for head in range(trains.heads):
            own = slice(head * side, (head + 1) * side)
            core = adapter.tensors[f"{pair.module}.lora_core.{head}"]
            gain = adapter.tensors.get(f"{pair.module}.lora_gain.{head}", torch.ones(1, 1))
            total += gain * (b[:, own] @ core @ a[own])
        theirs = [saved[n.replace(".weight", ".default.weight")] for n in (pair.a, pair.b)]
        assert (theirs[1] @ theirs[0] - total).abs().max() < 1e-5
    weights = sum(f.stat().st_size for f in (tmp_path / "adapter").glob("*.safetensors"))
    assert 0 <= weights - made.bytes_saved(adapter) < 4096  # what stands before the numbers


@pytest.mark.parametrize("trains", KINDS, ids=str)
def test_saving_leaves_the_model_as_it_was(tiny: Tiny, tmp_path: Path, trains: Cores) -> None:
    made, examples = resident(tiny, trains), classified(tiny, 16)
    adapter = away(made)
    before = evaluate(made, adapter, examples, precision="fp32")
    for number in (1, 2):
        made.save(adapter, tmp_path / str(number))
        assert evaluate(made, adapter, examples, precision="fp32") == before
    one, two = (tmp_path / n / "adapter_model.safetensors" for n in ("1", "2"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("trains", KINDS, ids=str)
def test_only_cores_and_the_head_move(tiny: Tiny, trains: Cores) -> None:
    made = resident(tiny, trains)
    ours = {id(p) for _, p in made.parameters()}
    base = {n: p.clone() for n, p in made.model.named_parameters() if id(p) not in ours}
    assert {n.rpartition(".")[0].rpartition(".")[2] for n in base} > {"default", "last"}
    training = Training(lr=0.1, weight_decay=0.1, steps=3, batch=4, optimizer="adamw")
    start = made.adapter()
    trained = fit(made, toy.whole(start), classified(tiny, 12), training, Key(1)).tensors
    assert all(not torch.equal(trained[n], t) for n, t in start.tensors.items())
    now = dict(made.model.named_parameters())
    assert all(torch.equal(now[n], p) for n, p in base.items())


def test_every_machine_draws_the_same_factors_and_another_seed_others(tiny: Tiny) -> None:
    def factors(seed: int) -> dict[str, Tensor]:
        base = load_base(str(tiny.bert), "classification", LABELS, key=Key(0), pad_token_id=0)
        lora = Lora(rank=4, targets=("query", "value"))
        made = set_up(base, "classification", lora, Cores(), key=Key(seed), device=CPU)
        assert made.pairs is not None
        return {n: getattr(*made.pairs.slots[n]).detach() for n in made.pairs.layout.rank_axis}

    one, again, other = factors(0), factors(0), factors(1)
    assert all(torch.equal(one[n], again[n]) for n in one)
    assert all((one[n] - other[n]).abs().max() > 0.1 for n in one)
    values = list(one.values())  # and each layer has its own
    assert all(
        a.shape != b.shape or not torch.equal(a, b)
        for i, a in enumerate(values)
        for b in values[:i]
    )


@pytest.mark.parametrize("name", CORED)
def test_a_language_model_whose_layers_lie_transposed(
    tiny: Tiny, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "run"
    runs.start_language_model(
        tiny,
        folder,
        lora={"rank": 4, "targets": ["c_attn", "c_proj"]},
        partition={"kind": "iid", "clients": 6},
        method={"name": name},
        budgets=[{}],
        server={},
        training__lr=0.1,
        rounds=2,
    )
    runner.export(folder, tmp_path / "merged", merge=True)
    ids = torch.tensor([[5, 6, 7, 30, 31, 32]])
    with torch.no_grad():
        one = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(ids).logits
        two = AutoPeftModelForCausalLM.from_pretrained(folder / rundir.ADAPTER).eval()(ids).logits
        base = AutoModelForCausalLM.from_pretrained(tiny.gpt2).eval()(ids).logits
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    assert (base - two).abs().max() > 0.01


def test_a_convolution_has_cores_too(tiny: Tiny, tmp_path: Path) -> None:
    task: Task = "image-classification"
    base = load_base(str(tiny.vit), task, [*"abcde"], key=Key(0))
    lora = Lora(rank=2, dropout=0.0, targets=("projection",))
    made = set_up(base, task, lora, Cores(2, gains=True), key=Key(0), device=CPU)
    adapter = away(made)
    made.put(adapter)
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = made.model.eval()(pixel_values=pixels).logits
        made.merge(adapter, tmp_path / "merged")
    merged = AutoModelForImageClassification.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(pixel_values=pixels).logits, ours, atol=1e-5, rtol=1e-5)
        plain = AutoModelForImageClassification.from_pretrained(tiny.vit).eval()
        assert (plain(pixel_values=pixels).logits - ours).abs().max() > 0.01


@pytest.mark.parametrize("name", CORED)
def test_an_embedding_is_refused(tiny: Tiny, name: str) -> None:
    lora = Lora(rank=4, targets=("query", "word_embeddings"))
    with pytest.raises(FedSieveError, match=r"lora\.targets takes in .*word_embeddings, an embed"):
        fedsieve.finetune(str(tiny.bert), [rows(9, 1)], methods.load(name)(), rounds=1, lora=lora)


@pytest.mark.parametrize(("heads", "rank"), [(3, 4), (8, 4)])
def test_heads_that_cannot_share_the_rank_are_refused(tiny: Tiny, heads: int, rank: int) -> None:
    lora = Lora(rank=rank, targets=("query", "value"))
    said = (
        rf"method\.heads: {heads} heads do not share a rank of {rank} evenly: choose a lora\.rank"
    )
    with pytest.raises(FedSieveError, match=said):
        fedsieve.finetune(
            str(tiny.bert), [rows(9, 1)], fedsieve.ravan(heads=heads), rounds=1, lora=lora
        )


@pytest.mark.parametrize("name", CORED)
def test_it_begins_with_no_adapter_of_others(tiny: Tiny, tmp_path: Path, name: str) -> None:
    runs.start(tiny, tmp_path / "run", rounds=1)
    lora = {"rank": 4, "targets": ["query", "value"], "start": str(tmp_path / "run" / "adapter")}
    with pytest.raises(FedSieveError, match=r"lora\.start: this method trains no adapter"):
        runs.start(
            tiny, tmp_path / "more", lora=lora, method={"name": name}, server={}, budgets=[{}]
        )


def test_a_run_goes_on_after_it_was_saved(tiny: Tiny, tmp_path: Path) -> None:
    def begun() -> fedsieve.Run:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return fedsieve.finetune(
                str(tiny.bert),
                [rows(9, 1), rows(9, 2)],
                fedsieve.fed_sb(),
                lora=Lora(rank=4, targets=("query", "value")),
                training=TRAINING,
                rounds=3,
                device="cpu",
            )

    whole, saved = begun().finish(), begun()
    for _ in saved:
        saved.save(tmp_path / "adapter")
    assert all(torch.equal(t, saved.adapter.tensors[n]) for n, t in whole.adapter.tensors.items())
