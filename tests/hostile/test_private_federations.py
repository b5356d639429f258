"""A private federation draws from the sites of its beginning in every round, and its account counts
on that: after a restart as well, and whatever its app says by then.
"""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from fedsieve.errors import FedSieveError
from fedsieve.frame import Frame
from fedsieve.run import rundir, runner
from fedsieve.sites import federate
from tests import runs
from tests.conftest import Tiny
from tests.hostile.test_what_a_site_keeps import PRIVATE, Wire, federation, nothing, serve, stopping
from tests.sites.sites import asking
from tests.sites.worlds import World

pytestmark = pytest.mark.usefixtures("no_report")


def private(tiny: Tiny, folder: Path, rounds: int = 4) -> World:
    more: dict[str, Any] = {"privacy": PRIVATE, "server": None, "evaluation__every": 9}
    return federation(tiny, folder, "flasc", rounds=rounds, **more)


def stopped(given: World, number: int) -> None:
    with pytest.raises(runner.Stopped):
        serve(given, Wire(given, stopping(number)))


def another(given: World, name: str) -> Path:
    """The file of one more site, with north's rows."""
    told = tomllib.loads(given.sites["north"].read_text())
    home = given.folder / name
    (home / "worker").mkdir(parents=True, mode=0o700)
    path = home / "site.toml"
    path.write_text(tomli_w.dumps({**told, "name": name}))
    return path


def rows_of(given: World) -> list[dict[str, Any]]:
    return runs.lines(rundir.own(given.run), rundir.CLIENTS)


def test_one_more_site_after_a_restart_takes_no_part(tiny: Tiny, tmp_path: Path) -> None:
    given = private(tiny, tmp_path)
    stopped(given, 3)
    wire = Wire(given, nothing)
    wire.names.append("east")
    wire.workers["east"] = asking(another(given, "east"))
    said = serve(given, wire)
    assert any("as site east, is not used: [privacy] counts on north, south" in s for s in said)
    assert {row["client"] for row in rows_of(given)} == {"north", "south"}
    assert not any(row.get("dropped") for row in rows_of(given))


def test_nor_does_another_in_the_place_of_one_that_was_there(tiny: Tiny, tmp_path: Path) -> None:
    """Its draws would be counted from the first round, and those of the one before it nowhere."""
    given = private(tiny, tmp_path)
    stopped(given, 3)
    wire = Wire(given, nothing)
    wire.workers["south"] = asking(another(given, "east"))
    told = (
        r"counts on 2 sites, and 1 site came \(north\): start the workers and the nodes of south "
        "as well, then --resume"
    )
    with pytest.raises(FedSieveError, match=told):
        serve(given, wire, wait=5.0)
    assert {row["client"] for row in rows_of(given)} == {"north", "south"}
    serve(given, Wire(given, nothing))  # as they were, it goes on
    assert {row["round"] for row in rows_of(given)} == {1, 2, 3, 4}


@pytest.mark.parametrize("note", [None, "[", '{"drawn_from": 5}'])
def test_a_note_that_is_lost_shuts_out_none_of_its_own(
    tiny: Tiny, tmp_path: Path, note: str | None
) -> None:
    """What the log does not name of them yet is taken in again, as before the first round."""
    given = private(tiny, tmp_path)
    stopped(given, 3)
    log = rundir.own(given.run) / rundir.CLIENTS
    mine = [json.loads(line) for line in log.read_text().splitlines()]
    kept = given.run / federate.KEPT
    kept.unlink()
    if note is not None:
        kept.write_text(note)
    history = federate._history(given.run)
    assert {*history.drawn_from} == {row["client"] for row in mine}
    serve(given, Wire(given, nothing))
    assert {row["round"] for row in rows_of(given)} == {1, 2, 3, 4}


def test_of_whom_the_note_is_lost_those_that_the_log_names_must_be_there(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = private(tiny, tmp_path)
    stopped(given, 3)
    (given.run / federate.KEPT).unlink()
    history = federate._history(given.run)._replace(drawn_from={"south"})  # one was never drawn
    monkeypatch.setattr(federate, "_history", lambda folder: history)
    wire = Wire(given, nothing)
    wire.workers["south"] = asking(another(given, "east"))
    with pytest.raises(FedSieveError, match="of south as well"):
        serve(given, wire)
    serve(given, Wire(given, nothing))
    assert {row["client"] for row in rows_of(given)} == {"north", "south"}


def test_before_the_first_round_who_is_too_many_is_told_by_name(tiny: Tiny, tmp_path: Path) -> None:
    given = private(tiny, tmp_path)
    wire = Wire(given, nothing)
    wire.names.append("east")
    wire.workers["east"] = asking(another(given, "east"))
    with pytest.raises(FedSieveError, match=r"3 sites came \(east, north, south\): stop the nodes"):
        serve(given, wire)
    del wire.workers["north"]
    wire.names.remove("north")
    serve(given, wire)  # whoever is there when the first round begins is who it counts on
    assert {row["client"] for row in rows_of(given)} == {"east", "south"}


def test_other_sites_than_it_was_planned_for_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    given = private(tiny, tmp_path)
    for planned in (2, 20, "x"):
        path = given.run / rundir.RECIPE
        table = tomllib.loads(path.read_text())
        assert table["environment"]["sites"] == 2 or planned != 2
        table["environment"]["sites"] = planned
        path.write_text(tomli_w.dumps(table))
        if planned == 2:
            stopped(given, 2)
            continue
        with pytest.raises(FedSieveError, match=r"sites is 2, and .privacy. was planned for"):
            serve(given, Wire(given, nothing))


def test_rounds_of_noise_alone_end_it(tiny: Tiny, tmp_path: Path) -> None:
    """Each costs the privacy of a round, and nothing is learned."""
    given = private(tiny, tmp_path, rounds=9)

    def change(name: str, request: Frame, answer: Frame) -> Frame:
        if request.header["do"] == "train" and request.header["round"] > 1:
            return Frame({"ok": False, "error": "the disk is full"})
        return answer

    said: list[str] = []
    with pytest.raises(FedSieveError) as caught:
        serve(given, Wire(given, change), said)
    last = 1 + federate.SPARE + 1
    told = f"round {last + 1}: in {last - 1} rounds one after another no site that was drawn gave"
    assert told in str(caught.value)
    warned = [line for line in said if line.startswith("warning: round 2: of those who were")]
    assert len(warned) == 1
    assert {row["round"] for row in rows_of(given)} == {*range(1, last + 1)}
    said = serve(given, Wire(given, nothing))
    assert any("round 9/9" in line for line in said), said
    epsilon = [row["epsilon"] for row in runs.lines(given.run, rundir.METRICS)[1:]]
    assert epsilon == sorted(epsilon)
    assert len(epsilon) == 9
