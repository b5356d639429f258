"""What became of a study's runs is on the disk, where another process can see it."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import tomli_w

from fedsieve.errors import FedSieveError
from fedsieve.recipe import read as recipes
from fedsieve.run import rundir
from fedsieve.study import parts
from fedsieve.study.jobs import Job, Outcome, refuse_changed, run_all
from fedsieve.study.parts import FAILED
from tests.conftest import Command, Tiny


@pytest.fixture(autouse=True)
def blank_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports take longer than the runs: a blank one is there."""
    monkeypatch.setattr("fedsieve.report.write", lambda _, out, **given: out.write_bytes(b""))


def run_once(jobs: Sequence[Job]) -> list[str | None]:
    """What each run's problem is, of a study that is called once."""
    return [outcome.problem for outcome in run_all(jobs, 1, lambda *_: None, lambda _: None, print)]


def states(study: Path) -> list[str]:
    return [line.split()[0] for line in parts.of_study(study).lines[1:]]


def test_a_run_that_failed_says_so_until_it_is_done(tiny: Tiny, tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    tables = {"good": tiny.table(rounds=1), "bad": tiny.table(rounds=1, data__train=str(rows))}
    jobs = [
        Job(f"{name}/seed-0", recipes.check(table), tmp_path / "study" / name / "seed-0")
        for name, table in tables.items()
    ]
    seen: list[list[str]] = []

    def end(outcome: Outcome) -> None:
        seen.append(parts.of_study(tmp_path / "study").lines)

    good, bad = run_all(jobs, 1, lambda job, summary: None, end, print)
    assert good.problem is None
    assert bad.problem is not None
    assert [line.split()[0] for line in seen[0][1:]] == ["waiting", "done"]
    assert [line.split()[0] for line in seen[1][1:]] == ["failed", "done"]
    assert str(rows) in seen[1][1]
    shutil.copy(tiny.train, rows)
    assert run_once(jobs) == [None, None]
    assert not list(tmp_path.rglob(FAILED))


def test_a_run_that_was_killed_before_its_report_is_ended_by_the_same_command(
    tiny: Tiny, tmp_path: Path
) -> None:
    study = tmp_path / "study"
    job = Job("a/seed-0", recipes.check(tiny.table(rounds=1)), study / "a" / "seed-0")
    assert run_once([job]) == [None]
    before = (job.folder / rundir.METRICS).read_bytes()
    (job.folder / rundir.REPORT).unlink()
    (study / parts.TABLES[0]).write_text("{}", encoding="utf-8")
    assert not parts.of_study(study).ended
    assert run_once([job]) == [None]
    assert (job.folder / rundir.REPORT).is_file()
    assert (job.folder / rundir.METRICS).read_bytes() == before
    assert parts.of_study(study).ended


def test_a_run_that_another_process_works_on_has_not_failed(tiny: Tiny, tmp_path: Path) -> None:
    study = tmp_path / "study"
    job = Job("a/seed-0", recipes.check(tiny.table(rounds=1)), study / "a" / "seed-0")
    with rundir.lock(job.folder):
        (problem,) = run_once([job])
    assert "another process is working on the run" in str(problem)
    assert not (job.folder / FAILED).exists()
    assert states(study) == ["waiting"]


def test_a_failure_is_over_when_the_run_is_done(tiny: Tiny, tmp_path: Path) -> None:
    """Also one that was gone on with by itself, and whose study never removed the mark."""
    study = tmp_path / "study"
    job = Job("a/seed-0", recipes.check(tiny.table(rounds=1)), study / "a" / "seed-0")
    assert run_once([job]) == [None]
    (job.folder / FAILED).write_text("no memory", encoding="utf-8")
    assert states(study) == ["done"]
    assert run_once([job]) == [None]
    assert not (job.folder / FAILED).exists()
    # What is damaged has failed, for the reason that is told.
    (job.folder / FAILED).write_text("no memory", encoding="utf-8")
    (job.folder / rundir.METRICS).write_text("[]\n{}\n", encoding="utf-8")
    assert states(study) == ["failed"]


def test_a_studys_folder_that_is_a_runs_is_refused_before_anything_is_written(
    tiny: Tiny, tmp_path: Path, command: Command, whole: Path
) -> None:
    """Its report would be replaced. A recipe of the user's own may lie there."""
    path, out = tiny.write(tmp_path / "recipe.toml", rounds=1), tmp_path / "run"
    figure = {"title": "T", "claim": "C.", "small": [{"name": "p", "recipe": "recipe.toml"}]}
    figure |= {"paper": figure["small"], "entry": [{"name": "a", "method": "fedit"}]}
    (tmp_path / "figure.toml").write_text(tomli_w.dumps(figure), encoding="utf-8")
    asked: list[list[str | Path]] = [
        ["compare", path, "--methods", "fedit"],
        ["search", path, "--budget-mb", "1", "--density", "0.25", "method.name=flasc"],
        ["reproduce", tmp_path / "figure.toml"],
    ]
    for left in (rundir.METRICS, rundir.RECIPE):  # a run that has lost its log is one, too
        shutil.copytree(whole, out, dirs_exist_ok=True)
        for name in {rundir.METRICS, rundir.RECIPE} - {left}:
            (out / name).unlink()
        before = sorted(out.rglob("*"))
        for given in asked:
            ran = command(*given, "--out", out)
            assert ran.code == 2, (given, ran.out)
            assert "holds a run of its own: choose another --out" in " ".join(ran.err.split())
        assert sorted(out.rglob("*")) == before
    assert command("compare", path, "--methods", "fedit", "--out", tmp_path).code == 0


def test_a_link_in_the_place_of_a_mark_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "study" / "entry" / "seed-0"
    folder.mkdir(parents=True)
    (folder / FAILED).symlink_to(tmp_path / "elsewhere")
    (folder / parts.ASKED).write_text("", encoding="utf-8")
    with pytest.raises(FedSieveError, match="symbolic link"):
        refuse_changed([Job("entry", recipes.check(tiny.table()), folder)])
    with pytest.raises(FedSieveError, match="symbolic link"):
        parts.of_study(tmp_path / "study")
