"""A study's folder as it lies on the disk: the runs in it, and what became of each.

`compare` and `search` keep each run in <study>/<entry>/<run>, with the recipe that was asked for
beside it from the moment that it is planned.
"""

import contextlib
from pathlib import Path
from typing import Literal, NamedTuple

from fedsieve.disk import bytes_of, refuse_link
from fedsieve.errors import FedSieveError, printable
from fedsieve.report.words import duration
from fedsieve.run import rundir
from fedsieve.run.watch import Picture, Standing, news, spark, standing
from fedsieve.tasks.words import spoken

ASKED = "asked.toml"
DIVERGED = "diverged.txt"
FAILED = "failed.txt"
TABLES = ("table.json", "search.json")  # what a study ends with
MOST = 2000  # runs that are looked at

State = Literal["at work", "failed", "diverged", "waiting", "done"]
MARKS: dict[State, str] = {"diverged": DIVERGED, "failed": FAILED}
ORDER: tuple[State, ...] = ("at work", "failed", "diverged", "waiting", "done")


class Part(NamedTuple):
    """A run of a study. why: it failed or diverged; run: how far it is, once it has begun"""

    name: str
    state: State
    why: str
    run: Standing | None


def holds_one(folder: Path) -> bool:
    """Whether a folder is a study's: something in it was asked for by one."""
    return next(folder.glob(f"*/*/{ASKED}"), None) is not None


def refuse_run(folder: Path) -> None:
    """Raises FedSieveError for a study's folder that is a run's: its report would be replaced.

    A recipe alone may be the study's own; a run's says what it ran on.
    """
    held = (folder / rundir.METRICS).is_file()
    with contextlib.suppress(FedSieveError, OSError):
        held = held or bool(rundir.environment_of(folder))
    if held:
        raise FedSieveError(f"{folder} holds a run of its own: choose another --out")


def of_study(folder: Path) -> Picture:
    """A picture of a study: a line for each run, those at work first.

    Raises FedSieveError for a file of a run that is damaged.
    """
    asked = sorted(folder.glob(f"*/*/{ASKED}"))[:MOST]
    parts = [_part(path.parent) for path in asked]
    parts.sort(key=lambda part: ORDER.index(part.state))
    counts = {state: sum(part.state == state for part in parts) for state in ORDER}
    told = ", ".join(f"{n} {state}" for state, n in counts.items() if n)
    wide = max((len(part.name) for part in parts), default=0)
    lines = [f"{folder}: {len(parts)} runs so far: {told}"]
    lines += [f"{part.state:<9} {part.name:<{wide}}  {_said(part)}".rstrip() for part in parts]
    under_way = counts["at work"] + counts["waiting"]
    return Picture([printable(line) for line in lines], not under_way and _ended(folder, asked))


def _part(folder: Path) -> Part:
    name = f"{folder.parent.name}/{folder.name}"
    for place in (folder.parent, folder):
        refuse_link(place, folder=True)
    for state, mark in MARKS.items():
        refuse_link(folder / mark)
        if (folder / mark).exists() and not (state == "failed" and _done_since(folder)):
            return Part(name, state, _why(folder / mark), None)
    if not (folder / rundir.RECIPE).exists():
        return Part(name, "waiting", "", None)
    run = standing(folder)
    return Part(name, "done" if run.ended else "at work", "", run)


def _done_since(folder: Path) -> bool:
    """Whether a run that once failed has ended: by `fedsieve resume`, its mark stays."""
    try:
        return standing(folder).ended
    except (FedSieveError, OSError):  # it may have failed for that
        return False


def _why(path: Path) -> str:
    try:
        return bytes_of(path, 1 << 20).decode("utf-8", "replace").strip().splitlines()[-1][:200]
    except (OSError, IndexError):
        return ""


def _said(part: Part) -> str:
    run = part.run
    if run is None or not run.rows:
        return part.why
    name = next((next(iter(row.metrics)) for row in run.rows if row.metrics), None)
    said = f"round {run.number}/{run.recipe.rounds}"
    if name is not None:
        values = [row.metrics[name] for row in run.rows if name in row.metrics]
        said += f"  {spoken(name)} {values[-1]:.4f}  {spark(values, 16)}"
    if run.ended:
        return said
    if (quiet := news(run)) is not None:
        return f"{said}  {quiet}"
    if run.left is None:
        return said
    left = f"about {duration(run.left)} left" if run.number < run.recipe.rounds else "ending"
    return f"{said}  {left}"


def _ended(folder: Path, asked: list[Path]) -> bool:
    """Whether the study wrote its table after the last run was asked for."""
    tables = [folder / name for name in TABLES if (folder / name).is_file()]
    if not asked:
        raise FedSieveError(f"{folder} holds no study")
    newest = max(path.stat().st_mtime_ns for path in asked)
    return any(table.stat().st_mtime_ns >= newest for table in tables)
