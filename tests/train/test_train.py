"""Local training is the real thing: PEFT's layers at the client's own rank, in one resident model,
taking the steps that a plain torch loop would take.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn
from torch.func import functional_call
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fedsieve.algebra.adapter import Adapter
from fedsieve.algebra.budget import Budget, Client
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import ClientContext, View
from fedsieve.algebra.support import everything
from fedsieve.errors import FedSieveError
from fedsieve.methods import fslora
from fedsieve.settings import Lora, Task, Training
from fedsieve.tasks import tokens
from fedsieve.tasks.causal_lm import causal_lm
from fedsieve.tasks.classification import classification
from fedsieve.tasks.tokens import Texts
from fedsieve.train import local
from fedsieve.train.dropout import Dropout, attention, keep_mask
from fedsieve.train.local import Fit, evaluate
from fedsieve.train.model import ResidentModel, attach, load_base, pick_device
from tests.conftest import LABELS, Tiny, texts

CALM: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
STILL: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
KEY = Key(seed=3, round=1, client="7")
Batch = dict[str, Tensor]


def resident_of(
    tiny: Tiny,
    lora: Lora | None = None,
    *,
    task: Task = "classification",
    settings: dict[str, Any] | None = None,
) -> ResidentModel:
    classifier = task == "classification"
    base = load_base(
        str(tiny.bert if classifier else tiny.gpt2),
        task,
        LABELS if classifier else (),
        key=Key(0),
        pad_token_id=0,
        settings=settings,
    )
    default = Lora(rank=8, alpha=16.0, dropout=0.0, targets=("query", "value"))
    lora = lora or (default if classifier else replace(default, targets=("c_attn", "c_proj")))
    return attach(base, task, lora, key=Key(0), device=torch.device("cpu"))


def classified(tiny: Tiny, count: int = 20) -> Texts:
    columns = list(zip(*texts(count, seed=5), strict=True))
    rows = Dataset.from_dict({"text": columns[0], "label": columns[1]})
    tokenizer = AutoTokenizer.from_pretrained(tiny.bert)
    return classification(rows, tokenizer, text="text", label="label", max_length=16)[0]


def continued(tiny: Tiny, count: int = 20) -> Texts:
    rows = Dataset.from_dict(
        {"ask": [f"{text} " for text, _ in texts(count, seed=5)], "reply": ["word1 word2"] * count}
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny.gpt2)
    tokens.ensure_pad_token(tokenizer)
    return causal_lm(rows, tokenizer, prompt="ask", completion="reply", max_length=16)[0]


def fit(
    resident: ResidentModel, adapter: Adapter, examples: Texts, training: Training, key: Key
) -> Fit:
    """Train all of an adapter."""
    layout = adapter.layout
    view = View(adapter, layout, everything(layout), everything(layout))
    return local.fit(resident, view, examples, training, key)


def some(resident: ResidentModel, rank: int | None = None, seed: int = 0) -> Adapter:
    """An adapter of random numbers, B too."""
    layout = (
        resident.layout if rank is None else resident.layout.narrow(rank, resident.layout.scale)
    )
    draw = torch.Generator().manual_seed(seed)
    tensors = {n: 0.3 * torch.randn(layout.shapes[n], generator=draw) for n in layout.names}
    return Adapter(layout, tensors)


def batch_of(examples: Texts) -> Batch:
    return {name: value for name, value in examples._asdict().items() if value is not None}


def record(resident: ResidentModel, examples: Texts) -> list[Batch]:
    """The batches that the model gets to see from now on, with the labels of their rows."""
    seen: list[Batch] = []
    words = [tuple(filter(None, row)) for row in examples.input_ids.tolist()]
    labels = dict(zip(words, examples.labels, strict=True))

    def look(_module: Any, _args: Any, given: Batch) -> None:
        own = [labels[tuple(filter(None, row))] for row in given["input_ids"].tolist()]
        seen.append({**given, "labels": torch.stack(own)})

    resident.model.register_forward_pre_hook(look, with_kwargs=True)
    return seen


# --- a rank-k adapter is one


@pytest.mark.parametrize(("optimizer", "moments"), [("sgd", 1), ("adamw", 2)])
def test_a_client_of_rank_k_has_k_over_r_of_everything(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, optimizer: Any, moments: int
) -> None:
    """Trained parameters, gradients and optimizer state of the pairs are k / r of the dense ones.

    A head has no ranks and stays whole: it is counted apart.
    """
    resident = resident_of(tiny)
    examples = classified(tiny)
    made: list[torch.optim.Optimizer] = []
    gradients: list[int] = []
    build = local.optimizer_of

    def watched(parameters: list[Tensor], training: Training) -> torch.optim.Optimizer:
        one = build(parameters, training)
        one.register_step_pre_hook(
            lambda *_: gradients.append(
                sum(p.grad.numel() for p in parameters if p.grad is not None)
            )
        )
        made.append(one)
        return one

    monkeypatch.setattr(local, "optimizer_of", watched)
    head = sum(
        torch.Size(shape).numel()
        for name, shape in resident.layout.shapes.items()
        if name not in resident.layout.rank_axis
    )
    figures = {}
    for rank in (8, 4, 1):
        fit(resident, some(resident, rank), examples, Training(optimizer=optimizer, steps=1), KEY)
        trained = sum(p.numel() for p in resident.model.parameters() if p.requires_grad)
        state = sum(
            value.numel()
            for each in made[-1].state.values()
            for name, value in each.items()
            if name != "step"
        )
        figures[rank] = (trained - head, gradients[-1] - head, state - moments * head)
        for layer in resident.loras:
            assert layer.lora_A["default"].weight.shape == (rank, 16)
            assert layer.lora_B["default"].weight.shape == (16, rank)
    assert figures[8] == (4 * 2 * 8 * 16, 4 * 2 * 8 * 16, moments * 4 * 2 * 8 * 16)
    for rank in (4, 1):
        assert figures[rank] == tuple(rank * dense // 8 for dense in figures[8])


def test_the_base_never_changes_and_is_never_copied(tiny: Tiny) -> None:
    resident = resident_of(tiny)
    ours = {f"{name}.{attribute}" for name, attribute in _places(resident)}
    base = {n: p for n, p in resident.model.named_parameters() if n not in ours}
    before = {n: (p.data_ptr(), p.clone()) for n, p in base.items()}
    assert len(before) > 30
    for rank in (8, 2):
        given = some(resident, rank)
        kept = {n: t.clone() for n, t in given.tensors.items()}
        got = fit(resident, given, classified(tiny), Training(lr=0.5), KEY)
        assert all(torch.equal(kept[n], t) for n, t in given.tensors.items())
        assert any(not torch.equal(kept[n], t) for n, t in got.tensors.items())
        evaluate(resident, given, classified(tiny))
    now = {n: p for n, p in resident.model.named_parameters() if n not in ours}
    assert now.keys() == before.keys()
    for name, (place, value) in before.items():
        assert now[name].data_ptr() == place
        assert torch.equal(now[name], value)
        assert now[name].grad is None


def _places(resident: ResidentModel) -> Iterator[tuple[str, str]]:
    names = {id(module): name for name, module in resident.model.named_modules()}
    for module, attribute in resident.slots.values():
        yield names[id(module)], attribute


# --- the steps are those of a plain loop


TRAININGS = [
    Training(optimizer="sgd", lr=0.2, momentum=0.9, batch=8, epochs=2),
    Training(optimizer="sgd", lr=0.2, momentum=0.0, weight_decay=0.1, batch=8, steps=4),
    Training(optimizer="sgd", lr=0.2, momentum=0.9, batch=8, clip=0.1),
    Training(optimizer="adamw", lr=0.01, weight_decay=0.1, batch=8, epochs=2),
    Training(optimizer="adamw", lr=0.01, batch=8, clip=0.1),
    Training(optimizer="sgd", lr=0.1, momentum=0.9, batch=8, epochs=2, proximal=3.0, clip=0.1),
    Training(optimizer="adamw", lr=0.01, weight_decay=0.1, batch=8, epochs=2, proximal=3.0),
]


@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.parametrize("rank", [8, 3])
def test_local_training_is_a_plain_peft_loop(tiny: Tiny, training: Training, rank: int) -> None:
    """The oracle: a model of its own, PEFT as its manual says, one optimizer of torch's."""
    training = replace(training, precision="fp32")
    resident = resident_of(tiny, settings=CALM)
    adapter = some(resident, rank)
    seen = record(resident, classified(tiny))
    got = fit(resident, adapter, classified(tiny), training, KEY)

    base = AutoModelForSequenceClassification.from_pretrained(tiny.bert, **CALM)
    alpha = resident.layout.scale * rank
    model = get_peft_model(
        base,
        LoraConfig(
            task_type="SEQ_CLS", r=rank, lora_alpha=alpha, target_modules=["query", "value"]
        ),
    )
    set_peft_model_state_dict(model, adapter.tensors)
    model.train()
    weights = [p for p in model.parameters() if p.requires_grad]
    began = [p.detach().clone() for p in weights]
    optimizer: torch.optim.Optimizer
    if training.optimizer == "sgd":
        optimizer = torch.optim.SGD(
            weights, training.lr, training.momentum, weight_decay=training.weight_decay
        )
    else:
        optimizer = torch.optim.AdamW(weights, training.lr, weight_decay=training.weight_decay)
    losses = []
    for batch in seen:
        away = torch.cat([(p - own).flatten() for p, own in zip(weights, began, strict=True)])
        loss = model(**batch).loss + training.proximal / 2 * away.square().sum()
        optimizer.zero_grad()
        loss.backward()
        if training.clip is not None:
            norm = torch.cat([p.grad.flatten() for p in weights if p.grad is not None]).norm()
            assert norm > training.clip  # else this would test nothing
            for p in weights:
                assert p.grad is not None
                p.grad *= training.clip / norm
        optimizer.step()
        losses.append(loss.item())
    assert got.steps == len(seen)
    assert got.loss == pytest.approx(sum(losses) / len(losses), abs=1e-6)
    expected = {name.replace(".default", ""): p for name, p in model.named_parameters()}
    for name, tensor in got.tensors.items():
        public = name.replace("classifier.", "classifier.modules_to_save.")
        torch.testing.assert_close(tensor, expected[public].detach(), atol=2e-6, rtol=1e-5)


def test_an_epoch_sees_each_example_once_and_steps_are_counted(tiny: Tiny) -> None:
    resident = resident_of(tiny)
    examples = classified(tiny, 20)
    rows = sorted(tuple(i for i in row if i) for row in examples.input_ids.tolist())
    seen = record(resident, examples)
    got = fit(resident, some(resident), examples, Training(batch=8, epochs=2), KEY)
    assert [len(batch["labels"]) for batch in seen] == [8, 8, 4, 8, 8, 4]
    assert got.steps == 6
    passes = [
        [tuple(i for i in row if i) for b in part for row in b["input_ids"].tolist()]
        for part in (seen[:3], seen[3:])
    ]
    assert sorted(passes[0]) == sorted(passes[1]) == rows
    assert passes[0] != passes[1]
    seen.clear()
    got = fit(resident, some(resident), examples, Training(batch=8, steps=4), KEY)
    assert [len(batch["labels"]) for batch in seen] == [8, 8, 4, 8]
    assert got.steps == 4


def test_the_same_key_gives_the_same_result_whatever_ran_before(tiny: Tiny) -> None:
    resident = resident_of(tiny, Lora(rank=4, targets=("query",), dropout=0.2))
    examples, training = classified(tiny), Training(lr=0.3, batch=8)
    first = fit(resident, some(resident), examples, training, KEY)
    torch.manual_seed(1234)
    state = torch.get_rng_state()
    fit(resident, some(resident, 2, seed=9), examples, training, KEY._replace(client="8"))
    assert torch.equal(torch.get_rng_state(), state)  # the caller's own stream is not touched
    torch.rand(5)
    again = fit(resident, some(resident), examples, training, KEY)
    assert again.loss == first.loss
    assert all(torch.equal(first.tensors[n], again.tensors[n]) for n in first.tensors)
    for other in (KEY._replace(client="8"), KEY._replace(round=2), KEY._replace(seed=4)):
        differs = fit(resident, some(resident), examples, training, other)
        assert not torch.equal(
            torch.cat([t.flatten() for t in first.tensors.values()]),
            torch.cat([t.flatten() for t in differs.tensors.values()]),
        )


def test_dropout_acts_in_training_and_not_in_evaluation(tiny: Tiny) -> None:
    drops = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}
    noisy, calm = resident_of(tiny, settings=drops), resident_of(tiny, settings=CALM)
    examples = classified(tiny)
    once = Training(steps=1, batch=20, precision="fp32")
    loss = fit(calm, some(calm), examples, once, KEY).loss
    assert fit(noisy, some(noisy), examples, once, KEY).loss != pytest.approx(loss, abs=1e-3)
    expected = evaluate(calm, some(calm), examples, precision="fp32")
    got = evaluate(noisy, some(noisy), examples, precision="fp32")
    assert expected.loss == pytest.approx(loss, abs=1e-6)
    assert got.loss == pytest.approx(loss, abs=1e-6)
    assert got.metrics == expected.metrics


def test_evaluation_does_not_depend_on_the_batch(tiny: Tiny) -> None:
    resident = resident_of(tiny)
    whole = evaluate(resident, some(resident), classified(tiny), batch=20, precision="fp32")
    parts = evaluate(resident, some(resident), classified(tiny), batch=7, precision="fp32")
    assert (parts.metrics, parts.counted) == (whole.metrics, whole.counted)
    assert parts.loss == pytest.approx(whole.loss, abs=1e-6)


def test_bf16_runs_the_model_and_keeps_the_adapter_in_float32(tiny: Tiny) -> None:
    resident = resident_of(tiny)
    examples = classified(tiny)
    full = fit(resident, some(resident), examples, Training(steps=2, precision="fp32"), KEY)
    half = fit(resident, some(resident), examples, Training(steps=2, precision="bf16"), KEY)
    assert {t.dtype for t in half.tensors.values()} == {torch.float32}
    assert half.loss != full.loss
    assert half.loss == pytest.approx(full.loss, rel=0.05)


# --- rank-k training is masked rank-r training of W0 + B S A


def sketched(resident: ResidentModel) -> tuple[Adapter, Adapter, Tensor]:
    """A dense adapter, what a client at ratio 3/8 gets of it, and the ranks that it got."""
    dense = some(resident)
    method = fslora.method(shared=False)
    key = Key(11, 1)
    client = Client("c", 20, Budget(ratio=3 / 8))
    payload = method.publish(method.plan(method.init(dense), key), client, key)
    view, _ = method.view(payload, {}, ClientContext(client, dense, key))
    ranks = payload.support.ranks
    assert ranks is not None
    assert view.adapter.layout.rank == ranks.shape[1] == 3
    assert len({tuple(row) for row in ranks.tolist()}) > 1  # each module its own, here
    return dense, view.adapter, ranks


def masked_loss(base: PreTrainedModel, dense: Adapter, full: dict[str, Tensor], ranks: Tensor,
                batch: Batch) -> Tensor:  # fmt: skip
    """The loss of W0 + s B S A, S = (r / k) diag(1 on I), by replacing the weights themselves."""
    weights = {}
    for pair, kept in zip(dense.layout.pairs, ranks, strict=True):
        name = pair.module.removeprefix("base_model.model.") + ".weight"
        sketch = torch.zeros(8, dtype=full[pair.a].dtype)
        sketch[kept] = 8 / 3
        change = full[pair.b] @ torch.diag(sketch) @ full[pair.a]
        weights[name] = base.get_parameter(name) + dense.layout.scale * change
    for part in ("weight", "bias"):
        weights[f"classifier.{part}"] = full[f"base_model.model.classifier.{part}"]
    return functional_call(base, weights, kwargs=batch).loss  # type: ignore[no-any-return]


def test_gradients_at_rank_k_are_those_of_the_sketched_model(tiny: Tiny) -> None:
    """Gradient by gradient, in float64; off the sketch the dense gradient is zero."""
    resident = resident_of(tiny, settings=CALM)
    dense, mine, ranks = sketched(resident)
    batch = batch_of(classified(tiny))
    resident.put(mine)
    resident.model.double().train()
    resident.model(**batch).loss.backward()
    got = {name: p.grad for name, p in resident.parameters()}

    base = AutoModelForSequenceClassification.from_pretrained(tiny.bert, **CALM).double().train()
    full = {n: t.double().requires_grad_() for n, t in dense.tensors.items()}
    masked_loss(base, dense, full, ranks, batch).backward()
    for number, pair in enumerate(dense.layout.pairs):
        kept = ranks[number]
        off = torch.ones(8, dtype=torch.bool)
        off[kept] = False
        a, b = full[pair.a].grad, full[pair.b].grad
        assert a is not None
        assert b is not None
        assert a[kept].abs().max() > 1e-4
        torch.testing.assert_close(got[pair.a], a[kept], atol=1e-12, rtol=1e-9)
        torch.testing.assert_close(got[pair.b], b[:, kept], atol=1e-12, rtol=1e-9)
        assert torch.all(a[off] == 0)
        assert torch.all(b[:, off] == 0)
    for part in ("weight", "bias"):
        name = f"base_model.model.classifier.{part}"
        torch.testing.assert_close(got[name], full[name].grad, atol=1e-12, rtol=1e-9)


def test_training_at_rank_k_is_masked_training_at_rank_r(tiny: Tiny) -> None:
    resident = resident_of(tiny, settings=CALM)
    dense, mine, ranks = sketched(resident)
    seen = record(resident, classified(tiny))
    training = Training(lr=0.05, momentum=0.9, batch=8, precision="fp32")
    got = fit(resident, mine, classified(tiny), training, KEY)

    base = AutoModelForSequenceClassification.from_pretrained(tiny.bert, **CALM)
    full = {n: t.clone().requires_grad_() for n, t in dense.tensors.items()}
    optimizer = torch.optim.SGD(full.values(), lr=0.05, momentum=0.9)
    for batch in seen:
        optimizer.zero_grad()
        masked_loss(base, dense, full, ranks, batch).backward()
        optimizer.step()
    for number, pair in enumerate(dense.layout.pairs):
        kept = ranks[number]
        off = [i for i in range(8) if i not in kept.tolist()]
        a, b = full[pair.a].detach(), full[pair.b].detach()
        torch.testing.assert_close(got.tensors[pair.a], a[kept], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(got.tensors[pair.b], b[:, kept], atol=1e-5, rtol=1e-4)
        assert torch.equal(a[off], dense.tensors[pair.a][off])
        assert (got.tensors[pair.a] - mine.tensors[pair.a]).abs().max() > 1e-3


# --- causal language models


def test_the_causal_loss_is_the_models_own(tiny: Tiny) -> None:
    """The mean over all learned tokens; the oracle is GPT-2's own loss on all of them at once."""
    resident = resident_of(tiny, task="causal-lm", settings=STILL)
    examples = continued(tiny)
    start = resident.adapter()  # B is zero: the model is the base
    base = AutoModelForCausalLM.from_pretrained(tiny.gpt2).eval()
    with torch.no_grad():
        out = base(**batch_of(examples))
    score = evaluate(resident, start, examples, batch=6, precision="fp32")
    assert score.loss == pytest.approx(out.loss.item(), abs=1e-5)
    learned = examples.labels[:, 1:] != -100
    right = (out.logits[:, :-1].argmax(-1) == examples.labels[:, 1:])[learned]
    assert score.counted == right.numel() == 20 * 3  # two words and the end
    assert score.metrics["token_accuracy"] == right.sum().item() / right.numel()
    once = Training(steps=1, batch=20, precision="fp32")
    assert fit(resident, start, examples, once, KEY).loss == pytest.approx(score.loss, abs=1e-5)


def test_fast_attention_sees_neither_the_future_nor_padding(tiny: Tiny) -> None:
    """In training, where the slow path would run: a rate that rounds to zero drops nothing."""
    resident = resident_of(tiny, task="causal-lm", settings={**STILL, "attn_pdrop": 1e-9})
    resident.put(some(resident))
    resident.model.train()
    ids = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    with torch.no_grad():
        before = resident.model(input_ids=ids, attention_mask=mask).logits
        other = ids.clone()
        other[0, 4] = 20
        other[1, 3:] = 21
        after = resident.model(input_ids=other, attention_mask=mask).logits
        resident.model.eval()
        calm = resident.model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(after[0, :4], before[0, :4])
    assert not torch.allclose(after[0, 4:], before[0, 4:])
    torch.testing.assert_close(after[1, :3], before[1, :3])
    torch.testing.assert_close(before[mask.bool()], calm[mask.bool()], atol=1e-5, rtol=1e-5)


# --- dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_has_its_rate_and_keeps_the_expectation(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    count = 400_003  # not a multiple of the four entries that share a draw
    mask = keep_mask(torch.ones(count, dtype=dtype), p)
    assert mask.dtype == dtype
    kept = mask[mask != 0]
    assert torch.all(kept == kept[0])
    assert kept[0].item() == pytest.approx(1 / (1 - p), rel=1e-4 if dtype.itemsize == 4 else 5e-3)
    error = (p * (1 - p) / count) ** 0.5
    assert kept.numel() / count == pytest.approx(1 - p, abs=5 * error + 2**-16)
    # Neighbours, which share a draw, and rows of four do not follow each other.
    dropped = (mask == 0).double() - p
    for step in (1, 2, 3, 4):
        shared = (dropped[:-step] * dropped[step:]).mean().item() / (p * (1 - p))
        assert abs(shared) < 5 / count**0.5


def test_dropout_at_its_ends_and_in_evaluation() -> None:
    x = torch.randn(7, 3)
    module = Dropout(0.5)
    assert not torch.equal(module(x), x)
    assert torch.equal(module.eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)
    assert torch.equal(keep_mask(x, 1.0), torch.zeros(7, 3))
    assert torch.equal(keep_mask(x, 1e-9), torch.ones(7, 3))
    assert keep_mask(torch.empty(0, 4), 0.5).shape == (0, 4)


def heads(masked: bool) -> tuple[nn.Module, list[Tensor], Tensor | None]:
    """Queries of 4 heads, keys and values of 2: the grouped kind."""
    torch.manual_seed(1)
    module = nn.Module()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    module.is_causal = False  # type: ignore[assignment]
    tensors = [torch.randn(2, h, 5, 6) for h in (4, 2, 2)]
    mask = None
    if masked:
        mask = torch.zeros(2, 1, 5, 5)
        mask[0, :, :, 3:] = torch.finfo(torch.float32).min
    return module, tensors, mask


@pytest.mark.parametrize("masked", [False, True])
def test_attention_without_dropout_is_the_librarys(masked: bool) -> None:
    module, (q, k, v), mask = heads(masked)
    got, _ = attention(module, q, k, v, mask, dropout=0.0, scaling=0.3)
    library, _ = sdpa_attention_forward(module, q, k, v, mask, dropout=0.0, scaling=0.3)
    assert torch.equal(got, library)
    slow, _ = attention(module, q, k, v, mask, dropout=1e-9, scaling=0.3)
    torch.testing.assert_close(slow, library)
    default, _ = attention(module, q, k, v, mask, dropout=1e-9)
    torch.testing.assert_close(default, attention(module, q, k, v, mask)[0])


@pytest.mark.parametrize("masked", [False, True])
def test_attention_with_dropout_averages_to_attention_without(masked: bool) -> None:
    module, (q, k, v), mask = heads(masked)
    expected, _ = attention(module, q, k, v, mask)
    draws = torch.stack([attention(module, q, k, v, mask, dropout=0.3)[0] for _ in range(4000)])
    error = draws.std(0) / len(draws) ** 0.5
    assert draws.std(0).min() > 0
    assert ((draws.mean(0) - expected).abs() < 5 * error + 1e-6).all()


# --- what cannot be set up


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (
            Lora(rank=17, targets=("query",)),
            r"rank 17 is larger than a side of .*query \(16\)",
        ),
        (Lora(rank=2, targets=("qurey",)), "'qurey'.*did you mean 'query'"),
        (Lora(rank=2, targets=("layer.0.attention.self.qurey",)), "did you mean 'query'"),
        (Lora(rank=2, targets=("layer.7.attention.self.query",)), "LoRA cannot be added"),
    ],
)
def test_an_adapter_that_does_not_fit_the_model(tiny: Tiny, lora: Lora, message: str) -> None:
    with pytest.raises(FedSieveError, match=message):
        resident_of(tiny, lora)


def test_a_model_without_a_module_for_lora(tiny: Tiny) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(4)

    base: Any = Odd()
    with pytest.raises(FedSieveError, match="no module that can take LoRA"):
        attach(base, "classification", Lora(), key=Key(0), device=torch.device("cpu"))


def test_a_head_of_another_size_is_drawn_from_the_key_and_nothing_else_is(tiny: Tiny) -> None:
    def head(seed: int) -> Tensor:
        model = load_base(str(tiny.bert), "classification", ("a", "b"), key=Key(seed))
        assert model.config.id2label == {0: "a", 1: "b"}
        saved = AutoModelForSequenceClassification.from_pretrained(tiny.bert)
        name = "bert.encoder.layer.1.output.dense.weight"
        assert torch.equal(model.get_parameter(name), saved.get_parameter(name))
        weight: Tensor = model.get_parameter("classifier.weight")
        return weight

    assert head(0).shape == (2, 16)
    assert torch.equal(head(0), head(0))
    assert not torch.equal(head(0), head(1))
    with pytest.raises(FedSieveError, match=r"the weights of bert\..* have another shape"):
        load_base(
            str(tiny.bert), "classification", LABELS, key=Key(0), settings={"hidden_size": 32}
        )


def test_places_that_cannot_be_used(tiny: Tiny) -> None:
    with pytest.raises(FedSieveError, match="device 'nowhere' cannot be used"):
        pick_device("nowhere")
    with pytest.raises(FedSieveError, match="model 'no/such-model' was not found"):
        load_base("no/such-model", "classification", LABELS, key=Key(0))


# As torch names them where it is asked for one that it does not know.
DEVICES = (
    *("cuda", "ipu", "xpu", "mkldnn", "opengl", "opencl", "ideep", "hip", "ve", "fpga", "maia"),
    *("xla", "lazy", "vulkan", "mps", "meta", "hpu", "mtia", "privateuseone"),
)


@pytest.mark.parametrize("name", DEVICES)
def test_a_device_of_any_kind_is_there_or_refused_in_a_sentence(name: str) -> None:
    """Of some, torch looks for a package that nobody has."""
    if name in ("cuda", "mps", "xpu") and getattr(torch, name).is_available():
        pytest.skip("this machine has it")
    with pytest.raises(FedSieveError, match=f"^device '{name}' cannot be used here: "):
        pick_device(name)
