"""What a site calls itself and says, and what either end learns of the other's machine."""

import errno
import json
import re
import tomllib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization

from fedsieve import methods
from fedsieve.algebra.budget import Budget
from fedsieve.errors import FedSieveError
from fedsieve.frame import Frame, pack, unpack
from fedsieve.methods import fedit
from fedsieve.recipe import read as recipe
from fedsieve.sites import federate, resident
from fedsieve.sites.server import RoundPolicy, Sites, cleaned
from fedsieve.sites.worker import without_paths
from tests import toy
from tests.conftest import LABELS, Tiny
from tests.sites import certificates
from tests.sites.sites import recipe_text, settled, write_site
from tests.sites.test_federate import GOOD, PATIENCE
from tests.sites.test_federate import flower as flower
from tests.sites.test_flower import EXACT, RECIPE, Net, federation, run, site

OURS = federate.Ours("b", "r")
LONG = "x" * 20_000
HOSTILE: dict[str, Any] = {
    "steers the terminal": "\x1b[2J\x1b]0;owned\x07",
    "more lines": "fine\nround 9/9 accuracy 1.0\r\n",
    "long": LONG,
    "turns the line": "\u202enorth\u2066",
    "markup": "<script>alert(1)</script>",
    "nul": "a\0b",
    "half a character": "\ud800",
    "a list": [LONG] * 2,
    "a table": {"x": "\x1b[2J" + LONG},
    "endless": 10**4000,
    "nothing": None,
    "a number": 1e300,
    "path": "../../etc/passwd",
}


def assert_fit(lines: list[str]) -> None:
    for line in lines:
        assert line.isprintable(), line
        assert len(line) <= 700


FIELDS = [
    ("describe", "name"), ("describe", "error"), ("describe", "versions"), ("describe", "budget"),
    ("describe", "examples"), ("recipe", "error"), ("recipe", "base"), ("train", "error"),
    ("train", "reason"), ("train", "round"), ("train", "loss"), ("train", "steps"),
    ("evaluate", "error"), ("evaluate", "counted"),
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize(("do", "field"), FIELDS)
def test_whatever_a_site_says_is_bounded_and_cleaned(do: str, field: str, text: str) -> None:
    members = toy.clients([Budget()] * 2)
    method = fedit.method(**EXACT)
    first, honest = (site(each, method) for each in members)
    net = Net({0: lambda f: Frame({"ok": True}) if f.header["do"] == "evaluate" else first(f)})

    def lying(request: Frame) -> Any:
        answer = honest(request) if request.header["do"] != "evaluate" else Frame({"ok": True})
        if request.header["do"] != do:
            return answer
        assert isinstance(answer, Frame)
        wrong = {"ok": False} if field == "error" else {}
        return Frame({**answer.header, **wrong, field: HOSTILE[text]}, answer.body)

    net.answers[1] = lying
    said: list[str] = []
    policy = RoundPolicy(sites=2, wait=20.0)

    def welcome(head: Any, client: Any) -> Any:
        if client is None:
            head = {**head, "versions": head["versions"] or {"wire": 1}}
        else:
            head = {"base": "b", "reads": "r", "examples": 5, **head}
        return federate._welcome(head, client, method, OURS, said.append)

    sites = Sites(
        net.transport(), RECIPE, "digest", welcome, policy, said.append, lambda: net.now, net.sleep
    )
    setup = federation(sites, method, size=2)
    _, receipts, _ = run(setup, 1)
    sites.ask_all("evaluate", b"", 5.0)
    assert_fit(said)
    assert_fit([r.dropped for r in receipts if r.dropped])
    assert next(r.client for r in receipts if not r.dropped) == "0000"


@pytest.mark.parametrize("name", ["", ".", "a b", "-x", "<b>", "é", "x" * 65, "a\n", None, 7])
def test_a_name_that_no_site_file_could_have_is_refused(name: Any) -> None:
    with pytest.raises(FedSieveError, match="no usable name"):
        federate._welcome({**GOOD, "name": name}, None, fedit.method(), OURS, lambda text: None)


@pytest.mark.parametrize("name", methods.names())
@pytest.mark.parametrize("least", [(5e-324, 5e-324, 5e-324), (1e-300, 1.0, 1e-17)])
def test_the_least_budgets_that_a_site_can_tell_end_no_round(
    name: str, least: tuple[float, float, float]
) -> None:
    method = methods.load(name)(**EXACT)
    said = {"budget": dict(zip(Budget._fields, least, strict=True))}
    poor = federate._welcome({**GOOD, **said}, None, method, OURS, lambda text: None)
    others = toy.clients([Budget()] * 2)
    given = [poor._replace(id=others[0].id, examples=others[0].examples), others[1]]
    tensors, receipts, _ = toy.after(method, given, 2)
    assert [receipt.dropped for receipt in receipts] == [None] * 4
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def test_cleaned_keeps_what_is_fit() -> None:
    assert cleaned("its update was refused: 9 > 8") == "its update was refused: 9 > 8"


def sites_with(
    net: Net,
    said: list[str],
    known: dict[str, str],
    keep: Callable[[Mapping[str, str]], None] = lambda keys: None,
) -> Sites:
    def welcome(head: Any, client: Any) -> Any:
        return client or toy.clients([Budget()])[0]._replace(id=head["name"])

    policy = RoundPolicy(sites=1, wait=20.0)
    clock = lambda: net.now  # noqa: E731
    return Sites(
        net.transport(),
        RECIPE,
        "digest",
        welcome,
        policy,
        said.append,
        clock,
        net.sleep,
        keys=known,
        pin=keep,
    )


def test_one_key_holds_one_name() -> None:
    """A registered node that comes as one site, goes, and comes as another."""
    north, south = (
        c._replace(id=n) for c, n in zip(toy.clients([Budget()] * 2), "ns", strict=True)
    )
    method = fedit.method(**EXACT)
    said: list[str] = []
    net = Net({5: site(north, method)}, keys={5: "one", 6: "one", 7: "two"})
    sites = sites_with(net, said, {})
    assert [c.id for c in sites.there()] == ["n"]
    net.answers = {6: site(south, method)}
    with pytest.raises(FedSieveError, match="0 sites are there"):
        sites.there()
    assert any("its node's key is that of site 'n': a key holds one name" in line for line in said)
    net.answers = {7: site(south, method)}
    assert [c.id for c in sites.there()] == ["s"]


def test_a_name_that_the_owner_bound_is_nobody_elses() -> None:
    """The one that comes first is refused, and the true site is let in."""
    (north,) = (c._replace(id="0007") for c in toy.clients([Budget()]))
    method = fedit.method(**EXACT)
    said: list[str] = []
    net = Net({5: site(north, method), 6: site(north, method)}, keys={5: "thief", 6: "true"})
    sites = sites_with(net, said, {"0007": "true"})
    assert [c.id for c in sites.there()] == ["0007"]
    run(federation(sites, method, size=1), 1)
    assert {node for node, head in net.asked if head["do"] == "train"} == {6}


def test_the_owner_binds_names_with_the_keys_that_sites_send(tmp_path: Path) -> None:
    key = certificates.node_key(tmp_path / "key")
    line = key.with_suffix(".pub").read_text()
    place = tmp_path / "sites.json"
    place.write_text(json.dumps({"north": line}))
    private = serialization.load_ssh_private_key(key.read_bytes(), None)
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    pem = private.public_key().public_bytes(serialization.Encoding.PEM, form)
    assert federate._known(place) == {"north": pem.hex()}
    for wrong in ('{"a": "1", "b": "1"}', "[]", "{", '{"a": 1}', '{"a": "ecdsa-no"}'):
        place.write_text(wrong)
        with pytest.raises(FedSieveError, match=r"sites\.json"):
            federate._known(place)


def test_a_disk_that_takes_no_key_ends_the_server_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever came after a restart could take the site's name."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "sites.json"))

    (north,) = (c._replace(id="n") for c in toy.clients([Budget()]))
    net = Net({5: site(north, fedit.method(**EXACT))}, keys={5: "one"})
    said: list[str] = []
    place = tmp_path / "sites.json"
    keep = partial(federate._keep, place)
    assert [c.id for c in sites_with(net, said, {}, keep).there()] == ["n"]
    assert json.loads(place.read_text()) == {"n": "one"}
    monkeypatch.setattr(federate, "write_whole", full)
    with pytest.raises(FedSieveError, match=r"sites\.json cannot be written: No space left"):
        sites_with(net, said, {}, keep).there()
    assert json.loads(place.read_text()) == {"n": "one"}


@pytest.mark.usefixtures("flower")
def test_no_path_of_the_server_reaches_a_site(tiny: Tiny, tmp_path: Path) -> None:
    """What is told holds no path, no version, no column; and two federations stay two."""
    given = recipe.check(tiny.table(data__classes=list(LABELS)))
    texts = []
    for name in ("one", "two"):
        federate.prepare(given, tmp_path / name, PATIENCE, federate.ServerAddress())
        texts.append((tmp_path / name / federate.TOLD).read_text())
    assert texts[0] != texts[1]
    for text in texts:
        table = tomllib.loads(text)
        assert set(table["environment"]) == {"federation"}
        assert "/" not in re.sub(r'federation = ".*"', "", text)
        how = {"max_length", "first_option", "new_tokens", "stop"}  # rows are read; no places
        assert set(table["data"]) <= {"train", "classes", "validation", *how}
    state = settled(write_site(tiny, tmp_path))
    assert resident.answer(state, Frame({"do": "recipe"}, texts[0].encode())).header["ok"]


@pytest.mark.parametrize(
    "text",
    ["no worker at {}: start it", "'{}' is damaged", "cannot read {}", "({})", "a={}, b", "{}"],
)
@pytest.mark.parametrize(
    "path", ["/srv/site/x.sock", "~/models/base", "C:\\Users\\x", "/a b/c d.csv"]
)
def test_no_path_of_a_site_reaches_the_server(text: str, path: str) -> None:
    told = without_paths(text.format(path), path)
    assert path not in told
    if " " not in path:
        assert path not in without_paths(text.format(path))
    assert told == text.format("<a path of the site>")


@pytest.mark.parametrize("folder", ["/home/a name/of 2024", "a b/c", "/srv//site/./x", "~/my site"])
def test_no_path_of_a_socket_reaches_the_server(
    monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    """A node whose worker is not running answers by itself."""
    pytest.importorskip("flwr", reason="needs the extra fedsieve[flower]")
    from fedsieve.sites import flower_app as app

    def message(content: Any, reply_to: Any = None) -> Any:  # Flower's wants a node at work
        return SimpleNamespace(content=content, has_error=lambda: False)

    monkeypatch.setattr(app, "Message", message)
    node: Any = SimpleNamespace(node_config={app.SETTING: f"{folder}/door/worker.sock"})
    asked = message(app.content_of(pack(Frame({"do": "describe"}))))
    said = unpack(app.frame_of(app.relay(asked, node))).header["error"]
    assert said.startswith("no worker listens at <a path of the site>: start")


def test_errors_of_a_site_tell_no_path(tiny: Tiny, tmp_path: Path, monkeypatch: Any) -> None:
    state = settled(write_site(tiny, tmp_path))

    def broken(*_: Any) -> Any:
        raise FedSieveError(f"the file {state.site.data.train} of {state.site.folder} is odd")

    monkeypatch.setattr(resident, "prepare", broken)
    answer = resident.answer(state, Frame({"do": "recipe"}, recipe_text(tiny)))
    assert str(tmp_path) not in answer.header["error"]
    assert "is odd" in answer.header["error"]
