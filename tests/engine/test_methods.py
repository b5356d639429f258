"""Every method on a real model with unequal clients: it learns, can be stopped, is saved whole."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fedsieve import methods
from fedsieve.algebra.keys import Key
from fedsieve.engine import personal
from fedsieve.engine.loop import begin, rounds
from fedsieve.recipe import read as recipe
from fedsieve.recipe.experiment import from_recipe
from fedsieve.run import rundir, runner
from fedsieve.tasks.tokens import Texts
from fedsieve.train.model import ResidentModel
from tests import kinds, runs
from tests.conftest import Tiny
from tests.train.test_peft import check_against, logits_of

pytestmark = pytest.mark.usefixtures("no_report")  # it has tests of its own

LIMITS: tuple[dict[str, float], ...] = (
    {"ratio": 0.25, "down": 0.5, "up": 0.25},
    {"ratio": 0.5, "up": 0.5},
    {},
)
OPTIONS: dict[str, dict[str, Any]] = {
    "hetlora": {"pruning": True, "gamma": 0.6, "penalty": 1.0},
    "adapter_lth": {"keep": 0.8},
}


def changes(name: str, **more: Any) -> dict[str, Any]:
    """Half of the clients a round, each with as much of three budgets as the method can use."""
    options = OPTIONS.get(name, {})
    knobs = methods.load(name)(**options).knobs
    budgets = [{k: v for k, v in limit.items() if k in knobs} for limit in LIMITS]
    return {"method": {"name": name, **options}, "budgets": budgets, "cohort": 6, **more}


@pytest.mark.parametrize("name", kinds.each_method())
def test_a_method_learns_and_a_stopped_run_ends_the_same(
    tiny: Tiny, tmp_path: Path, name: str
) -> None:
    given = changes(name, rounds=5, server={"optimizer": "sgd"})
    whole = runs.start(tiny, tmp_path / "whole", **given)
    lines = runs.lines(tmp_path / "whole")
    assert lines[-1]["eval_loss"] < lines[0]["eval_loss"] - 0.02
    assert all(line["dropped"] == 0 for line in lines)

    with pytest.raises(runner.Stopped):
        runs.start(tiny, tmp_path / "stopped", runs.stop_at(2), **given)
    resumed = runner.resume(tmp_path / "stopped", runs.quiet)
    assert resumed.tensors.keys() == whole.tensors.keys()
    assert all(torch.equal(t, whole.tensors[n]) for n, t in resumed.tensors.items())
    assert all(torch.equal(t, whole.base[n]) for n, t in resumed.base.items())
    for log in (rundir.METRICS, rundir.CLIENTS):
        assert runs.untimed(tmp_path / "stopped", log) == runs.untimed(tmp_path / "whole", log)


@pytest.mark.parametrize("name", kinds.each_method("flasc", "fslora_flasc", "fed_select"))
def test_a_stopped_run_that_ranks_the_change_ends_the_same(
    tiny: Tiny, tmp_path: Path, name: str
) -> None:
    """The start is in the checkpoint; it is the one that clients draw anew after the stop."""
    given = changes(name, rounds=4, method={"name": name, "ranked": "change", "evaluated": 0.5})
    runs.start(tiny, tmp_path / "whole", **given)
    with pytest.raises(runner.Stopped):
        runs.start(tiny, tmp_path / "stopped", runs.stop_at(2), **given)
    runner.resume(tmp_path / "stopped", runs.quiet)
    runs.assert_same(tmp_path / "stopped", tmp_path / "whole")
    lines = runs.lines(tmp_path / "whole")
    assert lines[-1]["eval_loss"] < lines[0]["eval_loss"] - 0.02


@pytest.mark.parametrize(
    "name", kinds.each_method("flora", "florist", "fedex_lora", "full", "head")
)
def test_what_is_more_than_an_adapter_is_saved_as_a_model(
    tiny: Tiny, tmp_path: Path, name: str
) -> None:
    runs.start(tiny, tmp_path / "run", **changes(name, rounds=3))
    for folder in (tmp_path / "run" / rundir.ADAPTER, tmp_path / "merged"):
        if not folder.exists():
            runner.export(tmp_path / "run", folder, merge=True)
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        logits, labels = logits_of(model, AutoTokenizer.from_pretrained(tiny.bert), tiny)
        check_against(tmp_path / "run", logits, labels)


def resident_of(tiny: Tiny, name: str) -> ResidentModel:
    return from_recipe(recipe.check(tiny.table(**changes(name)))).resident


def test_what_is_trained_is_all_or_the_head(tiny: Tiny) -> None:
    head = set(resident_of(tiny, "head").layout.names)
    assert head == {"classifier.weight", "classifier.bias"}
    model = AutoModelForSequenceClassification.from_pretrained(tiny.bert)
    everything = dict(model.named_parameters())
    assert set(resident_of(tiny, "full").layout.names) == set(everything)


def test_a_base_is_put_in_and_taken_out_again(tiny: Tiny) -> None:
    resident = resident_of(tiny, "flora")
    adapter = resident.adapter()
    module = adapter.layout.pairs[0].module
    weight = resident.model.get_submodule(module).get_base_layer().weight
    before = weight.detach().clone()
    change = torch.randn_like(before)
    resident.put(adapter._replace(base={f"{module}.base": change}))
    assert torch.equal(weight, before + change)
    resident.put(adapter._replace(base={f"{module}.base": 2 * change}))
    assert torch.equal(weight, before + 2 * change)
    resident.put(adapter)
    assert torch.equal(weight, before)


def test_clients_that_caught_up_share_what_they_hold(tiny: Tiny) -> None:
    """A base of its own for each client would be as many copies as there are clients."""
    experiment = from_recipe(recipe.check(tiny.table(**changes("flora", rounds=3))))
    _, progress = begin(experiment.federation, experiment.start)
    list(rounds(experiment.federation, progress, 3))
    held = [memory["base"] for memory in experiment.memories.values() if "base" in memory]
    versions = {int(m["seen"]["round"]) for m in experiment.memories.values() if "seen" in m}
    assert len(held) > len(versions)
    assert len({tuple(map(id, tree.values())) for tree in held}) == len(versions)


def test_a_client_whose_labels_the_test_lacks_is_evaluated_on_any_rows() -> None:
    ids = torch.zeros(6, 2, dtype=torch.int64)
    test = Texts(ids, ids, torch.tensor([0, 0, 0, 1, 1, 1]))
    own = Texts(ids[:2], ids[:2], torch.tensor([1, 1]))
    assert personal.own_test(test, own, Key(0)).labels.tolist() == [1, 1, 1]
    strange = own._replace(labels=torch.tensor([2, 2]))
    assert sorted(personal.own_test(test, strange, Key(0)).labels.tolist()) == [0, 0, 0, 1, 1, 1]
