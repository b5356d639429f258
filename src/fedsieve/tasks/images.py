"""From columns of images to pixels that a model can train on.

Pillow decodes; the model's own image processor makes what the model reads of it, once. Processors
scale, shift and normalise in many ways, and all come to one: a value is linear in a pixel's level
of 0 to 255. So the levels are kept, as bytes, and a batch is made values when it is used
(batch.py): four times the memory otherwise. What black and white become says which line it is.
No image is trusted: one that does not decode, or that is too large, is a bad row. Nor is the
processor, which says how large images become: what does not fit is refused before it is made.
"""

import io
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fedsieve.data.pictures import LARGEST
from fedsieve.data.sources import column
from fedsieve.disk import bytes_of
from fedsieve.errors import FedSieveError, quoted, raise_of_memory, words

Array = np.ndarray[Any, np.dtype[np.float64]]

# Pillow's names. It reads others, and some (EPS) by another program: a stranger's, run here.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MOST_PIXELS = 50_000_000  # of one image: a small file can say that it is as large as a city
MOST_SIDE = 1024  # pixels, of what a model reads
MOST_SIDES = 64  # times the shorter one: made as wide as a model sees it, a line is a city too
MOST_SCANS = 100  # of a progressive JPEG, which cameras and tools write in some ten
_SCAN = b"\xff\xda"  # begins one, each over all pixels, and stands nowhere else but in notes
_HEAD = 4096  # bytes of a PPM's head, which Pillow reads one by one
_HEADER = re.compile(rb"P[0-9A-Za-z]+(?:(?:\s|#[^\r\n]*[\r\n])+-?[\d.]+){2,3}\s")
_PIECES = re.compile("patch|tile|grid|pinpoint|split", re.IGNORECASE)  # keys of a processor
_LEVELS = re.compile("mean|std|rescale|offset")  # and of numbers that change no size
_LEAST = 1 / 16  # share of an image that is cut out (`crop_pct`): it is made larger before
_AT_ONCE = 16  # images that the processor is given in one call
_HELD = 1 << 22  # and pixels of them, where there are several


class Images(NamedTuple):
    """n examples.

    pixels: (n, 3, height, width) uint8, resized and cropped
    labels: (n,) int64 class numbers, or (n, C) float32, one where a class holds
    low, high: what the model reads, by channel, for pixels of 0 and of 255; linear between them
    """

    pixels: Tensor
    labels: Tensor
    low: tuple[float, ...]
    high: tuple[float, ...]


def images(dataset: Dataset, processor: Any, name: str) -> Images:
    """The images of a column, with labels of zero that a task puts its own in place of.

    Raises FedSieveError, naming row and column, for an image that cannot be used.
    """
    low, high, size = _ends(processor)
    pixels, done = _room(len(dataset), size), 0
    keeps, longest = _longest(processor, size)
    for some in _batches(dataset, name, size):
        if (large := max(map(longest, some))) > MOST_SIDE:
            raise FedSieveError(
                f"the model's image processor leaves images {keeps}, and one has {large:.0f} "
                f"pixels a side: at most {MOST_SIDE} are read"
            )
        levels = _levels(_values(processor, some), low, high)
        if not done:
            pixels = _room(len(dataset), levels.shape[2:])
        if levels.shape[1:] != pixels.shape[1:]:
            sizes = " and ".join("{} x {}".format(*each.shape[2:]) for each in (pixels, levels))
            raise FedSieveError(
                f"the model's image processor makes images of several sizes ({sizes}): a model "
                "that takes one size is needed"
            )
        pixels[done : done + len(some)] = levels
        done += len(some)
    labels = torch.zeros(len(pixels), dtype=torch.int64)
    return Images(pixels, labels, tuple(low.tolist()), tuple(high.tolist()))


def bad_images(dataset: Dataset, name: str) -> dict[int, FedSieveError]:
    """The rows of a column whose image cannot be used, and what is wrong with each."""
    made = enumerate(_decoded(dataset, name))
    return {row: each for row, each in made if isinstance(each, FedSieveError)}


def crops_and_flips(pixels: Tensor, draws: torch.Generator, *, crop: bool) -> Tensor:
    """Each image flipped from left to right or not, and moved by up to an eighth of its sides, with
    zeros where it moved from: what is usual for CIFAR-10, as FLASC trains on it.

    pixels: (b, 3, height, width), on the CPU
    """
    count, _, high, wide = pixels.shape
    flipped = torch.rand(count, generator=draws) < 0.5
    side = torch.arange(wide)
    columns = torch.where(flipped[:, None], wide - 1 - side, side)
    rows = torch.arange(high).expand(count, high)
    if crop:
        down, right = high // 8, wide // 8
        pixels = torch.nn.functional.pad(pixels, (right, right, down, down))
        rows = rows + torch.randint(2 * down + 1, (count, 1), generator=draws)
        columns = columns + torch.randint(2 * right + 1, (count, 1), generator=draws)
    number, channel = torch.arange(count)[:, None, None, None], torch.arange(3)[:, None, None]
    return pixels[number, channel, rows[:, None, :, None], columns[:, None, None, :]]


def _room(rows: int, size: Sequence[int]) -> Tensor:
    """Where all pixels will be. Raises FedSieveError where they are more than can be held."""
    high, wide = size
    if (taken := rows * 3 * high * wide) > memory_of_machine() / 2:
        raise FedSieveError(
            f"the images of {rows:,} rows take {taken / 1e9:.3g} GB as the model reads them "
            f"({high} x {wide} pixels), which is more than half of this machine's memory: take "
            "fewer rows, or a model that reads smaller images"
        )
    return torch.empty(rows, 3, high, wide, dtype=torch.uint8)


def memory_of_machine() -> int:
    """In bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _batches(dataset: Dataset, name: str, size: tuple[int, int]) -> Iterator[list[Image.Image]]:
    """The images in order, a few at a time. Raises the error of a row that has none.

    size: what the processor makes of a square one
    """
    batch: list[Image.Image] = []
    held = 0.0
    for image in _decoded(dataset, name):
        if isinstance(image, FedSieveError):
            raise image
        # Before it is cropped an image may have its shape yet, with `size` along its shorter side.
        resized = math.prod(size) * max(image.size) / min(image.size)
        own = max(image.width * image.height, resized)
        held += own
        if batch and (len(batch) == _AT_ONCE or held > _HELD):
            yield batch
            batch, held = [], own
        batch.append(image)
    yield batch


def _decoded(dataset: Dataset, name: str) -> Iterator[Image.Image | FedSieveError]:
    """Each row's image, or what is wrong with it; one at a time, for decoded they are large."""
    for row, value in enumerate(column(dataset, name)):
        try:
            yield _image(value)
        except FedSieveError as error:
            yield FedSieveError(f"row {row} of column {name!r} {error}")


def _image(value: Any) -> Image.Image:
    """An image as RGB, upright. Raises FedSieveError, with the end of a sentence."""
    if isinstance(value, dict):
        data, path = value.get("bytes"), value.get("path")
        if missing := value.get("missing"):
            raise FedSieveError(f"names an image that is not there beside its file: {missing[:80]}")
    else:
        data, path = (value, None) if isinstance(value, bytes) else (None, value)
    if data is None and isinstance(path, str) and Path(path).is_file():
        try:
            data = bytes_of(Path(path), LARGEST)
        except OSError as error:
            raise FedSieveError(f"names an image that cannot be read: {words(error)}") from None
    elif data is None and isinstance(path, str):
        raise FedSieveError(f"names an image that is not there: {path[:80]}")
    if not isinstance(data, bytes):
        raise FedSieveError("holds no image: bytes, or the path of one, are needed")
    if data[:1] == b"P" and not _HEADER.match(data[:_HEAD]):
        raise FedSieveError(f"holds a PPM whose head takes more than {_HEAD:,} bytes, or is none")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a size that is refused here
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                for wide, high, what in (*_tiles(image), (*image.size, "n image")):
                    if wide * high > MOST_PIXELS:
                        raise FedSieveError(
                            f"holds a{what} of {wide} x {high} pixels: at most {MOST_PIXELS:,} are "
                            "read"
                        )
                if max(image.size) > MOST_SIDES * min(image.size):
                    raise FedSieveError(
                        f"holds an image of {image.width} x {image.height} pixels: one side may be "
                        f"{MOST_SIDES} times the other at most"
                    )
                if image.format in ("JPEG", "MPO") and data.count(_SCAN) > MOST_SCANS:
                    raise FedSieveError(
                        f"holds a JPEG of more than {MOST_SCANS} scans, each over all of its pixels"
                    )
                return _rgb(ImageOps.exif_transpose(image), image.format)
    except FedSieveError:
        raise
    except UnidentifiedImageError:
        raise FedSieveError(
            f"holds no image that can be read: it is none of {', '.join(FORMATS)}"
        ) from None
    except Exception as error:  # whatever a decoder may raise
        raise_of_memory(error)
        why = words(error, 100)
        raise FedSieveError(f"holds an image that cannot be read: {why}") from None


def _tiles(image: Image.Image) -> Iterator[tuple[int, int, str]]:
    """Width and height of what a TIFF is made of, which is decoded whole: a tile may be larger than
    the image.
    """
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        with suppress(TypeError, ValueError):
            yield int(tags.get(322, 0)), int(tags.get(323, 0)), " tile"


def _rgb(image: Image.Image, form: str | None) -> Image.Image:
    """The image in 8 bits a channel. Pillow cuts wider ones off at 255: nearly all would be white.

    form: Pillow's name of the file's format
    Raises FedSieveError for numbers of which nothing tells what is white.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and form in ("PNG", "PPM")):
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise FedSieveError(
            "holds an image of 32 bits a pixel, of which nothing tells what is white: save it with "
            "8 or 16"
        )
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        whole = image.convert("RGBA")  # what is transparent is white, not whatever lies beneath
        image = Image.alpha_composite(Image.new("RGBA", whole.size, "white"), whole)
    return image.convert("RGB")


def _values(processor: Any, batch: Sequence[Image.Image]) -> Array:
    """(b, 3, height, width) float64: what the model reads of the images."""
    try:
        made = processor(list(batch), return_tensors="np")
        values = np.asarray(made["pixel_values"], dtype=np.float64)
    except Exception as error:  # whatever a processor may raise
        raise_of_memory(error)
        why = words(error, 200)
        raise FedSieveError(f"the model's image processor cannot read images: {why}") from error
    if values.ndim != 4 or values.shape[1] != 3:
        raise FedSieveError(
            f"the model's image processor makes arrays of shape {values.shape[1:]}: models that "
            "take one image of three channels a row are needed"
        )
    return values


def _told(processor: Any, name: str) -> Mapping[str, Any]:
    """A size that a processor has, by its sides."""
    given = getattr(processor, name, None)
    return given if isinstance(given, Mapping) else {} if given is None else vars(given)


def _ends(processor: Any) -> tuple[Array, Array, tuple[int, int]]:
    """What black and white become, of each channel, (3,) and (3,), and height and width of both.

    Raises FedSieveError where what lies between them is not on a line.
    """
    _refuse_large(processor)
    grays = []
    for level in (0, 51, 255):  # one at a time, for they may become large
        (values,) = _values(processor, [Image.new("RGB", (64, 64), (level,) * 3)])
        size = values.shape[1:]
        grays.append(values[:, size[0] // 2, size[1] // 2].copy())
    low, some, high = grays
    expected = low + (high - low) / 5  # 51 is a fifth of 255
    if not (np.abs(high - low) > 0).all() or not np.allclose(some, expected, rtol=0, atol=1e-3):
        raise FedSieveError(
            "the model's image processor does more than to scale pixels and shift them: models "
            "whose processor does no more are needed"
        )
    return low, high, size


def _refuse_large(processor: Any) -> None:
    """Raises FedSieveError for a number of a processor's that may make its images too large, and
    for one that cuts them into pieces, of which it says how many there are.
    """
    waiting: list[tuple[str, Any]] = list(getattr(processor, "to_dict", dict)().items())
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += [(name, each) for each in value.values()]
        elif isinstance(value, list | tuple):
            waiting += [(name, each) for each in value]
        elif _PIECES.search(name) and value not in (None, False):
            raise FedSieveError(
                f"the model's image processor cuts images into pieces ({name[:80]}): models that "
                "take one image of three channels a row are needed"
            )
        elif isinstance(value, int | float) and not _LEVELS.search(name):
            if not abs(value) <= MOST_SIDE:
                raise FedSieveError(
                    f"the model's image processor makes images of {quoted(value)} pixels a side "
                    f"({name[:80]}): at most {MOST_SIDE} are made"
                )
            if 0 < abs(value) < _LEAST:
                raise FedSieveError(
                    f"the model's image processor makes images larger before it cuts them "
                    f"({name[:80]} {quoted(value)}): a share of {_LEAST} or more is needed"
                )


def _longest(processor: Any, size: tuple[int, int]) -> tuple[str, Callable[[Image.Image], float]]:
    """How long the longer side of an image becomes, at most, and what the processor leaves of it.

    size: what a square one becomes
    """
    if not getattr(processor, "do_resize", True):
        return "as large as they are", lambda image: max(image.size)
    (values,) = _values(processor, [Image.new("RGB", (128, 64))])
    if max(values.shape[1:]) <= max(size) or _told(processor, "size").get("longest_edge"):
        return "of one size", lambda image: max(size)
    return "in their shape", lambda image: max(size) * max(image.size) / min(image.size)


def _levels(values: Array, low: Array, high: Array) -> Tensor:
    """The pixels that became these values; where a processor filled an image up, the nearest."""
    first, step = (each[:, None, None] for each in (low, (high - low) / 255))
    return torch.from_numpy(np.clip(np.rint((values - first) / step), 0, 255).astype(np.uint8))
