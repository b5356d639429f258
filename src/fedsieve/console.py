"""What the terminal shows, for whichever process shows it: ours to say, others kept quiet."""

import io
import logging
import re
import sys
from typing import TextIO

from rich.console import Console
from rich.markup import escape

from fedsieve.errors import printable

console = Console(highlight=False, soft_wrap=True, emoji=False)
problems = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)


def plain(text: str) -> str:
    """A text to be printed as it is, whatever brackets it holds.

    Names and values of files are quoted, and the files may be somebody else's: nothing in it steers
    the terminal, and lines after the first are set in, so that none passes for one of ours.
    """
    return escape(re.sub(r"\n(?=\S)", "\n  ", printable(text, "\n")))


def say(text: str) -> None:
    """Print text as it is."""
    console.print(plain(text))


def warn(text: str) -> None:
    """Print a warning, apart from the results."""
    problems.print(f"[yellow]warning:[/] {plain(text)}")


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """In the place of `warnings.showwarning`: our own warnings in one line, others' not at all."""
    if issubclass(category, UserWarning):
        warn(str(message))


def take_any_letter() -> None:
    """What a terminal or a log has no letter for is written as an escape: what is quoted may be in
    any script, and a word of it must not end a command.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def quiet() -> None:
    """Loading bars and reports of other libraries have no place among ours. Imports them."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says what it can do without
