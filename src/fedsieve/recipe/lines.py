"""Where a TOML file says what: the line of each key, for errors about its value.

Python's reader keeps no places. What it has read without an error is gone through once more, token
by token: only where keys stand is found out here, and nothing about values.
"""

import re
import tomllib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from fedsieve.errors import LONGEST_TOLD, Failed, explain_all, printable

MOST = 1 << 20  # letters of a file that is looked at
_KEY = re.compile(r"[A-Za-z_][\w-]*(?:\.[\w-]+)*")  # with which the words of an error begin
_AT = re.compile(r"\(at line (\d+), column \d+\)")
_TOKEN = re.compile(
    r'(?P<text>"""[^"\\]*+(?:(?:\\[\s\S]|"(?!""))[^"\\]*+)*"{3,5}'
    r"|'''[^']*+(?:'(?!'')[^']*+)*'{3,5}"
    r'|"[^"\\\n]*+(?:\\.[^"\\\n]*+)*"|\'[^\'\n]*+\')'
    r"|(?P<note>#[^\n]*+)|(?P<end>\n)|(?P<blank>[ \t\r]++)|(?P<mark>[\[\]{}=,.])"
    r"|(?P<word>[^\s\[\]{}=,.\"'#]++)"
)
Path = tuple[str, ...]


class _Token(NamedTuple):
    kind: str
    said: str
    line: int


def lines_of(text: str) -> dict[Path, int]:
    """The line, from 1, of each key, and of each table's head, of a file that is TOML.

    What stands in a list has its number among the keys: ("budgets", "0", "up").
    """
    tokens = deque(_tokens(text))
    found: dict[Path, int] = {}
    tables: dict[Path, int] = {}  # the number of the last of [[tables]]

    def skip(*kinds: str) -> None:
        while tokens and (tokens[0].kind in kinds or tokens[0].said in kinds):
            tokens.popleft()

    def keys() -> Path:
        path = []
        while tokens and tokens[0].said not in ("=", "]"):
            token = tokens.popleft()
            if token.kind != "mark":
                path.append(token.said[1:-1] if token.kind == "text" else token.said)
        return tuple(path)

    def pair(table: Path) -> None:
        line, own = tokens[0].line, keys()
        for depth in range(1, len(own) + 1):
            found.setdefault((*table, *own[:depth]), line)
        skip("=")
        value((*table, *own))

    def value(path: Path) -> None:
        found.setdefault(path, tokens[0].line)
        mark = tokens.popleft().said
        if mark not in ("[", "{"):
            while tokens and tokens[0].kind != "end" and tokens[0].said not in (",", "]", "}"):
                tokens.popleft()
            return
        number = 0
        skip("end", ",")
        while tokens and tokens[0].said not in ("]", "}"):
            if mark == "[":
                value((*path, str(number)))
            else:
                pair(path)
            number += 1
            skip("end", ",")
        tokens.popleft()

    table: Path = ()
    skip("end")
    while tokens:
        if tokens[0].said == "[":
            line = tokens[0].line
            many = len(tokens) > 1 and tokens[1].said == "["
            skip("[")
            table = ()
            for key in (head := keys())[:-1]:
                table = (*table, key)
                if table in tables:
                    table = (*table, str(tables[table]))
            table = (*table, *head[-1:])
            if many:
                tables[table] = tables.get(table, -1) + 1
                found.setdefault(table, line)
                table = (*table, str(tables[table]))
            found.setdefault(table, line)
            skip("]")
        else:
            pair(table)
        skip("end")
    return found


def line_at(lines: Mapping[Path, int], path: Sequence[str]) -> int | None:
    """The line of a key, or else of the nearest table that it would be in."""
    depths = range(len(path), 0, -1)
    return next((lines[key] for depth in depths if (key := tuple(path[:depth])) in lines), None)


def as_written(path: Sequence[str], written: Any, checked: Any) -> Sequence[str] | None:
    """So much of a path as a file has, up to a key that lacks; None where the value in the file is
    not the one that was checked, since an override has changed it.
    """
    for depth, step in enumerate(path):
        one, other = _entry(written, step), _entry(checked, step)
        if one is None or other is None:
            return path[:depth] if one is other else None
        written, checked = one[0], other[0]
    # NaN is no equal of itself.
    return path if written == checked or repr(written) == repr(checked) else None


def placed(said: str, text: str, table: Mapping[str, Any]) -> str:
    """An error's words after the line of a file that they are about, where they begin with one of
    its keys; or after "an override" where such a one has changed it.

    text: the file's; table: what was checked
    Raises ValueError or RecursionError for a text that is no TOML.
    """
    key = _KEY.match(said)
    if key is None or len(text) > MOST:
        return said
    there = as_written(key[0].split("."), tomllib.loads(text), table)
    if there is None:
        return f"an override: {said}"
    line = line_at(lines_of(text), there)
    return said if line is None else f"line {line}: {said}"


def explained(
    error: Failed,
    source: str,
    text: str,
    table: Mapping[str, Any],
    keys: Callable[[Sequence[str | int]], Iterable[str]],
) -> str:
    """`explain_all` of a file, each thing after its line; see `placed`."""
    head, *said = explain_all(error, source, keys).split("\n")
    return "\n".join([head, *(f"  {placed(each.strip(), text, table)}" for each in said)])


def quoted(error: str, text: str) -> str:
    """What Python's reader says of a file that is no TOML, with the line that it is about."""
    at = _AT.search(error)
    lines = text.split("\n")
    if at is None or int(at[1]) > len(lines) or not (line := lines[int(at[1]) - 1].strip()):
        return error
    return f"{error}: {printable(line)[:LONGEST_TOLD]}"


def _entry(value: Any, step: str) -> tuple[Any] | None:
    """What a table or a list has there, alone in a tuple."""
    if isinstance(value, Mapping):
        return (value[step],) if step in value else None
    if isinstance(value, list) and step in map(str, range(len(value))):
        return (value[int(step)],)
    return None


def _tokens(text: str) -> Iterator[_Token]:
    line = 1
    for each in _TOKEN.finditer(text):
        if each.lastgroup not in ("note", "blank"):
            yield _Token(each.lastgroup or "", each[0], line)
        line += each[0].count("\n")
