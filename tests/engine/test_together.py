"""Clients of a cohort at once: every method ends where one client after another does."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsieve import methods
from fedsieve.algebra.adapter import Adapter
from fedsieve.engine import together
from fedsieve.engine.client import Asked
from fedsieve.errors import FedSieveError
from fedsieve.recipe import read as recipe
from fedsieve.recipe.experiment import from_recipe
from fedsieve.run import rundir, runner
from tests import kinds, runs
from tests.conftest import Tiny
from tests.engine.test_methods import changes
from tests.train.test_cuda import STILL

pytestmark = pytest.mark.usefixtures("no_report")
# AdamW moves by the sign of a gradient that is nearly zero, and that is rounding's to say.
PLAIN: dict[str, Any] = {
    "model__settings": STILL,
    "lora__dropout": 0.0,
    "training__optimizer": "sgd",
    "training__lr": 0.1,
}


def given(name: str, size: int | str, **more: Any) -> dict[str, Any]:
    server = {"optimizer": "sgd"}
    return changes(name, rounds=3, server=server, engine={"together": size}, **more)


def close(ours: Adapter, theirs: Adapter) -> None:
    for tree, other in ((ours.tensors, theirs.tensors), (ours.base, theirs.base)):
        assert tree.keys() == other.keys()
        for key, tensor in tree.items():
            away = float((tensor - other[key]).norm())
            assert away <= 1e-3 * float(other[key].norm()) + 1e-6, key


@pytest.mark.parametrize("name", kinds.each_method(*(n for n in methods.names() if n != "full")))
def test_a_method_ends_where_one_client_after_another_does(
    tiny: Tiny, tmp_path: Path, name: str
) -> None:
    """Memories, too: what clients keep is what they had kept."""
    alone = runs.start(tiny, tmp_path / "alone", **given(name, 1, **PLAIN))
    ours = runs.start(tiny, tmp_path / "ours", **given(name, 4, **PLAIN))
    close(ours, alone)
    logs = (runs.lines(tmp_path / "ours")[1:], runs.lines(tmp_path / "alone")[1:])
    for mine, other in zip(*logs, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-3)
        for way in ("down_bytes", "up_bytes"):
            assert mine[way] == pytest.approx(other[way], rel=0.02)
    assert mine["eval_loss"] == pytest.approx(other["eval_loss"], abs=1e-3)


@pytest.mark.parametrize(
    "name", kinds.each_method("fslora_flasc", "flora", "hetlora", "fedsa_lora")
)
def test_a_run_with_dropout_repeats_itself_also_when_stopped(
    tiny: Tiny, tmp_path: Path, name: str
) -> None:
    whole = runs.start(tiny, tmp_path / "whole", **given(name, 4))
    again = runs.start(tiny, tmp_path / "again", **given(name, 4))
    assert all(torch.equal(t, again.tensors[n]) for n, t in whole.tensors.items())
    with pytest.raises(runner.Stopped):
        runs.start(tiny, tmp_path / "stopped", runs.stop_at(1), **given(name, 4))
    resumed = runner.resume(tmp_path / "stopped", runs.quiet)
    assert all(torch.equal(t, resumed.tensors[n]) for n, t in whole.tensors.items())
    for log in (rundir.METRICS, rundir.CLIENTS):
        lines = runs.untimed(tmp_path / "whole", log)
        assert runs.untimed(tmp_path / "again", log) == lines
        assert runs.untimed(tmp_path / "stopped", log) == lines


def test_the_faster_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("fedsieve.engine.together.time.perf_counter", lambda: now[0])
    calls: list[tuple[str, int]] = []

    class Done:
        steps = 3

    def way(name: str, cost: float) -> Any:
        def take(asked: Iterator[Asked]) -> Iterator[Any]:
            some = list(asked)
            calls.append((name, len(some)))
            now[0] += cost * len(some)
            yield from ((Done, {}) for _ in some)

        return take

    def cohorts(alone: float, at_once: float, *sizes: int) -> tuple[list[tuple[str, int]], str]:
        calls.clear()
        said: list[str] = []
        take = together._measured(way("alone", alone), way("at once", at_once), said.append)
        for size in sizes:
            assert len(list(take(iter([None] * size)))) == size  # type: ignore[list-item]
        return [call for call in calls if call[1]], "".join(said)

    asked, said = cohorts(1.0, 0.5, 20, 5)
    assert asked == [("alone", 1), ("alone", 2), ("at once", 8), ("at once", 9), ("at once", 5)]
    assert "8 clients at once are 2.00 times as fast as one after another: kept" in said
    asked, said = cohorts(1.0, 2.0, 9, 9)
    assert asked[2:] == [("at once", 6), ("alone", 9)]
    assert "0.50 times as fast as one after another: not kept" in said
    asked, said = cohorts(1.0, 0.1, 3, 2, 3)  # never enough to tell
    assert {name for name, _ in asked} == {"alone"}
    assert not said


def test_auto_runs_and_says_what_it_found(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="together: 4 clients at once are"):
        runs.start(tiny, tmp_path / "run", **given("fedit", "auto", cohort=7))


def test_what_cannot_be_is_refused_or_left(tiny: Tiny) -> None:
    table = tiny.table(**given("full", 4))
    with pytest.raises(FedSieveError, match=r"engine\.together: this bert model cannot"):
        from_recipe(recipe.check(table))
    with pytest.warns(UserWarning, match="engine.together: this bert model cannot"):
        from_recipe(recipe.check(tiny.table(**given("full", "auto"))))
    for wrong in ({"together": 0}, {"together": "all"}, {"kind": "processes", "together": 2}):
        with pytest.raises(FedSieveError, match=r"engine\.together|together: workers"):
            recipe.check(tiny.table(engine=wrong))
