"""Noise that cannot be drawn again: of each round at most one noisy version is ever given out.

A run is killed at every line of the code that carries it (loop, runner, checkpoints, directory),
and goes on, killed again or not. All that leaves is collected: what is evaluated, what clients
start from, what is saved. A second version of a round would be another release, which epsilon does
not count.
"""

import hashlib
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import torch

from fedsieve.algebra.adapter import Adapter
from fedsieve.algebra.budget import Budget, Client
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import View
from fedsieve.algebra.optim import adam
from fedsieve.clients.noise import private
from fedsieve.engine import loop
from fedsieve.engine.local import in_process
from fedsieve.engine.loop import Federation
from fedsieve.errors import FedSieveError
from fedsieve.methods import fedit
from fedsieve.recipe import read as recipes
from fedsieve.recipe.experiment import Experiment
from fedsieve.recipe.schema import Recipe
from fedsieve.run import checkpoint, rundir, runner
from fedsieve.settings import Sampling
from fedsieve.tasks.tally import Score
from fedsieve.train.card import Told
from fedsieve.train.local import Fit
from tests import runs, toy
from tests.conftest import Tiny

pytestmark = pytest.mark.usefixtures("no_report")

ROUNDS = 2
CARRYING = {loop.__file__, runner.__file__, checkpoint.__file__, rundir.__file__}
SECRET = rundir.new_secret()
PRIVACY = {"clip": 0.1, "delta": 1e-3, "noise_multiplier": 1.0, "noise_from": "system"}


class Killed(BaseException):
    """The process is gone: nothing catches it."""


@pytest.fixture
def text(tiny: Tiny) -> str:
    sampling = {"kind": "poisson"}
    recipe = recipes.check(tiny.table(rounds=ROUNDS, privacy=PRIVACY, sampling=sampling))
    return recipes.dump(recipe, rundir.told_of(SECRET))


def begun(folder: Path, text: str) -> Path:
    folder.mkdir()
    rundir.create(folder, text, secret=SECRET)
    return folder


def building(out: list[str], before: Callable[[str], None] = lambda what: None) -> runner.Build:
    """A toy federation that writes down every adapter that leaves, as a digest."""

    def left(what: str, adapter: Adapter) -> None:
        before(what)
        numbers = [adapter.tensors[name].numpy().tobytes() for name in sorted(adapter.tensors)]
        out.append(hashlib.sha256(b"".join(numbers)).hexdigest())

    def score(adapter: Adapter) -> Score:
        left("evaluation", adapter)
        return Score(1.0, {"accuracy": 0.5}, 10)

    def train(view: View, client: Client, key: Key) -> Fit:
        left("message", view.adapter)
        return toy.train(view, client, key, steps=1)

    def save(adapter: Adapter, folder: Path, told: Told, *, home: Path) -> None:
        left("adapter", adapter)
        folder.mkdir()

    def build(recipe: Recipe) -> Experiment:
        server = private(
            adam(), clip=0.1, noise_multiplier=1.0, expected=2, key=Key(0), noise_from="system"
        )
        method = fedit.method(server=server, down_values="float64", up_values="float64")
        resident: Any = SimpleNamespace(
            layout=toy.start().layout,
            digest=None,
            save=save,
            put=lambda _: None,
            device="cpu",
            body=None,
            tokenizer=None,
        )
        federation = Federation(
            method,
            toy.clients([Budget()]),
            Sampling("all"),
            7,
            in_process(method, train, toy.start(), {}),
            evaluate=score,
        )
        return Experiment(recipe, federation, resident, toy.start(), {}, ())

    return build


Place = tuple[str, int]  # file, line


def killed_at(place: Place | None, work: Callable[[], object]) -> list[Place]:
    """Do something until a place in the carrying code is reached, in a round or after it.

    Returns the places on the way there, each once.
    """
    places: dict[Place, None] = {}
    begun = False

    def local(frame: FrameType, event: str, given: object) -> Any:
        nonlocal begun
        begun = begun or frame.f_code is loop.merged.__code__
        if event == "line" and begun:
            here = frame.f_code.co_filename, frame.f_lineno
            places[here] = None
            if here == place:
                raise Killed
        return local

    def enter(frame: FrameType, event: str, given: object) -> Any:
        return local if frame.f_code.co_filename in CARRYING else None

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        work()
    except Killed:
        pass
    finally:
        sys.settrace(before)
    return list(places)


@pytest.mark.parametrize("apart", [pytest.param(1, marks=pytest.mark.slow), 6])
def test_killed_at_every_line_one_version_of_each_round_leaves(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apart: int
) -> None:
    whole: list[str] = []
    folder = begun(tmp_path / "whole", text)
    places = killed_at(None, lambda: runner.resume(folder, runs.quiet, building(whole)))
    assert len(set(whole)) == ROUNDS + 1
    for number, place in enumerate(places[::apart]):
        out: list[str] = []
        folder = begun(tmp_path / str(number), text)
        build = building(out)
        killed_at(place, lambda: runner.resume(folder, runs.quiet, build))  # noqa: B023
        if number % 4 == 0:
            killed_at(place, lambda: runner.resume(folder, runs.quiet, build))  # noqa: B023
        runner.resume(folder, runs.quiet, build)
        assert len(set(out)) == ROUNDS + 1, place
        rows = runs.lines(folder)
        assert [(row["round"], row["accuracy"]) for row in rows] == [(0, 0.5), (1, 0.5), (2, 0.5)]


def test_nothing_leaves_before_it_is_on_the_disk(text: str, tmp_path: Path) -> None:
    folder = begun(tmp_path / "run", text)
    names = []

    def look(what: str) -> None:
        kept = rundir.place(folder, rundir.CHECKPOINTS)
        names.append((what, checkpoint.newest_round(kept)[0]))

    runner.resume(folder, runs.quiet, building([], look))
    evaluated = [number for what, number in names if what == "evaluation"]
    assert evaluated == [0, 1, 2]
    assert [number for what, number in names if what == "adapter"] == [2]


def test_stopped_in_an_evaluation_the_round_is_kept(text: str, tmp_path: Path) -> None:
    folder, out = begun(tmp_path / "run", text), list[str]()
    seen = iter(range(9))

    def stop(what: str) -> None:
        if what == "evaluation" and next(seen) == 1:
            raise KeyboardInterrupt

    with pytest.raises(runner.Stopped, match="stopped after round 1 of 2"):
        runner.resume(folder, runs.quiet, building(out, stop))
    assert len(runs.lines(folder)) == 1
    runner.resume(folder, runs.quiet, building(out))
    assert len(set(out)) == ROUNDS + 1
    assert [row["accuracy"] for row in runs.lines(folder)] == [0.5] * 3


@pytest.mark.parametrize("how", ["damaged", "gone", "all gone"])
def test_a_lost_checkpoint_is_not_done_again(text: str, tmp_path: Path, how: str) -> None:
    folder, out = begun(tmp_path / "run", text), list[str]()
    runner.resume(folder, runs.quiet, building(out))
    kept = rundir.place(folder, rundir.CHECKPOINTS)
    newest = sorted(kept.glob("round-*"))[-1]
    if how == "damaged":
        newest.write_bytes(newest.read_bytes()[:-20])
        # Killed before the line in the log: the file's name alone tells of the round.
        lines = (folder / rundir.METRICS).read_bytes().splitlines(keepends=True)
        (folder / rundir.METRICS).write_bytes(b"".join(lines[:-1]))
    for path in [newest] if how == "gone" else kept.glob("*") if how == "all gone" else []:
        path.unlink()
    if how == "all gone":
        rundir.place(folder, rundir.CLIENTS).write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="damaged") if how == "damaged" else nullcontext(),
        pytest.raises(FedSieveError, match="a later round was given out already"),
    ):
        runner.resume(folder, runs.quiet, building(out))
    assert len(set(out)) == ROUNDS + 1


def test_without_its_secret_a_run_does_not_go_on(text: str, tmp_path: Path) -> None:
    folder = begun(tmp_path / "run", text)
    (rundir.own(folder) / rundir.SEED).unlink()
    with pytest.raises(FedSieveError, match=r"run\.secret/seed cannot be read .*put .* back"):
        runner.resume(folder, runs.quiet, building([]))


OTHER_SEEDS = {
    "empty": ("", "cannot be read"),
    "cut to 2 digits": (SECRET[:2], "cannot be read"),
    "cut to half": (SECRET[:32], "cannot be read"),
    "a digit short": (SECRET[:-1], "cannot be read"),
    "a digit more": (SECRET + "0", "cannot be read"),
    "doubled": (SECRET * 2, "cannot be read"),
    "with a sign": ("-" + SECRET[1:], "cannot be read"),
    "another run's": (rundir.new_secret(), "is not the seed that this run began with"),
    "one digit of it": (f"{SECRET[:-1]}{int(SECRET[-1], 16) ^ 1:x}", "is not the seed"),
}


@pytest.mark.parametrize("other", OTHER_SEEDS)
@pytest.mark.parametrize("after", [0, 2])
def test_with_another_secret_a_run_does_not_go_on(
    text: str, tmp_path: Path, other: str, after: int
) -> None:
    """Draws that never were would be worked out of it, and epsilon be told of those."""
    folder = begun(tmp_path / "run", text)
    seed, (there, why) = rundir.own(folder) / rundir.SEED, OTHER_SEEDS[other]
    if after:
        with pytest.raises(runner.Stopped):
            runner.resume(folder, runs.stop_at(after), building([]))
    seed.write_text(there, encoding="ascii")
    before = {path: path.read_bytes() for path in rundir.own(folder).rglob("*") if path.is_file()}
    with pytest.raises(FedSieveError, match=rf"run\.secret/seed {why}.*put .* back"):
        runner.resume(folder, runs.quiet, building([]))
    assert before == {path: path.read_bytes() for path in before}
    seed.write_text(SECRET, encoding="ascii")
    runner.resume(folder, runs.quiet, building([]))


def test_a_run_whose_seed_tells_who_takes_part_does_not_go_on(text: str, tmp_path: Path) -> None:
    """As version 0.1 wrote it: all in one directory, cohorts by the recipe's seed."""
    folder = tmp_path / "run"
    folder.mkdir()
    rundir.create(folder, text)
    with pytest.raises(FedSieveError, match=r"is of an older FedSieve, .* start it again"):
        runner.resume(folder, runs.quiet, building([]))


def test_in_a_notebook_a_round_is_not_merged_again() -> None:
    """An evaluation that fails is tried again alone."""
    from fedsieve.api import Run

    out: list[str] = []
    seen = iter(range(9))

    def stop(what: str) -> None:
        if what == "evaluation" and next(seen) == 1:
            raise ValueError("the evaluation has failed")

    nobody: Any = None
    run = Run(building(out, stop)(nobody), ROUNDS)
    with pytest.raises(ValueError, match="has failed"):
        run.finish()
    state = {n: t.clone() for n, t in run.adapter.tensors.items()}
    first = next(iter(run))
    assert first.round == 1
    assert all(torch.equal(t, run.adapter.tensors[n]) for n, t in state.items())
    run.finish()
    assert [each.round for each in run.metrics] == [0, 1, 2]
    assert len(set(out)) == ROUNDS + 1
