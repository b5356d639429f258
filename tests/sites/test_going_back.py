"""A federation goes back to an earlier checkpoint, over real sites, and ends as if it had not left.

The law is that of one process: what was done after the checkpoint leaves no trace in what is done
then, though sites have kept memories of it, and it is all still there beside the run.
"""

import socket
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("flwr", reason="needs the extra fedsieve[flower]")

from fedsieve import cli
from fedsieve.algebra.budget import Client
from fedsieve.algebra.payload import exact, rounded
from fedsieve.engine.client import Reply, facts
from fedsieve.errors import FedSieveError
from fedsieve.frame import Frame, pack, refusal, unpack
from fedsieve.recipe.experiment import from_recipe
from fedsieve.run import checkpoint, rundir, runner
from fedsieve.sites import federate, here, journal, resident, worker
from fedsieve.sites.server import Incoming, PendingRequest, Transport
from fedsieve.train import local
from fedsieve.train.local import Fit
from fedsieve.wire import decode, encode
from tests import runs
from tests.conftest import Command, Tiny
from tests.sites.sites import quiet
from tests.sites.test_here import prepared
from tests.sites.test_parity import assert_parity
from tests.sites.worlds import PATIENCE, World, at_once, world

pytestmark = pytest.mark.usefixtures("no_report")

Act = Callable[[Frame, Frame], Frame]  # (request to train, its answer) -> what arrives
KEEPING: dict[str, Any] = {"name": "flasc", "feedback": True}
UP = {"north": {"up": 0.25}, "south": {"up": 0.5}}


def federation(tiny: Tiny, folder: Path, **changes: Any) -> World:
    """Two sites that keep what they did not send, one of which is drawn in a round."""
    given = {"cohort": 1, "method": KEEPING, "server": {"optimizer": "sgd", "lr": 1.0}, **changes}
    made = world(tiny, folder, ("north", "south"), tls=False, budgets=UP, **given)
    federate.prepare(made.recipe, made.run, PATIENCE, made.listen)
    return made


def through(inner: Transport, act: Act) -> Transport:
    """The network, at which something becomes of the answers of sites that have trained."""
    asked: dict[str, Frame] = {}

    def send(node: int, kind: str, data: bytes, seconds: float) -> PendingRequest | None:
        pending = inner.send(node, kind, data, seconds)
        assert pending is not None
        asked[pending.id] = unpack(data)
        return pending

    def collect(requests: Mapping[str, int]) -> Sequence[Incoming]:
        found = []
        for each in inner.collect(requests):
            request = asked[each.request]
            if request.header["do"] == "train":
                assert each.data is not None
                answer = act(request, unpack(each.data))
                each = each._replace(data=pack(worker.seal(worker.digest(request), answer)))
            found.append(each)
        return found

    return Transport(inner.nodes, send, collect)


def spoiling(given: World, numbers: Collection[int]) -> Act:
    """In these rounds all of an update is the largest that can be merged."""
    layout = from_recipe(given.recipe).resident.layout

    def act(request: Frame, answer: Frame) -> Frame:
        answer = unsealed(answer)
        if request.header["round"] not in numbers:
            return answer
        payload = decode(answer.body, layout)
        signs = torch.where(exact(payload.values) < 0, -4.2e9, 4.2e9)
        values = rounded(signs, payload.values.form, torch.Generator())
        return answer._replace(body=encode(payload._replace(values=values)))

    return act


def losing(numbers: Collection[int]) -> Act:
    """In these rounds no site has an update."""

    def act(request: Frame, answer: Frame) -> Frame:
        lost = request.header["round"] in numbers
        return refusal("nothing today") if lost else unsealed(answer)

    return act


def unsealed(answer: Frame) -> Frame:
    return Frame({k: v for k, v in answer.header.items() if k != "tag"}, answer.body)


def kept(folder: Path) -> list[str]:
    place = rundir.place(folder, rundir.CHECKPOINTS)
    return sorted(path.stem.removeprefix("round-000") for path in place.iterdir())


@pytest.fixture
def flower_is(monkeypatch: pytest.MonkeyPatch) -> Callable[[Transport], list[str]]:
    """Let the command reach the sites by this network; returns what the server says then."""

    def by(network: Transport) -> list[str]:
        said: list[str] = []

        def run(folder: Path, command: Sequence[str]) -> None:
            federate.serve(folder, network, PATIENCE, said.append)

        monkeypatch.setattr(cli, "_run_flower", run)
        return said

    return by


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_federation_goes_back_before_an_update_that_spoilt_it(
    tiny: Tiny,
    tmp_path: Path,
    command: Command,
    flower_is: Callable[[Transport], list[str]],
    every: int,
) -> None:
    """Long after: no round has merged anything since, and the server was started again twice."""
    given = federation(tiny, tmp_path, rounds=12, checkpoint={"every": every})
    runner.start(given.recipe, tmp_path / "alone", runs.quiet)
    network = at_once(given.sites, [])
    spoilt = through(network, spoiling(given, {5}))
    for _ in range(3):
        with pytest.raises(FedSieveError, match="is kept in"):
            federate.serve(given.run, spoilt, PATIENCE, quiet)
    last = rundir.last_round(given.run)
    assert last >= 7, "nothing was merged after the update that spoilt all"
    assert kept(given.run) == ["004", f"{last:03}"]
    before = {name: (given.run / name).read_bytes() for name in rundir.LOGS}
    flower_is(network)
    ran = command("federate", "--resume", given.run, "--at-round", "4")
    assert ran.code == 0, ran.err
    left = given.run / "left-after-round-4"
    assert str(left) in "".join(ran.out.split())
    for name, text in before.items():
        tail = (left / name).read_bytes()
        assert tail
        assert text.endswith(tail)
        assert {line["round"] for line in runs.lines(left, name)} == {*range(5, last + 1)}
    assert (left / rundir.CHECKPOINTS / f"round-{last:06}.safetensors").exists()
    assert_parity(given.run, tmp_path / "alone")


def test_lost_rounds_push_out_no_checkpoint_of_a_round_that_merged(
    tiny: Tiny, tmp_path: Path
) -> None:
    """Of all that hold one state the newest is kept."""
    given = federation(tiny, tmp_path, rounds=7)
    lost = through(at_once(given.sites, []), losing({3, 4, 6, 7}))
    seen = []

    def say(text: str) -> None:
        if text.startswith("round ") and "site" not in text:
            seen.append(kept(given.run))

    federate.serve(given.run, lost, PATIENCE, say)
    assert seen == [
        ["000"],
        ["000", "001"],
        ["001", "002"],
        ["001", "003"],
        ["001", "004"],
        ["004", "005"],
        ["004", "006"],
        ["004", "007"],
    ]


def test_a_kill_before_the_old_ones_are_removed_leaves_none_for_good(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = federation(tiny, tmp_path, rounds=7)
    prune, seen = checkpoint._prune, []

    def killed_in_round_2(folder: Path) -> None:
        if kept(given.run)[-1] != "002":
            prune(folder)
        seen.append(kept(given.run))

    monkeypatch.setattr(checkpoint, "_prune", killed_in_round_2)
    federate.serve(given.run, at_once(given.sites, []), PATIENCE, quiet)
    assert seen[2] == ["000", "001", "002"]
    assert seen[3:] == [[f"{n - 1:03d}", f"{n:03d}"] for n in range(3, 8)]


def test_only_a_server_at_work_is_waited_for(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not a folder in which nothing can be locked."""

    def no_room(folder: Path) -> Any:
        raise FedSieveError(f"{folder} cannot be written: Permission denied")

    run = federation(tiny, tmp_path, rounds=2).run
    monkeypatch.setattr(rundir, "lock", no_room)
    monkeypatch.setattr(federate, "LEFT_OVER", 20.0)
    began = time.monotonic()
    with pytest.raises(FedSieveError, match="Permission denied"), federate.alone(run, quiet):
        pass
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("keep", [2, 4])
def test_lost_rounds_push_out_no_memory_that_the_server_may_go_back_to(
    tmp_path: Path, keep: int
) -> None:
    """The site was last merged in rounds 1, 2, 4, 5 and 9, and asked in all."""
    said = facts(Reply(Client("north", 1), b"", None, 0.5, 1, 0.0, 0.0, 0.0, 0))
    before = 0
    for number in range(1, 30):
        memory = {"residual": {"x": torch.tensor([float(number)])}}
        head = {"ok": True, "round": number, **said}
        entry = journal.Entry(number, before, "asked", "whose", head, b"answer", memory)
        journal.write(tmp_path, entry, keep=keep)
        before = number if number in (1, 2, 4, 5, 9) else before
        there = {int(path.name.removeprefix("round-")) for path in tmp_path.iterdir()}
        assert len(there) <= keep + 2 + keep // 2
    assert there >= {9, 5, 29} | ({4, 2} if keep == 4 else set())
    newest, memory = next(journal.memories(tmp_path, 9, "whose"))
    assert newest == 5
    assert memory["residual"]["x"] == 5


def test_a_site_that_has_its_answer_gives_it_again_unless_its_owner_removes_it(
    tiny: Tiny,
    tmp_path: Path,
    command: Command,
    flower_is: Callable[[Transport], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A round that is done again asks the same: what a site learned wrongly is there still."""
    given = federation(tiny, tmp_path, rounds=3, cohort=2)
    told: list[tuple[str, bytes]] = []
    network = at_once(given.sites, told)
    federate.serve(given.run, network, PATIENCE, quiet)
    weights = given.run / rundir.ADAPTER / "adapter_model.safetensors"
    adapter = weights.read_bytes()
    (entry,) = given.sites["north"].parent.glob("worker/runs/*/rounds/round-000000003")
    entry.unlink()
    trained: list[str] = []
    fit = local.fit

    def counted(*given: Any) -> Fit:
        trained.append(given[-1].client)
        return fit(*given)

    monkeypatch.setattr(resident, "fit", counted)
    flower_is(network)
    assert command("federate", "--resume", given.run, "--at-round", "2").code == 0
    assert trained == ["north"]
    assert weights.read_bytes() == adapter


def test_a_round_without_a_checkpoint_is_refused_with_those_that_are_there(
    tiny: Tiny, tmp_path: Path, command: Command, flower_is: Callable[[Transport], list[str]]
) -> None:
    given = federation(tiny, tmp_path, rounds=3)
    network = at_once(given.sites, [])
    federate.serve(given.run, network, PATIENCE, quiet)
    before = tree(given.run)
    flower_is(network)
    for number in ("0", "1", "4", "999999999"):
        ran = command("federate", "--resume", given.run, "--at-round", number)
        assert ran.code == 2
        said = " ".join(ran.err.split())
        assert f"--at-round {number}: there is no whole checkpoint of that round" in said
        assert "those of rounds 2, 3 are there" in said
    assert tree(given.run) == before


def test_a_finished_federation_goes_back_and_one_at_its_newest_stays(
    tiny: Tiny, tmp_path: Path, command: Command, flower_is: Callable[[Transport], list[str]]
) -> None:
    given = federation(tiny, tmp_path, rounds=3)
    runner.start(given.recipe, tmp_path / "alone", runs.quiet)
    network = at_once(given.sites, [])
    federate.serve(given.run, network, PATIENCE, quiet)
    said = flower_is(network)
    assert command("federate", "--resume", given.run, "--at-round", "2").code == 0
    assert [text for text in said if text.startswith("round ")]
    assert_parity(given.run, tmp_path / "alone")
    ran = command("federate", "--resume", given.run, "--at-round", "3")
    assert ran.code == 0
    assert "nothing is later" in ran.out
    assert [path.name for path in given.run.glob("left-*")] == ["left-after-round-2"]


def test_a_private_federation_does_not_go_back(
    tiny: Tiny, tmp_path: Path, command: Command, flower_is: Callable[[Transport], list[str]]
) -> None:
    """Epsilon counts one version of each round, as in one process."""
    privacy = {"clip": 0.1, "delta": 1e-3, "noise_multiplier": 1.0, "noise_from": "system"}
    given = federation(
        tiny,
        tmp_path,
        rounds=2,
        method=KEEPING | {"feedback": False},
        privacy=privacy,
        sampling={"kind": "poisson"},
    )
    network = at_once(given.sites, [])
    federate.serve(given.run, network, PATIENCE, quiet)
    before = tree(given.run), tree(rundir.own(given.run))
    flower_is(network)
    ran = command("federate", "--resume", given.run, "--at-round", "1")
    assert ran.code == 2
    assert "epsilon" in ran.err
    assert (tree(given.run), tree(rundir.own(given.run))) == before


def test_the_way_back_is_said_where_it_is_not(
    tiny: Tiny, tmp_path: Path, command: Command, whole: Path
) -> None:
    given = federation(tiny, tmp_path, rounds=2)
    ran = command("resume", given.run, "--at-round", "1")
    assert ran.code == 2
    assert f"fedsieve federate --resume {given.run} --at-round 1`" in " ".join(ran.err.split())
    ran = command("federate", tiny.write(tmp_path / "r.toml"), "--at-round", "1")
    assert ran.code == 2
    assert "--at-round" in ran.err
    ran = command("federate", "--resume", whole, "--at-round", "1")
    assert ran.code == 2
    assert "holds a run in one process" in " ".join(ran.err.split())


def tree(folder: Path) -> dict[str, bytes]:
    """All files, but for the empty ones that keep others out."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(p.relative_to(folder)): p.read_bytes() for p in files if p.name != ".lock"}


@pytest.mark.parametrize("who", ["the server", "a command"])
@pytest.mark.parametrize("local", [True, False], ids=["here", "elsewhere"])
def test_a_federation_at_work_is_left_as_it_is(
    tiny: Tiny,
    tmp_path: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    who: str,
    local: bool,
) -> None:
    """What the run uses is neither moved nor written anew before it is asked whether it runs."""
    folder = tmp_path / "run"
    if local:
        prepared(tiny, folder)
    else:
        folder = federation(tiny, tmp_path, rounds=2).run
    for name in ("apps", "source"):
        (folder / federate.HOME / name).mkdir()
        (folder / federate.HOME / name / "app.py").write_text("# Flower's copy\n")
    monkeypatch.setattr(here, "at_work", lambda *_: pytest.fail("it was started"))
    monkeypatch.setattr(cli, "_run_flower", lambda *_: pytest.fail("it was started"))
    monkeypatch.setattr(federate, "LEFT_OVER", 0.0, raising=False)
    before = tree(folder)
    busy = rundir.lock(folder) if who == "the server" else federate.alone(folder, quiet)
    with socket.socket() as other, busy:
        other.bind(("127.0.0.1", here.port_of(folder)))
        other.listen()
        for more in ((), ("--at-round", "0")):
            ran = command("federate", "--resume", folder, *more)
            assert ran.code == 2
            assert "another process is" in " ".join(ran.err.split())
            assert tree(folder) == before


def test_sites_are_given_what_came_out_though_the_server_ended_before(
    tiny: Tiny, tmp_path: Path
) -> None:
    """All rounds, the adapter and the report are there by then, and no site has anything."""
    given = federation(tiny, tmp_path, rounds=1)
    network = at_once(given.sites, [])

    def send(number: int, kind: str, data: bytes, seconds: float) -> PendingRequest | None:
        if unpack(data).header["do"] == "keep":
            raise KeyboardInterrupt  # as good as SIGKILL to what is on the disk
        return network.send(number, kind, data, seconds)

    with pytest.raises(KeyboardInterrupt):
        federate.serve(given.run, network._replace(send=send), PATIENCE, quiet)
    (given.run / rundir.REPORT).touch()  # which `no_report` leaves out
    with pytest.raises(FedSieveError, match="before its sites were given the final adapter"):
        federate.refuse_unfinished(given.run)
    assert not federate.has_ended(given.run, 1)

    federate.serve(given.run, at_once(given.sites, []), PATIENCE, quiet)
    (given.run / rundir.REPORT).touch()
    federate.refuse_unfinished(given.run)
    assert federate.has_ended(given.run, 1)
    ours = (given.run / rundir.ADAPTER / "adapter_model.safetensors").read_bytes()
    for path in given.sites.values():
        (kept,) = (path.parent / "worker" / "adapters").iterdir()
        assert (kept / "adapter_model.safetensors").read_bytes() == ours
