"""What training takes of memory: worked out without weights, against what a process really takes.

For MiniLM-L6 (20 classes, batches of 16 x 64 tokens) and SmolLM2-135M (causal LM, 4 x 128), by
method, rank and type of the base, each in a process of its own: libraries are imported and warmed
up, the model is loaded, and a client takes its part in a round of three steps. The most that the
process has held in training (the kernel's VmHWM, set back before), less what it held before the
model was loaded and the pages of programs that came in since, is compared with `fedsieve methods
--memory`. The C library's allocator is told to give back freed tensors at once
(MALLOC_MMAP_THRESHOLD_), or its caches would be measured. Linux only. Needs `fedsieve fetch
minilm-l6 smollm2`.

    python benchmarks/memory.py [--models minilm-l6] [--methods fedit flasc] [--json FILE]
"""

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fedsieve import methods
from fedsieve.algebra.budget import Budget, Client
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import View
from fedsieve.console import quiet
from fedsieve.costs.memory import Base, Needs, of_model
from fedsieve.engine.client import take_part
from fedsieve.recipe.experiment import locate
from fedsieve.settings import Lora, Quantization, Training
from fedsieve.tasks.tokens import Texts
from fedsieve.train.local import Fit, fit
from fedsieve.train.model import load_base, set_up
from fedsieve.wire import encode

MB = 10**6
BUDGET = Budget(0.5, 0.25, 0.25)
METHODS = ("fedit", "flasc", "fslora", "full", "head")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Setting(NamedTuple):
    model: str
    classes: int
    batch: int
    length: int


class Case(NamedTuple):
    model: str
    method: str
    rank: int
    dtype: str
    checkpointing: bool = False
    micro_batch: int | None = None
    form: Quantization = "none"


SETTINGS = {
    each.model: each for each in (Setting("minilm-l6", 20, 16, 64), Setting("smollm2", 1, 4, 128))
}


def cases(models: list[str], names: list[str]) -> list[Case]:
    found = []
    for model in models:
        for name in names:
            if name == "head" and SETTINGS[model].classes == 1:
                continue  # its head is its embedding
            for dtype in DTYPES:
                if name == "full" and dtype != "float32":
                    continue  # what is trained is float32
                ranks = (16,) if name in ("full", "head") else (4, 16)
                found += [Case(model, name, rank, dtype) for rank in ranks]
        found.append(Case(model, "fedit", 16, "float32", checkpointing=True))
        found.append(Case(model, "fedit", 16, "float32", micro_batch=2))
        found += [Case(model, "fedit", 16, "bfloat16", form=form) for form in ("int8", "nf4")]
    return found


def training_of(case: Case) -> Training:
    return Training(
        batch=SETTINGS[case.model].batch,
        steps=3,
        precision="fp32",
        checkpointing=case.checkpointing,
        micro_batch=case.micro_batch,
    )


def predicted(case: Case) -> Needs:
    setting, held = SETTINGS[case.model], Base(DTYPES[case.dtype], case.form)
    ((_, needs),) = of_model(
        case.model, case.rank, None, setting.classes, BUDGET, training_of(case), setting.length,
        held, only=[case.method],
    )  # fmt: skip
    if isinstance(needs, str):
        raise SystemExit(f"{case}: {needs}")
    return needs


def resident_bytes(what: str) -> int:
    """VmRSS or VmHWM of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("no /proc/self/status: Linux alone says what a process holds")


def of_libraries() -> int:
    """Bytes of this process that are programs' own: pages of shared libraries, read as they run."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first and ":" not in first:
            inside = len(rest) > 4 and ".so" in Path(rest[4]).name
        elif inside and first == "Rss:":
            found += int(rest[0]) * 1024
    return found


def examples_of(case: Case) -> Texts:
    """Rows that are full of tokens, random ones."""
    setting = SETTINGS[case.model]
    draws = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20_000, (3 * setting.batch, setting.length), generator=draws)
    labels = ids if setting.classes == 1 else ids[:, 0] % setting.classes
    return Texts(ids, torch.ones_like(ids), labels)


def loaded(case: Case) -> Any:
    """The base, with every page of its weights in memory: of a file that is mapped, those alone are
    there that were looked at.
    """
    setting = SETTINGS[case.model]
    task = "causal-lm" if setting.classes == 1 else "classification"
    classes = [str(n) for n in range(setting.classes)] if setting.classes > 1 else ()
    dtype: Any = case.dtype
    base = load_base(
        locate(case.model), task, classes, key=Key(0), dtype=dtype, quantization=case.form,
        pad_token_id=0,
    )  # fmt: skip
    for parameter in base.parameters():
        parameter.data.clone()
    return base


def warm_up(case: Case) -> None:
    """Load the model and run one step, so that programs which come at their first use are there."""
    model = loaded(case)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    examples = examples_of(case)
    labels = examples.labels[:2] if SETTINGS[case.model].classes > 1 else examples.input_ids[:2]
    with torch.autocast("cpu", torch.bfloat16, enabled=case.dtype == "bfloat16"):
        model(input_ids=examples.input_ids[:2, :16], labels=labels[..., :16]).loss.backward()


def measured(case: Case) -> int:
    """Bytes at most in training, less those before the model was loaded; in this process."""
    quiet()
    setting = SETTINGS[case.model]
    task = "causal-lm" if setting.classes == 1 else "classification"
    method = methods.load(case.method)()
    examples = examples_of(case)
    warm_up(case)
    gc.collect()
    before, programs = resident_bytes("VmRSS"), of_libraries()
    base = loaded(case)
    lora = Lora(rank=case.rank, alpha=float(case.rank))
    resident = set_up(base, task, lora, method.trains, key=Key(0), device=torch.device("cpu"))
    start, key = resident.adapter(), Key(0, 1, "0")
    client = Client("0", len(examples.labels), BUDGET)
    message = encode(method.publish(method.plan(method.init(start), key), client, key))
    del base
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    most = 0

    def train(view: View, client: Client, key: Key) -> Fit:
        nonlocal most
        done = fit(resident, view, examples, training_of(case), key)
        most = resident_bytes("VmHWM")
        return done

    reply, _ = take_part(method, train, start, client, {}, key, message)
    assert reply.reason is None, reply.reason
    return most - before - (of_libraries() - programs)


def in_a_process(case: Case) -> int:
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, "--one", json.dumps(case)],
        env=environment, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return int(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--times", type=int, default=3, help="that each is measured")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(measured(Case(*json.loads(given.one))))
        return
    quiet()
    print(f"{platform.machine()}, torch {torch.__version__}, one thread, {given.times} times each")
    print("| model | method | rank | base | | worked out, MB | measured, MB | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    for case in cases(given.models, given.methods):
        needs = predicted(case)
        found = sorted(in_a_process(case) for _ in range(given.times))
        middle = found[len(found) // 2]
        more = "checkpointing" if case.checkpointing else ""
        more += f"micro_batch {case.micro_batch}" if case.micro_batch else ""
        more += "" if case.form == "none" else case.form
        rank = "" if case.method in ("full", "head") else case.rank
        print(
            f"| {case.model} | `{case.method}` | {rank} | {case.dtype} | {more} "
            f"| {needs.peak / MB:.0f} | {middle / MB:.0f} "
            f"({found[0] / MB:.0f} to {found[-1] / MB:.0f}) | {needs.peak / middle:.2f} |",
            flush=True,
        )
        rows.append({**case._asdict(), "needs": needs._asdict(), "measured": found})
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
