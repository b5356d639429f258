"""The errors that a user can mend: each message says what was wrong, where, and what to do."""

import difflib
from collections.abc import Iterable


class FedSieveError(ValueError):
    """Bad input. The message is ready to print; the command line exits with code 2."""


class WireError(FedSieveError):
    """Bytes that are not a payload of the expected layout."""


class NoUsableUpdate(FedSieveError):
    """A round in which no client returned an update that can be merged."""


def nearest(word: str, known: Iterable[str]) -> str:
    """The tail of a message about an unknown name: " (did you mean 'rank'?)".

    Where nothing known is near, the known names are listed, unless they are many.
    """
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    if close:
        return " (did you mean " + " or ".join(repr(name) for name in close) + "?)"
    return f" (known are {', '.join(names)})" if 0 < len(names) <= 20 else ""
