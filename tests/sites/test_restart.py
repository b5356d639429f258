"""The server is restarted, and nobody touches the sites: the run goes on to the same bits."""

import os
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="needs the extra fedsieve[flower]")

from fedsieve.run import runner
from fedsieve.sites import federate
from tests import runs
from tests.conftest import Command, Tiny
from tests.sites import processes
from tests.sites.test_parity import assert_parity
from tests.sites.worlds import PATIENCE, begin, started, world


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "tls", "away"),
    [(signal.SIGKILL, True, 0.0), (signal.SIGTERM, False, 0.0), (signal.SIGKILL, True, 75.0)],
    ids=["killed", "in order, without keys", "away for longer than heartbeats allow"],
)
def test_the_server_is_restarted_and_the_sites_stay_as_they_are(
    tiny: Tiny,
    tmp_path: Path,
    no_report: None,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    tls: bool,
    away: float,
) -> None:
    """Neither workers nor nodes are started again, no key is registered again."""
    given = world(tiny, tmp_path, ("north", "south"), tls=tls, rounds=3)
    runner.start(given.recipe, tmp_path / "alone", runs.quiet)
    federate.prepare(given.recipe, given.run, PATIENCE, given.listen)
    monkeypatch.setenv("PATH", f"{processes.BIN}{os.pathsep}{os.environ['PATH']}")
    with started(given) as running:
        begin(given, stream=False)
        until = time.monotonic() + 300
        while len(runs.lines(given.run)) < 2:  # round 1 is done
            assert time.monotonic() < until
            time.sleep(0.1)
        processes.end(running.superlink, number)
        assert len(runs.lines(given.run)) - 1 < 3
        time.sleep(away)
        with processes.superlink(given.run, given.listen, tmp_path / "superlink.log"):
            assert command("federate", "--resume", given.run).code == 0
        assert all(
            each.poll() is None for each in [*running.nodes.values(), *running.workers.values()]
        )
    assert_parity(given.run, tmp_path / "alone")


# The service files of docs/services, followed by the letter.

SERVICES = Path(__file__).parents[2] / "docs" / "services"
NAMES = ("fedsieve-superlink", "fedsieve-node", "fedsieve-worker")


def unit(name: str) -> dict[str, str]:
    """The settings of a service file; of those that come twice the last."""
    lines = (SERVICES / f"{name}.service").read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


@pytest.mark.parametrize("name", NAMES)
def test_services_come_back_however_they_ended(name: str) -> None:
    """A node that the server does not know any more ends with 0: no failure for a service."""
    given = unit(name)
    assert given["Restart"] == "always"
    assert given["StartLimitIntervalSec"] == "0"
    assert int(given["RestartSec"]) <= 10
    assert given["UMask"] == "0077"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
@pytest.mark.parametrize("name", NAMES)
def test_services_are_what_systemd_reads(tmp_path: Path, name: str) -> None:
    """The program of this machine in place of the example's."""
    text = (SERVICES / f"{name}.service").read_text(encoding="utf-8")
    place = tmp_path / f"{name}.service"
    place.write_text(text.replace("/srv/fedsieve/venv/bin/", f"{processes.BIN}/"))
    verify = ["systemd-analyze", "verify", "--recursive-errors=no", str(place)]
    done = subprocess.run(verify, capture_output=True, text=True, timeout=60, check=False)
    assert name not in done.stderr, done.stderr


def test_services_run_what_fedsieve_federate_prints() -> None:
    """Word for word, with the page's paths."""
    folder, safe = Path("/srv/fedsieve/runs/ward"), Path("/etc/fedsieve")
    listen = federate.ServerAddress(certificates=safe)
    server, node, _ = federate.commands(folder, listen)
    for name, printed in (("fedsieve-superlink", server), ("fedsieve-node", node)):
        printed = (
            printed.replace("127.0.0.1:8000", "fl.example.org:443")
            .replace("--root-certificates ca.crt", "--root-certificates /etc/fedsieve/ca.crt")
            .replace("<key of the site>", "/etc/fedsieve/site-key")
            .replace("<folder of the site>", "/srv/fedsieve/site/worker")
        )
        program = Path(unit(name)["ExecStart"].split()[0]).name
        settings, _, rest = printed.partition(program)
        assert shlex.split(unit(name)["ExecStart"])[1:] == shlex.split(rest), name
        text = (SERVICES / f"{name}.service").read_text(encoding="utf-8")
        for setting in settings.split():
            assert setting in text, setting
