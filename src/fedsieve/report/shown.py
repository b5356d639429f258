"""What the last evaluation shows beyond its scores: how each class and each client's own rows were
told, and some answers; and beside it which classes clients' rows are of.

A run keeps it in details.json, where every evaluation takes the place of the one before.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from fedsieve.disk import NotJson, bytes_of, parsed, refuse_link
from fedsieve.errors import FedSieveError, explain
from fedsieve.report.html import cut, table
from fedsieve.tasks.tally import CLIENTS, MATRIX, Answer, Held, OfClass, OfOwner

FILE = "details.json"
LARGEST = 1 << 25  # bytes of the file
MOST = 1 << 53  # rounds and rows: what a float counts
SHOWN = 20  # classes that are not folded away
LONGEST = 2000  # characters of a cell


class Shown(NamedTuple):
    """round: after which; the others as in `tally.Details`; held: clients' training rows."""

    round: int
    classes: tuple[OfClass, ...]
    answers: tuple[Answer, ...]
    clients: tuple[OfOwner, ...] = ()
    held: tuple[Held, ...] = ()


_SHOWN = TypeAdapter(Shown)


def load(folder: Path) -> Shown | None:
    """What a run's folder keeps of it; None where it keeps none.

    Raises FedSieveError where the file is damaged.
    """
    path = folder / FILE
    refuse_link(path)
    if not path.is_file():
        return None
    try:
        found = _SHOWN.validate_python(parsed(bytes_of(path, LARGEST), str(path)))
    except (NotJson, ValidationError, OSError) as error:
        why = _first(error.errors()[0]) if isinstance(error, ValidationError) else error
        raise FedSieveError(f"{path} cannot be read: {why}. Remove it to do without") from None
    if {len(each.taken_for) for each in found.classes} - {0, len(found.classes)}:
        raise FedSieveError(f"{path} has classes that do not fit together. Remove it to do without")
    if {len(each.rows) for each in found.held} - {len(found.classes)}:
        raise FedSieveError(f"{path} has clients of other classes. Remove it to do without")
    told: tuple[OfOwner | Held, ...] = (*found.clients, *found.held)
    strange = next((each for each in told if not _can_have(each)), None)
    if strange is not None or max(len(found.clients), len(found.held)) > CLIENTS:
        of = "more clients" if strange is None else f"of client {strange.name[:40]!r} figures"
        raise FedSieveError(f"{path} tells {of} than a run has. Remove it to do without")
    odd = next((each for each in found.classes if not _can_be(each)), None)
    if odd is not None or not 0 <= found.round <= MOST:
        where = f"round {found.round}" if odd is None else f"of class {odd.name[:40]!r} figures"
        raise FedSieveError(f"{path} tells {where} that no run has. Remove it to do without")
    return found


def _first(detail: Mapping[str, Any]) -> str:
    return explain(detail, [*map(str, detail["loc"])], lambda _: ())


def _can_be(each: OfClass) -> bool:
    """Whether rows can give a class these figures."""
    rounded = 1 + 1e-9
    shares = all(0 <= share <= rounded for share in (each.precision, each.recall, each.f1))
    counts = all(count >= 0 for count in each.taken_for)
    whole = not each.taken_for or sum(each.taken_for) == each.rows
    return shares and counts and whole and 0 <= each.rows <= MOST


def _can_have(each: OfOwner | Held) -> bool:
    """Whether a client can have these figures."""
    if isinstance(each, Held):
        return all(0 <= rows <= MOST for rows in each.rows)
    return 0 <= each.rows <= MOST and math.isfinite(each.score)


def section(shown: Shown) -> str:
    """As HTML; empty where there is nothing to show."""
    parts = []
    if shown.classes:
        parts.append(_classes(shown))
    if 1 < len(shown.classes) <= MATRIX and all(each.taken_for for each in shown.classes):
        parts.append(_matrix(shown.classes))
    if shown.clients:
        parts.append(_clients(shown.clients))
    if shown.held:
        parts.append(_held(shown))
    if shown.answers:
        parts.append(_answers(shown.answers))
    note = f'<p class="note">Of the evaluation after round {shown.round:,}.</p>'
    return note + "".join(f'<div class="card">{part}</div>' for part in parts) if parts else ""


def _classes(shown: Shown) -> str:
    body = "".join(
        f'<tr><th scope="row">{cut(each.name, LONGEST)}</th><td>{each.rows:,}</td>'
        f"<td>{each.precision:.3f}</td><td>{each.recall:.3f}</td><td>{each.f1:.3f}</td></tr>"
        for each in shown.classes
    )
    made = table(
        ["Class", "Rows", "Precision", "Recall", "F1"], body, "Scores by class", sortable=True
    )
    title = "By class"
    if len(shown.classes) > SHOWN:
        title += f": {len(shown.classes):,} classes"
    return _open(title, made, len(shown.classes))


def _matrix(classes: Sequence[OfClass]) -> str:
    """Rows are what is so, columns what was told, by their numbers: names would not fit."""
    body = ""
    for number, each in enumerate(classes, 1):
        cells = "".join(_shaded(count, each.rows) for count in each.taken_for)
        body += f'<tr><th scope="row">{number} {cut(each.name, LONGEST)}</th>{cells}</tr>'
    heads = ["", *(str(number) for number in range(1, len(classes) + 1))]
    made = table(heads, body, "What each class was taken for", "matrix")
    return f"<h3>What each class (row) was taken for (column)</h3>{made}"


def _clients(clients: Sequence[OfOwner]) -> str:
    body = "".join(
        f'<tr><th scope="row">{cut(each.name, LONGEST)}</th><td>{each.rows:,}</td>'
        f"<td>{each.score:.3f}</td></tr>"
        for each in clients
    )
    made = table(["Client", "Rows", "Score"], body, "Scores by client", sortable=True)
    return _open(f"By client, the worst first ({len(clients):,})", made, len(clients))


def _held(shown: Shown) -> str:
    """Rows are clients, columns classes, by their numbers as above."""
    body = ""
    for each in shown.held:
        cells = "".join(_shaded(count, sum(each.rows)) for count in each.rows)
        body += f'<tr><th scope="row">{cut(each.name, LONGEST)}</th>{cells}</tr>'
    heads = ["", *(str(number) for number in range(1, len(shown.classes) + 1))]
    made = table(heads, body, "How many of a client's training rows are of each class", "matrix")
    return _open("Training rows of a client (row) by class (column)", made, len(shown.held))


def _open(title: str, inner: str, rows: int) -> str:
    """Folded away where there are many rows."""
    if rows <= SHOWN:
        return f"<h3>{title}</h3>{inner}"
    return f"<details><summary>{title}</summary>{inner}</details>"


def _shaded(count: int, of: int) -> str:
    """A cell as dark as its count's share."""
    share = round(100 * count / max(1, of))
    shade = f"background:color-mix(in srgb,var(--run-0) {share * 7 // 10}%,transparent)"
    return f'<td style="{shade}">{count:,}</td>' if count else "<td></td>"


def _answers(answers: Sequence[Answer]) -> str:
    asked = any(each.asked for each in answers)
    body = "".join(
        "<tr>"
        + (f"<td>{cut(each.asked, LONGEST)}</td>" if asked else "")
        + f"<td>{cut(each.expected, LONGEST)}</td><td>{cut(each.told, LONGEST)}</td></tr>"
        for each in answers
    )
    heads = [*(["Row"] if asked else []), "Expected", "Told"]
    made = table(heads, body, "Answers", "answers")
    return f"<h3>The first {len(answers)} answers</h3>{made}"
