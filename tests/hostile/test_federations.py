"""A federation's directory that was edited, or that comes from somebody else, and what is printed
of it: refused in a sentence, or set aside, before a Flower run goes on.
"""

import datetime
import json
import os
import shlex
import shutil
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from fedsieve.errors import FedSieveError
from fedsieve.recipe import read as recipe
from fedsieve.run import rundir
from fedsieve.sites import certificates as ends
from fedsieve.sites import federate, found, told
from fedsieve.sites import site as sites
from tests.conftest import LABELS, Command, Tiny
from tests.sites import certificates
from tests.sites.test_federate import PATIENCE
from tests.sites.test_federate import flower as flower

pytestmark = pytest.mark.usefixtures("flower")
NOW = datetime.datetime.now(datetime.UTC)
ODD = "x; touch pwned #$(id) 'y' \"z\" `id`"
Edit = Callable[[str], str]


def prepared(tiny: Tiny, folder: Path, **changes: Any) -> Path:
    given = recipe.check(tiny.table(data__classes=list(LABELS), **changes))
    federate.prepare(given, folder, PATIENCE, federate.ServerAddress())
    return folder


def test_what_is_printed_can_be_pasted_whatever_a_recipe_is_called(
    tiny: Tiny, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell takes the folder for one word of each command, and runs nothing of its name."""
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "given.toml"
    given = recipe.check(tiny.table(data__classes=list(LABELS), name=ODD))
    source.write_text(recipe.dump(given, {}))
    ran = command("federate", source)
    assert ran.code == 0, ran.err
    folder = tmp_path / "runs" / ODD
    printed = [line[2:] for line in ran.out.splitlines() if line.startswith("  ")]
    server, _, begin = printed
    assert f"FLWR_HOME={folder / 'flower'}" in shlex.split(server)
    assert str(folder / "flower" / "link.db") in shlex.split(server)
    assert shlex.split(begin)[-1] == str(folder)
    for line in (server, begin):
        # As a shell reads it: the programs are not there, and nothing else is run.
        subprocess.run(["/bin/sh", "-c", line], env={"PATH": ""}, check=False, capture_output=True)
    assert not list(tmp_path.rglob("pwned"))
    # And so are those of messages.
    ran = command("federate", source)
    assert f"`{begin}`" in ran.err
    ran = command("resume", folder)
    assert f"`{begin}`" in ran.err


def test_commands_quote_certificates_and_host(tmp_path: Path) -> None:
    listen = federate.ServerAddress("a b", certificates=tmp_path / "c d")
    server, node, _ = federate.commands(tmp_path, listen)
    assert str(tmp_path / "c d" / "server.key") in shlex.split(server)
    assert "a b:8000" in shlex.split(node)


# file of the directory -> what becomes of it
DAMAGE: dict[str, tuple[str, bytes | Callable[[bytes], bytes]]] = {
    "an app that is no UTF-8": ("app/pyproject.toml", b"\xff\xfe"),
    "an app that is empty": ("app/pyproject.toml", b""),
    "an app without ends": (
        "app/pyproject.toml",
        lambda old: b"\n".join(
            line
            for line in old.split(b"\n")
            if not line.startswith((b"serverapp", b"clientapp", b"[tool.flwr.app.components"))
        ),
    ),
    "an app of another program": (
        "app/pyproject.toml",
        lambda old: old + b'\n[build-system]\nrequires = ["evil"]\nbuild-backend = "evil"\n',
    ),
    "an app of a folder with a nul": (
        "app/pyproject.toml",
        lambda old: old.replace(b'folder = "', b'folder = "\\u0000'),
    ),
    "an app of a long folder": (
        "app/pyproject.toml",
        lambda old: old.replace(b'folder = "', b'folder = "/' + b"a" * 300),
    ),
    "an app that waits for a word": (
        "app/pyproject.toml",
        lambda old: old.replace(b"sites = 3", b'sites = "x"'),
    ),
    "an app that waits for ever": (
        "app/pyproject.toml",
        lambda old: old.replace(b"deadline = 30.0", b"deadline = inf"),
    ),
    "an app of another name": (
        "app/pyproject.toml",
        lambda old: old.replace(b'name = "fedsieve-federation"', b'name = "../../x"'),
    ),
    "settings that are no UTF-8": ("flower/config.toml", b"\xff\xfe"),
    "a root that is a number": (
        "flower/config.toml",
        lambda old: old + b"root-certificates = 3\n",
    ),
    "a root with a nul": (
        "flower/config.toml",
        lambda old: old + b'root-certificates = "a\\u0000b/c"\n',
    ),
    "a root that is not there": (
        "flower/config.toml",
        lambda old: old + b'root-certificates = "/nowhere/ca.crt"\n',
    ),
    "an address that is a list": (
        "flower/config.toml",
        lambda old: old.replace(b"address = ", b"address = [] #"),
    ),
    "told what is no UTF-8": ("told.toml", b"\xff"),
    "told nothing": ("told.toml", b""),
    "told another seed": ("told.toml", lambda old: old.replace(b"seed = 0", b"seed = 5")),
    "told another rate": ("told.toml", lambda old: old.replace(b"\nlr = 0.", b"\nlr = 0.000")),
    "told of the server's folders": (
        "told.toml",
        lambda old: old.replace(b"the site's own", b"/etc/passwd"),
    ),
    "told another federation's name": (
        "told.toml",
        lambda old: old.replace(b'federation = "', b'federation = "0'),
    ),
    "told a remark": ("told.toml", lambda old: old + b"# hello\n"),
    "a recipe with another rate": (
        "recipe.toml",
        lambda old: old.replace(b"\nlr = 0.", b"\nlr = 0.000"),
    ),
    "a recipe of no federation": (
        "recipe.toml",
        lambda old: old.replace(b"federation = ", b"nothing = "),
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_directory_that_was_edited_does_not_go_on(tiny: Tiny, tmp_path: Path, what: str) -> None:
    run = prepared(tiny, tmp_path / "run")
    federate.begin_again(run)
    name, change = DAMAGE[what]
    old = (run / name).read_bytes()
    new = change if isinstance(change, bytes) else change(old)
    assert new != old
    (run / name).write_bytes(new)
    with pytest.raises(FedSieveError) as raised:
        federate.begin_again(run)
    file = Path(name).name
    assert file in str(raised.value) or "ca.crt" in str(raised.value)
    assert "--accept-changes" not in str(raised.value)  # `fedsieve federate` has none
    if file in ("told.toml", "recipe.toml"):
        # The Flower run itself, too, before anything is told.
        with pytest.raises(FedSieveError, match=r"told\.toml|recipe\.toml"):
            federate.serve(run, None, PATIENCE, print)  # type: ignore[arg-type]


def test_what_the_sites_are_told_is_made_again_to_the_letter(tiny: Tiny, tmp_path: Path) -> None:
    run = prepared(tiny, tmp_path / "run")
    before = (run / federate.TOLD).read_bytes()
    (run / federate.TOLD).unlink()
    federate.begin_again(run)
    assert (run / federate.TOLD).read_bytes() == before
    assert str(tmp_path).encode() not in before


def test_what_was_told_by_another_version_goes_on_under_its_digest(
    tiny: Tiny, tmp_path: Path
) -> None:
    """A FedSieve whose recipes have a key less wrote the same, with a line less."""
    run = prepared(tiny, tmp_path / "run")
    text = (run / federate.TOLD).read_text()
    older = text.replace("norm_bound = 100.0\n", "", 1)
    assert older != text
    (run / federate.TOLD).write_text(older)
    given = recipe.load(str(run / rundir.RECIPE))
    assert told.text_for_sites(run, given) == older


def test_an_edited_recipe_of_a_federation_is_not_offered_what_it_has_not(
    tiny: Tiny, tmp_path: Path
) -> None:
    from fedsieve.run.found import _refuse_edited

    run = prepared(tiny, tmp_path / "run")
    source = run / rundir.RECIPE
    now = recipe.load(str(source))
    then = recipe.parse_text(source.read_text().replace("\nlr = ", "\nlr = 1"), "then")
    with pytest.raises(
        FedSieveError, match=r"training\.lr was .*: put it back, or start a new fed"
    ):
        _refuse_edited(str(source), then, now, False)


@pytest.mark.parametrize("kind", ["a module", "a folder", "a link", "a file"])
def test_what_flower_would_run_is_set_aside(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    """Flower takes a copy of the app that it finds for its own, and puts it before all modules."""
    run = prepared(tiny, tmp_path / "run")
    home = run / federate.HOME
    (home / "link.db-wal").write_bytes(b"")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for _ in range(2):  # and again: Flower unpacks the app each time
        if kind == "a module":
            package = home / "apps" / "fedsieve.fedsieve-federation.0.2.0.1" / "fedsieve"
            package.mkdir(parents=True)
            (package / "__init__.py").write_text("raise SystemExit(7)")
        elif kind == "a folder":
            (home / "runtime-environments").mkdir()
        elif kind == "a link":
            (home / "apps").symlink_to(elsewhere)
        else:
            (home / "sitecustomize.py").write_text("")
        federate.begin_again(run)
        left = {path.name for path in home.iterdir()}
        assert left == {"config.toml", "link.db", "link.db-wal"}
        assert len(list((run / found.ASIDE).iterdir())) == 1
    assert elsewhere.is_dir()


def test_what_passed_through_a_private_federation_stays_among_its_servers_secrets(
    tiny: Tiny, tmp_path: Path
) -> None:
    """The SuperLink's database keeps requests, answers and log: who took part, and what of it."""
    privacy = {"clip": 0.2, "noise_multiplier": 1.0, "delta": 1e-2, "noise_from": "system"}
    run = prepared(tiny, tmp_path / "run", privacy=privacy, sampling={"kind": "poisson"})
    words = shlex.split(federate.commands(run, federate.ServerAddress())[0])
    database = Path(words[words.index("--database") + 1])
    assert database == tmp_path / "run.secret" / "link.db"
    assert database.stat().st_mode & 0o777 == 0o600
    assert not [*run.rglob("link.db*")]
    # What somebody else began in the other place takes no precedence; one of before goes on there.
    (run / federate.HOME / "link.db").touch()
    assert str(database) in shlex.split(federate.commands(run, federate.ServerAddress())[0])
    (run / federate.HOME / "link.db").unlink()
    database.rename(run / federate.HOME / "link.db")
    words = shlex.split(federate.commands(run, federate.ServerAddress())[0])
    assert str(run / federate.HOME / "link.db") in words


@pytest.mark.parametrize("name", ["link.db", "link.db-wal", "config.toml"])
def test_no_link_stands_in_the_place_of_flowers_files(
    tiny: Tiny, tmp_path: Path, name: str
) -> None:
    run = prepared(tiny, tmp_path / "run")
    place = run / federate.HOME / name
    place.unlink(missing_ok=True)
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FedSieveError, match="is a symbolic link"):
        federate.begin_again(run)


@pytest.mark.parametrize("name", ["deadline", "setup", "wait", "sites"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300, -1.0])
def test_nothing_waits_for_ever(tiny: Tiny, tmp_path: Path, name: str, value: float) -> None:
    given = recipe.check(tiny.table(data__classes=list(LABELS)))
    policy = PATIENCE._replace(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(FedSieveError, match=f"--{name}"):
        federate.prepare(given, tmp_path / "run", policy, federate.ServerAddress())


FOLDERS = ["told.toml", "app/pyproject.toml", "flower/link.db", "flower/config.toml", "app-file"]


@pytest.mark.parametrize("what", [*FOLDERS, "recipe.toml", "long"])
def test_a_federation_is_not_prepared_over_odd_things(
    tiny: Tiny, tmp_path: Path, what: str
) -> None:
    run = tmp_path / "run"
    if what == "app-file":
        run.mkdir()
        (run / "app").write_text("")
    elif what == "long":
        run = tmp_path / ("a" * 300)
    else:
        (run / what).mkdir(parents=True)
        (run / what / "kept").write_text("")
    with pytest.raises(FedSieveError):
        prepared(tiny, run)
    if what not in ("app-file", "long"):
        assert (run / what / "kept").exists()


def public(key: Any) -> str:
    form = serialization.PublicFormat.OpenSSH
    line: bytes = key.public_key().public_bytes(serialization.Encoding.OpenSSH, form)
    return line.decode()


KEYS: dict[str, Any] = {
    "another curve than there is": "ecdsa-sha2-nistp999 AAAA x",
    "another type": public(ed25519.Ed25519PrivateKey.generate()),
    "a security key": "sk-ecdsa-sha2-nistp256@openssh.com AAAA x",
    "junk": "ecdsa-sha2-nistp256 AAAA",
    "not hexadecimal": "north's key",
    "no key": "abcd",
    "nothing": None,
    "a number": 1,
    "a list": ["x"],
}


@pytest.mark.parametrize("key", KEYS)
def test_a_key_that_no_node_can_prove_is_refused_by_the_sites_name(
    tmp_path: Path, key: str
) -> None:
    place = tmp_path / "sites.json"
    right = public(ec.generate_private_key(ec.SECP384R1()))
    place.write_text(json.dumps({"north": right, "south": KEYS[key]}))
    with pytest.raises(FedSieveError, match="the key of 'south' is none that a node has"):
        federate._known(place)


@pytest.mark.parametrize("name", ["", "a b", "\x1b[31m", "x" * 65])
def test_a_name_that_no_site_has_is_refused(tmp_path: Path, name: str) -> None:
    place = tmp_path / "sites.json"
    place.write_text(json.dumps({name: public(ec.generate_private_key(ec.SECP384R1()))}))
    with pytest.raises(FedSieveError, match="is no name of a site") as raised:
        federate._known(place)
    assert "\x1b" not in str(raised.value)


def test_one_key_is_one_however_it_is_written(tmp_path: Path) -> None:
    line = public(ec.generate_private_key(ec.SECP384R1()))
    place = tmp_path / "sites.json"
    place.write_text(json.dumps({"north": line}))
    key = federate._known(place)["north"]
    for written in (key, key.upper()):
        place.write_text(json.dumps({"north": written}))
        assert federate._known(place) == {"north": key}


@pytest.mark.parametrize("what", ["version", "date", "pipe", "folder", "empty"])
def test_a_certificate_that_is_odd_is_refused(tmp_path: Path, what: str) -> None:
    safe = certificates.make(tmp_path / "safe")
    place = safe / "server.pem"
    first = place.read_text().split("-----END")[0] + "-----END CERTIFICATE-----\n"
    der = ssl.PEM_cert_to_DER_cert(first)
    place.unlink()
    if what == "version":
        at = der.index(b"\xa0\x03\x02\x01\x02")
        der = der[:at] + b"\xa0\x03\x02\x01\x07" + der[at + 5 :]
        place.write_text(ssl.DER_cert_to_PEM_cert(der))
    elif what == "date":
        at = der.index(b"\x17\x0d")
        place.write_text(
            ssl.DER_cert_to_PEM_cert(der[:at] + b"\x17\x0d999999999999Z" + der[at + 15 :])
        )
    elif what == "pipe":
        os.mkfifo(place)
    elif what == "folder":
        place.mkdir()
    else:
        place.write_bytes(b"")
    with pytest.raises(FedSieveError, match=r"server\.pem holds no certificate"):
        ends.endings(safe, NOW)


SITE = 'name = "n"\n{top}\n[data]\ntrain = "{train}"\ntext = "text"\n'
PLACES = {"no such user": "~nosuchuser/x", "long": "a" * 300, "nul": "a\\u0000b"}


@pytest.mark.parametrize("key", ["folder", "cache", "model", "train", "test"])
@pytest.mark.parametrize("place", PLACES)
def test_what_can_be_no_path_is_no_path_of_a_site(tmp_path: Path, key: str, place: str) -> None:
    value = PLACES[place]
    top = f'{key} = "{value}"' if key in ("folder", "cache", "model") else ""
    text = SITE.format(top=top, train=value if key == "train" else "train.csv")
    if key == "test":
        text += f'test = "{value}"\n'
    (tmp_path / "train.csv").touch()
    path = tmp_path / "site.toml"
    path.write_text(text)
    with pytest.raises(FedSieveError, match="can be no path"):
        sites.load(path)


@pytest.mark.parametrize("gone", ["app", "app/pyproject.toml", "told.toml", "app and told.toml"])
def test_a_federation_that_lost_a_part_is_not_taken_for_a_run_in_one_process(
    tiny: Tiny, tmp_path: Path, command: Command, gone: str
) -> None:
    """Its rounds would be trained over simulated clients of the server's own rows, unsaid."""
    folder = prepared(tiny, tmp_path / "run")
    for name in gone.split(" and "):
        place = folder / name
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)
    ran = command("resume", folder)
    assert ran.code == 2
    assert "holds a federation: go on with `fedsieve federate --resume" in ran.err
    if gone != "told.toml":
        ran = command("federate", "--resume", folder)
        assert ran.code == 2
        assert "app" in ran.err
        assert "in one process" not in ran.err
