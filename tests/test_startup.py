"""What answers at once imports none of the heavy packages: looked up in the modules, not timed."""

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from typer.main import get_command

from fedsieve import cli
from tests import kinds
from tests.conftest import Tiny

HEAVY = {"torch", "transformers", "peft", "datasets", "matplotlib", "flwr", "pandas", "scipy"}
SCRIPT = """
import json, sys
from fedsieve import cli
sys.argv = ["fedsieve", *json.loads(sys.argv[1])]
try:
    cli.main()
finally:
    print("modules:", *sorted(sys.modules), file=sys.stderr)
"""


def modules_after(*words: str, at: Path | None = None) -> tuple[set[str], str]:
    """The heavy packages that are there when the command has ended, and all that it printed."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(words)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=at,
    )
    said, _, modules = done.stderr.rpartition("modules:")
    assert "Traceback" not in said, said
    return HEAVY & set(modules.split()), done.stdout + said


def commands() -> list[str]:
    group = get_command(cli.app)
    assert isinstance(group, click.Group)
    return sorted(group.commands)


@pytest.mark.parametrize(
    "words",
    kinds.some_of(
        (words,)
        for words in [
            (),
            ("--help",),
            ("--version",),
            ("recipes",),
            ("methods",),
            ("sets",),
            ("schema",),
            *((name, "--help") for name in commands()),
            *(
                (name,)
                for name in commands()
                if name not in ("recipes", "methods", "sets", "schema")
            ),
            ("rnu",),
            ("run", "nosuch"),
            ("run", "demo", "no.such.key=1"),
            ("run", "demo", "trainig.lr=1"),
            ("run", "demo", "training.lr=fast"),
            ("run", "demo", "method.hed=whole"),
            ("run", "demo", "method.name=flsac"),
            ("run", "demo", "server.beta3=1"),
            ("run", "demo", "rounds"),
            ("run", "broken.toml"),
            ("run", "odd.toml"),
            ("run", "."),
            ("run", "missing.toml"),
            ("run", "fine.toml", "--out", "taken"),
            ("resume", "nowhere"),
            ("resume", "taken"),
            ("federate", "nosuch"),
            ("federate", "demo", "no.such.key=1"),
            ("federate",),
            ("report", "nowhere"),
            ("export", "nowhere", "--to", "there"),
            ("worker", "missing.toml"),
            ("worker", "odd.toml"),
            ("search", "nosuch", "--budget-mb", "1"),
            ("compare", "nosuch"),
            ("compare", "broken.toml"),
        ]
    ),
    ids=" ".join,
)
def test_a_command_that_answers_at_once_loads_nothing_heavy(
    tmp_path: Path, tiny: Tiny, words: tuple[str, ...]
) -> None:
    (tmp_path / "broken.toml").write_text("rounds = = 3\n", encoding="utf-8")
    (tmp_path / "odd.toml").write_text("rounds = 3\nround = 3\n", encoding="utf-8")
    fine = tiny.write(tmp_path / "fine.toml")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "recipe.toml").write_text("rounds = 'many'\n", encoding="utf-8")
    assert fine.is_file()
    found, said = modules_after(*words, at=tmp_path)
    assert found == set(), said
    assert said.strip()


def test_a_run_says_what_it_will_do_before_it_loads_anything(tmp_path: Path, tiny: Tiny) -> None:
    """The words are there when torch cannot be imported at all."""
    recipe = tiny.write(tmp_path / "mine.toml", name="mine", rounds=7)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; sys.modules['torch'] = None\n"
            "from fedsieve import cli\n"
            f"sys.argv = ['fedsieve', 'run', {str(recipe)!r}]\n"
            "cli.main()",
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=tmp_path,
    )
    assert done.returncode != 0  # there is no torch
    said = " ".join(done.stdout.split())
    for word in ("mine", str(tiny.bert), "7 rounds", "device", "runs/mine", "loading torch"):
        assert word in said, said
