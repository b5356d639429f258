"""docs/commands.md, made from the command line itself:

python -m tests.commands_page
"""

import click
from typer.main import get_command

from fedsieve import cli
from tests.pages import ROOT

PAGE = ROOT / "docs" / "commands.md"
HEAD = """# Commands

What `fedsieve --help` and the `--help` of each command say, on one page; made from them by
`python -m tests.commands_page`. Exit codes: 0 done, 1 some of several runs failed, 2 bad input
(one message), 130 stopped. `fedsieve --install-completion` lets the shell complete commands,
options and the names of recipes; `fedsieve --show-completion` prints what it would install.
`fedsieve --version` prints the version.
"""


def page() -> str:
    group = get_command(cli.app)
    assert isinstance(group, click.Group)
    parts = [HEAD]
    for name, command in sorted(group.commands.items()):
        rows = [_row(each) for each in command.params if each.name != "help"]
        usage = " ".join(each.make_metavar(click.Context(command)) for each in arguments(command))
        parts.append(f"## `fedsieve {name}{' ' * bool(usage)}{usage}`\n\n{command.help}\n")
        if rows:
            head = "| | default | |\n|---|---|---|\n"
            parts.append(head + "\n".join(rows) + "\n")
    return "\n".join(parts)


def arguments(command: click.Command) -> list[click.Parameter]:
    return [each for each in command.params if isinstance(each, click.Argument)]


def _row(each: click.Parameter) -> str:
    option = isinstance(each, click.Option)
    name = each.opts[0] if option else each.make_metavar(click.Context(click.Command("")))
    plain = isinstance(each.default, str | int | float) and not isinstance(each.default, bool)
    said = "needed" if each.required else str(each.default) if plain else ""
    words = (getattr(each, "help", None) or "").replace("<", "&lt;")
    return f"| `{name}` | {said} | {words} |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
