"""FedProx's term: its gradient by finite differences and in closed form, what it holds near, and
that every way of training has it. (As a plain loop of PEFT's: test_train.py; client by client and
at once: test_cohort.py; over sites: test_worker.py; what does not move: test_moves.py.)
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsieve.errors import FedSieveError
from fedsieve.run import runner
from fedsieve.settings import Training
from fedsieve.train.proximal import hold
from tests import runs
from tests.conftest import Tiny
from tests.train.test_train import CALM, KEY, classified, fit, resident_of, some

ONCE = Training(lr=0.2, momentum=0.0, batch=32, steps=1, precision="fp32")  # all rows in a batch


def test_the_gradient_is_that_of_the_term() -> None:
    draws = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 4), (2, 5))  # of two clients side by side
    began = [torch.randn(shape, generator=draws, dtype=torch.float64) for shape in shapes]
    now = [torch.randn(shape, generator=draws, dtype=torch.float64) for shape in shapes]
    for x in now:
        x.grad = torch.ones_like(x)
    terms = hold(0.7, now, began, clients=2)
    for client in range(2):
        alone = [x[client].clone() for x in now], [own[client] for own in began]
        assert float(hold(0.7, *alone)) == pytest.approx(float(terms[client]), rel=1e-12)
    far = sum(float(((x - own) ** 2).sum()) for x, own in zip(now, began, strict=True))
    assert float(terms.sum()) == pytest.approx(0.35 * far, rel=1e-12)
    for x in now:
        assert x.grad is not None
        for place in range(x.numel()):
            ends = []
            for step in (1e-4, -1e-4):
                moved = x.clone()
                moved.view(-1)[place] += step
                beside = [moved if each is x else each.clone() for each in now]
                ends.append(float(hold(0.7, beside, began, clients=2).sum()))
            slope = (ends[0] - ends[1]) / 2e-4
            assert float(x.grad.view(-1)[place]) - 1 == pytest.approx(slope, abs=1e-8)


def far(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return float(torch.cat([(t - other[n]).flatten() for n, t in one.items()]).norm())


def test_the_second_step_is_drawn_back_along_the_first(tiny: Tiny) -> None:
    """x_2 with mu is x_2 without, less lr mu (x_1 - x_0); the loss that is told has the term."""
    resident = resident_of(tiny, settings=CALM)
    given, mu = some(resident), 1.5
    one = fit(resident, given, classified(tiny), replace(ONCE, proximal=mu), KEY)
    assert far(one.tensors, fit(resident, given, classified(tiny), ONCE, KEY).tensors) == 0
    two = replace(ONCE, steps=2)
    free = fit(resident, given, classified(tiny), two, KEY)
    held = fit(resident, given, classified(tiny), replace(two, proximal=mu), KEY)
    for name, tensor in held.tensors.items():
        first = one.tensors[name] - given.tensors[name].float()
        expected = free.tensors[name] - ONCE.lr * mu * first
        torch.testing.assert_close(tensor, expected, atol=1e-6, rtol=1e-5)
    term = mu / 2 * far(one.tensors, given.tensors) ** 2
    assert held.loss - free.loss == pytest.approx(term / 2, rel=1e-3)


@pytest.mark.parametrize("optimizer", [pytest.param("sgd", marks=pytest.mark.slow), "adamw"])
def test_the_larger_mu_the_nearer_a_client_stays(tiny: Tiny, optimizer: str) -> None:
    resident = resident_of(tiny, settings=CALM)
    given = some(resident)
    training = Training(
        optimizer=optimizer,  # type: ignore[arg-type]
        lr=1e-3, momentum=0.0, batch=32, steps=200, precision="fp32",
    )  # fmt: skip
    away = [
        far(
            fit(resident, given, classified(tiny), replace(training, proximal=mu), KEY).tensors,
            given.tensors,
        )
        for mu in (0.0, 1.0, 30.0, 900.0)
    ]
    assert all(far < near for far, near in zip(away[1:], away[:-1], strict=True))
    assert away[-1] < 0.1 * away[0]


def test_what_it_keeps_is_counted(tiny: Tiny) -> None:
    resident = resident_of(tiny, settings=CALM)
    given = some(resident)
    numbers = sum(t.numel() for t in given.tensors.values())
    plain = fit(resident, given, classified(tiny), ONCE, KEY)
    held = fit(resident, given, classified(tiny), replace(ONCE, proximal=0.1), KEY)
    assert held.memory == plain.memory + 4 * numbers


@pytest.mark.slow
def test_workers_and_a_run_that_is_resumed_have_it_too(tiny: Tiny, tmp_path: Path) -> None:
    given: dict[str, Any] = {"training__steps": 3, "training__proximal": 2.0}
    plain = runs.start(tiny, tmp_path / "plain", training__steps=3)
    whole = runs.start(tiny, tmp_path / "whole", **given)
    engine = {"kind": "processes", "workers": 1, "threads": 1}
    apart = runs.start(tiny, tmp_path / "apart", engine=engine, **given)
    with pytest.raises(runner.Stopped):
        runs.start(tiny, tmp_path / "stopped", runs.stop_at(1), **given)
    resumed = runner.resume(tmp_path / "stopped", runs.quiet)
    assert far(whole.tensors, plain.tensors) > 0
    for other in (apart, resumed):
        assert all(torch.equal(t, other.tensors[n]) for n, t in whole.tensors.items())


def test_a_function_of_ones_own_does_not_know_it() -> None:
    with pytest.raises(FedSieveError, match=r"proximal: the function 'mine:train' trains in its"):
        Training(function="mine:train", proximal=0.1)
