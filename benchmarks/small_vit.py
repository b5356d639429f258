"""A ViT of 1.8 M parameters for pictures of 32 x 32, for FLASC's figures over CIFAR-10 in small.

    python benchmarks/small_vit.py --rows cifar100.parquet --out FOLDER [--epochs 12]

The paper has ViT-B/16, which has seen ImageNet. Here patches of 4, 6 layers of width 192, and
CIFAR-100 to learn from, which shares no picture with CIFAR-10: AdamW, a rate that rises for a
twentieth of the steps and falls to nothing, crops and flips. --rows: a file, folder or data set of
the hub with the columns `image` and `label` (uoft-cs/cifar100 calls it `fine_label`: --label).
Leaves `vit-cifar100` in --out: what `fedsieve reproduce flasc/fig4 --data` is given, beside
`cifar10/`. The model of docs/papers.md is such a one; another seed or machine makes another.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from datasets import Image
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from fedsieve.data import sources

SIDE, BATCH, RATE, PADDING = 32, 128, 1e-3, 4


def pictures(rows: str, label: str) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Pixels [n, 3, 32, 32] in [-1, 1], labels [n] and their names."""
    loaded = sources.load(rows, "train" if len(sources.splits_of(rows)) > 1 else None)
    named = getattr(loaded.features[label], "names", None)
    told = [named[i] if named else str(i) for i in loaded[label]]
    names = named or sorted({*told})
    shown = loaded.cast_column("image", Image())["image"]
    images = (np.asarray(each.convert("RGB").resize((SIDE, SIDE))) for each in shown)
    pixels = torch.from_numpy(np.stack([*images])).permute(0, 3, 1, 2).float() / 127.5 - 1
    number = {name: i for i, name in enumerate(names)}
    return pixels, torch.tensor([number[each] for each in told]), names


def varied(pixels: torch.Tensor) -> torch.Tensor:
    """Each shifted by up to 4 pixels and, by chance, mirrored."""
    wide = functional.pad(pixels, (PADDING,) * 4)
    shifts = torch.randint(2 * PADDING + 1, (len(pixels), 2)).tolist()
    moved = [wide[i, :, y : y + SIDE, x : x + SIDE] for i, (y, x) in enumerate(shifts)]
    made = torch.stack(moved)
    mirrored = torch.rand(len(made)) < 0.5
    made[mirrored] = made[mirrored].flip(-1)
    return made


def trained(
    pixels: torch.Tensor, labels: torch.Tensor, names: list[str], epochs: int
) -> ViTForImageClassification:
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=SIDE,
        patch_size=4,
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=6,
        intermediate_size=384,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    model = ViTForImageClassification(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.05)
    batches = len(pixels) // BATCH
    steps = epochs * batches
    for epoch in range(epochs):
        order, losses = torch.randperm(len(pixels)), []
        for number in range(batches):
            step = epoch * batches + number + 1
            for group in optimizer.param_groups:
                group["lr"] = RATE * min(1.0, 20 * step / steps) * (1 - step / steps)
            at = order[number * BATCH : (number + 1) * BATCH]
            loss = model(pixel_values=varied(pixels[at]), labels=labels[at]).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1} of {epochs}: loss {sum(losses) / len(losses):.3f}", flush=True)
    return model.eval()


def accuracy(model: ViTForImageClassification, pixels: torch.Tensor, labels: torch.Tensor) -> float:
    with torch.inference_mode():
        parts = zip(pixels.split(BATCH), labels.split(BATCH), strict=True)
        right = sum(int((model(x).logits.argmax(-1) == y).sum()) for x, y in parts)
    return right / len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", required=True)
    parser.add_argument("--label", default="label")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=12)
    given = parser.parse_args()
    pixels, labels, names = pictures(given.rows, given.label)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    held, kept = order[: len(order) // 20], order[len(order) // 20 :]  # a twentieth is held back
    model = trained(pixels[kept], labels[kept], names, given.epochs)
    place = given.out / "vit-cifar100"
    model.save_pretrained(place)
    half = [0.5] * 3
    size = {"height": SIDE, "width": SIDE}
    ViTImageProcessorPil(size=size, image_mean=half, image_std=half).save_pretrained(place)
    reached = accuracy(model, pixels[held], labels[held])
    number = sum(p.numel() for p in model.parameters())
    print(f"{number:,} parameters, accuracy {reached:.3f} on rows held back, in {place}")


if __name__ == "__main__":
    main()
