"""What a tokenizer or an image processor makes of a row is in its digest, and nothing else is."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from fedsieve.train.reader import reader_digest, reader_parts

# Kinds of image processors -> settings that make other pixels of an image.
PROCESSORS: dict[str, dict[str, Any]] = {
    "ViT": {"size": {"height": 8, "width": 8}, "do_rescale": False, "image_mean": [0.1] * 3},
    "ConvNext": {"crop_pct": 0.5, "resample": 0},
    "EfficientNet": {"rescale_offset": True, "include_top": False},
    "MobileViT": {"do_flip_channel_order": False, "do_center_crop": False},
    "PoolFormer": {"crop_pct": 0.5},
    "CLIP": {"do_convert_rgb": False, "crop_size": {"height": 8, "width": 8}},
}
CASES = [(kind, key) for kind, changes in PROCESSORS.items() for key in changes]


def made(kind: str, **changes: Any) -> Any:
    """In the form for Pillow, as recipes have it; older releases have one form alone."""
    names = (f"{kind}ImageProcessorPil", f"{kind}ImageProcessor")
    found = next(filter(None, (getattr(transformers, name, None) for name in names)))
    return found(**changes)


@pytest.mark.parametrize(("kind", "key"), CASES)
def test_a_setting_that_makes_other_pixels_makes_another_digest(kind: str, key: str) -> None:
    changed = made(kind, **{key: PROCESSORS[kind][key]})
    assert reader_digest(changed) != reader_digest(made(kind))
    assert reader_parts(changed) != reader_parts(made(kind))


@pytest.mark.parametrize("kind", PROCESSORS)
def test_a_processor_that_was_saved_is_the_same(kind: str, tmp_path: Path) -> None:
    first = made(kind)
    first.save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    told = json.loads(path.read_text()) | {"transformers_version": "9.9", "processor_class": "X"}
    path.write_text(json.dumps(told))
    assert reader_digest(type(first).from_pretrained(tmp_path)) == reader_digest(first)


def test_kinds_that_have_the_same_settings_differ() -> None:
    assert len({reader_digest(made(kind)) for kind in PROCESSORS}) == len(PROCESSORS)


def of_python(folder: Path, merges: str) -> Any:
    """A tokenizer that is written in Python, without steps of the tokenizers library."""
    folder.mkdir()
    words = ["a", "b", "a</w>", "b</w>", "ab</w>", "<unk>"]
    (folder / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}))
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    return transformers.CTRLTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))


def test_a_tokenizer_of_python_has_steps_too(tmp_path: Path) -> None:
    first = of_python(tmp_path / "first", "a b</w>\nb a</w>")
    other = of_python(tmp_path / "other", "b a</w>\na b</w>")
    assert not hasattr(first, "backend_tokenizer")
    assert reader_parts(first) == reader_parts(of_python(tmp_path / "same", "a b</w>\nb a</w>"))
    assert reader_parts(first)["steps"] != reader_parts(other)["steps"]


def test_so_has_one_whose_vocabulary_is_saved_by_a_name_alone(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("<cls>\n<pad>\n<eos>\n<unk>\nL\nA\n<mask>\n")
    assert "steps" in reader_parts(transformers.EsmTokenizer(str(tmp_path / "vocab.txt")))
