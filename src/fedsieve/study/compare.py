"""Comparisons: tune the entries of a study, run them over its seeds, and end in one table.

Everything is kept as run directories, so a comparison that was stopped goes on where it stood, and
one that grows (another entry, another seed) runs only what is new. study.py says what there is to
run, jobs.py runs it, report/ knows the table's numbers.
"""

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedsieve import report
from fedsieve.clients.network import REFERENCE
from fedsieve.disk import write_whole
from fedsieve.errors import FedSieveError
from fedsieve.recipe.overrides import flat
from fedsieve.report import words
from fedsieve.report.words import duration
from fedsieve.run import rundir, tracking
from fedsieve.study.jobs import Job, Known, Outcome, ShowRound, diverged, finished, run_all
from fedsieve.study.plan import LAST, Plan, final_jobs, trial_job, trial_jobs
from fedsieve.study.tables import Settings
from fedsieve.tasks.words import spoken

TABLE = "table"  # .json and .md
TUNING = "tuning.json"


class Trial(NamedTuple):
    """What one set of settings reached; score is None where a run of it diverged."""

    settings: Settings
    score: float | None


class Tuned(NamedTuple):
    """How an entry's trials ended. best: the number of the winner, None where all diverged."""

    trials: tuple[Trial, ...]
    best: int | None


class Result(NamedTuple):
    """What a comparison found. rows: of the table, a cell by its head; written: report and tables.

    legend: how to read the table; notes: of the entries
    problems: a line for every run that failed, and every entry that could not be run
    groups: entry -> the directories of its runs that are done
    """

    rows: list[dict[str, str]]
    legend: str
    notes: list[str]
    problems: list[str]
    written: list[Path]
    groups: dict[str, list[Path]]


def run(
    plan: Plan,
    workers: int,
    show: ShowRound,
    say: Callable[[str], None],
    known: Known | None = None,
) -> Result:
    """Tune, then run every entry and seed, then write tables and report.

    What is done already is not done again. say: takes lines of progress. known: see `run_all`
    Raises FedSieveError if a directory holds another run, runner.Stopped if the user stops it.
    """
    plan.folder.mkdir(parents=True, exist_ok=True)
    known = {} if known is None else known
    tuned: dict[str, Tuned] = {}
    outcomes: list[Outcome] = []
    if jobs := trial_jobs(plan):
        outcomes = run_all(jobs, workers, show, counting(jobs, "trial", say), say, known)
        tuned = judge(plan)
        _write_tuning(plan, tuned)
        for name, result in tuned.items():
            say(f"{name}: {_winner(result)}")
    # A trial that diverged has not failed: it has lost.
    failed = [o for o in outcomes if o.problem is not None and diverged(o.job) is None]
    chosen = {n: t.trials[t.best].settings for n, t in tuned.items() if t.best is not None}
    jobs = final_jobs(plan, chosen)
    outcomes = run_all(jobs, workers, show, counting(jobs, "run", say), say, known)
    failed += [o for o in outcomes if o.problem is not None]
    problems = [f"{o.job.name}: {o.problem}" for o in failed]
    problems += [
        f"{entry.name}: none of its trials has won, so it was not run"
        for entry in plan.entries
        if entry.trials and entry.name not in chosen
    ]
    return _result(plan, tuned, [o.job for o in outcomes if o.problem is None], problems)


def judge(plan: Plan) -> dict[str, Tuned]:
    """The entries whose trials are all done, and which of them is best (the first of equals)."""
    assert plan.tune is not None
    judged = {}
    for entry in plan.entries:
        trials = []
        for number, settings in enumerate(entry.trials):
            runs = [trial_job(plan, plan.tune, entry, number, seed) for seed in plan.tune.seeds]
            if any(diverged(job) for job in runs) or all(finished(job) for job in runs):
                trials.append(Trial(settings, score(runs)))
        if trials and len(trials) == len(entry.trials):
            # A correlation may be below zero and still be the best.
            scores = [-math.inf if trial.score is None else trial.score for trial in trials]
            best = scores.index(max(scores)) if max(scores) > -math.inf else None
            judged[entry.name] = Tuned(tuple(trials), best)
    return judged


def score(jobs: Sequence[Job]) -> float | None:
    """What a trial reached, in the mean over its runs: the mean of the leading metric in the last
    three evaluations after training began. None where a run diverged, or a score is no number.

    Raises FedSieveError if a run was never evaluated.
    """
    if any(diverged(job) is not None for job in jobs):
        return None
    mean = statistics.fmean(_score(job.folder) for job in jobs)
    return mean if math.isfinite(mean) else None


def _score(folder: Path) -> float:
    rows = report.rounds(folder / rundir.METRICS)
    values = [next(iter(r.metrics.values())) for r in rows if r.round > 0 and r.metrics]
    if not values:
        raise FedSieveError(f"{folder} holds no evaluation, so that its settings cannot be judged")
    return statistics.fmean(values[-LAST:])


def counting(
    jobs: Sequence[Job], what: str, say: Callable[[str], None]
) -> Callable[[Outcome], None]:
    """Say how many jobs there are, and give a function that says so when one ends."""
    before = done = sum(finished(job) or diverged(job) is not None for job in jobs)
    say(f"{len(jobs)} {what}s" + (f", {done} of them done already" if done else ""))
    whole = Path(os.path.commonpath([job.folder.parent for job in jobs])) if jobs else Path()
    for asked in dict.fromkeys(job.recipe.tracking for job in jobs):
        if asked is not None:
            say(f"tracked by {tracking.where(asked, whole)}")
    started = time.monotonic()

    def end(outcome: Outcome) -> None:
        nonlocal done
        done += 1
        each = (time.monotonic() - started) / (done - before)
        left = f", about {duration(each * (len(jobs) - done))} left" if done < len(jobs) else ""
        said = "done" if outcome.problem is None else f"failed: {outcome.problem}"
        say(f"[{what} {done}/{len(jobs)}{left}] {outcome.job.name} {said}")

    return end


def _winner(result: Tuned) -> str:
    if result.best is None:
        return f"all {len(result.trials)} trials diverged"
    best = result.trials[result.best]
    said = ", ".join(f"{key} = {value}" for key, value in flat(best.settings))
    return f"{said} (best of {len(result.trials)} trials, {best.score:.4f} on validation)"


def _write_tuning(plan: Plan, tuned: Mapping[str, Tuned]) -> None:
    assert plan.tune is not None
    told = {
        "seeds": plan.tune.seeds,
        "set": plan.tune.set,
        "score": f"mean score on validation of the last {LAST} evaluations, mean over seeds",
        "entries": {
            name: {"trials": [t._asdict() for t in result.trials], "best": result.best}
            for name, result in tuned.items()
        },
    }
    write_whole(plan.folder / TUNING, (json.dumps(told, indent=2) + "\n").encode())


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """A table of cells, by their heads."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _result(
    plan: Plan, tuned: Mapping[str, Tuned], done: Sequence[Job], problems: list[str]
) -> Result:
    """Write table.json, table.md and the report of the runs that are done."""
    groups: dict[str, list[Path]] = {}
    for job in done:
        groups.setdefault(job.folder.parent.name, []).append(job.folder)
    notes = [*plan.notes, *_notes(plan, tuned)]
    if not groups:
        return Result([], "", notes, problems, [], {})
    found = report.table(groups, plan.target)
    legend = _legend(found)
    rows = [_cells(row) for row in found]
    text = markdown(rows) + "\n" + "".join(f"- {note}\n" for note in (legend, *notes))
    plain = {
        "rows": [_plain(row) for row in found],
        "uplinks": [world.link.uplink for world in REFERENCE],
        "notes": [legend, *notes],
        "problems": problems,
    }
    page = plan.folder / rundir.REPORT
    written = [page, plan.folder / f"{TABLE}.md", plan.folder / f"{TABLE}.json"]
    write_whole(written[1], text.encode())
    write_whole(written[2], (json.dumps(plain, indent=2) + "\n").encode())
    report.write([], page, target=plan.target, groups=groups)
    return Result(rows, legend, notes, problems, written, groups)


def _legend(rows: Sequence[report.Row]) -> str:
    target = rows[0].target
    text = "Mean ± standard deviation of the sample, over seeds. "
    if target is None:
        return text + "No run was evaluated."
    which = "as was asked for" if target.given else "the best that every run reached"
    text += (
        f"The target is {spoken(target.measure)} {target.value:.4g}, {which}; bytes and "
        "time to it are means over the runs that reached it; a cell says how many, where some did "
        f"not. Time is simulated, for downlinks of {REFERENCE[0].link.downlink:g} Mbit/s."
    )
    at_once = [r.label for r in rows if r.bytes_to_target and r.bytes_to_target.mean == 0]
    if at_once:
        text += (
            f" It says nothing of {', '.join(at_once)}: round 0 had it, before anything was sent; "
            "a higher target does."
        )
    return text


def _notes(plan: Plan, tuned: Mapping[str, Tuned]) -> list[str]:
    """What a reader of the table must know about each entry."""
    notes = []
    for entry in plan.entries:
        used = f"budgets used: {', '.join(entry.knobs)}" if entry.knobs else "no budgets used"
        parts = [f"method {entry.method}", used, *entry.notes]
        if entry.name in tuned:
            parts.append(_winner(tuned[entry.name]))
        elif plan.tune is not None:
            parts.append("trials not done" if entry.trials else "not tuned")
        notes.append(f"{entry.name}: {'; '.join(parts)}")
    return notes


def _cells(row: report.Row) -> dict[str, str]:
    measure = "accuracy" if row.target is None else spoken(row.target.measure)
    at = "" if row.target is None else f" to {row.target.value:.3g}"
    reached = f" ({row.reached} of {row.runs})" if 0 < row.reached < row.runs else ""
    cells = {
        "entry": row.label,
        "seeds": str(row.runs),
        f"final {measure}": _said(row.final, words.score),
        f"best {measure}": _said(row.best, words.score),
        "sent": _said(row.total_bytes, words.megabytes),
        f"sent{at}": _said(row.bytes_to_target, words.megabytes) + reached,
    }
    for world, seconds in zip(REFERENCE, row.seconds_to_target, strict=True):
        cells[f"time at {world.link.uplink:g} Mbit/s up"] = _said(seconds, duration) + reached
    cells["adapter memory"] = _said(row.memory_bytes, words.megabytes)
    return cells


def _said(found: report.Spread | None, form: Callable[[float, float | None], str]) -> str:
    return "-" if found is None else form(found.mean, found.deviation)


def _plain(value: Any) -> Any:
    """NamedTuples as tables by field name, for JSON."""
    if isinstance(value, report.Row | report.Spread | report.Target):
        return {key: _plain(each) for key, each in value._asdict().items()}
    return [_plain(each) for each in value] if isinstance(value, tuple) else value
