"""`fedsieve compare`: tuned alike, run side by side, resumed as a whole, told in one table."""

import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tomli_w
import torch
import transformers

from fedsieve import methods
from fedsieve.algebra.keys import Key
from fedsieve.errors import FedSieveError
from fedsieve.recipe import overrides, schema
from fedsieve.recipe import read as recipes
from fedsieve.recipe.experiment import digest_of_rows, with_whole_paths
from fedsieve.recipe.method import knobs as knobs_of
from fedsieve.recipe.method import limits_said
from fedsieve.run import rundir
from fedsieve.run.runner import Stopped
from fedsieve.study import jobs
from fedsieve.study import plan as study
from fedsieve.study.jobs import Job, asked_for, diverged, finished, refuse_changed, run_all
from fedsieve.study.parts import ASKED, DIVERGED, FAILED
from fedsieve.train.digest import base_digest
from fedsieve.train.model import load_base
from tests import kinds, runs
from tests.conftest import Command, Tiny

Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Reports take longer than the runs; what they were asked to show is kept."""
    asked: list[dict[str, Any]] = []

    def write(paths: Any, out: Path, **given: Any) -> list[Path]:
        asked.append({"out": out, **given})
        out.write_bytes(b"")  # without one, a run has not ended
        return [out]

    monkeypatch.setattr("fedsieve.report.write", write)
    return asked


@pytest.fixture
def write(tiny: Tiny, tmp_path: Path) -> Write:
    """Write a study beside its recipe, which has 2 rounds, evaluated."""

    def make(changes: dict[str, Any] | None = None, **table: Any) -> Path:
        given = {"rounds": 2, "evaluation__every": 1} | (changes or {})
        tiny.write(tmp_path / "tiny.toml", **given)
        path = tmp_path / "study.toml"
        path.write_text(tomli_w.dumps({"recipe": "tiny.toml", **table}), encoding="utf-8")
        return path

    return make


def accuracies(folder: Path) -> list[float]:
    return [line["accuracy"] for line in runs.lines(folder) if line["round"] > 0]


def asked_on(folder: Path) -> str:
    on: str = tomllib.loads((folder / rundir.RECIPE).read_text())["evaluation"]["on"]
    return on


def logs(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*.jsonl")}


def test_methods_and_seeds_from_one_recipe(
    tiny: Tiny, tmp_path: Path, command: Command, no_plots: list[dict[str, Any]]
) -> None:
    path, out = tiny.write(tmp_path / "tiny.toml", rounds=2), tmp_path / "out"
    arguments: list[str | Path] = ["compare", path, "--out", out]
    arguments += ["--methods", "fedit, fslora_flasc"]
    ran = command(*arguments, "--seeds", "0,1", "--target", "0.01")
    assert (ran.code, ran.err) == (0, "")
    # Each is the run that `fedsieve run` would make.
    runs.start(tiny, tmp_path / "alone", rounds=2, seed=1)
    runs.assert_same(out / "fslora_flasc" / "seed-1", tmp_path / "alone")
    table = json.loads((out / "table.json").read_text())
    assert [row["label"] for row in table["rows"]] == ["fedit", "fslora_flasc"]
    for row in table["rows"]:
        ends = [runs.lines(out / row["label"] / f"seed-{seed}")[-1] for seed in (0, 1)]
        assert row["runs"] == row["reached"] == 2
        assert row["final"]["mean"] == pytest.approx(
            statistics.fmean(end["accuracy"] for end in ends)
        )
        assert row["total_bytes"]["low"] == min(end["total_bytes"] for end in ends)
    # What a method cannot use counts as 1 for it, and is told.
    own = tomllib.loads((out / "fedit" / "seed-0" / rundir.RECIPE).read_text())
    assert all(tier["ratio"] == tier["down"] == tier["up"] == 1 for tier in own["budgets"])
    assert "fedit: method fedit; no budgets used; makes no use of the budgets' ratio" in ran.out
    assert "fslora_flasc: method fslora_flasc; budgets used: ratio, down, up" in ran.out
    assert "says nothing of fedit, fslora_flasc: round 0 had it" in ran.out
    assert (out / "table.md").read_text().startswith("| entry | seeds | final accuracy |")
    groups = {
        name: [out / name / f"seed-{s}" for s in (0, 1)] for name in ("fedit", "fslora_flasc")
    }
    assert no_plots[-1] == {"out": out / "report.html", "target": 0.01, "groups": groups}

    # The same again does nothing; another seed runs only that.
    before = logs(out)
    ran = command(*arguments, "--seeds", "0,1")
    assert ran.code == 0
    assert "4 runs, 4 of them done already" in ran.out
    assert logs(out) == before
    ran = command(*arguments, "--seeds", "0,1,2")
    assert "6 runs, 4 of them done already" in ran.out
    assert logs(out).items() > before.items()
    # Another recipe under the same names is refused before anything is run.
    after = logs(out)
    ran = command(*arguments, "--seeds", "0,1,2,3", "training.lr=0.5")
    assert ran.code == 2
    assert "seed-0 holds a run with training.lr = 0.03, but 0.5 is asked for now" in ran.err
    assert logs(out) == after


def test_tuned_on_validation_then_run_on_test(
    write: Write, tiny: Tiny, tmp_path: Path, command: Command
) -> None:
    settings = {
        "seeds": [0, 1],
        "set": {"method": {"down_values": "int8"}},
        "entry": [
            {"name": "dense", "method": "fedit"},
            {"name": "own grid", "grid": [{"server.lr": 0.04}, {"training": {"lr": 0.001}}]},
            {"name": "untuned", "grid": [], "seeds": [1]},
        ],
        "tune": {"grid": {"server.lr": [1e-6, 0.05]}, "seeds": [100, 101], "set": {"rounds": 3}},
    }
    path, out = write(**settings), tmp_path / "out"
    # While tuning, the test rows are not there to be read.
    hidden = tiny.test.rename(tmp_path / "hidden.csv")
    try:
        ran = command("compare", path, "--out", out)
    finally:
        hidden.rename(tiny.test)
    assert ran.code == 1
    assert "there is no file" in ran.err
    trials = sorted(each.name for each in (out / "dense").glob("tune-*"))
    assert trials == [f"tune-{n}-seed-{s}" for n in (0, 1) for s in (100, 101)]
    assert all(asked_on(out / "dense" / trial) == "validation" for trial in trials)
    before = logs(out)

    ran = command("compare", path, "--out", out)
    assert (ran.code, ran.err) == (0, "")
    assert "8 trials, 8 of them done already" in ran.out
    assert logs(out).items() >= {k: v for k, v in before.items() if "tune-" in k}.items()
    told = json.loads((out / "tuning.json").read_text())
    assert list(told["entries"]) == ["dense", "own grid"]
    for name, entry in told["entries"].items():
        scores = [
            statistics.fmean(
                statistics.fmean(accuracies(out / name / f"tune-{n}-seed-{s}")[-3:])
                for s in (100, 101)
            )
            for n in (0, 1)
        ]
        assert [trial["score"] for trial in entry["trials"]] == pytest.approx(scores)
        assert entry["best"] == scores.index(max(scores))
        best = entry["trials"][entry["best"]]["settings"]
        assert f"{name}: " in ran.out
        for seed in (0, 1):
            folder = out / name / f"seed-{seed}"
            assert asked_on(folder) == "test"
            assert runs.lines(folder)[-1]["eval_examples"] == 60
            own = tomllib.loads((folder / rundir.RECIPE).read_text())
            assert own["rounds"] == 2  # the rounds of [tune] are the trials' alone
            assert own["data"]["validation"] == 0.1
            for key, value in overrides.flat(best):
                table, last = key.split(".")
                assert own[table][last] == value
    assert told["entries"]["dense"]["best"] == 1  # 1e-6 learns nothing
    assert [each.name for each in (out / "untuned").iterdir()] == ["seed-1"]
    assert "untuned: method fslora_flasc; budgets used: ratio, down, up; not tuned" in ran.out
    assert "Settings were chosen on 0.1 of the training rows" in (out / "table.md").read_text()


def test_stopped_and_called_again(
    write: Write, tiny: Tiny, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = write(seeds=[0, 1], entry=[{"name": "one"}]), tmp_path / "out"
    calls = iter(range(1000))

    def stop(key: Any, training: Any) -> Any:
        if next(calls) == 10:  # the second client of the second round of the second run
            raise KeyboardInterrupt
        return training

    with monkeypatch.context() as patch:
        runs.before_fit(patch, stop)
        ran = command("compare", path, "--out", out)
    assert ran.code == 130
    assert "stopped with 1 of 2 runs done; the same command goes on from here" in ran.err
    assert len(runs.lines(out / "one" / "seed-1")) == 2
    ran = command("compare", path, "--out", out)
    assert (ran.code, ran.err) == (0, "")
    runs.start(tiny, tmp_path / "alone", rounds=2, seed=1, evaluation__every=1)
    runs.assert_same(out / "one" / "seed-1", tmp_path / "alone")


@pytest.mark.parametrize("jobs", ["1", pytest.param("2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("changed", ["train", "test"])
def test_a_seed_on_other_rows_is_not_put_beside_the_first(
    tiny: Tiny, tmp_path: Path, command: Command, changed: str, jobs: str
) -> None:
    data = {}
    for name, path in (("train", tiny.train), ("test", tiny.test)):
        data[f"data__{name}"] = str(shutil.copy(path, tmp_path / f"{name}.csv"))
    path = tiny.write(tmp_path / "tiny.toml", rounds=1, **data)
    given = ("compare", path, "--methods", "fedit", "--out", tmp_path / "out", "--jobs", jobs)
    assert command(*given, "--seeds", "0").code == 0
    file = tmp_path / f"{changed}.csv"
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace("cars", "CARS", 1), encoding="utf-8")
    ran = command(*given, "--seeds", "0,1,2")
    assert ran.code == 1
    assert "not those of the runs that are there already" in " ".join((ran.out + ran.err).split())
    file.write_text(text, encoding="utf-8")
    assert command(*given, "--seeds", "0,1").code == 0
    recipe = tmp_path / "out" / "fedit" / "seed-1" / rundir.RECIPE
    said = recipe.read_text(encoding="utf-8").replace('train = "', 'train = "0')
    assert said.count('train = "0') == 2  # the file's name, and its digest
    recipe.write_text(said.replace('train = "0/', 'train = "/'), encoding="utf-8")
    ran = command(*given, "--seeds", "0,1")
    assert ran.code == 2
    assert "are not those of" in " ".join(ran.err.split())


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.slow
def test_two_jobs_of_two_workers_end_with_the_bits_of_one_process(
    tiny: Tiny, tmp_path: Path
) -> None:
    def jobs(where: str, **changes: Any) -> list[Job]:
        made = [recipes.check(tiny.table(seed=seed, rounds=2, **changes)) for seed in (0, 1)]
        return [Job(str(r.seed), r, tmp_path / where / str(r.seed)) for r in made]

    engine = {"kind": "processes", "workers": 2, "threads": 1}
    many, one = jobs("many", engine=engine), jobs("one")
    for each, workers in ((many, 2), (one, 1)):
        ended = run_all(each, workers, lambda *_: None, lambda _: None, print)
        assert [outcome.problem for outcome in ended] == [None, None]
    for side, alone in zip(many, one, strict=True):
        runs.assert_same(side.folder, alone.folder)


@pytest.mark.parametrize("key", ["data.train", "data.test", "model.source"])
def test_a_run_of_other_rows_or_another_model_is_not_taken_for_the_asked(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """It has not begun, so that it has no digest yet; what was asked for are relative paths."""
    monkeypatch.chdir(tiny.train.parent)
    table = tiny.table()
    part, name = key.split(".")
    for each in ("data.train", "data.test", "model.source"):
        own, last = each.split(".")
        table[own][last] = os.path.relpath(table[own][last])
    asked = recipes.check(table)
    job = Job("entry", asked, tmp_path / "study" / "entry" / "seed-0")
    job.folder.mkdir(parents=True)
    (job.folder / ASKED).write_text(recipes.dump(asked, {}), encoding="utf-8")
    for log in rundir.LOGS:
        (job.folder / log).touch()
    held = with_whole_paths(asked).model_dump(mode="json", exclude_none=True)
    (job.folder / rundir.RECIPE).write_text(tomli_w.dumps(held), encoding="utf-8")
    refuse_changed([job])
    held[part][name] = str(tmp_path / "another")
    (job.folder / rundir.RECIPE).write_text(tomli_w.dumps(held), encoding="utf-8")
    with pytest.raises(FedSieveError, match=f"was edited: {key} was"):
        refuse_changed([job])


def moved(base: Path) -> None:
    """The same base with other weights."""
    file = base / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file({n: 1.5 * t for n, t in tensors.items()}, file, {"format": "pt"})


def reworded(file: Path) -> None:
    """Other texts under the same labels."""
    text = file.read_text(encoding="utf-8")
    file.write_text(re.sub(r"cars(\d)", r"wine\1", text), encoding="utf-8")


# What may be changed between two calls of a study, how, and what is told then.
CHANGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "base": ("bert", moved, "its base model is not that of"),
    "rows": ("train.csv", reworded, "its training rows are not those of"),
}


def own_copies(tiny: Tiny, folder: Path) -> dict[str, Any]:
    """What of a recipe names copies that a test may change."""
    shutil.copytree(tiny.bert, folder / "bert")
    shutil.copy(tiny.train, folder / "train.csv")
    return {"model__source": str(folder / "bert"), "data__train": str(folder / "train.csv")}


def change(folder: Path, what: str) -> str:
    """Change one of `own_copies`; what a study is to say of it."""
    name, how, said = CHANGES[what]
    how(folder / name)
    return said


TUNED = {"tune": {"grid": {"server.lr": [0.05]}}}


@pytest.mark.parametrize(
    ("table", "gone", "what"),
    kinds.some_of(
        [
            ({"seeds": [0, 1]}, "seed-1", "base"),
            (TUNED, "tune-0-seed-100", "base"),
            (TUNED, "tune-0-seed-100", "rows"),
            (TUNED, "seed-0", "rows"),
            (TUNED, "seed-0", "base"),
            ({"seeds": [0, 1]}, "seed-1", "rows"),
        ]
    ),
)
def test_what_is_run_after_a_change_is_not_put_beside_what_was_before(
    tiny: Tiny, tmp_path: Path, write: Write, command: Command, table: Any, gone: str, what: str
) -> None:
    """Whichever stage is run again: a seed, a trial, or what follows the trials."""
    given = {"rounds": 1, **own_copies(tiny, tmp_path)}
    path, out = write(given, entry=[{"name": "one", "method": "fedit"}], **table), tmp_path / "out"
    assert command("compare", path, "--out", out).code == 0
    shutil.rmtree(out / "one" / gone)
    said = change(tmp_path, what)
    ran = command("compare", path, "--out", out)
    assert ran.code != 0
    assert said in " ".join((ran.out + ran.err).split())


def test_what_is_drawn_from_a_seed_is_no_other_base(
    tiny: Tiny, tmp_path: Path, write: Write, command: Command
) -> None:
    """A head for other classes, and the further ranks of an adapter that is begun from."""
    own = own_copies(tiny, tmp_path)
    config = json.loads((tmp_path / "bert" / "config.json").read_text())
    names = ("good", "bad", "meh")
    config |= {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    (tmp_path / "bert" / "config.json").write_text(json.dumps(config))
    runs.start(tiny, tmp_path / "first", rounds=1, **own)
    given = {"rounds": 1, "lora__start": str(tmp_path / "first" / rundir.ADAPTER), **own}
    more = {"lora.rank": 6, "lora.alpha": 4.0}
    entries = [
        {"name": "one", "method": "fedit"},
        {"name": "two", "method": "fedit", "set": {"lora.alpha": 16.0}},
        {"name": "three", "method": "fedit", "set": more},
    ]
    path = write(given, entry=entries, seeds=[0, 1], **TUNED)
    ran = command("compare", path, "--out", tmp_path / "out")
    assert ran.code == 0, ran.out + ran.err


def test_all_that_was_loaded_is_in_a_bases_digest(tiny: Tiny, tmp_path: Path) -> None:
    """Also what lies outside of what transformers calls the body: all of CLIP's does."""
    found = {}
    for number in range(2):
        torch.manual_seed(number)
        size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        vision = {**size, "intermediate_size": 32, "image_size": 16, "patch_size": 8}
        text = {**size, "intermediate_size": 32, "vocab_size": 99, "max_position_embeddings": 8}
        config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=8)
        folder = str(tmp_path / str(number))
        transformers.CLIPModel(config).save_pretrained(folder)
        for seed in range(2):
            base = load_base(folder, "image-classification", ("a", "b"), key=Key(seed))
            found[number, seed] = base_digest(base, folder).whole
    assert found[0, 0] == found[0, 1] != found[1, 0]


def test_an_older_run_says_nothing_of_its_base_and_is_passed_by(
    tiny: Tiny, tmp_path: Path, write: Write, command: Command
) -> None:
    path = write({"rounds": 1}, entry=[{"name": "one", "method": "fedit"}])
    assert command("compare", path, "--out", tmp_path / "out").code == 0
    recipe = tmp_path / "out" / "one" / "seed-0" / rundir.RECIPE
    lines = recipe.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith("base = ")]
    assert len(kept) == len(lines) - 1
    recipe.write_text("".join(kept), encoding="utf-8")
    assert command("compare", path, "--out", tmp_path / "out", "--seeds", "0,1").code == 0


def test_runs_that_ask_for_the_same_rows_have_the_same(tiny: Tiny, tmp_path: Path) -> None:
    """And where their rows differ, by whatever a recipe may say, they ask for others. What is
    trained on is asked for by itself: of it there is one in all stages of a study.
    """
    drawn = {"kind": "dirichlet", "clients": 4, "alpha": 1.0}
    asked, digests = [], []
    for seed in (0, 1):
        for changes in (
            {"partition": drawn},
            {"partition": drawn | {"alpha": 9.0}, "lora__rank": 2, "rounds": 9},
            {"partition": drawn | {"by": "author"}},
            {"partition": {"kind": "column", "column": "author"}},
            {"data__max_length": 7},
            {"data__test": None},
            {"data__validation": 0.2},
            {"data__validation": 0.2, "evaluation__on": "validation"},
            {"evaluation__limit": 9},
            {"evaluation__every": 3},
        ):
            recipe = recipes.check(tiny.table(**{**changes, "seed": seed}))
            asked.append(asked_for(Job("", recipe, tmp_path)))
            digests.append(digest_of_rows(recipe))
    for one in range(len(asked)):
        for other in range(len(asked)):
            for part in ("train", "test"):
                same = getattr(asked[one], part) == getattr(asked[other], part)
                assert not same or getattr(digests[one], part) == getattr(digests[other], part)
    assert asked[0] == asked[1] == asked[9] == asked[10] == asked[19]
    assert asked[6].train == asked[7].train == asked[17].train
    assert asked[0].train == asked[8].train
    assert len({each.base for each in asked}) == 1
    assert len({*digests}) > 7


def test_what_fails_is_told_at_the_end_and_does_not_stop_the_others(
    write: Write, tmp_path: Path, command: Command
) -> None:
    path, out = (
        write(
            {"rounds": 1},
            entry=[
                {"name": "too much", "set": {"lora.rank": 99}, "grid": []},
                {"name": "diverges", "set": {"training.lr": 1e30}, "grid": []},
                {"name": "sometimes", "grid": {"training.lr": [1e30, 0.01]}},
                {"name": "always", "grid": {"training.lr": [1e30, 1e29]}},
            ],
            tune={"grid": {"training.lr": [0.1]}},
            set={"training.steps": 3},
        ),
        tmp_path / "out",
    )
    for done in (0, 1):  # what diverged is not run again
        ran = command("compare", path, "--out", out)
        assert ran.code == 1
        assert "failed: too much/seed-0: lora.rank 99 is larger than a side of" in ran.err
        assert "failed: diverges/seed-0: round 1: no client returned" in ran.err
        assert "failed: always: none of its trials has won, so it was not run" in ran.err
        assert ran.err.count("failed: ") == 3
        assert ("4 trials, 4 of them done already" in ran.out) == bool(done)
    told = json.loads((out / "tuning.json").read_text())["entries"]
    assert [trial["score"] is None for trial in told["sometimes"]["trials"]] == [True, False]
    assert told["sometimes"]["best"] == 1
    assert told["always"]["best"] is None
    table = json.loads((out / "table.json").read_text())
    assert [row["label"] for row in table["rows"]] == ["sometimes"]
    assert len(table["problems"]) == 3


@pytest.mark.slow
def test_several_at_once_and_sigterm(
    write: Write, tiny: Tiny, tmp_path: Path, command: Command
) -> None:
    """Two workers, told to stop in the middle: both keep their state, and none is left over."""
    rounds = 400
    path = write({"rounds": rounds, "evaluation__every": 400}, seeds=[0, 1], entry=[{"name": "a"}])
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "fedsieve", "compare", path, "--out", out, "--jobs", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    folders = [out / "a" / f"seed-{seed}" for seed in (0, 1)]
    until = time.monotonic() + 100
    while not all((f / rundir.METRICS).exists() and len(runs.lines(f)) > 4 for f in folders):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    workers = children(process.pid)
    assert len(workers) == 2
    process.send_signal(signal.SIGTERM)
    said, problems = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped with 0 of 2 runs done" in problems
    assert "stopping: 2 runs under way saved first" in said
    assert "Traceback" not in said + problems
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    for seed, folder in enumerate(folders):
        lines = runs.untimed(folder, rundir.METRICS)
        assert 3 < len(lines) < rounds
        # The rounds so far are those of a run on its own.
        alone = tmp_path / f"alone-{seed}"
        with pytest.raises(Stopped):
            runs.start(
                tiny,
                alone,
                runs.stop_at(3),
                rounds=rounds,
                evaluation__every=400,
                seed=seed,
            )
        assert lines[:4] == runs.untimed(alone, rundir.METRICS)


OWN = """
import os, subprocess
def train(model, rows, seed):
    subprocess.run(["sh", "-c", "echo taught; cat"], timeout=20)  # cat ends where stdin does
    os.write(1, b"taught\\n")
    return 1.0
"""


@pytest.mark.slow
def test_what_a_worker_prints_is_none_of_its_answers(tiny: Tiny, tmp_path: Path) -> None:
    """Programs that it starts had its own output, and its requests: a study waited without end."""
    (tmp_path / "own.py").write_text(OWN, encoding="utf-8")
    table = tiny.table(rounds=1, cohort=1, training={"function": "own:train"})
    asked = {"name": "a", "recipe": table, "folder": str(tmp_path / "run"), "ground": (None,) * 3}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "fedsieve.study.jobs"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        input=json.dumps(asked) + "\n",
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["round"]["round"] for answer in answers[:-1]] == [0, 1]
    assert answers[-1] == {"problem": None}
    assert done.stderr.count("taught") == 2


def test_an_answer_that_cannot_be_read_fails_its_run_by_name(
    write: Write, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody heard of the run any more, and the study waited for it without end."""

    def cut(*_: object) -> str | None:
        raise ValueError("half a line")

    monkeypatch.setattr(jobs, "_told", cut)
    monkeypatch.setattr(sys, "executable", shutil.which("true"))
    path = write({"rounds": 1}, seeds=[0, 1], entry=[{"name": "a"}])
    ran = command("compare", path, "--out", tmp_path / "out", "--jobs", "2")
    assert ran.code == 1
    for seed in (0, 1):
        assert re.search(rf"failed: a/seed-{seed}: .*half a line", ran.err)


def children(parent: int) -> list[int]:
    """The processes that a process has started and that are still there."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                stat = (folder / "stat").read_text()
            except OSError:
                continue  # it has ended
            if int(stat.rpartition(")")[2].split()[1]) == parent:
                found.append(int(folder.name))
    return found


# --- studies that are wrong

ENTRY = {"name": "a", "method": "fedit"}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "entry: this key is needed"),
    ({"entry": []}, "entry: Tuple should have at least 1 item"),
    ({"entry": [{"method": "fedit"}]}, "entry.0.name: this key is needed"),
    ({"entry": [ENTRY], "sedes": [1]}, "sedes: unknown key (did you mean 'seeds'"),
    ({"entry": [{**ENTRY, "metod": 1}]}, "entry.0.metod: unknown key (did you mean 'method'"),
    ({"entry": [ENTRY], "tune": {"gird": {}}}, "tune.gird: unknown key (did you mean 'grid'"),
    ({"entry": [ENTRY], "seeds": []}, "seeds: Tuple should have at least 1 item"),
    ({"entry": [ENTRY], "seeds": [-1]}, "seeds.0: Input should be greater than or equal to 0"),
    ({"entry": [ENTRY], "target": 2.0}, "target: Input should be less than or equal to 1"),
    *(
        ({"entry": [ENTRY, {"name": name}]}, f"two entries are called '{name}'")
        for name in ("A", "a ")
    ),
    ({"entry": [ENTRY], "tune": {"grid": {}, "seeds": []}}, "tune.seeds: Tuple should have at"),
    *(
        (
            {"entry": [{**ENTRY, **own}], **more},
            f"{where}.grid: 'server.lr' has no values to try",
        )
        for where, own, more in (
            ("tune", {}, {"tune": {"grid": {"server.lr": []}}}),
            ("entry.0", {"grid": {"server.lr": []}}, {"tune": {"grid": {}}}),
        )
    ),
    ({"entry": [{"name": "../a"}]}, "entry '../a': a name is letters"),
    *(
        ({"entry": [{"name": name}]}, f"entry '{name}': its runs go into a folder of that name")
        for name in ("report.html", "Table.json", "table.md", "tuning.json", "x" * 101)
    ),
    ({"entry": [{"name": "/" * 200_000}]}, "//: a name is letters"),
    ({"entry": [{"name": "x" * 200_000}]}, "xx: its runs go into a folder of that name"),
    ({"entry": [{"name": "a", "method": "fedti"}]}, "unknown method 'fedti' (did you mean 'fedit'"),
    ({"entry": [ENTRY], "set": {"rouns": 3}}, "rouns: unknown key (did you mean 'rounds'"),
    ({"entry": [{**ENTRY, "set": {"method.hed": 1}}]}, "method.hed: unknown key"),
    ({"entry": [{**ENTRY, "set": {"rounds.x": 1}}]}, "set.rounds.x: 'x' is not a key of a table"),
    (
        {"entry": [ENTRY], "tune": {"grid": {"server.rl": [1, 2]}}},
        "server.rl: unknown key (did you mean 'lr'",
    ),
    (
        {
            "entry": [ENTRY, {"name": "b", "grid": [{"server.lr": 1}]}],
            "tune": {"grid": {"server.lr": [0.1, 0.2], "training.lr": [0.1, 0.2]}},
        },
        "every tuned entry must have the same number of trials, or the one with more has the "
        "better chance (a 4, b 1)",
    ),
    (
        {
            "entry": [
                {"name": f"e{n}", "grid": [{"server.lr": 1}] * (n % 3 + 1)} for n in range(999)
            ],
            "tune": {"grid": {}},
        },
        "has the better chance (e0 1, e1 2, e2 3)",
    ),
    *(
        ({"entry": [{**ENTRY, "set": {name: value}}]}, f"{name} is a table of the recipe, and not")
        for name in ("method", "server", "data", "evaluation")
        for value in ("adam", 5, ["lr"])
    ),
    (
        {"entry": [ENTRY], "tune": {"grid": {"server.lr": [1]}, "set": {"method": "x"}}},
        "method is a table of the recipe",
    ),
    (
        {"entry": [ENTRY], "tune": {"grid": {"method": ["fedit", "flasc"]}}},
        "method.name: give each method an [[entry]] of its own",
    ),
    (
        {"entry": [ENTRY], "tune": {"grid": [{"server.lr": 1}] * 10_001}},
        "grid: 10,001 trials of each seed: at most 10,000",
    ),
    (
        {
            "entry": [ENTRY, {**ENTRY, "name": "other", "seeds": list(range(600))}],
            "tune": {"grid": {"server.lr": [1] * 50}, "seeds": list(range(100))},
        },
        "10,601 runs in all, 10,000 of them trials: at most 10,000",
    ),
    (
        {"entry": [{**ENTRY, "name": f"e{n}"} for n in range(1001)]},
        "entry: Tuple should have at most 1000 items",
    ),
    ({"entry": [{**ENTRY, "name": 5}]}, "entry.0.name: Input should be a valid string (it is 5)\n"),
    ({"entry": [ENTRY], "seeds": ["x"]}, "seeds.0: Input should be a valid integer"),
    ({"entry": [ENTRY], "seeds": []}, "seeds: Tuple should have at least 1 item"),
    ({"entry": [ENTRY], "recipe": "r" * 200_000}, "rrr' can be no path: File name too long"),
    ({"entry": [ENTRY], "recipe": "demmo"}, "no recipe is called 'demmo' (did you mean 'demo'"),
]


@pytest.mark.parametrize(("table", "message"), WRONG, ids=[each[1] for each in WRONG])
def test_a_wrong_study_is_refused_before_anything_is_run(
    write: Write, tmp_path: Path, command: Command, table: dict[str, Any], message: str
) -> None:
    ran = command("compare", write(**table), "--out", tmp_path / "out")
    assert ran.code == 2
    assert message in ran.err
    assert "not 0" not in ran.err or ".0" not in ran.err  # no list is empty that has an entry
    assert len(ran.err) < 2000
    assert not (tmp_path / "out").exists()


def test_words_that_make_no_comparison(write: Write, tiny: Tiny, command: Command) -> None:
    path = write(entry=[ENTRY])
    ran = command("compare", path, "--methods", "fedit")
    assert ran.code == 2
    assert "is a study: its methods are its [[entry]] tables" in ran.err
    ran = command("compare", path, "--seeds", "one")
    assert ran.code == 2
    assert "whole numbers with commas" in ran.err
    ran = command("compare", path, "--seeds", ",".join(map(str, range(1001))))
    assert ran.code == 2
    assert "--seeds: 1,001 seeds: at most 1,000" in ran.err
    recipe = tiny.write(path.with_name("r.toml"))
    ran = command("compare", recipe, "--methods", ",".join(["fedit"] * 1001))
    assert ran.code == 2
    assert "--methods: 1,001 methods: at most 1,000" in ran.err


@pytest.mark.parametrize("methods", [(), ("--methods", "fedit,flasc")])
@pytest.mark.parametrize("given", ['method = "fedit"', "method = 5", "[[method]]"])
def test_a_method_that_is_no_table_is_told(
    given: str, methods: tuple[str, ...], tmp_path: Path, command: Command
) -> None:
    path = tmp_path / "r.toml"
    path.write_text(f'{given}\n[model]\nsource = "x"\n')
    ran = command("compare", path, *methods, "--out", tmp_path / "out")
    assert ran.code == 2
    assert "method is a table of the recipe, and not" in " ".join(ran.err.split())


# --- one recipe for many methods


def test_options_of_other_methods_and_servers_are_left_out(write: Write, tmp_path: Path) -> None:
    path = write(
        {"method": {"name": "flasc", "head": "whole", "down_values": "int8"}, "budgets": [{}]},
        entry=[
            {"name": "dense", "method": "fedit", "set": {"server.optimizer": "sgd"}},
            {"name": "sieved"},
        ],
        set={"server": {"beta1": 0.5, "lr": 0.25}},
    )
    dense, sieved = study.plan(str(path), tmp_path / "out").entries
    of_dense, of_sieved = study.recipe_of(dense, {}, 0), study.recipe_of(sieved, {}, 0)
    assert of_dense.method.model_extra == {"down_values": "int8"}
    assert of_dense.server.model_extra == {"lr": 0.25}
    assert of_sieved.method.model_extra == {"head": "whole", "down_values": "int8"}
    assert of_sieved.server.model_extra == {"lr": 0.25, "beta1": 0.5}
    assert dense.notes == ("has no method.head", "has no server.beta1")
    assert sieved.notes == ()


def test_which_settings_win(write: Write, tmp_path: Path) -> None:
    """The recipe, [set], the command line, the entry, [tune] and at last what is tried."""
    path = write(
        set={"training.batch": 3, "training.steps": 3, "training.epochs": 3, "training.lr": 3},
        entry=[{"name": "a", "set": {"training.epochs": 5, "training.lr": 5}}],
        tune={"grid": {"training.lr": [7]}, "set": {"training.epochs": 6}},
    )
    plan = study.plan(
        str(path), tmp_path / "out", overrides=["training.steps=4", "training.epochs=4"]
    )
    (trial,), (final,) = study.trial_jobs(plan), study.final_jobs(plan, {"a": {"training.lr": 7}})
    told = [(t.batch, t.steps, t.epochs, t.lr) for t in (j.recipe.training for j in (trial, final))]
    assert told == [(3, 4, 6, 7), (3, 4, 5, 7)]
    assert final.recipe.rounds == 2
    # Without a winner an entry that is to be tuned has no runs.
    assert study.final_jobs(plan, {}) == []


BUDGETS: list[Any] = [
    [{"ratio": 0.5, "down": 0.25, "up": 0.125}, {"share": 2.0}],
    {"kind": "list", "clients": [{"rank": 2, "up": 0.5}, {"ratio": 0.5, "down": 0.5}]},
    {"kind": "list", "clients": {"0001": {"rank": 2, "up": 0.5, "down": 0.5}}},
    {"kind": "tiers", "tiers": 2},
    {"kind": "tiers", "tiers": 2, "by": "rank"},
    {"kind": "tiers", "tiers": 2, "by": "density"},
    {"kind": "ratios", "down": 0.25, "up": 0.5},
    {"kind": "normal", "low": 1, "high": 4, "down": 0.25, "up": 0.5},
    {"kind": "heavy-tail", "low": 1, "high": 4, "up": 0.5},
]


@pytest.mark.parametrize("method", methods.names())
@pytest.mark.parametrize("budgets", BUDGETS, ids=str)
def test_any_budgets_serve_any_method(tiny: Tiny, budgets: Any, method: str) -> None:
    """What a method uses is as it was, what it does not is 1: then the recipe is accepted."""
    table = tiny.table(budgets=budgets, method={"name": method})
    parsed = recipes.parse(table)
    knobs = knobs_of(parsed)
    limited = limits_said(parsed.budgets, knobs)
    unused = [knob for knob in limited if knob not in knobs]
    if not unused:
        recipes.check(table)
        return
    with pytest.raises(FedSieveError, match="makes no use of it"):
        recipes.check(table)
    fitted = recipes.check({**table, "budgets": study.without(budgets, unused)})
    left = limits_said(fitted.budgets, knobs)
    assert sorted(left) == sorted(set(limited) - set(unused))
    for knob in left:
        assert values(fitted.budgets, knob) == values(parsed.budgets, knob)


def values(budgets: Any, knob: str) -> Iterable[Any]:
    """Every value that a budgets table gives for a knob, in order."""
    if isinstance(budgets, tuple):
        return [getattr(tier, knob) for tier in budgets]
    if budgets.kind == "tiers":
        return [0.25, 1.0]  # of two tiers, whatever they differ in
    if budgets.kind == "list":
        return [
            (getattr(each, knob), each.rank if knob == "ratio" else None)
            for each in schema.limits_by_id(budgets).values()
        ]
    if knob == "ratio":
        return [budgets.model_dump(exclude={"down", "up"})]
    return [getattr(budgets, knob)]


ODD_STUDIES: dict[str, tuple[dict[str, Any], str]] = {
    "seeds that are tried": ({"tune": {"grid": {"seed": [1, 2]}}}, "seed: a study has `seeds`"),
    "a seed that is set": ({"set": {"seed": 7}}, "seed: a study has `seeds`"),
    "what trials are judged on": (
        {"tune": {"grid": [{"evaluation": {"on": "test"}}]}}, "evaluation.on: trials are judged",
    ),
    "methods that are tried": (
        {"tune": {"grid": {"method.name": ["flasc", "fedit"]}}}, "method.name: give each method",
    ),
    "no table of rows": ({"set": {"data": 5}, "tune": {"grid": {}}}, "data is a table"),
    "no table of evaluation": ({"set": {"evaluation": "x"}}, "evaluation is a table"),
    "no table of a method": ({"set": {"method": "x"}}, "method is a table"),
    "no share": (
        {"set": {"data.validation": "x"}, "tune": {"grid": {}}}, "data.validation is 'x'",
    ),
    "too many trials": (
        {"tune": {"grid": {f"training.{n}": [*range(100)] for n in "abcdef"}}},
        "1,000,000,000,000 trials",
    ),
}  # fmt: skip


@pytest.mark.parametrize("odd", ODD_STUDIES)
def test_a_study_that_would_do_another_thing_than_it_says_is_refused(
    tiny: Tiny, tmp_path: Path, odd: str
) -> None:
    table, said = ODD_STUDIES[odd]
    tiny.write(tmp_path / "tiny.toml", rounds=1)
    given = {"recipe": "tiny.toml", "entry": [{"name": "a", "method": "fedit"}], **table}
    (tmp_path / "study.toml").write_text(tomli_w.dumps(given), encoding="utf-8")
    with pytest.raises(FedSieveError, match=re.escape(said)):
        study.plan(str(tmp_path / "study.toml"), tmp_path / "out")


@pytest.mark.parametrize(
    ("what", "lost"), kinds.some_of([("null", 0), ("null", 1), ("NaN", 0), ("NaN", 1)])
)
def test_a_trial_whose_score_is_no_number_has_lost_and_no_other(
    write: Write, tmp_path: Path, command: Command, lost: int, what: str
) -> None:
    """Whichever of them it is: of all comparisons with such a one nothing is true."""
    tune = {"grid": {"server.lr": [0.02, 0.05]}, "seeds": [100]}
    path, out = write(seeds=[0], entry=[{"name": "a"}], tune=tune), tmp_path / "out"
    assert command("compare", path, "--out", out).code == 0
    log = out / "a" / f"tune-{lost}-seed-100" / rundir.METRICS
    rows = runs.lines(log.parent)
    for row in rows:
        row["metrics"] = dict.fromkeys(row["metrics"], math.nan)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    log.write_text(text.replace("NaN", what), encoding="utf-8")
    shutil.rmtree(out / "a" / "seed-0")
    ran = command("compare", path, "--out", out)
    assert ran.code == 0, ran.err
    told = json.loads((out / "tuning.json").read_text())["entries"]["a"]
    assert told["best"] == 1 - lost
    assert told["trials"][lost]["score"] is None


def test_without_tuning_runs_may_be_evaluated_on_rows_that_are_held_back(
    tiny: Tiny, tmp_path: Path
) -> None:
    """Where there are no other rows: with trials, these would have been chosen by the same."""
    tiny.write(tmp_path / "tiny.toml", rounds=1, data__validation=0.2)
    given = {
        "recipe": "tiny.toml",
        "entry": [{"name": "a", "method": "fedit"}],
        "set": {"evaluation.on": "validation"},
    }
    (tmp_path / "study.toml").write_text(tomli_w.dumps(given), encoding="utf-8")
    plan = study.plan(str(tmp_path / "study.toml"), tmp_path / "out")
    assert [entry.table["evaluation"]["on"] for entry in plan.entries] == ["validation"]


@contextmanager
def ended_in(seconds: int) -> Iterator[None]:
    """Raises TimeoutError for what takes longer."""

    def late(*given: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_a_pipe_as_a_studys_recipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.toml")
    given = {"recipe": "pipe.toml", "entry": [{"name": "a", "method": "fedit"}]}
    (tmp_path / "study.toml").write_text(tomli_w.dumps(given), encoding="utf-8")
    for source in ("study.toml", "pipe.toml"):
        with pytest.raises(FedSieveError):
            study.plan(str(tmp_path / source), tmp_path / "out")


@pytest.mark.parametrize("kind", ["a pipe", "a folder"])
@pytest.mark.parametrize(
    "name", [ASKED, DIVERGED, FAILED, rundir.RECIPE, rundir.METRICS, rundir.CLIENTS, rundir.LOCK]
)
def test_what_is_no_file_in_a_studys_run_is_not_waited_for(
    tiny: Tiny, tmp_path: Path, command: Command, name: str, kind: str
) -> None:
    tiny.write(tmp_path / "tiny.toml", rounds=1)
    given = {"recipe": "tiny.toml", "entry": [{"name": "a", "method": "fedit"}], "seeds": [0]}
    (tmp_path / "study.toml").write_text(tomli_w.dumps(given), encoding="utf-8")
    folder = tmp_path / "out" / "a" / "seed-0"
    folder.mkdir(parents=True)
    make = os.mkfifo if kind == "a pipe" else os.mkdir
    make(folder / name)
    with ended_in(60):
        ran = command("compare", tmp_path / "study.toml", "--out", tmp_path / "out")
    assert (folder / name).is_file() if ran.code == 0 else name in ran.err
    assert "Traceback" not in ran.err


def test_what_a_job_left_is_read_whatever_is_in_it(tiny: Tiny, tmp_path: Path) -> None:
    job = Job("a", recipes.check(tiny.table(rounds=1)), tmp_path / "a")
    runs.start_from(job.recipe, job.folder)
    assert not finished(job)
    (job.folder / rundir.REPORT).touch()
    assert finished(job)
    shutil.rmtree(job.folder / rundir.ADAPTER)
    (job.folder / rundir.ADAPTER).mkdir()
    assert not finished(job)  # it is made again
    (job.folder / DIVERGED).write_bytes(b"\xff\xfe lost")
    assert "lost" in str(diverged(job))
