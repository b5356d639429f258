"""The tutorial is done as it stands there, in small: its files, its commands in their order.

Small models and a small file take the place of what a reader fetches. What a page shows of the
output is compared by its words, for numbers and machines differ.
"""

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fedsieve import methods, tasks
from fedsieve.sites import site
from fedsieve.tasks import catalogue
from tests.conftest import Command, Tiny, write_rows
from tests.methods import test_laws as laws
from tests.pages import DOCS, ROOT, code_of, fenced

PAGES = ROOT / "docs" / "tutorial"
# What the demo is made small by; its rows and its model are ours.
SMALL = (
    *("data.label=label", "data.text=text", "data.train_split=", "data.test_split="),
    *("data.max_length=16", "partition.clients=12", "cohort=4", "model.settings={}"),
    "partition.alpha=1.0",
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def commands(page: str) -> list[list[str]]:
    """The words of each of the page's lines that begin with `fedsieve`."""
    lines = "\n".join(code_of(PAGES / page)).splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("fedsieve ")]


def small(words: list[str], tiny: Tiny) -> list[str]:
    """The same command over small files, where it runs the demo."""
    if words[:2] != ["run", "demo"]:
        return words
    rows = (f"model.source={tiny.bert}", f"data.train={tiny.train}", f"data.test={tiny.test}")
    return [*words[:2], *rows, *SMALL, *words[2:]]


@pytest.mark.usefixtures("no_report")
def test_a_first_run(folder: Path, tiny: Tiny, command: Command) -> None:
    fetch, *rest = commands("first-run.md")
    assert fetch[0] == "fetch"
    for words in rest:
        if words[0] != "report":
            done = command(*small(words, tiny))
            assert done.code == 0, (words, done.err)
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert (folder / "runs" / "dense" / "metrics.jsonl").is_file()


@pytest.mark.usefixtures("no_report")
def test_rows_of_your_own(folder: Path, tiny: Tiny, command: Command) -> None:
    write_rows(folder / "posts.csv", 240, seed=1, authors=[f"branch {n}" for n in range(12)])
    text = (folder / "posts.csv").read_text("utf-8")
    (folder / "posts.csv").write_text(text.replace("text,label,author", "post,subject,branch", 1))
    (made,) = fenced(PAGES / "own-rows.md", "python")
    assert '["post", "subject", "branch"]).to_csv("posts.csv")' in made
    assert [words[0] for words in commands("own-rows.md")] == ["init", "check", "run", "run"]
    page = (PAGES / "own-rows.md").read_text("utf-8")
    more = {"init": ["--model", str(tiny.bert)], "check": [], "run": ["rounds=2"]}
    for words in commands("own-rows.md"):
        done = command(*words, *more[words[0]])
        assert done.code == 0, (words, done.err)
        if words[0] == "init":  # what the page shows is what is said
            for name in ("task       ", "columns    ", "clients    "):
                (said,) = re.findall(rf"^{name}.*", done.out, re.MULTILINE)
                assert f"    {said}" in page
    recipe = folder / "recipe.toml"
    wrong = re.sub(r"(?m)^rounds = \d+", 'rounds = "many"', recipe.read_text("utf-8"))
    recipe.write_text(wrong.replace("max_length", "max_lenght"), encoding="utf-8")
    said = command("check", "recipe.toml")
    assert said.code == 2
    shown = [re.sub(r"line \d+", "line", each.strip()) for each in said.err.splitlines()]
    for each in shown:
        assert each in re.sub(r"line \d+", "line", page)


@pytest.mark.usefixtures("no_report")
def test_a_method_of_your_own(
    folder: Path, tiny: Tiny, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = fenced(PAGES / "own-method.md", "python")
    (folder / "mine").mkdir()
    (folder / "mine" / "top_layers.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(folder)
    (words,) = commands("own-method.md")
    trusted = command(*small(words, tiny))
    assert trusted.code == 0, trusted.err
    without = [word for word in words if word != "--allow-code"]
    assert command(*small(without, tiny)).code == 2
    # As a method that ships: every law holds.
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(folder / "mine")])
    monkeypatch.delitem(sys.modules, "fedsieve.methods.top_layers", raising=False)
    for law in laws.LAWS:
        law(laws.Row("top_layers", at={"layers": 99}))


@pytest.fixture
def with_ordinal(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The page's file as if it lay among the tasks."""
    (code,) = fenced(PAGES / "own-task.md", "python")
    (folder / "ordinal.py").write_text(code, encoding="utf-8")
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(folder)])
    catalogue.names.cache_clear()
    yield
    catalogue.names.cache_clear()
    sys.modules.pop("fedsieve.tasks.ordinal", None)


@pytest.mark.usefixtures("no_report", "with_ordinal")
def test_a_task_of_your_own(folder: Path, tiny: Tiny, command: Command) -> None:
    stars = {"cars": "1", "space": "2", "wine": "3"}
    rows = [line.split(",")[:2] for line in tiny.train.read_text("utf-8").splitlines()[1:]]
    lines = [f"{text},{stars[label]}" for text, label in rows]
    (folder / "reviews.csv").write_text("\n".join(["text,stars", *lines]), encoding="utf-8")
    (recipe,) = fenced(PAGES / "own-task.md", "toml")
    recipe = recipe.replace('"minilm-l6"', f'"{tiny.bert}"')
    recipe = recipe.replace('train = "', 'max_length = 16, train = "')
    (folder / "recipe.toml").write_text(recipe, encoding="utf-8")
    for words in commands("own-task.md"):
        done = command(*words)
        assert done.code == 0, (words, done.err)
        assert "nearness" in done.out or words[0] == "check"
    task = catalogue.load("ordinal")
    tally = task.judge(torch.eye(3), torch.tensor([0, 0, 0]), ("1", "2", "3"))
    # Off by 0, 1 and 2 of at most 2 places: on average by 1.
    assert task.metrics(tally, ("1", "2", "3"))["nearness"] == pytest.approx(0.5)


def test_the_sites_file_of_the_page_is_one(folder: Path, tiny: Tiny) -> None:
    (written,) = fenced(PAGES / "across-machines.md", "toml")
    (folder / "site.toml").write_text(written, encoding="utf-8")
    (folder / "train.csv").touch()
    assert site.load(folder / "site.toml").name == "north"


def test_every_page_of_the_tutorial_is_tested_here() -> None:
    own = Path(__file__).read_text(encoding="utf-8")
    for page in DOCS:
        if page.parent == PAGES:
            assert f'"{page.name}"' in own
