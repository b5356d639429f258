"""The report: one HTML file that opens offline, and its plots as PNG files beside it.

A report is made from run directories alone, so it can be made again at any time, on any machine,
for one run or for several that overlay, and while a run is still going on. The same directories
give the same page: it holds no date of its own. `read` turns a directory into values, `series`
puts runs of different seeds together, `plots` draws them, `page` sets them in HTML.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from fedsieve.clients.network import REFERENCE, Conditions
from fedsieve.disk import no_room, refuse_link, write_whole
from fedsieve.errors import FedSieveError, reason
from fedsieve.report import series as _series
from fedsieve.report.page import page
from fedsieve.report.plots import draw, to_png, to_svg
from fedsieve.report.read import Run, check_logs, evaluations, load, load_all, rounds
from fedsieve.report.series import Row, Spread, Target, table
from fedsieve.report.shown import load as check_shown

__all__ = [
    "Row",
    "Run",
    "Spread",
    "Target",
    "check_logs",
    "check_shown",
    "evaluations",
    "load",
    "load_all",
    "rounds",
    "table",
    "write",
]


def write(
    runs: Sequence[Path],
    out: Path,
    *,
    target: float | None = None,
    groups: Mapping[str, Sequence[Path]] | None = None,
    conditions: Sequence[Conditions] = REFERENCE,
) -> list[Path]:
    """Write the report of these run directories to `out`, and every plot to `<stem>-<plot>.png`.

    target: the accuracy (where no run has any: the evaluation loss) whose cost in bytes and time is
        told; None takes the best that all runs reach
    groups: label -> the runs of its seeds, drawn as one line with a band. A run of `runs` that is
        in a group is drawn there alone; `runs` may be empty where there are groups
    conditions: of the network, for accuracy against simulated time: a panel each

    Returns the paths written, the HTML file first. The HTML does not need the PNG files.
    Raises FedSieveError where a directory is not a run, has no finished round or holds a damaged
    file, where a target or a link cannot be, or where `out` cannot be written.
    """
    if not conditions:
        raise FedSieveError("No conditions were given: time needs at least one link.")
    series = _series.gather(runs, groups or {})
    rows = _series.rows(series, _series.find_target(series, target), conditions)
    if out.is_dir():
        raise FedSieveError(f"{out} is a directory: name a file, such as {out / 'report.html'}")
    refuse_link(out)
    plots = draw(series, rows, conditions)
    _refuse_others(out, [_picture(out, plot.key) for plot in plots], runs)
    written = [out]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for plot in plots:
            path = _picture(out, plot.key)
            refuse_link(path)
            write_whole(path, to_png(plot))
            written.append(path)
        drawn = [(plot, to_svg(plot)) for plot in plots]
        write_whole(out, page(series, rows, conditions, drawn).encode())
    except OSError as error:
        todo = ": make room, then do it again" * no_room(error)
        raise FedSieveError(f"The report {out} cannot be written: {reason(error)}{todo}") from error
    return written


_PAGE = "report.html"  # of a run, in its folder
_HEAD = 1 << 16  # bytes of a page: enough for its title


def _picture(out: Path, key: str) -> Path:
    return out.with_name(f"{out.stem}-{key}.png")


def _refuse_others(out: Path, pictures: Sequence[Path], runs: Sequence[Path]) -> None:
    """Raises FedSieveError where something would be replaced that no report is: rows, a log, a
    person's own page. What is beside a page of ours is ours.
    """
    if out.name == _PAGE and out.parent.resolve() in {run.resolve() for run in runs}:
        return
    if out.is_file():
        with out.open("rb") as file:
            head = file.read(_HEAD)
        if head.lower().startswith(b"<!doctype html>") and b"FedSieve" in head:
            return
    for path in (out, *pictures):
        if path.exists():
            raise FedSieveError(
                f"{path} is there already and no report of FedSieve's: choose another name, or "
                "move it away"
            )
