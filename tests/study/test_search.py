"""`fedsieve search`: rank against density at equal bytes, on validation rows, resumable."""

import json
import shutil
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fedsieve.errors import FedSieveError
from fedsieve.recipe import read as recipes
from fedsieve.run import rundir
from fedsieve.study import compare, search
from fedsieve.study.jobs import Job
from fedsieve.study.parts import DIVERGED
from tests import kinds, runs
from tests.conftest import Command, Tiny
from tests.study.test_compare import CHANGES, change, logs, own_copies

FLASC: dict[str, Any] = {
    "rounds": 8,
    "lora__rank": 1,
    "lora__alpha": 2.0,
    "method": {"name": "flasc", "head": "whole"},
    "budgets": [{"down": 0.25, "up": 0.125}, {"share": 2.0, "down": 0.125, "up": 0.25}],
    "data__test": "/no/such/file.csv",  # never looked at
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Reports take longer than the runs; what they were asked to show is kept."""
    kept: list[dict[str, Any]] = []

    def write(_: Any, out: Path, **given: Any) -> list[Path]:
        kept.append(given)
        out.write_bytes(b"")  # without one, a run has not ended
        return [out]

    monkeypatch.setattr("fedsieve.report.write", write)
    return kept


Scores = Mapping[tuple[int, float], float]


def pretend(monkeypatch: pytest.MonkeyPatch, scores: Scores) -> None:
    """Let trials reach given scores, by rank and density: the decisions are what is tested."""

    def score(folder: Path) -> float:
        assert folder.name.startswith("seed-")
        _, rank, _, density = folder.parent.name.split("-")
        return scores[int(rank), float(density)]

    monkeypatch.setattr(compare, "_score", score)


def path_of(out: Path) -> list[tuple[int, float, str]]:
    told = json.loads((out / "search.json").read_text())
    return [(t["rank"], t["density"], t["verdict"]) for t in told["trials"]]


def test_a_search_from_end_to_end(
    tiny: Tiny,
    tmp_path: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    asked: list[dict[str, Any]],
) -> None:
    pretend(
        monkeypatch,
        {(1, 0.25): 0.3, (1, 0.5): 0.4, (2, 0.25): 0.5, (2, 0.5): 0.6, (4, 0.25): 0.55}
        | {(2, 1.0): 0.6, (4, 0.5): 0.1},
    )
    path, out = tiny.write(tmp_path / "tiny.toml", **FLASC), tmp_path / "out"
    arguments: list[str | Path] = ["search", path, "--budget-mb", "1", "--out", out]
    # Stopped in the middle of the third trial, and called again.
    calls = iter(range(10_000))

    def stop(key: Any, training: Any) -> Any:
        if next(calls) == 60:
            raise KeyboardInterrupt
        return training

    with monkeypatch.context() as patch:
        runs.before_fit(patch, stop)
        ran = command(*arguments)
    assert ran.code == 130
    assert "the same command goes on from here" in ran.err
    before = logs(out)
    ran = command(*arguments)
    assert ran.code == 0
    # Of densities as low as these, and nothing else is.
    assert all("the masks let nothing of B pass" in line for line in ran.err.splitlines())
    assert path_of(out) == [
        (1, 0.25, "start"),
        (1, 0.5, "helps less than the other step"),
        (2, 0.25, "kept"),
        (2, 0.5, "kept"),
        (4, 0.25, "helps less than the other step"),
        (2, 1.0, "does not help"),  # as good as before is not better
        (4, 0.5, "does not help"),
    ]
    assert "ended because neither a higher rank nor a higher density helps" in ran.out
    finished = [log for log in before if "rank-1-density-0.25" in log]
    assert len(finished) == 4  # the pilot and the trial
    assert all(Path(log).read_bytes() == before[log] for log in finished)

    # Equal bytes: no trial is more than half a round (and what rounds differ by) from the first.
    trials = json.loads((out / "search.json").read_text())["trials"]
    for trial in trials:
        per_round = trial["sent"] / trial["rounds"]
        assert abs(trial["sent"] - trials[0]["sent"]) < 0.75 * per_round, trial
    assert trials[0]["rounds"] > trials[2]["rounds"] > trials[5]["rounds"]

    # Every run is on the validation rows; the scale alpha / r and the clients' proportions stay.
    for file in out.glob(f"*/*/{rundir.RECIPE}"):
        table = tomllib.loads(file.read_text())
        assert table["evaluation"]["on"] == "validation"
        assert table["lora"]["alpha"] == 2 * table["lora"]["rank"]
        one, two = table["budgets"]
        assert (one["down"], one["up"]) == (two["up"], two["down"]) == (2 * one["up"], one["up"])

    # The best is a recipe, evaluated as the first one was.
    best = recipes.load(str(out / "best.toml"))
    assert (best.lora.rank, best.lora.alpha, best.rounds) == (2, 4.0, trials[3]["rounds"])
    assert isinstance(best.budgets, tuple)
    assert [(tier.down, tier.up) for tier in best.budgets] == [(0.5, 0.25), (0.25, 0.5)]
    assert best.evaluation.on == "test"
    assert best.data.validation == 0.1

    # All trials are in one report, and the same command again runs nothing.
    groups = asked[-1]["groups"]
    assert list(groups)[:2] == ["rank-1-density-0.25", "rank-1-density-0.5"]
    assert len(groups) == 7
    before = logs(out)
    assert command(*arguments).code == 0
    assert logs(out) == before


def test_the_limits_and_the_budget_end_it(
    tiny: Tiny,
    tmp_path: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    asked: list[dict[str, Any]],
) -> None:
    pretend(monkeypatch, {(1, 0.5): 0.1, (1, 1.0): 0.3, (2, 0.5): 0.2, (2, 1.0): 0.4})
    path, out = tiny.write(tmp_path / "tiny.toml", **FLASC), tmp_path / "out"
    begin: list[str | Path] = ["search", path, "--out", out, "rounds=4"]
    begin += ["--density", "0.5", "--max-rank", "2"]
    ran = command(*begin, "--budget-mb", "0.001")
    assert ran.code == 2
    assert "the first trial needs about" in ran.err
    assert "raise --budget-mb or lower rounds" in ran.err
    ran = command(*begin, "--budget-mb", "0.02")
    assert ran.code == 0
    assert [trial[:2] for trial in path_of(out)] == [(1, 0.5)]
    assert "ended because the next trials would pass the budget" in ran.out
    # More budget: on from there, until there is nothing left to double.
    ran = command(*begin, "--budget-mb", "1")
    assert ran.code == 0
    assert [trial[:2] for trial in path_of(out)] == [(1, 0.5), (1, 1.0), (2, 0.5), (2, 1.0)]
    assert "are at their limits" in ran.out
    sent = sum(runs.lines(folder)[-1]["total_bytes"] for folder in out.glob("*/*/"))
    assert sent < 1e6
    # A budget holds whatever the trials: pilots count too.
    for budget in (0.03, 0.05):
        place = tmp_path / str(budget)
        again = [place if each == out else each for each in begin]
        assert command(*again, "--budget-mb", str(budget)).code == 0
        sent = sum(runs.lines(folder)[-1]["total_bytes"] for folder in place.glob("*/*/"))
        assert sent <= budget * 1e6


def test_a_real_search_keeps_what_validation_says(
    tiny: Tiny, tmp_path: Path, command: Command, asked: list[dict[str, Any]]
) -> None:
    """No score is made up: the one that is kept has the highest of the logs."""
    path, out = tiny.write(tmp_path / "tiny.toml", **FLASC), tmp_path / "out"
    ran = command("search", path, "--budget-mb", "0.05", "--seeds", "0,1", "--out", out)
    assert ran.code == 0
    told = json.loads((out / "search.json").read_text())
    scores = []
    for trial in told["trials"]:
        folder = out / f"rank-{trial['rank']}-density-{trial['density']:g}"
        ends = []
        for seed in (0, 1):
            lines = runs.lines(folder / f"seed-{seed}")
            assert lines[-1]["eval_examples"] == 24  # a tenth of the training rows
            values = [line["accuracy"] for line in lines if line["round"]][-3:]
            ends.append(sum(values) / len(values))
        scores.append(sum(ends) / 2)
    assert [trial["score"] for trial in told["trials"]] == pytest.approx(scores)
    best = max(range(len(scores)), key=scores.__getitem__)
    assert told["best"] == {key: told["trials"][best][key] for key in ("rank", "density")}


@pytest.mark.parametrize(
    ("gone", "what"),
    kinds.some_of([(gone, what) for gone in ("pilot", "seed-0") for what in CHANGES]),
)
def test_a_trial_after_a_change_is_not_put_beside_those_before(
    tiny: Tiny,
    tmp_path: Path,
    command: Command,
    asked: list[dict[str, Any]],
    gone: str,
    what: str,
) -> None:
    given = {**FLASC, "rounds": 2, **own_copies(tiny, tmp_path)}
    path, out = tiny.write(tmp_path / "tiny.toml", **given), tmp_path / "out"
    arguments: list[str | Path] = ["search", path, "--budget-mb", "0.01", "--out", out]
    assert command(*arguments).code == 0
    shutil.rmtree(out / "rank-1-density-0.25" / gone)
    said = change(tmp_path, what)
    ran = command(*arguments)
    assert ran.code != 0
    assert said in " ".join(ran.err.split())


def test_a_trial_that_diverges_has_lost(
    tiny: Tiny,
    tmp_path: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    asked: list[dict[str, Any]],
) -> None:
    pretend(monkeypatch, {(1, 0.25): 0.1, (2, 0.25): 0.2, (2, 0.5): 0.1, (4, 0.25): 0.1})
    path, out = tiny.write(tmp_path / "tiny.toml", **FLASC), tmp_path / "out"

    def spoilt(name: str, recipe: Any, folder: Path) -> Any:
        if name == "rank-1-density-0.5/seed-0":
            recipe = recipes.check(
                recipe.model_dump(mode="json")
                | {"training": {"optimizer": "sgd", "lr": 1e30, "steps": 4}}
            )
        return Job(name, recipe, folder)

    monkeypatch.setattr("fedsieve.study.search.Job", spoilt)
    assert command("search", path, "--budget-mb", "1", "--out", out).code == 0
    assert path_of(out)[1:3] == [(1, 0.5, "diverged"), (2, 0.25, "kept")]
    assert "rank-1-density-0.5" not in asked[-1]["groups"]


@pytest.mark.parametrize(
    ("last", "log"),
    [pytest.param("pilot", False, marks=pytest.mark.slow), ("seed-0", True)],
    ids=["in its pilot, without a log", "as a run leaves it"],
)
def test_a_step_that_is_marked_as_diverged_has_lost(
    tiny: Tiny,
    tmp_path: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    asked: list[dict[str, Any]],
    last: str,
    log: bool,
) -> None:
    """In its pilot, too, and in a folder of somebody else's that holds nothing but the mark."""
    pretend(monkeypatch, {(1, 0.25): 0.1, (2, 0.25): 0.2, (2, 0.5): 0.1, (4, 0.25): 0.1})
    path, out = tiny.write(tmp_path / "tiny.toml", **FLASC), tmp_path / "out"
    lost = out / "rank-1-density-0.5" / last
    lost.mkdir(parents=True)
    (lost / DIVERGED).write_text("round 1: no client", encoding="utf-8")
    if log:
        sent = {"down_bytes": 0, "up_bytes": 0, "total_bytes": 0}
        line = {"round": 0, "loss": 0.5, "seconds": 1.0, "dropped": 0} | sent
        (lost / rundir.METRICS).write_text(json.dumps(line) + "\n", encoding="utf-8")
    ran = command("search", path, "--budget-mb", "1", "--out", out)
    assert ran.code == 0, ran.err
    verdict = "diverged in its pilot" if last == "pilot" else "diverged"
    assert path_of(out)[:3] == [(1, 0.25, "start"), (1, 0.5, verdict), (2, 0.25, "kept")]
    assert "rank-1-density-0.5" not in asked[-1]["groups"]


def test_where_all_steps_diverge_the_start_is_the_best(
    tiny: Tiny, tmp_path: Path, command: Command, asked: list[dict[str, Any]]
) -> None:
    path, out = tiny.write(tmp_path / "tiny.toml", **FLASC), tmp_path / "out"
    for name in ("rank-1-density-0.5", "rank-2-density-0.25"):
        (out / name / "pilot").mkdir(parents=True)
        (out / name / "pilot" / DIVERGED).write_text("round 1: no client", encoding="utf-8")
    ran = command("search", path, "--budget-mb", "1", "--out", out)
    assert ran.code == 0, ran.err
    assert [verdict for *_, verdict in path_of(out)] == ["start", *2 * ["diverged in its pilot"]]
    assert "ended because neither a higher rank nor a higher density helps" in ran.out


@pytest.mark.parametrize("how", ["by its rate", "by a mark alone"])
def test_a_first_trial_that_diverges_ends_the_search(
    tiny: Tiny, tmp_path: Path, command: Command, asked: list[dict[str, Any]], how: str
) -> None:
    path, out = tiny.write(tmp_path / "tiny.toml", **FLASC), tmp_path / "out"
    given: list[str | Path] = ["search", path, "--budget-mb", "1", "--out", out]
    if how == "by its rate":
        given += ["training.lr=1e30", "training.optimizer=sgd", "training.steps=4"]
    else:
        (out / "rank-1-density-0.25" / "pilot").mkdir(parents=True)
        (out / "rank-1-density-0.25" / "pilot" / DIVERGED).touch()
    for _ in range(2):
        ran = command(*given)
        assert ran.code == 2
        assert "the first trial diverged: lower the learning rates" in " ".join(ran.err.split())


@pytest.mark.parametrize(
    ("changes", "words", "message"),
    [
        ({"method": {"name": "fedit"}, "budgets": [{}]}, [], "'fedit' has no densities to search"),
        ({"method": {"name": "fslora"}, "budgets": [{}]}, [], "has no densities to search"),
        ({"budgets": [{}], "lora__rank": 40}, [], "rank 40 cannot be doubled within 64"),
        ({"budgets": {"kind": "tiers", "tiers": 2}}, [], "it needs [[budgets]] with down and up"),
        ({}, ["--density", "0"], "budgets.0.down: Input should be greater than 0"),
        ({}, ["--seeds", "x"], "whole numbers with commas"),
        ({}, ["rouns=3"], "rouns: unknown key"),
    ],
)
def test_what_cannot_be_searched(
    tiny: Tiny,
    tmp_path: Path,
    command: Command,
    changes: dict[str, Any],
    words: list[str],
    message: str,
) -> None:
    path = tiny.write(tmp_path / "tiny.toml", **(FLASC | changes))
    ran = command("search", path, "--budget-mb", "1", "--out", tmp_path / "out", *words)
    assert ran.code == 2
    assert message in ran.err
    assert not (tmp_path / "out").exists()


def test_a_pilot_that_sent_nothing_is_named(tiny: Tiny, tmp_path: Path) -> None:
    line = {"round": 2, "loss": 0.5, "seconds": 1.0, "dropped": 0}
    sent = {"down_bytes": 0, "up_bytes": 0, "total_bytes": 0}
    (tmp_path / rundir.METRICS).write_text(json.dumps(line | sent) + "\n")
    with pytest.raises(FedSieveError, match=r"metrics\.jsonl: round 2 sent nothing: remove"):
        search._last_round(Job("pilot", recipes.check(tiny.table()), tmp_path))
