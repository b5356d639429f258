"""Every method on a GPU, where there is one: the same bits again, and the CPU's result.

Dropout is off and precision is fp32 where the two devices are compared: their random streams
differ, and so do their roundings.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from fedsieve import methods
from fedsieve.run import rundir, runner
from tests import runs
from tests.conftest import Tiny
from tests.engine.test_methods import changes

pytestmark = [
    pytest.mark.usefixtures("no_report"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}


def given(name: str, device: str, **more: Any) -> dict[str, Any]:
    return changes(name, rounds=3, server={"optimizer": "sgd"}, device=device, **more)


@pytest.mark.parametrize("name", methods.names())
def test_a_run_on_a_gpu_ends_where_the_cpus_does(tiny: Tiny, tmp_path: Path, name: str) -> None:
    still = {
        "model__settings": STILL,
        "lora__dropout": 0.0,
        "training__precision": "fp32",
        # AdamW moves by the sign of a gradient that is nearly zero, and that is rounding's to say.
        "training__optimizer": "sgd",
        "training__lr": 0.1,
    }
    ours = runs.start(tiny, tmp_path / "gpu", **given(name, "cuda", **still))
    cpu = runs.start(tiny, tmp_path / "cpu", **given(name, "cpu", **still))
    for kind, tree, other in (
        ("tensors", ours.tensors, cpu.tensors),
        ("base", ours.base, cpu.base),
    ):
        assert tree.keys() == other.keys(), kind
        for key, tensor in tree.items():
            away = float((tensor - other[key]).norm())
            assert away <= 1e-3 * float(other[key].norm()) + 1e-6, (kind, key)
    last, theirs = runs.lines(tmp_path / "gpu")[-1], runs.lines(tmp_path / "cpu")[-1]
    assert last["eval_loss"] == pytest.approx(theirs["eval_loss"], abs=1e-3)


@pytest.mark.parametrize("name", ["fslora_flasc", "flora", "hetlora", "fedsa_lora"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_on_a_gpu_repeats_itself_also_when_stopped(
    tiny: Tiny, tmp_path: Path, name: str, precision: str
) -> None:
    """With dropout on: its stream on the device follows from the client's key."""
    asked = given(name, "cuda", training__precision=precision)
    whole = runs.start(tiny, tmp_path / "whole", **asked)
    with pytest.raises(runner.Stopped):
        runs.start(tiny, tmp_path / "stopped", runs.stop_at(1), **asked)
    again = runner.resume(tmp_path / "stopped", runs.quiet)
    assert all(torch.equal(tensor, whole.tensors[n]) for n, tensor in again.tensors.items())
    for log in (rundir.METRICS, rundir.CLIENTS):
        assert runs.untimed(tmp_path / "stopped", log) == runs.untimed(tmp_path / "whole", log)
