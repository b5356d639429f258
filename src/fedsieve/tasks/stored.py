"""Examples in a file that several processes map into memory: tokenised once, held once."""

import json
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from fedsieve.tasks.examples import Examples
from fedsieve.tasks.images import Images
from fedsieve.tasks.tokens import Texts


def store(examples: Examples, rows: Tensor, path: Path) -> None:
    """Write examples to train on, what is asked of them left out, and numbers of rows."""
    kept = {name: t for name, t in examples._asdict().items() if isinstance(t, Tensor)}
    facts = {"low": examples.low, "high": examples.high} if isinstance(examples, Images) else {}
    tensors = {name: tensor.contiguous() for name, tensor in kept.items()}
    safetensors.torch.save_file({**tensors, "rows": rows}, path, {"facts": json.dumps(facts)})


def stored(path: Path) -> tuple[Examples, Tensor]:
    """The examples and the numbers of rows in a file."""
    with safetensors.safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["facts"])
        kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    rows = kept.pop("rows")
    if facts:
        return Images(**kept, low=tuple(facts["low"]), high=tuple(facts["high"])), rows
    return Texts(**kept), rows
