"""What a step is worked out to take, against what torch's allocator really gives out."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from fedsieve.algebra.budget import Budget
from fedsieve.algebra.cores import Cores
from fedsieve.algebra.keys import Key
from fedsieve.costs.memory import Base, Needs, of_evaluation, of_model, of_step, packed_bytes
from fedsieve.settings import Lora, Training
from fedsieve.tasks.tokens import Texts
from fedsieve.train.model import ResidentModel, load_base, set_up, shape_of
from fedsieve.train.step import backward, checkpointed
from tests import kinds
from tests.conftest import LABELS, Command, Tiny

META, CPU = torch.device("meta"), torch.device("cpu")
ROWS, LENGTH = 24, 20
TRAINING = Training(batch=ROWS, precision="fp32")
KINDS = {"classification": ("bert", LABELS), "causal-lm": ("gpt2", ())}


def both(tiny: Tiny, task: str, dtype: Any, trains: Any) -> tuple[ResidentModel, ResidentModel]:
    """The same model with numbers, and of shapes alone."""
    name, classes = KINDS[task]
    source = str(getattr(tiny, name))
    lora = Lora(rank=4, targets="all-linear")
    base = load_base(source, task, classes, key=Key(0), dtype=dtype, pad_token_id=0)
    real = set_up(base, task, lora, trains, key=Key(0), device=CPU)
    shape = shape_of(source, task, max(1, len(classes)))
    return real, set_up(shape, task, lora, trains, key=Key(0), device=META)


def allocated(work: Any) -> int:
    """The most that the CPU's allocator has given out at a time while something ran."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
    events: Any = profile.profiler
    each = [e for e in events.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(each, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


CASES = [
    ("classification", "lora", "float32", {}),
    ("classification", "lora", "bfloat16", {}),
    ("classification", "all", "float32", {}),
    ("classification", "head", "float32", {}),
    ("classification", Cores(), "float32", {}),
    ("classification", Cores(2, gains=True), "bfloat16", {}),
    ("classification", "lora", "float32", {"micro_batch": 8}),
    ("classification", "lora", "float32", {"checkpointing": True}),
    ("causal-lm", "lora", "float32", {}),
    ("causal-lm", "lora", "float32", {"checkpointing": True, "micro_batch": 7}),
]


@pytest.mark.parametrize(("task", "trains", "dtype", "changes"), kinds.some_of(CASES))
def test_a_step_takes_what_was_worked_out(
    tiny: Tiny, task: str, trains: Any, dtype: str, changes: dict[str, Any]
) -> None:
    training = replace(TRAINING, **changes)
    real, shape = both(tiny, task, dtype, trains)
    ids = torch.full((ROWS, LENGTH), 7)
    labels = ids[:, 0] % 3 if task == "classification" else ids
    batch = Texts(ids, torch.ones_like(ids), labels)
    real.model.train()
    half = dtype != "float32"

    def step() -> None:
        precise = torch.autocast("cpu", torch.bfloat16, enabled=half)
        with checkpointed(real.model, training.checkpointing):
            backward(real.model, task, batch, CPU, rows=training.micro_batch, precise=precise)
        real.model.zero_grad(set_to_none=True)

    step()  # what is made once is there
    kind = getattr(torch, dtype)
    found = of_step(shape, training, ROWS, LENGTH, dtype=kind)
    assert found.peak == pytest.approx(allocated(step), rel=0.1)
    assert 0 < found.kept <= found.peak
    real.model.eval()
    if dtype == "float32" and not changes:
        again = of_step(shape, training, ROWS, LENGTH, dtype=kind)
        assert again == found  # and the model of shapes is as it was
        with torch.no_grad():
            took = allocated(lambda: real.model(input_ids=ids, attention_mask=batch.attention_mask))
        assert of_evaluation(shape, ROWS, LENGTH) == pytest.approx(took, rel=0.25)


@pytest.mark.parametrize("double", [False, True])
def test_bytes_of_nf4_are_those_of_bitsandbytes(double: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(96, 160)
    packed, state = functional.quantize_4bit(
        weight, quant_type="nf4", blocksize=64, compress_statistics=double
    )
    tensors = [packed, state.absmax, state.code]
    if double:
        tensors += [state.offset, state.state2.absmax, state.state2.code]
    expected = sum(t.nbytes for t in tensors)
    assert packed_bytes(weight.shape, Base(quantised="nf4", double=double)) == expected


def needs(
    tiny: Tiny, held: Base | None = None, only: tuple[str, ...] = ("fedit",), **changes: Any
) -> dict[str, Needs]:
    found = of_model(
        str(tiny.bert), 4, ("query", "value"), 3, Budget(0.5, 0.5, 0.5),
        replace(TRAINING, **changes), LENGTH, held or Base(), only,
    )  # fmt: skip
    return {name: each for name, each in found if isinstance(each, Needs)}


def test_what_less_is_asked_of_takes_less(tiny: Tiny) -> None:
    plain = needs(tiny, only=("fedit", "ffa_lora", "fslora", "full"))
    assert plain["full"].base < plain["fedit"].base / 10
    assert plain["fslora"].trained < plain["fedit"].trained
    assert plain["ffa_lora"].gradients < plain["ffa_lora"].trained
    adam = needs(tiny, optimizer="adamw")
    assert adam["fedit"].optimizer == 2 * plain["fedit"].optimizer
    for each in plain.values():
        assert each.peak >= each.base + each.trained + each.optimizer + each.own
    for changes in ({"micro_batch": 4}, {"checkpointing": True}):
        assert needs(tiny, **changes)["fedit"].activations < 0.7 * plain["fedit"].activations
    sizes = [needs(tiny, Base(quantised=form))["fedit"].base for form in ("none", "int8", "nf4")]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3


def test_on_the_command_line(command: Command, tiny: Tiny) -> None:
    asked = ("methods", "--model", tiny.bert, "--classes", "3", "--rank", "4", "--memory",
             "--targets", "query,value", "--batch", "4", "--length", "16")  # fmt: skip
    ran = command(*asked, "--only", "fedit,full", "--quantization", "nf4")
    assert ran.code == 0
    assert [line.split()[0] for line in ran.out.splitlines()[-3:]] == ["method", "fedit", "full"]
    for wrong, message in (
        (("--only", "fedlt"), "there is no method 'fedlt' (did you mean 'fedit'"),
        (("--dtype", "float8"), "--dtype 'float8': it must be one of float32"),
        (("--quantization", "nf3"), "it must be one of none, int8, nf4"),
    ):
        ran = command(*asked, *wrong)
        assert ran.code == 2
        assert message in " ".join(ran.err.split())
