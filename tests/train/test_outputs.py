"""A step asks a model for no more outputs than have labels, and waits for the device at no step.

The oracle of the first is the model's own loss over all its outputs.
"""

import traceback
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fedsieve.settings import Training
from fedsieve.tasks import catalogue
from fedsieve.tasks.tokens import IGNORED, Texts
from fedsieve.train.outputs import outputs
from tests import kinds
from tests.conftest import Tiny
from tests.tasks.test_federated import KINDS, quietly
from tests.train import families
from tests.train.families import FAMILIES, TASKS, Family
from tests.train.test_step import CPU, FAST, LANGUAGE, PLAIN, fit, of_family, prepared

SPEAKING = [f for f in FAMILIES for task in f.tasks if catalogue.load(TASKS[task]).picked]


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=() if f.name in FAST else pytest.mark.slow) for f in SPEAKING],
    ids=[f.name for f in SPEAKING],
)
def test_the_places_with_labels_alone_give_the_models_own_loss(
    family: Family, tmp_path: Path
) -> None:
    resident = of_family(tmp_path, family, "causal-lm", rate=0.0)
    examples = families.examples(resident.model, "causal-lm")
    assert isinstance(examples, Texts)
    labels = examples.labels.clone()
    labels[:, :-3] = IGNORED
    examples = examples._replace(labels=labels)
    assert resident.head is not None
    seen: list[int] = []
    hook = resident.head.register_forward_hook(lambda _, __, out: seen.append(out.shape[-2]))
    told, asked = outputs(resident.model, "causal-lm", examples, CPU, head=resident.head)
    hook.remove()
    assert seen == [len(asked)] == [int((labels[:, 1:] != IGNORED).sum())]
    given = {k: v for k, v in examples._asdict().items() if isinstance(v, torch.Tensor)}
    with torch.no_grad():
        own = resident.model(**given)
    loss = torch.nn.functional.cross_entropy(told, asked)
    torch.testing.assert_close(loss, own.loss, atol=1e-5, rtol=1e-4)
    fit(resident, examples, replace(PLAIN, steps=1))
    assert not resident.head._forward_pre_hooks


@quietly
def test_a_model_that_wants_all_places_gets_them(tiny: Tiny) -> None:
    resident, examples = prepared(tiny, LANGUAGE[0])
    plain = fit(replace(resident, head=None), examples, PLAIN)
    got = fit(resident, examples, PLAIN)
    assert got.loss == pytest.approx(plain.loss, rel=1e-6)
    for name, tensor in plain.tensors.items():
        torch.testing.assert_close(got.tensors[name], tensor, atol=1e-6, rtol=1e-5)


class Reads(TorchDispatchMode):
    """Notes where numbers are read out of tensors: a GPU is waited for each time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.places: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            frames = traceback.extract_stack()[:-1]
            own = [f for f in frames if "/torch/" not in f.filename or "/optim/" in f.filename]
            self.places[Path(own[-1].filename).name] += 1
        return func(*args, **(kwargs or {}))


# What lies on the CPU whatever the device: the rows of a batch until they are moved, and the number
# of AdamW's steps. transformers looks whether a batch has padding, once a forward pass.
ELSEWHERE = {"examples.py", "batch.py", "causal_lm.py", "token_classification.py", "optimizer.py"}
NOT_OURS = {"masking_utils.py"}


TRAININGS = [
    PLAIN,
    replace(PLAIN, optimizer="adamw", micro_batch=2),
    replace(PLAIN, precision="bf16", weight_decay=0.1),
]


@pytest.mark.parametrize("training", kinds.some_of(TRAININGS))
@pytest.mark.parametrize("kind", KINDS, ids=[kind.task for kind in KINDS])
@quietly
def test_no_step_waits_for_what_the_device_has_computed(
    tiny: Tiny, kind: Any, training: Training
) -> None:
    resident, examples = prepared(tiny, kind)
    with Reads() as few:
        fit(resident, examples, replace(training, steps=3))
    with Reads() as more:
        fit(resident, examples, replace(training, steps=9))
    each = {place for place in more.places if more.places[place] > few.places[place]}
    assert each <= ELSEWHERE | NOT_OURS
    assert kind.task.startswith("image") or "examples.py" in each  # it would be seen
