"""Laws over the families of transformers: what is trained is what is saved, whoever loads it.

The oracles are transformers and PEFT alone, in plain code, under random seeds of their own.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import safetensors.torch
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, PeftModel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from fedsieve.algebra.adapter import Adapter
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import Trained, View
from fedsieve.algebra.support import everything
from fedsieve.errors import FedSieveError
from fedsieve.settings import Lora, Precision, Task, Training
from fedsieve.train.local import evaluate, fit
from fedsieve.train.model import LABELS as LABELS_FILE
from fedsieve.train.model import ResidentModel, load_base, set_up
from tests.train import families
from tests.train.families import EVERY_RUN, FAMILIES, REFUSED, TASKS, Family

LABELS = ("cars", "space", "wine")
EXACT = ("deberta",)  # it takes a number that bfloat16 does not have
RANDOM = ("phimoe",)  # its routers draw experts while training
MAKERS: dict[Task, Any] = {
    "classification": AutoModelForSequenceClassification,
    "image-classification": AutoModelForImageClassification,
    "causal-lm": AutoModelForCausalLM,
}
CASES = [(family, letter) for family in FAMILIES for letter in family.tasks]
QUICK = [case for case in CASES if case[1] in EVERY_RUN.get(case[0].name, "")]


def cases(quick: Sequence[tuple[Family, str]]) -> pytest.MarkDecorator:
    """Over all families and tasks; of which those that are not named are slow."""
    return pytest.mark.parametrize(
        ("family", "task"),
        [
            pytest.param(
                family,
                TASKS[letter],
                id=f"{family.name}-{TASKS[letter]}",
                marks=[] if (family, letter) in quick else [pytest.mark.slow],
            )
            for family, letter in CASES
        ],
    )


every_case, some_cases = cases(QUICK), cases(QUICK[::3])

Bases = Callable[[Family], Path]


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    folder = tmp_path_factory.mktemp("families")

    def give(family: Family) -> Path:
        place = folder / family.name
        return place if place.exists() else families.write(family, place)

    return give


def resident_of(
    source: Path,
    task: Task,
    targets: tuple[str, ...] | str | None,
    trains: Trained = "lora",
    seed: int = 0,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> ResidentModel:
    classes = () if task == "causal-lm" else LABELS
    base = load_base(str(source), task, classes, key=Key(seed), dtype=dtype, pad_token_id=0)
    lora = Lora(rank=4, alpha=8.0, dropout=0.0, targets=targets)
    return set_up(base, task, lora, trains, key=Key(seed), device=torch.device("cpu"))


def some(resident: ResidentModel, rank: int = 4) -> Adapter:
    """Random numbers for all that is trained, B too."""
    layout = resident.layout
    if rank != layout.rank and layout.pairs:
        layout = layout.narrow(rank, 1.5)
    draw = torch.Generator().manual_seed(5)
    tensors = {n: 0.2 * torch.randn(layout.shapes[n], generator=draw) for n in layout.names}
    return Adapter(layout, tensors)


def train(
    resident: ResidentModel, start: Adapter, steps: int = 2, precision: Precision = "fp32"
) -> tuple[Adapter, float]:
    """The adapter after a few steps over all rows at once, and the mean loss of the steps."""
    passes = everything(start.layout)
    view = View(start, start.layout, passes, passes)
    rows = families.examples(resident.model, resident.task)
    steady = Training(steps=steps, batch=3, lr=0.01, optimizer="sgd", precision=precision)
    done = fit(resident, view, rows, steady, Key(3))
    return Adapter(start.layout, done.tensors), done.loss


def logits(model: Any, task: Task) -> Tensor:
    model.eval()
    given = families.alone(model, task, 0)
    with torch.no_grad():
        out: Tensor = model(**given).logits
    return out


def of_adapter(resident: ResidentModel, adapter: Adapter) -> Tensor:
    """Our logits, after a look at what was put into the model."""
    resident.put(adapter)
    again = resident.adapter()
    assert all(torch.equal(again.tensors[n], adapter.tensors[n]) for n in adapter.tensors)
    return logits(resident.model, resident.task)


def plain(source: Path, task: Task) -> PreTrainedModel:
    """What transformers makes of a folder, with numbers of its own where it draws any."""
    torch.manual_seed(1234)
    more = {} if task == "causal-lm" else {"num_labels": len(LABELS)}
    model: PreTrainedModel = MAKERS[task].from_pretrained(source, **more)
    return model


def peft_alone(folder: Path, source: Path, task: Task) -> Any:
    """What PEFT makes of an adapter's folder when it is told nothing else; of one for images, for
    which it has no class, what it makes of the base and the folder."""
    torch.manual_seed(4321)
    if task == "causal-lm":
        return AutoPeftModelForCausalLM.from_pretrained(folder)
    numbers = json.loads((folder / LABELS_FILE).read_text())["label2id"]
    names = {number: name for name, number in numbers.items()}
    assert names == dict(enumerate(LABELS))
    if task == "image-classification":
        return PeftModel.from_pretrained(plain(source, task), folder)
    return AutoPeftModelForSequenceClassification.from_pretrained(
        folder, label2id=numbers, id2label=names
    )


def step(model: Any, task: Task) -> None:
    """One step's gradients."""
    model.train()
    rows = [families.alone(model, task, row) for row in range(3)]
    if task == "image-classification":  # batch norm needs several
        rows = [{name: torch.cat([row[name] for row in rows]) for name in rows[0]}]
    for row in rows:
        model(**row).loss.backward()


def idle(model: Any) -> set[str]:
    return {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)


@every_case
def test_whoever_loads_what_was_trained_gets_our_logits(
    family: Family, task: Task, base_of: Bases, tmp_path: Path
) -> None:
    """At k = r and at k < r, by PEFT over the base, by PEFT alone, and merged."""
    source = base_of(family)
    resident = resident_of(source, task, family.targets)
    untrained = some(resident)
    full, _ = train(resident, untrained)
    small, _ = train(resident, some(resident, rank=2))
    assert not all(torch.equal(full.tensors[n], untrained.tensors[n]) for n in full.tensors)
    ours = of_adapter(resident, full)
    resident.save(full, tmp_path / "full")
    base = plain(source, task)
    assert (ours - logits(base, task)).abs().max() > 0.01
    tied = families.ties(base)
    close(logits(PeftModel.from_pretrained(base, tmp_path / "full"), task), ours)
    fewer = of_adapter(resident, small)
    resident.save(small, tmp_path / "small")
    close(logits(peft_alone(tmp_path / "small", source, task), task), fewer)
    resident.merge(full, tmp_path / "merged")
    merged = plain(tmp_path / "merged", task)
    close(logits(merged, task), ours)
    assert families.ties(merged) == tied
    if task != "causal-lm":
        assert merged.config.id2label == dict(enumerate(LABELS))


@some_cases
def test_what_is_drawn_is_trained_and_what_is_trained_moves(
    family: Family, task: Task, base_of: Bases
) -> None:
    """Drawn is what differs between two seeds; what has no gradient has none in plain training."""
    source = base_of(family)
    one, other = (resident_of(source, task, family.targets, seed=seed) for seed in (0, 1))
    trained = {id(p) for _, p in one.parameters()}
    twins = dict(other.model.named_parameters())
    for name, parameter in one.model.named_parameters():
        if id(parameter) not in trained and ".original_module." not in name:
            assert torch.equal(parameter, twins[name]), name
    base = plain(source, task)
    outside = families.outside_body(base)
    if task != "causal-lm":
        assert outside
        assert {f"base_model.model.{name}" for name in outside} <= set(one.layout.names)
    assert one.layout.pairs
    step(base, task)
    one.put(some(one))
    step(one.model, task)
    sleeping = idle(base)
    for name, parameter in one.parameters():
        if parameter.grad is None or not parameter.grad.any():
            module = name.removeprefix("base_model.model.").split(".lora_")[0]
            assert sleeping & {module, f"{module}.weight"}, name


@some_cases
def test_a_loss_is_that_of_each_row_alone(family: Family, task: Task, base_of: Bases) -> None:
    """In batches of any size, evaluated and while training, where nothing is dropped."""
    resident = resident_of(base_of(family), task, family.targets)
    adapter, rows = some(resident), families.examples(resident.model, task)
    resident.put(adapter)
    resident.model.eval()
    losses, counts = [], []
    for row in range(3):
        given = families.alone(resident.model, task, row)
        counts.append(given["labels"][:, 1:].numel() if task == "causal-lm" else 1)
        with torch.no_grad():
            losses.append(resident.model(**given).loss.item())
    assert max(losses) - min(losses) > 1e-3  # else nothing would be tested
    expected = sum(map(float.__mul__, losses, map(float, counts))) / sum(counts)
    for batch in (1, 3):
        got = evaluate(resident, adapter, rows, batch=batch, precision="fp32").loss
        assert got == pytest.approx(expected, rel=2e-4), f"batches of {batch}"
    if family.name not in RANDOM:
        assert train(resident, adapter, 1)[1] == pytest.approx(expected, rel=2e-4)


def stored_in_bfloat16(source: Path, folder: Path) -> Path:
    """The base as most are published: rounded, and saying so."""
    shutil.copytree(source, folder)
    for path in folder.glob("*.safetensors"):
        tensors = safetensors.torch.load_file(path)
        half = {n: t.bfloat16() if t.is_floating_point() else t for n, t in tensors.items()}
        safetensors.torch.save_file(half, path, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    return folder


@some_cases
def test_a_base_in_bfloat16(family: Family, task: Task, base_of: Bases, tmp_path: Path) -> None:
    """Its loss is float32's but for rounding, what it trains is float32, and PEFT gives it back."""
    source = stored_in_bfloat16(base_of(family), tmp_path / "base")
    if family.name in EXACT:
        with pytest.raises(FedSieveError, match=r"model\.dtype = 'float32' may do"):
            resident_of(source, task, family.targets, dtype="bfloat16")
        return
    exact, half = (
        resident_of(source, task, family.targets, dtype=each) for each in ("float32", "bfloat16")
    )
    start = some(half)
    expected = evaluate(exact, start, families.examples(exact.model, task), precision="fp32").loss
    trained, loss = train(half, start, 1)
    if family.name not in RANDOM:
        assert loss == pytest.approx(expected, rel=0.1)
    assert {each.dtype for each in trained.tensors.values()} == {torch.float32}
    assert any(not torch.equal(trained.tensors[n], start.tensors[n]) for n in start.tensors)
    assert all(each.isfinite().all() for each in trained.tensors.values())
    half.save(trained, tmp_path / "adapter")
    torch.manual_seed(1)
    more = {} if task == "causal-lm" else {"num_labels": len(LABELS)}
    base = MAKERS[task].from_pretrained(source, dtype=torch.bfloat16, **more)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = logits(PeftModel.from_pretrained(base, tmp_path / "adapter"), task)
        ours = of_adapter(half, trained)
    torch.testing.assert_close(theirs, ours, atol=0.02, rtol=0.02)


@some_cases
@pytest.mark.parametrize("trains", ["all", "head"])
def test_weights_trained_without_lora(
    family: Family, task: Task, trains: Trained, base_of: Bases, tmp_path: Path
) -> None:
    if trains == "head" and task == "causal-lm":
        pytest.skip("most language models' head is their embedding")
    source = base_of(family)
    base = plain(source, task)
    resident = resident_of(source, task, (), trains)
    start = resident.adapter()
    adapter, _ = train(resident, start)
    assert any(not torch.equal(adapter.tensors[n], start.tensors[n]) for n in start.tensors)
    ours = of_adapter(resident, adapter)
    assert families.ties(resident.model) == families.ties(base)
    resident.save(adapter, tmp_path)
    saved = plain(tmp_path, task)
    close(logits(saved, task), ours)
    assert families.ties(saved) == families.ties(base)
    step(base, task)
    step(resident.model, task)
    if family.name not in RANDOM:
        assert {n for n in idle(resident.model) if n in resident.slots} <= idle(base)


@pytest.mark.parametrize(("name", "task", "targets", "message"), REFUSED)
def test_families_that_are_refused(
    name: str, task: Task, targets: Any, message: str, base_of: Bases
) -> None:
    family = next(each for each in FAMILIES if each.name == name)
    with pytest.raises(FedSieveError, match=message) as caught:
        resident_of(base_of(family), task, targets)
    assert "\n" not in str(caught.value)


def test_a_loss_of_routers_is_refused_with_what_to_set(base_of: Bases) -> None:
    family = next(each for each in FAMILIES if each.name == "mixtral")
    routed = {"output_router_logits": True}
    with pytest.raises(FedSieveError, match="set output_router_logits = false"):
        load_base(str(base_of(family)), "causal-lm", key=Key(0), pad_token_id=0, settings=routed)
