"""The commonsense sets in one file, with a column `task`: what FSLoRA's Tables 5.1 and C deal out.

    python benchmarks/commonsense.py --data FOLDER --out FOLDER

Reads commonsense/<set>/{train,test}.json as LLM-Adapters publishes them. Leaves
`commonsense/train.jsonl` in --out, the training rows of every set that has any, and beside it the
tests: what `fedsieve reproduce fslora/table5.1-commonsense --data` is given.
"""

import argparse
import json
import shutil
from pathlib import Path


def main() -> None:
    """Join the sets that are there and say what came."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="with commonsense/ in it")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    source, made = given.data / "commonsense", given.out / "commonsense"
    tests = sorted(source.glob("*/test.json"))
    if not tests:
        parser.error(f"{source}: no */test.json there")
    if made.resolve() == source.resolve():
        parser.error(f"{made}: write elsewhere than where the sets are")

    counts = {}
    made.mkdir(parents=True, exist_ok=True)
    with (made / "train.jsonl").open("w") as joined:
        for test in tests:
            task = test.parent.name
            (made / task).mkdir(exist_ok=True)
            shutil.copyfile(test, made / task / "test.json")
            train = test.with_name("train.json")
            rows = json.loads(train.read_text()) if train.is_file() else []
            for row in rows:
                joined.write(json.dumps({**row, "task": task}) + "\n")
            counts[task] = len(rows)
    print("\n".join(f"{task}: {count:,} training rows" for task, count in counts.items()))


if __name__ == "__main__":
    main()
