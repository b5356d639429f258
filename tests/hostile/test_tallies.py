"""What sites say they counted: whatever it is, the server goes on, and takes what rows may give."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedsieve.frame import Frame
from fedsieve.report import shown
from fedsieve.run import rundir
from fedsieve.sites import server
from fedsieve.sites.server import joint_score
from fedsieve.tasks import catalogue
from fedsieve.tasks.tally import Tally
from tests.tasks.test_scores import CASES, counted

CHOICES = {"plain": 3.0, "by_character": 3.0, "right": 2.0, "found": 3.0}
WRITTEN = {"exact": 1.0, "f1": 2.5, "rouge": 2.0, **{f"chrf{n}": 9.0 - n % 3 for n in range(18)}}
ASKED = {"multiple-choice": Tally(4.0, 5, CHOICES), "generation": Tally(4.0, 5, WRITTEN)}
OF_TASKS: dict[str, tuple[Tally, tuple[str, ...]]] = {
    **{case.task: (counted(case, 1000)[0], case.classes) for case in CASES},
    **{task: (tally, ()) for task, tally in ASKED.items()},
}
ODD = (0.0, -0.0, 1.0, -1.0, 0.5, 1e15, 1e30, 1e31, 1e154, 1e200, 1.7e308, -1e200, 5e-324, 2.0**53)


def frame(counted: Any, sums: Any, loss: Any = 1.0) -> Frame:
    return Frame({"ok": True, "counted": counted, "loss_sum": loss}, json.dumps(sums).encode())


@pytest.mark.parametrize("task", sorted(catalogue.names()))
def test_no_sums_of_some_sites_stop_a_server(task: str) -> None:
    tally, classes = OF_TASKS[task]
    draw = np.random.default_rng(0)
    taken = 0
    for number in range(150):
        answers = {}
        for site in range(int(draw.integers(1, 4))):
            sums = dict(tally.sums)
            share = draw.choice([0.05, 1.0])
            one = float(draw.choice(ODD))  # sums that agree with each other pass more checks
            for name in sums:
                if draw.random() < share:
                    sums[name] = one if number % 2 else float(draw.choice(ODD))
            loss = draw.choice([0.0, 1.0, 1e15, 1e16])
            rows = int(draw.choice([0, 1, 2, tally.counted, 10**15]))
            answers[f"s{site}"] = frame(rows, sums, float(loss))
        said: list[str] = []
        found = joint_score(answers, task, classes, said.append)
        assert not any("no scores can be made" in line for line in said), (answers, said)
        left_out = {line.split(":")[0].removeprefix("site ") for line in said}
        assert left_out <= set(answers)
        if found is not None:
            taken += 1
            sound = {n: v for n, v in found.metrics.items() if n != "perplexity"}
            assert all(map(math.isfinite, sound.values())), (answers, found)
            shares = [v for n, v in sound.items() if n not in ("mse", "chrf")]
            assert all(-1 - 1e-9 <= value <= 1 + 1e-9 for value in shares), (answers, found)
    assert taken


@pytest.mark.parametrize("task", sorted(catalogue.names()))
def test_one_odd_sum_is_left_out_by_name_and_the_others_count(task: str) -> None:
    tally, classes = OF_TASKS[task]
    good = frame(tally.counted, dict(tally.sums), tally.loss)
    alone = joint_score({"good": good}, task, classes, print)
    odd: Any
    names = sorted(tally.sums)[:4]
    for odd in (1e31, -1e200, float("inf"), float("nan"), None, [1.0]):
        for name in names:
            said: list[str] = []
            bad = frame(tally.counted, {**tally.sums, name: odd})
            found = joint_score({"bad": bad, "good": good}, task, classes, said.append)
            assert found == alone
            assert [line.split(":")[0] for line in said] == ["site bad"]


def test_what_sites_count_together_can_be_read_back(tmp_path: Path) -> None:
    """The server's own report would refuse its file, and no site would get the last adapter."""
    most = int(server.MOST_COUNTED)
    many = {f"s{n}": frame(most, {"0 as 0": most}) for n in range(200)}
    assert 10_000 * most <= shown.MOST
    odd = {f"odd{n}": frame(10**15, {"0 as 0": 10**15}) for n in range(10)}
    said: list[str] = []
    found = joint_score({**odd, **many}, "classification", ("x", "y"), said.append)
    assert found == joint_score(many, "classification", ("x", "y"), print)
    assert {line.split(":")[0] for line in said} == {f"site {name}" for name in odd}
    assert found is not None
    rundir.keep_details(tmp_path, 1, [found.details])
    kept = shown.load(tmp_path)
    assert kept is not None
    assert kept.classes[0].rows == 200 * most


def regression(n: int, loss: float, **sums: float) -> Frame:
    return frame(n, {"x": 0.0, "y": 0.0, "xx": 0.0, "yy": 0.0, "xy": 0.0, **sums}, loss)


def changed(task: str, counted: int | None = None, **sums: float) -> Frame:
    """The answer of `OF_TASKS` with other sums; a name's beginning stands for all of them."""
    tally, _ = OF_TASKS[task]
    own = dict(tally.sums)
    for beginning, value in sums.items():
        names = [name for name in own if re.fullmatch(rf"{beginning}( .*|\d+)?", name)]
        assert names
        own |= dict.fromkeys(names, value)
    return frame(tally.counted if counted is None else counted, own, tally.loss)


CHRF_ALONE = {**dict.fromkeys(WRITTEN, 0.0), "chrf0": 1e30, "chrf1": 1e30}
NOT_OF_ROWS: dict[str, tuple[str, Frame]] = {
    "half a right token": ("causal-lm", changed("causal-lm", right=0.5)),
    "letters of no rows": ("generation", frame(0, CHRF_ALONE, 0.0)),
    "letters without end": ("generation", changed("generation", chrf=1e30)),
    "half an exact answer": ("generation", changed("generation", exact=0.5)),
    "exact, and no word in common": ("generation", changed("generation", exact=3.0, f1=0.0)),
    "part of a row": ("multi-label", changed("multi-label", right=0.3)),
    "part of an image": ("image-multi-label", changed("image-multi-label", missed=0.3)),
    "half an entity": ("token-classification", changed("token-classification", there=0.5)),
    "an entity of each kind a token": (
        "token-classification",
        changed("token-classification", told=float(OF_TASKS["token-classification"][0].counted)),
    ),
}


@pytest.mark.parametrize("lie", NOT_OF_ROWS)
def test_counts_are_of_rows(lie: str) -> None:
    task, bad = NOT_OF_ROWS[lie]
    tally, classes = OF_TASKS[task]
    good = frame(tally.counted, dict(tally.sums), tally.loss)
    said: list[str] = []
    found = joint_score({"bad": bad, "good": good}, task, classes, said.append)
    assert found == joint_score({"good": good}, task, classes, print)
    assert [line.split(":")[0] for line in said] == ["site bad"]


LIES = {
    "large numbers, nearly equal": regression(
        100, 4e18, x=1e10, y=-1e10, xx=1e18 * (1 + 1e-10), yy=1e18 * (1 + 1e-10), xy=1e18
    ),
    "one row that varies": regression(1, 4.0, x=1, y=1, xx=1 + 1e-15, yy=1 + 1e-15, xy=-1),
    "a correlation above one": regression(100, 0.0, xx=1.0, yy=1.0, xy=1.5),
    "no loss where there is one": regression(100, 0.0, xx=9.0, yy=9.0, xy=0.0),
    "a loss where there is none": regression(100, 9.0, xx=9.0, yy=9.0, xy=9.0),
    "labels beyond the largest": regression(2, 1e15, yy=1e15),
    "sums of no rows": regression(0, 0.0, xx=1.0),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_correlation_is_of_sums_that_rows_can_have(lie: str) -> None:
    tally, _ = OF_TASKS["regression"]
    good = frame(tally.counted, dict(tally.sums), tally.loss)
    said: list[str] = []
    found = joint_score({"bad": LIES[lie], "good": good}, "regression", (), said.append)
    assert found == joint_score({"good": good}, "regression", (), print)
    assert [line.split(":")[0] for line in said] == ["site bad"]


@pytest.mark.parametrize("middle", [0.0, 1.0, 2000.0, -9e5])
@pytest.mark.parametrize("spread", [0.0, 1e-3, 1.0, 1e4])
@pytest.mark.parametrize("rows", [1, 2, 300])
def test_what_rows_gave_is_taken(middle: float, spread: float, rows: int) -> None:
    draw = np.random.default_rng(rows)
    labels = torch.tensor(middle + spread * draw.standard_normal(rows), dtype=torch.float32)
    logits = labels + torch.tensor(spread * draw.standard_normal(rows), dtype=torch.float32)
    tally = catalogue.load("regression").judge(logits[:, None], labels, ())
    said: list[str] = []
    answer = frame(tally.counted, dict(tally.sums), tally.loss)
    found = joint_score({"a": answer, "b": answer}, "regression", (), said.append)
    assert not said
    assert found is not None
    assert -1 <= found.metrics["pearson"] <= 1
