"""`evaluation.metric`: which of a task's metrics leads, for all tasks; and what cannot."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset

import fedsieve
from fedsieve.errors import FedSieveError
from fedsieve.recipe import read as recipe
from fedsieve.recipe import schema
from fedsieve.sites import federate
from fedsieve.sites.server import RoundPolicy
from fedsieve.study import compare, plan, tables
from fedsieve.tasks import catalogue
from fedsieve.tasks.tally import check_lead, score, scores, total
from tests import kinds, runs
from tests.conftest import LABELS, Tiny
from tests.tasks.test_federated import KINDS, changes, quietly
from tests.tasks.test_scores import Case, counted
from tests.tasks.test_scores import each as each_case

LOWER = {"mse", "perplexity"}  # better when lower
BY_ROW = {"spearman", "map"}  # no sums give them


@each_case
def test_a_task_names_the_metrics_that_it_tells_but_for_those_better_when_lower(case: Case) -> None:
    task, tally = catalogue.load(case.task), total(counted(case, 60))
    told = list(task.metrics(tally, case.classes))
    assert list(task.leads(case.classes, True)) == [name for name in told if name not in LOWER]
    assert list(task.leads(case.classes, False)) == [n for n in told if n not in LOWER | BY_ROW]
    assert set(task.leads((), True)) >= set(told) - LOWER


@each_case
def test_the_one_that_is_asked_for_leads_and_is_what_spreads_over_clients(case: Case) -> None:
    task, parts = catalogue.load(case.task), counted(case, 4)
    usual = score(task, total(parts), case.classes).metrics
    for lead in task.leads(case.classes, True):
        found = scores(task, parts, case.classes, lead).metrics
        own = [task.metrics(part, case.classes)[lead] for part in parts]
        others = [name for name in usual if name != lead]
        assert list(found) == [lead, *others, "client_mean", "client_p10", "client_worst"]
        assert {name: found[name] for name in usual} == dict(usual)
        assert found["client_mean"] == pytest.approx(sum(own) / len(own))
        assert found["client_worst"] == min(own)


@each_case
@pytest.mark.parametrize("name", ["accurcy", "", "mse", "perplexity", "eval_loss", "client_mean"])
def test_another_cannot_lead(case: Case, name: str) -> None:
    with pytest.raises(FedSieveError, match=r"cannot lead.*(known are|did you mean)") as refused:
        check_lead(catalogue.load(case.task), name, case.classes)
    assert "\n" not in str(refused.value)


@quietly
@pytest.mark.parametrize(
    "kind", kinds.some_of((kind,) for kind in KINDS), ids=[kind.task for kind in KINDS]
)
def test_a_recipe_says_which_leads(tiny: Tiny, tmp_path: Path, kind: Any) -> None:
    given = changes(tiny, tmp_path, kind, kind.rows) | {"rounds": 1}
    given["partition"] = {"kind": "iid", "clients": 4}
    for lead in catalogue.load(kind.task).leads(["B-cars", "B-space", "O"], True):
        runs.start(tiny, tmp_path / lead, **given, evaluation__metric=lead)
        assert [next(iter(r["metrics"])) for r in runs.lines(tmp_path / lead)] == [lead, lead]


SIXTY = {"data__classes": [*LABELS], "evaluation__metric": "f1"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"evaluation__metric": "matthew"}, "did you mean 'matthews'"),
        ({"evaluation__metric": "mse"}, "'mse' cannot lead"),
        (SIXTY, "'f1' cannot lead: it is no metric that this task tells over these classes"),
        ({"evaluation__metric": 3}, r"evaluation\.metric"),
    ],
)
def test_a_recipe_is_refused_before_anything_is_loaded(
    tiny: Tiny, given: dict[str, Any], said: str
) -> None:
    away = {"model": {"source": "/no/such"}, "data__train": "/no/such.csv"}
    with pytest.raises(FedSieveError, match=said) as refused:
        recipe.check(tiny.table(**away, **given))
    assert "evaluation.metric" in str(refused.value)


def test_what_only_the_rows_tell_is_refused_before_the_model_is_loaded(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsieve.recipe.experiment.load_base", None)
    with pytest.raises(FedSieveError, match=r"evaluation\.metric: 'f1' cannot lead.*these classes"):
        runs.start(tiny, tmp_path / "run", evaluation__metric="f1")


@pytest.mark.parametrize(("metric", "first"), [(None, "accuracy"), ("matthews", "matthews")])
def test_in_a_notebook(tiny: Tiny, metric: str | None, first: str) -> None:
    rows = Dataset.from_csv(str(tiny.train))
    run = fedsieve.finetune(
        tiny.bert, [rows], fedsieve.fedit(), rounds=1, test=rows.select(range(9)), metric=metric
    )
    assert run.metrics[0].metrics is not None
    assert next(iter(run.metrics[0].metrics)) == first


def test_a_notebook_is_refused_before_the_model_is_loaded(tiny: Tiny) -> None:
    rows = Dataset.from_csv(str(tiny.train))
    for metric in ("f1", "recall"):
        with pytest.raises(FedSieveError, match=f"^metric: '{metric}' cannot lead"):
            fedsieve.finetune(tiny.bert, [rows], fedsieve.fedit(), rounds=1, metric=metric)


@pytest.mark.parametrize("own", [False, True])
def test_what_no_sums_give_cannot_lead_where_sites_evaluate(
    tiny: Tiny, own: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(federate, "check_installed", lambda: None)
    monkeypatch.setattr("fedsieve.run.rundir.environment", lambda _: {})
    data = {"train": str(tiny.train), "text": "text", "label": "label"}
    given = recipe.check(
        tiny.table(
            model={"source": str(tiny.bert), "task": "regression"},
            data={**data, "test": str(tiny.test)} if own else data,
            partition={"kind": "iid", "clients": 2},
            evaluation__metric="spearman",
        )
    )

    def prepare(told: schema.Recipe) -> None:
        federate.prepare(told, tmp_path / "run", RoundPolicy(2), federate.ServerAddress())

    if own:
        prepare(given)
        return
    with pytest.raises(FedSieveError, match=r"evaluation\.metric: 'spearman' .* over sites"):
        prepare(given)


@pytest.mark.parametrize(
    ("given", "best"),
    [([-0.3, -0.1], 1), ([None, -0.9], 1), ([-1.0], 0), ([0.0, 0.2], 1), ([None, None], None)],
)
def test_a_trial_whose_scores_are_below_zero_may_win(
    given: list[float | None], best: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As correlations may be; None is a trial that diverged."""
    settings: list[dict[str, Any]] = [{"training.lr": n} for n in range(len(given))]
    entry = plan.Entry("one", "fedit", {}, (0,), settings, (), ())
    made = plan.Plan(Path("x"), None, (entry,), tables.TuneTable(grid=settings), ())
    jobs = [SimpleNamespace(folder=n) for n in range(len(given))]
    monkeypatch.setattr(compare, "trial_job", lambda plan, tune, entry, number, seed: jobs[number])
    lost = {number: "it diverged" for number, score in enumerate(given) if score is None}
    monkeypatch.setattr(compare, "diverged", lambda job: lost.get(job.folder))
    monkeypatch.setattr(compare, "finished", lambda _: True)
    monkeypatch.setattr(compare, "_score", lambda folder: given[folder])
    assert compare.judge(made)["one"].best == best
