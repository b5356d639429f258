"""A client's step against a plain loop with PEFT, as its manual has it: seconds for the same steps.

The plain loop runs in float32 and under autocast to bfloat16; ours as a recipe does by default.
All are run in turn, so that what else the machine does strikes all alike; quoted are the ratios
within a turn, their median and their spread. Needs `fedsieve fetch minilm-l6 smollm2`.

    python benchmarks/step.py [--model minilm|smollm2] [--batch 16] [--length 64] [--device cpu]
        [--json FILE]
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor

from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import View
from fedsieve.algebra.support import everything
from fedsieve.errors import FedSieveError
from fedsieve.recipe.experiment import locate
from fedsieve.settings import Lora, Training
from fedsieve.tasks.tokens import IGNORED, Texts
from fedsieve.train import local
from fedsieve.train.model import ResidentModel, load_base, pick_device, set_up
from measured import machine

STEPS = 6
SOURCES = {"minilm": "minilm-l6", "smollm2": "smollm2"}
TARGETS = {"minilm": ["query", "value"], "smollm2": ["q_proj", "v_proj"]}
TURNS = 5


def rows(classes: int, batch: int, length: int) -> Texts:
    """Of a language model, the second half of each row is what is learned."""
    draws = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (STEPS * batch, length), generator=draws)
    labels = ids.clone()
    labels[:, : length // 2] = IGNORED
    if classes:
        labels = torch.randint(classes, (len(ids),), generator=draws)
    return Texts(ids, torch.ones_like(ids), labels)


def plain_model(source: str, name: str, classes: int, device: torch.device) -> Any:
    kind: Any = transformers.AutoModelForCausalLM
    more: dict[str, Any] = {}
    if classes:
        kind, more = transformers.AutoModelForSequenceClassification, {"num_labels": classes}
    base = kind.from_pretrained(source, dtype=torch.float32, **more)
    config = LoraConfig(
        task_type="SEQ_CLS" if classes else "CAUSAL_LM",
        r=16,
        lora_alpha=16,
        lora_dropout=0.1,
        target_modules=TARGETS[name],
    )
    return get_peft_model(base, config).to(device)


def plain_loop(model: Any, examples: Texts, batch: int, device: torch.device, half: bool) -> None:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    given: list[Tensor] = [examples.input_ids, examples.attention_mask, examples.labels]
    for ids, mask, labels in zip(*(tensor.split(batch) for tensor in given), strict=True):
        with torch.autocast(device.type, torch.bfloat16) if half else nullcontext():
            loss: Tensor = model(
                input_ids=ids.to(device), attention_mask=mask.to(device), labels=labels.to(device)
            ).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()


def our_model(source: str, name: str, classes: int, device: torch.device) -> ResidentModel:
    task: Any = "classification" if classes else "causal-lm"
    names = tuple(str(n) for n in range(classes))
    base = load_base(source, task, names, key=Key(0), pad_token_id=0)
    lora = Lora(rank=16, alpha=16.0, dropout=0.1, targets=tuple(TARGETS[name]))
    return set_up(base, task, lora, "lora", key=Key(0), device=device)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", choices=sorted(SOURCES), default="minilm")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    classes = 20 if given.model == "minilm" else 0
    device = pick_device(given.device)
    try:
        source = locate(SOURCES[given.model])
        ours = our_model(source, given.model, classes, device)
    except (FedSieveError, OSError) as error:
        sys.exit(f"skipped: {error}")
    plain = plain_model(source, given.model, classes, device)
    examples = rows(classes, given.batch, given.length)
    every = everything(ours.layout)
    view = View(ours.adapter(), ours.layout, every, every)
    training = Training(optimizer="adamw", lr=1e-4, batch=given.batch)
    ways: dict[str, Callable[[], object]] = {
        "plain float32": lambda: plain_loop(plain, examples, given.batch, device, half=False),
        "plain bfloat16": lambda: plain_loop(plain, examples, given.batch, device, half=True),
        "ours": lambda: local.fit(ours, view, examples, training, Key(0, 1, "a")),
    }
    turns: list[dict[str, float]] = []
    for _ in range(TURNS + 1):
        turn = {}
        for name, run in ways.items():
            began = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            turn[name] = (time.perf_counter() - began) / STEPS
        turns.append(turn)
    turns = turns[1:]  # the first is a warm-up
    half = "bfloat16" if local.runs_in_bf16(device, "auto") else "float32"
    print(f"{given.model}, {given.batch} x {given.length}, {STEPS} steps; ours in {half}")
    ratios = {}
    for name in ("plain float32", "plain bfloat16"):
        each = sorted(turn[name] / turn["ours"] for turn in turns)
        ratios[name] = each
        print(
            f"ours is {each[len(each) // 2]:.2f} times as fast as {name} "
            f"({each[0]:.2f} to {each[-1]:.2f} in {TURNS} turns)"
        )
    print(f"a step of ours: {min(turn['ours'] for turn in turns):.3f} s")
    print(machine(device))
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        asked = {k: v for k, v in vars(given).items() if k != "json"}
        found = {"asked": asked, "turns": turns, "ratios": ratios, "machine": machine(device)}
        given.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
