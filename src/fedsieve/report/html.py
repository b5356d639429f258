"""Texts and tables as HTML: everything of a run is escaped on its way in."""

import html
from collections.abc import Sequence


def text(value: object) -> str:
    return html.escape(str(value))


def table(heads: Sequence[str], body: str, label: str, kind: str = "") -> str:
    """`heads` are texts, `body` is HTML. A table too wide for the screen scrolls by itself."""
    head = "".join(f'<th scope="col">{text(h)}</th>' for h in heads)
    named = f' class="{kind}"' if kind else ""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{text(label)}">'
        f"<table{named}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
