"""What FLASC's published script gave beside FedSieve, from both logs.

    python benchmarks/published/beside.py DIR [--json PATH]

DIR is the folder of the scripts (README.md, here), with theirs in runs/density-D-seed-N and ours in
ours/density-D-seed-N. Accuracy after 20 and 40 rounds; seconds of a round, evaluations apart: the
median, since both share the machine with whatever else runs.
"""

import argparse
import json
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, NamedTuple

AT = (20, 40)


class Run(NamedTuple):
    """accuracy: by round; seconds: of the median round."""

    density: str
    seed: int
    accuracy: dict[int, float]
    seconds: float


def main() -> None:
    asked = argparse.ArgumentParser()
    asked.add_argument("folder", type=Path)
    asked.add_argument("--json", type=Path)
    given = asked.parse_args()
    found = {
        "published": [_published(path) for path in sorted(given.folder.glob("runs/*/log.jsonl"))],
        "FedSieve": [_ours(path) for path in sorted(given.folder.glob("ours/*/metrics.jsonl"))],
    }
    for density in sorted({run.density for runs in found.values() for run in runs}, reverse=True):
        for who, runs in found.items():
            print(
                f"density {density:<5} {who:<10} {_line([r for r in runs if r.density == density])}"
            )
    if given.json:
        told = {who: [run._asdict() for run in runs] for who, runs in found.items()}
        given.json.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def _line(runs: list[Run]) -> str:
    said = [f"{len(runs)} seeds"]
    for at in AT:
        values = [run.accuracy[at] for run in runs if at in run.accuracy]
        spread = f" +- {stdev(values):.3f}" if len(values) > 1 else ""
        said.append(f"round {at}: {mean(values):.3f}{spread}" if values else f"round {at}: none")
    said.append(f"{median(run.seconds for run in runs):.2f} s a round")
    return "   ".join(said)


def _named(path: Path) -> tuple[str, int]:
    _, density, _, seed = path.parent.name.split("-")
    return density, int(seed)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _published(path: Path) -> Run:
    """A round lasts from the end of the one before, told at its last scalar, to its own mask."""
    rows = _lines(path)
    accuracy = {row["step"]: row["value"] for row in rows if row["name"] == "test/accuracy"}
    ends = {row["step"]: row["at"] for row in rows if row["name"] == "train/norm"}
    begun = {row["step"]: row["at"] for row in rows if row["name"] == "density/download"}
    seconds = [begun[n] - ends[n - 1] for n in begun if n - 1 in ends and n not in accuracy]
    return Run(*_named(path), accuracy, median(seconds))


def _ours(path: Path) -> Run:
    rows = _lines(path)
    accuracy = {row["round"]: row["accuracy"] for row in rows if row.get("accuracy") is not None}
    seconds = [row["seconds"] for row in rows if row["round"] and row["round"] not in accuracy]
    return Run(*_named(path), accuracy, median(seconds))


if __name__ == "__main__":
    main()
