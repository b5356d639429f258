"""A federation's server has a tracker as a run in one process has, and can be watched."""

from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="needs the extra fedsieve[flower]")
pytest.importorskip("tensorboard", reason="needs the extra fedsieve[tensorboard]")

from fedsieve.run import rundir, watch
from fedsieve.sites import federate
from tests import runs
from tests.conftest import Tiny
from tests.run.test_tracking import from_tensorboard, of_log
from tests.sites.worlds import PATIENCE, sockets, working, world


@pytest.mark.slow
def test_a_federation_is_tracked_at_its_server_alone(
    tiny: Tiny, tmp_path: Path, no_report: None
) -> None:
    asked = {"kind": "tensorboard"}
    given = world(tiny, tmp_path, ("north", "south"), tls=False, rounds=2, tracking=asked)
    federate.prepare(given.recipe, given.run, PATIENCE, given.listen)
    assert watch.of_run(given.run).lines[1] == "waiting for its sites"
    said: list[str] = []
    with working(given, {}):
        federate.serve(given.run, sockets(given.sites), PATIENCE, said.append)
    assert [text for text in said if "TensorBoard" in text] == [
        f"tracked by TensorBoard: tensorboard --logdir {given.run}"
    ]
    assert "tracking" not in (given.run / federate.TOLD).read_text(encoding="utf-8")
    found = from_tensorboard(given.run)
    wanted = of_log(given.run)
    assert {name: [n for n, _ in points] for name, points in found.items()} == {
        name: sorted(values) for name, values in wanted.items()
    }
    (given.run / rundir.REPORT).write_text("", encoding="utf-8")
    assert "left out of round 2: none of 2" in watch.of_run(given.run).lines
    assert watch.of_run(given.run).ended
    assert len(runs.lines(given.run)) == 3
