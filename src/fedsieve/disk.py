"""Files in folders that somebody else may have made.

A run's folder gets copied, mailed and unpacked from archives, and an archive may hold a link in the
place of any file. So what is written is whole or not there, and goes through no link; what is read
is read as if an enemy had written it: ordinary files, lines of a bounded length, numbers that fit.

The folder that a user names may be a link itself, as may what lies above it: that is their word.
"""

import errno
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

from fedsieve.errors import FedSieveError, of_memory, printable, reason, with_type, words

LARGEST = 2**63 - 1  # a whole number in a file; what is computed from it fits a float
LONGEST = 1 << 20  # bytes of a line


def refuse_link(path: Path, *, folder: bool = False) -> None:
    """Raises FedSieveError for what is neither missing nor an ordinary file (or folder)."""
    try:
        mode = os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    if not (stat.S_ISDIR(mode) if folder else stat.S_ISREG(mode)):
        what = "a symbolic link" if stat.S_ISLNK(mode) else "something else"
        raise FedSieveError(
            f"{path} is {what}, where a run has a {'folder' if folder else 'file'} of its own: "
            "nothing is read or written there; put what belongs there in its place, or remove it"
        )


_CACHES = ("models--", "datasets--")  # folders of the hub's cache, whose snapshots link to blobs


def refuse_links_out(folder: Path, what: str, paths: Iterable[Path] | None = None) -> None:
    """Raises FedSieveError for a link in a folder that leads out of it, there or not: a stranger's
    folder would so take in files of its reader's, which are copied and uploaded with the rest.

    what:  the folder, in words that begin the message
    paths: the links that are looked at; None for all in the folder, however deep
    The folder may be a link itself, and a link may lead to a blob of the hub's cache, or to what
    git-annex keeps of the repository that the folder is in.
    """
    home = folder.resolve()
    try:
        for path in sorted(everything_in(folder)) if paths is None else paths:
            # What git keeps is none of the folder's parts (git-annex has a link there, too).
            if path.is_symlink() and path.name != ".git" and not _stays(path, home):
                raise FedSieveError(
                    f"{what}: {printable(str(path.relative_to(folder))[:200])} is a link that "
                    "leads out of its folder, and what is there would be taken for a part of it: "
                    "see where it leads (ls -l); put the file itself in its place if it belongs "
                    "there, or remove the link"
                )
    except OSError as error:
        raise FedSieveError(f"{what} cannot be looked through: {reason(error)}") from error


def _stays(path: Path, home: Path) -> bool:
    try:
        to = path.resolve()
    except (OSError, RuntimeError):  # in circles, which whoever opens it says
        return True
    blobs = to.parent.name == "blobs" and to.parent.parent.name.startswith(_CACHES)
    annexes = ((above / ".git/annex/objects").resolve() for above in (home, *home.parents))
    return blobs or to.is_relative_to(home) or any(map(to.is_relative_to, annexes))


class NotAFile(OSError):
    """A pipe, a folder or a device where a file should be."""


def bytes_of(path: Path, most: int | None) -> bytes:
    """What a file holds. Raises OSError as reading does, also for more than `most` bytes, and for
    one that is nearly all holes; NotAFile for all else: a pipe would be waited for.

    most: None for a file whose length is its owner's affair
    """
    opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(opened).st_mode):
            raise NotAFile(errno.EINVAL, "it is no file", str(path))
        if most is not None and os.fstat(opened).st_size > most:
            raise OSError(errno.EFBIG, f"it has more than {most} bytes", str(path))
        _refuse_holes(opened, path)
        with os.fdopen(opened, "rb", closefd=False) as file:
            return file.read() if most is None else file.read(most)
    finally:
        os.close(opened)


_LARGE = 1 << 24  # bytes, from where a file that is nearly all holes is none of ours
_FEW = 8  # of so many bytes one is there, or the file is holes: a copy may have left out zeros


def refuse_holes(path: Path) -> None:
    """Raises OSError for a large file that is nearly all holes: its bytes take no room on the disk,
    and would take it in memory.
    """
    opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        _refuse_holes(opened, path)
    finally:
        os.close(opened)


def _refuse_holes(opened: int, path: Path) -> None:
    size, there, at = os.fstat(opened).st_size, 0, 0
    while size > _LARGE and at < size and there * _FEW < size:
        try:
            begin = os.lseek(opened, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:  # a file system that does not tell
                break
            raise OSError(errno.EFBIG, "it is nearly all holes", str(path)) from None
        at = os.lseek(opened, begin, os.SEEK_HOLE)
        there += at - begin
    else:
        if size > _LARGE and there * _FEW < size:
            raise OSError(errno.EFBIG, "it is nearly all holes", str(path))
    os.lseek(opened, 0, os.SEEK_SET)


def no_room(error: OSError) -> bool:
    """Whether a disk was full, or its owner's share of it; or a file as large as any may be, where
    the system said so (EFBIG is also how a file that is refused here says that it is too large).
    """
    too_large = error.errno == errno.EFBIG and error.strerror == os.strerror(errno.EFBIG)
    return error.errno in (errno.ENOSPC, errno.EDQUOT) or too_large


def no_temporary(error: OSError) -> str | None:
    """What is to be told where Python finds no folder for temporary files, as on a disk that is
    full: libraries look for one as they are imported. None of any other error.
    """
    said = str(error.strerror)
    if error.filename is not None or not said.startswith("No usable temporary directory"):
        return None
    tried = said.partition(" found in ")[2]
    return (
        f"no temporary folder can be written (tried {tried}): make room, or set TMPDIR to another"
    )


def named_by(error: OSError) -> str | None:
    """The file that an error is of: of a copy, the one that was written and not the one read."""
    found = error.filename if error.filename2 is None else error.filename2
    return None if found is None else str(found)


_OS_ERROR = re.compile(r"\(os error (\d{1,4})\)")  # as libraries written in Rust put it into words


def of_the_disk(error: BaseException) -> OSError | None:
    """What the system said, where an error is of a file that could not be written: tokenizers and
    safetensors hide it in exceptions of their own.
    """
    if isinstance(error, OSError):
        return error
    if (told := _OS_ERROR.search(words(error, LONGEST))) is not None:
        return OSError(int(told[1]), os.strerror(int(told[1])))
    return OSError(errno.EIO, words(error)) if isinstance(error, SafetensorError) else None


def remove_link(path: Path) -> bool:
    """Remove a link, not what it leads to. Whether there was one."""
    if path.is_symlink():
        path.unlink()
        return True
    return False


def write_whole(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Write a file so that it is there with all of `data`, or not changed at all.

    mode: less what the process's umask takes. A link at `path` is replaced, not followed.
    """
    if path.is_dir():
        raise FedSieveError(f"{path} is a folder, and a file is written there: move it away")
    part = path.with_name(f".{path.name}.part")
    try:
        part.unlink(missing_ok=True)
        # What another process puts there in between is not opened.
        opened = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
        with os.fdopen(opened, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk names none
        part.unlink(missing_ok=True)
        raise
    sync(path.parent)  # the rename itself must reach the disk too


def sync(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def append(path: Path, text: str) -> None:
    """Add to the end of a file, which is made if need be."""
    with os.fdopen(_open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "a", encoding="utf-8") as f:
        f.write(text)


def appending(path: Path) -> BinaryIO:
    """A file, which is made if need be, open at its end for a process that writes there."""
    return os.fdopen(_open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab")


def synced_length(path: Path) -> int:
    """The length of a file in bytes, after making sure that they are on the disk."""
    opened = _open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
        return os.fstat(opened).st_size
    finally:
        os.close(opened)


def cut(path: Path, length: int) -> bool:
    """Cut a file to a length in bytes. False, with nothing done, where it is shorter."""
    if not path.exists():
        return length == 0
    opened = _open(path, os.O_WRONLY)
    try:
        if os.fstat(opened).st_size < length:
            return False
        os.ftruncate(opened, length)
        return True
    finally:
        os.close(opened)


def _open(path: Path, flags: int) -> int:
    """Raises FedSieveError for a link, also a hard one: another file would be written to."""
    refuse_link(path)
    opened = os.open(path, flags | os.O_NOFOLLOW, 0o666)
    found = os.fstat(opened)
    if stat.S_ISREG(found.st_mode) and found.st_nlink == 1:
        return opened
    os.close(opened)
    raise FedSieveError(
        f"{path} is a hard link: what is written to it would change another file too. Copy it "
        "in its own place"
    )


def has_lost_lines(path: Path) -> FedSieveError:
    """What is told of a log that is shorter than a checkpoint knows it."""
    return FedSieveError(
        f"{path} has lost lines that the newest checkpoint counts on: put them back, go back to an "
        "earlier round (`--at-round N`, which keeps what is later), or begin again with the same "
        "recipe in another folder"
    )


def is_gone(path: Path) -> FedSieveError:
    """What is told of a log that is not there, and that checkpoints count on."""
    return FedSieveError(
        f"{path} is not there, and the checkpoints count on it: put it back, or begin again with "
        "the same recipe in another folder"
    )


def objects(path: Path, until: int | None = None) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Line numbers and JSON objects of a file of lines; None for a last line that was cut.

    until: how many bytes a checkpoint knows of: these alone are read, and no line of them is cut
    Raises FedSieveError, naming the line, for any other line that is no JSON object, or that is
    longer, deeper or of larger numbers than what anybody writes.
    """
    refuse_link(path)
    if not path.exists() and not until:
        return
    broken: FedSieveError | None = None
    with path.open("rb") as file:
        if until is not None and os.fstat(file.fileno()).st_size < until:
            raise has_lost_lines(path)
        number = 0
        while broken is None and (until is None or file.tell() < until):
            line = file.readline(LONGEST + 1)
            if not line:
                break
            number += 1
            where = f"{path}, line {number}"
            if len(line) > LONGEST:
                raise FedSieveError(f"{where} is longer than {LONGEST} bytes: the file is damaged")
            if not line.strip():
                continue
            try:
                yield number, parsed(line, where)
            except NotJson as error:
                broken = FedSieveError(f"{error}: the file is damaged")
        if broken is not None and (until is not None or any(line.strip() for line in file)):
            raise broken
        if until is not None and file.tell() != until:
            raise FedSieveError(f"{where} is not where the checkpoint has its end: it was changed")
        if broken is not None:
            yield number, None


def last_objects(path: Path, most: int) -> list[dict[str, Any]]:
    """The JSON objects of the whole lines among a file's last `most` bytes; none where it is not
    there. A last line that has no end yet is left out.

    Raises FedSieveError for a line that is no JSON object.
    """
    refuse_link(path)
    if not path.exists():
        return []
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(max(0, size - most))
        lines = file.read(most).split(b"\n")
    whole = lines[1 if size > most else 0 : -1]
    return [parsed(line, f"{path}, near its end") for line in whole if line.strip()]


_HALF = re.compile(r"\\u[dD][89a-fA-F]")
_LONG_NUMBER = re.compile(r"[0-9]{19}|[eE][+-]?[0-9]{3}")


class NotJson(FedSieveError):
    """A text that is not JSON: it may have been cut."""


class _TooLarge(ValueError):
    """A number beyond what a file may hold."""


def place(text: str | Path) -> Path:
    """A path as a person writes it, with `~`. Raises FedSieveError for what can be none."""
    try:
        path = Path(text).expanduser()
        if isinstance(text, str) and not text.strip():  # of a variable that is not set, mostly
            raise ValueError("it is empty; the folder here is '.'")
        if "\0" in str(path):
            raise ValueError("it holds a nul")
        str(path).encode()  # what no text can hold, no recipe can name
        path.exists()
        path.resolve()  # links may lead in circles
    except (OSError, RuntimeError, ValueError) as error:
        raise FedSieveError(f"{str(text)[:80]!r} can be no path: {reason(error)}") from None
    return path


def whole_way(text: str | Path) -> Path:
    """The same of what is written to, or is named in a file by all of its way: that of a relative
    one begins in the current folder.
    """
    path = place(text)
    place(path.absolute())
    return path


def copied(source: str, to: str) -> str:
    """Copy a file without its holes, which take no room there and would take it here.

    Raises OSError for what is no file: a pipe would be waited for.
    """
    opened = os.open(source, os.O_RDONLY | os.O_NONBLOCK)
    with os.fdopen(opened, "rb") as old, Path(to).open("wb") as new:
        if not stat.S_ISREG(os.fstat(opened).st_mode):
            raise NotAFile(errno.EINVAL, "it is no file", source)
        size, at = os.fstat(old.fileno()).st_size, 0
        while at < size:
            try:
                begin = os.lseek(old.fileno(), at, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                break  # holes to its end
            at = os.lseek(old.fileno(), begin, os.SEEK_HOLE)
            old.seek(begin)
            new.seek(begin)
            while begin < at and (part := old.read(min(at - begin, LONGEST))):
                begin += new.write(part)
        new.truncate(size)
    shutil.copystat(source, to)
    return to


def everything_in(folder: Path) -> Iterator[Path]:
    """All that lies in a folder and in those in it, however deep (Python's own ways recurse, and
    end at a depth of some hundred). A link is told, and not followed; what may not be read, or is
    gone meanwhile, is passed over.
    """
    waiting = [folder]
    while waiting:
        with suppress(PermissionError, FileNotFoundError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                yield Path(entry.path)
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(Path(entry.path))


def remove(path: Path) -> None:
    """A file or a folder with all in it; a link is removed, and not what it points to.

    Raises OSError where that cannot be done, as of folders in folders without end.
    """
    if not path.is_dir() or path.is_symlink():
        path.unlink()
        return
    try:
        shutil.rmtree(path)
    except RecursionError:
        said = "it holds folders in folders, too deep to be removed"
        raise OSError(errno.ELOOP, said, str(path)) from None


def take_place(part: Path, folder: Path) -> None:
    """Give a folder that is whole the place of an older one, if one is there, of which stays what
    the new one has nothing of the same name for: notes of a user's.

    Ended in between, no file of either is lost, and the next one does what was left to do.
    """
    bring_over(folder)
    if os.path.lexists(folder):
        folder.rename(before(folder))
    part.rename(folder)
    bring_over(folder)


def before(folder: Path) -> Path:
    """Where `take_place` leaves what is not brought over yet."""
    return folder.with_name(f".{folder.name}.old")


def bring_over(folder: Path) -> None:
    """Do what `take_place` had not done when its process ended, if that is so: bring the rest of
    the older folder to the one that took its place, or put it back where none has.
    """
    old = before(folder)
    if not os.path.lexists(old):
        return
    if old.is_dir() and not old.is_symlink():
        if not os.path.lexists(folder):
            old.rename(folder)
            return
        for path in sorted(old.iterdir()):
            if not os.path.lexists(folder / path.name):
                path.rename(folder / path.name)
    remove(old)


_OLD = ".old"  # in a folder of new things: what gives way to them


def move_into(part: Path, folder: Path) -> None:
    """Give a folder all that is in another one, which is in it and is gone then. What else is there
    stays; what has the name of something new gives way to it, a link too, and is not followed.

    Raises OSError where one cannot be moved, and all is as it was before.
    """
    names = sorted(path.name for path in part.iterdir())
    old, begun = part / _OLD, list[str]()
    old.mkdir()
    try:
        for name in names:
            begun.append(name)
            if os.path.lexists(folder / name):
                (folder / name).replace(old / name)
            (part / name).replace(folder / name)
    except BaseException:
        for name in reversed(begun):
            if not os.path.lexists(part / name):
                (folder / name).replace(part / name)
            if os.path.lexists(old / name):
                (old / name).replace(folder / name)
        raise
    remove(part)


def put_back(part: Path, folder: Path) -> None:
    """Remove what `move_into` was to move, and had not when its process ended; what had given way
    to nothing yet is put back. part: there or not; a link is removed, and not followed
    """
    if not os.path.lexists(part):
        return
    old = part / _OLD
    if not part.is_symlink() and old.is_dir() and not old.is_symlink():
        for path in sorted(old.iterdir()):
            if not os.path.lexists(folder / path.name):
                path.replace(folder / path.name)
    remove(part)


@contextmanager
def tensors_read() -> Iterator[None]:
    """Around reading a file of tensors: what safetensors and torch raise over its bytes becomes a
    ValueError with the first line of what they say. A shortage of memory is a MemoryError, of
    whatever kind it was: the file has no fault.
    """
    try:
        yield
    except Exception as error:
        if of_memory(error):
            raise MemoryError(with_type(error)) from error
        if isinstance(error, OSError | ValueError | KeyError):
            raise
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(said[:200]) from error


def parsed(text: bytes | str, where: str) -> dict[str, Any]:
    """The JSON object that a text holds.

    Raises NotJson, and FedSieveError for any other value, for a whole number beyond `LARGEST`, or
    for one that no float holds; all begin with `where`. NaN and Infinity are words of their own.
    """
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
    except UnicodeDecodeError:
        raise NotJson(f"{where} is not UTF-8") from None
    # Numbers one by one take ten times as long, and only where some are long can one be too large.
    long = _LONG_NUMBER.search(text)
    read = partial(json.loads, parse_int=_whole, parse_float=_real) if long else json.loads
    try:
        value = read(text)
    except _TooLarge:
        raise FedSieveError(f"{where} holds a number beyond all that are written") from None
    except (ValueError, RecursionError):
        raise NotJson(f"{where} is not JSON") from None
    if _HALF.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise FedSieveError(f"{where} holds half of a character") from None
    if not isinstance(value, dict):
        raise FedSieveError(f"{where} is not a JSON object")
    return value


def _whole(digits: str) -> int:
    if len(digits) > len(str(LARGEST)) + 1 or abs(int(digits)) > LARGEST:
        raise _TooLarge
    return int(digits)


def _real(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise _TooLarge
    return value
