"""How long `fedsieve` takes to answer, beside the import of torch and transformers.

Each command that trains nothing is started as a process, in turn with
`python -c "import torch, transformers"` in the same run, so that a machine whose speed drifts slows
both. The figure is the ratio of the two medians. Aim: at most 0.25 each.

    python benchmarks/startup.py [--runs 5] [--json FILE]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

AIM = 0.25
HEAVY = ["-c", "import torch, transformers"]
COMMANDS = [
    ["--help"],
    ["--version"],
    ["recipes"],
    ["methods"],
    ["run", "nosuch"],
    ["run", "demo", "no.such.key=1"],
    ["run", "broken.toml"],
    ["run", "--help"],
    ["compare", "--help"],
    ["federate", "--help"],
    ["report", "--help"],
]


def seconds(arguments: list[str], at: Path) -> float:
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, *arguments], cwd=at, capture_output=True, check=False, timeout=120
    )
    return time.perf_counter() - began


def measure(runs: int) -> list[dict[str, float | str]]:
    """A row a command: the medians of both, in seconds, and their ratio."""
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        (at / "broken.toml").write_text("rounds = = 3\n", encoding="utf-8")
        seconds(HEAVY, at)  # so that neither side reads from a cold disk
        rows: list[dict[str, float | str]] = []
        for command in COMMANDS:
            seconds(["-m", "fedsieve", *command], at)
            pairs = [
                (seconds(["-m", "fedsieve", *command], at), seconds(HEAVY, at)) for _ in range(runs)
            ]
            ours, heavy = (statistics.median(each) for each in zip(*pairs, strict=True))
            spread = [one / other for one, other in pairs]
            rows.append(
                {
                    "command": " ".join(command),
                    "seconds": ours,
                    "import": heavy,
                    "ratio": ours / heavy,
                    "least": min(spread),
                    "most": max(spread),
                }
            )
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found = measure(given.runs)
    print("| `fedsieve` and | seconds | import torch, transformers | ratio (least to most) |")
    print("|---|---|---|---|")
    for row in found:
        print(
            f"| `{row['command']}` | {row['seconds']:.2f} | {row['import']:.2f} | "
            f"{row['ratio']:.2f} ({row['least']:.2f} to {row['most']:.2f}) |"
        )
    print(f"aim: at most {AIM} each; the largest is {max(float(r['ratio']) for r in found):.2f}")
    if given.json:
        given.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
