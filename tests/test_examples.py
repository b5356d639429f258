"""The examples run as they stand, in small; their notebooks are what the scripts say."""

import json
import random
import re
import runpy
import shutil
import sys
from pathlib import Path
from typing import Protocol

import pytest
from PIL import Image

from tests import notebooks
from tests.conftest import Tiny, texts, write_rows
from tests.pages import ROOT
from tests.recipe.test_starters import TEMPLATE

ROWS = "text=text", "label=label"


class Example(Protocol):
    def __call__(self, name: str, *words: str) -> list[str]: ...


@pytest.fixture
def example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Example:
    """Run one of them in a folder of its own, with these words; gives the lines that it prints."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *words: str) -> list[str]:
        script = ROOT / "examples" / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(script), *words])
        capsys.readouterr()
        runpy.run_path(str(script), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


def test_text_classification(tmp_path: Path, tiny: Tiny, example: Example) -> None:
    folder = tmp_path / "sites"
    folder.mkdir()
    for seed, name in enumerate(("north", "south", "east", "test")):
        write_rows(folder / f"{name}.csv", 60, seed=seed)
    said = example("text_classification", f"model={tiny.bert}", "rounds=3")
    assert [line.split()[0] for line in said] == ["1", "2", "3", "east", "north", "south", said[-1]]
    assert re.fullmatch(r"\['(cars|space|wine)'\]", said[-1])
    # The first has no masks, the last the narrowest.
    sent = [float(line.split()[2]) for line in said[3:6]]
    assert sent[0] > sent[1] >= sent[2]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_instruction_tuning(tmp_path: Path, tiny: Tiny, example: Example) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny.gpt2, model)
    (model / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    draw = random.Random(0)
    with (tmp_path / "chats.jsonl").open("w", encoding="utf-8") as file:
        for ask, answer in texts(40, seed=3):
            both = zip(("user", "assistant"), (ask, answer), strict=True)
            messages = [{"role": role, "content": content} for role, content in both]
            row = {"messages": messages, "user": draw.choice(["ada", "bob"])}
            file.write(json.dumps(row) + "\n")
    with pytest.warns(UserWarning, match="no padding token"):
        said = example(
            "instruction_tuning", f"model={model}", "clients=user", "rounds=2", "length=24"
        )
    assert [line.split()[0] for line in said[:2]] == ["1", "2"]
    assert "exact_match" in said[0]
    assert len(said[2:]) == 3
    assert all(re.match(r"'(cars|space|wine)': '", line) for line in said[2:])


def test_images_that_are_written_where_there_are_none(
    tmp_path: Path, tiny: Tiny, example: Example
) -> None:
    said = example("images", f"model={tiny.vit}", "rounds=2", "steps=2", "digits=150")
    assert [line.split()[0] for line in said[:2]] == ["1", "2"]
    found = sorted(tmp_path.glob("photos/*/*/*.png"))
    assert len(found) == 150
    assert {path.parent.name for path in found} == set("0123456789")
    with Image.open(found[0]) as image:
        assert image.size == (64, 64)
        assert image.histogram()[201:] != [0] * 55
    assert len(said) == 2 + 10 + 1
    assert Path(said[-1]).is_file()


def test_new_method(tmp_path: Path, tiny: Tiny, example: Example) -> None:
    said = example("new_method", f"model={tiny.bert}", f"data={tiny.train}", *ROWS, "rounds=2")
    assert [line.split()[0] for line in said] == ["random", "largest"]
    up = [float(line.split()[3]) for line in said]
    # As many entries, and masks that are about as long.
    assert up[0] == pytest.approx(up[1], rel=0.25)


def test_differential_privacy(tmp_path: Path, tiny: Tiny, example: Example) -> None:
    said = example(
        "differential_privacy",
        *(f"model={tiny.bert}", f"data={tiny.train}", *ROWS),
        *("clients=40", "cohort=8", "rounds=3", "epsilon=6"),
    )
    assert said[0].startswith("noise multiplier ")
    spent = [float(line.split()[2]) for line in said[1:4]]
    assert spent == sorted(spent)
    assert 5.5 < spent[-1] <= 6.0
    assert said[-1].endswith("at epsilon 6, delta 0.0025")


# --- what holds of all


@pytest.mark.parametrize("script", notebooks.SCRIPTS, ids=lambda script: script.stem)
def test_a_notebook_is_its_script(script: Path) -> None:
    written = notebooks.place(script).read_text(encoding="utf-8")
    assert written == notebooks.notebook(script), notebooks.__doc__
    cells = json.loads(written)["cells"]
    assert [cell["cell_type"] for cell in cells[:2]] == ["markdown", "code"]
    assert cells[0]["source"][0].startswith("# ")
    # Nothing is lost or added on the way: the code cells are the script's code.
    code = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    after = script.read_text(encoding="utf-8").partition('"""\n\n')[2]
    lines = [line for line in after.splitlines() if not line.startswith("# ")]
    assert "".join(code.split()) == "".join("".join(lines).split())


def test_there_is_a_notebook_for_each_script_and_each_script_is_short() -> None:
    assert len(notebooks.SCRIPTS) == 5
    folder = ROOT / "examples" / "notebooks"
    assert {path.stem for path in folder.iterdir()} == {path.stem for path in notebooks.SCRIPTS}
    for script in notebooks.SCRIPTS:
        assert len(script.read_text(encoding="utf-8").splitlines()) < 80
