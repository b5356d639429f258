"""The errors that a user can mend: each message says what was wrong, where, and what to do."""

import difflib
from collections.abc import Iterable


class FedSieveError(ValueError):
    """Bad input. The message is ready to print; the command line exits with code 2."""


class WireError(FedSieveError):
    """Bytes that are not a payload of the expected layout."""


class NoUsableUpdate(FedSieveError):
    """A round in which no client returned an update that can be merged."""


def nearest(word: str, known: Iterable[str], most: int = 3) -> str:
    """The tail of an error message that names what was perhaps meant: "; did you mean 'rank'?"."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=most, cutoff=0.5)
    if close:
        return "; did you mean " + " or ".join(repr(name) for name in close) + "?"
    return f"; known are {', '.join(names)}" if names else ""
