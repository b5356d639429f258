"""What a run saves is ready to use where there is no FedSieve: every way to load it gives the run's
own outputs, and its pipeline the run's own scores.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from fedsieve.algebra.adapter import Adapter
from fedsieve.recipe import read as recipe
from fedsieve.recipe.experiment import set_up_resident
from fedsieve.run import rundir, runner
from fedsieve.tasks import catalogue
from fedsieve.train.model import pick_device
from fedsieve.train.reader import load_reader
from tests import kinds, runs
from tests.conftest import Tiny
from tests.tasks.test_federated import KINDS, Kind, asked, changes

pytestmark = [
    pytest.mark.usefixtures("no_report"),
    pytest.mark.filterwarnings("ignore:.*no padding token", "ignore:the model's head is for"),
]

# Of the assistant's turn all is learned, with its end.
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + ' <end>' }}{% endgeneration %}{% else %}{{ m['content'] + ' ' }}"
    "{% endif %}{% endfor %}"
)
CHAT = Kind(
    "causal-lm",
    [
        {
            "messages": [
                {"role": "user", "content": row["ask"]},
                {"role": "assistant", "content": row["say"].strip()},
            ]
        }
        for row in asked()
    ],
    {"text": "messages", "label": None},
    "token_accuracy",
    0.3,
    [],
)
OUTSIDER = Path(__file__).with_name("outsider.py")
ALONE = (
    "import runpy, sys; sys.modules['fedsieve'] = None; "
    f"runpy.run_path({str(OUTSIDER)!r}, run_name='__main__')"
)
METHODS = ("full", "head", "flora", "florist", "fedex_lora")  # what they save is a whole model
SOURCES = (*(kind.task for kind in KINDS), "chat", *METHODS, "merged")


class Made(NamedTuple):
    """A run, what it saved, the rows that it was evaluated on, and what it ended with."""

    task: str
    run: Path
    saved: Path
    rows: list[dict[str, Any]]
    adapter: Adapter


def speaking(tiny: Tiny, folder: Path) -> Path:
    """The tiny GPT-2, with a template for conversations."""
    shutil.copytree(tiny.gpt2, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def made(tiny: Tiny, folder: Path, name: str) -> Made:
    folder.mkdir()
    of = {kind.task: kind for kind in KINDS} | {"chat": CHAT}
    kind = of.get(name, KINDS[0])
    third = len(kind.rows) // 3
    given = changes(tiny, folder, kind, kind.rows[third:])
    given |= {"rounds": 2, "evaluation__every": 2, "partition": {"kind": "iid", "clients": 4}}
    if name == "chat":
        given["model"] = {"source": str(speaking(tiny, folder / "model")), "task": "causal-lm"}
        given["data"]["max_length"] = 32
    if name in METHODS:
        given["method"] = {"name": name}
    adapter = runs.start(tiny, folder / "run", **given)
    saved = folder / "run" / rundir.ADAPTER
    if name == "merged":
        saved = folder / "merged"
        runner.export(folder / "run", saved, merge=True)
    task = "chat" if name == "chat" else kind.task
    return Made(task, folder / "run", saved, kind.rows[:third], adapter)


def plain(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"image": row["image"]["bytes"].hex()} if "image" in row else row


@pytest.fixture(scope="module")
def results(
    tiny: Tiny, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Made, dict[str, Any]]]:
    """Of every source, what an outsider found: all in one process, for the imports take longest."""
    folder = tmp_path_factory.mktemp("ready")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedsieve.report.write", lambda *_: [])
        all_made = {name: made(tiny, folder / name, name) for name in SOURCES}
    jobs = [
        {"folder": str(each.saved), "task": each.task, "rows": [*map(plain, each.rows)]}
        for each in all_made.values()
    ]
    (folder / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    files = (str(folder / name) for name in ("jobs.json", "out.pt"))
    command = [sys.executable, "-I", "-c", ALONE, *files]
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        command, env=kept, cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(folder / "out.pt")
    return {name: (each, told) for (name, each), told in zip(all_made.items(), found, strict=True)}


def ours(each: Made, inputs: list[dict[str, Tensor]]) -> list[Tensor]:
    """The logits of the model that was trained."""
    given = recipe.load(str(each.run / rundir.RECIPE))
    reader, _ = load_reader(given.model.source, given.model.task)
    resident = set_up_resident(given, reader, pick_device("cpu"))
    resident.put(each.adapter)
    resident.model.eval()
    with torch.no_grad():
        return [resident.model(**batch).logits for batch in inputs]


@pytest.mark.parametrize("name", kinds.some_of(SOURCES))
def test_a_saved_folder_gives_the_runs_own_outputs_and_scores(
    results: dict[str, tuple[Made, dict[str, Any]]], name: str
) -> None:
    each, found = results[name]
    expected = ours(each, found["inputs"])
    whole = name in (*METHODS, "merged")
    ways = {"transformers"} | (set() if whole else {"AutoPeftModel", "PeftModel"})
    assert found["logits"].keys() == ways
    for way, logits in found["logits"].items():
        for one, two in zip(logits, expected, strict=True):
            assert torch.allclose(one, two, atol=1e-5, rtol=1e-5), way
    metrics = runs.lines(each.run)[-1]["metrics"]
    assert found["scores"]
    for metric, value in found["scores"].items():
        assert metrics[metric] == pytest.approx(value, abs=1e-6), metric
    card = (each.saved / "README.md").read_text(encoding="utf-8")
    assert f"{next(iter(metrics.values())):.4f} |" in card
    if catalogue.load(recipe.load(str(each.run / rundir.RECIPE)).model.task).named:
        classes = recipe.load(str(each.run / rundir.RECIPE)).data.classes
        assert found["labels"] == dict(enumerate(classes or ()))
