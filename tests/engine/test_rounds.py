"""Rounds of a federation in this process: the same whatever the order, real bytes, and clients that
have no data or whose training breaks down do not stop the others.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsieve.algebra.adapter import Tree
from fedsieve.algebra.keys import Key
from fedsieve.engine import loop
from fedsieve.engine.loop import Receipt, Round
from fedsieve.errors import FedSieveError, NoUsableUpdate
from fedsieve.methods import catalogue
from fedsieve.recipe import read as recipe
from fedsieve.recipe.experiment import Experiment, from_recipe
from fedsieve.run import rundir, runner
from fedsieve.settings import Sampling
from tests import runs, toy
from tests.conftest import Command, Tiny, write_rows
from tests.runs import FLASC

pytestmark = pytest.mark.usefixtures("no_report")  # it has tests of its own

FEDIT: dict[str, Any] = {
    "method": {"name": "fedit"},
    "budgets": [{}],
    "server": {"optimizer": "sgd"},
}


def experiment_of(tiny: Tiny, **changes: Any) -> Experiment:
    return from_recipe(recipe.check(tiny.table(**changes)))


def train(experiment: Experiment, last: int) -> tuple[Tree, list[Round], list[Receipt]]:
    federation = experiment.federation
    first, progress = loop.begin(federation, experiment.start)
    summaries, receipts = [first], []
    while progress.round < last:
        final = progress.round + 1 == last
        summary, more, progress = toy.one_round(federation, progress, evaluate=final)
        summaries.append(summary)
        receipts += more
    return federation.method.export(progress.state).tensors, summaries, receipts


def same(one: Tree, two: Tree) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_clients_of_equal_size_by_label_or_by_another_column(tiny: Tiny) -> None:
    law = {"kind": "dirichlet-by-client", "clients": 7, "alpha": 0.5}
    counts = [client.examples for client in experiment_of(tiny, partition=law).federation.clients]
    assert sorted(counts) == [34] * 5 + [35] * 2  # 240 rows

    by_author = experiment_of(tiny, partition={**law, "by": "author"}).federation.clients
    assert sorted(client.examples for client in by_author) == sorted(counts)
    with pytest.raises(FedSieveError, match="no column 'task'"):
        experiment_of(tiny, partition={**law, "by": "task"})
    # A task without labels can be divided by another column alone.
    lm: dict[str, Any] = {"model__source": str(tiny.gpt2), "model__task": "causal-lm"}
    lm |= {"data__label": None, "lora__targets": ["c_attn"]}
    with pytest.raises(FedSieveError, match=r"name a column with partition\.by"):
        experiment_of(tiny, partition=law, **lm)
    assert len(experiment_of(tiny, partition={**law, "by": "author"}, **lm).federation.clients) == 7


@pytest.mark.parametrize("changes", [{}, FLASC, FEDIT], ids=["both", "flasc", "fedit"])
def test_the_same_seed_gives_the_same_adapter_in_any_order(
    tiny: Tiny, changes: dict[str, Any]
) -> None:
    changes = {**changes, "rounds": 3}
    first, summaries, receipts = train(experiment_of(tiny, **changes), 3)
    shuffled = experiment_of(tiny, **changes)
    clients = list(shuffled.federation.clients)
    order = torch.randperm(len(clients), generator=torch.Generator().manual_seed(5)).tolist()
    assert order != sorted(order)
    federation = replace(shuffled.federation, clients=[clients[i] for i in order])
    second, again, _ = train(replace(shuffled, federation=federation), 3)
    assert same(first, second)
    assert [(s.loss, s.total_bytes, s.accuracy) for s in summaries] == [
        (s.loss, s.total_bytes, s.accuracy) for s in again
    ]
    other, _, seen = train(experiment_of(tiny, **changes, seed=1), 3)
    assert not same(first, other)
    assert [r.client for r in receipts] != [r.client for r in seen]


def test_a_federation_learns(tiny: Tiny) -> None:
    """All of it together, on a data set that can be learned: chance is a third."""
    changes = {**FEDIT, "cohort": 6, "rounds": 8, "evaluation__every": 8}
    changes["lora__targets"] = "all-linear"
    _, summaries, _ = train(experiment_of(tiny, **changes), 8)
    accuracies = [s.accuracy for s in summaries if s.accuracy is not None]
    assert len(accuracies) == 2
    assert accuracies[0] < 0.5
    assert accuracies[1] > 0.8
    assert (summaries[-1].eval_loss or 9) < (summaries[0].eval_loss or 0)


def test_dense_bytes_are_what_dense_lora_really_sends(tiny: Tiny) -> None:
    _, summaries, receipts = train(experiment_of(tiny, **FEDIT), 2)
    assert summaries[-1].dense_bytes == summaries[-1].total_bytes > 0
    assert {r.down_bytes for r in receipts} == {r.up_bytes for r in receipts}
    sieved = train(experiment_of(tiny), 2)[1]
    assert sieved[-1].dense_bytes == summaries[-1].dense_bytes
    assert sieved[-1].total_bytes < 0.7 * sieved[-1].dense_bytes


def test_clients_train_what_they_can_afford(tiny: Tiny) -> None:
    _, _, receipts = train(experiment_of(tiny, cohort=12), 1)
    assert {(r.rank, r.down_density, r.up_density) for r in receipts} == {
        (1, 0.8, 0.25),
        (2, 1.0, 0.5),
        (4, 1.0, 1.0),
    }
    means = {
        rank: [sum(getattr(r, way) for r in receipts if r.rank == rank) for way in ("down_bytes",)]
        for rank in (1, 2, 4)
    }
    assert means[1] < means[2] < means[4]


def test_the_last_round_is_evaluated_and_the_others_when_due(tiny: Tiny) -> None:
    _, summaries, _ = train(experiment_of(tiny, evaluation__every=2, rounds=5), 5)
    assert [s.round for s in summaries if s.accuracy is not None] == [0, 2, 4, 5]
    _, summaries, _ = train(experiment_of(tiny, data__test=None), 1)
    assert all(s.accuracy is None and s.eval_loss is None for s in summaries)


# --- nothing to leave out


@pytest.mark.parametrize("name", [n for n in catalogue.names() if catalogue.known(n).knobs])
def test_a_method_that_finds_no_budgets_says_so(tiny: Tiny, name: str) -> None:
    said = "the method runs dense: no client has a budget below 1"
    knob = catalogue.known(name).knobs[0]
    none: list[dict[str, float]] = [{}]
    for budgets in (none, [{"share": 0.5}, {"share": 0.5, knob: 0.5}]):
        given = {"method": {"name": name}, "server": {"optimizer": "sgd"}, "budgets": budgets}
        notes = experiment_of(tiny, **given).notes
        assert any(note.startswith(said) for note in notes) == (len(budgets) == 1)


# --- clients without data


def test_clients_without_data_are_left_out_and_counted(
    tiny: Tiny, tmp_path: Path, command: Command
) -> None:
    changes = {"partition": {"kind": "dirichlet", "clients": 60, "alpha": 0.02}, "rounds": 1}
    with pytest.warns(UserWarning, match="of 60 clients have no data and are left out"):
        experiment = experiment_of(tiny, **changes, cohort=60)
    text, more = experiment.notes
    empty = int(text.split()[0])
    assert 0 < empty < 60
    assert more == f"cohort is 60, and {60 - empty} clients have data: a round has no more"
    assert len(experiment.federation.clients) == 60 - empty
    assert sum(client.examples for client in experiment.federation.clients) == 240
    _, summaries, _ = train(experiment, 1)
    assert summaries[-1].clients == 60 - empty

    path, folder = tiny.write(tmp_path / "tiny.toml", **changes), tmp_path / "run"
    ran = command("run", path, "--out", folder)
    assert ran.code == 0
    assert f"warning: {text}" in ran.err
    assert text in (folder / rundir.RECIPE).read_text()


# --- clients whose training breaks down


def explode(victims: set[str], begin: int = 1) -> Any:
    """Such clients train with a step size at which the loss becomes NaN, from round `begin` on."""

    def act(key: Key, training: Any) -> Any:
        if key.client in victims and key.round >= begin:
            return replace(training, optimizer="sgd", lr=1e30, steps=6)
        return training

    return act


def test_a_diverged_client_is_dropped_and_the_mean_is_over_the_others(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {**FEDIT, "partition": {"kind": "iid", "clients": 5}, "cohort": 5}
    experiment = experiment_of(tiny, **few)
    runs.before_fit(monkeypatch, explode({"0003"}))
    got, summaries, receipts = train(experiment, 1)
    assert (summaries[1].clients, summaries[1].dropped) == (5, 1)
    victim = receipts[3]
    assert victim.client == "0003"
    assert victim.dropped is not None
    assert re.match(r"the training loss became (nan|inf)", victim.dropped)
    assert victim.loss is None
    assert victim.up_bytes == 0
    assert victim.down_bytes > 0
    assert [r.dropped for r in receipts if r is not victim] == [None] * 4
    assert summaries[1].loss is not None
    assert math.isfinite(summaries[1].loss)
    # The same federation had that client never existed.
    without = experiment_of(tiny, **few)
    clients = [c for c in without.federation.clients if c.id != "0003"]
    federation = replace(without.federation, clients=clients, sampling=Sampling(size=4))
    expected, others, _ = train(replace(without, federation=federation), 1)
    assert same(got, expected)
    assert others[1].loss == summaries[1].loss
    assert others[1].up_bytes == summaries[1].up_bytes


def test_weights_that_are_not_finite_are_dropped_though_the_loss_was(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step: the loss before it is fine, the weights after it are not."""

    def act(key: Key, training: Any) -> Any:
        if key.client == "0003":
            made = replace(training, optimizer="sgd", steps=1)
            for name in ("lr", "weight_decay"):
                object.__setattr__(made, name, 3e38)  # more than settings may be
            return made
        return training

    runs.before_fit(monkeypatch, act)
    few = {**FEDIT, "partition": {"kind": "iid", "clients": 5}, "cohort": 5}
    _, summaries, receipts = train(experiment_of(tiny, **few), 1)
    assert summaries[1].dropped == 1
    assert "holds numbers that are not finite" in (receipts[3].dropped or "")


def test_a_dropped_client_keeps_its_old_memory(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = experiment_of(tiny, **FLASC, partition={"kind": "iid", "clients": 4})
    runs.before_fit(monkeypatch, explode({"0002"}, begin=2))
    federation = experiment.federation
    _, progress = loop.begin(federation, experiment.start)
    _, _, progress = toy.one_round(federation, progress)
    before = {id: memory["residual"] for id, memory in experiment.memories.items()}
    assert sorted(before) == ["0000", "0001", "0002", "0003"]
    summary, _, _ = toy.one_round(federation, progress)
    assert summary.dropped == 1
    after = {id: memory["residual"] for id, memory in experiment.memories.items()}
    assert [same(before[id], after[id]) for id in sorted(before)] == [False, False, True, False]


def test_a_round_without_any_update_stops_the_run_and_keeps_the_state(
    tiny: Tiny, whole: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny.write(tmp_path / "tiny.toml", checkpoint__every=4)
    folder = tmp_path / "run"
    everybody = {f"{number:04d}" for number in range(12)}
    with monkeypatch.context() as patch:
        runs.before_fit(patch, explode(everybody, begin=3))
        ran = command("run", path, "--out", folder)
        assert ran.code == 2
        assert "error: round 3: no client returned an update" in ran.err
        assert "the training loss became" in ran.err
        assert f"The state after round 2 is kept in {folder}" in ran.err
        assert "Traceback" not in ran.err
        assert command("resume", folder).code == 2  # nothing has changed yet
    assert [each["round"] for each in runs.lines(folder)] == [0, 1, 2]
    assert command("resume", folder).code == 0
    runs.assert_same(folder, whole)


def test_dropped_clients_are_counted_on_disk_and_said(
    tiny: Tiny, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny.write(tmp_path / "tiny.toml", cohort=12, rounds=2)
    folder = tmp_path / "run"
    runs.before_fit(monkeypatch, explode({"0004"}, begin=2))
    ran = command("run", path, "--out", folder)
    assert ran.code == 0
    assert "warning: round 2, client 0004 dropped: the training loss became" in ran.err
    assert "dropped        1 updates" in ran.out
    assert [each["dropped"] for each in runs.lines(folder)] == [0, 0, 1]
    marked = [each for each in runs.lines(folder, rundir.CLIENTS) if "dropped" in each]
    assert [(each["round"], each["client"]) for each in marked] == [(2, "0004")]
    assert "nothing is evaluated" not in ran.err
    # Of one reason, clients are told together.
    runs.before_fit(monkeypatch, explode({"0003", "0004"}, begin=2))
    ran = command("run", path, "--out", tmp_path / "two", "training.optimizer=", "data.test=")
    said = " ".join(ran.err.split())
    assert "nothing is evaluated: give data.test or data.test_split" in said
    assert said.count("dropped: the training loss became") == 1
    assert re.search(r"round 2, 2 clients (0003, 0004|0004, 0003) dropped: the training", said)
    assert "training.optimizer= takes training.optimizer out of the recipe" in ran.out
    assert "loss" not in marked[0]


def test_no_update_at_all_without_a_directory(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    runs.before_fit(monkeypatch, explode({f"{number:04d}" for number in range(12)}))
    with pytest.raises(NoUsableUpdate, match=r"client \d+: the training loss became.*; 9 more"):
        train(experiment_of(tiny, cohort=12), 1)


def test_a_server_that_runs_away_is_an_error_not_a_crash(tiny: Tiny, tmp_path: Path) -> None:
    """The global adapter itself becomes infinite: its loss cannot be written as JSON."""
    changes = {**FEDIT, "server": {"optimizer": "sgd", "lr": 1e38}, "evaluation__every": 1}
    with pytest.raises(FedSieveError, match="round 2"):
        runs.start(tiny, tmp_path / "run", **changes)
    assert [each["round"] for each in runs.lines(tmp_path / "run")] == [0, 1]


# --- other tasks and partitions


def test_natural_clients(tiny: Tiny) -> None:
    experiment = experiment_of(tiny, partition={"kind": "column", "column": "author"})
    assert {c.id for c in experiment.federation.clients} == {f"author{n}" for n in range(12)}


def test_causal_language_models_run_end_to_end(
    tiny: Tiny, tmp_path: Path, command: Command
) -> None:
    path = tiny.write(
        tmp_path / "lm.toml",
        model={"source": str(tiny.gpt2), "task": "causal-lm"},
        lora={"rank": 4, "targets": ["c_attn"]},
        data__label=None,
        partition={"kind": "column", "column": "author"},
        rounds=3,
        cohort=8,
    )
    folder = tmp_path / "run"
    ran = command("run", path, "--out", folder)
    assert ran.code == 0, ran.err
    assert "warning: The tokenizer has no padding token: its end-of-sequence token" in ran.err
    assert ran.err.count("warning") == 1
    assert "has no padding token" in (folder / rundir.RECIPE).read_text()
    losses = [each["eval_loss"] for each in runs.lines(folder) if "eval_loss" in each]
    assert losses[-1] < losses[0] - 0.1


def test_pairs_of_texts_and_limits_of_the_evaluation(tiny: Tiny, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "more.csv", 40, seed=4)
    experiment = experiment_of(
        tiny, data__text_b="author", data__test=str(path), evaluation__limit=30
    )
    _, summaries, _ = train(experiment, 1)
    assert summaries[-1].eval_examples == 30


def test_resuming_needs_the_same_data(tiny: Tiny, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.csv", 100, seed=3)
    with pytest.raises(runner.Stopped):
        runs.start(tiny, tmp_path / "run", runs.stop_at(1), data__train=str(path))
    path.unlink()
    with pytest.raises(FedSieveError, match=re.escape("there is no file")):
        runner.resume(tmp_path / "run", runs.quiet)


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("together", [1, 2])
def test_a_caller_that_turned_gradients_off_trains_all_the_same(
    tiny: Tiny, tmp_path: Path, together: int
) -> None:
    """As a callback that evaluates, or a method of one's own, may leave it."""

    def turn_off(summary: Round, receipts: Sequence[Receipt]) -> None:
        torch.set_grad_enabled(False)

    given: dict[str, Any] = {"rounds": 1, "engine": {"together": together}}
    wanted = runs.start(tiny, tmp_path / "with", **given)
    with torch.enable_grad():  # and as it was, afterwards
        off = runs.start(tiny, tmp_path / "without", turn_off, **given)
    assert toy.distance(off.tensors, wanted.tensors) == 0
