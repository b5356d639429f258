"""A recipe that was edited between stop and resume: refused by the name of what was changed.

A checkpoint holds the recipe by which its rounds were trained. What only says where things are may
change, since runs are moved; all else would make of the run something that no recipe describes.
"""

import shutil
from pathlib import Path

import pytest

from fedsieve.run import rundir
from tests import runs
from tests.conftest import Command, Tiny


@pytest.fixture(autouse=True)
def no_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports, also of comparisons, take longer than the runs."""
    monkeypatch.setattr("fedsieve.report.write", lambda *_, **__: [])


@pytest.fixture(scope="module")
def stopped(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("edited") / "run"
    with pytest.raises(BaseException, match="stopped after round 2"):
        runs.start(tiny, folder, runs.stop_at(2))
    return folder


@pytest.fixture
def mine(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "run"))


@pytest.fixture
def own_rows(tiny: Tiny, tmp_path: Path) -> Path:
    """A run that was stopped, over files of its own beside it."""
    data = {}
    for name, path in (("train", tiny.train), ("test", tiny.test)):
        data[f"data__{name}"] = str(shutil.copy(path, tmp_path / f"{name}.csv"))
    folder = tmp_path / "run"
    with pytest.raises(BaseException, match="stopped after round 2"):
        runs.start(tiny, folder, runs.stop_at(2), **data)
    return folder


def test_clients_that_are_trained_together_are_named(mine: Path, command: Command) -> None:
    """All else of [engine] says where clients run, and may be another (tests/engine/test_pool.py);
    this one trains another adapter.
    """
    recipe = mine / rundir.RECIPE
    text = recipe.read_text(encoding="utf-8")
    assert text.count("together = 1\n") == text.count('kind = "process"\n') == 1
    recipe.write_text(text.replace("together = 1", "together = 2"), encoding="utf-8")
    ran = command("resume", mine)
    assert ran.code == 2
    assert "engine.together was 1 and is 2" in " ".join(ran.err.split())


@pytest.mark.parametrize(
    ("name", "said"), [("train", "training rows"), ("test", "rows that are evaluated on")]
)
def test_rows_that_were_changed_are_refused(
    own_rows: Path, name: str, said: str, command: Command
) -> None:
    """One letter of one row: figures of both would be of neither."""
    file = own_rows.parent / f"{name}.csv"
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace("car", "cat", 1), encoding="utf-8")
    before = {p: p.read_bytes() for p in own_rows.rglob("*") if p.is_file()}
    ran = command("resume", own_rows)
    assert ran.code == 2
    assert f"the {said} were changed" in " ".join(ran.err.split())
    assert {p: p.read_bytes() for p in own_rows.rglob("*") if p.is_file()} == before
    if name == "test":
        file.write_text(text, encoding="utf-8")
        assert command("resume", own_rows).code == 0
        return
    ran = command("resume", own_rows, "--accept-changes")
    assert ran.code == 0
    assert f"the {said} were changed" in " ".join(ran.err.split())


EDITS = {
    "seed": ("seed = 0", "seed = 1"),
    "rounds": ("rounds = 4", "rounds = 6"),
    "cohort": ("cohort = 3", "cohort = 4"),
    "lora.rank": ("rank = 4", "rank = 5"),
    "training.lr": ("lr = 0.03", "lr = 0.3"),
    "server.lr": ("lr = 0.02", "lr = 0.2"),
    "partition.alpha": ("alpha = 1.0", "alpha = 9.0"),
    "data.max_length": ("max_length = 16", "max_length = 8"),
    "training.batch": ("batch = 8", "batch = 4"),
}


@pytest.mark.parametrize("key", EDITS)
@pytest.mark.parametrize("name", ["resume", "export"])
def test_an_edit_is_refused_by_its_name(
    name: str, key: str, mine: Path, tmp_path: Path, command: Command
) -> None:
    path = mine / rundir.RECIPE
    text = path.read_text(encoding="utf-8")
    assert EDITS[key][0] in text
    path.write_text(text.replace(*EDITS[key]), encoding="utf-8")
    before = {p: p.read_bytes() for p in mine.rglob("*") if p.is_file()}
    to = ("--to", str(tmp_path / "to")) if name == "export" else ()
    ran = command(name, mine, *to)
    assert ran.code == 2, ran
    assert f"{key} was" in " ".join(ran.err.split())
    assert "--accept-changes" in ran.err
    assert {p: p.read_bytes() for p in mine.rglob("*") if p.is_file()} == before


def test_an_edit_is_taken_if_that_is_asked_for_and_named(mine: Path, command: Command) -> None:
    path = mine / rundir.RECIPE
    path.write_text(path.read_text().replace(*EDITS["training.lr"]))
    ran = command("resume", mine, "--accept-changes")
    assert ran.code == 0, ran
    assert "training.lr was 0.03 and is 0.3" in " ".join(ran.err.split())


@pytest.mark.parametrize("how", ["a comment", "another order of the same"])
def test_what_says_the_same_is_no_edit(how: str, mine: Path, whole: Path, command: Command) -> None:
    path = mine / rundir.RECIPE
    text = path.read_text(encoding="utf-8")
    if how == "a comment":
        text = "# mine\n" + text
    else:
        text = text.replace("seed = 0\n", "").replace("rounds = 4", "rounds = 4\nseed = 0", 1)
    path.write_text(text, encoding="utf-8")
    assert command("resume", mine).code == 0
    runs.assert_same(mine, whole)


def test_files_that_were_moved_are_no_edit(
    mine: Path, whole: Path, tiny: Tiny, tmp_path: Path, command: Command
) -> None:
    moved = tmp_path / "moved.csv"
    shutil.copy(tiny.train, moved)
    path = mine / rundir.RECIPE
    path.write_text(path.read_text().replace(str(tiny.train), str(moved)))
    ran = command("resume", mine)
    if ran.code == 0:  # what is there is the same
        runs.assert_same(mine, whole)
    else:
        assert "data.train was" in " ".join(ran.err.split())


def test_a_comparison_s_recipe_that_was_edited_is_refused(
    tiny: Tiny, tmp_path: Path, command: Command
) -> None:
    recipe, out = tiny.write(tmp_path / "r.toml", rounds=1), tmp_path / "study"
    words = ("compare", recipe, "--seeds", "0", "--out", out)
    assert command(*words).code == 0
    (run,) = {path.parent for path in out.rglob(rundir.RECIPE)}
    for name in ("asked.toml", rundir.RECIPE):
        path = run / name
        text = path.read_text(encoding="utf-8")
        assert "lr = 0.03" in text
        path.write_text(text.replace("lr = 0.03", "lr = 0.3"), encoding="utf-8")
        ran = command(*words)
        assert ran.code == 2
        assert "training.lr" in ran.err
        path.write_text(text, encoding="utf-8")
    assert command(*words).code == 0
