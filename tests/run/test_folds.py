"""A run whose method keeps what single rounds added to the base, and drops it again when that is
more than the whole change, goes on wherever it was stopped.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from fedsieve.errors import FedSieveError
from fedsieve.recipe import read as recipe
from fedsieve.recipe.experiment import from_recipe
from fedsieve.run import checkpoint, rundir, runner
from tests import runs
from tests.conftest import Tiny

pytestmark = pytest.mark.usefixtures("no_report")
CASES = [(1, 0.25), (2, 0.25), (3, 0.25), (1, 0.5), (2, 0.5), (3, 0.5), (1, 1.0), (2, 1.0)]


def asked(method: str, cohort: int, ratio: float) -> dict[str, Any]:
    return {
        "method": {"name": method},
        "rounds": 4,
        "cohort": cohort,
        # FedEx-LoRA's clients have all ranks.
        "budgets": [{"ratio": ratio}, {"ratio": 1.0}] if method == "flora" else [{}],
        "server": {"optimizer": "sgd"},
        "evaluation": {"every": 4},
    }


@pytest.mark.parametrize(("cohort", "ratio"), CASES)
@pytest.mark.parametrize("method", ["flora", "fedex_lora"])
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


def test_a_round_of_another_method_is_refused_as_ever(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    given = asked("fedit", 2, 1.0)
    with pytest.raises(runner.Stopped):
        runs.start(tiny, folder, runs.stop_at(2), **given)
    layout = from_recipe(recipe.check(tiny.table(**given))).resident.layout
    place = rundir.place(folder, rundir.CHECKPOINTS)
    snapshot = checkpoint.load(place, layout)
    state = snapshot.progress.state
    odd = state._replace(trees={**state.trees, "fold 1": {"x": torch.zeros(3)}})
    checkpoint.save(place, snapshot._replace(progress=snapshot.progress._replace(state=odd)))
    with pytest.raises(FedSieveError, match="not what the recipe's method and server keep"):
        runner.resume(folder, runs.quiet)
