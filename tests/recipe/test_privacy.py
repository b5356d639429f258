"""A recipe's [privacy]: what it refuses, what it writes down, and when the run ends."""

import json
import re
import shutil
import sys
import tomllib
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedsieve.algebra.budget import Client
from fedsieve.algebra.keys import Key
from fedsieve.clients.privacy import Cohorts, ledger, unamplified
from fedsieve.clients.sampling import cohort
from fedsieve.errors import FedSieveError
from fedsieve.recipe import read as recipes
from fedsieve.recipe import schema
from fedsieve.run import rundir, runner
from fedsieve.run.progress import line_of
from tests.conftest import Tiny
from tests.runs import assert_same, lines, quiet, start, stop_at

CLIP = {"clip": 0.1, "delta": 1e-3}
TARGET = {**CLIP, "epsilon": 5.0}


@pytest.fixture(autouse=True)
def _warnings_are_read_where_they_matter() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"privacy": {}}, "privacy.clip: this key is needed"),
    ({"privacy": CLIP}, "privacy: give 'epsilon', 'noise_multiplier', or both"),
    ({"privacy": {**TARGET, "epsilom": 1}}, "privacy.epsilom: unknown key (did you mean 'epsilon'"),
    ({"privacy": {**CLIP, "epsilon": 0}}, "privacy.epsilon: Input should be greater than 0"),
    ({"privacy": {**CLIP, "epsilon": -2.0}}, "privacy.epsilon: Input should be greater than 0"),
    ({"privacy": {**CLIP, "epsilon": float("inf")}}, "privacy.epsilon: Input should be a finite"),
    ({"privacy": {**TARGET, "delta": 0}}, "privacy.delta: Input should be greater than 0"),
    ({"privacy": {**TARGET, "delta": 1}}, "privacy.delta: Input should be less than 1"),
    ({"privacy": {**TARGET, "delta": 1.5}}, "privacy.delta: Input should be less than 1"),
    ({"privacy": {**TARGET, "clip": 0}}, "privacy.clip: Input should be greater than 0"),
    (
        {"privacy": {**CLIP, "noise_multiplier": -1}},
        "privacy.noise_multiplier: Input should be greater than or equal to 0",
    ),
    ({"privacy": {**TARGET, "noise_from": "dice"}}, "privacy.noise_from: Input should be 'seed'"),
    (
        {"privacy": {**TARGET, "noise_from": "system"}, "checkpoint": {"every": 2}},
        "checkpoint.every: privacy.noise_from = 'system' needs 1",
    ),
    (
        {
            "privacy": {**TARGET, "noise_from": "system"},
            "data__validation": 0.2,
            "evaluation__on": "validation",
        },
        "evaluation.on: privacy.noise_from = 'system' needs 'test'",
    ),
    (
        {"privacy": {**TARGET, "noise_from": "system"}, "data__validation": 0.2},
        "data.validation: leave it out with privacy.noise_from = 'system'",
    ),
    (
        {"privacy": TARGET, "method": {"name": "fslora_flasc", "weighting": "examples"}},
        "method.weighting: with [privacy] it must be 'uniform'",
    ),
    (
        {"privacy": TARGET, "method": {"name": "flexlora"}, "budgets": [{}]},
        "the server of the method 'flexlora' does not move by a mean",
    ),
    (
        {"privacy": TARGET, "sampling": {"availability": 0.5}},
        "sampling.availability: the accountant of [privacy] does not cover it",
    ),
    (
        {"privacy": TARGET, "sampling": {"quorum": 2}},
        "sampling.quorum: the accountant of [privacy] does not cover it",
    ),
    (
        {"privacy": TARGET, "method": {"name": "flasc", "feedback": True}, "budgets": [{}]},
        "need 'poisson' or 'all'",
    ),
    (
        {"privacy": TARGET, "method": {"name": "fedsa_lora"}, "budgets": [{}]},
        "need 'poisson' or 'all'",
    ),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[w[1][:50] for w in WRONG])
def test_what_cannot_be_private_is_refused_before_anything_is_loaded(
    tiny: Tiny, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(FedSieveError, match=re.escape(message)):
        recipes.check(tiny.table(**changes))


def test_over_selection_is_refused(tiny: Tiny) -> None:
    machine = {"memory": 1000.0, "downlink": 10.0, "uplink": 10.0, "step_seconds": 0.1}
    links = {"kind": "resources", "deadline": 10.0, "tiers": [machine]}
    given: dict[str, Any] = {"sampling": {"extra": 1}, "budgets": links}
    recipes.check(tiny.table(**given))
    with pytest.raises(FedSieveError, match=re.escape("sampling.extra: the accountant")):
        recipes.check(tiny.table(**given, privacy=TARGET))


def test_clients_that_remember_may_be_sampled_by_poisson(tiny: Tiny) -> None:
    method = {"name": "flasc", "feedback": True}
    given = {"privacy": TARGET, "method": method, "budgets": [{}]}
    for kind in ("poisson", "all"):
        recipes.check(tiny.table(**given, sampling={"kind": kind}))


@pytest.mark.parametrize("kind", ["uniform", "poisson", "all"])
def test_a_target_is_met_over_all_rounds_and_spent_epsilon_is_logged(
    tiny: Tiny, tmp_path: Path, kind: Any
) -> None:
    start(tiny, tmp_path, privacy=TARGET, sampling={"kind": kind})
    first, *rows = lines(tmp_path)
    assert "epsilon" not in first
    spent = [row["epsilon"] for row in rows]
    assert len(spent) == 4
    assert spent == sorted(set(spent))
    assert 0.9 * 5.0 < spent[-1] <= 5.0
    written = tomllib.loads((tmp_path / rundir.RECIPE).read_text())
    # The account again, from the numbers that were written down.
    clients = len({row["client"] for row in lines(tmp_path, rundir.CLIENTS)})
    noise = written["privacy"]["noise_multiplier"]
    (guarantee,) = [n for n in written["environment"]["notes"] if "epsilon" in n]
    total = int(re.findall(r"(\d+) clients", guarantee)[0])
    assert clients <= total <= 12
    size = total if kind == "all" else 3
    assert spent[1] == ledger(Cohorts(kind, size, total), noise, 1e-3)(2)
    assert not any("simulated_cohort" in row for row in rows)


@pytest.mark.parametrize("kind", ["uniform", "poisson"])
def test_what_those_know_who_know_who_took_part_is_logged_beside_it(
    tiny: Tiny, tmp_path: Path, kind: Any
) -> None:
    """Counted again from the log of clients: the most often drawn, and each for itself."""
    noisy = {**CLIP, "noise_multiplier": 2.0}
    seen: list[str] = []
    table = tiny.table(privacy=noisy, sampling={"kind": kind}, partition__kind="iid")
    del table["partition"]["alpha"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedsieve.report.write", lambda *_: [])
        runner.start(recipes.check(table), tmp_path, lambda row, _: seen.append(line_of(row, 4)))
    known = unamplified(Cohorts(kind, 3, 12), 2.0, 1e-3)
    drawn: Counter[str] = Counter()
    log = lines(tmp_path, rundir.CLIENTS)
    for row in lines(tmp_path)[1:]:
        now = [client for client in log if client["round"] == row["round"]]
        drawn.update(client["client"] for client in now)
        assert [client["epsilon"] for client in now] == [known(drawn[c["client"]]) for c in now]
        assert row["epsilon_unamplified"] == known(max(drawn.values(), default=0))
        said = f"({row['epsilon_unamplified']:.3f} against those who know who took part)"
        assert said in seen[row["round"]]
    assert len(set(drawn.values())) > 1
    start(tiny, tmp_path / "all", privacy=noisy, sampling={"kind": "all"})
    assert not any("epsilon_unamplified" in row for row in lines(tmp_path / "all"))


SYSTEM = {**CLIP, "noise_multiplier": 1.0, "noise_from": "system"}


def test_what_was_evaluated_for_real_clients_is_not_evaluated_again(
    tiny: Tiny, tmp_path: Path
) -> None:
    """It keeps no details of an evaluation, whose absence therefore says nothing."""
    run = tmp_path / "run"
    start(tiny, run, privacy=SYSTEM, rounds=2, partition={"kind": "column", "column": "author"})
    before = (run / rundir.METRICS).read_bytes()
    shutil.rmtree(run / rundir.ADAPTER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedsieve.report.write", lambda *_: [])
        runner.resume(run, quiet)
    assert (run / rundir.ADAPTER).is_dir()
    assert (run / rundir.METRICS).read_bytes() == before


def test_a_run_for_real_clients_keeps_its_server_s_secrets(tiny: Tiny, tmp_path: Path) -> None:
    """Who took part follows neither from the recipe nor from anything in the run's directory."""
    given: dict[str, Any] = {"privacy": SYSTEM, "rounds": 8, "partition": {"kind": "column"}}
    given["partition"]["column"] = "author"
    bad = tmp_path / "bad.csv"
    bad.write_text(tiny.train.read_text() + "a text without a label,,author99\n")
    given["data__train"] = str(bad)
    drawn = {}
    for name in ("one", "two"):
        run = tmp_path / name
        start(tiny, run, **given)
        own = rundir.own(run)
        assert own == tmp_path / f"{name}.secret"
        assert own.stat().st_mode & 0o777 == 0o700
        assert (own / rundir.SEED).stat().st_mode & 0o777 == 0o600
        log = (own / rundir.CLIENTS).read_text().splitlines()
        drawn[name] = [(row["round"], row["client"]) for row in map(json.loads, log)]
        seed = (own / rundir.SEED).read_text()
        files = [path for path in run.rglob("*") if path.is_file()]
        assert {path.name for path in files} >= {rundir.RECIPE, rundir.METRICS}
        for path in files:
            data = path.read_bytes()
            assert b"author" not in data.replace(b'"author"', b""), path  # no client's name
            for told in (seed.encode(), str(int(seed, 16)).encode(), bytes.fromhex(seed)):
                assert told not in data
        assert not any("loss" in row for row in lines(run))
        assert all("accuracy" in row for row in lines(run)[::2])
        # Finished, and left as it is; the adapter can be had from it.
        runner.resume(run, quiet)
        assert runner.export(run, tmp_path / f"{name}-adapter") == 8
    clients = [Client(f"author{number}", 1) for number in range(12)]
    sampling = schema.sampling(recipes.check(tiny.table(**given)))
    from_seed = [
        (number, client.id)
        for number in range(1, 9)
        for client in cohort(clients, sampling, Key(0, number))
    ]
    assert drawn["one"] != from_seed
    assert drawn["one"] != drawn["two"]


def test_secrets_of_another_run_are_not_taken(tiny: Tiny, tmp_path: Path) -> None:
    run = tmp_path / "run"
    start(tiny, run, privacy=SYSTEM, rounds=1)
    seed = (rundir.own(run) / rundir.SEED).read_text()
    for path in sorted(run.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    with pytest.raises(FedSieveError, match=r"run\.secret holds the secrets of a run that is not"):
        start(tiny, run, rounds=1)
    recipe = recipes.check(tiny.table(privacy=SYSTEM, rounds=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedsieve.report.write", lambda *_: [])
        runner.start(recipe, run, quiet, overwrite=True)
        assert (rundir.own(run) / rundir.SEED).read_text() != seed
        runner.start(recipes.check(tiny.table(rounds=1)), run, quiet, overwrite=True)
    assert not rundir.own(run).exists()
    assert (run / rundir.CLIENTS).is_file()


UNCOVERED: list[tuple[dict[str, Any], str, bool]] = [
    ({"privacy": {**SYSTEM, "noise_from": "seed"}}, "mean training loss; how many", True),
    (
        {
            "privacy": {**SYSTEM, "noise_from": "seed"},
            "data__validation": 0.2,
            "evaluation__on": "validation",
        },
        "which are taken on rows of the clients; how many",
        True,
    ),
    (
        {
            "privacy": {**SYSTEM, "noise_from": "seed"},
            "sampling": {"kind": "all"},
            "method": {"name": "fedsa_lora"},
            "budgets": [{}],
        },
        "which are taken on what each client keeps to itself; how many",
        True,
    ),
    ({"privacy": SYSTEM}, "mean training loss: withheld", True),
    ({"privacy": SYSTEM}, "the classes, where they are taken from the rows", True),
    (
        {"privacy": {**SYSTEM, "noise_from": "seed"}, "data__validation": 0.2},
        "which ones data.validation holds back",
        True,
    ),
    (
        {
            "privacy": SYSTEM,
            "sampling": {"kind": "poisson"},
            "method": {"name": "fedsa_lora"},
            "budgets": [{}],
        },
        "which are taken on what each client keeps to itself: withheld",
        False,
    ),
]


@pytest.mark.parametrize(("changes", "said", "scored"), UNCOVERED, ids=[u[1] for u in UNCOVERED])
def test_figures_that_no_noise_covers_are_named_or_withheld(
    tiny: Tiny, tmp_path: Path, changes: dict[str, Any], said: str, scored: bool
) -> None:
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        start(tiny, tmp_path / "run", rounds=2, **changes)
    assert any(said in str(warning.message) for warning in heard)
    notes = tomllib.loads((tmp_path / "run" / rundir.RECIPE).read_text())["environment"]["notes"]
    assert sum(said in note for note in notes) == 1
    rows = lines(tmp_path / "run")
    assert any("accuracy" in row for row in rows) == scored
    assert any("loss" in row for row in rows) == (changes["privacy"]["noise_from"] == "seed")


def test_a_run_without_privacy_says_nothing_of_it(tiny: Tiny, tmp_path: Path) -> None:
    start(tiny, tmp_path)
    assert not any("epsilon" in row for row in lines(tmp_path))
    written = tomllib.loads((tmp_path / rundir.RECIPE).read_text())
    assert "privacy" not in written


def test_without_noise_and_clip_the_adapter_is_that_of_a_run_without_privacy(
    tiny: Tiny, tmp_path: Path
) -> None:
    nothing = {"clip": float("inf"), "delta": 0.5, "noise_multiplier": 0.0}
    start(tiny, tmp_path / "free")
    start(tiny, tmp_path / "clipped", privacy=nothing)
    one, two = (
        (tmp_path / name / rundir.ADAPTER / "adapter_model.safetensors").read_bytes()
        for name in ("free", "clipped")
    )
    assert one == two
    assert not any("epsilon" in row for row in lines(tmp_path / "clipped"))
    notes = tomllib.loads((tmp_path / "clipped" / rundir.RECIPE).read_text())["environment"]
    assert any("Privacy: NONE" in note for note in notes["notes"])


@pytest.mark.parametrize("noise", [None, 3.0])
def test_a_run_that_ends_where_it_was_to_end_warns_of_no_spent_budget(
    tiny: Tiny, tmp_path: Path, noise: float | None
) -> None:
    """The noise was found for these rounds, or is given and carries just as many."""
    spent = ledger(Cohorts("all", 12, 12), 3.0, 1e-3)
    privacy: dict[str, Any] = {**CLIP, "epsilon": (spent(2) + spent(3)) / 2}
    if noise is not None:
        privacy["noise_multiplier"] = noise
    table = tiny.table(
        rounds=2,
        privacy=privacy,
        sampling={"kind": "all"},
        partition={"kind": "iid", "clients": 12},
    )
    with warnings.catch_warnings(record=True) as said, pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedsieve.report.write", lambda *_: [])
        warnings.simplefilter("always")
        runner.start(recipes.check(table), tmp_path, quiet)
    assert not any("spent" in str(each.message) for each in said)
    assert lines(tmp_path)[-1]["round"] == 2


def test_the_run_ends_as_finished_before_the_target_is_passed(tiny: Tiny, tmp_path: Path) -> None:
    """The noise is given and carries two rounds; ten are asked for."""
    noise = 3.0
    spent = ledger(Cohorts("all", 12, 12), noise, 1e-3)
    target = (spent(2) + spent(3)) / 2
    table = tiny.table(
        rounds=10,
        privacy={**CLIP, "epsilon": target, "noise_multiplier": noise},
        sampling={"kind": "all"},
        partition={"kind": "iid", "clients": 12},
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        runner.start(recipes.check(table), tmp_path, quiet)
    (ending,) = [str(w.message) for w in said if "is spent" in str(w.message)]
    assert f"epsilon {spent(2):.4g} of {target:g}" in ending
    assert "after round 2" in ending
    rows = lines(tmp_path)
    assert [row["round"] for row in rows] == [0, 1, 2]
    assert rows[-1]["epsilon"] == spent(2) <= target < spent(3)
    assert "accuracy" in rows[-1]  # the last round is evaluated
    assert (tmp_path / rundir.ADAPTER / "adapter_model.safetensors").is_file()
    page = (tmp_path / rundir.REPORT).read_text()
    assert "2 of the 10 rounds asked for are within the target" in page
    # Finished: resuming does no more rounds.
    runner.resume(tmp_path, quiet)
    assert len(lines(tmp_path)) == 3


def test_a_target_that_one_round_passes_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(FedSieveError, match="one round spends epsilon"):
        start(tiny, tmp_path, privacy={**CLIP, "epsilon": 0.01, "noise_multiplier": 0.5})


@pytest.mark.parametrize(
    "more", [pytest.param({}, marks=pytest.mark.slow), {"quantile": 0.5, "count_noise": 2.5}]
)
def test_a_resumed_run_has_the_same_noise(
    tiny: Tiny, tmp_path: Path, more: dict[str, float]
) -> None:
    changes: dict[str, Any] = {"privacy": {**TARGET, **more}, "sampling": {"kind": "poisson"}}
    start(tiny, tmp_path / "whole", **changes)
    with pytest.raises(runner.Stopped):
        start(tiny, tmp_path / "stopped", stop_at(2), **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedsieve.report.write", lambda *_: [])
        # What was found is written down: it is not searched for again.
        patch.setattr("fedsieve.clients.privacy.calibrate", None)
        runner.resume(tmp_path / "stopped", quiet)
    assert_same(tmp_path / "whole", tmp_path / "stopped")
    clips = {row.get("clip") for row in lines(tmp_path / "stopped")[1:]}
    assert (None in clips) == (len(clips) == 1) == (not more)


def test_an_empty_poisson_round_is_a_round(tiny: Tiny, tmp_path: Path) -> None:
    """One client of twelve is expected a round: of eight rounds some have nobody."""
    start(
        tiny,
        tmp_path,
        rounds=8,
        cohort=1,
        privacy={**CLIP, "noise_multiplier": 1.0},
        sampling={"kind": "poisson"},
    )
    rows = lines(tmp_path)[1:]
    assert len(rows) == 8
    assert any(row["clients"] == 0 for row in rows)


def test_a_simulated_cohort_is_said_in_every_output(tiny: Tiny, tmp_path: Path) -> None:
    private = {
        **TARGET,
        "delta": 1e-6,
        "simulated_cohort": 300,
        "simulated_population": 100_000,
    }
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        runner.start(recipes.check(tiny.table(privacy=private)), tmp_path, quiet)
    assert any("NOT protected" in str(w.message) for w in said)  # on the console
    for row in lines(tmp_path)[1:]:
        assert row["simulated_cohort"] == 300
    notes = tomllib.loads((tmp_path / rundir.RECIPE).read_text())["environment"]["notes"]
    assert any("IN THE SIMULATED FEDERATION" in note for note in notes)
    assert any("NOT protected" in note for note in notes)
    page = (tmp_path / rundir.REPORT).read_text()
    assert "IN THE SIMULATED FEDERATION" in page
    assert "NOT protected" in page


def test_without_the_accountant_it_is_said_what_to_install(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(FedSieveError, match=re.escape("pip install 'fedsieve[privacy]'")):
        start(tiny, tmp_path, privacy=TARGET)


@pytest.mark.parametrize("name", [n for n in recipes.shipped() if n.startswith("dp-")])
def test_recipes_that_ship_with_privacy_have_it(name: str) -> None:
    recipe = recipes.load(name)
    assert recipe.privacy is not None
    assert recipe.privacy.epsilon is not None
    json.dumps(recipe.model_dump(mode="json"))


@pytest.mark.parametrize("noise", [1e-7, 1e-154, 5e-324])
def test_noise_of_which_no_account_can_be_kept_is_refused_by_its_key(
    tiny: Tiny, tmp_path: Path, noise: float
) -> None:
    with pytest.raises(FedSieveError, match=r"privacy: noise_multiplier is .* from 1e-06 up"):
        start(tiny, tmp_path / "run", privacy={**CLIP, "noise_multiplier": noise})
