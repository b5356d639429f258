"""Images: what files hold becomes what the model's own processor makes of it."""

import io
import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import ClassLabel, Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ConvNextConfig,
    DeiTConfig,
    DeiTForImageClassification,
    SwinConfig,
    ViTConfig,
    ViTImageProcessorPil,
)

import fedsieve
from fedsieve.algebra.keys import Key, generator
from fedsieve.data import sources
from fedsieve.data.files import Columns
from fedsieve.data.pictures import inlined
from fedsieve.errors import FedSieveError
from fedsieve.recipe import examples
from fedsieve.recipe.schema import Data
from fedsieve.tasks import images
from fedsieve.tasks.examples import count, take
from fedsieve.tasks.images import Images, crops_and_flips
from fedsieve.train.batch import inputs
from tests import runs
from tests.conftest import LABELS, WIDTH, Tiny
from tests.tasks.test_federated import COLOURS, pictures, png, quietly

CPU = torch.device("cpu")


def noise(seed: int, high: int = 30, wide: int = 22) -> Image.Image:
    draw = np.random.default_rng(seed)
    return Image.fromarray(draw.integers(0, 256, (high, wide, 3), dtype=np.uint8))


def packed(image: Image.Image, kind: str = "png", **how: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **how)
    return data.getvalue()


def made(values: list[Any], processor: Any) -> Images:
    return images.images(Dataset.from_dict({"i": values}), processor, "i")


SMALL = {"height": 16, "width": 16}
PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "square": ("ViT", {"size": SMALL}),
    "means": (
        "ViT",
        {"size": {"height": 16, "width": 24}, "image_mean": [0.1, 0.2, 0], "image_std": [1, 2, 3]},
    ),
    "filled up": ("Donut", {"size": {"height": 32, "width": 24}}),
    "no means": ("ViT", {"size": SMALL, "do_normalize": False}),
    "no scale": ("ViT", {"size": SMALL, "do_rescale": False, "do_normalize": False}),
    "bicubic": ("ViT", {"size": SMALL, "resample": 3}),
    "an offset": (
        "EfficientNet",
        {"size": SMALL, "rescale_factor": 1 / 127.5, "rescale_offset": 1},
    ),
}
KINDS = (
    "Beit", "Bit", "CLIP", "ConvNext", "DeiT", "EfficientNet", "Gemma3", "Levit",
    "MobileNetV1", "MobileNetV2", "MobileViT", "Perceiver", "PoolFormer", "Pvt", "Segformer",
    "Siglip", "TextNet",
)  # fmt: skip


@pytest.mark.parametrize("case", [*PROCESSORS, *KINDS])
def test_a_batch_is_what_the_models_own_processor_makes(case: str) -> None:
    kind, settings = PROCESSORS.get(case, (case, {}))
    processor = getattr(transformers, f"{kind}ImageProcessorPil")(**settings)
    pictures = [noise(n) for n in range(3)]
    expected = processor(pictures, return_tensors="pt")["pixel_values"]
    found = made([packed(each) for each in pictures], processor)
    assert found.pixels.dtype == torch.uint8
    given = inputs(None, found, CPU)
    torch.testing.assert_close(given["pixel_values"], expected.float(), atol=1e-5, rtol=1e-5)
    assert set(given) == {"pixel_values", "labels"}
    some = take(found, torch.tensor([2, 1]))
    assert count(some) == 2
    assert torch.equal(some.pixels, found.pixels[[2, 1]])


@pytest.mark.parametrize(
    ("processor", "said"),
    [
        (lambda images, **_: {"pixel_values": np.zeros((len(images), 3, 8, 8))}, "does more"),
        (
            lambda images, **_: {
                "pixel_values": np.stack([np.asarray(i).transpose(2, 0, 1) ** 0.5 for i in images])
            },
            "does more",
        ),
        (lambda images, **_: {"pixel_values": np.zeros((len(images), 1, 8, 8))}, "three channels"),
        (lambda images, **_: {"input_ids": np.zeros((len(images), 8))}, "cannot read images"),
    ],
    ids=["constant", "a curve", "gray", "other names"],
)
def test_a_processor_of_another_kind_is_refused(processor: Any, said: str) -> None:
    with pytest.raises(FedSieveError, match=said):
        made([packed(noise(1, 8, 8))], processor)


def test_no_image_is_read_by_another_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow has Ghostscript draw EPS, where it is installed."""
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    drawn = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    (tmp_path / "x.png").write_bytes(drawn)
    for value in (drawn, {"bytes": drawn, "path": None}, str(tmp_path / "x.png")):
        assert list(images.bad_images(Dataset.from_dict({"i": [value]}), "i")) == [0]
    assert not (tmp_path / "ran").exists()


def test_sizes_beyond_reason_are_refused_before_anything_is_made() -> None:
    for settings in ({"size": {"height": 1025, "width": 5}}, {"size": {"shortest_edge": 99_999}}):
        kind = transformers.CLIPImageProcessorPil if "shortest_edge" in settings["size"] else None
        processor = (kind or ViTImageProcessorPil)(**settings)
        with pytest.raises(FedSieveError, match="pixels a side"):
            made([packed(noise(1))], processor)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"size": {"height": 3e4, "width": 3e4}}, r"30000\.0 pixels a side \(size\)"),
        ({"do_center_crop": True, "crop_size": {"height": 3e4, "width": 3e4}}, r"\(crop_size\)"),
        ({"size": {"height": 32, "width": float("nan")}}, "nan pixels a side"),
        ({"do_pad": True, "pad_size": {"height": -(10**9), "width": 3}}, "-1000000000 pixels"),
        ({"size_divisor": 10**9}, r"\(size_divisor\)"),
        ({"crop_pct": 1e-6}, r"images larger before it cuts them \(crop_pct 1e-06\)"),
        ({"image_grid_pinpoints": [[12000, 12000]]}, r"into pieces \(image_grid_pinpoints\)"),
        ({"image_grid_pinpoints": [[96, 96]]}, r"into pieces \(image_grid_pinpoints\)"),
        ({"max_num_patches": 10**7, "patch_size": 1}, "into pieces"),
        ({"do_image_splitting": True}, "into pieces"),
        ({"more": {"deep": [{"max_side": 10**6}]}}, "1000000 pixels a side"),
    ],
    ids=str,
)
def test_no_number_of_a_processor_makes_images_beyond_reason(
    settings: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "_values", lambda *given: pytest.fail("an image was made"))
    with pytest.raises(FedSieveError, match=said):
        made([packed(noise(1))], ViTImageProcessorPil(**settings))


def test_few_large_images_are_held_at_a_time() -> None:
    processor, held = plain(), []

    def watched(images: list[Image.Image], **how: Any) -> Any:
        held.append([each.width * each.height for each in images])
        return processor(images, **how)

    sides = [30] * 20 + [1500] * 5 + [3000] + [30] * 3
    values = [packed(Image.new("L", (side, side), side % 256)) for side in sides]
    found = made(values, watched)
    assert sum(map(len, held[4:])) == len(
        sides
    )  # the first are black, white, a gray and a wide one
    assert all(len(each) <= 16 for each in held)
    assert all(sum(each) <= 2**22 or len(each) == 1 for each in held)
    assert found.pixels[:, 0, 0, 0].tolist() == [side % 256 for side in sides]


def test_how_large_images_become_is_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor says it, and comes with a model's folder: small files, large tensors."""
    held = []
    processor = ViTImageProcessorPil(size={"height": 1024, "width": 1024})

    def watched(images: list[Image.Image], **how: Any) -> Any:
        held.append(len(images))
        return processor(images, **how)

    values = [packed(noise(n, 30, 30)) for n in range(9)]
    assert made(values, watched).pixels.shape == (9, 3, 1024, 1024)
    assert held == [1, 1, 1, 1, 4, 4, 1]
    monkeypatch.setattr(images, "memory_of_machine", lambda: 9 * 3 * 1024**2 * 2 - 1)
    with pytest.raises(FedSieveError, match=r"9 rows take 0.0283 GB .*1024 x 1024.*fewer rows"):
        made(values, watched)


def test_a_processor_that_does_not_resize_is_given_no_large_images() -> None:
    processor = ViTImageProcessorPil(do_resize=False)
    assert made([packed(noise(1, 30, 41))], processor).pixels.shape == (1, 3, 30, 41)
    with pytest.raises(FedSieveError, match="as large as they are, and one has 1025 pixels"):
        made([packed(Image.new("L", (1025, 1000)))], processor)


def test_a_processor_that_keeps_each_images_form_is_refused() -> None:
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, do_center_crop=False)
    alike = [packed(noise(n, 30, 41)) for n in range(20)]
    assert made(alike, processor).pixels.shape == (20, 3, 32, 43)
    with pytest.raises(FedSieveError, match=r"several sizes \(32 x 43 and 32 x 32\)"):
        made([*alike[:16], *[packed(noise(1, 30, 30))] * 16], processor)


def test_how_long_a_processor_makes_images_that_keep_their_shape_is_bounded() -> None:
    """Before it makes any: sixteen images of 16 x 1024 would become 4 GB."""
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 512}, do_center_crop=False
    )
    held: list[int] = []

    def watched(images: list[Image.Image], **how: Any) -> Any:
        held.append(sum(each.width * each.height for each in images))
        return processor(images, **how)

    watched.size = processor.size  # type: ignore[attr-defined]
    with pytest.raises(FedSieveError, match="images in their shape, and one has 32768 pixels"):
        made([packed(Image.new("L", (1024, 16)))] * 20, watched)
    assert max(held) == 64 * 128
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": 30}, crop_size=SMALL)
    assert made([packed(Image.new("L", (1024, 16)))], processor).pixels.shape == (1, 3, 16, 16)


def tiled(side: int) -> bytes:
    """A TIFF of 16 x 16 pixels in one tile, which is larger."""
    tags = {
        256: 16, 257: 16, 258: (8, 8, 8), 259: 8, 262: 2, 277: 3, 322: side, 323: side,
    }  # fmt: skip
    body = zlib.compress(bytes(side * side * 3), 9)
    rows, extra = [], b""
    at = 8 + 2 + 12 * (len(tags) + 2) + 4
    for tag, value in sorted({**tags, 324: 0, 325: len(body)}.items()):
        if tag == 258:
            rows.append(struct.pack("<HHII", tag, 3, 3, at))
            extra += struct.pack("<HHH", 8, 8, 8)
        else:
            rows.append(struct.pack("<HHII", tag, 4, 1, at + 6 if tag == 324 else value))
    head = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(rows))
    return head + b"".join(rows) + struct.pack("<I", 0) + extra + body


def test_a_tile_larger_than_its_image_is_bounded_as_images_are() -> None:
    rows = Dataset.from_dict({"i": [tiled(64), tiled(8000)]})
    found = images.bad_images(rows, "i")
    assert list(found) == [1]
    assert "row 1 of column 'i' holds a tile of 8000 x 8000 pixels" in str(found[1])


def gray16(largest: int = 65535) -> Image.Image:
    return Image.fromarray((np.arange(256).reshape(16, 16) * largest // 255).astype(np.uint16))


def ramp(largest: int = 255) -> np.ndarray[Any, Any]:
    return np.repeat(np.arange(256).reshape(16, 16, 1) * largest // 255, 3, 2)


FORMS: dict[str, tuple[Callable[[], bytes], Callable[[], np.ndarray[Any, Any]]]] = {
    "gray": (
        lambda: packed(Image.new("L", (16, 16), 77)),
        lambda: np.full((16, 16, 3), 77),
    ),
    "palette": (
        lambda: packed(Image.new("RGB", (16, 16), (255, 0, 0)).convert("P"), "gif"),
        lambda: np.full((16, 16, 3), (255, 0, 0)),
    ),
    "transparent": (
        lambda: packed(Image.new("RGBA", (16, 16), (9, 9, 9, 0))),
        lambda: np.full((16, 16, 3), 255),
    ),
    "gray with alpha": (
        lambda: packed(Image.new("LA", (16, 16), (50, 255))),
        lambda: np.full((16, 16, 3), 50),
    ),
    "bits": (
        lambda: packed(Image.new("1", (16, 16), 1)),
        lambda: np.full((16, 16, 3), 255),
    ),
    "16 bits": (lambda: packed(gray16()), ramp),
    "16 bits, dark": (lambda: packed(gray16(10_000)), lambda: ramp(10_000 // 257)),
    "16 bits, nearly black": (lambda: packed(gray16(255)), lambda: ramp(0)),
    "16 bits, tiff": (lambda: packed(gray16(), "tiff"), ramp),
    "16 bits, ppm": (lambda: packed(gray16(), "ppm"), ramp),
    "cmyk": (
        lambda: packed(Image.new("CMYK", (16, 16), (0, 0, 0, 0)), "jpeg"),
        lambda: np.full((16, 16, 3), 255),
    ),
    "turned": (
        lambda: packed(turned(), "png", exif=rotation()),
        lambda: np.asarray(turned().transpose(Image.Transpose.ROTATE_270)),
    ),
}


def turned() -> Image.Image:
    return noise(5, 16, 16)


def rotation() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera on its side
    return exif


@pytest.mark.parametrize("form", FORMS)
def test_images_of_any_form_become_upright_rgb(form: str) -> None:
    write, expected = FORMS[form]
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    found = made([write()], processor).pixels[0].permute(1, 2, 0).numpy()
    assert np.abs(found.astype(int) - expected().astype(int)).max() <= 2


def city() -> bytes:
    """A few bytes that say that they are 9,000 x 9,000 pixels."""
    head = struct.pack(">IIBBBBB", 9000, 9000, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    chunks = [
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "holds no image"),
        (b"", "none of PNG, JPEG"),
        (b"no image", "none of PNG, JPEG"),
        (packed(noise(1))[:200], "cannot be read"),
        (city(), "9000 x 9000 pixels: at most"),
        (packed(Image.new("L", (1, 65))), "1 x 65 pixels: one side may be 64 times"),
        (packed(Image.new("L", (6500, 100))), "6500 x 100 pixels: one side may be 64 times"),
        (packed(Image.new("I", (9, 9), 70_000), "tiff"), "32 bits a pixel"),
        (packed(Image.new("I", (9, 9), 200), "tiff"), "32 bits a pixel"),
        (packed(Image.new("F", (9, 9), 0.5), "tiff"), "32 bits a pixel"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "none of PNG, JPEG"),
    ],
    ids=[
        "nothing",
        "empty",
        "text",
        "cut",
        "too large",
        "a line",
        "lying",
        "wide",
        "wide, small",
        "fractions",
        "a program",
    ],
)
def test_what_is_no_image_is_named(value: bytes | None, said: str) -> None:
    rows = Dataset.from_dict({"i": [packed(noise(0)), value]})
    found = images.bad_images(rows, "i")
    assert list(found) == [1]
    assert str(found[1]).startswith("row 1 of column 'i' holds")
    assert said in str(found[1])


def test_a_jpeg_of_endless_scans_is_no_image() -> None:
    """Each takes as long as the whole image, and some 75 bytes."""
    file = io.BytesIO()
    Image.new("L", (64, 64), 100).save(file, "JPEG", progressive=True)
    whole = file.getvalue()
    last = whole[whole.rindex(b"\xff\xda") : -2]
    assert images._image(whole).size == (64, 64)
    with pytest.raises(FedSieveError, match="a JPEG of more than 100 scans"):
        images._image(whole[:-2] + last * 200 + whole[-2:])


def holes(path: Path, more: int) -> Path:
    """An image's file, made longer by bytes that take no room."""
    path.write_bytes(packed(noise(1)))
    os.truncate(path, path.stat().st_size + more)
    return path


def test_a_file_that_no_image_has_is_a_bad_row(tmp_path: Path) -> None:
    """Of endless bytes: what goes over them once takes hours, or all memory."""
    files = [holes(tmp_path / f"{kind}.png", more) for kind, more in HOLES.items()]
    rows = Dataset.from_dict({"i": [{"bytes": None, "path": str(file)} for file in files]})
    found = images.bad_images(rows, "i")
    assert {n: str(error).split(": ", 1)[-1] for n, error in found.items()} == {
        1: f"[Errno 27] it is nearly all holes: '{files[1]}'",
        2: f"[Errno 27] it has more than {1 << 29} bytes: '{files[2]}'",
    }
    with pytest.raises(FedSieveError, match=r"row 1 of column 'i': .* nearly all holes"):
        inlined(rows, "i")


HOLES = {"a few": 1000, "holes": 1 << 28, "more": 1 << 40}


def ppm(head: bytes) -> bytes:
    return head + bytes(3 * 20 * 20)


@pytest.mark.parametrize(
    "head",
    [
        b"P6 20 20 255 ",
        b"P6\n# by hand\n20\n# x\n20\n255\n",
        b"P6 #" + b"x" * 2000 + b"\n20 20 255\n",
    ],
)
def test_heads_of_ppm_are_read(head: bytes) -> None:
    assert images._image(ppm(head)).size == (20, 20)


@pytest.mark.parametrize("filling", [b"#" + b"x" * 10**6 + b"\n", b" " * 10**6, b"#\n" * 10**6])
def test_an_endless_head_of_a_ppm_is_not_read(filling: bytes) -> None:
    """Pillow takes a second for each million of its letters."""
    with pytest.raises(FedSieveError, match="a PPM whose head takes more than 4,096 bytes"):
        images._image(ppm(b"P6 " + filling + b"20 20 255 "))


def test_crops_and_flips_come_from_the_key_and_move_whole_images() -> None:
    pixels = torch.stack([made([packed(noise(n, 16, 16))], plain()).pixels[0] for n in range(64)])
    same = [crops_and_flips(pixels, generator(Key(3).at("augment")), crop=True) for _ in range(2)]
    assert torch.equal(*same)
    other = crops_and_flips(pixels, generator(Key(4).at("augment")), crop=True)
    assert not torch.equal(same[0], other)
    for crop in (False, True):
        found = crops_and_flips(pixels, generator(Key(5)), crop=crop)
        assert found.dtype == torch.uint8
        kinds = set()
        for before, after in zip(pixels, found, strict=True):
            padded = torch.nn.functional.pad(before, (2, 2, 2, 2)) if crop else before
            places = [
                (bool(flip), y, x)
                for flip in (0, 1)
                for y in range(5 if crop else 1)
                for x in range(5 if crop else 1)
                if torch.equal(moved(padded, flip, y, x), after)
            ]
            assert len(places) == 1
            kinds.add(places[0])
        assert len({flip for flip, *_ in kinds}) == 2
        assert len(kinds) > (20 if crop else 1)


def moved(padded: torch.Tensor, flip: int, y: int, x: int) -> torch.Tensor:
    cut = padded[:, y : y + 16, x : x + 16]
    return cut.flip(2) if flip else cut


def plain() -> Any:
    return ViTImageProcessorPil(size={"height": 16, "width": 16})


def rows_of(folder: Path, source: str, split: str | None = None) -> list[tuple[int, str]]:
    """The red of each image that can be read, and its label."""
    data = Data(train=source, image="image", label="label")
    rows = examples.load_rows(data, source, split)
    bad = images.bad_images(rows, "image")
    good = rows.select([n for n in range(len(rows)) if n not in bad])
    found = images.images(good, plain(), "image").pixels[:, 0].float().mean((1, 2))
    return [
        (round(float(red)), str(label)) for red, label in zip(found, good["label"], strict=True)
    ]


def coloured(path: Path, red: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (red, 0, 0)).save(path)


def test_paths_in_a_file_begin_at_it_and_do_not_leave_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    coloured(home / "in" / "a.png", 10)
    coloured(tmp_path / "out.png", 20)
    (home / "link.png").symlink_to(tmp_path / "out.png")
    monkeypatch.chdir(tmp_path)
    long = "a" * 5000 + ".png"
    names = ["in/a.png", "../out.png", str(tmp_path / "out.png"), "link.png", long, "none.png"]
    lines = [json.dumps({"image": name, "label": name[:9]}) for name in names]
    (home / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert rows_of(home, str(home / "rows.jsonl")) == [(10, "in/a.png")]
    (home / "rows.csv").write_text("image,label\nin/a.png,x\n../out.png,y\n", encoding="utf-8")
    assert rows_of(home, str(home / "rows.csv")) == [(10, "x")]
    table = Dataset.from_list(
        [{"image": {"bytes": None, "path": n}, "label": n[:9]} for n in names]
    )
    table.to_parquet(home / "rows.parquet")
    assert rows_of(home, str(home / "rows.parquet")) == [(10, "in/a.png")]


def test_a_folder_of_images_is_a_data_set(tmp_path: Path) -> None:
    for number, (kind, red) in enumerate([("cat", 10), ("cat", 20), ("ship", 30)]):
        coloured(tmp_path / "flat" / kind / f"{number}.png", red)
        coloured(tmp_path / "parted" / "train" / kind / f"{number}.PNG", red)
    coloured(tmp_path / "parted" / "test" / "ship" / "0.png", 40)
    (tmp_path / "flat" / "cat" / "notes.txt").write_text("no image")
    flat = [(10, "cat"), (20, "cat"), (30, "ship")]
    assert rows_of(tmp_path, str(tmp_path / "flat")) == flat
    assert rows_of(tmp_path, str(tmp_path / "parted"), "train") == flat
    assert rows_of(tmp_path, str(tmp_path / "parted"), "test") == [(40, "ship")]
    with pytest.raises(FedSieveError, match="several splits: say which of test, train"):
        rows_of(tmp_path, str(tmp_path / "parted"))
    with pytest.raises(FedSieveError, match="no split 'dev' in"):
        rows_of(tmp_path, str(tmp_path / "parted"), "dev")
    with pytest.raises(FedSieveError, match="no column 'text'"):
        sources.load(tmp_path / "flat", columns=Columns(("text",), ("label",)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FedSieveError, match="folders of images, one a class"):
        rows_of(tmp_path, str(tmp_path / "empty"))


def test_a_data_set_with_the_hubs_image_feature_is_read(tmp_path: Path) -> None:
    kinds = Features({"image": ImageFeature(), "label": ClassLabel(names=["cat", "ship"])})
    values = {"image": [Image.new("RGB", (16, 16), (n, 0, 0)) for n in (5, 6)], "label": [1, 0]}
    rows = Dataset.from_dict(values, features=kinds)
    DatasetDict({"train": rows}).save_to_disk(tmp_path / "saved")
    rows.to_parquet(tmp_path / "rows.parquet")
    for source in ("saved", "rows.parquet"):
        found = rows_of(tmp_path, str(tmp_path / source))
        assert [red for red, _ in found] == [5, 6]


FAMILIES: dict[str, Any] = {
    "vit": lambda: ViTConfig(patch_size=4, image_size=16, **WIDTH),
    "deit": lambda: DeiTConfig(patch_size=4, image_size=16, **WIDTH),
    "swin": lambda: SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4
    ),
    "convnext": lambda: ConvNextConfig(
        image_size=16, hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=2
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
@quietly
@pytest.mark.filterwarnings("ignore:The model comes without an image processor")
def test_families_train_and_what_is_saved_gives_the_same_outputs(
    tmp_path: Path, family: str
) -> None:
    """k below r and k = r; loaded by PEFT over the base, by the card's own steps."""
    from peft import PeftModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = FAMILIES[family]()
        auto = AutoModelForImageClassification.from_config
        model = DeiTForImageClassification(config) if family == "deit" else auto(config)
        model.save_pretrained(tmp_path / "base")
    rows = pictures()[:24]
    clients = {"a": Dataset.from_list(rows[:12]), "b": Dataset.from_list(rows[12:])}
    run = fedsieve.finetune(
        tmp_path / "base",
        clients,
        fedsieve.fslora(),
        rounds=2,
        task="image-classification",
        image="image",
        lora=fedsieve.Lora(rank=4, alpha=8.0),
        budgets={"a": fedsieve.Budget(ratio=0.5), "b": fedsieve.Budget()},
        training=fedsieve.Training(batch=4, lr=0.05, augment="flip"),
        test=clients["a"],
    )
    run.finish()
    resident = run._experiment.resident
    assert resident.layout.pairs
    moved = run.adapter.tensors
    assert all(t.abs().sum() > 0 for n, t in moved.items() if ".lora_B" in n)
    run.save(tmp_path / "out")
    names = json.loads((tmp_path / "out" / "labels.json").read_text())
    base = AutoModelForImageClassification.from_pretrained(
        tmp_path / "base",
        id2label={int(n): name for n, name in names["id2label"].items()},
        label2id=names["label2id"],
        ignore_mismatched_sizes=True,
    )
    loaded = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out", backend="pil")
    shown = [Image.open(io.BytesIO(row["image"]["bytes"])) for row in rows[:4]]
    with torch.inference_mode():
        theirs = loaded(**processor(shown, return_tensors="pt")).logits
        resident.put(run.adapter)
        resident.model.eval()
        own = images.images(Dataset.from_list(rows[:4]), processor, "image")
        ours = resident.model(**inputs(resident.model, own, CPU)).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@quietly
def test_augmented_runs_are_the_same_in_whatever_order_clients_run(
    tiny: Tiny, tmp_path: Path
) -> None:
    """From a folder of images, with a natural partition by what the rows say; and stopped rows."""
    for seed, label in enumerate(LABELS * 6):
        path = tmp_path / "photos" / label / f"{seed}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png([COLOURS[label]] * 2, seed)["bytes"])
    given: dict[str, Any] = {
        "model": {"source": str(tiny.vit), "task": "image-classification"},
        "data": {"train": str(tmp_path / "photos"), "image": "image", "label": "label"},
        "method": {"name": "fedit"},
        "lora__targets": None,
        "budgets": [{}],
        "rounds": 1,
        "cohort": 3,
        "partition": {"kind": "dirichlet", "clients": 3, "alpha": 10.0},
        "training": {"batch": 4, "lr": 0.05, "augment": "crop-flip", "precision": "fp32"},
    }
    adapters = [runs.start(tiny, tmp_path / f"run{n}", **given) for n in range(2)]
    for name, tensor in adapters[0].tensors.items():
        assert torch.equal(tensor, adapters[1].tensors[name])
    given["training"]["augment"] = "none"
    plain_run = runs.start(tiny, tmp_path / "run2", **given)
    assert any(
        not torch.equal(tensor, plain_run.tensors[name])
        for name, tensor in adapters[0].tensors.items()
    )


def test_images_of_another_size_than_the_models_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(tiny.vit, tmp_path / "vit")
    ViTImageProcessorPil(size={"height": 24, "width": 24}).save_pretrained(tmp_path / "vit")
    rows = Dataset.from_list(pictures()[:8])
    with pytest.raises(FedSieveError, match="24 x 24 pixels, and the model takes 16 x 16"):
        fedsieve.finetune(
            tmp_path / "vit",
            [rows],
            fedsieve.fedit(),
            rounds=1,
            task="image-classification",
            image="image",
        )


@pytest.mark.filterwarnings("ignore:The model comes without an image processor")
def test_a_model_that_reads_something_else_is_named(tiny: Tiny) -> None:
    images_of: dict[str, Any] = {"task": "image-classification", "image": "image"}
    rows = Dataset.from_list(pictures()[:8])
    with pytest.raises(FedSieveError, match="is of no kind that AutoModelForImageClassification"):
        fedsieve.finetune(tiny.bert, [rows], fedsieve.fedit(), rounds=1, **images_of)
    texts = Dataset.from_list([{"text": "cars0", "label": label} for label in LABELS])
    with pytest.raises(FedSieveError, match="comes without a tokenizer: choose one that reads"):
        fedsieve.finetune(tiny.vit, [texts], fedsieve.fedit(), rounds=1)
