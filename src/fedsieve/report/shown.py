"""What the last evaluation shows beyond its scores: how each class was told, and some answers.

A run keeps it in details.json, where every evaluation takes the place of the one before.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import TypeAdapter, ValidationError

from fedsieve.disk import NotJson, parsed, refuse_link
from fedsieve.errors import FedSieveError
from fedsieve.report.html import cut, table
from fedsieve.tasks.tally import MATRIX, Answer, OfClass

FILE = "details.json"
LARGEST = 1 << 25  # bytes of the file
MOST = 1 << 53  # rounds and rows: what a float counts
SHOWN = 20  # classes that are not folded away
LONGEST = 2000  # characters of a cell


class Shown(NamedTuple):
    """round: after which; classes and answers: as the task told them."""

    round: int
    classes: tuple[OfClass, ...]
    answers: tuple[Answer, ...]


_SHOWN = TypeAdapter(Shown)


def load(folder: Path) -> Shown | None:
    """What a run's folder keeps of it; None where it keeps none.

    Raises FedSieveError where the file is damaged.
    """
    path = folder / FILE
    refuse_link(path)
    if not path.is_file():
        return None
    if path.stat().st_size > LARGEST:
        raise FedSieveError(f"{path} is larger than any that a run writes")
    try:
        found = _SHOWN.validate_python(parsed(path.read_bytes(), str(path)))
    except (NotJson, ValidationError, OSError) as error:
        why = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise FedSieveError(f"{path} cannot be read: {why}. Remove it to do without") from None
    if {len(each.taken_for) for each in found.classes} - {0, len(found.classes)}:
        raise FedSieveError(f"{path} has classes that do not fit together. Remove it to do without")
    odd = next((each for each in found.classes if not _can_be(each)), None)
    if odd is not None or not 0 <= found.round <= MOST:
        where = f"round {found.round}" if odd is None else f"of class {odd.name[:40]!r} figures"
        raise FedSieveError(f"{path} tells {where} that no run has. Remove it to do without")
    return found


def _can_be(each: OfClass) -> bool:
    """Whether rows can give a class these figures."""
    rounded = 1 + 1e-9
    shares = all(0 <= share <= rounded for share in (each.precision, each.recall, each.f1))
    counts = all(count >= 0 for count in each.taken_for)
    whole = not each.taken_for or sum(each.taken_for) == each.rows
    return shares and counts and whole and 0 <= each.rows <= MOST


def section(shown: Shown) -> str:
    """As HTML; empty where there is nothing to show."""
    parts = []
    if shown.classes:
        parts.append(_classes(shown))
    if 1 < len(shown.classes) <= MATRIX and all(each.taken_for for each in shown.classes):
        parts.append(_matrix(shown.classes))
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
    if len(shown.classes) <= SHOWN:
        return f"<h3>By class</h3>{made}"
    return f"<details><summary>By class: {len(shown.classes):,} classes</summary>{made}</details>"


def _matrix(classes: Sequence[OfClass]) -> str:
    """Rows are what is so, columns what was told, by their numbers: names would not fit."""
    body = ""
    for number, each in enumerate(classes, 1):
        cells = ""
        for count in each.taken_for:
            share = round(100 * count / max(1, each.rows))
            shade = f"background:color-mix(in srgb,var(--run-0) {share * 7 // 10}%,transparent)"
            cells += f'<td style="{shade}">{count:,}</td>' if count else "<td></td>"
        body += f'<tr><th scope="row">{number} {cut(each.name, LONGEST)}</th>{cells}</tr>'
    heads = ["", *(str(number) for number in range(1, len(classes) + 1))]
    made = table(heads, body, "What each class was taken for", "matrix")
    return f"<h3>What each class (row) was taken for (column)</h3>{made}"


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
