"""The part of docs/papers.md that tells of every figure, made from the figures' files and from what
was measured (docs/papers/*.json, each a figure.json that `fedsieve reproduce` left); and what
`fedsieve reproduce` says of them in its list:

python -m tests.papers_page
"""

import json
import re
from typing import Any

import tomli_w

from fedsieve.errors import count
from fedsieve.study import figures
from fedsieve.study.claims import Finding
from fedsieve.study.compare import markdown
from fedsieve.study.figures import Figure, Scale
from fedsieve.study.reproduce import said, sizes
from tests import pages
from tests.pages import ROOT

PAGE = ROOT / "docs" / "papers.md"
RESULTS = ROOT / "docs" / "papers"
VERDICTS = ROOT / "src" / "fedsieve" / "recipes" / "papers" / figures.PUBLISHED
BEGIN, END = "<!-- made by python -m tests.papers_page -->\n", "<!-- until here -->\n"


def result_of(name: str) -> dict[str, Any] | None:
    """What was measured of a figure, if it was."""
    path = RESULTS / f"{figures.slug(name)}.json"
    told: dict[str, Any] | None = json.loads(path.read_text()) if path.is_file() else None
    return told


def table() -> str:
    """A line for every figure and table, and below them a section for each."""
    lines = ["| name | what it shows | in small | at the paper's sizes |", "|---|---|---|---|"]
    sections = []
    for name in figures.shipped():
        figure, found = figures.load(name), result_of(name)
        small = "none" if not figure.small else "ready, not run"
        if found is not None:
            small = f"**{found['verdict']}** ({over(found)})"
        anchor = re.sub(r"[^\w-]", "", name)
        lines.append(f"| [`{name}`](#{anchor}) | {figure.title} | {small} | ready, not run |")
        sections.append(section(name, figure, found))
    return "\n".join([*lines, "", *sections])


def over(found: dict[str, Any]) -> str:
    """How many seeds a figure was measured with, in words."""
    return count(max(check["seeds"][1] for check in found["checks"]), "seed")


def section(name: str, figure: Figure, found: dict[str, Any] | None) -> str:
    lines = [f"### {name}\n", f"{figure.title}. **The paper:** {figure.claim}\n"]
    lines += [f"*{remark}*\n" for remark in figure.remarks]
    if any(figure.numbers.values()):
        for panel, numbers in figure.numbers.items():
            lines += [f"Printed there, {panel}:\n", markdown(printed(figure, numbers))]
    lines.append(f"- Claims: {'; '.join(check.says for check in figure.check)}.")
    for scale in figures.SCALES:
        if scale == "paper" or figure.small:
            lines.append(f"- {scale.capitalize()}: {what(name, figure, scale)}.")
    if found is None:
        return "\n".join([*lines, "- Measured: nothing yet.", ""])
    return "\n".join([*lines, "", *measured(name, found), ""])


def printed(figure: Figure, numbers: dict[str, dict[str, float]]) -> list[dict[str, str]]:
    told = {name for of in numbers.values() for name in of}
    places = [place.name for place in figure.place if place.name in told]
    return [
        {"": entry, **{place: f"{of[place]:g}" if place in of else "-" for place in places}}
        for entry, of in numbers.items()
    ]


def what(name: str, figure: Figure, scale: Scale) -> str:
    """What runs, and what that needs, wherever it is run."""
    said = []
    for panel, need in figures.needs_of(figure, scale, name).items():
        needed = [f"`{each}`" for each in (*need.fetched, *need.hub)]
        needed += [f"{each} in `--data`" for each in figures.by_folder(need.files)]
        needed += [need.words] if need.words else []
        said.append(f"{panel} ({', '.join(needed)})")
    return "; ".join(said)


def measured(name: str, found: dict[str, Any]) -> list[str]:
    lines = []
    for panel, rows in found["rows"].items():
        lines += [
            f"Measured ({found['scale']}), {panel}: {sizes(found['settings'][panel])}.\n",
            markdown(rows),
        ]
    picture = f"{figures.slug(name)}.png"
    if (RESULTS / picture).is_file():
        lines.append(f"![{found['figure']}](papers/{picture})\n")
    checks = [
        Finding(c["says"], c["measured"], tuple(c["seeds"]), c["verdict"]) for c in found["checks"]
    ]
    return lines + [f"- {said(check)}" for check in checks]


def page(text: str) -> str:
    """The page with its made part made anew."""
    made = f"{BEGIN}\n{table()}\n{END}"
    return re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: made, text, flags=re.DOTALL)


def verdicts() -> str:
    """What is shipped of the results: each figure's verdict, and over how many seeds."""
    found = {name: result_of(name) for name in figures.shipped()}
    told = {
        name: f"{each['verdict']} ({over(each)})"
        for name, each in found.items()
        if each is not None
    }
    return tomli_w.dumps(told)


if __name__ == "__main__":
    PAGE.write_text(page(pages.read(PAGE)), encoding="utf-8")
    VERDICTS.write_text(verdicts(), encoding="utf-8")
