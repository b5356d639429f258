"""A run that is stopped, anywhere and in any way, ends as one that never was: byte for byte."""

import contextlib
import errno
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from PIL import Image
from safetensors import SafetensorError

from fedsieve import disk, report
from fedsieve.algebra.keys import Key
from fedsieve.errors import FedSieveError
from fedsieve.recipe import read as recipe
from fedsieve.recipe.experiment import from_recipe
from fedsieve.run import checkpoint, rundir, runner
from fedsieve.run.runner import Stopped
from fedsieve.train.digest import tensors_digest
from tests import kinds, runs
from tests.conftest import Command, Tiny
from tests.runs import FLASC

pytestmark = pytest.mark.usefixtures("no_report")  # it has tests of its own


def checkpoints(folder: Path) -> list[Path]:
    """Newest first."""
    return sorted((folder / rundir.CHECKPOINTS).glob("round-*"), reverse=True)


def interrupted(tiny: Tiny, folder: Path, number: int, **changes: Any) -> None:
    with pytest.raises(Stopped, match=f"stopped after round {number} of"):
        runs.start(tiny, folder, runs.stop_at(number), **changes)


def stopped_in_its_evaluation(monkeypatch: pytest.MonkeyPatch, folder: Path, **given: Any) -> None:
    """A run of two rounds by now that is resumed, and is stopped before its last is evaluated."""

    def stop(number: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        runs.before_evaluation(patch, stop)
        with pytest.raises(Stopped, match="stopped after round 2 of 2"):
            runner.resume(folder, runs.quiet, **given)


# --- runs of an older FedSieve


def test_a_run_whose_adam_had_one_count_is_not_gone_on_with(
    tiny: Tiny, tmp_path: Path, command: Command
) -> None:
    """Its checkpoint is of before each tensor had a count of its own; its adapter can be had."""
    folder = tmp_path / "run"
    interrupted(tiny, folder, 2)
    path = checkpoints(folder)[0]
    facts, tensors = checkpoint._read(path)
    kept = {n: t for n, t in tensors.items() if not n.startswith("state/count/")}
    assert len(kept) < len(tensors)
    kept["state/count/steps"] = torch.tensor(2.0)
    facts["same"] = {n: o for n, o in facts["same"].items() if not n.startswith("state/count/")}
    text = json.dumps(facts)
    data = {"facts": text, "digest": tensors_digest(kept, text)}
    path.write_bytes(safetensors.torch.save(kept, data))
    with pytest.raises(FedSieveError, match=r"one count of Adam's steps.*start it again"):
        runner.resume(folder, runs.quiet)
    assert command("export", folder, "--to", tmp_path / "adapter").code == 0


# --- Ctrl-C


def test_a_run_that_is_finished_is_said_to_be(
    tiny: Tiny, whole: Path, tmp_path: Path, command: Command
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / rundir.REPORT).write_text("as it was left")
    ran = command("resume", tmp_path / "run")
    assert ran.code == 0
    assert "this run is finished: all of its 4 rounds are done" in ran.out
    assert "accuracy" in ran.out
    assert "loading" not in ran.out  # there is nothing to do
    interrupted(tiny, tmp_path / "half", 2)
    assert "this run is finished" not in command("resume", tmp_path / "half").out


# Of a run's adapter.
WEIGHTS, SAID = "adapter_model.safetensors", "adapter_config.json"


@pytest.mark.parametrize(
    ("name", "left"),
    [
        (rundir.REPORT, None),
        (f"{rundir.ADAPTER}/{WEIGHTS}", None),
        (f"{rundir.ADAPTER}/{WEIGHTS}", b""),
        (f"{rundir.ADAPTER}/{WEIGHTS}", slice(None, -1)),
        (f"{rundir.ADAPTER}/{WEIGHTS}", b"\xff" * 4000),
        (f"{rundir.ADAPTER}/{SAID}", b""),
        (f"{rundir.ADAPTER}/{SAID}", slice(None, -9)),
    ],
)
def test_a_finished_run_whose_files_are_gone_or_cut_gets_them_again(
    whole: Path, tmp_path: Path, command: Command, name: str, left: bytes | slice | None
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / rundir.REPORT).write_text("as it was left")
    was = (whole / name).read_bytes() if (whole / name).exists() else b""
    if left is None:
        (run / name).unlink(missing_ok=True)
    else:
        (run / name).write_bytes(was[left] if isinstance(left, slice) else left)
    out = " ".join(command("resume", run).out.split())
    assert "is missing or damaged of its last scores, its adapter or its report is made" in out
    if name.endswith(WEIGHTS):
        assert (run / name).read_bytes() == was
    elif name.endswith(SAID):
        assert json.loads((run / name).read_text()).keys() == json.loads(was).keys()


def test_fewer_rounds_than_are_done_are_refused_before_anything_is_loaded(
    whole: Path, command: Command
) -> None:
    ran = command("resume", whole, "--rounds", "2")
    assert ran.code == 2
    assert "--rounds 2: 4 are done already; `--at-round` goes back" in " ".join(ran.err.split())
    assert "loading" not in ran.out


# --- more rounds than were asked for


@pytest.mark.parametrize(("first", "stop"), [(2, 2), (6, 2), (3, 1)])
def test_a_run_with_another_number_of_rounds_ends_as_one_that_had_it(
    tiny: Tiny, whole: Path, tmp_path: Path, first: int, stop: int
) -> None:
    """Finished or stopped before; stopped again afterwards, it goes on by its new recipe."""
    folder = tmp_path / "run"
    with contextlib.suppress(Stopped):
        runs.start(tiny, folder, runs.stop_at(stop), rounds=first)
    with pytest.raises(Stopped, match="stopped after round 3 of 4"):
        runner.resume(folder, runs.stop_at(3), rounds=4)
    runner.resume(folder, runs.quiet)
    runs.assert_same(folder, whole)
    assert rundir.environment("cpu")["torch"] in (folder / rundir.RECIPE).read_text()


@pytest.mark.parametrize("killed", [False, True], ids=["at once", "killed in its evaluation"])
@pytest.mark.parametrize("by", ["--rounds", "an edit"])
def test_a_round_that_has_become_the_last_is_evaluated(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str, killed: bool
) -> None:
    """It had no evaluation as one of many: the untrained model's score was shown as the run's."""
    folder, other = tmp_path / "run", tmp_path / "other"
    runs.start(tiny, other, rounds=2, evaluation__every=5)
    interrupted(tiny, folder, 2, rounds=6, evaluation__every=5)
    assert "eval_examples" not in runs.lines(folder)[-1]
    given: dict[str, Any] = {"rounds": 2}
    if by == "an edit":
        path = folder / rundir.RECIPE
        path.write_text(path.read_text().replace("rounds = 6", "rounds = 2"))
        given = {"accept_changes": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if killed:
            stopped_in_its_evaluation(monkeypatch, folder, **given)
        runner.resume(folder, runs.quiet, **given)
    runs.assert_same(folder, other)
    card = (folder / rundir.ADAPTER / "README.md").read_text(encoding="utf-8")
    assert "accuracy" in card.lower()


def test_a_round_that_waits_for_its_evaluation_counts_as_done(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its line is not in the log yet."""
    folder = tmp_path / "run"
    interrupted(tiny, folder, 2, rounds=6, evaluation__every=5)
    stopped_in_its_evaluation(monkeypatch, folder, rounds=2)
    with pytest.raises(FedSieveError, match="2 rounds are done already, and it is to have 1"):
        runner.resume(folder, runs.quiet, rounds=1)
    runner.resume(folder, runs.quiet, rounds=2)


@pytest.mark.parametrize("every", [1, 5])
def test_a_run_can_end_at_an_earlier_checkpoint(
    tiny: Tiny, tmp_path: Path, command: Command, every: int
) -> None:
    folder, other = tmp_path / "run", tmp_path / "other"
    given: dict[str, Any] = {"evaluation__every": every, "checkpoint__every": 1}
    runs.start(tiny, other, rounds=2, **given)
    runs.start(tiny, folder, rounds=3, **given)
    ran = command("resume", folder, "--at-round", "2", "--rounds", "1")
    assert ran.code == 2
    assert "--rounds 1: after --at-round 2 so many are done already" in " ".join(ran.err.split())
    ran = command("resume", folder, "--at-round", "2", "--rounds", "2")
    assert ran.code == 0, ran.err
    runs.assert_same(folder, other)
    assert (folder / rundir.EVALUATION).read_text() == (other / rundir.EVALUATION).read_text()


def test_an_adapter_of_fewer_rounds_does_not_end_a_run(tiny: Tiny, tmp_path: Path) -> None:
    """It had ended, was given more rounds, stopped, and ends where it stopped."""
    folder, other = tmp_path / "run", tmp_path / "other"
    runs.start(tiny, other, rounds=3)
    runs.start(tiny, folder, rounds=2)
    with pytest.raises(Stopped):
        runner.resume(folder, runs.stop_at(3), rounds=6)
    (folder / rundir.REPORT).touch()  # as `start` leaves one, which no test here waits for
    assert rundir.has_ended(folder, 2, 2)
    assert not rundir.has_ended(folder, 3, 3)
    runner.resume(folder, runs.quiet, rounds=3)
    (folder / rundir.REPORT).touch()
    assert rundir.has_ended(folder, 3, 3)
    runs.assert_same(folder, other)


@pytest.mark.parametrize("killed", [None, 1, 2, 3])
def test_what_a_user_put_beside_an_adapter_stays_there(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: int | None
) -> None:
    """Also if the process ends between the renames of the old folder, of the new one, and of what
    is brought over.
    """
    folder, other = tmp_path / "run", tmp_path / "other"
    runs.start(tiny, other, rounds=3)
    runs.start(tiny, folder, rounds=2)
    adapter = folder / rundir.ADAPTER
    (adapter / "notes.txt").write_text("mine")
    (adapter / "plots").mkdir()
    (adapter / "plots" / "a.png").write_bytes(b"png")
    if killed is not None:
        with monkeypatch.context() as patch:
            rename, done = Path.rename, list[Path]()

            def last(self: Path, to: Path) -> Path:
                if adapter in (self, to) or to.parent == adapter:
                    if len(done) == killed - 1:
                        raise KeyboardInterrupt
                    done.append(self)
                return rename(self, to)

            patch.setattr(Path, "rename", last)
            with pytest.raises((KeyboardInterrupt, Stopped)):
                runner.resume(folder, runs.quiet, rounds=3)
    runner.resume(folder, runs.quiet, rounds=3)
    assert (adapter / "notes.txt").read_text() == "mine"
    assert (adapter / "plots" / "a.png").read_bytes() == b"png"
    assert {path.name for path in folder.glob(".adapter*")} == set()
    shutil.rmtree(adapter / "plots")
    (adapter / "notes.txt").unlink()
    runs.assert_same(folder, other)


def test_a_last_round_that_is_the_last_no_more_is_not_evaluated(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before its evaluation, and given more rounds."""
    folder, other = tmp_path / "run", tmp_path / "other"
    runs.start(tiny, other, rounds=3, evaluation__every=5)
    interrupted(tiny, folder, 2, rounds=6, evaluation__every=5)
    stopped_in_its_evaluation(monkeypatch, folder, rounds=2)
    runner.resume(folder, runs.quiet, rounds=3)
    runs.assert_same(folder, other)


@pytest.mark.parametrize(("name", "value"), [("wire_seconds", "1"), ("clip", []), ("seconds", {})])
def test_a_line_that_no_run_writes_is_named_before_it_is_evaluated_anew(
    tiny: Tiny, tmp_path: Path, name: str, value: Any
) -> None:
    interrupted(tiny, tmp_path, 2, rounds=6, evaluation__every=5)
    line = {**runs.lines(tmp_path)[-1], name: value}
    with pytest.raises(FedSieveError, match=f"metrics.jsonl: {name} of its round 2 is"):
        checkpoint.round_of(tmp_path / rundir.METRICS, line)


BROKEN = ["before", "between", "after", "the newest lost"]


@pytest.mark.parametrize(
    "full", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["a full disk", "a kill"]
)
@pytest.mark.parametrize("broken", BROKEN)
def test_more_rounds_that_were_broken_off_accuse_nobody(
    tiny: Tiny,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    broken: str,
    full: bool,
    command: Command,
) -> None:
    """Wherever it ends: resume goes on, or is told to give --rounds again."""
    folder = tmp_path / "run"
    runs.start(tiny, folder, rounds=2)
    write, count = disk.write_whole, iter(range(100))

    def broken_off(path: Path, *given: Any, **more: Any) -> None:
        if next(count) == min(2, BROKEN.index(broken)):
            if full:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            raise KeyboardInterrupt
        write(path, *given, **more)

    with monkeypatch.context() as patch:
        for module in (runner, checkpoint, rundir):
            patch.setattr(module, "write_whole", broken_off)
        with pytest.raises((FedSieveError, KeyboardInterrupt, Stopped)):
            runner.resume(folder, runs.quiet, rounds=4)
    if broken == "the newest lost":
        checkpoints(folder)[0].write_bytes(b"")
    ran = command("resume", folder)
    assert "edited" not in ran.err
    if ran.code:
        assert ran.code == 2
        told = " ".join(ran.err.split())
        assert f"`fedsieve resume {folder} --rounds N`" in told
    assert command("resume", folder, "--rounds", "4").code == 0
    runs.assert_same(folder, whole)


def test_what_cannot_have_other_rounds_is_left_as_it_is(
    tiny: Tiny, whole: Path, tmp_path: Path, command: Command
) -> None:
    private = tmp_path / "private"
    privacy = {"clip": 0.1, "delta": 1e-3, "noise_multiplier": 1.0, "noise_from": "seed"}
    runs.start(tiny, private, rounds=1, privacy=privacy, sampling={"kind": "poisson"})
    shutil.copytree(whole, tmp_path / "run")
    for folder, rounds, said in (
        (tmp_path / "run", 3, "--rounds 3: 4 are done already"),
        (private, 2, "--rounds: its epsilon is that of 1 round,"),
    ):
        before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        ran = command("resume", folder, "--rounds", str(rounds))
        assert ran.code == 2
        assert said in " ".join(ran.err.split())
        assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    ran = command("resume", tmp_path / "run", "--rounds", "5")
    assert ran.code == 0
    assert rundir.last_round(tmp_path / "run") == 5


@pytest.mark.parametrize("every", [1, 3])
def test_stopped_between_rounds(tiny: Tiny, whole: Path, tmp_path: Path, every: int) -> None:
    folder = tmp_path / "run"
    interrupted(tiny, folder, 2, checkpoint__every=every)
    assert not (folder / rundir.ADAPTER).exists()
    with pytest.raises(Stopped, match="stopped after round 3 of 4"):
        runner.resume(folder, runs.stop_at(3))
    runner.resume(folder, runs.quiet)
    runs.assert_same(folder, whole)
    runner.resume(folder, runs.quiet)  # a finished run is left as it is
    runs.assert_same(folder, whole)


@pytest.mark.parametrize("every", [1, 4])
def test_stopped_in_training(
    tiny: Tiny,
    whole_with_memories: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    every: int,
) -> None:
    """In the middle of a cohort: some clients of round 3 have trained, and have new memories."""
    folder = tmp_path / "run"
    third = {each["client"] for each in runs.lines(whole_with_memories, rundir.CLIENTS)[16:24]}

    def stop(key: Key, training: Any) -> Any:
        if key.round == 3 and key.client == sorted(third)[4]:
            raise KeyboardInterrupt
        return training

    with monkeypatch.context() as patch:
        runs.before_fit(patch, stop)
        with pytest.raises(Stopped, match="stopped after round 2 of 5"):
            runs.start(tiny, folder, **FLASC, checkpoint__every=every)
    runner.resume(folder, runs.quiet)
    runs.assert_same(folder, whole_with_memories)


@pytest.mark.parametrize("every", [1, 5])
def test_stopped_in_an_evaluation(
    tiny: Tiny,
    whole_with_memories: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    every: int,
) -> None:
    """Every client of round 4 has trained, but the round is not over: it is done again."""
    folder = tmp_path / "run"

    def stop(number: int) -> None:
        if number == 2:  # after rounds 0, 2
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        runs.before_evaluation(patch, stop)
        with pytest.raises(Stopped, match="stopped after round 3 of 5"):
            runs.start(tiny, folder, **FLASC, checkpoint__every=every)
    runner.resume(folder, runs.quiet)
    runs.assert_same(folder, whole_with_memories)


@pytest.mark.parametrize("every", [1, 5])
def test_stopped_between_two_lines_of_the_logs(
    tiny: Tiny, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    folder = tmp_path / "run"
    append = rundir.append

    def stop(place: Path, log: str, rows: Any) -> None:
        rows = list(rows)
        if log == rundir.CLIENTS and rows[0].round == 3:
            append(place, log, rows[:1])
            raise KeyboardInterrupt
        append(place, log, rows)

    with monkeypatch.context() as patch:
        patch.setattr(rundir, "append", stop)
        with pytest.raises(Stopped, match="stopped after round 2"):
            runs.start(tiny, folder, checkpoint__every=every)
    assert len(runs.lines(folder)) == 4  # round 3 is there already
    runner.resume(folder, runs.quiet)
    runs.assert_same(folder, whole)


def test_stopped_while_writing_the_adapter(
    tiny: Tiny, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runner, "_save_adapter", stop)
        with pytest.raises(Stopped, match="stopped after round 4 of 4"):
            runs.start(tiny, folder)
    runner.resume(folder, runs.quiet)
    runs.assert_same(folder, whole)


def test_memories_of_clients_survive(tiny: Tiny, whole_with_memories: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    interrupted(tiny, folder, 3, **FLASC)
    # Without its memories the run would end elsewhere: the test would see them missing.
    forgetful = tmp_path / "forgetful"
    shutil.copytree(folder, forgetful)
    load = checkpoint.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "load", lambda *given: load(*given)._replace(memories={}))
        runner.resume(forgetful, runs.quiet)
    with pytest.raises(AssertionError):
        runs.assert_same(forgetful, whole_with_memories)
    runner.resume(folder, runs.quiet)
    runs.assert_same(folder, whole_with_memories)


# --- kill -9, SIGTERM, SIGINT


def forked(work: Callable[[], object]) -> multiprocessing.context.ForkProcess:
    """A child of this process, with torch loaded already; its exit code is the command's."""

    def child() -> None:
        code = 0
        try:
            work()
        except SystemExit as stop:
            code = int(stop.code or 0)
        os._exit(code)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def wait_for(reached: Callable[[], bool], process: multiprocessing.context.ForkProcess) -> None:
    deadline = time.monotonic() + 60
    while not reached():
        assert process.is_alive(), "the run ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.001)


def rounds_done(folder: Path) -> int:
    log = folder / rundir.METRICS
    return log.read_bytes().count(b"\n") - 1 if log.exists() else -1


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_at_random_moments(
    tiny: Tiny, whole_with_memories: Path, tmp_path: Path, seed: int
) -> None:
    """kill -9, again and again, until a resumed run gets through."""
    draw = random.Random(seed)
    folder = tmp_path / "run"
    given = recipe.check(tiny.table(**FLASC))
    process = forked(lambda: runner.start(given, folder, runs.quiet))
    kills = 0
    while True:
        done = rounds_done(folder)
        if kills < 4:
            # Some time in the next round: in training, merging, evaluating or writing.
            wait_for(lambda done=done: rounds_done(folder) > done, process)  # type: ignore[misc]
            time.sleep(draw.uniform(0, 0.15))
            os.kill(process.pid or 0, signal.SIGKILL)
        process.join(60)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
        process = forked(lambda: runner.resume(folder, runs.quiet))
    assert kills > 0
    runs.assert_same(folder, whole_with_memories)


def test_killed_before_the_first_checkpoint(tiny: Tiny, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def work() -> None:
        checkpoint.save = die  # type: ignore[assignment]
        runs.start(tiny, folder)

    process = forked(work)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not checkpoints(folder)
    runner.resume(folder, runs.quiet)
    runs.assert_same(folder, whole)


def test_sigterm_keeps_the_state(tiny: Tiny, whole: Path, tmp_path: Path, command: Command) -> None:
    path, folder = tiny.write(tmp_path / "tiny.toml", checkpoint__every=4), tmp_path / "run"

    def die(key: Key, training: Any) -> Any:
        if key.round == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return training

    with pytest.MonkeyPatch.context() as patch:
        runs.before_fit(patch, die)
        before = signal.getsignal(signal.SIGTERM)
        ran = command("run", path, "--out", folder)
        assert signal.getsignal(signal.SIGTERM) is before
    assert ran.code == 130
    assert f"stopped after round 2 of 4; go on with `fedsieve resume {folder}`" in ran.err
    assert "Traceback" not in ran.err
    assert command("resume", folder).code == 0
    runs.assert_same(folder, whole)


def test_ctrl_c_on_the_real_command(tiny: Tiny, whole: Path, tmp_path: Path) -> None:
    path, folder = tiny.write(tmp_path / "tiny.toml", rounds=400), tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "fedsieve", "run", path, "--out", folder],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Tests that were started in a shell's background inherit that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while rounds_done(folder) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped after round " in err
    assert "Traceback" not in err
    assert "round   2/400  loss" in out
    # Its first rounds are those of the run of 4 rounds: the other process computed the same.
    assert runs.untimed(folder, rundir.CLIENTS)[:6] == runs.untimed(whole, rundir.CLIENTS)[:6]


# --- damage


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip_in_the_tensors(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)


def garbage(path: Path) -> None:
    path.write_bytes(random.Random(0).randbytes(5000))


def another_file(path: Path) -> None:
    import safetensors.torch
    import torch

    safetensors.torch.save_file({"x": torch.zeros(3)}, path)


@pytest.mark.parametrize(
    "damage", kinds.some_of([truncate, empty, garbage, flip_in_the_tensors, another_file])
)
def test_a_damaged_checkpoint_is_passed_over(
    tiny: Tiny, whole: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    folder = tmp_path / "run"
    interrupted(tiny, folder, 3)
    newest = checkpoints(folder)[0]
    assert newest.name == "round-000003.safetensors"
    damage(newest)
    with (
        pytest.warns(UserWarning, match="round-000003.safetensors is damaged"),
        pytest.raises(Stopped, match="stopped after round 3"),
    ):
        runner.resume(folder, runs.stop_at(3))
    runner.resume(folder, runs.quiet)  # what it left is whole
    runs.assert_same(folder, whole)
    damage(checkpoints(folder)[0])
    damage(checkpoints(folder)[1])
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(FedSieveError, match="holds no checkpoint that is whole"),
    ):
        runner.resume(folder, runs.quiet)


def test_a_damaged_checkpoint_does_not_push_out_a_whole_one(
    tiny: Tiny, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    interrupted(tiny, folder, 3, checkpoint__every=2)  # 2 was due, 3 is from the Ctrl-C
    truncate(checkpoints(folder)[0])
    with pytest.warns(UserWarning, match=r"round-000003.safetensors is damaged"):
        runner.resume(folder, runs.quiet)
    assert [each.name[6:12] for each in checkpoints(folder)] == ["000004", "000002"]
    truncate(checkpoints(folder)[0])
    with pytest.warns(UserWarning, match=r"round-000004.safetensors is damaged"):
        runner.resume(folder, runs.quiet)
    runs.assert_same(folder, whole)


def test_no_flipped_bit_of_a_header_gets_through(tiny: Tiny, tmp_path: Path) -> None:
    """A checkpoint is either the one that was saved, or it is passed over; nothing else."""
    folder = tmp_path / "run"
    interrupted(tiny, folder, 1)
    newest = checkpoints(folder)[0]
    data = newest.read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    draw = random.Random(0)
    facts, _ = checkpoint._read(newest)
    for _ in range(400):
        broken = bytearray(data)
        broken[draw.randrange(length)] ^= 1 << draw.randrange(8)
        newest.write_bytes(broken)
        try:
            got, _ = checkpoint._read(newest)
        except (OSError, ValueError, KeyError, SafetensorError):
            continue
        assert got == facts


def test_logs_that_lost_lines_are_not_resumed(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    interrupted(tiny, folder, 2)
    os.truncate(folder / rundir.METRICS, 10)
    with pytest.raises(FedSieveError, match=r"metrics.jsonl has lost lines"):
        runner.resume(folder, runs.quiet)


@pytest.mark.parametrize("log", rundir.LOGS)
def test_a_log_that_is_gone_is_told_as_that_wherever_one_goes_on(
    tiny: Tiny, tmp_path: Path, command: Command, log: str
) -> None:
    folder = tmp_path / "run"
    interrupted(tiny, folder, 2)
    (folder / log).unlink()
    for more in ((), ("--at-round", "1")):
        ran = command("resume", folder, *more)
        assert ran.code == 2
        said = " ".join(ran.err.split())
        assert f"{folder / log} is not there, and the checkpoints count on it" in said


def test_a_log_that_lost_lines_has_a_way_out_that_is_told(
    tiny: Tiny, tmp_path: Path, command: Command
) -> None:
    folder = tmp_path / "run"
    interrupted(tiny, folder, 2)
    length = (folder / rundir.METRICS).stat().st_size
    os.truncate(folder / rundir.METRICS, length - 5)
    ran = command("resume", folder)
    assert ran.code == 2
    assert "--at-round" in ran.err
    assert command("resume", folder, "--at-round", "1").code == 0


def test_a_folder_with_a_recipe_alone_is_no_run(
    tiny: Tiny, tmp_path: Path, command: Command
) -> None:
    """`resume` trained there, failed, and had the user's recipe taken for a run's."""
    path = tiny.write(tmp_path / rundir.RECIPE)
    before = path.read_text()
    for words in (
        ("resume", tmp_path),
        ("resume", tmp_path, "--at-round", "1"),
        ("federate", "--resume", tmp_path),
        ("export", tmp_path, "--to", tmp_path / "to"),
        ("report", tmp_path),
        ("watch", tmp_path, "--once"),
    ):
        ran = command(*words)
        said = " ".join(ran.err.split())
        assert ran.code == 2, words
        assert "holds no run: there is a recipe.toml in it, and nothing of a run by it" in said
        assert [each.name for each in tmp_path.iterdir()] == [rundir.RECIPE]
    assert path.read_text() == before


def test_no_checkpoint_at_all(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    interrupted(tiny, folder, 2)
    shutil.rmtree(folder / rundir.CHECKPOINTS)
    with pytest.raises(FedSieveError, match="holds no checkpoint: the run cannot be resumed"):
        runner.resume(folder, runs.quiet)
    with pytest.raises(FedSieveError, match="holds no run"):
        runner.resume(tmp_path, runs.quiet)


def test_another_adapter_is_not_taken(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    interrupted(tiny, folder, 1)
    text = (folder / rundir.RECIPE).read_text()
    (folder / rundir.RECIPE).write_text(text.replace("rank = 4", "rank = 5"))
    for accepted in (False, True):
        what = (
            "another adapter than the recipe asks for" if accepted else "lora.rank was 4 and is 5"
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(FedSieveError, match=what):
                runner.resume(folder, runs.quiet, accept_changes=accepted)


# --- a full disk


@pytest.mark.parametrize(
    ("number", "limit", "what", "left"),
    [
        (2, 8000, "round-000003.safetensors cannot be written: File too large", (2, 1)),
        (3, 1500, "run cannot be written: File too large", (3, 2)),
        (4, 3000, "run cannot be written: File too large", (4, 3)),
    ],
)
def test_a_disk_that_is_full(
    tiny: Tiny, whole: Path, tmp_path: Path, number: int, limit: int, what: str, left: Any
) -> None:
    """No file may grow beyond a limit after some round: the system itself refuses to write.

    The limit is too low for a checkpoint, for another line of the log, for the adapter.
    """
    path, folder = tiny.write(tmp_path / "tiny.toml"), tmp_path / "run"
    said = tmp_path / "said"

    def work() -> None:
        from fedsieve import cli

        sys.argv = ["fedsieve", "run", str(path), "--out", str(folder)]
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
        sys.stderr = os.fdopen(2, "w")
        show = cli._Live.show

        def fill(self: Any, summary: Any, receipts: Any) -> None:
            show(self, summary, receipts)
            if summary.round == number:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

        cli._Live.show = fill  # type: ignore[method-assign]
        try:
            cli.main()
        finally:
            sys.stderr.flush()

    process = forked(work)
    process.join(60)
    assert process.exitcode == 2
    assert what in said.read_text()
    assert "make room, then `fedsieve resume" in said.read_text()
    assert "Traceback" not in said.read_text()
    assert [int(each.name[6:12]) for each in checkpoints(folder)] == list(left)
    assert not list((folder / rundir.CHECKPOINTS).glob(".*"))  # no half of a file either
    runner.resume(folder, runs.quiet)
    runs.assert_same(folder, whole)


@pytest.mark.parametrize("log", [rundir.METRICS, rundir.CLIENTS])
def test_no_room_for_a_line_of_the_logs(
    tiny: Tiny,
    whole: Path,
    tmp_path: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    log: str,
) -> None:
    path, folder = tiny.write(tmp_path / "tiny.toml"), tmp_path / "run"
    append = rundir.append

    def full(place: Path, name: str, rows: Any) -> None:
        rows = list(rows)
        if name == log and rows and rows[0].round == 3:
            with (place / name).open("a") as file:
                file.write('{"round": 3, "cli')  # what still fitted
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(place / name))
        append(place, name, rows)

    with monkeypatch.context() as patch:
        patch.setattr(rundir, "append", full)
        ran = command("run", path, "--out", folder)
    assert ran.code == 2
    assert f"{folder / log} cannot be written: No space left on device" in ran.err
    assert command("resume", folder).code == 0
    runs.assert_same(folder, whole)


def test_a_checkpoint_that_cannot_be_flushed(
    tiny: Tiny, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems find out only at fsync that there is no room."""
    folder = tmp_path / "run"
    fsync = os.fsync

    def full(number: int) -> None:
        if "round-000002" in str(Path(f"/proc/self/fd/{number}").readlink()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(number)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(FedSieveError, match=r"000002.* cannot be written: No space left"):
            runs.start(tiny, folder)
    assert [each.name[6:12] for each in checkpoints(folder)] == ["000001", "000000"]
    runner.resume(folder, runs.quiet)
    runs.assert_same(folder, whole)


# --- one process at a time


def test_a_second_process_is_refused(tiny: Tiny, tmp_path: Path, command: Command) -> None:
    folder = tmp_path / "run"
    interrupted(tiny, folder, 1)
    ready = tmp_path / "ready"

    def hold() -> None:
        with rundir.lock(folder):
            ready.touch()
            time.sleep(60)

    process = forked(hold)
    try:
        wait_for(ready.exists, process)
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
        for words in (
            ("resume", folder),
            ("run", tiny.write(tmp_path / "tiny.toml"), "--out", folder, "--overwrite"),
        ):
            ran = command(*words)
            assert ran.code == 2
            assert f"another process is working on the run in {folder}" in ran.err
        del before[folder / ".lock"]
        assert before == {path: path.stat().st_mtime_ns for path in before}
    finally:
        process.kill()
        process.join()
    assert command("resume", folder).code == 0  # a killed process holds nothing


# --- a base that is not the one of the beginning


def changed_weight(base: Path) -> None:
    file = base / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["bert.encoder.layer.0.output.dense.weight"][3, 4] += 1e-6
    safetensors.torch.save_file(tensors, file, {"format": "pt"})


def changed_head(base: Path) -> None:
    """It is trained, but trained from what the checkpoint has."""
    file = base / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["classifier.bias"][1] += 1e-6
    safetensors.torch.save_file(tensors, file, {"format": "pt"})


def changed_configuration(base: Path) -> None:
    file = base / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "layer_norm_eps": 1e-3}))


def lost_pooler(base: Path) -> None:
    """The adapter's own layout changes with it."""
    file = base / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    kept = {name: tensor for name, tensor in tensors.items() if "pooler" not in name}
    safetensors.torch.save_file(kept, file, {"format": "pt"})


@pytest.mark.parametrize(
    "change", [changed_weight, changed_head, changed_configuration, lost_pooler]
)
@pytest.mark.parametrize("method", ["fedit", pytest.param("full", marks=pytest.mark.slow)])
def test_a_base_that_has_changed_is_refused(
    tiny: Tiny, tmp_path: Path, change: Callable[[Path], None], method: str
) -> None:
    base, folder = tmp_path / "base", tmp_path / "run"
    shutil.copytree(tiny.bert, base)
    changes = {"model__source": str(base), "method": {"name": method}, "budgets": [{}]}
    interrupted(tiny, folder, 1, **changes, rounds=2)
    change(base)
    before = untouched(folder)
    with pytest.raises(FedSieveError, match=r"the base model has changed since the run began"):
        runner.resume(folder, runs.quiet)
    for merge in (False, True):
        with pytest.raises(FedSieveError, match=r"has changed since the run began.*start a new"):
            runner.export(folder, tmp_path / "out", merge=merge)
    assert untouched(folder) == before
    shutil.rmtree(base)
    shutil.copytree(tiny.bert, base)
    runner.resume(folder, runs.quiet)
    runner.export(folder, tmp_path / "out")


def edited(name: str, change: Callable[[Any], None]) -> Callable[[Path], None]:
    """A change of one of a base's files of JSON."""

    def edit(base: Path) -> None:
        told = json.loads((base / name).read_text(encoding="utf-8"))
        change(told)
        (base / name).write_text(json.dumps(told), encoding="utf-8")

    return edit


def swapped_words(told: Any) -> None:
    words = told["model"]["vocab"]
    one, other = [word for word in words if word[0] != "["][:2]
    words[one], words[other] = words[other], words[one]


def another_normalizer(told: Any) -> None:
    told["normalizer"] = {"type": "Prepend", "prepend": "x"}


def another_template(base: Path) -> None:
    (base / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")


def pictures(folder: Path, base: Path) -> dict[str, Any]:
    """What of a recipe is of images: a folder of grey ones, of two classes."""
    for number in range(12):
        path = folder / ("dark", "bright")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (10 * number,) * 3).save(path)
    return {
        "model": {"source": str(base), "task": "image-classification"},
        "data": {"train": str(folder), "image": "image", "label": "label"},
        "method": {"name": "fedit"},
        "lora__targets": None,
        "budgets": [{}],
        "cohort": 2,
        "partition": {"kind": "iid", "clients": 2},
        "training": {"batch": 4, "lr": 0.05},
    }


READERS = {
    "words": ("bert", edited("tokenizer.json", swapped_words), "tokenizer .*its vocabulary"),
    "steps": ("bert", edited("tokenizer.json", another_normalizer), "tokenizer .*its steps"),
    "special": (
        "bert",
        edited("tokenizer_config.json", lambda told: told.update(sep_token="[CLS]")),
        "tokenizer .*its special tokens",
    ),
    "template": ("bert", another_template, "tokenizer .*its chat template"),
    "pixels": (
        "vit",
        edited("preprocessor_config.json", lambda told: told.update(image_mean=[0.1, 0.1, 0.1])),
        "image processor .*its pixels",
    ),
}


@pytest.mark.parametrize("name", READERS)
def test_a_reader_that_has_changed_is_not_written_beside_the_adapter(
    tiny: Tiny, tmp_path: Path, name: str
) -> None:
    kind, change, said = READERS[name]
    base, folder = tmp_path / "base", tmp_path / "run"
    shutil.copytree(getattr(tiny, kind), base)
    own = pictures(tmp_path / "rows", base) if kind == "vit" else {"model__source": str(base)}
    runs.start(tiny, folder, rounds=1, **own)
    runner.export(folder, tmp_path / "as it was")
    change(base)
    for merge in (False, True):
        with pytest.raises(FedSieveError, match=rf"{said}\).*--accept-changes"):
            runner.export(folder, tmp_path / "refused", merge=merge)
    assert [*(tmp_path / "refused").iterdir()] == []
    with pytest.warns(UserWarning, match=said):
        runner.export(folder, tmp_path / "refused", accept_changes=True)
    # A run of an older FedSieve does not know, and its base is taken for the one that it had.
    told = rundir.environment_of(folder)
    del told["reader"]
    text = recipe.dump(recipe.load(str(folder / rundir.RECIPE)), told)
    (folder / rundir.RECIPE).write_text(text, encoding="utf-8")
    runner.export(folder, tmp_path / "older")


QUIET = {
    "normalizer": edited("tokenizer.json", lambda told: told.update(normalizer={"type": "NFC"})),
    "decoder": edited("tokenizer.json", lambda told: told.update(decoder={"type": "Fuse"})),
    "template": another_template,
}


@pytest.mark.parametrize("name", QUIET)
def test_a_reader_that_has_changed_is_not_gone_on_with(
    tiny: Tiny, tmp_path: Path, name: str
) -> None:
    """Though it reads the rows as before: what `export` refuses, no round is trained for."""
    base, folder = tmp_path / "base", tmp_path / "run"
    shutil.copytree(tiny.bert, base)
    interrupted(tiny, folder, 1, model__source=str(base), rounds=2)
    QUIET[name](base)
    before = untouched(folder)
    said = r"the base model's tokenizer has changed since the run began \(its"
    with pytest.raises(FedSieveError, match=rf"{said}.*--accept-changes to go on with it"):
        runner.resume(folder, runs.quiet)
    assert untouched(folder) == before
    with pytest.warns(UserWarning, match=said):
        runner.resume(folder, runs.quiet, accept_changes=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        runner.export(folder, tmp_path / "to")  # it was accepted once


def test_a_run_that_had_not_begun_is_of_the_base_that_it_begins_with(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the evaluation of round 0, its folder told of the base as it had been."""
    base, folder = tmp_path / "base", tmp_path / "run"
    shutil.copytree(tiny.bert, base)

    def stop(number: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        runs.before_evaluation(patch, stop)
        with pytest.raises(KeyboardInterrupt):
            runs.start(tiny, folder, model__source=str(base), rounds=1)
    assert rundir.untouched(folder)
    then = rundir.environment_of(folder)
    changed_weight(base)
    QUIET["normalizer"](base)
    runner.resume(folder, runs.quiet)
    now = rundir.environment_of(folder)
    assert {name for name in now if now[name] != then[name]} == {"base", "reader"}
    assert now.keys() == then.keys()
    runner.export(folder, tmp_path / "to")


def untouched(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path): path.read_bytes() for path in files}


def test_what_saving_writes_into_a_configuration_is_no_change(tiny: Tiny, tmp_path: Path) -> None:
    base, folder = tmp_path / "base", tmp_path / "run"
    shutil.copytree(tiny.bert, base)
    interrupted(tiny, folder, 1, model__source=str(base), rounds=2)
    config = json.loads((base / "config.json").read_text())
    config |= {"transformers_version": "9.9.9", "_name_or_path": "elsewhere"}
    (base / "config.json").write_text(json.dumps(config))
    runner.resume(folder, runs.quiet)


def test_a_checkpoint_of_old_knows_no_base(tiny: Tiny, tmp_path: Path) -> None:
    """Its run goes on as it did."""
    folder = tmp_path / "run"
    interrupted(tiny, folder, 1, rounds=2)
    layout = from_recipe(recipe.check(tiny.table())).resident.layout
    snapshot = checkpoint.load(folder / rundir.CHECKPOINTS, layout)
    assert snapshot.base is not None
    checkpoint.save(folder / rundir.CHECKPOINTS, snapshot._replace(base=None))
    runner.resume(folder, runs.quiet)


def test_a_report_that_cannot_be_written_is_told_with_the_way_out(
    tiny: Tiny, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    written: list[Path] = []

    def full(*given: Any) -> None:
        raise FedSieveError("The report cannot be written: No space left on device")

    monkeypatch.setattr(report, "write", full)
    with pytest.raises(FedSieveError) as caught:
        runner.start(recipe.check(tiny.table(rounds=1)), run, lambda *_: None)
    told = f"The adapter is written, and `fedsieve resume {run}` writes the report"
    assert told in str(caught.value)
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    monkeypatch.setattr(report, "write", lambda _, out: written.append(out))
    assert command("resume", run).code == 0
    assert written == [run / "report.html"]
