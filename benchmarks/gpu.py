"""What a step and a cohort at once cost on a GPU, in one run of some minutes and one JSON file.

Runs the benchmarks of a step and of a cohort at once on a device, one after another, each within a
limit, and gathers what each wrote. One that fails or takes too long is named and the rest goes on.
Needs `fedsieve fetch minilm-l6 smollm2`.

    python benchmarks/gpu.py [--device cuda] [--out runs/gpu.json]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
LIMIT = 100  # seconds for each
COHORT = ("cohort.py", "--clients", "10", "--batch", "16", "--length", "128")
RUNS: dict[str, tuple[str, ...]] = {
    "step, MiniLM": ("step.py", "--model", "minilm"),
    "step, SmolLM2-135M": ("step.py", "--model", "smollm2", "--batch", "16", "--length", "128"),
    "cohort, MiniLM": (*COHORT, "--model", "minilm"),
    "cohort, SmolLM2-135M": (*COHORT, "--model", "smollm2"),
    "cohort, GPT-2 small": (*COHORT, "--model", "gpt2"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu.json"))
    given = parser.parse_args()
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("skipped: torch finds no GPU here")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (script, *arguments) in RUNS.items():
            result = Path(folder) / "result.json"
            result.unlink(missing_ok=True)
            more = ["--device", given.device, "--json", str(result)]
            began = time.perf_counter()
            print(f"--- {name}", flush=True)
            try:
                subprocess.run(
                    [sys.executable, str(HERE / script), *arguments, *more],
                    check=True,
                    timeout=LIMIT,
                )
                found[name] = json.loads(result.read_text())
            except (subprocess.SubprocessError, OSError, ValueError) as error:
                found[name] = {"failed": str(error)}
                print(f"failed: {error}", flush=True)
            found[name]["seconds"] = time.perf_counter() - began
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(found, indent=2) + "\n")
    print(f"written to {given.out}")
    if any("failed" in each for each in found.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
