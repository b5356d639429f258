"""How many bytes a sparse update costs, against the entropy of its masks and values, and how long.

The yardstick is a coder that knows, of each tensor and for nothing, how dense its mask is and how
often each of its values occurs, but models no more than that: the sum over tensors of n H(density)
and of the empirical entropy of the int8 symbols, or of the bfloat16 exponents, with signs,
mantissas and scales as they are. Our bytes hold everything: headers, models, checksum.

    python benchmarks/wire.py [--data DIR] [--json FILE]

DIR holds adapters as safetensors files. Without it, updates are made up here, with ranks and
columns of unequal size as real ones have.
"""

import argparse
import json
import time
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

from fedsieve.algebra.adapter import Layout, Tree, layout_of
from fedsieve.algebra.payload import Form, Payload, Values, rounded
from fedsieve.algebra.support import Support, cut, gather, narrowed, top_k
from fedsieve.wire import decode, encode

FORMS: tuple[Form, ...] = ("int8", "bfloat16", "float32")


class Row(NamedTuple):
    """One payload: its bytes, the yardstick's, and the fastest of many runs in milliseconds."""

    update: str
    rank: int
    density: float
    form: str
    entries: int
    values: int
    bytes: int
    entropy_bytes: float
    ratio: float
    encode_ms: float
    decode_ms: float


def main() -> None:
    parser = argparse.ArgumentParser(description="Bytes and milliseconds of the wire.")
    parser.add_argument("--data", type=Path, help="a folder of safetensors files")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    parser.add_argument("--repeat", type=int, default=30, help="runs of which the fastest counts")
    args = parser.parse_args()
    torch.set_num_threads(1)

    made_up = {"made up": made_up_update(0)}
    trees = read_all(args.data) if args.data else made_up
    source = str(args.data.name) if args.data else "made up in this script: no --data was given"
    rows = [
        measure(name, tree, keep, density, form, args.repeat)
        for name, tree in trees.items()
        for keep in (16, 6)
        for density in (1 / 16, 1 / 4, 1.0)
        for form in FORMS
    ]
    show(rows, source)
    if args.json:
        text = json.dumps({"source": source, "rows": [row._asdict() for row in rows]}, indent=2)
        args.json.write_text(text + "\n", encoding="utf-8")


def read_all(folder: Path) -> dict[str, Tree]:
    """The adapters of a folder, by the names of their files."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise SystemExit(f"no safetensors files in {folder}")
    return {file.stem: dict(sorted(load_file(file).items())) for file in files}


def made_up_update(seed: int) -> Tree:
    """Six layers of rank-16 LoRA on query and value of width 384, and a head of 20 classes."""
    draws = torch.Generator().manual_seed(seed)

    def spread(*shape: int, by: float) -> Tensor:
        return (by * torch.randn(*shape, generator=draws)).exp()

    tree: Tree = {}
    for layer in range(6):
        for name in ("query", "value"):
            ranks = spread(16, by=1.5) * spread(1, by=1.0)
            for factor, shape in (("A", (16, 384)), ("B", (384, 16))):
                sizes = torch.outer(ranks, spread(384, by=0.5))
                numbers = torch.randn(16, 384, generator=draws) * sizes
                turned = numbers if factor == "A" else numbers.T.contiguous()
                tree[f"layer.{layer}.{name}.lora_{factor}.weight"] = turned.reshape(shape)
    tree["classifier.weight"] = torch.randn(20, 384, generator=draws) * spread(20, 1, by=0.5)
    tree["classifier.bias"] = torch.randn(20, generator=draws)
    return dict(sorted(tree.items()))


def measure(name: str, tree: Tree, keep: int, density: float, form: Form, repeat: int) -> Row:
    layout = layout_of(tree, 1.0)
    keep = min(keep, layout.rank)
    ranks = None
    if keep < layout.rank:
        ranks = torch.arange(keep).expand(len(layout.pairs), keep).contiguous()
    part = cut(tree, layout, ranks)
    masks = top_k(part, density, layout.names)
    support = Support(layout.names, ranks, masks)
    values = rounded(gather(part, support), form, torch.Generator().manual_seed(0))
    payload = Payload(layout, support, values, "known", "sent")
    data = encode(payload)
    told = decode(data, layout, support)
    if encode(told) != data or not torch.equal(told.values.data, values.data):
        raise SystemExit("the payload does not survive the wire")
    entropy = masks_entropy(masks) + values_entropy(values, counts(layout, support))
    return Row(
        update=name,
        rank=keep,
        density=density,
        form=form,
        entries=sum(prod(shape) for shape in narrowed(layout, ranks).shapes.values()),
        values=values.data.numel(),
        bytes=len(data),
        entropy_bytes=entropy,
        ratio=len(data) / entropy,
        encode_ms=fastest(lambda: encode(payload), repeat),
        decode_ms=fastest(lambda: decode(data, layout, support), repeat),
    )


def counts(layout: Layout, support: Support) -> list[int]:
    shapes = narrowed(layout, support.ranks).shapes
    return [
        int(support.masks[name].sum()) if name in support.masks else prod(shapes[name])
        for name in support.names
    ]


def masks_entropy(masks: dict[str, Tensor]) -> float:
    """Bytes: the sum of n H(density) over the tensors."""
    return sum(entropy(mask.reshape(-1).long()) for mask in masks.values())


def values_entropy(values: Values, sizes: list[int]) -> float:
    """Bytes under a memoryless model for each tensor, signs, mantissas and scales raw."""
    if values.form == "float32":
        return 4.0 * values.data.numel()
    symbols, raw = values.data.long() + 128, 0
    if values.form == "bfloat16":
        symbols, raw = (values.data.view(torch.int16).long() >> 7) & 255, values.data.numel()
    return raw + 4 * values.scales.numel() + sum(entropy(part) for part in symbols.split(sizes))


def entropy(symbols: Tensor) -> float:
    """Bytes that symbols (n,) cost under their own frequencies."""
    found = torch.bincount(symbols).double()
    found = found[found > 0]
    return float((found * (found.sum() / found).log2()).sum()) / 8


def fastest(work: Callable[[], object], repeat: int) -> float:
    best = float("inf")
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return 1000 * best


def show(rows: list[Row], source: str) -> None:
    table = Table(title=f"The wire: bytes against entropy ({source})")
    for column in ("update", "rank", "density", "form", "entries", "values"):
        table.add_column(column, justify="left" if column in ("update", "form") else "right")
    for column in ("bytes", "entropy", "ratio", "encode ms", "decode ms"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            *(row.update, str(row.rank), f"{row.density:.4g}", row.form),
            *(str(row.entries), str(row.values), str(row.bytes), f"{row.entropy_bytes:.0f}"),
            *(f"{row.ratio:.4f}", f"{row.encode_ms:.2f}", f"{row.decode_ms:.2f}"),
        )
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
