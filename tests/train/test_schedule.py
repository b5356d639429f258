"""A learning rate that falls over the rounds: what it is in each, in a run and at a site."""

from pathlib import Path
from typing import Any

import pytest

from fedsieve.run import rundir
from fedsieve.settings import Training, in_round
from tests import runs
from tests.conftest import Tiny


def test_it_falls_by_half_a_cosine_to_the_last_rounds() -> None:
    training = Training(lr=5e-5, last_lr=1e-6)
    rates = [in_round(training, number, 200).lr for number in range(1, 201)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(1e-6)
    assert rates[99] == pytest.approx((5e-5 + 1e-6) / 2)  # half way, and steepest there
    assert 4.99e-5 < rates[0] < 5e-5
    assert rates[98] - rates[99] > 30 * (rates[0] - rates[1])
    # A third of the way a half cosine has gone down by a quarter.
    assert in_round(training, 60, 180).lr == pytest.approx(5e-5 - (5e-5 - 1e-6) / 4)
    assert in_round(Training(lr=0.1), 3, 10).lr == 0.1


RATES: dict[str, dict[str, Any]] = {
    "falling": {"training__lr": 0.04, "training__last_lr": 0.02},
    "steady": {"training__lr": 0.03},
    "other": {"training__lr": 0.04},
}


def test_a_run_trains_with_it(tiny: Tiny, tmp_path: Path) -> None:
    """The first of two rounds has the mean of both rates, and the second the last."""
    losses = []
    for name, rates in RATES.items():
        runs.start(tiny, tmp_path / name, rounds=2, **rates)
        losses.append([row["loss"] for row in runs.lines(tmp_path / name) if row["round"]])
    falling, steady, other = losses
    assert falling[0] == pytest.approx(steady[0], rel=1e-6)
    assert falling[0] != pytest.approx(other[0], rel=1e-6)
    assert falling[1] != pytest.approx(steady[1], rel=1e-6)
    assert "last_lr = 0.02" in (tmp_path / "falling" / rundir.RECIPE).read_text()
