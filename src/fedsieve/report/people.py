"""Who took part: each client, or site, with its rows, its rounds and what it sent.

How labels are spread over clients is in no log: which labels a client has is its own. What may be
told of it stands beside the last evaluation (shown.py).
"""

import statistics
from collections.abc import Sequence

from fedsieve.errors import count
from fedsieve.report.html import cut, folded, table
from fedsieve.report.read import OfClient, Run
from fedsieve.report.settings import is_federation
from fedsieve.report.words import NONE, data, duration, score

OPEN = 12  # clients that are not folded away
SHOWN = 200  # of one run; of several, fewer of each
SHOWN_OF_SEVERAL = 20
LONGEST = 80  # characters of a name


def section(runs: Sequence[Run]) -> str:
    """As HTML: of one run as it is, of several folded away; empty where no log tells."""
    told = [run for run in runs if run.clients and run.clients.each]
    if not told:
        return ""
    if len(runs) == 1:
        inner = _of_run(runs[0], SHOWN)
    else:
        inner = folded([(run.name, _of_run(run, SHOWN_OF_SEVERAL)) for run in told])
    return f'<section><h2 id="clients">Who took part</h2>{inner}</section>'


def _of_run(run: Run, most: int) -> str:
    assert run.clients is not None
    each, shown = run.clients.each, run.clients.each[:most]
    noun = "site" if is_federation(run) else "client"
    body = "".join(map(_row, shown))
    heads = [noun.title(), "Budget", "Rows", "Rounds", "Merged", "Down", "Up", "Work", "Last loss"]
    made = table(heads, body, f"{noun.title()}s of {run.name}", "people", sortable=True)
    said = _spread(run, each, noun)
    if len(each) > len(shown):
        said += f" Below are the {len(shown)} that cost most."
    note = f'<p class="note">{said}</p>'
    if len(each) <= OPEN:
        return f'{note}<div class="card">{made}</div>'
    return f"{note}<details><summary>{count(len(shown), noun)}, each</summary>{made}</details>"


def _spread(run: Run, each: Sequence[OfClient], noun: str) -> str:
    """How many there are, and how unequal."""
    partition = run.recipe.get("partition")
    planned = partition.get("clients") if isinstance(partition, dict) else None
    of = f" of {planned:,}" if isinstance(planned, int) and planned >= len(each) else ""
    said = f"{len(each):,}{of} {noun}s took part, {_range([one.asked for one in each])} rounds each"
    rows = [one.rows for one in each if one.rows is not None]
    return f"{said}, with {_range(rows)} rows each." if rows else f"{said}."


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    if low == high:
        return f"{low:,}"
    return f"{low:,} to {high:,} (median {f'{statistics.median(values):,.1f}'.removesuffix('.0')})"


def _row(one: OfClient) -> str:
    cells = [
        cut(one.budget, LONGEST),
        NONE if one.rows is None else f"{one.rows:,}",
        f"{one.asked:,}",
        f"{one.merged:,}",
        data(one.down_bytes),
        data(one.up_bytes),
        f'<data value="{one.seconds:.3f}">{duration(one.seconds)}</data>',
        NONE if one.loss is None else score(one.loss),
    ]
    told = "".join(f"<td>{cell}</td>" for cell in cells)
    return f'<tr><th scope="row">{cut(one.name, LONGEST)}</th>{told}</tr>'
