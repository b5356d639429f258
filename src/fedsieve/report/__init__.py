"""The report: one HTML file that opens offline, and its plots as PNG files beside it.

A report is made from run directories alone, so it can be made again at any time, on any machine,
for one run or for several that overlay, and while a run is still going on. The same directories
give the same page: it holds no date of its own. `read` turns a directory into values, `plots`
draws them, `page` sets them in HTML.
"""

from collections.abc import Sequence
from pathlib import Path

from fedsieve.errors import FedSieveError
from fedsieve.report.page import page
from fedsieve.report.plots import draw, save_png, to_svg
from fedsieve.report.read import Run, load, load_all

__all__ = ["Run", "load", "load_all", "write"]


def write(runs: Sequence[Path], out: Path) -> list[Path]:
    """Write the report of these run directories to `out`, and every plot to `<stem>-<plot>.png`.

    Returns the paths written, the HTML file first. The HTML does not need the PNG files.
    Raises FedSieveError where a directory is not a run, has no finished round or holds a damaged
    file, or where `out` cannot be written.
    """
    loaded = load_all(runs)
    if out.is_dir():
        raise FedSieveError(f"{out} is a directory: name a file, such as {out / 'report.html'}")
    plots = draw(loaded)
    written = [out]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for plot in plots:
            path = out.with_name(f"{out.stem}-{plot.key}.png")
            save_png(plot, path)
            written.append(path)
        out.write_text(page(loaded, [(plot, to_svg(plot)) for plot in plots]), encoding="utf-8")
    except OSError as error:
        raise FedSieveError(f"The report {out} cannot be written: {error}") from error
    return written
