"""Texts and tables as HTML: everything of a run is escaped on its way in."""

import html
import re
from collections.abc import Sequence

_STEERING = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def text(value: object) -> str:
    """Escaped, and without what would steer a terminal that shows the page's source."""
    return html.escape(_STEERING.sub("\N{REPLACEMENT CHARACTER}", str(value)))


def cut(words: object, longest: int) -> str:
    """A text of somebody's, escaped, of so many characters at most."""
    said = str(words)
    return text(said if len(said) <= longest else f"{said[:longest]} …")


def folded(parts: Sequence[tuple[str, str]]) -> str:
    """One part for each of several runs: the run's name, a text, and HTML."""
    each = "".join(
        f"<details><summary>{text(name)}</summary>{inner}</details>" for name, inner in parts
    )
    if not each:
        return ""
    return f"<details><summary>Each of {len(parts)} runs</summary>{each}</details>"


def table(
    heads: Sequence[str], body: str, label: str, kind: str = "", *, sortable: bool = False
) -> str:
    """`heads` are texts, `body` is HTML. A table too wide for the screen scrolls by itself.

    sortable: by its columns, where the page's script runs (sheet.py)
    """
    head = "".join(
        f'<th scope="col">{text(h)}</th>' if h else '<td class="corner"></td>' for h in heads
    )
    kinds = " ".join(filter(None, [kind, "sortable" if sortable else ""]))
    named = f' class="{kinds}"' if kinds else ""
    return (
        f'<div class="scroll" role="group" tabindex="0" aria-label="{text(label)}">'
        f"<table{named}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
