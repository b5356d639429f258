"""Arguments of the command line that are none: paths that no disk takes, numbers that are none.

All commands and options are found in the command line itself, so that a new one is tried too.
"""

import os
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from typer.main import get_command

from fedsieve import cli

LONG = "a" * 300
GROUP = get_command(cli.app)
assert isinstance(GROUP, click.Group)
COMMANDS: dict[str, Any] = dict(sorted(GROUP.commands.items()))
# What a command needs beside the path that is tried, in the place of its other arguments.
NEEDED = {"search": ["demo", "--budget-mb", "1"], "export": ["--to", "out"], "costs": ["demo"]}


def ended(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["fedsieve", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(str(end.value.code or 0))


def paths() -> list[tuple[str, list[str]]]:
    """Each command with a path that is too long, as its argument and as each of its options."""
    found = []
    for name, command in COMMANDS.items():
        for each in command.params:
            takes = isinstance(each.type, click.Path) or each.name in ("recipe", "source", "folder")
            if takes and isinstance(each, click.Argument):
                found.append((name, [LONG, *NEEDED.get(name, [])[1:]]))
            elif takes and name in ("run", "compare", "search", "federate", "report"):
                found.append((name, ["demo", *NEEDED.get(name, [])[1:], each.opts[0], LONG]))
    return found


@pytest.mark.parametrize(("name", "words"), paths(), ids=lambda each: str(each)[:20])
def test_a_path_that_no_disk_takes_is_told_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ended(monkeypatch, name, *words) == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told
    assert "error" in told.lower()


NO_TEXT = os.fsdecode(b"out\xffb")
BEFORE = {"run": ["demo"], "compare": ["demo"], "search": ["demo", "--budget-mb", "1"]}
BEFORE |= {"federate": ["demo"], "reproduce": ["flasc/figure2"], "export": ["run"]}


def ways() -> list[list[str]]:
    """Each command with each of its paths. A report is a picture of what is read: its own are any
    folder's; and so is the recipe that `init` writes, which names no way to itself.
    """
    found = []
    for name, command in COMMANDS.items():
        for each in command.params if name not in ("report", "init") else ():
            if isinstance(each.type, click.Path) and isinstance(each, click.Argument):
                found.append([name, NO_TEXT, *(["--to", "out"] if name == "export" else [])])
            elif isinstance(each.type, click.Path):
                found.append([name, *BEFORE[name], each.opts[0], NO_TEXT])
    return found


@pytest.mark.parametrize("words", ways(), ids=lambda each: " ".join(each[:1] + each[-2:-1]))
@pytest.mark.parametrize("way", ["itself", "above it"])
def test_a_way_that_no_text_can_hold_is_refused_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    way: str,
) -> None:
    """No file of tensors can be written there, nor an adapter that names its base."""
    if way == "above it":
        (tmp_path / NO_TEXT).mkdir()
        words = ["out" if word == NO_TEXT else word for word in words]
    monkeypatch.chdir(tmp_path / NO_TEXT if way == "above it" else tmp_path)
    monkeypatch.setattr(cli, "_import", lambda: pytest.fail("something heavy is loaded"))
    assert ended(monkeypatch, *words) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "can be no path" in told
    assert not [*Path.cwd().iterdir()]


@pytest.mark.parametrize("words", [["run", "demo"], ["report", "run"]])
def test_a_current_folder_that_is_gone_is_told_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert ended(monkeypatch, *words) == 2
    assert "Traceback" not in (told := capsys.readouterr().err)
    assert "error" in told


def numbers() -> list[tuple[str, str]]:
    return [
        (name, each.opts[0])
        for name, command in COMMANDS.items()
        for each in command.params
        if isinstance(each, click.Option) and isinstance(each.type, click.types.FloatParamType)
    ]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(("name", "option"), numbers())
def test_a_number_that_is_none_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    option: str,
    value: str,
) -> None:
    assert ended(monkeypatch, name, "demo", *NEEDED.get(name, [])[1:], option, value) == 2
    assert option in capsys.readouterr().err
