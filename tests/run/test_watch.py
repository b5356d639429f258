"""`fedsieve watch`: what it says is what the logs say, of runs that are made here."""

import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from fedsieve.disk import last_objects
from fedsieve.errors import FedSieveError
from fedsieve.run import rundir, watch
from fedsieve.run.runner import Stopped
from fedsieve.study import parts
from tests import runs
from tests.conftest import Command, Tiny


@pytest.fixture(scope="module")
def half(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run stopped after 2 of 4 rounds. Not to be changed."""
    folder = tmp_path_factory.mktemp("half") / "run"
    with pytest.raises(Stopped):
        runs.start(tiny, folder, runs.stop_at(2))
    return folder


def test_a_picture_says_what_the_log_says(half: Path) -> None:
    os.utime(half / rundir.METRICS)  # as if it were at work
    picture = watch.of_run(half)
    assert not picture.ended
    text = "\n".join(picture.lines)
    last = runs.lines(half)[-1]
    assert "round 2/4  about" in text
    assert f"accuracy       {last['accuracy']:.4f}" in text
    assert f"training loss  {last['loss']:.4f}" in text
    assert f"sent {last['total_bytes'] / 1e6:.4f} MB, dense LoRA" in text
    assert "left out of round 2: none of 3" in text


def test_a_run_that_is_late_is_not_about_to_end(half: Path) -> None:
    a_minute_ago = time.time() - 60
    os.utime(half / rundir.METRICS, (a_minute_ago, a_minute_ago))
    (line,) = (line for line in watch.of_run(half).lines if line.startswith("round 2/4"))
    assert line.endswith("longer than its rounds take")
    assert "left" not in line


def test_a_run_has_ended_when_its_report_is_there(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    assert not watch.of_run(folder).ended
    (folder / rundir.REPORT).write_text("a report", encoding="utf-8")
    picture = watch.of_run(folder)
    assert picture.ended
    assert "round 4/4  finished" in picture.lines


def test_who_was_left_out_is_named_and_what_is_half_written_is_waited_for(
    half: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(half, folder)
    rows = runs.lines(folder, rundir.CLIENTS)
    for number, row in enumerate(row for row in rows if row["round"] == 2):
        if number < 2:
            row["dropped"] = f"late\x1b[2J {number}"
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / rundir.CLIENTS).write_text(text + '{"round": 3, "cli', encoding="utf-8")
    log = folder / rundir.METRICS
    first, second, third = log.read_text(encoding="utf-8").splitlines()
    third = json.dumps({**json.loads(third), "dropped": 2, "epsilon": 1.25})
    log.write_text("\n".join([first, second, third, '{"round": 3, "lo']), encoding="utf-8")
    lines = watch.of_run(folder).lines
    assert "left out of round 2: 2 of 3" in lines
    dropped = [row["client"] for row in rows if row["round"] == 2][:2]
    assert [line for line in lines if line.startswith("  ")] == [
        f"  {client}: late?[2J {number}" for number, client in enumerate(dropped)
    ]
    assert "epsilon 1.250" in lines
    log.write_text("\n".join([first, "{]", third]), encoding="utf-8")
    with pytest.raises(FedSieveError, match="line 2"):
        watch.of_run(folder)


def test_of_a_long_log_the_end_alone_is_read(tmp_path: Path) -> None:
    path = tmp_path / "log"
    lines = [json.dumps({"number": number}) for number in range(1000)]
    path.write_text("damaged\n" + "\n".join(lines) + "\n", encoding="utf-8")
    found = last_objects(path, 200)
    assert [row["number"] for row in found] == list(range(1000 - len(found), 1000))
    assert 5 < len(found) < 15
    with pytest.raises(FedSieveError, match="near its end"):
        last_objects(path, 1 << 20)
    assert last_objects(tmp_path / "nowhere", 200) == []


@pytest.mark.parametrize(
    ("values", "drawn"),
    [
        ([], ""),
        ([1.0], "▅"),
        ([0.0, 1.0], "▁█"),
        ([float("nan"), 2.0, 3.0], "?▁█"),
        (list(range(8)), "▁▂▃▄▅▆▇█"),
    ],
)
def test_a_curve_of_one_line(values: Sequence[float], drawn: str) -> None:
    assert watch.spark(values) == drawn


def test_a_long_curve_keeps_both_ends() -> None:
    drawn = watch.spark([9.0, *([0.0] * 5000), 9.0], 10)
    assert drawn == "█▁▁▁▁▁▁▁▁█"


def test_a_run_that_is_silent_for_long_is_said_to_be(half: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(half, folder)
    old = time.time() - 3600
    os.utime(folder / rundir.METRICS, (old, old))
    (line,) = [line for line in watch.of_run(folder).lines if "nothing new" in line]
    assert "1 h 00 min" in line
    assert rundir.again(folder) in line


@pytest.mark.parametrize("kept", ["nothing", "an empty log"])
def test_a_run_that_is_silent_before_its_first_round_is_too(
    kept: str, half: Path, tmp_path: Path
) -> None:
    """As one whose process was killed while it began."""
    folder = tmp_path / "run"
    shutil.copytree(half, folder)
    (folder / rundir.METRICS).unlink()
    if kept == "an empty log":
        (folder / rundir.METRICS).write_text("", encoding="utf-8")
    assert watch.of_run(folder).lines[1] == "before its first round"
    old = time.time() - 3600
    for name in (rundir.METRICS, rundir.RECIPE):
        if (folder / name).exists():
            os.utime(folder / name, (old, old))
    line = watch.of_run(folder).lines[1]
    assert line.startswith("nothing new for 1 h 00 min")
    assert rundir.again(folder) in line


def test_the_command_shows_a_run_once_and_refuses_what_is_none(
    half: Path, tmp_path: Path, command: Command
) -> None:
    done = command("watch", half)  # the output is no terminal
    assert done.code == 0
    assert done.out.splitlines() == watch.of_run(half).lines
    for folder in (tmp_path, tmp_path / "nowhere"):
        done = command("watch", folder, "--once")
        assert done.code == 2
        assert "neither a run nor a study" in done.err
    (tmp_path / rundir.RECIPE).symlink_to(half / rundir.RECIPE)
    assert command("watch", tmp_path).code == 2


def test_a_study_shows_each_run_by_what_became_of_it(
    half: Path, whole: Path, tmp_path: Path, command: Command
) -> None:
    folder = tmp_path / "study"
    made = {name: folder / name / "seed-0" for name in ("at", "done", "bad", "off", "later")}
    shutil.copytree(half, made["at"])
    shutil.copytree(whole, made["done"])
    (made["done"] / rundir.REPORT).write_text("a report", encoding="utf-8")
    for name in ("bad", "off", "later"):
        made[name].mkdir(parents=True)
    for path in made.values():
        (path / parts.ASKED).write_text("", encoding="utf-8")
    (made["bad"] / parts.FAILED).write_text("Traceback\nno memory", encoding="utf-8")
    (made["off"] / parts.DIVERGED).write_text("round 1: not finite", encoding="utf-8")
    done = command("watch", folder)
    assert done.code == 0, done.err
    head, *lines = done.out.splitlines()
    assert head.endswith("5 runs so far: 1 at work, 1 failed, 1 diverged, 1 waiting, 1 done")
    assert [line.split("  ")[0].strip() for line in lines] == list(parts.ORDER)
    assert "at/seed-0" in lines[0]
    assert "round 2/4  accuracy" in lines[0]
    assert lines[1].endswith("bad/seed-0    no memory")
    for name in ("at", "later"):
        shutil.rmtree(folder / name)
    assert not parts.of_study(folder).ended
    (folder / parts.TABLES[0]).write_text("{}", encoding="utf-8")
    assert parts.of_study(folder).ended
