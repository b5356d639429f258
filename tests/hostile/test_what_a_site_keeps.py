"""What a site keeps of its own, and over which base: the server counts on one round of it, and what
is another is refused by name, also where nothing is trained any more.

The real ends of both sides in one process, without a network between them.
"""

import json
import math
import re
import shutil
import tomllib
import warnings
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from safetensors.torch import load_file, save_file

from fedsieve.errors import FedSieveError
from fedsieve.frame import Frame, pack, unpack
from fedsieve.run import rundir, runner
from fedsieve.sites import federate, journal, worker
from fedsieve.sites.server import Incoming, Node, PendingRequest, Transport
from tests import runs
from tests.conftest import Tiny
from tests.sites.sites import asking
from tests.sites.worlds import PATIENCE, World, world

pytestmark = pytest.mark.usefixtures("no_report")
NAMES = ("north", "south")
Change = Callable[[str, Frame, Frame], Frame]


class Wire:
    """Requests to the sites' workers, and their answers, which may be changed on the way."""

    def __init__(self, given: World, change: Change) -> None:
        self.names, self.change = [*given.sites], change
        self.workers = {name: asking(path) for name, path in given.sites.items()}
        self.came: dict[str, bytes] = {}
        self.asked: list[dict[str, Any]] = []

    def send(self, node: int, kind: str, data: bytes, seconds: float) -> PendingRequest:
        name, request = self.names[node], unpack(data)
        self.asked.append(dict(request.header))
        answer = self.change(name, request, self.workers[name](request))
        self.came[str(len(self.asked))] = pack(answer)
        return PendingRequest(str(len(self.asked)), len(data))

    def collect(self, requests: Collection[str]) -> list[Incoming]:
        there = [name for name in requests if name in self.came]
        return [Incoming(name, self.came.pop(name), "", 1) for name in there]


def federation(tiny: Tiny, folder: Path, method: str, **changes: Any) -> World:
    made = world(
        tiny, folder, NAMES, tls=False, budgets={name: {} for name in NAMES},
        method={"name": method}, **{"rounds": 3, "data__test": None, **changes},
    )  # fmt: skip
    for path in made.sites.values():
        told = tomllib.loads(path.read_text())
        told["data"]["test"] = told["data"]["train"]
        path.write_text(tomli_w.dumps(told))
        (path.parent / "worker").mkdir(mode=0o700)
    federate.prepare(made.recipe, made.run, PATIENCE, made.listen)
    return made


def serve(given: World, wire: Wire, said: list[str] | None = None, wait: float = 20.0) -> list[str]:
    said = [] if said is None else said
    nodes = [Node(number) for number in range(len(wire.names))]
    transport = Transport(lambda: nodes, wire.send, wire.collect)
    patience = PATIENCE._replace(deadline=5.0, setup=20.0, wait=wait, poll=0.02)
    federate.serve(given.run, transport, patience, said.append)
    return said


def nothing(name: str, request: Frame, answer: Frame) -> Frame:
    return answer


def stopping(number: int) -> Change:
    """Ctrl-C when the first site is asked to train in this round."""

    def change(name: str, request: Frame, answer: Frame) -> Frame:
        if (request.header["do"], request.header.get("round")) == ("train", number):
            raise KeyboardInterrupt
        return answer

    return change


def at_north(given: World) -> float | None:
    """The norm of B in the adapter that the site was told to keep, if it kept one."""
    found = [*(given.sites["north"].parent / "worker" / "adapters").glob("[!.]*")]
    if not found:
        return None
    tensors = load_file(found[0] / "adapter_model.safetensors")
    return norm(t for name, t in tensors.items() if "lora_B" in name)


def norm(tensors: Iterable[torch.Tensor]) -> float:
    return math.sqrt(sum(float(t.square().sum()) for t in tensors))


def third(name: str, request: Frame) -> bool:
    """Whether this is what north is asked to train in the last round."""
    return name == "north" and (request.header["do"], request.header.get("round")) == ("train", 3)


def rounds_of(given: World) -> Path:
    (run,) = (given.sites["north"].parent / "worker" / "runs").iterdir()
    return run / "rounds"


def test_a_server_that_starts_anew_leaves_good_adapters_as_they_are(
    tiny: Tiny, tmp_path: Path
) -> None:
    given = federation(tiny, tmp_path, "fedsa_lora")
    serve(given, Wire(given, nothing))
    whole = at_north(given)
    wire = Wire(given, nothing)
    assert "2 sites got the final adapter: north, south" in serve(given, wire)
    assert [asked["round"] for asked in wire.asked if asked["do"] == "keep"] == [3, 3]
    assert whole
    assert at_north(given) == whole


def test_the_servers_own_rows_that_were_changed_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    """The sites' are theirs, and may grow; scores would be of neither of two sets of test rows."""
    rows = tmp_path / "mine.csv"
    shutil.copy(tiny.test, rows)
    given = federation(tiny, tmp_path, "fedit", data__test=str(rows))
    serve(given, Wire(given, nothing))
    before = (given.run / rundir.METRICS).read_bytes()
    rows.write_text(rows.read_text(encoding="utf-8").replace("car", "cat", 1), encoding="utf-8")
    with pytest.raises(FedSieveError, match="rows that are evaluated on were changed") as caught:
        serve(given, Wire(given, nothing))
    assert "--accept-changes" not in str(caught.value)
    assert (given.run / rundir.METRICS).read_bytes() == before
    shutil.copy(tiny.test, rows)
    serve(given, Wire(given, nothing))


@pytest.mark.parametrize("how", ["lost", "damaged"])
def test_a_memory_that_is_gone_is_told_and_nothing_is_put_in_its_place(
    tiny: Tiny, tmp_path: Path, how: str
) -> None:
    given = federation(tiny, tmp_path, "fedsa_lora")

    def change(name: str, request: Frame, answer: Frame) -> Frame:
        if third(name, request):
            if how == "lost":
                shutil.rmtree(rounds_of(given))
            else:
                file = rounds_of(given) / "round-000000003"
                file.write_bytes(file.read_bytes()[:-1] + b"!")
        return answer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the worker's own, of the damaged file
        said = serve(given, Wire(given, change))
    last = runs.lines(given.run)[-1]
    assert last["eval_examples"] == runs.lines(given.run)[1]["eval_examples"] / 2
    for do in ("evaluate", "keep"):
        assert any(
            f"north: {do}" in line and "lost what it kept after round 3" in line for line in said
        )
    assert at_north(given) is None
    assert "1 site got the final adapter: south" in said
    assert federate.without_adapter(given.run) == ["north"]


def test_a_site_that_missed_the_end_is_noted_until_it_has_the_adapter(
    tiny: Tiny, tmp_path: Path
) -> None:
    """Else its owner would be told that all is done, and the site have nothing."""
    given = federation(tiny, tmp_path, "fedit")

    def full(name: str, request: Frame, answer: Frame) -> Frame:
        if name == "north" and request.header["do"] == "keep":
            return Frame({**answer.header, "ok": False, "error": "the site's disk: no room"})
        return answer

    said = serve(given, Wire(given, full))
    assert any("north: keep: the site says: the site's disk: no room" in line for line in said)
    (given.run / rundir.REPORT).touch()  # tests write none
    assert federate.has_ended(given.run, 3)
    serve(given, Wire(given, full))
    assert federate.without_adapter(given.run) == ["north"]
    before = (given.run / rundir.METRICS).read_bytes()
    serve(given, Wire(given, nothing))
    assert federate.without_adapter(given.run) == []
    assert (given.run / rundir.METRICS).read_bytes() == before


def test_a_site_that_had_no_part_before_the_server_started_anew_is_not_forgotten(
    tiny: Tiny, tmp_path: Path
) -> None:
    """North was met, and dropped; then the server was stopped, and north was away."""
    given = federation(tiny, tmp_path, "fedit")

    def kill(name: str, request: Frame, answer: Frame) -> Frame:
        if (name, request.header["do"]) == ("north", "train"):
            return Frame({**answer.header, "ok": False, "error": "the site's disk: no room"})
        if third("north" if name == "south" else "", request):
            raise KeyboardInterrupt
        return answer

    with pytest.raises(runner.Stopped):
        serve(given, Wire(given, kill))
    wire = Wire(given, nothing)
    transport = Transport(lambda: [Node(1)], wire.send, wire.collect)
    patience = PATIENCE._replace(sites=1, deadline=5.0, setup=20.0, wait=20.0, poll=0.02)
    federate.serve(given.run, transport, patience, lambda line: None)
    assert federate.without_adapter(given.run) == ["north"]
    (given.run / rundir.REPORT).touch()  # tests write none
    assert "2 sites got the final adapter: north, south" in serve(given, wire)
    assert federate.without_adapter(given.run) == []


def test_why_a_server_stopped_is_told_by_the_command_that_waited_for_it(
    tiny: Tiny, tmp_path: Path
) -> None:
    """Flower's own command ends with 0, and has it in a log."""
    given = federation(tiny, tmp_path, "fedit")
    nobody = Transport(list, lambda *asked: None, lambda requests: [])
    patience = PATIENCE._replace(wait=0.1, poll=0.02)
    with pytest.raises(FedSieveError, match="0 sites are there") as caught:
        federate.serve(given.run, nobody, patience, lambda line: None)
    with pytest.raises(FedSieveError, match="stopped after round 0 of 3: ") as told:
        federate.refuse_unfinished(given.run)
    assert str(caught.value) in str(told.value)
    # Where Flower's log could not be followed any longer, it may not have stopped at all.
    with (
        rundir.lock(given.run),
        pytest.raises(FedSieveError, match="broke off, and its server is still at work"),
    ):
        federate.refuse_unfinished(given.run)
    serve(given, Wire(given, nothing))
    (given.run / rundir.REPORT).touch()
    federate.refuse_unfinished(given.run)


def test_what_a_round_left_that_did_not_count_is_not_used(tiny: Tiny, tmp_path: Path) -> None:
    """Round 3 of north comes to nothing at the server: its own part stays that of round 2."""

    def spoil(name: str, request: Frame, answer: Frame) -> Frame:
        return Frame({**answer.header, "steps": 7}, answer.body) if third(name, request) else answer

    given = federation(tiny, tmp_path, "fedsa_lora")
    wire = Wire(given, spoil)
    serve(given, wire)
    kept = [asked["after"] for asked in wire.asked if asked["do"] == "keep"]
    assert kept == [2, 3]
    rounds = rounds_of(given)
    entry = journal.find(rounds, 2, f"{rounds.parent.name}/north")
    assert entry is not None
    own = [t for tree in entry.memory.values() for name, t in tree.items() if "lora_B" in name]
    assert at_north(given) == pytest.approx(norm(own))


def test_an_availability_of_a_site_that_has_not_come_is_warned_of(
    tiny: Tiny, tmp_path: Path
) -> None:
    named = {"availability": {"nort": 0.5, "south": 1.0}}
    given = federation(tiny, tmp_path, "fedit", sampling=named, rounds=1)
    warned = [line for line in serve(given, Wire(given, nothing)) if "availability" in line]
    assert len(warned) == 1
    assert re.search(r"names 'nort', and no site of that name has come yet .*'north'", warned[0])


def swapped(model: Path) -> None:
    """Two words of the tokenizer in each other's place; the weights are as they were."""
    path = model / "tokenizer.json"
    told = json.loads(path.read_text(encoding="utf-8"))
    words = told["model"]["vocab"]
    one, other = sorted(words, key=words.__getitem__)[-2:]
    words[one], words[other] = words[other], words[one]
    path.write_text(json.dumps(told), encoding="utf-8")


def test_a_site_with_another_tokenizer_is_refused_by_name(tiny: Tiny, tmp_path: Path) -> None:
    given = federation(tiny, tmp_path, "fedit")
    path = given.sites["north"]
    own = path.parent / "model"
    shutil.copytree(tiny.bert, own)
    path.write_text(tomli_w.dumps({**tomllib.loads(path.read_text()), "model": str(own)}))
    swapped(own)
    said = serve(given, Wire(given, nothing), wait=2.0)
    assert any("'north' reads rows otherwise" in line for line in said)
    assert {row["client"] for row in runs.lines(given.run, rundir.CLIENTS)} == {"south"}


@pytest.mark.parametrize(
    ("method", "how"), [("fedit", "weights"), ("flora", "weights"), ("fedit", "tokenizer")]
)
def test_a_base_that_became_another_is_refused_by_name(
    tiny: Tiny, tmp_path: Path, method: str, how: str
) -> None:
    given = federation(tiny, tmp_path, method)
    path = given.sites["north"]
    own = path.parent / "model"
    shutil.copytree(tiny.bert, own)
    path.write_text(tomli_w.dumps({**tomllib.loads(path.read_text()), "model": str(own)}))
    wire = Wire(given, nothing)

    def swap(name: str, request: Frame, answer: Frame) -> Frame:
        if name == "south" and request.header.get("round") == 2:
            if how == "tokenizer":
                if request.header["do"] == "train":
                    swapped(own)
                wire.workers["north"] = asking(path)
                return answer
            tensors = load_file(own / "model.safetensors")
            torch.manual_seed(9)
            noisy = {n: t + 0.5 * torch.randn_like(t.float()) for n, t in tensors.items()}
            save_file(noisy, own / "model.safetensors", {"format": "pt"})
            wire.workers["north"] = asking(path)  # started again, behind the same node
        return answer

    wire.change = swap
    said = serve(given, wire)
    receipts = runs.lines(given.run, rundir.CLIENTS)
    late = [r for r in receipts if r["client"] == "north" and r["round"] == 3]
    assert all("base model is another" in r["dropped"] for r in late)
    assert any("base" in line and "north" in line for line in said)
    assert [r["client"] for r in receipts if r["round"] == 3 and not r.get("dropped")] == ["south"]


@pytest.mark.parametrize("what", ["budget", "rows", "name", "nothing"])
def test_a_site_that_tells_something_else_after_a_restart_is_met_again(
    tiny: Tiny, tmp_path: Path, what: str
) -> None:
    """Its node stays connected: the server would go on with what it was told at the beginning."""
    given = federation(tiny, tmp_path, "fslora_flasc", rounds=9)
    wire, path = Wire(given, nothing), given.sites["north"]

    def change(name: str, request: Frame, answer: Frame) -> Frame:
        if name == "south" and (request.header["do"], request.header.get("round")) == ("train", 1):
            told = tomllib.loads(path.read_text())
            if what == "budget":
                told["budget"] = {"ratio": 0.25, "down": 0.25, "up": 0.1}
            elif what == "rows":
                lines = Path(told["data"]["train"]).read_text(encoding="utf-8").splitlines()
                less = path.parent / "less.csv"
                less.write_text("\n".join(lines[:6]) + "\n", encoding="utf-8")
                told["data"]["train"] = str(less)
            elif what == "name":
                told["name"] = "nord"
            path.write_text(tomli_w.dumps(told))
            wire.workers["north"] = asking(path)  # started again, behind the same node
        return answer

    wire.change = change
    said = serve(given, wire)
    rows = runs.lines(given.run, rundir.CLIENTS)
    gone = [row["dropped"] for row in rows if row.get("dropped")]
    if what == "nothing":
        assert not gone
        return
    assert len(gone) == 1
    assert "are others than when the recipe was told" in gone[0]
    first = next(row for row in rows if row["client"] == "north")
    last = [row for row in rows if row["client"] == ("nord" if what == "name" else "north")][-1]
    assert last["round"] > 2, said
    assert (last["down_bytes"] < first["down_bytes"]) == (what == "budget")
    assert (last["examples"] < first["examples"]) == (what == "rows")


PRIVATE = {"clip": 1.0, "delta": 1e-5, "noise_multiplier": 0.5, "noise_from": "system"}


@pytest.mark.parametrize("what", ["budget", "name"])
def test_it_is_in_a_private_federation_too_and_another_name_takes_no_part(
    tiny: Tiny, tmp_path: Path, what: str
) -> None:
    """The account counts on a draw from the sites of the beginning, as each of them is now."""
    more = {"privacy": PRIVATE, "server": None, "evaluation__every": 9}
    given = federation(tiny, tmp_path, "flasc", rounds=9, **more)
    wire, path = Wire(given, nothing), given.sites["north"]

    def change(name: str, request: Frame, answer: Frame) -> Frame:
        if name == "south" and (request.header["do"], request.header.get("round")) == ("train", 1):
            told = tomllib.loads(path.read_text())
            told |= {"budget": {"down": 0.25}} if what == "budget" else {"name": "nord"}
            path.write_text(tomli_w.dumps(told))
            wire.workers["north"] = asking(path)  # started again, behind the same node
        return answer

    wire.change = change
    said = serve(given, wire)
    rows = runs.lines(rundir.own(given.run), rundir.CLIENTS)
    assert {row["client"] for row in rows} == {"north", "south"}
    late = [row for row in rows if row["client"] == "north" and row["round"] > 5]
    assert len(late) == 4
    if what == "budget":
        first = next(row for row in rows if row["client"] == "north")
        assert not any(row.get("dropped") for row in late), said
        assert late[-1]["down_bytes"] < first["down_bytes"]
    else:
        assert all(row["dropped"] for row in late)
        told = "node 0, as site nord, is not used: [privacy] counts on north, south, and on no"
        assert any(line.startswith(told) for line in said), said


def test_a_folder_where_a_round_is_kept_costs_no_round(tiny: Tiny, tmp_path: Path) -> None:
    given = federation(tiny, tmp_path, "fedsa_lora")

    def change(name: str, request: Frame, answer: Frame) -> Frame:
        if name == "north" and request.header["do"] == "train":
            (rounds_of(given) / f"round-{request.header['round'] + 1:09d}" / "x").mkdir(
                parents=True
            )
        return answer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        serve(given, Wire(given, change))
    assert not any(r.get("dropped") for r in runs.lines(given.run, rundir.CLIENTS))


@pytest.mark.parametrize(("head", "body"), [({"counted": 0}, b"{}"), ({"loss_sum": None}, None)])
def test_a_loss_of_nothing_is_left_out_and_none_is_told(
    tiny: Tiny, tmp_path: Path, head: dict[str, Any], body: bytes | None
) -> None:
    given = federation(tiny, tmp_path, "fedit")

    def change(name: str, request: Frame, answer: Frame) -> Frame:
        if name == "north" and request.header["do"] == "evaluate":
            return worker.seal(
                worker.digest(request),
                Frame({**answer.header, **head}, answer.body if body is None else body),
            )
        return answer

    said = serve(given, Wire(given, change))
    assert any("site north: its evaluation" in line for line in said)
    last = runs.lines(given.run)[-1]
    assert last["eval_loss"] > 0  # of the others


@pytest.mark.parametrize(
    "method",
    [
        "scaffold",  # whose state names the clients, as that of the next two
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("flora", "fedex_lora")),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("fedsa_lora", "ravan")),
    ],
)
def test_a_site_that_is_away_at_a_restart_stops_nobody(
    tiny: Tiny, tmp_path: Path, method: str
) -> None:
    """The server's state may keep something of it, by its name."""
    given = federation(tiny, tmp_path, method, rounds=6, training__steps=2)

    with pytest.raises(runner.Stopped):
        serve(given, Wire(given, stopping(3)))
    alone = Wire(given, stopping(5))
    alone.names.remove("north")
    with pytest.raises(runner.Stopped):
        serve(given, alone, wait=3.0)
    serve(given, Wire(given, nothing))
    rows = runs.lines(given.run, rundir.CLIENTS)
    took_part = {n: {r["client"] for r in rows if r["round"] == n} for n in range(1, 7)}
    alike = {"north", "south"}
    assert took_part == {1: alike, 2: alike, 3: {"south"}, 4: {"south"}, 5: alike, 6: alike}
    assert not [row["dropped"] for row in rows if row.get("dropped")]
