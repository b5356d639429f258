"""Runs that earlier versions wrote are gone on with, or refused by name.

`written-by-0.1` is a run of FLASC with error feedback and FedAdam on the server, stopped after
round 3 of 5 by fedsieve 0.1.0, `written-by-0.1-with-adam` the same with Adam; `{tiny}` stands for
where the tests' tiny model and rows are.
"""

import shutil
from pathlib import Path

import pytest
import torch

from fedsieve import report
from fedsieve.errors import FedSieveError
from fedsieve.recipe import read as recipes
from fedsieve.report import read
from fedsieve.run import rundir, runner
from tests import runs
from tests.conftest import Tiny

HERE = Path(__file__).parent


@pytest.fixture
def old(tmp_path: Path, tiny: Tiny) -> Path:
    return copied("written-by-0.1", tmp_path / "old", tiny)


def copied(name: str, folder: Path, tiny: Tiny) -> Path:
    shutil.copytree(HERE / name, folder)
    recipe = folder / rundir.RECIPE
    text = recipe.read_text(encoding="utf-8").replace("{tiny}", str(tiny.bert.parent))
    recipe.write_text(text, encoding="utf-8")
    return folder


def test_a_run_of_0_1_is_gone_on_with_to_the_same_end(
    old: Path, tmp_path: Path, no_report: None
) -> None:
    """Near, not equal: another processor may round otherwise than the one that wrote it."""
    given = recipes.load(str(old / rundir.RECIPE))
    whole = runner.start(given, tmp_path / "whole", runs.quiet)
    before = runs.lines(old)
    resumed = runner.resume(old, runs.quiet)
    assert runs.lines(old)[:4] == before
    assert [line["round"] for line in runs.lines(old)] == [0, 1, 2, 3, 4, 5]
    size = {name: float(tensor.abs().max()) for name, tensor in whole.tensors.items()}
    for name, tensor in resumed.tensors.items():
        torch.testing.assert_close(tensor, whole.tensors[name], rtol=0, atol=0.02 * size[name])
    told = [row.down_kept != read.UNTOLD for row in report.load(old).rounds]
    assert told == [False, False, False, True, True]  # 0.1 did not count what masks keep


def test_a_run_of_0_1_is_reported(old: Path) -> None:
    written = report.write([old], old / rundir.REPORT)
    assert "flasc" in written[0].read_text(encoding="utf-8")


def test_one_of_adam_is_refused_by_name_and_can_be_exported(tmp_path: Path, tiny: Tiny) -> None:
    """It counted the steps of all tensors together, which the rounds to come could not mend."""
    folder = copied("written-by-0.1-with-adam", tmp_path / "adam", tiny)
    with pytest.raises(FedSieveError, match="one count of Adam's steps"):
        runner.resume(folder, runs.quiet)
    assert runner.export(folder, tmp_path / "adapter") == 3
