"""A run whose method keeps what single rounds added to the base, and drops it again when that is
more than the whole change, goes on wherever it was stopped.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from fedsieve.algebra.adapter import Layout
from fedsieve.algebra.method import State
from fedsieve.run import runner, state
from tests import kinds, runs
from tests.conftest import Tiny

pytestmark = pytest.mark.usefixtures("no_report")
CASES = [(1, 0.25), (2, 0.25), (3, 0.25), (1, 0.5), (2, 0.5), (3, 0.5), (1, 1.0), (2, 1.0)]
QUICK = {(1, 0.25), (2, 0.5)}


def asked(method: str, cohort: int, ratio: float) -> dict[str, Any]:
    return {
        "method": {"name": method},
        "rounds": 4,
        "cohort": cohort,
        # FedEx-LoRA's clients have all ranks.
        "budgets": [{"ratio": ratio}, {"ratio": 1.0}] if method != "fedex_lora" else [{}],
        "server": {"optimizer": "sgd"},
        "evaluation": {"every": 4},
    }


@pytest.mark.parametrize(("cohort", "ratio"), kinds.quick_of(CASES, QUICK.__contains__))
@pytest.mark.parametrize("method", kinds.some_of(["flora", "florist", "fedex_lora"]))
def test_a_run_goes_on_also_where_a_round_is_dropped_again(
    tiny: Tiny, tmp_path: Path, method: str, cohort: int, ratio: float
) -> None:
    given = asked(method, cohort, ratio)
    whole = runs.start(tiny, tmp_path / "whole", **given)
    for number in (1, 2, 3):
        folder = tmp_path / f"stopped-{number}"
        with pytest.raises(runner.Stopped):
            runs.start(tiny, folder, runs.stop_at(number), **given)
        resumed = runner.resume(folder, runs.quiet)
        assert all(torch.equal(t, resumed.base[name]) for name, t in whole.base.items())


def test_what_is_kept_of_a_round_has_its_tensors_of_any_length() -> None:
    rehearsed = {"a": torch.zeros(1, 8), "b": torch.zeros(8, 1)}
    layout = Layout({}, (), 0, 1.0)
    longer = State(layout, {"fold 7": {"a": torch.ones(5, 8), "b": torch.ones(8, 5)}, "other": {}})
    state._refuse_another_round(longer, "fold 1", rehearsed)
    for odd in ({"a": torch.ones(5, 8)}, {**rehearsed, "b": torch.ones(8)}, {}):
        with pytest.raises(ValueError, match="'fold 7' has other tensors"):
            state._refuse_another_round(State(layout, {"fold 7": odd}), "fold 1", rehearsed)
