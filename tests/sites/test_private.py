"""A private federation: what the server keeps to itself, and what the sites are told.

Sites are asked in this process, and every frame to them is kept: from what all sites together were
told, who took part when must not follow, nor anything that hides the others.
"""

import itertools
import json
import re
import shutil
import tomllib
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from fedsieve.algebra.budget import Client
from fedsieve.algebra.keys import Key, word
from fedsieve.clients import noise
from fedsieve.clients.sampling import cohort
from fedsieve.errors import FedSieveError
from fedsieve.frame import Frame, unpack
from fedsieve.recipe import read as recipes
from fedsieve.recipe import schema
from fedsieve.run import rundir, runner
from fedsieve.sites import federate
from fedsieve.sites.server import PendingRequest, RoundPolicy, Transport
from tests import runs
from tests.conftest import Tiny
from tests.sites.worlds import OWN, World, at_once, world

pytestmark = pytest.mark.usefixtures("no_report", "flower")

NAMES = ("north", "south", "west")
HALF = {name: {"ratio": 0.5, "down": 0.5, "up": 0.5} for name in NAMES}
SYSTEM = {"clip": 0.1, "delta": 1e-2, "noise_multiplier": 1.0, "noise_from": "system"}
POLICY = RoundPolicy(sites=3, poll=0.0)
LISTEN = federate.ServerAddress()


@pytest.fixture(autouse=True)
def _warnings_are_read_where_they_matter() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


@pytest.fixture
def flower(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the right Flower were installed; nothing of it is used."""
    version = metadata.version
    monkeypatch.setattr(
        metadata, "version", lambda name: "1.41.0" if name == "flwr" else version(name)
    )


class Told(NamedTuple):
    """A frame to a site."""

    site: str
    data: bytes
    frame: Frame


def network(given: World, told: list[Told]) -> Transport:
    """Sites in this process, which answer at once."""
    sent: list[tuple[str, bytes]] = []
    inner = at_once(given.sites, sent)

    def send(number: int, kind: str, data: bytes, seconds: float) -> PendingRequest | None:
        pending = inner.send(number, kind, data, seconds)
        name, data = sent[-1]
        told.append(Told(name, data, unpack(data)))
        return pending

    return inner._replace(send=send)


def private(
    tiny: Tiny, folder: Path, budgets: Mapping[str, Mapping[str, float]] = HALF, **changes: Any
) -> World:
    folder.mkdir(exist_ok=True)
    given: dict[str, Any] = {
        "privacy": SYSTEM,
        "sampling": {"kind": "poisson"},
        "cohort": 2,
        "rounds": 6,
        **changes,
    }
    given = {key: value for key, value in given.items() if value is not None}
    return world(tiny, folder, NAMES, tls=False, budgets=budgets, **given)


def ran(given: World) -> list[Told]:
    """What the sites were told in a whole federation."""
    told: list[Told] = []
    federate.prepare(given.recipe, given.run, POLICY, LISTEN)
    federate.serve(given.run, network(given, told), POLICY, lambda text: None)
    return told


def log(run: Path, name: str) -> list[dict[str, Any]]:
    lines = rundir.place(run, name).read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in OWN} for line in lines]


def drawn(run: Path) -> list[tuple[int, str]]:
    return [(line["round"], line["client"]) for line in log(run, rundir.CLIENTS)]


def from_key(given: World, seed: int) -> list[tuple[int, str]]:
    """Who would take part if this seed decided."""
    clients = [Client(name, 1) for name in NAMES]
    sampling = schema.sampling(given.recipe)
    rounds = range(1, given.recipe.rounds + 1)
    return [(r, c.id) for r in rounds for c in cohort(clients, sampling, Key(seed, r))]


def test_sites_are_told_nothing_of_who_takes_part(tiny: Tiny, tmp_path: Path) -> None:
    given = private(tiny, tmp_path / "a")
    told = ran(given)
    secret = rundir.secret_seed(given.run)
    assert drawn(given.run) == from_key(given, secret)
    # The secret itself went nowhere, in any spelling, nor into the directory of the run.
    spellings = [f"{secret:064x}".encode(), str(secret).encode(), secret.to_bytes(32, "big")]
    written = [path.read_bytes() for path in given.run.rglob("*") if path.is_file()]
    for data in [*(each.data for each in told), *written]:
        assert not any(spelling in data for spelling in spellings)
    assert not (given.run / rundir.CLIENTS).exists()
    assert not (given.run / rundir.CHECKPOINTS).exists()
    # Numbers that the sites do know decide nothing: the seed, and all else that looks like one.
    (text,) = {each.frame.body.decode() for each in told if each.frame.header["do"] == "recipe"}
    numbers = {int(n) for n in re.findall(r"\b\d+\b", text)}
    numbers |= {int(n, 16) for n in re.findall(r"\b[0-9a-f]{8,}\b", text)}
    assert given.recipe.seed in numbers
    assert all(drawn(given.run) != from_key(given, number) for number in numbers)
    # Each site hears of its own rounds alone.
    for each in told:
        if each.frame.header["do"] == "train":
            assert (each.frame.header["round"], each.site) in drawn(given.run)
    # The same recipe again has other cohorts.
    again = private(tiny, tmp_path / "b")
    ran(again)
    assert drawn(again.run) != drawn(given.run)


def test_a_sketch_is_told_to_its_own_site_alone(tiny: Tiny, tmp_path: Path) -> None:
    """A message holds the 64 bits of its own sketch; those that the seed would give are not used.

    They are a hash of the secret, of which one tells nothing of another.
    """
    given = private(tiny, tmp_path / "a")
    told = ran(given)
    every = list(itertools.product(range(1, given.recipe.rounds + 1), NAMES))

    def sketches(seed: int) -> dict[tuple[int, str], bytes]:
        return {at: word(Key(seed, *at, "sketch")).to_bytes(8, "little") for at in every}

    own, public = sketches(rundir.secret_seed(given.run)), sketches(given.recipe.seed)
    trained = [each for each in told if each.frame.header["do"] == "train"]
    assert len(trained) == len(drawn(given.run))
    for each in trained:
        held = [at for at, sketch in own.items() if sketch in each.data]
        assert held == [(each.frame.header["round"], each.site)]
        assert not any(sketch in each.data for sketch in public.values())


@pytest.mark.parametrize("kind", ["poisson", "uniform", "all"])
def test_with_the_same_secrets_one_process_does_the_same(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """To the bit: the adapter, what is told of the rounds, and who took part."""
    given = private(tiny, tmp_path / "a", sampling={"kind": kind}, rounds=3)
    monkeypatch.setattr("fedsieve.run.rundir.secrets.token_hex", lambda size: "5a" * size)
    for federated in (True, False):
        draws = torch.Generator().manual_seed(9)
        again = partial(torch.randn, generator=draws, dtype=torch.float64)
        monkeypatch.setattr(noise, "_from_system", again)
        if federated:
            ran(given)
        else:
            runner.start(given.recipe, tmp_path / "alone", runs.quiet)
    one, two = (
        (run / rundir.ADAPTER / "adapter_model.safetensors").read_bytes()
        for run in (given.run, tmp_path / "alone")
    )
    assert one == two
    for name in (rundir.METRICS, rundir.CLIENTS):
        assert log(given.run, name) == log(tmp_path / "alone", name), name


@pytest.mark.parametrize("more", [{}, {"simulated_cohort": 3}])
def test_noise_that_sites_could_take_off_is_refused(
    tiny: Tiny, tmp_path: Path, more: dict[str, int]
) -> None:
    seeded = {**SYSTEM, "noise_from": "seed", **more}
    given = private(tiny, tmp_path / "a", privacy=seeded)
    with pytest.raises(FedSieveError, match=r"privacy.noise_from: in a federation it must be"):
        federate.prepare(given.recipe, given.run, POLICY, LISTEN)
    assert not given.run.exists()
    # One that was prepared before this was refused does not go on either.
    given.run.mkdir()
    rundir.create(given.run, recipes.dump(given.recipe, {"federation": "a"}))
    with pytest.raises(FedSieveError, match=r"privacy.noise_from: in a federation it must be"):
        federate.serve(given.run, network(given, []), POLICY, lambda text: None)


def test_a_federation_without_its_secret_does_not_go_on(tiny: Tiny, tmp_path: Path) -> None:
    given = private(tiny, tmp_path / "a")
    federate.prepare(given.recipe, given.run, POLICY, LISTEN)
    shutil.rmtree(rundir.own(given.run))
    with pytest.raises(FedSieveError, match=r"run\.secret/seed cannot be read"):
        federate.serve(given.run, network(given, []), POLICY, lambda text: None)


def test_a_database_that_lies_beside_what_may_be_handed_on_is_named(
    tiny: Tiny, tmp_path: Path
) -> None:
    """A service file that names the other place makes it there."""
    given = private(tiny, tmp_path / "a", rounds=1)
    federate.prepare(given.recipe, given.run, POLICY, LISTEN)
    said: list[str] = []
    federate.serve(given.run, network(given, []), POLICY, said.append)
    assert not any("link.db" in line for line in said)
    open_to_all = given.run / federate.HOME / "link.db"
    open_to_all.touch()
    federate.serve(given.run, network(given, []), POLICY, said.append)
    (line,) = [line for line in said if "link.db" in line]
    assert line.startswith(f"warning: {open_to_all} holds what single clients sent")
    assert str(rundir.own(given.run) / "link.db") in line


def test_what_holds_against_whom_is_written_down(tiny: Tiny, tmp_path: Path) -> None:
    given = private(tiny, tmp_path / "a")
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        federate.prepare(given.recipe, given.run, POLICY, LISTEN)
    notes = tomllib.loads((given.run / rundir.RECIPE).read_text())["environment"]["notes"]
    said = [str(warning.message) for warning in heard]
    for part in ("against those who know", "mean training loss: withheld"):
        assert any(part in note for note in notes)
        assert any(part in text for text in said)


@pytest.mark.parametrize(
    ("kind", "cohort", "said"),
    [("poisson", 2, False), ("uniform", 2, True), ("uniform", 3, False), ("all", 2, False)],
)
def test_that_a_site_s_own_draw_tells_of_the_others_is_said(
    tiny: Tiny, tmp_path: Path, kind: str, cohort: int, said: bool
) -> None:
    given = private(tiny, tmp_path / "a", sampling={"kind": kind}, cohort=cohort)
    federate.prepare(given.recipe, given.run, POLICY, LISTEN)
    notes = tomllib.loads((given.run / rundir.RECIPE).read_text())["environment"]["notes"]
    assert any("against sites the epsilon without" in note for note in notes) == said


@pytest.mark.parametrize("method", ["fslora_flasc", "fedsa_lora"])
def test_sites_are_not_asked_for_figures_from_their_own_rows(
    tiny: Tiny, tmp_path: Path, method: str
) -> None:
    whole: dict[str, dict[str, float]] = {name: {} for name in NAMES}
    given = private(tiny, tmp_path / "a", whole, method={"name": method}, rounds=2)
    data = given.recipe.data.model_copy(update={"test": None})
    given = given._replace(recipe=given.recipe.model_copy(update={"data": data}))
    for path in given.sites.values():
        path.write_text(path.read_text().replace("[data]", f'[data]\ntest = "{tiny.test}"'))
    told = ran(given)
    assert {each.frame.header["do"] for each in told} == {"describe", "recipe", "train", "keep"}
    keys = {key for row in runs.lines(given.run) for key in row}
    assert not {"loss", "accuracy", "eval_loss"} & keys
    notes = tomllib.loads((given.run / rundir.RECIPE).read_text())["environment"]["notes"]
    assert any("taken on the sites' own rows: withheld" in note for note in notes)


def test_without_privacy_the_seed_decides_as_in_one_process(tiny: Tiny, tmp_path: Path) -> None:
    given = private(tiny, tmp_path / "a", privacy=None, rounds=2)
    ran(given)
    assert not rundir.own(given.run).exists()
    assert drawn(given.run) == from_key(given, given.recipe.seed)
