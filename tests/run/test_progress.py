"""What is said before a run begins, in sentences that a person would say."""

from pathlib import Path
from typing import Any

import pytest

from fedsieve.recipe import read as recipes
from fedsieve.report.read import Round
from fedsieve.run import progress
from fedsieve.run.progress import lines_of_plan
from tests.conftest import Tiny

COLUMN = {"kind": "column", "column": "who"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "4 rounds, 3 of 12 clients a round, "),
        ({"rounds": 1}, "1 round, 3 of 12 clients a round, "),
        (
            {"partition": {"kind": "iid", "clients": 1}, "cohort": 1},
            "4 rounds, 1 of 1 client a round, ",
        ),
        ({"sampling__kind": "all"}, "4 rounds, all of 12 clients a round, "),
        ({"sampling__kind": "poisson"}, "4 rounds, about 3 of 12 clients a round, "),
        ({"partition": COLUMN}, "4 rounds, 3 clients of column 'who' a round, "),
        (
            {"partition": COLUMN, "sampling__kind": "all", "rounds": 1},
            "1 round, all clients of column 'who' a round, ",
        ),
    ],
)
def test_the_plan_is_a_sentence(tiny: Tiny, changes: dict[str, Any], said: str) -> None:
    plan = lines_of_plan(recipes.parse(tiny.table(**changes)), Path("out"))
    assert plan[1].startswith(said)


@pytest.mark.parametrize(
    ("scores", "rising"),
    [
        ((0.1, 0.2, 0.3), True),
        ((0.1, 0.5, 0.505), False),  # by next to nothing of the whole rise
        ((0.1, 0.6, 0.5), False),
        ((0.1, 0.5, 0.3, 0.5), False),  # it was there before
        ((0.1, 0.2), False),  # nothing is known yet
        ((0.3, 0.3, 0.3), False),
    ],
)
def test_a_score_that_rises_to_the_end_is_told(scores: tuple[float, ...], rising: bool) -> None:
    rounds = [
        Round(number, 0, 0, 0, None, 0.0, 0.0, {"accuracy": score}, None, None, 0)
        for number, score in enumerate(scores)
    ]
    assert progress.rising(rounds) is rising
