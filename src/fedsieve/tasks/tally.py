"""What an evaluation adds up, batch by batch and client by client, and the scores made of it.

A metric such as macro F1 is no mean of the metrics of parts. What parts do add up are counts: so a
task counts, the counts of any number of batches or sites are added, and the metric is that of the
sums, exactly what it would be over all rows at once.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedsieve.errors import FedSieveError, nearest, quoted

if TYPE_CHECKING:
    from fedsieve.tasks.task import Task


MATRIX = 30  # classes: which was taken for which, of more, is a table that nobody reads
CLIENTS = 200  # whose scores and classes an evaluation keeps
SHOWN = 12  # answers that an evaluation keeps to be looked at


class Answer(NamedTuple):
    """A row, for people: what was asked, what is so, and what the model told."""

    asked: str
    expected: str
    told: str


class OfClass(NamedTuple):
    """How one class was told.

    rows: that are of it; taken_for: of those, how many were taken for each class, where a row has
        one class, and there are at most MATRIX; else empty
    """

    name: str
    rows: int
    precision: float
    recall: float
    f1: float
    taken_for: tuple[int, ...] = ()


class OfOwner(NamedTuple):
    """How a client's own rows were told: how many there are, and the leading metric over them."""

    name: str
    rows: int
    score: float


class Held(NamedTuple):
    """How many of a client's training rows are of each class, in the classes' order."""

    name: str
    rows: tuple[int, ...]


class Details(NamedTuple):
    """What an evaluation shows beyond its scores.

    clients: of those whose own rows were evaluated the CLIENTS that did worst, the worst first
    """

    classes: tuple[OfClass, ...] = ()
    answers: tuple[Answer, ...] = ()
    clients: tuple[OfOwner, ...] = ()


class Tally(NamedTuple):
    """What was counted over some rows.

    loss:    summed over what is counted, be it rows or tokens; counted: how many those are
    sums:    the task's own counts, by name
    kept:    values row by row, by name, for metrics that no sums give; they leave no site
    answers: of the first few rows; they leave no site either
    """

    loss: float = 0.0
    counted: int = 0
    sums: Mapping[str, float] = {}
    kept: Mapping[str, NDArray[np.float64]] = {}
    answers: tuple[Answer, ...] = ()


class Score(NamedTuple):
    """An adapter's evaluation.

    loss:    the mean over what is counted: rows, or the tokens that a model predicts
    metrics: the task's own, by name; the first leads, and is better when it is higher
    """

    loss: float
    metrics: Mapping[str, float]
    counted: int
    details: Details = Details()


def total(tallies: Iterable[Tally]) -> Tally:
    """All of them together."""
    loss, counted = 0.0, 0
    sums: dict[str, float] = {}
    kept: dict[str, list[NDArray[np.float64]]] = {}
    answers: tuple[Answer, ...] = ()
    for each in tallies:
        loss, counted = loss + each.loss, counted + each.counted
        for name, value in each.sums.items():
            sums[name] = sums.get(name, 0.0) + value
        for name, values in each.kept.items():
            kept.setdefault(name, []).append(values)
        answers = (*answers, *each.answers)[:SHOWN]
    together = {name: np.concatenate(values) for name, values in kept.items()}
    return Tally(loss, counted, sums, together, answers)


def check_lead(task: "Task", lead: str | None, classes: Sequence[str], by_row: bool = True) -> None:
    """Raises FedSieveError, with the nearest, for a metric that cannot lead (task.Task.leads)."""
    known = task.leads(classes, by_row)
    if lead is not None and lead not in known:
        known_elsewhere = lead in task.leads((), True)
        over = "these classes" if by_row else "sites, which send sums alone"
        raise FedSieveError(
            f"{quoted(lead)} cannot lead: it is no metric that this task tells"
            + (f" over {over}" if known_elsewhere else " and that is better when higher")
            + nearest(lead, known)
        )


def scores(
    task: "Task",
    parts: Sequence[Tally],
    classes: tuple[str, ...],
    lead: str | None = None,
    owners: Sequence[str] = (),
) -> Score:
    """The scores over all clients' rows, and how the leading metric spreads over the clients.

    parts: one of each client; lead: as in `score`; owners: the clients, where they are to be named
    Where two and more have rows, `client_mean`, `client_p10` (the 10th percentile, between
    neighbours on a line) and `client_worst` come after the task's own metrics.
    """
    joint = score(task, total(parts), classes, lead)
    places = [place for place, part in enumerate(parts) if part.counted]
    own = [next(iter(_metrics(task, parts[n], classes, lead).values())) for n in places]
    if len(own) < 2:
        return joint
    spread = {
        "client_mean": float(np.mean(own)),
        "client_p10": float(np.percentile(own, 10)),
        "client_worst": min(own),
    }
    told = zip(places, own, strict=True)
    each = [OfOwner(owners[n], parts[n].counted, value) for n, value in told] if owners else []
    worst = tuple(sorted(each, key=lambda one: one.score)[:CLIENTS])
    details = joint.details._replace(clients=worst)
    return joint._replace(metrics={**joint.metrics, **spread}, details=details)


def beside(main: Score, more: Mapping[str, Score]) -> Score:
    """A score with the metrics of other rows after its own, their rows' name before each."""
    others = {f"{name}_{m}": v for name, each in more.items() for m, v in each.metrics.items()}
    return main._replace(metrics={**main.metrics, **others})


def check_beside(task: "Task", names: Sequence[str]) -> None:
    """Raises FedSieveError for rows whose metrics would be called as others are (`beside`)."""
    own = task.leads((), True)
    seen = dict.fromkeys(own, "the task's own metric")
    for name in names:
        for metric in own:
            whole = f"{name}_{metric}"
            if whole in seen:
                raise FedSieveError(f"{name}: {whole!r} would be two, {seen[whole]} too: rename it")
            seen[whole] = f"that of {name!r}"


def score(task: "Task", tally: Tally, classes: tuple[str, ...], lead: str | None = None) -> Score:
    """The scores that a tally makes; nothing may be counted in it, and all is 0 then.

    lead: the metric that comes first, one that `check_lead` passes; None is the task's own
    """
    if not tally.counted:
        return Score(0.0, {}, 0)
    of_classes = task.by_class(tally, classes) if task.by_class else ()
    details = Details(of_classes, tally.answers)
    told = _metrics(task, tally, classes, lead)
    return Score(tally.loss / tally.counted, told, tally.counted, details)


def _metrics(
    task: "Task", tally: Tally, classes: tuple[str, ...], lead: str | None
) -> dict[str, float]:
    """The task's own, the leading one first."""
    told = task.metrics(tally, classes)
    return told if lead not in told else {lead: told[lead], **told}
