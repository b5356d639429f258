"""What `fedsieve federate` says of certificates that have ended, end soon, or are none."""

import contextlib
import re
import shutil
import socket
import ssl
import threading
from datetime import timedelta
from pathlib import Path

import pytest

pytest.importorskip("cryptography", reason="comes with the extra fedsieve[flower]")

from fedsieve.errors import FedSieveError
from fedsieve.recipe import read as recipes
from fedsieve.sites import federate
from fedsieve.sites.certificates import (
    CA,
    CERTIFICATE,
    PRIVATE,
    endings,
    refuse_unfit,
    unreached,
)
from fedsieve.sites.server import RoundPolicy, Transport
from tests.conftest import LABELS, Command, Tiny
from tests.sites.certificates import NOW, USUAL, make
from tests.sites.test_federate import flower as flower

LATER = timedelta(days=365)
DAY = timedelta(days=1)


@pytest.mark.parametrize("name", [CA, CERTIFICATE])
@pytest.mark.parametrize(
    ("begins", "ends", "said"),
    [
        (-LATER, -DAY, "expired on"),
        (-LATER, timedelta(0), "expired on"),
        (DAY, LATER, "holds from"),
        (-LATER, timedelta(minutes=5), "in 0 days"),
        (-LATER, 29 * DAY, "in 29 days"),
        (-LATER, 31 * DAY, None),
        (-LATER, LATER, None),
    ],
)
def test_when_certificates_end(
    tmp_path: Path, name: str, begins: timedelta, ends: timedelta, said: str | None
) -> None:
    now = NOW.replace(microsecond=0)  # certificates know whole seconds
    span = (now + begins, now + ends)
    safe = make(tmp_path / "safe", *((span, USUAL) if name == CA else (USUAL, span)))
    try:
        found = endings(safe, now)
    except FedSieveError as error:
        found = [str(error)]
    assert len(found) == (said is not None)
    for line in found:
        assert said is not None
        assert said in line
        assert str(safe / name) in line
        assert f"{span[0 if begins > timedelta(0) else 1]:%Y-%m-%d}" in line
        if begins < timedelta(0):
            assert "docs/deploy.md" in line
        assert ("every site" in line) == (name == CA and begins < timedelta(0))


@pytest.mark.usefixtures("flower")
def test_it_is_said_when_a_federation_begins_and_when_it_goes_on(
    tiny: Tiny, tmp_path: Path, command: Command
) -> None:
    path = tiny.write(tmp_path / "recipe.toml", data__classes=list(LABELS))
    expired, soon = ((NOW - LATER, NOW + days * DAY) for days in (-1, 3))
    make(tmp_path / "old", server_holds=expired)
    make(tmp_path / "soon", server_holds=soon)
    run = tmp_path / "run"
    ran = command("federate", path, "--out", run, "--certificates", tmp_path / "old")
    assert ran.code == 2
    assert f"expired on {expired[1]:%Y-%m-%d}" in " ".join(ran.err.split())
    assert not run.exists()
    ran = command("federate", path, "--out", run, "--certificates", tmp_path / "soon")
    assert ran.code == 0
    assert f"expires on {soon[1]:%Y-%m-%d}" in " ".join(ran.err.split())
    (tmp_path / "soon").rename(tmp_path / "replaced")
    (tmp_path / "old").rename(tmp_path / "soon")
    ran = command("federate", "--resume", run)
    assert ran.code == 2
    assert f"expired on {expired[1]:%Y-%m-%d}" in " ".join(ran.err.split())


@pytest.mark.usefixtures("flower")
def test_one_that_ended_meanwhile_is_told_with_why_a_server_stopped(
    tiny: Tiny, tmp_path: Path
) -> None:
    """All that the server sees is that sites are gone."""
    given = recipes.check(tiny.table(data__classes=list(LABELS)))
    ended = NOW - DAY
    make(tmp_path / "safe", server_holds=(NOW - LATER, NOW + LATER))
    make(tmp_path / "old", server_holds=(NOW - LATER, ended))
    listen = federate.ServerAddress(certificates=tmp_path / "safe")
    federate.prepare(given, tmp_path / "run", RoundPolicy(wait=0.1, poll=0.01), listen)
    shutil.rmtree(tmp_path / "safe")
    (tmp_path / "old").rename(tmp_path / "safe")
    nobody = Transport(list, lambda *_: None, lambda requests: [])
    with pytest.raises(FedSieveError, match="0 sites are there"):
        federate.serve(tmp_path / "run", nobody, RoundPolicy(wait=0.1, poll=0.01), print)
    with pytest.raises(FedSieveError, match=f"0 sites are there.* expired on {ended:%Y-%m-%d}"):
        federate.refuse_unfinished(tmp_path / "run")


@pytest.mark.parametrize("content", [b"", b"no certificate", b"\xff" * 99])
def test_a_file_that_is_no_certificate_is_named(tmp_path: Path, content: bytes) -> None:
    safe = make(tmp_path / "safe")
    (safe / CERTIFICATE).write_bytes(content)
    with pytest.raises(FedSieveError, match=r"server\.pem holds no certificate"):
        endings(safe, NOW)


@pytest.mark.parametrize("name", [CA, CERTIFICATE, PRIVATE])
def test_what_does_not_belong_together_is_refused(
    tiny: Tiny, tmp_path: Path, command: Command, name: str
) -> None:
    """The file of another folder; and of the key one that is none."""
    safe, other = make(tmp_path / "safe"), make(tmp_path / "other")
    refuse_unfit(safe, "127.0.0.1")
    (safe / name).write_bytes((other / name).read_bytes())
    path = tiny.write(tmp_path / "recipe.toml", data__classes=list(LABELS))
    for content in ((safe / name).read_bytes(), b"no key") if name == PRIVATE else (None,):
        if content is not None:
            (safe / name).write_bytes(content)
        ran = command("federate", path, "--out", tmp_path / "run", "--certificates", safe)
        assert ran.code == 2
        assert "do not belong together" in " ".join(ran.err.split())
        assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("flower")
def test_a_certificate_by_which_the_server_cannot_reach_itself_is_refused(
    tiny: Tiny, tmp_path: Path, command: Command
) -> None:
    path = tiny.write(tmp_path / "recipe.toml", data__classes=list(LABELS))
    make(tmp_path / "away", host="192.0.2.7")
    given = ("federate", path, "--out", tmp_path / "run", "--certificates", tmp_path / "away")
    for host in ("127.0.0.1", "0.0.0.0"):
        ran = command(*given, "--host", host)
        assert ran.code == 2
        assert "server.pem does not name 127.0.0.1, by which" in " ".join(ran.err.split())
        assert not (tmp_path / "run").exists()
    assert command(*given, "--host", "192.0.2.7").code == 0


@pytest.mark.usefixtures("flower")
def test_keys_that_others_can_read_are_told(tiny: Tiny, tmp_path: Path, command: Command) -> None:
    """Of the server's own key it is said, and on every start; one that sites are given ends it."""
    path = tiny.write(tmp_path / "recipe.toml", data__classes=list(LABELS))
    safe = make(tmp_path / "safe")
    given = ("federate", path, "--certificates", safe, "--out")
    for mode, told in ((0o600, False), (0o640, True), (0o604, True), (0o666, True)):
        (safe / PRIVATE).chmod(mode)
        ran = command(*given, tmp_path / f"{mode:o}")
        assert ran.code == 0
        assert ("server.key is open to other users" in " ".join(ran.err.split())) is told
    ran = command("federate", "--resume", tmp_path / "666")
    assert "server.key is open to other users" in " ".join(ran.err.split())
    with (safe / CA).open("ab") as file:
        file.write((safe / PRIVATE).read_bytes())
    ran = command(*given, tmp_path / "run")
    assert ran.code == 2
    assert "ca.crt holds a private key" in " ".join(ran.err.split())


@pytest.mark.parametrize(
    ("ours", "host", "said"),
    [
        ("safe", "127.0.0.1", None),
        ("other", "127.0.0.1", "does not vouch for"),
        ("safe", "127.0.0.2", "does not vouch for"),
        ("no TLS", "127.0.0.1", "does not speak TLS"),
        ("nobody", "127.0.0.1", "nothing answers at .* is the SuperLink running"),
    ],
)
def test_why_a_server_is_not_reached_is_found_out(
    tmp_path: Path, ours: str, host: str, said: str | None
) -> None:
    safe, other = make(tmp_path / "safe"), make(tmp_path / "other")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(safe / CERTIFICATE, safe / PRIVATE)

    def serve() -> None:
        with contextlib.suppress(OSError):
            there, _ = listener.accept()
            if ours == "no TLS":
                there.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            else:
                context.wrap_socket(there, server_side=True)
            there.close()

    with socket.socket() as listener:
        listener.bind((host, 0))
        listener.listen()
        port = listener.getsockname()[1]
        if ours == "nobody":
            listener.close()
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        found = unreached(host, port, (other if ours == "other" else safe) / CA)
        thread.join(10)
    assert (found is None) is (said is None)
    assert said is None or re.search(said, found or "")
