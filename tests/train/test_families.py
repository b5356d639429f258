"""Laws over the families of transformers: what is trained is what is saved, whoever loads it.

The oracles are transformers and PEFT alone, in plain code, under random seeds of their own.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from fedsieve.algebra.adapter import Adapter
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import Trained
from fedsieve.errors import FedSieveError
from fedsieve.settings import Lora, Task
from fedsieve.train.model import LABELS as LABELS_FILE
from fedsieve.train.model import ResidentModel, load_base, set_up
from tests.train import families
from tests.train.families import FAMILIES, REFUSED, Family

LABELS = ("cars", "space", "wine")
TASKS: dict[str, Task] = {"c": "classification", "l": "causal-lm"}
CASES = [(family, TASKS[task]) for family in FAMILIES for task in family.tasks]
every_case = pytest.mark.parametrize(
    ("family", "task"), CASES, ids=[f"{family.name}-{task}" for family, task in CASES]
)

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
    targets: tuple[str, ...] | str,
    trains: Trained = "lora",
    seed: int = 0,
) -> ResidentModel:
    classes = LABELS if task == "classification" else ()
    base = load_base(str(source), task, classes, key=Key(seed), pad_token_id=0)
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


def logits(model: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        out: Tensor = model(**families.rows()).logits
    return out


def of_adapter(resident: ResidentModel, adapter: Adapter) -> Tensor:
    """Our logits, after a look at what was put into the model."""
    resident.put(adapter)
    again = resident.adapter()
    assert all(torch.equal(again.tensors[n], adapter.tensors[n]) for n in adapter.tensors)
    return logits(resident.model)


def plain(source: Path, task: Task) -> PreTrainedModel:
    """What transformers makes of a folder, with numbers of its own where it draws any."""
    torch.manual_seed(1234)
    if task == "causal-lm":
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source)
        return model
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=len(LABELS))
    return model


def peft_alone(folder: Path, task: Task) -> Any:
    """What PEFT makes of an adapter's folder when it is told nothing else."""
    torch.manual_seed(4321)
    if task == "causal-lm":
        return AutoPeftModelForCausalLM.from_pretrained(folder)
    numbers = json.loads((folder / LABELS_FILE).read_text())["label2id"]
    names = {number: name for name, number in numbers.items()}
    assert names == dict(enumerate(LABELS))
    return AutoPeftModelForSequenceClassification.from_pretrained(
        folder, label2id=numbers, id2label=names
    )


def train_on(model: Any, task: Task) -> None:
    """One step's gradients."""
    model.train()
    batch = families.rows()
    labels = torch.tensor([0, 1, 2]) if task == "classification" else batch["input_ids"]
    model(**batch, labels=labels).loss.backward()


def idle(model: Any) -> set[str]:
    return {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)


@every_case
def test_whoever_loads_an_adapter_gets_our_logits(
    family: Family, task: Task, base_of: Bases, tmp_path: Path
) -> None:
    source = base_of(family)
    resident = resident_of(source, task, family.targets)
    full, small = some(resident), some(resident, rank=2)
    ours = of_adapter(resident, full)
    resident.save(full, tmp_path / "full")
    base = plain(source, task)
    assert (ours - logits(base)).abs().max() > 0.01
    tied = families.ties(base)
    close(logits(PeftModel.from_pretrained(base, tmp_path / "full")), ours)
    fewer = of_adapter(resident, small)
    resident.save(small, tmp_path / "small")
    close(logits(peft_alone(tmp_path / "small", task)), fewer)
    resident.merge(full, tmp_path / "merged")
    merged = plain(tmp_path / "merged", task)
    close(logits(merged), ours)
    assert families.ties(merged) == tied
    if task == "classification":
        assert merged.config.id2label == dict(enumerate(LABELS))


@every_case
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
    if task == "classification":
        assert outside
        assert {f"base_model.model.{name}" for name in outside} <= set(one.layout.names)
    assert one.layout.pairs
    train_on(base, task)
    one.put(some(one))
    train_on(one.model, task)
    sleeping = idle(base)
    for name, parameter in one.parameters():
        if parameter.grad is None or not parameter.grad.any():
            module = name.removeprefix("base_model.model.").split(".lora_")[0]
            assert sleeping & {module, f"{module}.weight"}, name


@every_case
@pytest.mark.parametrize("trains", ["all", "head"])
def test_weights_trained_without_lora(
    family: Family, task: Task, trains: Trained, base_of: Bases, tmp_path: Path
) -> None:
    if trains == "head" and task == "causal-lm":
        pytest.skip("most language models' head is their embedding")
    source = base_of(family)
    base = plain(source, task)
    resident = resident_of(source, task, (), trains)
    adapter = some(resident)
    ours = of_adapter(resident, adapter)
    assert families.ties(resident.model) == families.ties(base)
    train_on(base, task)
    train_on(resident.model, task)
    assert {n for n in idle(resident.model) if n in resident.slots} <= idle(base)
    resident.save(adapter, tmp_path)
    saved = plain(tmp_path, task)
    close(logits(saved), ours)
    assert families.ties(saved) == families.ties(base)


@pytest.mark.parametrize(("name", "task", "targets", "message"), REFUSED)
def test_families_that_are_refused(
    name: str, task: Task, targets: Any, message: str, base_of: Bases
) -> None:
    family = next(each for each in FAMILIES if each.name == name)
    with pytest.raises(FedSieveError, match=message) as caught:
        resident_of(base_of(family), task, targets)
    assert "\n" not in str(caught.value)
