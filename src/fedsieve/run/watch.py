"""A run that another process is working on, in a few lines: what its folder's files say of it.

Only whole lines of logs are believed, and of what single clients did the end of the log alone is
read, so that looking costs the same however long a run is. Nothing is written, and no lock taken.
"""

import math
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from fedsieve import report
from fedsieve.disk import last_objects
from fedsieve.errors import FedSieveError, printable
from fedsieve.recipe import read as recipes
from fedsieve.recipe.schema import Recipe
from fedsieve.report.read import Round
from fedsieve.report.words import duration, fewer, megabytes
from fedsieve.run import rundir
from fedsieve.tasks.words import spoken

MOST_NAMED = 6  # clients of a round
END = 1 << 20  # bytes of clients.jsonl that are read
RECENT = 5  # rounds whose mean says how long one takes
WIDTH = 32  # of a small curve
QUIET = 120.0  # seconds without news, at least, after which a run may have stopped
_BARS = "▁▂▃▄▅▆▇█"


class Picture(NamedTuple):
    """What there is to see. ended: there is no more to come"""

    lines: list[str]
    ended: bool


class Standing(NamedTuple):
    """How far a run is. Times in seconds.

    rows: round 0 first, as far as they are logged
    each: what a round takes, about; None before the first
    left: until its last round is through, about
    age: since something was logged; ended: it has its adapter and its report
    """

    recipe: Recipe
    rows: tuple[Round, ...]
    each: float | None
    left: float | None
    age: float
    ended: bool

    @property
    def number(self) -> int:
        return self.rows[-1].round if self.rows else 0


def of_run(folder: Path) -> Picture:
    """A picture of a run, or of a federation's server.

    Raises FedSieveError if the folder holds no run, or for a file in it that is damaged.
    """
    run = standing(folder)
    recipe, rows = run.recipe, run.rows
    lines = [f"{recipe.name}: {recipe.method.name}, {recipe.model.task}, in {folder}"]
    if not rows:
        what = "waiting for its sites" if rundir.federated(folder) else "before its first round"
        return Picture([*lines, _quiet(run, folder) or what], False)
    lines.append(f"round {run.number}/{recipe.rounds}  {_when(run, folder)}")
    lines += curves(rows)
    last = rows[-1]
    if last.round:
        sent = f"sent {megabytes(last.total_bytes)}"
        if last.total_bytes and last.dense_bytes:
            ratio = fewer(last.total_bytes, last.dense_bytes)
            sent += f", dense LoRA {megabytes(last.dense_bytes)}: {ratio}"
        lines.append(sent)
        lines += _left_out(folder, rows)
    if last.epsilon is not None:
        asked = None if recipe.privacy is None else recipe.privacy.epsilon
        lines.append(f"epsilon {last.epsilon:.3f}" + ("" if asked is None else f" of {asked:g}"))
    return Picture([printable(line) for line in lines], run.ended)


def standing(folder: Path) -> Standing:
    """How far a run is, from its recipe and the log of its rounds. Raises as `of_run` does."""
    rundir.check(folder)
    source, log = folder / rundir.RECIPE, folder / rundir.METRICS
    recipe = _recipe(source, _signature(source))
    rows = _rows(log, _signature(log)) if log.exists() else ()
    took = [row.seconds for row in rows if row.round][-RECENT:]
    each = sum(took) / len(took) if took else None
    number = rows[-1].round if rows else 0
    age = max(0.0, time.time() - (log if log.exists() else source).stat().st_mtime)
    left = None if each is None else max(0.0, each * (recipe.rounds - number) - age)
    ended = rundir.has_ended(folder, number, recipe.rounds)
    return Standing(recipe, rows, each, left, age, ended)


def curves(rows: Sequence[Round]) -> list[str]:
    """The leading metric and the losses, each with its small curve over the rounds."""
    found: dict[str, list[float]] = {}
    name = next((next(iter(row.metrics)) for row in rows if row.metrics), None)
    if name is not None:
        found[spoken(name)] = [row.metrics[name] for row in rows if name in row.metrics]
    found["eval loss"] = [row.eval_loss for row in rows if row.eval_loss is not None]
    found["training loss"] = [row.loss for row in rows if row.round and not math.isnan(row.loss)]
    wide = max(map(len, found))
    return [
        f"{title:<{wide}}  {values[-1]:.4f}  {spark(values)}" + _best(title, values, name)
        for title, values in found.items()
        if values
    ]


def _best(title: str, values: Sequence[float], name: str | None) -> str:
    finite = [value for value in values if math.isfinite(value)]
    return f"  best {max(finite):.4f}" if name and title == spoken(name) and finite else ""


def spark(values: Sequence[float], width: int = WIDTH) -> str:
    """A curve of one line: `width` values of all, evenly, the first and the last among them."""
    if len(values) > width:
        step = (len(values) - 1) / (width - 1)
        values = [values[round(number * step)] for number in range(width)]
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)

    def bar(value: float) -> str:
        if not math.isfinite(value):
            return "?"
        share = (value - low) / (high - low) if high > low else 0.5
        return _BARS[min(len(_BARS) - 1, int(share * len(_BARS)))]

    return "".join(map(bar, values))


def news(run: Standing) -> str | None:
    """What to say of a run that has logged nothing for far longer than a round takes."""
    if run.ended or run.age < max(QUIET, 5 * (run.each or 0.0)):
        return None
    return f"nothing new for {duration(run.age)}"


def _when(run: Standing, folder: Path) -> str:
    if run.ended:
        return "finished"
    if (quiet := _quiet(run, folder)) is not None:
        return quiet
    if run.left is None:
        return "the first is under way"
    if run.number >= run.recipe.rounds:
        return "ending"
    if not run.left:
        return f"nothing new for {duration(run.age)}, longer than its rounds take"
    return f"about {duration(run.left)} left"


def _quiet(run: Standing, folder: Path) -> str | None:
    quiet = news(run)
    if quiet is None:
        return None
    return f"{quiet}: if it has stopped, go on with `{rundir.again(folder)}`"


def _left_out(folder: Path, rows: Sequence[Round]) -> list[str]:
    """Who was left out of the last round, by name, and how many before."""
    last = rows[-1]
    asked = f" of {last.clients}" if last.clients else ""
    so_far = sum(row.dropped for row in rows)
    before = f" ({so_far} so far)" if so_far > last.dropped else ""
    if not last.dropped:
        return [f"left out of round {last.round}: none{asked}{before}"]
    lines = [f"left out of round {last.round}: {last.dropped}{asked}{before}"]
    path = rundir.place(folder, rundir.CLIENTS)
    named = [row for row in last_objects(path, END) if row.get("round") == last.round]
    dropped = [row for row in named if row.get("dropped") is not None]
    for row in dropped[:MOST_NAMED]:
        lines.append(f"  {str(row.get('client'))[:60]}: {str(row['dropped'])[:120]}")
    if len(dropped) > MOST_NAMED:
        lines.append(f"  and {len(dropped) - MOST_NAMED} more")
    return lines


Signature = tuple[int, int]


def _signature(path: Path) -> Signature:
    """What differs when a file was written to."""
    found = path.stat()
    return found.st_mtime_ns, found.st_size


@lru_cache(maxsize=1024)
def _recipe(path: Path, signature: Signature) -> Recipe:
    return recipes.parse(recipes.read(str(path)), str(path))


@lru_cache(maxsize=1024)
def _rows(path: Path, signature: Signature) -> tuple[Round, ...]:
    try:
        return tuple(report.rounds(path))
    except FedSieveError:
        time.sleep(0.2)  # half a line may have become a whole one while it was read
        return tuple(report.rounds(path))
