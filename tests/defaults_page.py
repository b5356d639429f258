"""The table of defaults in docs/methods.md, made from the methods themselves:

python -m tests.defaults_page
"""

import inspect
import re
from collections import Counter
from typing import Any

from fedsieve import methods
from tests import pages
from tests.pages import ROOT

PAGE = ROOT / "docs" / "methods.md"
BEGIN, END = "<!-- made by python -m tests.defaults_page -->\n", "<!-- until here -->\n"


def table() -> str:
    """One row a method: its own server optimizer, and its options where most have them not so."""
    of = {name: _options(name) for name in methods.names()}
    counted = Counter(item for options in of.values() for item in options.items())
    common = {item for item, count in counted.items() if count > len(of) / 2}
    said = ", ".join(f"`{key} = {value}`" for key, value in sorted(common))
    lines = [
        f"{said}, where the table says nothing else.\n",
        "| | server | other options |",
        "|---|---|---|",
    ]
    for name, options in of.items():
        own = ", ".join(f"`{k} = {v}`" for k, v in options.items() if (k, v) not in common)
        lines.append(f"| `{name}()` | {_server(name)} | {own} |")
    return "\n".join([*lines, ""])


def _options(name: str) -> dict[str, str]:
    parameters = inspect.signature(methods.load(name)).parameters.values()
    return {each.name: _toml(each.default) for each in parameters if each.name != "server"}


def _server(name: str) -> str:
    said = dict(methods.load(name)().server.table)
    optimizer = said.pop("optimizer")
    return f"`{optimizer}`: " + ", ".join(f"{key} {value:g}" for key, value in said.items())


def _toml(value: Any) -> str:
    if value is None:
        return "none"
    return f'"{value}"' if isinstance(value, str) else str(value).lower()


def page(text: str) -> str:
    """The page with a table that is made anew."""
    made = f"{BEGIN}\n{table()}\n{END}"
    return re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: made, text, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(page(pages.read(PAGE)), encoding="utf-8")
