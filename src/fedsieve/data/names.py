"""Values as names: of classes, of clients, of whatever a column tells rows apart by.

A name is a text, and never guessed to be anything else. In CSV, TSV and TAB files it is the cell as
it stands there: 01, 1e5, 250.00, true, NA and 2024-05-01 are names like any other. A value that has
a type has one spelling: an integer its digits, a Boolean True or False, a date is 2024-05-01,
a decimal its digits. A float is a name only if it is whole, and then it is that integer, up to 2^53
(pandas makes 1.0 of 1 beside a missing value); which digits a fraction was written with, it does
not tell. So 1 in one file and "1" in another are the same name, and 01 is not.

White space around a name does not count, and é is é however it is composed (Unicode's form C). An
empty text, null and NaN are no name.
"""

import datetime
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from fedsieve.errors import FedSieveError

NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]{1,4})?")
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,999}")  # Python reads no number of many thousands
_EXACT = 2**53
MOST = 1000  # letters of a name: it stands in every line of a run's logs
_TRUTHS = ("True", "False")


@dataclass(frozen=True)
class Unread:
    """What stands for a value of a file that Python cannot have: a date in the year 30,000,000.

    why: the end of a sentence that begins with "holds"
    """

    why: str


def name_of(value: Any) -> str | None:
    """The name that a value is, or None where there is none.

    Raises FedSieveError, with the end of a sentence that begins with the value's place, for a value
    that cannot be a name.
    """
    value = _python(value)
    if absent(value):
        return None
    if isinstance(value, Unread):
        raise FedSieveError(f"holds {value.why}")
    if isinstance(value, str):
        text = unicodedata.normalize("NFC", value).strip()
        if len(text.splitlines()) > 1:
            raise FedSieveError(
                f"holds {text[:40]!r}, and a name has no line break (is a quotation mark left "
                "open before it?)"
            )
        if len(text) > MOST:
            raise FedSieveError(
                f"holds a text of {len(text):,} letters, {text[:40]!r} first, and a name has at "
                f"most {MOST:,} (is this a column of texts?)"
            )
        if half_of_a_character(text):
            raise FedSieveError(f"holds {text[:40]!a}, which has half a character")
        return text or None
    if isinstance(value, float):
        if not value.is_integer():
            raise FedSieveError(
                f"holds {value:g}, and float values are names only where they are whole: write it "
                "as a text"
            )
        if abs(value) > _EXACT:
            raise FedSieveError(
                f"holds {value:g}, and float values beyond 2^53 stand for several whole numbers: "
                "write it as a text"
            )
        return str(int(value))
    if isinstance(value, int | Decimal) and abs(value) >= 10**MOST:
        raise FedSieveError(f"holds a number of more than {MOST:,} digits, and no name is so long")
    if isinstance(value, int | Decimal | datetime.date | datetime.time):
        return str(value)
    raise FedSieveError(f"holds {kind_of(value)}, and a name is one text or whole number")


def half_of_a_character(text: str) -> bool:
    """Whether there is one in it, which no file and no table can hold."""
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def absent(value: Any) -> bool:
    """Whether it is what stands where nothing is: None, NaN, or pandas' NA and NaT."""
    value = _python(value)
    if isinstance(value, float | datetime.date | Decimal):
        return bool(value != value)  # NaN and NaT differ from themselves
    return value is None or type(value).__name__ == "NAType"


def name_among(value: Any, told: Sequence[str] | None) -> str | None:
    """`name_of` a value that is the number of one of the names that are told, where some are.

    The hub's test sets hold -1 for "not given": no class, but not nothing either.
    """
    if told is None or value is None:
        return name_of(value)
    if not 0 <= value < len(told):
        raise FedSieveError(
            f"holds {value}, and its {len(told)} classes have the numbers 0 to {len(told) - 1}"
        )
    return name_of(told[value])


def each_among(
    values: Sequence[Any], told: Sequence[str] | None, place: Callable[[int], str], empty: str
) -> list[str]:
    """`name_among` of each. Raises FedSieveError for the first that is no name, which begins with
    its place (number -> words), or is `empty`, where there is nothing.
    """
    names = []
    for number, value in enumerate(values):
        try:
            name = name_among(value, told)
        except FedSieveError as error:
            raise FedSieveError(f"{place(number)} {error}") from None
        if name is None:
            raise FedSieveError(empty)
        names.append(name)
    return names


def kind_of(value: Any) -> str:
    """What a value is, in the words of an error."""
    value = _python(value)
    if isinstance(value, Unread):
        return value.why
    for kind, name in (
        (bool, "true or false"),
        (int | float, "a number"),
        (str, "a text"),
        (list | tuple, "a list"),
        (dict, "an object"),
        (bytes, "bytes"),
    ):
        if isinstance(value, kind):
            return name
    return f"a value of type {type(value).__name__}"


def _python(value: Any) -> Any:
    """A scalar of NumPy's or torch's as Python's own."""
    theirs = type(value).__module__.partition(".")[0] in ("numpy", "torch")
    return value.item() if theirs and getattr(value, "ndim", None) == 0 else value


def clean(text: str) -> str:
    """A name that a user wrote, as those that are read from data are."""
    return name_of(text) or ""


def in_order(names: Iterable[str]) -> list[str]:
    """Names without repetition, sorted: as numbers if all are integers (2 before 10), else as text.

    Names with leading zeros are no integers here; as text they have the same order.
    """
    found = set(names)
    if all(_INTEGER.fullmatch(name) for name in found):
        return sorted(found, key=int)
    return sorted(found)


def alike(names: Iterable[str]) -> list[tuple[str, ...]]:
    """The groups of two and more names that differ in spelling alone: in capitals, in spaces, in
    forms of the same letters, or in how one number is written (0 and 0.0, 1 and 01).
    """
    groups: dict[str | Decimal, list[str]] = {}
    for name in dict.fromkeys(names):
        text = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
        groups.setdefault(Decimal(text) if NUMBER.fullmatch(text) else text, []).append(name)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def numbers_of(names: Sequence[str]) -> Mapping[str, int]:
    """Each name's place. Where true or false is a name in one spelling, the others mean it too:
    files with Booleans and files with words for them then agree.
    """
    numbers = {name: number for number, name in enumerate(names)}
    for truth in _TRUTHS:
        spelled = [name for name in names if name.casefold() == truth.casefold()]
        if len(spelled) == 1:
            for other in (truth, truth.lower(), truth.upper()):
                numbers.setdefault(other, numbers[spelled[0]])
    return numbers


def numbered(clients: int) -> list[str]:
    """The ids of clients that have no names: "0000", "0001", ..., which sort as their numbers."""
    width = max(4, len(str(clients - 1)))
    return [f"{number:0{width}d}" for number in range(clients)]
