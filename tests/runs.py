"""Runs on disk for tests: make one, stop one, compare two."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from fedsieve.algebra.adapter import Adapter
from fedsieve.algebra.keys import Key
from fedsieve.engine.loop import Receipt, Round
from fedsieve.recipe import read as recipe
from fedsieve.recipe.schema import Recipe
from fedsieve.run import rundir, runner
from fedsieve.tasks.tally import Tally
from fedsieve.train import local
from fedsieve.train.local import Fit
from tests.conftest import Tiny

# What a clock measures differs from run to run; everything else must not.
CLOCKS = {
    "seconds", "compute", "wire", "compute_seconds", "evaluation_seconds", "wire_seconds",
}  # fmt: skip

# A method whose clients remember what they did not send.
FLASC: dict[str, Any] = {
    "method": {"name": "flasc", "feedback": True, "up_values": "int8"},
    "budgets": [{"up": 0.1}, {"down": 0.5, "up": 0.25}],
    "rounds": 5,
    "cohort": 8,
}


def quiet(summary: Round, receipts: Sequence[Receipt]) -> None:
    """Show nothing."""


def start(
    tiny: Tiny,
    folder: Path,
    show: Callable[[Round, Sequence[Receipt]], None] = quiet,
    **changes: Any,
) -> Adapter:
    """Run a tiny recipe, without the report, which takes longer than the run."""
    return start_from(recipe.check(tiny.table(**changes)), folder, show)


def start_from(
    given: Recipe, folder: Path, show: Callable[[Round, Sequence[Receipt]], None] = quiet
) -> Adapter:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedsieve.report.write", lambda *_: [])
        return runner.start(given, folder, show)


def start_language_model(tiny: Tiny, folder: Path, **changes: Any) -> Adapter:
    """`start` of the tiny GPT-2, whose tokenizer has no padding token."""
    with pytest.warns(UserWarning, match="no padding token"):
        return start(
            tiny,
            folder,
            model={"source": str(tiny.gpt2), "task": "causal-lm"},
            data__label=None,
            **changes,
        )


def lines(folder: Path, log: str = rundir.METRICS) -> list[dict[str, Any]]:
    text = (folder / log).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def untimed(folder: Path, log: str) -> list[str]:
    """The lines of a log with the timings taken out, as text again: keys keep their order."""
    return [
        json.dumps({key: value for key, value in line.items() if key not in CLOCKS})
        for line in lines(folder, log)
    ]


def assert_same(folder: Path, other: Path) -> None:
    """Two runs ended with the same bytes: adapter, metrics and clients, timings aside."""
    assert_same_adapter(folder / rundir.ADAPTER, other / rundir.ADAPTER)
    for log in (rundir.METRICS, rundir.CLIENTS):
        assert untimed(folder, log) == untimed(other, log), log


def assert_same_adapter(folder: Path, other: Path) -> None:
    """Two adapters of the same bytes, but for where their bases are: beside each, or the same."""
    weights, config = "adapter_model.safetensors", "adapter_config.json"
    assert (folder / weights).read_bytes() == (other / weights).read_bytes()
    one, two = ((each / config).read_text(encoding="utf-8") for each in (folder, other))
    assert one.replace(str(folder.resolve()), "") == two.replace(str(other.resolve()), "")


def stop_at(number: int) -> Callable[[Round, Sequence[Receipt]], None]:
    """A callback that is a Ctrl-C after round `number`."""

    def show(summary: Round, receipts: Sequence[Receipt]) -> None:
        if summary.round == number:
            raise KeyboardInterrupt

    return show


def before_fit(monkeypatch: pytest.MonkeyPatch, act: Callable[[Key, Any], Any]) -> None:
    """Let `act(key, training)` say with which training a client really trains, or raise."""
    fit = local.fit

    def changed(resident: Any, adapter: Any, examples: Any, training: Any, key: Key) -> Fit:
        return fit(resident, adapter, examples, act(key, training), key)

    monkeypatch.setattr("fedsieve.recipe.experiment.fit", changed)


def before_evaluation(monkeypatch: pytest.MonkeyPatch, act: Callable[[int], None]) -> None:
    """Call `act(n)` before the n-th evaluation, counted from 0."""
    tally = local.tally
    count = iter(range(10_000))

    def changed(*args: Any, **given: Any) -> Tally:
        act(next(count))
        return tally(*args, **given)

    monkeypatch.setattr("fedsieve.recipe.experiment.tally", changed)
