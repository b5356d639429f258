"""A site's memory does not hang on its clock, and where it is lost the site says so.

Files of a run are dated as a clock that was set back, or forward, would date them. A round that
needs what is not there is refused by name, and never answered from an emptier memory in silence.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedsieve.algebra.budget import Budget, Client
from fedsieve.algebra.keys import Key
from fedsieve.frame import Frame
from fedsieve.methods import fedit, fedsa_lora, flasc
from fedsieve.sites import resident
from fedsieve.wire import decode, encode
from tests import kinds, toy
from tests.conftest import Tiny
from tests.sites.sites import rate, settled, train
from tests.sites.test_flower import EXACT, Net, federation, run, site, sites_of
from tests.sites.test_worker import Worker, told

DATES: dict[str, Callable[[int], float]] = {
    "all alike": lambda number: 1e9,
    "set back": lambda number: 2e9 - number,
    "after today": lambda number: 4e9 + number,
    "before 1970": lambda number: -1e6 - number,
}


@pytest.fixture(autouse=True)
def _of_few_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident, "RUNS", 3)  # each more is told, and its model loaded


def date(folder: Path, seconds: float) -> None:
    for path in [folder, *folder.rglob("*")]:
        os.utime(path, (seconds, seconds))


@pytest.mark.parametrize(
    "dates", [n if n == "set back" else pytest.param(n, marks=pytest.mark.slow) for n in DATES]
)
def test_whatever_the_clock_says_the_newest_runs_stay(
    tiny: Tiny, tmp_path: Path, dates: str
) -> None:
    here = Worker(tiny, tmp_path)
    runs = here.rounds.parents[1]
    texts = [here.text + b"#" * number for number in range(1, 2 * resident.RUNS + 1)]
    for number, text in enumerate(texts, start=1):
        told(here.ask, text)
        date(runs, DATES[dates](number))
        for path in runs.iterdir():
            date(path, DATES[dates](int(path.name[:4], 16)))
        if number % 3 == 0:
            here.state = settled(here.path)  # a worker that starts again knows the order too
    kept = {path.name for path in runs.iterdir()}
    assert kept == {train(text, 1, b"").header["recipe"] for text in texts[-resident.RUNS :]}
    # The one that is told again is the newest.
    told(here.ask, texts[-resident.RUNS])
    told(here.ask, here.text)
    assert (runs / train(texts[-resident.RUNS], 1, b"").header["recipe"]).is_dir()
    assert not (runs / train(texts[1 - resident.RUNS], 1, b"").header["recipe"]).exists()


def test_a_clock_that_is_set_back_costs_no_memory(tiny: Tiny, tmp_path: Path) -> None:
    """The run that was just told, dated before all others, goes on as with a true clock."""
    busy, calm = Worker(tiny, tmp_path / "a"), Worker(tiny, tmp_path / "b")
    for number in range(resident.RUNS):
        told(busy.ask, busy.text + b"#" * (number + 1))
    date(busy.rounds.parents[1], 4e9)
    told(busy.ask, busy.text)
    for number in (1, 2):
        assert busy.train(number).body == calm.train(number).body
    told(busy.ask, busy.text)
    assert busy.train(3).body == calm.train(3).body


def test_a_run_that_is_trained_is_none_of_the_oldest(tiny: Tiny, tmp_path: Path) -> None:
    """Others that are told meanwhile, one after another, cost it nothing."""
    busy, calm = Worker(tiny, tmp_path / "a"), Worker(tiny, tmp_path / "b")
    for number in (1, 2, 3):
        assert asked(busy, number, number - 1).body == asked(calm, number, number - 1).body
        for other in range(resident.RUNS - 1):
            told(busy.ask, busy.text + b"#" * (number * resident.RUNS + other))


def test_a_run_that_gave_way_to_others_is_told_as_that(tiny: Tiny, tmp_path: Path) -> None:
    here = Worker(tiny, tmp_path)
    said: list[str] = []
    here.state.say = said.append
    assert asked(here, 1, 0).header["ok"]
    for other in range(1, resident.RUNS + 1):
        told(here.ask, here.text + b"#" * other)
    assert [line for line in said if "is removed" in line] == [
        f"{here.rounds.parent} is removed: {resident.RUNS} are kept, and others were used since"
    ]
    told(here.ask, here.text)
    answer = asked(here, 2, 1)
    assert answer.header["lost_memory"] is True
    assert f"it keeps {resident.RUNS} runs, and others were used since" in answer.header["error"]


def asked(here: Worker, number: int, after: int | None) -> Frame:
    more: dict[str, Any] = {} if after is None else {"after": after}
    return here.ask(train(here.text, number, here.message(number), **more))


def all_gone(here: Worker) -> None:
    shutil.rmtree(here.rounds)


def newest_gone(here: Worker) -> None:
    (here.rounds / "round-000000002").unlink()


def newest_damaged(here: Worker) -> None:
    path = here.rounds / "round-000000002"
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.filterwarnings("ignore:.*is damaged")
@pytest.mark.parametrize("lose", [all_gone, newest_gone, newest_damaged])
@pytest.mark.parametrize("restarted", [False, True])
def test_a_site_without_the_memory_that_a_round_needs_says_so(
    tiny: Tiny, tmp_path: Path, lose: Callable[[Worker], None], restarted: bool
) -> None:
    here = Worker(tiny, tmp_path)
    for number in (1, 2):
        assert asked(here, number, number - 1).header["ok"]
    lose(here)
    if restarted:
        here.state = settled(here.path)
    answer = asked(here, 3, 2)
    assert not answer.header["ok"]
    assert answer.header["lost_memory"] is True
    assert "what it kept after round 2" in answer.header["error"]
    assert not answer.body
    # A server that knows it asks for what can be had.
    assert asked(here, 3, None).header["ok"]


def other_bytes(worker: Path, run: Path) -> None:
    (worker / resident.TOLD).write_bytes(b"\xff\xfe" * 99)


def a_folder_for_the_order(worker: Path, run: Path) -> None:
    (worker / resident.TOLD).unlink(missing_ok=True)
    (worker / resident.TOLD).mkdir()


def stray_files(worker: Path, run: Path) -> None:
    (run.parent / ".DS_Store").write_bytes(b"x")
    for number in range(resident.RUNS):
        (run.parent / f"{number}").mkdir()


def a_folder_for_the_recipe(worker: Path, run: Path) -> None:
    (run / resident.RECIPE).unlink()
    (run / resident.RECIPE).mkdir()


def a_file_for_the_run(worker: Path, run: Path) -> None:
    shutil.rmtree(run)
    run.write_bytes(b"x")


def a_file_for_half_an_adapter(worker: Path, run: Path) -> None:
    (worker / "adapters").mkdir(exist_ok=True)
    name = "0123456789abcdef"
    (worker / "adapters" / f".{name}.part").write_bytes(b"x")
    (worker / "adapters" / f".{name}.old").write_bytes(b"x")
    (worker / "adapters" / name).mkdir()
    (run / ".z.part").mkdir()


def no_length(worker: Path, run: Path) -> None:
    (run / resident.MOST).write_bytes(b"\xff")


DAMAGES = [
    other_bytes, a_folder_for_the_order, stray_files, a_folder_for_the_recipe, a_file_for_the_run,
    a_file_for_half_an_adapter, no_length,
]  # fmt: skip


@pytest.mark.parametrize("damage", kinds.some_of(DAMAGES))
@pytest.mark.parametrize("restarted", [False, True])
def test_a_damaged_folder_shuts_no_site_out(
    tiny: Tiny, tmp_path: Path, damage: Callable[[Path, Path], None], restarted: bool
) -> None:
    """It is told its recipe again, and takes part; what it kept may be lost with it."""
    here = Worker(tiny, tmp_path)
    assert asked(here, 1, 0).header["ok"]
    run = here.rounds.parent
    damage(run.parents[1], run)
    if restarted:
        here.state = settled(here.path)
    for _ in range(2):
        told(here.ask, here.text)
    assert asked(here, 2, None).header["ok"]


def test_a_body_for_a_recipe_that_was_never_told_is_not_wanted(tiny: Tiny, tmp_path: Path) -> None:
    here = Worker(tiny, tmp_path)
    header = train(here.text, 1, here.message(1)).header
    longest = resident.most_bytes(here.state, header)
    assert isinstance(longest, int)
    assert len(here.message(1)) < longest < 1 << 20
    for state in (here.state, settled(here.path)):
        assert resident.most_bytes(state, header) == longest  # a worker before it knew
        for other in ("0" * 64, "../" * 20, "", "x" * 64):
            unwanted = resident.most_bytes(state, {**header, "recipe": other})
            if isinstance(unwanted, Frame):
                assert unwanted.header["unknown_recipe"] is True
            else:
                assert unwanted == 0
        assert resident.most_bytes(state, {**header, "recipe": None}) == 0
    assert isinstance(resident.most_bytes(here.state, {**header, "recipe": "0" * 64}), Frame)


def test_a_method_that_keeps_nothing_needs_no_memory(tiny: Tiny, tmp_path: Path) -> None:
    here, calm = (
        Worker(tiny, tmp_path / name, method={"name": "fedit"}, budgets=None) for name in "ab"
    )
    for each in (here, calm):
        assert asked(each, 1, 0).header["ok"]
    all_gone(here)
    assert asked(here, 2, 1).body == asked(calm, 2, 1).body


@pytest.mark.parametrize("build", [flasc, fedsa_lora, fedit], ids=lambda m: m.__name__)
def test_the_server_drops_it_by_name_and_begins_with_it_afresh(build: Any) -> None:
    """One round is dropped, with the reason; in the next it is asked to go on from what it has."""
    method = build.method(**EXACT, **({"feedback": True} if build is flasc else {}))
    members = toy.clients([Budget()] * 2)
    net = Net({i: site(c, method) for i, c in enumerate(members)})
    honest = net.answers[1]

    def lost(request: Frame) -> bool:
        return request.header.get("lost") is True

    def forgetful(request: Frame) -> Any:
        if request.header["do"] == "train" and request.header["after"] == 1 and not lost(request):
            return Frame({"ok": False, "error": "it has lost what it kept", "lost_memory": True})
        return honest(request)

    net.answers[1] = forgetful
    _, receipts, _ = run(federation(sites_of(net), method, size=2), 4)
    dropped = {(r.round, r.client): r.dropped for r in receipts if r.dropped}
    assert dropped == {(2, "0001"): "the site says: it has lost what it kept"}
    asked = [h for node, h in net.asked if node == 1 and h["do"] == "train"]
    assert [h["after"] for h in asked] == [0, 1, 1, 3]
    assert [h.get("lost") for h in asked] == [None, None, True, None]


@pytest.mark.parametrize("gone", ["the newest", "all"])
@pytest.mark.parametrize("back", [False, True])
def test_what_the_server_has_added_up_is_not_made_up_by_what_is_older(
    tiny: Tiny, tmp_path: Path, gone: str, back: bool
) -> None:
    """SCAFFOLD's sum holds the control variate after round 2: with that after round 1, the mean
    over all sites would be wrong from then on, and nobody was told.
    """
    changes: dict[str, Any] = {"method": {"name": "scaffold"}, "training__optimizer": "sgd"}
    here = Worker(tiny, tmp_path, **changes, server={"optimizer": "sgd"}, budgets=None)
    method, start = here.assignment.method, here.assignment.start
    state, client = method.init(start), Client("north", 24)

    def message(number: int) -> bytes:
        key = Key(0, number, "north")
        return encode(method.publish(method.plan(state, key), client, key))

    for number in (1, 2):
        sent = message(number)
        answer = here.ask(train(here.text, number, sent, after=number - 1))
        update = decode(answer.body, start.layout, decode(sent, start.layout).support)
        state = method.merge(state, [(client, update)], Key(0, number))
    kept = sorted(here.rounds.iterdir())[-1 if gone == "the newest" else 0 :]
    for path in kept:
        path.rename(tmp_path / path.name)
    lost = here.ask(train(here.text, 3, message(3), after=2)).header
    assert lost["lost_memory"] is True
    if back:
        for path in kept:
            (tmp_path / path.name).rename(path)
    answer = here.ask(train(here.text, 3, message(3), after=2, lost=True))
    assert answer.header["ok"] is back
    if not back:
        assert "control variate that this client has not kept" in answer.header["error"]


ODD: dict[str, Callable[[Path], None]] = {
    "a file": lambda place: place.touch(),
    "a pipe": os.mkfifo,
    "a link to nothing": lambda place: place.symlink_to("nowhere"),
}


@pytest.mark.parametrize("odd", kinds.some_of(ODD))
@pytest.mark.parametrize("name", ["runs", "adapters", "runs/*", "runs/*/rounds", "adapters/*"])
def test_what_is_in_a_folders_place_keeps_no_site_out(
    tiny: Tiny, tmp_path: Path, name: str, odd: str
) -> None:
    here = Worker(tiny, tmp_path)
    assert here.train(1).header["ok"]
    whole = resident.whole_message(here.assignment.start)
    assert here.ask(rate("keep", here.text, 1, whole)).header["ok"]
    (place,) = here.state.site.folder.glob(name)
    shutil.rmtree(place)
    ODD[odd](place)
    told(here.ask, here.text)
    assert here.train(2).header["ok"]
    assert here.ask(rate("keep", here.text, 2, whole)).header["ok"]
    assert place.is_dir()


def test_an_old_run_that_was_moved_elsewhere_is_forgotten(tiny: Tiny, tmp_path: Path) -> None:
    """A link to a larger disk: the link goes, and not what lies there."""
    here = Worker(tiny, tmp_path)
    runs, larger = here.rounds.parents[1], tmp_path / "larger"
    told(here.ask, here.text)
    first = here.rounds.parent
    shutil.move(first, larger)
    first.symlink_to(larger)
    for number in range(1, resident.RUNS + 3):
        told(here.ask, here.text + b"#" * number)
    assert len([*runs.iterdir()]) == resident.RUNS
    assert (larger / resident.RECIPE).is_file()


@pytest.mark.parametrize("number", [5, 10**9, 10**400])
@pytest.mark.parametrize("do", ["keep", "evaluate"])
def test_a_round_that_the_recipe_does_not_have_is_refused(
    tiny: Tiny, tmp_path: Path, do: str, number: int
) -> None:
    here = Worker(tiny, tmp_path)
    told(here.ask, here.text)
    answer = here.ask(rate(do, here.text, number, resident.whole_message(here.assignment.start)))
    assert not answer.header["ok"]
    assert "the recipe has 4 rounds" in answer.header["error"]
    assert len(answer.header["error"]) < 200
