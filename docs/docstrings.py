"""For the docs site: docstrings of this house as Markdown.

What a docstring says of a name stands on a line of its own, `name: words` or `one, other: words`,
and goes on in lines that are indented. Here that becomes a list. mkdocs.yml names this file.
"""

import re
from typing import Any

import griffe

_ENTRY = re.compile(r"(\w+(?:, \w+)*):\s+(\S.*)")


class Docstrings(griffe.Extension):
    """Every docstring is rewritten as it is collected; code that is indented stays code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(docstring: str) -> str:
    """The docstring with its entries as a list, with blank lines around it."""
    made: list[str] = []
    inside = False
    for line in docstring.splitlines():
        entry = _ENTRY.fullmatch(line)
        if entry:
            names = ", ".join(f"`{name}`" for name in entry[1].split(", "))
            made += [*([] if inside else [""]), f"- {names}: {entry[2]}"]
            inside = True
        elif inside and line.startswith(" "):
            made.append(f"    {line.strip()}")
        else:
            made += [""] if inside and line else []
            made.append(line)
            inside = False
    return "\n".join(made)
