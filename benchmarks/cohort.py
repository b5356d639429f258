"""Clients of a cohort at once against one after another: seconds, and the work done in them.

Both ways are run in turn, so that what else the machine does strikes both alike; quoted is the
ratio of each pair, and of it the median and the spread. FLOP are counted by torch over one
forward and backward pass of all clients, and set against what a large product of matrices reaches
in the same precision.

minilm and smollm2 need `fedsieve fetch minilm-l6 smollm2`; gpt2 has GPT-2's shape and random
weights.

    python benchmarks/cohort.py [--model minilm|smollm2|gpt2] [--clients 10] [--batch 4]
        [--length 32] [--device cpu] [--precision auto] [--dropout 0.1] [--json FILE]
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import View
from fedsieve.algebra.support import everything
from fedsieve.errors import FedSieveError
from fedsieve.recipe.experiment import locate
from fedsieve.settings import Lora, Training
from fedsieve.tasks.tokens import Texts
from fedsieve.train import local
from fedsieve.train.cohort import Work, check_together, fit_together
from fedsieve.train.model import ResidentModel, load_base, pick_device, set_up
from measured import machine

STEPS = 4
TARGETS = {
    "minilm": ("query", "value"),
    "smollm2": ("q_proj", "v_proj"),
    "gpt2": ("c_attn",),
}
RATES = {
    "minilm": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
    "smollm2": ("attention_dropout",),
    "gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
}


def model_of(name: str, folder: Path, device: str, dropout: float) -> ResidentModel:
    task: Any = "classification" if name == "minilm" else "causal-lm"
    if name == "gpt2":
        source = str(folder / "gpt2")
        GPT2LMHeadModel(GPT2Config()).save_pretrained(source)
    else:
        source = locate("minilm-l6" if name == "minilm" else "smollm2")
    classes = tuple(str(n) for n in range(20)) if name == "minilm" else ()
    settings = dict.fromkeys(RATES[name], dropout)
    base = load_base(source, task, classes, key=Key(0), pad_token_id=0, settings=settings)
    lora = Lora(rank=16, alpha=16.0, dropout=dropout, targets=TARGETS[name])
    return set_up(base, task, lora, "lora", key=Key(0), device=pick_device(device))


def works_of(resident: ResidentModel, clients: int, batch: int, length: int) -> list[Work]:
    """Each with rows of its own, all as long."""
    draws = torch.Generator().manual_seed(0)
    every = everything(resident.layout)
    view = View(resident.adapter(), resident.layout, every, every)
    works = []
    for client in range(clients):
        ids = torch.randint(1000, 20000, (STEPS * batch, length), generator=draws)
        labels = ids.clone()
        if resident.classes:
            labels = torch.randint(20, (STEPS * batch,), generator=draws)
        texts = Texts(ids, torch.ones_like(ids), labels)
        works.append(Work(view, texts, Key(0, 1, str(client))))
    return works


def seconds(run: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP a second of a product of large matrices: the best of five."""
    side = 8192 if device.type == "cuda" else 1024
    one = torch.randn(side, side, device=device, dtype=dtype)
    best = min(seconds(lambda: one @ one, device) for _ in range(5))
    return 2 * side**3 / best


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", choices=sorted(TARGETS), default="minilm")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        try:
            resident = model_of(given.model, Path(folder), given.device, given.dropout)
        except FedSieveError as error:
            sys.exit(f"skipped: {error}")
    device = resident.device
    check_together(resident)
    works = works_of(resident, given.clients, given.batch, given.length)
    training = Training(batch=given.batch, steps=STEPS, precision=given.precision)

    def alone() -> None:
        for each in works:
            local.fit(resident, each.view, each.examples, training, each.key)

    def at_once() -> None:
        fit_together(resident, works, training)

    with FlopCounterMode(display=False) as counter:
        at_once()
    flop = counter.get_total_flops()
    alone()  # warm, both
    pairs = [(seconds(alone, device), seconds(at_once, device)) for _ in range(given.pairs)]
    half = local.runs_in_bf16(device, given.precision)
    dtype = torch.bfloat16 if half else torch.float32
    top = peak(device, dtype)
    ratios = sorted(one / other for one, other in pairs)
    fastest = [min(way) for way in zip(*pairs, strict=True)]
    middle = ratios[len(ratios) // 2]
    print(
        f"{given.clients} clients x batch {given.batch} x {given.length} tokens, {given.model}, "
        f"{dtype}, dropout {given.dropout:g}: at once {middle:.2f} times as fast as one after "
        f"another ({ratios[0]:.2f} to {ratios[-1]:.2f} in {len(pairs)} pairs)"
    )
    for what, best in zip(("one after another", "at once"), fastest, strict=True):
        rate = flop / best
        print(f"{what}: {best:.3f} s, {rate / 1e12:.3f} TFLOP/s, {rate / top:.0%} of a matmul's")
    print(machine(device))
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        asked = {k: v for k, v in vars(given).items() if k != "json"}
        found = {"asked": asked, "pairs": pairs, "ratio": middle, "flop": flop, "matmul": top}
        text = json.dumps({**found, "dtype": str(dtype), "machine": machine(device)}, indent=2)
        given.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
