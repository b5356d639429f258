"""The tables of docs/models.md, made from what the sweep over families tries:

python -m tests.models_page
"""

import re
from collections import defaultdict

from tests import pages
from tests.pages import ROOT
from tests.train.families import EVERY_RUN, FAMILIES, REFUSED, TASKS

PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- made by python -m tests.models_page -->\n", "<!-- until here -->\n"


def table() -> str:
    """The families of each task, and what is refused by what is said."""
    lines = ["| task | tried in every run | tried by `make test-all` |", "|---|---|---|"]
    for letter, task in TASKS.items():
        of = sorted(family.name for family in FAMILIES if letter in family.tasks)
        often = [name for name in of if letter in EVERY_RUN.get(name, "")]
        seldom = [name for name in of if name not in often]
        lines.append(f"| `{task}` | {', '.join(often)} | {', '.join(seldom)} |")
    said: dict[str, list[str]] = defaultdict(list)
    for name, task, targets, message in REFUSED:
        shown = str(targets).replace("|", "\\|")
        at = f", `{shown}`" if targets not in (None, "all-linear") else ""
        given = ", no targets" if targets is None and task != "image-classification" else at
        said[re.sub(r"\\|\.\*", "", message)].append(f"{name} ({task}{given})")
    lines += ["", "| it says | of |", "|---|---|"]
    lines += [f"| ... {message} ... | {', '.join(each)} |" for message, each in said.items()]
    return "\n".join([*lines, ""])


def page(text: str) -> str:
    """The page with tables that are made anew."""
    made = f"{BEGIN}\n{table()}\n{END}"
    return re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: made, text, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(page(pages.read(PAGE)), encoding="utf-8")
