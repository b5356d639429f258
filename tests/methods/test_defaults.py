"""What a method does when nobody says which server optimizer it has: that of its paper, in Python,
in a recipe without [server], in a comparison, and when a run is gone on with.
"""

import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fedsieve import methods
from fedsieve.algebra.budget import Budget
from fedsieve.algebra.optim import Optimizer, adam, fading, sgd
from fedsieve.errors import FedSieveError
from fedsieve.methods import fedit
from fedsieve.recipe import read as recipes
from fedsieve.recipe.experiment import from_recipe
from fedsieve.recipe.method import build_method
from fedsieve.run import rundir, runner
from fedsieve.study import plan as study
from tests import runs, toy
from tests.conftest import Tiny

# FLASC's paper runs FLASC and the baselines that have no federated rule of their own under Adam.
ADAM = {"flasc", "fslora_flasc", "sparse_adapter", "adapter_lth", "fed_select"}
SAID: dict[str, Any] = {
    "adam": {"optimizer": "adam", "lr": 5e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8},
    "sgd": {"optimizer": "sgd", "lr": 1.0, "momentum": 0.0},
}

each_method = pytest.mark.parametrize("name", methods.names())


def paper(name: str) -> str:
    return "adam" if name in ADAM else "sgd"


def trained(server: Optimizer | None, name: str) -> dict[str, torch.Tensor]:
    """The tensors after three rounds of a method whose own server is overridden, or not."""
    given = {} if server is None else {"server": server}
    method = methods.load(name)(down_values="float64", up_values="float64", **given)
    return toy.after(method, toy.clients([Budget(0.5, 0.5, 0.5), Budget()]), 3)[0]


def test_flascs_first_step_is_that_of_torchs_adam() -> None:
    """Each entry that some client returned moves by lr in the first round: Adam's first step."""
    method = methods.load("flasc")(down_values="float64", up_values="float64")
    after, _, _ = toy.after(method, toy.clients([Budget()] * 2), 1)
    start = toy.start().tensors
    moved = torch.cat([(after[n] - start[n]).abs().flatten() for n in start])
    torch.testing.assert_close(moved, torch.full_like(moved, 5e-3), rtol=1e-2, atol=0)


@each_method
def test_a_method_has_the_server_of_its_paper(name: str) -> None:
    own = {"adam": adam(5e-3, 0.9, 0.999), "sgd": sgd(1.0)}
    found, expected = trained(None, name), trained(own[paper(name)], name)
    assert all(torch.equal(found[n], expected[n]) for n in expected)
    other = trained(own["sgd" if name in ADAM else "adam"], name)
    assert toy.distance(found, other) > 1e-4


def table_of(tiny: Tiny, name: str, server: dict[str, Any] | None) -> dict[str, Any]:
    return tiny.table(method={"name": name}, budgets=[{}], server=server)


@each_method
@pytest.mark.parametrize("written", [None, {}, {"decay": 1.0}], ids=["no table", "empty", "decay"])
def test_a_recipe_that_names_no_server_takes_the_methods_own(
    tiny: Tiny, name: str, written: dict[str, Any] | None
) -> None:
    given = recipes.check(table_of(tiny, name, written))
    assert build_method(given).server.table == SAID[paper(name)]
    # Written out, so that it stays what it is; and read again it is the same.
    text = recipes.dump(given, {})
    told = tomllib.loads(text)
    del told["environment"]
    of_the_step = {k: v for k, v in told["server"].items() if k not in ("decay", "norm_bound")}
    assert of_the_step == SAID[paper(name)]
    assert recipes.check(told) == given


@each_method
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "fedadam"])
def test_a_recipe_that_names_a_server_takes_that(tiny: Tiny, name: str, optimizer: str) -> None:
    given = recipes.check(table_of(tiny, name, {"optimizer": optimizer, "lr": 0.3}))
    assert given.server.model_extra == {"lr": 0.3}
    found = build_method(given).server.table
    assert (found["optimizer"], found["lr"]) == (optimizer, 0.3)


def test_what_stands_in_the_table_changes_the_methods_own(tiny: Tiny) -> None:
    given = recipes.check(table_of(tiny, "flasc", {"lr": 2e-3, "decay": 0.9, "clip": 2.0}))
    assert build_method(given).server.table == {**SAID["adam"], "lr": 2e-3, "decay": 0.9, "clip": 2}
    given = recipes.check(table_of(tiny, "fedit", {"momentum": 0.9}))
    assert build_method(given).server.table == {**SAID["sgd"], "momentum": 0.9}
    # The names are told at once, whether they fit the method's own when it is built.
    for name, key in (("flasc", "momentum"), ("fedit", "beta1"), ("fedit", "lrr")):
        with pytest.raises(FedSieveError, match=rf"server\.{key}: unknown key"):
            recipes.check(table_of(tiny, name, {key: 0.5}))
    with pytest.raises(FedSieveError, match=r"server\.lrr: unknown key \(did you mean 'lr'\?\)"):
        recipes.parse(table_of(tiny, "fedit", {"lrr": 0.5}))


def test_your_own_method_may_have_a_server_that_no_recipe_can_name(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    backwards = Optimizer(lambda params: {}, lambda p, g, s: ({n: p[n] + g[n] for n in p}, s))

    def method(*, server: Optimizer | None = None) -> Any:
        return fedit.method(server=backwards if server is None else server)

    module = ModuleType("mine.own")
    module.method = method  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mine", ModuleType("mine"))
    monkeypatch.setitem(sys.modules, "mine.own", module)
    given = recipes.check(table_of(tiny, "mine.own", None), allow_code=True)
    assert build_method(given).server is backwards
    with_clip = recipes.check(table_of(tiny, "mine.own", {"clip": 1.0}), allow_code=True)
    assert build_method(with_clip).server.step is backwards.step
    assert build_method(with_clip).server.clip({}) == 1.0
    with pytest.raises(FedSieveError, match=r"server\.lr: unknown key"):
        recipes.check(table_of(tiny, "mine.own", {"lr": 1.0}), allow_code=True)
    named = recipes.check(table_of(tiny, "mine.own", {"optimizer": "sgd"}), allow_code=True)
    assert build_method(named).server.table == SAID["sgd"]


def test_optimizers_tell_the_table_that_makes_them() -> None:
    assert fading(adam(0.5), 0.9).table == {**SAID["adam"], "lr": 0.5, "decay": 0.9}


# --- runs


@pytest.mark.parametrize("named", [False, True])
def test_a_run_is_gone_on_with_by_the_server_that_it_began_with(
    tiny: Tiny, tmp_path: Path, no_report: None, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    """A later version has another default; and 0.1 wrote plain means out for FLASC."""
    server = {"optimizer": "sgd"} if named else None
    changes: dict[str, Any] = {**runs.FLASC, "rounds": 2, "server": server}
    runs.start(tiny, tmp_path / "run", **changes)
    expected = SAID["sgd" if named else "adam"]
    with monkeypatch.context() as patch:
        patch.setattr("fedsieve.methods.flasc.adam", lambda: sgd(7.0))
        given = recipes.load(str(tmp_path / "run" / rundir.RECIPE), ["rounds=4"])
        assert build_method(given).server.table == expected
        (tmp_path / "run" / rundir.RECIPE).write_text(recipes.dump(given, {}), encoding="utf-8")
        resumed = runner.resume(tmp_path / "run", runs.quiet, accept_changes=True)
    whole = runs.start(tiny, tmp_path / "whole", **{**changes, "rounds": 4})
    assert all(torch.equal(resumed.tensors[n], whole.tensors[n]) for n in whole.tensors)


def test_an_experiment_has_the_server_of_its_recipe(tiny: Tiny) -> None:
    """Also one that was made of tables and never checked."""
    from fedsieve.recipe.schema import Recipe

    unchecked = Recipe.model_validate(table_of(tiny, "flasc", None))
    assert from_recipe(unchecked).federation.method.server.table == SAID["adam"]


# --- comparisons


def test_a_comparison_without_a_server_gives_each_method_its_own(
    tiny: Tiny, tmp_path: Path
) -> None:
    path = tiny.write(tmp_path / "tiny.toml", server=None, method={"name": "fedit"}, budgets=[{}])
    planned = study.plan(str(path), tmp_path / "out", methods=["fedit", "flasc", "fslora"])
    found = {each.name: study.recipe_of(each, {}, 0) for each in planned.entries}
    assert {n: build_method(r).server.table for n, r in found.items()} == {
        "fedit": SAID["sgd"], "flasc": SAID["adam"], "fslora": SAID["sgd"],
    }  # fmt: skip


def test_a_comparison_drops_what_the_methods_own_server_does_not_have(
    tiny: Tiny, tmp_path: Path
) -> None:
    server = {"beta1": 0.5, "lr": 0.25, "clip": 3.0}
    path = tiny.write(tmp_path / "tiny.toml", server=server, budgets=[{}], method={"name": "flasc"})
    planned = study.plan(str(path), tmp_path / "out", methods=["fedit", "flasc", "hetlora"])
    dense, sieved, hetero = planned.entries
    assert dense.notes == ("has no server.beta1",)
    assert sieved.notes == ()
    assert hetero.notes == ("has no server.beta1 and no server.clip",)
    of = {each.name: study.recipe_of(each, {}, 0) for each in planned.entries}
    assert build_method(of["fedit"]).server.table == {**SAID["sgd"], "lr": 0.25, "clip": 3.0}
    assert build_method(of["flasc"]).server.table["beta1"] == 0.5
    assert of["hetlora"].server.clip is None
