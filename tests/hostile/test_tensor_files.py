"""Files of tensors that somebody made to harm: refused in a sentence wherever one is read, and what
they promise fills no memory.
"""

import contextlib
import json
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from fedsieve.disk import bytes_of
from fedsieve.errors import FedSieveError
from fedsieve.recipe import read as recipe
from fedsieve.recipe.experiment import from_recipe
from fedsieve.run import checkpoint, rundir
from fedsieve.sites import journal
from fedsieve.train.declared import names_held
from fedsieve.train.digest import tensors_digest
from tests.conftest import Tiny

# A name more in a file's header -> what torch or safetensors raise over it.
ODD: dict[str, Any] = {
    "more rows than numbers go": {"dtype": "F32", "shape": [2**64 - 1, 0], "data_offsets": [0, 0]},
    "a product beyond all": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 0]},
    "a type that there is not": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]},
    "numbers beyond its end": {"dtype": "F32", "shape": [9], "data_offsets": [2**40, 2**40 + 36]},
    "numbers from behind": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
    "no table": [1, 2],
}


def with_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """A file of tensors with another header over the same numbers."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def written(folder: Path, said: Mapping[str, str] | None = None) -> Path:
    folder.mkdir(parents=True)
    path = folder / "adapter_model.safetensors"
    safetensors.torch.save_file({"a": torch.ones(3)}, path, dict(said or {}))
    return path


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "labels.json"]
)
def test_an_adapter_to_begin_from_holds_no_link_that_leads_out(
    tiny: Tiny, tmp_path: Path, whole: Path, name: str
) -> None:
    folder = Path(shutil.copytree(whole / rundir.ADAPTER, tmp_path / "adapter"))
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    given = recipe.check(tiny.table(lora__start=str(folder)))
    with pytest.raises(FedSieveError, match=f"lora.start: .*{name} is a link that leads out"):
        from_recipe(given)


@pytest.mark.parametrize("odd", ODD)
def test_an_adapter_to_begin_from_is_refused(tiny: Tiny, tmp_path: Path, odd: str) -> None:
    path = written(tmp_path / "adapter")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    with_header(path, lambda header: header.update(x=ODD[odd]))
    given = tiny.table(lora__start=str(tmp_path / "adapter"))
    with pytest.raises(FedSieveError, match=r"lora\.start: the adapter in .* cannot be read"):
        from_recipe(recipe.check(given))


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("labels.json", "[" * 200_000, None),  # which only FedSieve writes, and is passed over
        ("labels.json", '{"id2label": ' * 5_000, None),
        ("adapter_config.json", "[" * 200_000, "cannot be read"),
        ("adapter_config.json", json.dumps({"peft_type": "x" * 2_000_000}), "of type 'xxx"),
        (
            "adapter_config.json",
            json.dumps({"peft_type": "LORA", "init_lora_weights": "pissa" + "x" * 100_000}),
            "init_lora_weights 'pissaxxx",
        ),
    ],
)
def test_words_beside_it_are_read_as_far_as_words_go(
    tiny: Tiny, whole: Path, tmp_path: Path, file: str, text: str, said: str | None
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(whole / rundir.ADAPTER, folder)
    (folder / file).write_text(text)
    given = recipe.check(tiny.table(lora__start=str(folder)))
    if said is None:
        assert from_recipe(given).federation.clients
        return
    with pytest.raises(FedSieveError, match=said) as caught:
        from_recipe(given)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("odd", ODD)
def test_a_checkpoint_is_passed_over(whole: Path, tmp_path: Path, odd: str) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(whole / rundir.CHECKPOINTS, folder)
    for path in folder.iterdir():
        with_header(path, lambda header: header.update({"state/adapter/x": ODD[odd]}))
    assert checkpoint.notes(folder) == []


@pytest.mark.parametrize("odd", ODD)
def test_what_a_site_kept_is_passed_over(tmp_path: Path, odd: str) -> None:
    path = written(tmp_path / "site", {"facts": "{}"})
    with_header(path, lambda header: header.update(x=ODD[odd]))
    data = path.read_bytes()
    path.write_bytes(journal._digest(data) + data)
    with pytest.warns(UserWarning, match="is damaged"):
        assert journal._read(path, "w") is None


SOUND: dict[str, Any] = {"ok": True, "round": 2, "reason": None, "loss": 0.5, "steps": 3}
SOUND |= {"seconds": 1.0, "compute": 1.0, "wire": 0, "memory": 9}
# What stands beside a whole entry's tensors, less what is odd in it: each has its right digest.
KEPT: dict[str, Any] = {
    "facts that are a list": {"facts": [1]},
    "no word that it went well": {"facts": {"round": 2}},
    "a loss that is none": {"facts": {**SOUND, "loss": float("nan")}},
    "a reason without end": {"facts": {**SOUND, "reason": "y" * (1 << 17)}},
    "steps that are a text": {"facts": {**SOUND, "steps": "3"}},
    "a length beyond its bytes": {"length": 10**9},
    "a length below none": {"length": -1},
    "a round that is a text": {"round": "2"},
    "another round": {"round": 3},
    "a memory of later": {"before": 2},
    "what was asked that is no text": {"asked": [1]},
    "another form": {"format": 1},
    "another run": {"whose": "another"},
}
TENSORS: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "no answer": lambda t: t.pop("answer"),
    "an answer of fractions": lambda t: t.update(answer=torch.ones(3)),
    "a name without its group": lambda t: t.update(x=torch.ones(1)),
    "a memory that is not finite": lambda t: t.update({"residual/a": torch.tensor([torch.nan])}),
}


def entry(
    folder: Path, changes: Mapping[str, Any], act: Callable[[dict[str, torch.Tensor]], object]
) -> None:
    """The file of round 2."""
    facts = {
        "format": 2,
        "whose": "w",
        "round": 2,
        "before": 1,
        "asked": "a",
        "facts": SOUND,
        "length": 2,
    }
    tensors = {"answer": torch.ones(2, dtype=torch.uint8), "residual/a": torch.ones(3)}
    act(tensors)
    data = safetensors.torch.save(tensors, {"facts": json.dumps({**facts, **changes})})
    folder.mkdir(exist_ok=True)
    (folder / journal._name(2)).write_bytes(journal._digest(data) + data)


@pytest.mark.parametrize("odd", [*KEPT, *TENSORS])
def test_what_a_site_never_kept_is_passed_over(tmp_path: Path, odd: str) -> None:
    entry(tmp_path, {}, lambda tensors: None)
    found = journal.find(tmp_path, 2, "w")
    assert found is not None
    assert found.facts == SOUND
    entry(tmp_path, KEPT.get(odd, {}), TENSORS.get(odd, lambda tensors: None))
    with pytest.warns(UserWarning, match="is damaged"):
        assert journal.find(tmp_path, 2, "w") is None


def test_files_of_holes_are_not_read(tmp_path: Path) -> None:
    """Whatever reads whole files: a gigabyte that takes no room on the disk."""
    path = tmp_path / journal._name(2)
    entry(tmp_path, {}, lambda tensors: None)
    with path.open("r+b") as file:
        file.truncate(1 << 30)
    before = own_memory()
    with pytest.warns(UserWarning, match="is nearly all holes"):
        assert journal.find(tmp_path, 2, "w") is None
    with pytest.raises(OSError, match="is nearly all holes"):
        bytes_of(path, None)
    assert own_memory() - before < 1 << 24
    # What a copy may leave out, because it was zeros, is no hole of that kind.
    with path.open("r+b") as file:
        file.truncate(1 << 25)
        file.seek(1 << 24)
        file.write(b"x" * (1 << 23))
    assert len(bytes_of(path, None)) == 1 << 25


@pytest.mark.parametrize("odd", ODD)
def test_a_models_weights_raise_nothing_else(tmp_path: Path, odd: str) -> None:
    path = written(tmp_path / "model")
    with_header(path, lambda header: header.update(x=ODD[odd]))
    with contextlib.suppress(FedSieveError):  # its header alone is looked at, which may pass
        names_held(str(path.parent))


def test_a_checkpoint_of_holes_fills_no_memory(whole: Path, tmp_path: Path) -> None:
    """Half a gigabyte that takes no room on the disk, with a digest that is right."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(whole / rundir.CHECKPOINTS, folder)
    path = max(folder.iterdir())
    tensors = safetensors.torch.load_file(path)
    size = 1 << 29
    digest = tensors_digest({**tensors, "state/holes/x": torch.zeros(size, dtype=torch.uint8)})
    length = path.stat().st_size - 8 - struct.unpack("<Q", path.read_bytes()[:8])[0]

    def longer(header: dict[str, Any]) -> None:
        place = [length, length + size]
        header["state/holes/x"] = {"dtype": "U8", "shape": [size], "data_offsets": place}
        header["__metadata__"]["digest"] = digest

    with_header(path, longer)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + size)
    before = own_memory()
    assert len(checkpoint.notes(folder)) == 2 - 1  # the digest is of other words: not this one
    assert own_memory() - before < size // 4


def test_a_checkpoint_of_nothing_but_holes_is_passed_over_at_once(
    whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(whole / rundir.CHECKPOINTS, folder)
    path = max(folder.iterdir())
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    assert [note.path for note in checkpoint.notes(folder)] == [min(folder.iterdir())]


def test_a_scale_that_makes_numbers_of_it_infinite_is_told(
    tiny: Tiny, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(whole / rundir.ADAPTER, folder)
    config = json.loads((folder / "adapter_config.json").read_text()) | {"lora_alpha": 1e9}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    path = folder / "adapter_model.safetensors"
    tensors = {
        n: t * 1e34 if "lora_B" in n else t for n, t in safetensors.torch.load_file(path).items()
    }
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(FedSieveError, match=r"the adapter in .* beyond float32 at this run's"):
        from_recipe(recipe.check(tiny.table(lora__start=str(folder))))


def own_memory() -> int:
    """Bytes that no file lies behind, of this process at its largest so far."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs /proc")
    line = next(line for line in status.read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024
