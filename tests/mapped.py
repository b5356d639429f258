"""Files that a process may have mapped into memory, and what somebody does to them meanwhile."""

from pathlib import Path


def written_over(file: Path) -> None:
    """In place, with other numbers, as `cp` does."""
    with file.open("r+b") as opened:
        opened.write(b"?" * file.stat().st_size)


def cut_off(file: Path) -> None:
    """In place: a process that reads of it what it has mapped ends."""
    with file.open("r+b") as opened:
        opened.truncate(1)


def is_mapped(place: Path) -> bool:
    """Whether this process has a file mapped, or one of a folder."""
    return str(place) in Path("/proc/self/maps").read_text(encoding="utf-8")
