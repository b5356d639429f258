"""Many runs, each in a directory of its own: some at once, in the order given, all resumable.

A run that fails does not stop the others. With one worker the runs take place in this process; with
more, each worker is a process that takes one run after another, so that torch and transformers are
imported once a worker. A worker is told a run as one line of JSON and answers with lines of JSON.

The recipe that was asked for is kept beside each run (`asked.toml`). It tells whether a directory
holds this very run, which then is left alone or resumed, or another one, which is refused: results
of two different recipes must not meet under one name.
"""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from fedsieve import report
from fedsieve.disk import bytes_of, named_by, place, refuse_link, write_whole
from fedsieve.engine.loop import Receipt, Round
from fedsieve.errors import (
    FedSieveError,
    NoUsableUpdate,
    count,
    of_memory,
    quoted,
    reason,
    short_of_memory,
    traced,
    with_type,
)
from fedsieve.recipe import read as recipes
from fedsieve.recipe.experiment import Experiment, from_recipe, with_whole_paths
from fedsieve.recipe.schema import Recipe
from fedsieve.run import rundir, runner
from fedsieve.run.found import PLACES, settings_of
from fedsieve.study.parts import ASKED, DIVERGED, FAILED

_LONGEST = 2000  # letters of a reason
PATIENCE = 60  # seconds that a worker has to save its run before it is killed


class Job(NamedTuple):
    """One run: what it is called in messages, what to run, and where."""

    name: str
    recipe: Recipe
    folder: Path


class Outcome(NamedTuple):
    """How a job ended: `problem` is None where the run is finished."""

    job: Job
    problem: str | None


ShowRound = Callable[[Job, Round], None]  # called after every round of any run
ShowEnd = Callable[[Outcome], None]


def refuse_changed(jobs: Sequence[Job]) -> None:
    """Raises FedSieveError, naming the key, if a directory holds a run of another recipe.

    Also if its own recipe is not what it was asked for with, and for a link in the place of a file
    or of the directory: what is here may have been changed, or come from somebody else.
    """
    for job in jobs:
        for home in (job.folder.parent, job.folder):
            refuse_link(home, folder=True)
        for name in (ASKED, DIVERGED, FAILED):
            refuse_link(job.folder / name)
        if not (job.folder / rundir.RECIPE).exists():
            continue
        rundir.check(job.folder)
        asked = job.folder / ASKED
        if not asked.exists():
            raise FedSieveError(f"{job.folder} holds some other run: choose another --out")
        held = _parsed(job.folder / rundir.RECIPE)
        if held.tracking not in (None, job.recipe.tracking):
            raise FedSieveError(
                f"{job.folder / rundir.RECIPE} asks for another [tracking] than this study: its "
                "figures would go elsewhere: take the table out there"
            )
        told = _parsed(asked)
        before, now, own = (settings_of(recipe) for recipe in (told, job.recipe, held))
        settled = settings_of(with_whole_paths(told))
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key):
                raise FedSieveError(
                    f"{job.folder} holds a run with {key} = {quoted(before.get(key))}, but "
                    f"{quoted(now.get(key))} is asked for now: choose another --out, or remove "
                    "that directory to run it again"
                )
        for key in sorted(before.keys() | own.keys()):
            may_be = (before.get(key), settled.get(key))
            if own.get(key) not in may_be and not _settled(key, before, own):
                raise FedSieveError(
                    f"{job.folder / rundir.RECIPE} was edited: {key} was "
                    f"{quoted(before.get(key))} when the run was asked for and is "
                    f"{quoted(own.get(key))}: put it back, or remove that directory to run it again"
                )


def _parsed(path: Path) -> Recipe:
    """A recipe as a file has it. Its method is not imported: that of the job was asked for."""
    return recipes.parse(recipes.read(str(path)), str(path))


def _settled(key: str, asked: Mapping[str, Any], own: Mapping[str, Any]) -> bool:
    """Whether a run fills this key in by itself, for what was asked."""
    if key in PLACES and asked.get(key) is not None:  # of a file that is gone by now
        return str(own.get(key)) == str(place(str(asked[key])).resolve())
    if key == "training.precision":
        return asked.get(key) == "auto"
    if key == "rounds":
        return asked.get("privacy.clip") is not None
    return key in ("data.classes", "privacy.noise_multiplier") and asked.get(key) is None


def diverged(job: Job) -> str | None:
    """Why training broke down; running it again would end the same."""
    mark = job.folder / DIVERGED
    try:
        said = bytes_of(mark, 1 << 20).decode("utf-8", "replace")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise FedSieveError(f"{mark} cannot be read: {reason(error)}: remove it") from error
    return said[:_LONGEST].strip() or f"{mark} does not say why"


def finished(job: Job) -> bool:
    """Whether the job's directory holds the run, done to its last round, with adapter and report.

    One that was killed before its report is not: resuming it writes that, and trains nothing.
    """
    saved = job.folder / rundir.ADAPTER
    if not any((saved / name).is_file() for name in ("adapter_config.json", "config.json")):
        return False
    rounds = report.rounds(job.folder / rundir.METRICS)
    if not rounds:
        return False
    # The rounds of the run's own recipe: a privacy budget may allow fewer than were asked for.
    number, asked = rounds[-1].round, runner.rounds_of(job.folder)
    return number == asked and rundir.has_ended(job.folder, number, asked)


class Ground(NamedTuple):
    """What a run stands on, a digest of each: what it trains on, what it is evaluated on, and the
    base under its adapter. None where that is not known, as of older runs.
    """

    train: str | None
    test: str | None
    base: str | None


_SAID = Ground("training rows are not those", "test rows are not those", "base model is not that")

# What runs stand on, and the first directory of such, by what they ask for of which part.
Known = dict[tuple[str, str | None], tuple[Path, str]]


def ground_of(folder: Path) -> Ground:
    """What a run's directory says of it, if it is there."""
    train, test = rundir.rows_of(folder) or (None, None)
    return Ground(train, test, rundir.base_of(folder))


def _note_ground(job: Job, known: Known) -> None:
    """Take in what a run stands on.

    Raises FedSieveError, naming two directories, where runs that ask for the same had others: a
    file was changed in between, and a mean over both would be of neither.
    """
    asked, own = asked_for(job), ground_of(job.folder)
    for part, key, digest, are_not in zip(Ground._fields, asked, own, _SAID, strict=True):
        if digest is None:
            continue
        first, other = known.setdefault((part, key), (job.folder, digest))
        if other != digest:
            raise FedSieveError(
                f"{job.folder}: its {are_not} of {first}, though both ask for the same: a file was "
                "changed in between. Remove the directories of one kind to run them again, or "
                "choose another --out"
            )


def _ground_for(job: Job, known: Known) -> Ground:
    """What a run must stand on, where others are there that ask for the same."""
    found = (known.get(each) for each in zip(Ground._fields, asked_for(job), strict=True))
    return Ground(*(None if each is None else each[1] for each in found))


def asked_for(job: Job) -> Ground:
    """All that a recipe says of each part. Of training rows that is the same in every stage of a
    study: what is held back for validation is no draw of the run's seed.
    """
    recipe, rated = job.recipe, job.recipe.evaluation
    model, data = recipe.model, recipe.data
    read = (model.source, model.task, data.model_dump_json(), recipe.partition.reads)
    drawn = recipe.seed if rated.limit is not None or rated.on == "validation" else None
    told = (rated.on, rated.limit, rated.by_client, drawn)
    # An adapter to begin from is fitted to the run's own, whose further ranks are drawn.
    lora = recipe.lora
    fitted = (lora, recipe.seed) if lora.start else ()
    base = (model.model_dump_json(), lora.whole, *fitted)
    return Ground(repr(read), repr((*read, *told)), repr(base))


def _on(ground: Ground) -> Callable[[Recipe], Experiment]:
    """Who sets a run up. It raises FedSieveError where it would stand on anything else than that,
    as far as something is named.
    """

    def build(recipe: Recipe) -> Experiment:
        experiment = from_recipe(recipe)
        train, test = experiment.rows or (None, None)
        own = Ground(train, test, experiment.resident.body)
        for asked, found, are_not in zip(ground, own, _SAID, strict=True):
            if asked is not None and found is not None and asked != found:
                raise FedSieveError(
                    f"its {are_not} of the runs that are there already, which ask for the same: a "
                    "file was changed in between. Put it back, or choose another --out"
                )
        return experiment

    return build


def run_all(
    jobs: Sequence[Job],
    workers: int,
    show: ShowRound,
    end: ShowEnd,
    say: Callable[[str], None],
    known: Known | None = None,
) -> list[Outcome]:
    """Run or resume what is not finished, and say for every job, in the order given, how it ended.

    workers: how many run at once. say: told that a stop takes a while.
    known: what the runs before these stand on, of one study; those of these are taken in
    Raises FedSieveError if a directory holds another run (nothing is started then), runner.Stopped
    after Ctrl-C or SIGTERM, with every run's state kept.
    """
    refuse_changed(jobs)
    known = {} if known is None else known
    for job in jobs:
        _note_ground(job, known)
    outcomes = {
        job.folder: Outcome(job, diverged(job)) for job in jobs if diverged(job) or finished(job)
    }
    left = [job for job in jobs if job.folder not in outcomes]
    for job in jobs:
        (job.folder / FAILED).unlink(missing_ok=True)
    for job in left:
        if not (job.folder / rundir.RECIPE).exists():
            job.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_whole(job.folder / ASKED, recipes.dump(job.recipe, {}).encode())

    def ended(outcome: Outcome) -> None:
        outcomes[outcome.job.folder] = outcome
        if outcome.problem is not None and diverged(outcome.job) is None:
            _mark_failed(outcome.job.folder, outcome.problem)
        end(outcome)

    with runner.sigterm_as_ctrl_c():
        try:
            if min(workers, len(left)) <= 1:
                for job in left:
                    ended(Outcome(job, _problem(job, _ground_for(job, known), show)))
                    _note_ground(job, known)
            else:
                _side_by_side(left, known, min(workers, len(left)), show, ended, say)
                for job in left:
                    _note_ground(job, known)
        except (KeyboardInterrupt, runner.Stopped):
            done = sum(outcome.problem is None for outcome in outcomes.values())
            raise runner.Stopped(
                f"stopped with {done} of {len(jobs)} runs done; the same command goes on from here"
            ) from None
    return [outcomes[job.folder] for job in jobs]


def _mark_failed(folder: Path, problem: str) -> None:
    """Say beside a run why it failed, unless another process works on it: there, it has not. Where
    it cannot be written, as on a full disk, the study's own end says it.
    """
    with contextlib.suppress(FedSieveError, OSError), rundir.lock(folder):
        write_whole(folder / FAILED, problem.encode())


def _problem(job: Job, ground: Ground, show: ShowRound) -> str | None:
    """Run or resume a job in this process; what went wrong, if anything did. ground: see `_on`"""

    def after(summary: Round, receipts: Sequence[Receipt]) -> None:
        show(job, summary)

    try:
        if (job.folder / rundir.RECIPE).exists():
            # Of the method of this job, which the directory holds (`refuse_changed`), it was asked
            # whether it may be a program of somebody's own.
            asked = job.recipe.engine
            runner.resume(job.folder, after, _on(ground), allow_code=True, engine=asked)
        else:
            runner.start(job.recipe, job.folder, after, _on(ground))
    except FedSieveError as error:
        if isinstance(error.__cause__, NoUsableUpdate):
            with contextlib.suppress(OSError):  # without the mark it ends so again
                write_whole(job.folder / DIVERGED, str(error).encode())
        return str(error)
    except (runner.Stopped, KeyboardInterrupt):
        raise
    except BaseException as error:
        if of_memory(error):
            return short_of_memory(error)
        if isinstance(error, OSError):
            return f"{named_by(error) or job.folder}: {error.strerror or error}"
        if not isinstance(error, Exception):
            return f"code that is not FedSieve's ended the run ({with_type(error)})"
        return traced(error)
    return None


# --- workers


def _side_by_side(
    jobs: Sequence[Job],
    known: Known,
    workers: int,
    show: ShowRound,
    end: ShowEnd,
    say: Callable[[str], None],
) -> None:
    """Give the jobs to worker processes, one thread attending each."""
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    events: queue.SimpleQueue[tuple[Job, Round] | Outcome] = queue.SimpleQueue()
    processes: list[subprocess.Popen[str]] = []
    closing = threading.Event()
    environment = os.environ | {
        "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // workers)),
        "TOKENIZERS_PARALLELISM": "false",
    }

    def start() -> subprocess.Popen[str]:
        # A session of its own: Ctrl-C in a terminal reaches this process alone, which passes it on.
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "fedsieve.study.jobs"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env=environment,
            start_new_session=True,
        )
        processes.append(process)
        return process

    def attend() -> None:
        process = start()
        while not closing.is_set():
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                break
            if process.poll() is not None:
                process = start()
            ground = _ground_for(job, known)
            try:
                problem = _told(process, job, ground, lambda j, s: events.put((j, s)))
            except Exception as error:  # or nobody would ever hear of this job
                process.kill()
                problem = f"its process gave an answer that cannot be read ({with_type(error)})"
            events.put(Outcome(job, problem))
        if process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()

    threads = [threading.Thread(target=attend, daemon=True) for _ in range(workers)]
    try:
        for thread in threads:
            thread.start()
        ended = 0
        while ended < len(jobs):
            event = events.get()
            if isinstance(event, Outcome):
                end(event)
                ended += 1
            else:
                show(*event)
    except BaseException:
        closing.set()
        for process in list(processes):
            process.terminate()
        at_work = sum(process.poll() is None for process in processes)
        say(f"stopping: {count(at_work, 'run')} under way saved first, {PATIENCE} s at the most")
        raise
    finally:
        for process in list(processes):
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()


def _told(process: subprocess.Popen[str], job: Job, ground: Ground, show: ShowRound) -> str | None:
    """Have a worker do a job; what went wrong, if anything did."""
    assert process.stdin is not None
    assert process.stdout is not None
    request = {
        "name": job.name,
        "recipe": job.recipe.model_dump(mode="json"),
        "folder": str(job.folder),
        "ground": ground,
    }
    with contextlib.suppress(OSError):  # a worker that is gone shows below
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
    for line in process.stdout:
        answer = json.loads(line)
        if "round" in answer:
            show(job, Round(**answer["round"]))
        else:
            problem: str | None = answer["problem"]
            return problem
    return f"its process ended with exit code {process.wait()} (out of memory?)"


def _work(requests: IO[str], answers: IO[str]) -> None:
    """A worker: one job a line, until there are no more."""

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    for line in requests:
        request = json.loads(line)
        recipe = recipes.check(request["recipe"], allow_code=True)  # it was asked where we started
        job = Job(request["name"], recipe, Path(request["folder"]))
        ground = Ground(*request["ground"])

        def show(job: Job, summary: Round) -> None:
            answer({"round": summary._asdict()})

        answer({"problem": _problem(job, ground, show)})


if __name__ == "__main__":
    from fedsieve import console

    console.quiet()
    warnings.showwarning = console.show_warning
    # What other libraries, and programs that they start, print must not get among the answers, nor
    # may they read requests.
    asked = os.fdopen(os.dup(0), encoding="utf-8")
    told = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    with contextlib.suppress(runner.Stopped, KeyboardInterrupt, BrokenPipeError):
        _work(asked, told)
