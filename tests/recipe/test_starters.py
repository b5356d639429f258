"""The recipes to begin one's own from: each runs over a file of the form that it says."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

from fedsieve.recipe import read as recipes
from fedsieve.run import rundir
from tests import runs
from tests.conftest import Tiny, texts, write_rows

TEMPLATE = "{% for m in messages %}{{ m['content'] + ' <end> ' }}{% endfor %}"


def rows(path: Path) -> None:
    write_rows(path, 120, seed=3, authors=["north", "south", "east"])
    path.write_text(path.read_text("utf-8").replace("author", "site", 1), encoding="utf-8")


def asked(path: Path) -> None:
    made = [{"prompt": text, "completion": label} for text, label in texts(60, seed=3)]
    path.write_text("\n".join(map(json.dumps, made)), encoding="utf-8")


def chats(path: Path) -> None:
    made = [
        {
            "messages": [
                {"role": "user", "content": text},
                {"role": "assistant", "content": label},
            ]
        }
        for text, label in texts(60, seed=3)
    ]
    path.write_text("\n".join(map(json.dumps, made)), encoding="utf-8")


def photos(path: Path) -> None:
    for number in range(60):
        shade = (number * 40) % 240
        kind = path / ("dark" if shade < 120 else "light")
        kind.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 16), (shade, shade, shade)).save(kind / f"{number}.png")


class Starter(NamedTuple):
    """model: of `Tiny`; make: writes rows at a path, by default `data.train`'s own name."""

    model: str
    make: Callable[[Path], None]
    leads: str


STARTERS = {
    "own-csv": Starter("bert", rows, "accuracy"),
    "prompt-completion": Starter("gpt2", asked, "token_accuracy"),
    "messages": Starter("gpt2", chats, "token_accuracy"),
    "images": Starter("vit", photos, "accuracy"),
    "sites": Starter("bert", rows, "accuracy"),
}


@pytest.mark.filterwarnings("ignore:.*padding token", "ignore:the model's head", "ignore:.*reach")
@pytest.mark.parametrize("name", STARTERS)
def test_a_starter_runs_over_rows_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Tiny, name: str
) -> None:
    starter = STARTERS[name]
    monkeypatch.chdir(tmp_path)
    starter.make(Path(recipes.load(name).data.train))
    model = Path("model")
    shutil.copytree(getattr(tiny, starter.model), model)
    if starter.model == "gpt2":
        (model / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    own = ["model.source=./model", "rounds=2", "training.steps=2", "device=cpu", "lora.rank=2"]
    if starter.model != "vit":
        own.append("data.max_length=24")  # tiny models have 32 positions
    runs.start_from(recipes.load(name, own), tmp_path / "run")
    first, *_, last = runs.lines(tmp_path / "run")
    assert next(iter(last["metrics"])) == starter.leads
    assert 0 < last["total_bytes"] < last["dense_bytes"]
    assert last["eval_loss"] < first["eval_loss"]
    assert (tmp_path / "run" / rundir.ADAPTER).is_dir()
    if name == "sites":
        assert {line["client"] for line in runs.lines(tmp_path / "run", rundir.CLIENTS)} == {
            "north", "south", "east",
        }  # fmt: skip


@pytest.mark.parametrize("name", STARTERS)
def test_every_key_of_a_starter_says_why_it_is_there(name: str) -> None:
    text = recipes.shipped_text(name)
    for line in text.splitlines():
        if re.match(r"\w+ = ", line):
            assert re.search(r'"?  # \S', line), line
    assert f"fedsieve run {name} data.train=" in text.splitlines()[0]
    assert len(text.splitlines()) < 60
