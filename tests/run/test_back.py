"""`fedsieve resume DIR --at-round N`: an earlier checkpoint, and all that is later put aside."""

import errno
import shutil
from pathlib import Path

import pytest

from fedsieve.run import rundir
from tests import runs
from tests.conftest import Command, Tiny

pytestmark = pytest.mark.usefixtures("no_report")


@pytest.fixture
def mine(whole: Path, tmp_path: Path) -> Path:
    """A finished run of 4 rounds, whose two newest checkpoints are there."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def test_the_rounds_after_it_are_done_again_and_what_they_were_is_kept(
    mine: Path, whole: Path, command: Command
) -> None:
    (mine / "report-loss.png").write_bytes(b"of four rounds")
    ran = command("resume", mine, "--at-round", "3")
    assert ran.code == 0, ran
    left = mine / "left-after-round-3"
    assert (left / "report-loss.png").read_bytes() == b"of four rounds"
    assert not (mine / "report-loss.png").exists()
    assert str(left) in " ".join(ran.out.split()) + ran.err
    runs.assert_same(mine, whole)
    newest = Path(rundir.CHECKPOINTS, "round-000004.safetensors")
    assert (left / newest).read_bytes() == (whole / newest).read_bytes()
    for log in rundir.LOGS:
        old = (whole / log).read_bytes()
        tail = (left / log).read_bytes()
        assert tail
        assert old.endswith(tail)
        assert all(line["round"] == 4 for line in runs.lines(left, log))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (left / "adapter" / name).read_bytes() == (whole / "adapter" / name).read_bytes()


def test_going_back_twice_keeps_both(mine: Path, command: Command) -> None:
    for _ in range(2):
        assert command("resume", mine, "--at-round", "3").code == 0
    kept = sorted(path.name for path in mine.glob("left-*"))
    assert kept == ["left-after-round-3", "left-after-round-3-2"]


def test_a_disk_that_is_full_leaves_all_as_it_was_and_says_the_whole_command(
    mine: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.read_bytes() for path in mine.rglob("*") if path.is_file()}

    def full(path: Path, *given: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as within:
        within.setattr("fedsieve.run.back.write_whole", full)
        ran = command("resume", mine, "--at-round", "3")
    assert ran.code == 2
    told = " ".join(ran.err.split())
    assert "make room, then" in told
    assert "--at-round 3`" in told
    assert not list(mine.glob("left-*"))
    assert {path: path.read_bytes() for path in mine.rglob("*") if path.is_file()} == before
    assert command("resume", mine, "--at-round", "3").code == 0


def test_going_back_to_the_newest_moves_nothing(mine: Path, command: Command) -> None:
    assert command("resume", mine, "--at-round", "4").code == 0
    assert not list(mine.glob("left-*"))


def test_a_round_without_a_checkpoint_is_refused_with_those_that_are_there(
    mine: Path, command: Command
) -> None:
    before = {path: path.read_bytes() for path in mine.rglob("*") if path.is_file()}
    for number in ("0", "1", "9", "999999999"):
        ran = command("resume", mine, "--at-round", number)
        assert ran.code == 2
        assert f"--at-round {number}" in ran.err
        assert "rounds 3, 4 are there" in " ".join(ran.err.split())
    assert {path: path.read_bytes() for path in mine.rglob("*") if path.is_file()} == before


def test_a_damaged_checkpoint_cannot_be_gone_back_to(mine: Path, command: Command) -> None:
    earlier = mine / rundir.CHECKPOINTS / "round-000003.safetensors"
    data = bytearray(earlier.read_bytes())
    data[-1] ^= 1
    earlier.write_bytes(data)
    ran = command("resume", mine, "--at-round", "3")
    assert ran.code == 2
    assert "rounds 4 are there" in " ".join(ran.err.split())
    assert not list(mine.glob("left-*"))


def test_a_damaged_newer_checkpoint_is_put_aside_too(
    mine: Path, whole: Path, command: Command
) -> None:
    newest = mine / rundir.CHECKPOINTS / "round-000004.safetensors"
    newest.write_bytes(b"nothing")
    assert command("resume", mine, "--at-round", "3").code == 0
    aside = mine / "left-after-round-3" / rundir.CHECKPOINTS / newest.name
    assert aside.read_bytes() == b"nothing"
    runs.assert_same(mine, whole)


def test_a_recipe_that_was_changed_to_repeatable_noise_does_not_open_the_way_back(
    tiny: Tiny, tmp_path: Path, command: Command
) -> None:
    """With noise of the system's no round is done again; nor after an edit that says otherwise."""
    folder = tmp_path / "run"
    privacy = {"clip": 0.1, "delta": 1e-3, "noise_multiplier": 1.0, "noise_from": "system"}
    recipe = tiny.write(
        tmp_path / "r.toml", rounds=2, privacy=privacy, sampling={"kind": "poisson"}
    )
    assert command("run", recipe, "--out", folder).code == 0
    path = folder / rundir.RECIPE
    for text in (path.read_text(), path.read_text().replace('"system"', '"seed"')):
        path.write_text(text)
        before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        ran = command("resume", folder, "--at-round", "1")
        assert ran.code == 2
        assert "epsilon" in ran.err
        assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
