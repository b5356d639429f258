"""Local training by a function of the user's own: with a plain `Trainer` it is our own loop."""

import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import Sampler
from transformers import AutoTokenizer, Trainer, TrainingArguments

import fedsieve
from fedsieve import Budget, FedSieveError, Lora, Training, methods
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import View
from fedsieve.algebra.support import everything
from fedsieve.recipe import read as recipes
from fedsieve.settings import Task
from fedsieve.tasks import catalogue
from fedsieve.tasks.task import Fields
from fedsieve.train import by_function, local
from fedsieve.train.model import ResidentModel, load_base, set_up
from tests import runs, toy
from tests.conftest import Tiny
from tests.test_api import finetune, rows, same

CLIP = 0.5
SGD = Training(
    optimizer="sgd", lr=0.2, momentum=0.0, batch=8, epochs=2, clip=CLIP, precision="fp32"
)
CPU = torch.device("cpu")


class Halves(Sampler[int]):
    """The first half of an order in the first pass, the second one in the second."""

    def __init__(self, order: list[int]) -> None:
        self.order, self.passes = order, 0

    def __iter__(self) -> Iterator[int]:
        begin = self.passes * len(self)
        self.passes += 1
        return iter(self.order[begin : begin + len(self)])

    def __len__(self) -> int:
        return len(self.order) // 2


class InOrder(Trainer):  # type: ignore[misc]
    """A plain Trainer that takes its rows in a given order."""

    order: list[int]

    def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
        return Halves(self.order)


@pytest.fixture(scope="module")
def steady(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """The same with a model that drops nothing."""
    folder = tmp_path_factory.mktemp("steady") / "bert"
    shutil.copytree(tiny.bert, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return tiny._replace(bert=folder)


def arguments(folder: Path, seed: int, **given: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        lr_scheduler_type="constant",
        max_grad_norm=CLIP,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        seed=seed,
        **given,
    )


def trainers(tiny: Tiny, folder: Path, orders: list[list[int]]) -> by_function.Function:
    tokenizer = AutoTokenizer.from_pretrained(tiny.bert)

    def make(model: Any, rows: Dataset, seed: int) -> Any:
        args = arguments(folder, seed, num_train_epochs=2, learning_rate=0.2, optim="sgd")
        trainer = InOrder(model, args, train_dataset=rows, processing_class=tokenizer)
        trainer.order = orders.pop(0)
        return trainer

    return fedsieve.with_trainer(make)


@pytest.mark.parametrize(
    ("name", "budget"),
    [
        ("fedit", Budget()),
        ("flasc", Budget(down=0.5, up=0.25)),
        ("fslora", Budget(ratio=0.5)),
        pytest.param("ffa_lora", Budget(), marks=pytest.mark.slow),
        pytest.param("hetlora", Budget(ratio=0.5), marks=pytest.mark.slow),
        pytest.param("fed_select", Budget(down=0.5, up=0.5), marks=pytest.mark.slow),
    ],
)
def test_a_plain_trainer_gives_what_our_own_loop_gives(
    steady: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, budget: Budget
) -> None:
    clients = [rows(20, seed=number) for number in range(2)]
    orders: list[list[int]] = []
    plain = local._order

    def noted(*given: Any) -> Iterator[Tensor]:
        batches = list(plain(*given))
        orders.append(torch.cat(batches).tolist())
        return iter(batches)

    monkeypatch.setattr(local, "_order", noted)
    method = methods.load(name)()
    # Of single entries what does not move does so from round 2 on.
    given: dict[str, Any] = {"budgets": budget, "rounds": 2 if name == "fed_select" else 1}
    first = finetune(steady, clients, method, training=SGD, **given)
    start = first._experiment.start
    ours = first.finish()
    assert not same(start, ours.adapter)
    assert len(orders) == 2 * given["rounds"]
    theirs = finetune(
        steady, clients, method, training=trainers(steady, tmp_path, orders), **given
    ).finish()
    assert not orders
    for tensor, own in ours.adapter.tensors.items():
        torch.testing.assert_close(theirs.adapter.tensors[tensor], own, rtol=1e-3, atol=2e-5)
    for one, other in zip(theirs.receipts, ours.receipts, strict=True):
        assert (one.client, one.steps, one.down_bytes) == (
            other.client, other.steps, other.down_bytes
        )  # fmt: skip
        assert one.loss == pytest.approx(other.loss, rel=1e-3)
        assert one.memory_bytes == other.memory_bytes


# --- one client, whatever the function does


def resident_of(tiny: Tiny, task: Task = "classification", folder: Path | None = None) -> Any:
    base = load_base(str(folder or tiny.bert), task, ("cars", "space", "wine"), key=Key(0))
    lora = Lora(rank=4, targets=("query", "value"), dropout=0.0)
    return set_up(base, task, lora, "lora", key=Key(0), device=CPU)


def examples_of(tiny: Tiny, count: int = 10) -> Any:
    fields = Fields(text="text", label="label", classes=("cars", "space", "wine"), max_length=16)
    tokenizer = AutoTokenizer.from_pretrained(tiny.bert)
    return catalogue.load("classification").read(rows(count, 3), tokenizer, fields).examples


def whole_view(resident: ResidentModel, **moves: Any) -> View:
    adapter = resident.adapter()
    every = everything(adapter.layout)
    return View(adapter, adapter.layout, every, every._replace(**moves))


def stepping(model: Any, rows: Dataset, seed: int) -> None:
    """Some steps that move all that may move, and weight decay all that has a gradient."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.5)
    for row in list(rows)[:3]:
        batch = {name: torch.tensor([value]) for name, value in row.items()}
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_what_the_view_does_not_move_comes_back_to_the_bit(tiny: Tiny) -> None:
    resident, key = resident_of(tiny), Key(0, 1, "north")
    layout = resident.layout
    moved = layout.pairs[0].b
    still = layout.pairs[0].a
    mask = torch.zeros(layout.shapes[moved], dtype=torch.bool)
    mask[0] = True
    view = whole_view(resident, names=(moved,), masks={moved: mask})
    before = {n: t.clone() for n, t in view.adapter.tensors.items()}
    base = {n: p.clone() for n, p in resident.model.named_parameters() if "lora" not in n}
    seen = []

    def looking(model: Any, rows: Dataset, seed: int) -> float:
        seen.append([n for n, p in model.named_parameters() if p.requires_grad])
        with torch.no_grad():
            dict(resident.parameters())[still].add_(1)  # what is not its to move
        stepping(model, rows, seed)
        return 2.5

    fit = by_function.fit(resident, view, examples_of(tiny), looking, key)
    assert [n.replace(".default", "") for n in seen[0]] == [moved]
    assert (fit.steps, fit.loss) == (3, 2.5)
    for name, tensor in fit.tensors.items():
        if name != moved:
            assert torch.equal(tensor, before[name]), name
    assert torch.equal(fit.tensors[moved][~mask], before[moved][~mask])
    assert not torch.equal(fit.tensors[moved][mask], before[moved][mask])
    assert all(torch.equal(view.adapter.tensors[n], t) for n, t in before.items())
    now = {n: p for n, p in resident.model.named_parameters() if "lora" not in n}
    assert all(torch.equal(now[n], p) for n, p in base.items() if "classifier" not in n)


def of_numpy() -> Any:
    state: Any = np.random.get_state()  # noqa: NPY002
    return state[1].tolist()


def test_the_model_and_what_is_random_are_as_they_were(tiny: Tiny) -> None:
    resident, key = resident_of(tiny), Key(0, 1, "north")
    config = resident.model.config.to_dict()
    state = torch.get_rng_state(), random.getstate(), of_numpy()
    scales = {s for layer in resident.loras for s in layer.scaling.values()}
    drawn = []

    def messy(model: Any, rows: Dataset, seed: int) -> None:
        assert model.training
        assert torch.is_grad_enabled()
        drawn.append((seed, torch.rand(1).item(), random.random(), np.random.rand()))  # noqa: NPY002
        model.config.pad_token_id = 7
        model.base_model.model.gradient_checkpointing_enable()
        assert by_function._checkpoints(model)
        model.forward = lambda **_: None
        layer = model.base_model.model.bert.encoder.layer[0]
        layer.forward = lambda *_: None
        layer.register_forward_hook(lambda *_: None)
        scaling = layer.attention.self.query.scaling
        scaling.update(dict.fromkeys(scaling, 9.0))
        torch.set_default_dtype(torch.float64)
        for parameter in model.parameters():
            parameter.requires_grad_(True)

    view = whole_view(resident)
    with torch.no_grad():
        one = by_function.fit(resident, view, examples_of(tiny), messy, key)
    assert not one.told
    assert one.steps == 0
    assert resident.model.config.to_dict() == config
    assert not by_function._checkpoints(resident.model)
    assert not any("forward" in vars(module) for module in resident.model.modules())
    assert not any(module._forward_hooks for module in resident.model.modules())
    assert {s for layer in resident.loras for s in layer.scaling.values()} == scales
    assert torch.get_default_dtype() is torch.float32
    assert not any(p.requires_grad or p.grad is not None for p in resident.model.parameters())
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    assert of_numpy() == state[2]
    torch.rand(3)
    by_function.fit(resident, view, examples_of(tiny), messy, key)
    by_function.fit(resident, view, examples_of(tiny), messy, key._replace(round=2))
    assert drawn[0] == drawn[1]
    assert len({*drawn}) == 2
    plain = local.fit(resident, view, examples_of(tiny), SGD, key)
    assert plain.tensors.keys() == one.tensors.keys()


def attributes(model: Any) -> dict[str, str]:
    """Whatever modules hold beside weights, buffers and modules."""
    own = {"_parameters", "_buffers", "_modules", "training"}
    return {
        f"{name}.{key}": repr(value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if key not in own
    }


CHANGED: dict[str, Any] = {
    "an epsilon": lambda m: setattr(m.bert.encoder.layer[0].output.LayerNorm, "eps", 100.0),
    "a number of heads": lambda m: setattr(
        m.bert.encoder.layer[0].attention.self, "num_attention_heads", 1
    ),
    "a share of dropout": lambda m: setattr(m.bert.embeddings.dropout, "p", 0.9),
    "something new": lambda m: setattr(m.bert, "mine", [1]),
}


@pytest.mark.parametrize("what", [*CHANGED, "adapters that are off", "a list in place"])
def test_what_modules_compute_by_is_put_back(tiny: Tiny, what: str) -> None:
    """A client's function leaves nothing to the clients after it, nor to evaluations."""
    resident = resident_of(tiny)
    before = attributes(resident.model)

    def function(model: Any, rows: Dataset, seed: int) -> None:
        if what == "adapters that are off":
            model.disable_adapter_layers()
        elif what == "a list in place":
            model.base_model.model.bert.encoder.layer[0].attention.self.query.scaling.clear()
        else:
            CHANGED[what](model.base_model.model)
        assert attributes(model) != before

    by_function.fit(resident, whole_view(resident), examples_of(tiny), function, Key(0, 1, "north"))
    assert attributes(resident.model) == before


def wrecking(model: Any, rows: Dataset, seed: int) -> None:
    with torch.no_grad():
        model.base_model.model.bert.embeddings.word_embeddings.weight.add_(1)


def by_data(model: Any, rows: Dataset, seed: int) -> None:
    """What torch does not count."""
    model.base_model.model.bert.embeddings.word_embeddings.weight.data.add_(1)


def by_numpy(model: Any, rows: Dataset, seed: int) -> None:
    model.base_model.model.bert.embeddings.word_embeddings.weight.detach().numpy()[:] += 1


def replacing(model: Any, rows: Dataset, seed: int) -> None:
    layer = model.base_model.model.bert.embeddings.word_embeddings
    layer.weight = torch.nn.Parameter(layer.weight.detach() + 1)


def another_layer(model: Any, rows: Dataset, seed: int) -> None:
    model.base_model.model.bert.embeddings.word_embeddings = torch.nn.Embedding(9, 16)


def merging(model: Any, rows: Dataset, seed: int) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.add_(1)
    model.merge_adapter()


def halving(model: Any, rows: Dataset, seed: int) -> None:
    model.to(torch.bfloat16)


def raising(model: Any, rows: Dataset, seed: int) -> None:
    raise KeyError("col\numn")


def resizing(model: Any, rows: Dataset, seed: int) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = parameter.data[:2]


def without_numbers(model: Any, rows: Dataset, seed: int) -> None:
    model.to("meta")


def a_part_without_numbers(model: Any, rows: Dataset, seed: int) -> None:
    model.base_model.model.bert.embeddings.to("meta")


class Odd(Exception):
    """What neither can be written nor is a number."""

    def __str__(self) -> str:
        raise RuntimeError("gone")

    def __float__(self) -> float:
        raise RuntimeError("gone")


def that_raises(error: BaseException) -> by_function.Function:
    def function(model: Any, rows: Dataset, seed: int) -> None:
        raise error

    return function


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (that_raises(SystemExit(0)), "failed: SystemExit: 0"),
        (that_raises(GeneratorExit()), "failed: GeneratorExit"),
        (that_raises(StopIteration(1)), "failed: StopIteration: 1"),
        (that_raises(FedSieveError("no\n" + "x" * 10**6)), "failed: no x+$"),
        (that_raises(Odd()), "failed: Odd"),
        (lambda model, rows, seed: Odd(), "returned a Odd"),
        (without_numbers, "left a model that cannot be read: NotImplementedError"),
        (a_part_without_numbers, "left a model that cannot be read: "),
        (raising, r"failed: KeyError: 'col\\numn'"),
        (wrecking, "changed .*word_embeddings.*all clients share"),
        (by_data, "changed .*word_embeddings.*all clients share"),
        (by_numpy, "changed .*word_embeddings.*all clients share"),
        (replacing, "changed .*word_embeddings.*all clients share"),
        (another_layer, "changed .*word_embeddings.*all clients share"),
        (merging, "changed .*base_layer.*not merge the adapter"),
        (halving, "changed .*all clients share"),
        (lambda model, rows, seed: 10**400, "returned a int"),
        (resizing, r"left .*lora_B.* in the shape \(2, 4\), and it was \(16, 4\)"),
        (lambda model, rows, seed: "well", "returned a str"),
        (fedsieve.with_trainer(lambda model, rows, seed: None), "a trainer is needed, .* NoneType"),
    ],
)
def test_what_a_function_must_not_do_names_the_client(tiny: Tiny, function: Any, said: str) -> None:
    run = finetune(tiny, {"north": rows(6, 1)}, fedsieve.fedit(), training=function)
    with pytest.raises(FedSieveError, match=f"client 'north', round 1: .*{said}") as caught:
        run.finish()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert [each.round for each in run.metrics] == [0]


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), *toy.no_memory()], ids=lambda e: type(e).__name__
)
def test_who_stops_a_run_stops_it_and_memory_is_nobodys_mistake(
    tiny: Tiny, error: BaseException
) -> None:
    run = finetune(tiny, {"north": rows(6, 1)}, fedsieve.fedit(), training=that_raises(error))
    with pytest.raises(type(error)) as caught:
        run.finish()
    assert caught.value is error
    if not isinstance(error, KeyboardInterrupt):
        assert error.__notes__ == ["client 'north', round 1"]


def test_a_result_that_is_not_finite_leaves_its_client_out(tiny: Tiny) -> None:
    def diverging(model: Any, rows: Dataset, seed: int) -> None:
        if len(rows) == 7:
            with torch.no_grad():
                next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))

    clients = {"north": rows(6, 1), "south": rows(7, 2)}
    with pytest.warns(UserWarning, match="client south is left out: the trained .* not finite"):
        run = finetune(tiny, clients, fedsieve.fedit(), training=diverging, rounds=1).finish()
    assert [(r.client, r.dropped is None) for r in run.receipts] == [
        ("north", True), ("south", False)
    ]  # fmt: skip
    assert run.metrics[-1].loss is None  # none was told
    with pytest.raises(FedSieveError, match="HetLoRA's pruning"):
        finetune(
            tiny, clients, fedsieve.hetlora(pruning=True), training=diverging, rounds=1
        ).finish()


@pytest.mark.parametrize("loss", [1e16, -1e308, float("-inf")])
def test_a_loss_beyond_all_sense_leaves_its_client_out(tiny: Tiny, loss: float) -> None:
    """And what the log has of it can be read."""
    told = {6: 0.5, 7: loss}
    clients = {"north": rows(6, 1), "south": rows(7, 2)}
    with pytest.warns(UserWarning, match="client south is left out: the training loss became"):
        run = finetune(
            tiny,
            clients,
            fedsieve.fedit(),
            training=lambda model, rows, seed: told[len(rows)],
            rounds=1,
        ).finish()
    assert [(r.client, r.loss) for r in run.receipts] == [("north", 0.5), ("south", None)]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (lambda model, rows: None, r"training: it must take \(model, rows, seed\)"),
        (stepping.__class__, "training: .* is needed, not the class itself"),
    ],
)
def test_what_is_no_such_function(tiny: Tiny, given: Any, said: str) -> None:
    with pytest.raises(FedSieveError, match=said):
        finetune(tiny, [rows(6, 1)], training=given)


@pytest.mark.parametrize("given", [None, 5, "x", {}, b"x", len, lambda model, rows: None])
def test_what_makes_no_trainer_is_told_at_once(given: Any) -> None:
    with pytest.raises(FedSieveError, match=r"^with_trainer: .*model, rows, seed") as caught:
        fedsieve.with_trainer(given)
    assert "\n" not in str(caught.value)


def test_rows_of_images_are_what_the_model_sees(tiny: Tiny) -> None:
    from fedsieve.train.batch import inputs
    from tests.tasks.test_federated import pictures

    fields = Fields(image="image", label="label", max_length=16)
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(tiny.vit)
    given = Dataset.from_list(pictures())
    examples = catalogue.load("image-classification").read(given, processor, fields).examples
    found = by_function.rows_of(None, examples)
    assert set(found.column_names) == {"pixel_values", "labels"}
    there = inputs(None, examples, CPU)["pixel_values"]
    assert torch.equal(found[1]["pixel_values"], there[1])


# --- by name, in a recipe


def counted(model: Any, rows: Dataset, seed: int) -> float:
    stepping(model, rows, seed)
    return float(len(rows))


NAME = f"{__name__}:counted"


def test_a_recipe_names_a_function_and_is_asked_for_it(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tiny.table(training={"function": NAME}, rounds=1)
    with pytest.raises(
        FedSieveError, match=r"training\.function .* somebody's program.*allow-code"
    ):
        recipes.check(table)
    recipe = recipes.check(table, allow_code=True)
    runs.start_from(recipe, tmp_path / "run")
    logged = (tmp_path / "run" / "clients.jsonl").read_text(encoding="utf-8")
    assert '"steps": 3' in logged
    for changes, said in (
        ({"training": {"function": NAME, "lr": 0.5}}, "lr: the function .* trains in its own way"),
        ({"training": {"function": "no"}}, "training.function"),
        ({"training": {"function": NAME}, "engine": {"together": 2}}, "engine.together"),
    ):
        with pytest.raises(FedSieveError, match=said):
            recipes.check(tiny.table(**changes), allow_code=True)
    for name, said in (
        ("tests.no_such:train", "'tests.no_such' cannot be imported: ModuleNotFoundError"),
        (f"{__name__}:nothing", "has no 'nothing'"),
        (f"{__name__}:SGD", "is needed, not Training"),
    ):
        with pytest.raises(FedSieveError, match=f"training.function: .*{said}"):
            by_function.load(name)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "ends_itself.py").write_text("raise SystemExit(0)", encoding="utf-8")
    with pytest.raises(FedSieveError, match="'ends_itself' cannot be imported: SystemExit: 0"):
        by_function.load("ends_itself:train")
    run = finetune(tiny, [rows(6, 1)], training=Training(function=NAME), rounds=1).finish()
    assert [(r.steps, r.loss) for r in run.receipts] == [(3, 6.0)]


OURS = """
import torch

def train(model, rows, seed):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for row in rows:
        model(**{name: torch.tensor([value]) for name, value in row.items()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
"""


@pytest.mark.slow
def test_workers_train_by_the_same_function(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ours.py").write_text(OURS, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.syspath_prepend(str(tmp_path))
    engines: list[Any] = [{}, {"kind": "processes", "workers": 1, "threads": 1}]
    for number, engine in enumerate(engines):
        table = tiny.table(training={"function": "ours:train"}, rounds=1, engine=engine)
        runs.start_from(recipes.check(table, allow_code=True), tmp_path / str(number))
    runs.assert_same(tmp_path / "0", tmp_path / "1")


def test_trl_trains_the_model_that_it_is_given(tiny: Tiny, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    tokenizer = AutoTokenizer.from_pretrained(tiny.gpt2)
    tokenizer.pad_token = tokenizer.eos_token

    def make(model: Any, rows: Dataset, seed: int) -> Any:
        args = trl.SFTConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            learning_rate=0.2,
            max_steps=2,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            seed=seed,
            gradient_checkpointing=False,
        )
        return trl.SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)

    run = fedsieve.finetune(
        tiny.gpt2,
        [rows(8, 1), rows(8, 2)],
        fedsieve.fedit(),
        rounds=1,
        task="causal-lm",
        lora=Lora(rank=4, targets=("c_attn",)),
        training=fedsieve.with_trainer(make),
        device="cpu",
    )
    before = run.adapter
    run.finish()
    assert [r.steps for r in run.receipts] == [2, 2]
    assert all(r.loss > 0 for r in run.receipts if r.loss is not None)
    assert not same(before, run.adapter)
