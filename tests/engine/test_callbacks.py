"""Callbacks of the user's: told every round once, and a round is never lost over one."""

import sys
from collections.abc import AsyncIterator, Iterator
from functools import partial, wraps
from pathlib import Path
from typing import Any

import pytest

from fedsieve.engine.callbacks import Heard
from fedsieve.engine.loop import Round
from fedsieve.errors import FedSieveError
from fedsieve.recipe import read as recipes
from fedsieve.run import runner
from tests import runs
from tests.conftest import Tiny
from tests.test_api import finetune, rows

pytestmark = pytest.mark.usefixtures("no_report")


def clients() -> list[Any]:
    return [rows(20, seed=number) for number in range(3)]


def broken(summary: Round) -> None:
    if summary.round == 2:
        raise KeyError("no such chart")


def test_each_round_is_told_once_to_all_of_a_list(tiny: Tiny) -> None:
    one: list[Round] = []
    two: list[int] = []
    run = finetune(
        tiny,
        clients(),
        test=rows(12, 9),
        on_round=[one.append, lambda each: two.append(each.round)],
    )
    assert two == []
    next(iter(run))
    assert two == [0, 1]
    run.finish()
    assert two == [0, 1, 2, 3]
    assert one == run.metrics


def leaving(each: Round) -> None:
    if each.round == 2:
        sys.exit(0)


@pytest.mark.parametrize(
    ("callback", "said", "cause"),
    [
        (broken, "broken failed after round 2: KeyError", KeyError),
        (partial(broken), "broken failed after round 2: KeyError", KeyError),
        (leaving, "leaving failed after round 2: SystemExit: 0", SystemExit),
    ],
)
def test_a_callback_that_fails_stops_a_run_by_name_and_its_round_is_kept(
    tiny: Tiny, callback: Any, said: str, cause: type[BaseException]
) -> None:
    seen: list[int] = []
    plain = finetune(tiny, clients()).finish()
    run = finetune(tiny, clients(), on_round=[callback, lambda each: seen.append(each.round)])
    with pytest.raises(FedSieveError, match=said) as error:
        run.finish()
    assert isinstance(error.value.__cause__, cause)
    assert [each.round for each in run.metrics] == [0, 1, 2]
    run.finish()
    assert seen == [0, 1, 2, 3]
    assert [each.total_bytes for each in run.metrics] == [e.total_bytes for e in plain.metrics]


def test_what_is_done_to_a_round_that_was_told_changes_nothing_of_the_run(
    tiny: Tiny, tmp_path: Path
) -> None:
    """A logger that rescales a score must not rescale the card's."""

    def rescale(summary: Round) -> None:
        if summary.metrics:
            summary.metrics["accuracy"] = 99.0

    plain = finetune(tiny, clients(), test=rows(12, 9)).finish()
    run = finetune(tiny, clients(), test=rows(12, 9), on_round=[rescale, rescale])
    for summary in run:
        if summary.metrics:
            summary.metrics.clear()
    run.metrics.clear()
    run.receipts.clear()
    assert [each.metrics for each in run.metrics] == [each.metrics for each in plain.metrics]
    assert len(run.receipts) == len(plain.receipts) > 0
    run.save(tmp_path / "saved")
    assert "99" not in (tmp_path / "saved" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("given", ["print", 3, [print, 3]])
def test_what_cannot_be_called_is_refused(tiny: Tiny, given: Any) -> None:
    with pytest.raises(FedSieveError, match=r"on_round: .* cannot be called"):
        finetune(tiny, clients(), on_round=given)


async def waits(summary: Round) -> None:
    print(summary)


def yields(summary: Round) -> Iterator[Round]:
    yield summary


async def does_both(summary: Round) -> AsyncIterator[Round]:
    yield summary


class Waits:
    async def __call__(self, summary: Round) -> None:
        print(summary)


class Yields:
    def __call__(self, summary: Round) -> Iterator[Round]:
        yield summary


@wraps(waits)
def wrapped(summary: Round) -> object:
    return waits(summary)


NEVER = [waits, yields, does_both, Waits(), Yields(), wrapped, partial(waits), partial(Waits())]


@pytest.mark.parametrize("given", NEVER)
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
def test_what_would_never_run_is_refused(tiny: Tiny, given: Any) -> None:
    """Called, it gives a coroutine or a generator, and nothing of it has been done."""
    with pytest.raises(FedSieveError, match=r"\w+ failed after round [01]: .*it is `async`"):
        finetune(tiny, clients(), on_round=[given]).finish()


def test_a_run_on_disk_goes_on_after_a_callback_that_failed_as_if_nothing_had_happened(
    tiny: Tiny, tmp_path: Path, whole: Path
) -> None:
    """Between two checkpoints, where the round would be lost else."""
    given = recipes.check(tiny.table(checkpoint={"every": 3}))
    folder = tmp_path / "run"
    with pytest.raises(FedSieveError, match=r"broken failed after round 2.*fedsieve resume"):
        runner.start(given, folder, runs.quiet, on_round=[broken])
    assert [line["round"] for line in runs.lines(folder)] == [0, 1, 2]
    seen: list[int] = []
    runner.resume(folder, runs.quiet, on_round=[lambda each: seen.append(each.round)])
    assert seen == [3, 4]
    runs.assert_same(folder, whole)


def test_replies_are_counted_as_they_come(tiny: Tiny, tmp_path: Path, whole: Path) -> None:
    heard: list[Heard] = []
    given = recipes.check(tiny.table())
    runner.start(given, tmp_path / "run", runs.quiet, on_client=heard.append)
    assert [each[:3] for each in heard] == [
        (number, client, 3) for number in (1, 2, 3, 4) for client in (1, 2, 3)
    ]
    assert all(each.left == 0 for each in heard if each.clients == each.of)
    assert all(each.left > 0 for each in heard if each.clients < each.of)
    runs.assert_same(tmp_path / "run", whole)
