"""The docs are tested: their code runs, and what they list is what there is."""

import re
import shutil
import sys
import tomllib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import fedsieve
from fedsieve import methods
from fedsieve.algebra import optim
from fedsieve.algebra.method import Method
from fedsieve.recipe import read as recipe
from fedsieve.recipe import sets
from fedsieve.tasks import catalogue
from tests import runs
from tests.conftest import Tiny
from tests.methods import test_laws as laws
from tests.methods.optimum import Optimum
from tests.pages import PAGES, ROOT, fenced
from tests.tasks.test_federated import pictures


def test_the_readmes_notebook_code_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny: Tiny,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With a small model in the place of the hub's, and a CSV file of reviews."""
    (code,) = fenced(ROOT / "README.md", "python")
    assert len(code.splitlines()) <= 15
    name = "sentence-transformers/all-MiniLM-L6-v2"
    assert name in code
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reviews.csv").write_bytes(tiny.train.read_bytes())
    scope: dict[str, Any] = {}
    exec(compile(code.replace(name, str(tiny.bert)), "README.md", "exec"), scope)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["1", "2", "3", "4", "5"]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    # In these few rounds B reaches the clients, and more is learned than by the head alone.
    run = scope["run"]
    assert [each.starved for each in run.metrics[1:]] == [0] * 5
    assert all(each.down_b > 0.05 for each in run.metrics[2:])
    assert all(t.abs().sum() > 0 for n, t in run.adapter.tensors.items() if ".lora_B" in n)
    server, model = fedsieve.adam(5e-3), str(tiny.bert)
    for other, budget in ((fedsieve.head(server=server), None), (_by_value(), scope["budget"])):
        plain = fedsieve.finetune(
            model, scope["clients"], other, rounds=5, budgets=budget, test=scope["rows"]["test"]
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            plain.finish()
        assert run.metrics[-1].eval_loss < plain.metrics[-1].eval_loss
        assert run.metrics[-1].accuracy >= plain.metrics[-1].accuracy


def test_the_readmes_labels_are_what_stands_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the reader of recipes has them: 01 and 1 are two names, and so are 1.0 and 1e5."""
    (code,) = fenced(ROOT / "README.md", "python")
    until = code.index("clients = ")
    names = ["01", "1", "1.0", "1e5", "007"]
    monkeypatch.chdir(tmp_path)
    lines = [f"good {number},{name}" for number, name in enumerate(names * 5)]
    (tmp_path / "reviews.csv").write_text("\n".join(["text,label", *lines]), encoding="utf-8")
    scope: dict[str, Any] = {}
    exec(compile(code[:until], "README.md", "exec"), scope)
    both = scope["rows"]
    found = {*both["train"]["label"], *both["test"]["label"]}
    assert found == set(names)


def test_the_code_of_the_page_on_finetune_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny: Tiny,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With small models in the place of the hub's; the language model's adapter is made here."""
    first, *more, load, load_lm, moved = fenced(ROOT / "docs" / "finetune.md", "python")
    assert len(more) == 3
    small = {
        "sentence-transformers/all-MiniLM-L6-v2": tiny.bert,
        "openai-community/gpt2": tiny.gpt2,
    }
    monkeypatch.chdir(tmp_path)

    def run(code: str, scope: dict[str, Any]) -> str:
        for name, path in small.items():
            code = code.replace(name, str(path))
        capsys.readouterr()
        exec(compile(code, "docs/finetune.md", "exec"), scope)
        return capsys.readouterr().out

    scope: dict[str, Any] = {}
    assert [line.split()[0] for line in run(first, scope).splitlines()] == ["1", "2"]
    beside = dict(scope)
    for code in more:
        assert run(code, beside)
    said = run(load, scope)
    assert re.search(r"'label': '(01|1)'", said)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "adapter").rename(elsewhere / "adapter")
    monkeypatch.chdir(elsewhere)
    with pytest.raises(OSError, match="adapter/base"):
        run(load, scope)
    run(moved, {})
    assert run(load, scope) == said
    monkeypatch.chdir(tmp_path)
    rows = scope["wards"]["north"]
    with pytest.warns(UserWarning, match="no padding token"):
        language = fedsieve.finetune(
            tiny.gpt2, [rows], fedsieve.fedit(), rounds=1, task="causal-lm"
        )
    language.save(tmp_path / "adapter")
    assert run(load_lm, {}).strip()


TASKS = ROOT / "docs" / "tasks.md"


@pytest.mark.filterwarnings("ignore:.*padding token", "ignore:the model's head is for")
@pytest.mark.parametrize("task", catalogue.names())
def test_the_recipe_of_each_task_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Tiny, task: str
) -> None:
    """With small models in the place of the hub's, over the page's rows several times."""
    told = zip(fenced(TASKS, "json"), fenced(TASKS, "toml"), strict=True)
    of_task = {tomllib.loads(text)["model"]["task"]: (rows, text) for rows, text in told}
    assert set(of_task) == set(catalogue.names())
    rows, text = of_task[task]
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(rows * 8, encoding="utf-8")
    model = tiny.bert
    if catalogue.load(task).peft == "CAUSAL_LM":
        model = tmp_path / "model"
        shutil.copytree(tiny.gpt2, model)
        template = "{% for m in messages %}{{ m['content'] + ' <end> ' }}{% endfor %}"
        (model / "chat_template.jinja").write_text(template, encoding="utf-8")
    if catalogue.load(task).reads == "images":
        model = tiny.vit
        for number, image in enumerate(pictures()[:2]):
            Path(f"{number}.png").write_bytes(image["image"]["bytes"])
    source = tomllib.loads(text)["model"]["source"]
    longest = ["data.max_length=24", "data.new_tokens=8"]  # tiny models have 32 positions
    Path("recipe.toml").write_text(text.replace(source, str(model)), encoding="utf-8")
    runs.start_from(recipe.load("recipe.toml", longest), tmp_path / "run")
    (line,) = [line for line in TASKS.read_text("utf-8").splitlines() if f"| `{task}` |" in line]
    last = runs.lines(tmp_path / "run")[-1]
    assert [f"`{name}`" for name in last["metrics"]] == line.split("|")[4].strip().split(", ")


def test_the_table_of_data_sets_is_what_their_file_says() -> None:
    page = TASKS.read_text("utf-8")
    told = re.findall(r"^\| `(\w+/\w+)` \| (.*?) \| `(\w+)`", page, re.MULTILINE)
    found = [
        (
            name,
            ", ".join(f"`{each.data[k]}`" for k in ("text", "text_b") if k in each.data),
            each.metric,
        )
        for name, each in sets.known().items()
        if each.task != "multiple-choice"
    ]
    assert told[: len(found)] == found
    asked = re.findall(r"^\| `(commonsense/\S+)` \| `(\S+)` \| (.*?) \|$", page, re.MULTILINE)
    for (name, hub, columns), (other, each) in zip(
        asked, list(sets.known().items())[len(found) :], strict=True
    ):
        assert (name, hub) == (other, each.data["train"])
        assert columns == ", ".join(f"`{n}`" for n in sets.columns(each))


def _by_value() -> Method:
    """The README's method, but with the paper's ranking."""
    return fedsieve.flasc(server=fedsieve.adam(5e-3), up_values="int8")


def test_adding_a_method_is_one_file_one_row_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What docs/methods.md says is done here: the file is written, its row obeys every law."""
    page = ROOT / "docs" / "methods.md"
    code, _ = fenced(page, "python")
    (tmp_path / "random_entries.py").write_text(code, encoding="utf-8")
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "fedsieve.methods.random_entries", raising=False)
    assert "random_entries" in methods.names()
    (row,) = re.findall(
        r'^    (Row\("random_entries".*\)),$', page.read_text(encoding="utf-8"), re.MULTILINE
    )
    new = eval(row, {"Row": laws.Row, "Optimum": Optimum})
    for law in laws.LAWS:
        law(new)


def test_the_server_optimizer_of_ones_own_descends() -> None:
    _, code = fenced(ROOT / "docs" / "methods.md", "python")
    made: dict[str, Any] = {}
    exec(code, made)
    own, params = made["method"].server, {"x": torch.zeros(3)}
    gradient = {"x": torch.tensor([3.0, -1.0, 0.5])}
    moved, _ = optim.stepped(own, params, gradient, optim.slots_of(own, params))
    assert torch.equal(moved["x"], -1e-3 * gradient["x"].sign())


@pytest.mark.parametrize("name", recipe.shipped())
def test_recipes_that_ship_are_valid_and_say_what_they_are(name: str) -> None:
    assert recipe.shipped()[name].startswith("# ")
    assert recipe.load(name).name == name


def test_the_public_names_exist_and_are_all_there_is() -> None:
    for name in fedsieve.__all__:
        assert getattr(fedsieve, name) is not None
    assert sorted(fedsieve.__all__) == fedsieve.__all__
    with pytest.raises(AttributeError):
        _ = fedsieve.no_such_name


def test_no_fixed_path_of_one_machine_is_in_the_docs() -> None:
    for page in PAGES:
        assert "/root/" not in page.read_text(encoding="utf-8")
