"""The picture in docs/design.md: the floors of the contract, and the imports between the rooms.

Floors come from [tool.importlinter] in pyproject.toml, imports from the code as it is (those for
types alone left out). A room's number is how many lines it has; the wider an arrow, the more files
import across it. The arrows to errors, settings, console and disk, which every room has, are left
out.

    python benchmarks/house.py [--out docs/house.png]
"""

import argparse
import tomllib
from collections import Counter
from pathlib import Path

import grimp
import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
TAKEN_BY_ALL = {"errors", "settings", "console", "disk"}
# Where a floor's rooms stand, by how many there are: no room right above another.
ACROSS = {1: [0.5], 2: [0.3, 0.7], 3: [0.1, 0.62, 0.9], 4: [0.08, 0.36, 0.64, 0.92]}


def floors() -> list[list[str]]:
    """The rooms of each floor, the top one first."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = (
        each for each in settings["tool"]["importlinter"]["contracts"] if each["id"] == "floors"
    )
    return [layer.split(" | ") for layer in contract["layers"] if layer != "__main__"]


def arrows(rooms: set[str]) -> Counter[tuple[str, str]]:
    """How many imports lead from room to room."""
    graph = grimp.build_graph("fedsieve", exclude_type_checking_imports=True)
    found: Counter[tuple[str, str]] = Counter()
    for module in graph.modules:
        for other in graph.find_modules_directly_imported_by(module):
            pair = room_of(module), room_of(other)
            if pair[0] != pair[1] and {*pair} <= rooms:
                found[pair] += 1
    return found


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def lines(room: str) -> int:
    place = ROOT / "src" / "fedsieve" / room
    files = place.rglob("*.py") if place.is_dir() else [place.with_suffix(".py")]
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)


def draw(out: Path) -> None:
    levels = floors()
    places = {
        room: (across + (0.07 if len(level) == 1 and height % 2 else 0.0), -height)
        for height, level in enumerate(levels)
        for across, room in zip(ACROSS[len(level)], level, strict=True)
    }
    figure, axes = plt.subplots(figsize=(9, 9))
    for (start, end), count in sorted(arrows(set(places) - TAKEN_BY_ALL).items()):
        bend = 0.12 if abs(places[start][1] - places[end][1]) > 1 else 0.0
        axes.annotate(
            "",
            xy=places[end],
            xytext=places[start],
            arrowprops={
                "arrowstyle": "-|>",
                "color": "#8aa0b8",
                "linewidth": min(3.0, 0.4 + count / 12),
                "connectionstyle": f"arc3,rad={bend}",
                "shrinkA": 16,
                "shrinkB": 16,
            },
            zorder=1,
        )
    for room, (x, y) in places.items():
        axes.text(
            x,
            y,
            f"{room}\n{lines(room):,}",
            ha="center",
            va="center",
            fontsize=10,
            zorder=2,
            bbox={"boxstyle": "round,pad=0.45", "facecolor": "#f4f7fb", "edgecolor": "#3c5a7d"},
        )
    axes.set_xlim(0, 1)
    axes.set_ylim(-len(levels) + 0.4, 0.6)
    axes.set_axis_off()
    figure.savefig(out, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "house.png")
    draw(parser.parse_args().out)
