"""The errors that a user can mend: each message says what was wrong, where, and what to do."""

import difflib
import errno
import inspect
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

T = TypeVar("T")
MOST_TOLD = 20  # things that are wrong with one file
LONGEST_TOLD = 200  # characters of a place or a value
_TRACED = 20_000  # of a traceback
# What a user's own code may raise: where it ends the program, that is a mistake in it as well, for
# what it was called for is not done. Ctrl-C is nobody's.
THEIRS = (Exception, SystemExit, GeneratorExit)


class FedSieveError(ValueError):
    """Bad input. The message is ready to print; the command line exits with code 2."""


class TooWide(FedSieveError):
    """A table of more columns than anybody looks at, of which none are named."""


class WireError(FedSieveError):
    """Bytes that are not a payload of the expected layout."""


class MethodFailed(FedSieveError):
    """A function of a method from outside the package raised, or gave what no round can use."""


class ChangedInPlace(MethodFailed):
    """A function of a method changed in place what it was given: nobody's update is at fault, and
    what it changed is not to be kept.
    """


class OptimizerFailed(FedSieveError):
    """The server optimizer gave what no round can use, which is no client's doing."""


class NoUsableUpdate(FedSieveError):
    """A round in which no client returned an update that can be merged."""


class Failed(Protocol):
    """A pydantic.ValidationError, by what is asked of it here."""

    def errors(self) -> Sequence[Mapping[str, Any]]: ...


def nearest(word: str, known: Iterable[str]) -> str:
    """The tail of a message about an unknown name: " (did you mean 'rank'?)".

    Where nothing known is near, the known names are listed, unless they are many.
    """
    names = sorted(str(name)[:LONGEST_TOLD] for name in known)
    close = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    if close:
        return " (did you mean " + " or ".join(repr(name) for name in close) + "?)"
    return f" (known are {', '.join(names)})" if 0 < len(names) <= 20 else ""


def count(n: int, thing: str) -> str:
    """ "1 round", "1,000 rounds"."""
    return f"{n:,} {thing}{'' if n == 1 else 's'}"


def few(names: Sequence[str], most: int = 20) -> str:
    """ "a, b and 3 more"."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def printable(text: str, also: str = "") -> str:
    """A text that steers no terminal: what is neither printable nor among `also` becomes "?"."""
    return "".join(c if c.isprintable() or c in also else "?" for c in text)


def quoted(value: Any) -> str:
    """A value as Python writes it, on one line, not at any length; else what type it is of."""
    try:
        return " ".join(repr(value)[:LONGEST_TOLD].splitlines())
    except THEIRS:  # a number of many thousand digits, and whatever an object of the user's does
        return f"one {type(value).__name__} that cannot be written out"


def listed(name: str, given: Iterable[T]) -> list[T]:
    """What an argument holds. Raises FedSieveError, naming it, where it cannot be gone through, as
    an array of no dimensions cannot, which is an Iterable by its type.
    """
    try:
        return list(given)
    except Exception as error:
        raise_of_memory(error)
        said = f"a {type(given).__name__} that cannot be gone through"
        raise FedSieveError(f"{name}: a list is needed, not {said} ({quoted(error)})") from error


def of_memory(error: BaseException) -> bool:
    """Whether memory does not suffice: Python's own way to say it, or torch's two, which is not
    imported here. It is nobody's mistake whose data was at hand.
    """
    return (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or type(error).__name__ == "OutOfMemoryError"
        or (type(error) is RuntimeError and "DefaultCPUAllocator" in str(error))
    )


def raise_of_memory(error: BaseException) -> None:
    """Raise the error once more if memory does not suffice. Whoever tells what a library raises as
    the fault of a file, a row or a setting asks this first: it is the fault of none.
    """
    if of_memory(error):
        raise error


def short_of_memory(error: BaseException) -> str:
    """The same for the user to read: whose work it was, where that was noted, and what helps."""
    notes = getattr(error, "__notes__", ())
    # An exception of the user's may have anything there.
    whose = "".join(f"{note}: " for note in notes) if isinstance(notes, list) else ""
    said = f"{whose}memory does not suffice ({with_type(error)})"
    if whose:
        said += ": a smaller training.batch, training.micro_batch or data.max_length takes less"
    return said


def words(error: BaseException, most: int = 300) -> str:
    """What a library says, in one line and not at any length: it may quote what it was given."""
    try:
        return " ".join(str(error).split())[:most]
    except KeyboardInterrupt:
        raise
    except BaseException:  # whatever an exception of the user's own does
        return ""


def reason(error: BaseException) -> str:
    """Why a file could not be read or written, for a sentence that names it: what the system says,
    without its number and the name.
    """
    return getattr(error, "strerror", None) or words(error)


def with_type(error: BaseException, most: int = 300) -> str:
    """The same behind the error's type, which often says more: "KeyError: 'label'"."""
    if isinstance(error, MethodFailed):  # it says whose it is
        return words(error, most)
    return f"{type(error).__name__}: {words(error, most)}".removesuffix(": ")


def line_of(error: BaseException) -> str:
    """Where a function of the user's raised it, for the end of a sentence: the last line of the
    traceback. To be asked by whoever called that function: a builtin has no line.
    """
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if len(frames) > 1 else ""


def traced(error: BaseException) -> str:
    """The traceback of a fault of ours, or of a program of the user's: all of it is needed to mend
    that, but for the middle of words without end.
    """
    text = "".join(traceback.format_exception(error))
    if len(text) <= _TRACED:
        return text
    half = _TRACED // 2
    return f"{text[:half]}\n... {len(text) - 2 * half:,} more letters ...\n{text[-half:]}"


def beside(error: BaseException) -> str:
    """Where Python looks for a module that it has not found, in brackets. The folder in which a
    command is given is not among it: a stranger's files may lie there.
    """
    if not isinstance(error, ModuleNotFoundError):
        return ""
    return (
        " (the folder that its file or package is in goes into PYTHONPATH: `export PYTHONPATH=.`)"
    )


def cannot_take(function: object, *values: object) -> str:
    """Why a function cannot be called with so many values, in Python's words; empty where it can,
    and of a builtin that does not say what it takes.
    """
    try:
        inspect.signature(function).bind(*values)  # type: ignore[arg-type]
    except TypeError as error:
        return str(error)
    except ValueError:
        pass
    return ""


def explain_all(
    error: Failed,
    source: str,
    keys: Callable[[Sequence[str | int]], Iterable[str]],
    path: Callable[[Sequence[str | int]], Sequence[str]] = lambda loc: [*map(str, loc)],
) -> str:
    """What pydantic found wrong with a file's table, in words for whoever wrote the file.

    The first `MOST_TOLD` things: a hostile file has hundreds of thousands.

    source: what the file is called
    keys: the known keys of the table at a place
    path: pydantic's place -> the place as the file has it
    """
    every = error.errors()
    # A list is told as too short also where its entries are there, each of them wrong.
    above = {each["loc"][:depth] for each in every for depth in range(len(each["loc"]))}
    found = [each for each in every if each["type"] != "too_short" or each["loc"] not in above]
    lines = [f"  {explain(detail, path(detail['loc']), keys)}" for detail in found[:MOST_TOLD]]
    if len(found) > MOST_TOLD:
        lines.append(f"  and {len(found) - MOST_TOLD:,} more")
    return "\n".join([f"{source}:", *lines])


def explain(
    detail: Mapping[str, Any],
    path: Sequence[str],
    keys: Callable[[Sequence[str | int]], Iterable[str]],
) -> str:
    """One thing that pydantic found wrong, on one line; see `explain_all`.

    path: where it is, as the file has it
    keys: the known keys of the table at a place, as pydantic names the place
    """
    place, loc = printable(".".join(path))[:LONGEST_TOLD], detail["loc"]
    if detail["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{place}: unknown key{nearest(str(loc[-1]), keys(loc[:-1]))}"
    if detail["type"] in ("missing", "missing_argument"):
        return f"{place}: this key is needed"
    if detail["type"] in ("model_type", "dict_type"):
        said = "a table is needed here, with keys of its own"
        return f"{place}: {said} (it is {quoted(detail['input'])})"
    message: str = detail["msg"].removeprefix("Value error, ")
    message = message.replace("Input should be a valid tuple", "a list is needed here")
    if isinstance(detail["input"], str | int | float):
        message += f" (it is {quoted(detail['input'])})"
    return f"{place}: {message}" if place else message
