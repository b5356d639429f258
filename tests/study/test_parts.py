"""What became of a study's runs is on the disk, where another process can see it."""

import shutil
from pathlib import Path

import pytest

from fedsieve.errors import FedSieveError
from fedsieve.recipe import read as recipes
from fedsieve.study import parts
from fedsieve.study.jobs import Job, Outcome, refuse_changed, run_all
from fedsieve.study.parts import FAILED
from tests.conftest import Tiny

pytestmark = pytest.mark.usefixtures("no_report")


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

    good, bad = run_all(jobs, 1, lambda job, summary: None, end)
    assert good.problem is None
    assert bad.problem is not None
    assert [line.split()[0] for line in seen[0][1:]] == ["at", "waiting"]  # no report is drawn here
    assert [line.split()[0] for line in seen[1][1:]] == ["at", "failed"]
    assert str(rows) in seen[1][2]
    shutil.copy(tiny.train, rows)
    assert all(each.problem is None for each in run_all(jobs, 1, lambda job, summary: None, end))
    assert not list(tmp_path.rglob(FAILED))


def test_a_link_in_the_place_of_a_mark_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "study" / "entry" / "seed-0"
    folder.mkdir(parents=True)
    (folder / FAILED).symlink_to(tmp_path / "elsewhere")
    (folder / parts.ASKED).write_text("", encoding="utf-8")
    with pytest.raises(FedSieveError, match="symbolic link"):
        refuse_changed([Job("entry", recipes.check(tiny.table()), folder)])
    with pytest.raises(FedSieveError, match="symbolic link"):
        parts.of_study(tmp_path / "study")
