"""What docs/deploy.md tells people to type, typed."""

import re
import shutil
import ssl
import subprocess
import tomllib
from contextlib import suppress
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from fedsieve.sites import site
from fedsieve.sites.certificates import CA, CERTIFICATE, PRIVATE

PAGE = (Path(__file__).parents[2] / "docs" / "deploy.md").read_text(encoding="utf-8")
BLOCKS = [
    "".join(line.removeprefix("    ") for line in block.splitlines(keepends=True))
    for block in re.findall(r"(?:^    .*\n|^\n(?=    ))+", PAGE, re.MULTILINE)
]


def block(beginning: str) -> str:
    (found,) = [each.strip() for each in BLOCKS if each.strip().startswith(beginning)]
    return found


def shell(script: str, folder: Path) -> None:
    subprocess.run(["sh", "-ec", script], cwd=folder, check=True, capture_output=True, timeout=60)


def shake_hands(folder: Path, name: str) -> None:
    """A TLS handshake between a server with these certificates and a client that wants `name`.

    As strict as newer Pythons are by default. Raises SSLCertVerificationError.
    """
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    theirs.load_cert_chain(folder / CERTIFICATE, folder / PRIVATE)
    ours = ssl.create_default_context(cafile=str(folder / CA))
    ours.verify_flags |= ssl.VERIFY_X509_STRICT
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    left = [
        ours.wrap_bio(to_client, to_server, server_hostname=name),
        theirs.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(10):
        for end in list(left):
            with suppress(ssl.SSLWantReadError):
                end.do_handshake()
                left.remove(end)
    assert not left


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_the_certificates_are_believed_for_one_server(tmp_path: Path) -> None:
    shell(block("openssl ecparam"), tmp_path)
    for name in ("fl.example.org", "localhost", "127.0.0.1"):
        shake_hands(tmp_path, name)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(tmp_path, "another.example.org")


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="needs ssh-keygen")
def test_the_key_of_a_site_is_one_that_flower_reads(tmp_path: Path) -> None:
    line = block("ssh-keygen").splitlines()[0].split("#")[0]
    shell(line, tmp_path)
    load_ssh_private_key((tmp_path / "site-key").read_bytes(), None)
    assert (tmp_path / "site-key.pub").read_text().startswith("ecdsa-sha2-nistp384 ")


def test_the_sites_file_is_one(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    path.write_text(block('name = "north"'), encoding="utf-8")
    told = tomllib.loads(path.read_text())
    for name in (told["data"]["train"], told["data"]["test"], told["model"]):
        (tmp_path / name).mkdir(parents=True)
    assert tomllib.loads(path.read_text())["name"] == "north"
    given = site.load(path)
    assert (given.name, given.budget.up) == ("north", 0.25)


def test_every_key_of_a_sites_file_is_told() -> None:
    table = PAGE.split("## A site's file")[1].split("## The worker")[0]
    for key in site.Site.model_fields:
        assert f"`{key}`" in table or f"`[{key}]`" in table, key
    for part in (site.Rows, site.Link, site.Limits):
        for key in part.model_fields:
            assert f"`{key}`" in table, key
