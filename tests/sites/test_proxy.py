"""The proxy of docs/deploy.md: nodes get through to the server, and orders do not."""

import http.client
import shutil
import ssl
from contextlib import ExitStack
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="needs the extra fedsieve[flower]")

from fedsieve.run import runner
from fedsieve.sites import federate
from fedsieve.sites.certificates import CA
from fedsieve.sites.here import free_port
from tests import runs
from tests.conftest import Tiny
from tests.sites import processes, worlds
from tests.sites.test_deploy_page import block
from tests.sites.test_parity import assert_parity

NGINX = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")


def configuration(folder: Path, certificates: Path, behind: int, port: int) -> Path:
    """The page's server block, with this test's ports and paths, in what nginx needs around it."""
    server = block("server {")
    for ours, here in (
        ("listen 443", f"listen 127.0.0.1:{port}"),
        ("https://127.0.0.1:8000", f"https://127.0.0.1:{behind}"),
        ("/etc/fedsieve/", f"{certificates}/"),
    ):
        assert ours in server
        server = server.replace(ours, here)
    temporary = "\n".join(
        f"{kind}_temp_path {folder};"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    path = folder / "nginx.conf"
    path.write_text(
        f"daemon off; pid {folder}/pid; error_log {folder}/error.log; events {{}}\n"
        f"http {{ access_log off; {temporary}\n{server}\n}}\n",
        encoding="utf-8",
    )
    return path


def status(port: int, certificates: Path, path: str) -> int:
    trust = ssl.create_default_context(cafile=str(certificates / CA))
    connection = http.client.HTTPSConnection("127.0.0.1", port, context=trust, timeout=60)
    connection.request("POST", path, body=b"")
    return connection.getresponse().status


@pytest.mark.slow
@pytest.mark.skipif(NGINX is None, reason="needs nginx")
def test_nodes_get_through_and_orders_do_not(tiny: Tiny, tmp_path: Path, no_report: None) -> None:
    given = worlds.world(tiny, tmp_path, ("north", "south"), tls=True, rounds=1)
    certificates = given.listen.certificates
    assert certificates is not None
    assert NGINX is not None
    runner.start(given.recipe, tmp_path / "alone", runs.quiet)
    federate.prepare(given.recipe, given.run, worlds.PATIENCE, given.listen)
    port = free_port()
    path = configuration(tmp_path, certificates, given.listen.port, port)
    outside = given._replace(listen=given.listen._replace(port=port))
    with ExitStack() as stack:
        stack.enter_context(worlds.working(given, {}))
        stack.enter_context(
            processes.superlink(given.run, given.listen, tmp_path / "superlink.log")
        )
        command: list[str | Path] = [
            NGINX,
            "-p",
            tmp_path,
            "-e",
            tmp_path / "error.log",
            "-c",
            path,
        ]
        proxy = stack.enter_context(processes.running(command, tmp_path, tmp_path / "nginx.log"))
        processes.wait_for_port(port, proxy)
        for name in given.sites:
            worlds.register(given, worlds.node_key(given, name))
            stack.enter_context(worlds.node(outside, name))
        worlds.begin(given)
        for order in ("/v1/control/StartRun", "/v1/runtime/GetNodes", "/"):
            assert status(port, certificates, order) == 403, order
            assert status(given.listen.port, certificates, order) != 403, order
        for around in ("/v1/fleet/../control/StartRun", "/v1/fleet/%2e%2e/control/StartRun"):
            assert status(port, certificates, around) == 403, around
        assert status(port, certificates, "/v1/fleet/no-such-thing") != 403
    assert_parity(given.run, tmp_path / "alone")
