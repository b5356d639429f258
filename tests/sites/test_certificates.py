"""What `fedsieve federate` says of certificates that have ended, end soon, or are none."""

from datetime import timedelta
from pathlib import Path

import pytest

pytest.importorskip("cryptography", reason="comes with the extra fedsieve[flower]")

from fedsieve.errors import FedSieveError
from fedsieve.sites.certificates import CA, CERTIFICATE, endings
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


@pytest.mark.parametrize("content", [b"", b"no certificate", b"\xff" * 99])
def test_a_file_that_is_no_certificate_is_named(tmp_path: Path, content: bytes) -> None:
    safe = make(tmp_path / "safe")
    (safe / CERTIFICATE).write_bytes(content)
    with pytest.raises(FedSieveError, match=r"server\.pem holds no certificate"):
        endings(safe, NOW)
