"""What `fedsieve federate` writes and says, and whom the server lets in; nothing is started."""

import errno
import json
import tomllib
import warnings
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from safetensors.torch import save_file

from fedsieve import cli
from fedsieve.algebra.budget import Budget, Client
from fedsieve.errors import FedSieveError
from fedsieve.methods import fedit, flasc, fslora_flasc
from fedsieve.recipe import read as recipe
from fedsieve.recipe import schema
from fedsieve.run import rundir
from fedsieve.sites import federate
from fedsieve.sites.server import RoundPolicy
from tests.conftest import LABELS, Command, Tiny
from tests.sites import certificates

PATIENCE = RoundPolicy(sites=3, deadline=30.0)
GOOD: Mapping[str, Any] = {
    "name": "north",
    "versions": {"wire": 1},
    "budget": {"ratio": 0.5, "down": 0.25, "up": 1},
}


@pytest.fixture
def flower(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the right Flower were installed."""
    version = metadata.version
    monkeypatch.setattr(
        metadata, "version", lambda name: "1.41.3" if name == "flwr" else version(name)
    )


def checked(tiny: Tiny, **changes: Any) -> schema.Recipe:
    return recipe.check(tiny.table(data__classes=list(LABELS), **changes))


READY = {"base": "b", "reads": "r", "examples": 30}  # of a site that was told the recipe


def welcome(head: Mapping[str, Any], client: Client | None = None, **more: Any) -> Client:
    given = {
        "method": fslora_flasc.method(),
        "ours": federate.Ours("b", "r"),
        "say": lambda text: None,
        **more,
    }
    return federate._welcome(head, client, **given)


@pytest.mark.usefixtures("flower")
def test_app_holds_no_program(tiny: Tiny, tmp_path: Path) -> None:
    federate.prepare(checked(tiny), tmp_path / "run", PATIENCE, federate.ServerAddress(port=1234))
    app = tmp_path / "run" / "app"
    assert [path.name for path in app.iterdir()] == ["pyproject.toml"]
    table = tomllib.loads((app / "pyproject.toml").read_text())
    assert table["project"]["dependencies"] == []
    assert table["tool"]["flwr"]["app"]["config"]["folder"] == str(tmp_path / "run")
    # No data, no method, no path of the sites: the nodes get this file too.
    assert set(table["tool"]["flwr"]["app"]["config"]) == {
        "folder", "tls", "sites", "deadline", "setup", "wait", "extra",
    }  # fmt: skip


@pytest.mark.usefixtures("flower")
def test_times_to_wait_may_be_others_when_it_goes_on(
    tiny: Tiny, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deadline that proves too short would else end the federation for good."""
    run = tmp_path / "run"
    federate.prepare(checked(tiny), run, PATIENCE, federate.ServerAddress())
    path = run / "app" / "pyproject.toml"
    before = tomllib.loads(path.read_text())
    began: list[Path] = []
    monkeypatch.setattr(cli, "_run_flower", lambda folder, _: began.append(folder))
    ran = command("federate", "--resume", str(run), "--deadline", "1234", "--wait", "5")
    assert "from now on: deadline 1234 s, wait 5 s" in ran.out
    after = tomllib.loads(path.read_text())
    config = before["tool"]["flwr"]["app"]["config"]
    config |= {"deadline": 1234.0, "wait": 5.0}
    assert began == [run]
    assert after == before
    federate.begin_again(run)  # and these stay
    assert tomllib.loads(path.read_text()) == after
    ran = command("federate", "--resume", str(run), "--wait", "1e9")
    assert (ran.code, began) == (2, [run])
    assert "--wait 1e+09: it must be a number below 1e+09" in " ".join(ran.err.split())
    assert tomllib.loads(path.read_text()) == after


@pytest.mark.usefixtures("flower")
def test_a_federation_of_0_1_finds_the_program_where_it_is_now(tiny: Tiny, tmp_path: Path) -> None:
    run = tmp_path / "run"
    federate.prepare(checked(tiny), run, PATIENCE, federate.ServerAddress())
    path = run / "app" / "pyproject.toml"
    now = tomllib.loads(path.read_text())
    path.write_text(path.read_text().replace("fedsieve.sites.flower_app:", "fedsieve.flower_app:"))
    assert tomllib.loads(path.read_text()) != now
    federate.begin_again(run)
    assert tomllib.loads(path.read_text()) == now


@pytest.mark.usefixtures("flower")
@pytest.mark.parametrize("odd", ["a module", "a link", "another folder", "a dependency"])
def test_an_app_that_is_not_as_it_was_written_is_not_run(
    tiny: Tiny, tmp_path: Path, odd: str
) -> None:
    """A directory from somebody else: Flower would put the app's folder before all others."""
    run = tmp_path / "run"
    federate.prepare(checked(tiny), run, PATIENCE, federate.ServerAddress())
    app = run / federate.APP
    file = app / "pyproject.toml"
    text = file.read_text(encoding="utf-8")
    why = "app"
    if odd == "a module":
        (app / "torch.py").write_text("")
    elif odd == "a link":
        file.unlink()
        file.symlink_to(tmp_path / "elsewhere")
    elif odd == "another folder":
        file.write_text(text.replace(str(run), str(tmp_path / "other")), encoding="utf-8")
        why = (
            f"it was prepared as {tmp_path / 'other'}, and its parts name each other: move it back"
        )
    else:
        file.write_text(text.replace("dependencies = []", 'dependencies = ["x"]'), encoding="utf-8")
    with pytest.raises(FedSieveError, match=why):
        federate.begin_again(run)


@pytest.mark.usefixtures("flower")
@pytest.mark.parametrize(("number", "also"), [(None, ""), (1, " --at-round 1")])
def test_a_federation_whose_disk_is_full_starts_no_server(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int | None, also: str
) -> None:
    run = tmp_path / "run"
    federate.prepare(checked(tiny), run, PATIENCE, federate.ServerAddress())

    def full(path: Path, *_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(federate, "write_whole", full)
    with pytest.raises(FedSieveError) as caught:
        federate.begin_again(run, number)
    assert f"make room, then `fedsieve federate --resume {run}{also}`" in str(caught.value)


IN_VAIN = [
    (["--resume", "run", "--at-round", "1"], ["--port", "9"]),
    (["--resume", "run", "--deadline", "5"], ["--sites", "2"]),
    (["--resume", "run"], ["--sites", "7"]),
    (["--resume", "run"], ["--extra", "0"]),
    (["--resume", "run"], ["--host", "0.0.0.0", "--insecure"]),
    (["--resume", "run"], ["--certificates", "nowhere"]),
    (["--resume", "run"], ["--out", "elsewhere"]),
    (["--resume", "run"], ["--local", "2"]),
    (["demo", "--local", "2"], ["--port", "80"]),
    (["demo", "--local", "2"], ["--certificates", "nowhere"]),
    (["demo", "--local", "2"], ["--insecure", "--host", "127.0.0.1"]),
    (["demo", "--local", "2"], ["--sites", "2"]),
]


@pytest.mark.usefixtures("flower")
@pytest.mark.parametrize(("asked", "vain"), IN_VAIN)
def test_options_that_would_do_nothing_are_refused(
    tmp_path: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    asked: list[str],
    vain: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = command("federate", *asked, *vain)
    said = " ".join(ran.err.split())
    assert ran.code == 2
    assert all(each in said for each in vain if each.startswith("--"))
    assert "out" in said
    assert not [*tmp_path.iterdir()]


def test_no_proxy_stands_between_a_federation_and_its_own_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "example.org")
    monkeypatch.delenv("NO_PROXY", raising=False)
    found = federate.environment(tmp_path)
    assert found["no_proxy"] == "example.org,127.0.0.1,localhost,::1"
    assert found["NO_PROXY"] == "127.0.0.1,localhost,::1"


@pytest.mark.usefixtures("flower")
def test_each_federation_has_a_name_of_its_own(tiny: Tiny, tmp_path: Path) -> None:
    """Sites know a run by its recipe's digest: the same recipe started afresh is another run."""
    for name in ("a", "b"):
        federate.prepare(checked(tiny), tmp_path / name, PATIENCE, federate.ServerAddress())
    one, two = ((tmp_path / name / "recipe.toml").read_text() for name in ("a", "b"))
    assert one != two
    tables = [tomllib.loads(text) for text in (one, two)]
    for table in tables:
        table["environment"].pop("federation")
    assert tables[0] == tables[1]


@pytest.mark.usefixtures("flower")
@pytest.mark.parametrize(
    "name",
    ["app/pyproject.toml", "flower/config.toml", "flower/rose.txt", "told.toml", "sites.json",
     "kept.json", "sites/0000/mine", "set-aside/mine", "metrics.jsonl", "adapter/mine"],
)  # fmt: skip
@pytest.mark.parametrize("local", [False, True])
def test_no_file_of_the_users_is_replaced(
    tiny: Tiny, tmp_path: Path, command: Command, name: str, local: bool
) -> None:
    """`--out .` in a project that has an app of its own, say."""
    folder = tmp_path / "project"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text("mine")
    source = tmp_path / "r.toml"
    source.write_text(recipe.dump(checked(tiny), {}))
    ran = command(
        "federate", str(source), "--out", str(folder), *(["--local", "2"] if local else [])
    )
    assert ran.code == 2
    assert f"has {name.partition('/')[0]}, " in " ".join(ran.err.split())
    there = {path for path in folder.rglob("*") if path.is_file()}
    assert there - {folder / rundir.LOCK} == {folder / name}
    assert (folder / name).read_text() == "mine"


@pytest.mark.usefixtures("flower")
def test_a_run_that_is_there_is_not_replaced(tiny: Tiny, tmp_path: Path) -> None:
    federate.prepare(checked(tiny), tmp_path, PATIENCE, federate.ServerAddress())
    with pytest.raises(FedSieveError, match="holds a run already"):
        federate.prepare(checked(tiny), tmp_path, PATIENCE, federate.ServerAddress())


@pytest.mark.usefixtures("flower")
@pytest.mark.parametrize("missing", ["ca.crt", "server.pem", "server.key"])
def test_certificates_must_be_whole(tiny: Tiny, tmp_path: Path, missing: str) -> None:
    safe = certificates.make(tmp_path / "safe")
    content = (safe / missing).read_bytes()
    (safe / missing).unlink()
    listen = federate.ServerAddress("0.0.0.0", certificates=safe)
    with pytest.raises(FedSieveError, match=f"has no {missing}"):
        federate.prepare(checked(tiny), tmp_path / "run", PATIENCE, listen)
    (safe / missing).write_bytes(content)
    server, node, _ = federate.prepare(checked(tiny), tmp_path / "run", PATIENCE, listen)
    assert "--enable-supernode-auth" in server
    assert "--insecure" not in server + node
    assert "--auth-supernode-private-key" in node


@pytest.mark.usefixtures("flower")
@pytest.mark.parametrize(
    ("sites", "extra", "said"),
    [
        (2, 0, "cohort is 3, and 2 sites are waited for: a round may have fewer"),
        (3, 1, "cohort is 3 and 1 more are asked, and 3 sites are waited for"),
        (4, 1, None),
        (3, 0, None),
    ],
)
def test_more_than_there_are_sites_is_told(
    tiny: Tiny, tmp_path: Path, sites: int, extra: int, said: str | None
) -> None:
    policy = PATIENCE._replace(sites=sites, extra=extra)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        federate.prepare(checked(tiny), tmp_path / "run", policy, federate.ServerAddress())
    told = [str(each.message) for each in caught if "waited for" in str(each.message)]
    assert len(told) == (said is not None)
    assert said is None or told[0].startswith(said)


@pytest.mark.usefixtures("flower")
def test_recipes_that_cannot_run_on_a_network(tiny: Tiny, tmp_path: Path) -> None:
    def prepare(given: schema.Recipe, patience: RoundPolicy = PATIENCE) -> None:
        federate.prepare(given, tmp_path / "run", patience, federate.ServerAddress())

    with pytest.raises(FedSieveError, match=r"data\.classes: list the labels"):
        prepare(recipe.check(tiny.table()))
    private = {"clip": 1.0, "delta": 1e-5, "noise_multiplier": 1.0}
    given = checked(tiny, method={"name": "fedit"}, budgets=None, privacy=private)
    with pytest.raises(FedSieveError, match="--extra: the accountant"):
        prepare(given, PATIENCE._replace(extra=1))
    counted = {"optimizer": "sgd", "lr": 0.1, "epochs": 1}
    given = checked(tiny, method={"name": "scaffold"}, budgets=None, training=counted)
    with pytest.raises(FedSieveError, match=r"training\.steps: scaffold computes with how many"):
        prepare(given)


@pytest.mark.usefixtures("flower")
def test_a_server_has_no_rows_for_models_that_are_the_clients_own(
    tiny: Tiny, tmp_path: Path
) -> None:
    """It would evaluate a model without any client's B."""
    given = checked(tiny, method={"name": "fedsa_lora"}, budgets=None)
    assert given.data.test is not None
    with pytest.warns(UserWarning, match=r"data\.test is not used: with fedsa_lora"):
        federate.prepare(given, tmp_path / "run", PATIENCE, federate.ServerAddress())
    assert recipe.load(str(tmp_path / "run" / "recipe.toml")).data.test is None


def test_flower_that_is_missing_or_another(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(FedSieveError, match=r"Flower 1\.41: pip install 'fedsieve\[flower\]'"):
        federate.check_installed()
    monkeypatch.setattr(metadata, "version", lambda name: "1.42.0")
    with pytest.raises(FedSieveError, match=r"Flower 1\.42\.0 is installed, 1\.41 is needed"):
        federate.check_installed()


@pytest.mark.usefixtures("flower")
def test_resume_wants_a_federation(tmp_path: Path, command: Command, whole: Path) -> None:
    ran = command("federate", "--resume", tmp_path)
    assert ran.code == 2
    assert "holds no run" in ran.err
    ran = command("federate", "--resume", whole)
    assert ran.code == 2
    assert "holds a run in one process" in ran.err


ENDS = {  # what the Flower run leaves -> the command's exit code, and what it says
    "nothing at all": (2, "round 0 of 2"),
    "one round, but not its checkpoint": (2, "round 0 of 2"),
    "all rounds, but not the adapter": (2, "has no final adapter"),
    "the adapter, but no report": (2, "before its report was written"),
    "the report, but the sites have nothing": (2, "before its sites were given the final adapter"),
    "what the sites have is of an earlier end": (2, "before its sites were given"),
    "a file of somebody else's": (2, "before its sites were given"),
    "everything": (0, ""),
    "everything, but for a site": (0, "east did not get the final adapter: start `fedsieve fed"),
    "a word of sites that is none": (0, ""),
}
KEPT = {  # what of these leaves a word of what the sites have
    "what the sites have is of an earlier end": '{"round": 1}',
    "a file of somebody else's": '{"round": ' + "9" * 5000 + "}",
    "everything": '{"round": 2}',
    "everything, but for a site": '{"round": 2, "without": ["east"]}',
    "a word of sites that is none": '{"round": 2, "without": 7}',
}


@pytest.mark.usefixtures("flower")
@pytest.mark.parametrize("left", ENDS)
def test_a_flower_run_that_ended_early_is_no_success(
    tiny: Tiny, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    """`flwr run` itself ends with 0 when what it ran has failed."""
    folder = tmp_path / "run"
    federate.prepare(checked(tiny, rounds=2), folder, PATIENCE, federate.ServerAddress())
    number = {"nothing at all": -1, "one round, but not its checkpoint": 1}.get(left, 2)
    for each in range(number + 1):
        figures = {"down_bytes": 1, "up_bytes": 1, "total_bytes": 2 * each, "loss": 0.5}
        line = json.dumps({"round": each, "seconds": 1.0, "dropped": 0, **figures}) + "\n"
        (folder / "metrics.jsonl").open("a").write(line)
    if number == 2 and left != "all rounds, but not the adapter":
        (folder / "adapter").mkdir()
        save_file({}, folder / "adapter" / "adapter_model.safetensors")
        if left != "the adapter, but no report":
            (folder / "report.html").touch()
        if left in KEPT:
            (folder / federate.KEPT).write_text(KEPT[left])
    flwr = tmp_path / "bin" / "flwr"
    flwr.parent.mkdir()
    flwr.write_text("#!/bin/sh\nexit 0\n")
    flwr.chmod(0o755)
    monkeypatch.setenv("PATH", f"{flwr.parent}:/usr/bin:/bin")
    code, said = ENDS[left]
    ran = command("federate", "--resume", folder)
    assert ran.code == code, ran.err
    assert said in " ".join(ran.err.split())


@pytest.mark.usefixtures("flower")
def test_federation_does_not_go_on_in_one_process(
    tiny: Tiny, tmp_path: Path, command: Command
) -> None:
    federate.prepare(checked(tiny), tmp_path, PATIENCE, federate.ServerAddress())
    ran = command("resume", tmp_path)
    assert ran.code == 2
    assert f"fedsieve federate --resume {tmp_path}" in ran.err


def test_site_is_who_it_says() -> None:
    client = welcome(GOOD)
    assert client == Client("north", 1, Budget(0.5, 0.25, 1.0))
    assert welcome(READY, client) == client._replace(examples=30)


def test_budget_that_the_method_does_not_use() -> None:
    said: list[str] = []
    named = welcome(GOOD, method=fedit.method(), say=said.append)
    assert said == []  # one that says so and is not taken, as for its key, says nothing
    client = welcome(READY, named, method=fedit.method(), say=said.append)
    assert client.budget == Budget()
    assert said == ["site 'north': the method makes no use of its budget's ratio, down"]


def test_a_site_without_a_budget_is_named_where_the_method_has_use_for_one() -> None:
    said: list[str] = []
    none = {**GOOD, "budget": {"ratio": 0.5, "down": 1.0, "up": 1.0}}
    for method in (flasc.method(), fedit.method(), fslora_flasc.method()):
        welcome(READY, welcome(none), method=method, say=said.append)
    unused = "site 'north': the method makes no use of its budget's ratio"
    assert [said[0], said[2]] == [unused, unused]
    assert said[1].startswith("site 'north' tells no budget below 1 (down, up): all")
    assert len(said) == 3


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"versions": {"wire": 2}}, "site 'north' speaks version 2 of FedSieve's messages"),
        ({"versions": None}, "site 'north' speaks version None"),
        ({"name": ""}, "no usable name"),
        ({"name": "a\nb"}, "no usable name"),
        ({"name": "x" * 65}, "no usable name"),
        ({"budget": {"ratio": 0}}, "its budget has ratio 0"),
        ({"budget": {"up": 1.5}}, r"its budget has up 1\.5"),
        ({"budget": {"down": True}}, "its budget has down True"),
    ],
)
def test_description_is_not_believed(change: dict[str, Any], why: str) -> None:
    with pytest.raises(FedSieveError, match=why):
        welcome({**GOOD, **change})


@pytest.mark.parametrize(
    ("head", "why"),
    [
        ({"base": "c", "examples": 30}, "base model of site 'north' has other weights"),
        ({"base": "b", "reads": "s", "examples": 30}, "model of site 'north' reads rows otherwise"),
        ({"base": "b", "examples": 30}, "model of site 'north' reads rows otherwise"),
        ({"base": "b", "reads": "r", "examples": 0}, "site 'north' has no examples"),
        ({"base": "b", "reads": "r", "examples": "all"}, "examples"),
    ],
)
def test_site_that_cannot_take_part(head: dict[str, Any], why: str) -> None:
    with pytest.raises(FedSieveError, match=why):
        welcome(head, Client("north", 1))


def test_no_file_of_the_servers_is_told_to_sites_through_a_link(tiny: Tiny, tmp_path: Path) -> None:
    folder, other = tmp_path / "run", tmp_path / "letter"
    federate.prepare(checked(tiny), folder, PATIENCE, federate.ServerAddress())
    other.write_text("dear")
    (folder / federate.TOLD).unlink(missing_ok=True)
    (folder / federate.TOLD).symlink_to(other)
    with pytest.raises(FedSieveError, match="is a symbolic link"):
        federate.serve(folder, None, PATIENCE, print)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text", [None, "", "superlink = 1", "[superlink]", "x" + ".x" * 99 + " = 1"]
)
def test_a_federations_own_table_that_was_changed_is_refused(
    tiny: Tiny, tmp_path: Path, text: str | None
) -> None:
    folder = tmp_path / "run"
    federate.prepare(checked(tiny), folder, PATIENCE, federate.ServerAddress())
    config = folder / federate.HOME / "config.toml"
    config.unlink()
    if text is not None:
        config.write_text(text)
    with pytest.raises(FedSieveError, match=r"config\.toml"):
        federate.begin_again(folder)


@pytest.mark.usefixtures("flower")
def test_a_method_of_ones_own_is_for_no_site(tiny: Tiny, tmp_path: Path, command: Command) -> None:
    """No site takes a program from a server, whatever flag the server was given."""
    path = tmp_path / "recipe.toml"
    path.write_text(tomli_w.dumps(tiny.table(method={"name": "mine.own"}, budgets=[{}])))
    ran = command("federate", path, "--local", "2", "--out", tmp_path / "run")
    assert ran.code == 2
    told = " ".join(ran.err.split())
    assert "method.name 'mine.own' is no method of FedSieve: sites take no program" in told
    assert "--allow-code" not in told
