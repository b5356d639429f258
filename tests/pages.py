"""The README and the pages of docs/, taken apart: code, commands, links, headings."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").rglob("*.md"))
AT_THE_ROOT = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
PAGES = [*(ROOT / name for name in AT_THE_ROOT), *DOCS]

_FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
_INDENTED = re.compile(r"(?:(?<=\n\n)|\A)(?:(?: {4}.*)?\n)+", re.MULTILINE)
_INLINE = re.compile(r"`([^`]+)`")


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def fenced(page: Path, language: str) -> list[str]:
    """The page's fenced code blocks of a language."""
    return [code for name, code in _FENCED.findall(read(page)) if name == language]


def code_of(page: Path) -> list[str]:
    """All code blocks, fenced or indented, without their indentation."""
    text = read(page)
    prose = _FENCED.sub("\n", text)
    indented = [
        re.sub(r"(?m)^ {4}", "", block) for block in _INDENTED.findall(prose) if block.strip()
    ]
    return [code for _, code in _FENCED.findall(text)] + indented


def inline(page: Path) -> list[str]:
    """What stands in backticks in the prose, on one line."""
    prose = _FENCED.sub("\n", read(page))
    return [" ".join(code.split()) for code in _INLINE.findall(prose)]


class Line(NamedTuple):
    """A command line of `fedsieve`: its words, and whether it stands in a code block, whole."""

    words: tuple[str, ...]
    whole: bool


def commands(page: Path) -> list[Line]:
    """Every command line of the page, comments left out."""
    lines = [
        (line, True)
        for code in code_of(page)
        if not re.search(r"^(import|from) ", code, re.MULTILINE)
        for line in code.replace("\\\n", " ").splitlines()
    ]
    found = []
    for line, whole in [*lines, *((code, False) for code in inline(page))]:
        said = re.search(r"(?:^|[\s/=])fedsieve((?: +[^\s|&;<>#]+)+)", line)
        if said and "pip install" not in line:
            words = tuple(w for w in shlex.split(said[1]) if w != "..." and w[0] != "[")
            found.append(Line(words, whole))
    return found


def anchors(page: Path) -> set[str]:
    """The page's headings as a link names them: GitHub's rule."""
    found: dict[str, int] = {}
    names = set()
    for heading in re.findall(r"(?m)^#{1,6} +(.*?) *#*$", _FENCED.sub("\n", read(page))):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        count = found.get(slug, 0)
        found[slug] = count + 1
        names.add(f"{slug}-{count}" if count else slug)
    return names


def links(page: Path) -> list[str]:
    """Where the page's links and images lead, those out of the repository left out."""
    text = _INLINE.sub("``", _FENCED.sub("\n", read(page)))
    targets = [
        *re.findall(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)", text),
        *re.findall(r"(?m)^\[[^]]+\]:\s*(\S+)", text),
        *re.findall(r"(?:src|href)=[\"']([^\"']+)[\"']", text),
    ]
    return [target for target in targets if not re.match(r"[a-z]+:", target)]
