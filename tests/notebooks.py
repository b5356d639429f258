"""The notebooks of examples/, made from its scripts:

python -m tests.notebooks

A script is cells: `# %%` begins one of code, `# %% [markdown]` one of words, as editors have it,
and its docstring is the first.
"""

import ast
import json
import re
from pathlib import Path
from typing import Any

from tests.pages import ROOT

SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
_CELL = re.compile(r"^# %%(.*)\n", re.MULTILINE)


def place(script: Path) -> Path:
    return script.parent / "notebooks" / f"{script.stem}.ipynb"


def notebook(script: Path) -> str:
    """A script as a notebook in Jupyter's format 4.5, without outputs."""
    text = script.read_text(encoding="utf-8")
    _, *rest = _CELL.split(text)
    title, _, words = (ast.get_docstring(ast.parse(text)) or "").partition("\n")
    cells = [_cell(0, f"# {title}\n{words}", code=False)]
    for number, (kind, source) in enumerate(zip(rest[::2], rest[1::2], strict=True), 1):
        code = "[markdown]" not in kind
        if not code:
            source = re.sub(r"^# ?", "", source, flags=re.MULTILINE)
        cells.append(_cell(number, source.strip(), code=code))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    made = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(made, indent=1, ensure_ascii=False) + "\n"


def _cell(number: int, source: str, *, code: bool) -> dict[str, Any]:
    cell = {"id": f"cell-{number}", "metadata": {}, "source": source.splitlines(keepends=True)}
    if not code:
        return {"cell_type": "markdown", **cell}
    return {"cell_type": "code", **cell, "execution_count": None, "outputs": []}


if __name__ == "__main__":
    for script in SCRIPTS:
        place(script).write_text(notebook(script), encoding="utf-8")
