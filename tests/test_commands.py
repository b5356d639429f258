"""The other commands, and what all of them have in common."""

import io
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoModelForSequenceClassification

import fedsieve
from fedsieve import cli, methods
from fedsieve.engine.loop import Round
from tests import runs
from tests.conftest import Command, Tiny


@pytest.fixture(scope="module")
def two(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("two")
    runs.start(tiny, folder / "one", rounds=2, name="sieved")
    dense: dict[str, Any] = {
        "method": {"name": "fedit"},
        "budgets": [{}],
        "server": {"optimizer": "sgd"},
    }
    runs.start(tiny, folder / "two", rounds=2, name="dense", **dense)
    return folder / "one", folder / "two"


def test_the_version(command: Command) -> None:
    assert command("--version").out == f"fedsieve {version('fedsieve')}\n"
    assert fedsieve.__version__ == version("fedsieve")


def test_help_names_every_command_and_says_what_each_argument_is(command: Command) -> None:
    for name in ("run", "resume", "report", "export", "fetch", "recipes", "methods", "worker"):
        assert name in command("--help").out
    assert "A TOML file, or a name" in command("run", "--help").out


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("fedsieve re", {"resume", "report", "recipes", "reproduce"}),
        ("fedsieve run d", {"demo", "dp-fedadam", "dp-simulated"}),
        ("fedsieve run demo --ov", {"--overwrite"}),
        ("fedsieve compare demo --methods fedit,fs", {"fedit,fslora", "fedit,fslora_flasc"}),
    ],
)
def test_the_shell_completes_commands_options_recipes_and_methods(
    typed: str, offered: set[str]
) -> None:
    """As bash asks, after `fedsieve --install-completion`."""
    words = typed.split(" ")
    asked = {
        "_FEDSIEVE_COMPLETE": "complete_bash",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(len(words) - 1),
    }
    program = str(Path(sys.executable).with_name("fedsieve"))
    done = finished([program], **asked)
    assert set(done.stdout.split()) == offered, done.stderr


def test_completion_is_installed_for_the_shell_that_asks(tmp_path: Path) -> None:
    program = str(Path(sys.executable).with_name("fedsieve"))
    # Not the shell's last command: it would be put in the shell's place.
    done = finished(["bash", "-c", f"{program} --install-completion; exit $?"], HOME=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    (script,) = [path for path in tmp_path.rglob("*.sh") if path.is_file()]
    assert "_FEDSIEVE_COMPLETE=complete_bash" in script.read_text(encoding="utf-8")


def finished(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("words", [("rnu",), ("run",), ("run", "demo", "--uot", "x"), ("export",)])
def test_words_that_are_no_command(command: Command, words: tuple[str, ...]) -> None:
    ran = command(*words)
    assert ran.code == 2
    assert "Traceback" not in ran.err


def test_the_lists(command: Command) -> None:
    recipes = command("recipes")
    assert recipes.code == 0
    assert "demo  MiniLM-L6 on 20 Newsgroups" in recipes.out
    ran = command("methods")
    assert ran.code == 0
    for name in methods.names():
        assert f"\n{name} " in ran.out
    assert "FLASC: dense training" in ran.out
    assert "feedback" in ran.out


def test_what_methods_cost(command: Command, tiny: Tiny) -> None:
    model = ("methods", "--model", str(tiny.bert), "--rank", "4", "--targets", "query,value")
    ran = command(*model, "--classes", "3", "--ratio", "0.5", "--cohort", "2")
    assert ran.code == 0
    rows = {line.split()[0]: line.split()[1:] for line in ran.out.splitlines() if "MB" in line}
    assert set(rows) == set(methods.names())
    assert rows["fslora"][0] == "2"  # half of the ranks
    assert rows["fedit"][0] == "4"
    assert float(rows["fslora"][1]) < float(rows["fedit"][1]) < float(rows["full"][1])

    ran = command(*model, "--classes", "3", "--down", "1.5")
    assert (ran.code, "--down 1.5" in ran.err) == (2, True)
    ran = command("methods", "--model", str(tiny.bert), "--rank", "400", "--targets", "query")
    assert (ran.code, "lora.rank 400 is larger" in ran.err) == (2, True)
    ran = command("methods", "--model", str(tiny.gpt2), "--classes", "1")
    assert ran.code == 0
    assert "no head" in ran.out  # of a causal LM


def test_names_that_cannot_be_fetched(command: Command) -> None:
    ran = command("fetch", "minilm-l7")
    assert ran.code == 2
    assert "minilm-l6" in ran.err


def test_a_report_of_two_runs(two: tuple[Path, Path], tmp_path: Path, command: Command) -> None:
    page = tmp_path / "both.html"
    ran = command("report", *two, "--out", page)
    assert (ran.code, ran.err) == (0, "")
    written = [Path(line) for line in ran.out.splitlines()]
    assert written[0] == page
    assert all(path.is_file() for path in written)
    assert len(written) > 3
    text = page.read_text()
    assert "sieved" in text
    assert "dense" in text
    assert "1 of" not in text
    assert command("report", two[0]).out.splitlines()[0] == str(two[0] / "report.html")
    ran = command("report", tmp_path)
    assert ran.code == 2
    assert "holds no run" in ran.err


def test_export(two: tuple[Path, Path], tmp_path: Path, command: Command) -> None:
    to = tmp_path / "model"
    ran = command("export", two[0], "--to", to, "--merge")
    assert ran.code == 0
    assert ran.out.startswith(f"{to}: the merged model after round 2\n")
    assert AutoModelForSequenceClassification.from_pretrained(to).config.num_labels == 3
    ran = command("export", two[0], "--to", to)
    assert ran.code == 2
    assert f"{to} is not empty: choose another folder" in ran.err
    ran = command("export", two[0], "--to", tmp_path / "adapter")
    assert ran.out.startswith(f"{tmp_path / 'adapter'}: the adapter after round 2\n")
    assert (tmp_path / "adapter" / "README.md").is_file()
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    (tmp_path / "file").touch()
    assert command("export", two[0], "--to", tmp_path / "file").code == 2


@pytest.mark.parametrize("ranked", ["values", "change"])
def test_the_console_tells_what_masks_keep_and_warns_once(
    tiny: Tiny, tmp_path: Path, command: Command, no_report: None, ranked: str
) -> None:
    path = tiny.write(
        tmp_path / "recipe.toml",
        method={"name": "flasc", "ranked": ranked},
        budgets=[{"down": 0.2, "up": 0.25}],
        server={"optimizer": "adam", "lr": 1e-4},
    )
    ran = command("run", path, "--out", tmp_path / "run")
    assert ran.code == 0
    assert ran.err.count("nothing of B pass down to 3 of 3 clients") == (ranked == "values")
    (line,) = (each for each in ran.out.splitlines() if each.startswith("round 4/4"))
    found = re.search(r"MB \(kept A (\S+), B (\S+), head (\S+)\)  up .* MB \(kept A ", line)
    assert found is not None
    assert (found[2] == "0") == (ranked == "values")


def test_of_many_runs_each_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(cli, "warn", said.append)
    nothing = dict.fromkeys(Round._fields, 0) | {"accuracy": None, "clients": 3}
    show = cli._show_of_many()
    for name, folder in (("a", "1"), ("b", "2"), ("a", "3")):  # at two places of a figure, say
        for number, starved in ((1, 3), (2, 3), (3, 3), (4, 0), (5, 2)):
            summary = Round(**{**nothing, "round": number, "starved": starved})  # type: ignore[arg-type]
            show(SimpleNamespace(name=name, folder=Path(folder)), summary)  # type: ignore[arg-type]
    assert [text[:11] for text in said] == ["a, round 2:", "b, round 2:", "a, round 2:"]


@pytest.mark.parametrize("words", [("resume",), ("export", "--to", "x")])
def test_folders_without_a_run(tmp_path: Path, command: Command, words: tuple[str, ...]) -> None:
    ran = command(words[0], tmp_path / "none", *words[1:])
    assert ran.code == 2
    assert "holds no run: there is no recipe.toml in it" in ran.err


def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar with the time left; only evaluated rounds stay on the screen."""
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=200, soft_wrap=True)
    monkeypatch.setattr(cli, "console", terminal)
    nothing = dict.fromkeys(Round._fields, 0)
    with cli._Live(3) as live:
        for number in range(4):
            evaluated = number % 2 == 0
            summary = Round(**{**nothing, "round": number, "loss": 1.5, "eval_loss": 2.5,
                               "metrics": {"accuracy": 0.25} if evaluated else None})  # type: ignore[arg-type] # fmt: skip
            live.show(summary, [])
        live._bar.refresh()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    for number in range(4):
        stays = f"round {number}/3  loss 1.500  accuracy 0.250" in text
        assert stays == (number % 2 == 0)
    assert "left 0:00" in text
    assert "━" in text


def test_the_public_names() -> None:
    for name in fedsieve.__all__:
        assert getattr(fedsieve, name).__name__ in (name, "method")
    with pytest.raises(AttributeError, match="no attribute 'finetunes'"):
        fedsieve.__getattr__("finetunes")
