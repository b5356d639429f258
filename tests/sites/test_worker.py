"""The resident worker: what a site answers is what a client in one process would, and nothing that
comes over its socket, or happens to its disk or its process, loses a memory or stops it.
"""

import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import tomllib
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tomli_w
import torch

from fedsieve.algebra.adapter import Adapter
from fedsieve.algebra.budget import Client
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import Memory, View
from fedsieve.data import sources
from fedsieve.engine import loop
from fedsieve.engine.client import take_part
from fedsieve.engine.loop import Federation
from fedsieve.errors import FedSieveError, WireError
from fedsieve.frame import Frame, pack, refusal, unpack
from fedsieve.recipe import experiment
from fedsieve.recipe import read as recipe
from fedsieve.recipe.experiment import Experiment, from_recipe
from fedsieve.sites import assignment as desks
from fedsieve.sites import intake, journal, resident, worker
from fedsieve.sites import site as sites
from fedsieve.sites.server import joint_score
from fedsieve.sites.worker import SOCKET, ask, carry
from fedsieve.tasks.tokens import Texts
from fedsieve.train import model, reader
from fedsieve.train.local import Fit, fit
from fedsieve.wire import decode, encode
from tests import kinds, toy
from tests.conftest import LABELS, Command, Tiny
from tests.sites.sites import (
    NAMES,
    Ask,
    asking,
    exchange,
    pooled,
    process,
    rate,
    recipe_text,
    settled,
    train,
    write_site,
)

BUDGETS = {"north": {"down": 0.5, "up": 0.25}, "south": {"up": 0.5}}


# A site's rounds are those of a client in one process.


def in_process(tiny: Tiny, folder: Path, **changes: Any) -> Experiment:
    """The federation of both sites in this process: the oracle."""
    table = tiny.table(
        cohort=2,
        data__train=str(pooled(folder, "train", 48, seed=len("train"))),
        data__test=str(pooled(folder, "test", 20, seed=len("test"))),
        data__classes=list(LABELS),
        training__steps=2,
        partition={"kind": "column", "column": "author"},
        **changes,
    )
    return from_recipe(recipe.check(table))


def finish(federation: Federation, start: Adapter, rounds: int) -> tuple[Adapter, list[Any]]:
    progress = loop.begin(federation, start)[1]
    bytes_sent = []
    for _, receipts, after in loop.rounds(federation, progress, rounds):
        progress = after
        bytes_sent += [(r.client, r.down_bytes, r.up_bytes, r.loss) for r in receipts]
    return federation.method.export(progress.state), bytes_sent


def told(ask: Ask, text: bytes) -> Frame:
    answer = ask(Frame({"do": "recipe"}, text))
    assert answer.header["ok"], answer.header
    return answer


@pytest.mark.parametrize(
    ("method", "budgets"),
    [
        ({"name": "flasc", "feedback": True, "up_values": "int8"}, BUDGETS),
        ({"name": "fedsa_lora"}, {"north": {}, "south": {}}),
        pytest.param(
            {"name": "flora"}, {"north": {"ratio": 0.5}, "south": {}}, marks=pytest.mark.slow
        ),
        ({"name": "fed_plora"}, {"north": {"ratio": 0.5}, "south": {"ratio": 0.25}}),
        pytest.param(
            {"name": "fslora_flasc"},
            {"north": {"ratio": 0.25, "up": 0.5}, "south": {"ratio": 0.5}},
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda value: value.get("name", ""),
)
def test_a_federation_of_sites_ends_as_in_one_process_though_its_workers_restart(
    tiny: Tiny, tmp_path: Path, method: dict[str, Any], budgets: dict[str, Any]
) -> None:
    """Bit by bit, with a new worker for every request: all that a client keeps is on its disk."""
    listed = {"kind": "list", "clients": budgets}
    given = {"method": method, "budgets": listed, "training__last_lr": 0.01}
    given |= {"training__proximal": 0.5}
    whole = in_process(tiny, tmp_path / "pool", **given)
    text = recipe_text(tiny, **given)
    asks = {
        name: asking(write_site(tiny, tmp_path, name, budget=budgets[name]), restart=True)
        for name in NAMES
    }
    for name in NAMES:
        facts = told(asks[name], text).header
        (client,) = (c for c in whole.federation.clients if c.id == name)
        assert facts["examples"] == client.examples
        assert facts["budget"] == client.budget._asdict()
    across = replace(whole.federation, exchange=exchange(asks, text), evaluate=None)
    expected, sent = finish(replace(whole.federation, evaluate=None), whole.start, 4)
    adapter, sent_across = finish(across, whole.start, 4)
    assert sent_across == sent
    for name, tensor in expected.tensors.items():
        assert torch.equal(adapter.tensors[name], tensor), name
    for name, tensor in expected.base.items():
        assert torch.equal(adapter.base[name], tensor), name
    assert any(not torch.equal(expected.tensors[n], t) for n, t in whole.start.tensors.items())


def test_counts_from_the_sites_make_the_exact_mean(tiny: Tiny, tmp_path: Path) -> None:
    whole = in_process(tiny, tmp_path / "pool", method={"name": "fedit"}, budgets=None)
    adapter, _ = finish(whole.federation, whole.start, 2)
    assert whole.federation.evaluate is not None
    expected = whole.federation.evaluate(adapter)
    assert expected is not None
    text = recipe_text(tiny, method={"name": "fedit"}, budgets=None)
    answers = []
    for name in NAMES:
        site = asking(write_site(tiny, tmp_path, name))
        told(site, text)
        answers.append(site(rate("evaluate", text, 2, resident.whole_message(adapter))))
    assert len({a.header["counted"] for a in answers}) == 2  # else a plain mean would do
    said: list[str] = []
    joint = joint_score(
        dict(zip(NAMES, answers, strict=True)), "classification", LABELS, said.append
    )
    assert joint is not None
    assert not said
    assert joint.counted == expected.counted
    assert {name: joint.metrics[name] for name in expected.metrics} == expected.metrics
    assert set(joint.metrics) - set(expected.metrics) == {
        "client_mean", "client_p10", "client_worst",
    }  # fmt: skip
    assert joint.loss == pytest.approx(expected.loss, rel=1e-6)


@pytest.mark.parametrize("do", ["train", "evaluate", "keep"])
def test_what_is_for_another_site_is_not_done(tiny: Tiny, tmp_path: Path, do: str) -> None:
    site, text = asking(write_site(tiny, tmp_path)), recipe_text(tiny)
    told(site, text)
    asked = train(text, 1, b"") if do == "train" else rate(do, text, 1, b"")
    for whose, why in (("south", "for another site"), ("north", "message")):
        answer = site(Frame({**asked.header, "site": whose}, b""))
        assert not answer.header["ok"]
        assert why in answer.header["error"]


@pytest.mark.parametrize("name", ["fedit", "flora", "fedsa_lora"])
def test_the_kept_adapter_scores_as_the_one_that_was_sent(
    tiny: Tiny, tmp_path: Path, name: str
) -> None:
    """Read back by PEFT's own loader (FLoRA: the whole model); FedSA with the site's own B."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    text = recipe_text(tiny, method={"name": name}, budgets=None)
    path = write_site(tiny, tmp_path)
    state = settled(path)
    site: Ask = lambda request: resident.answer(state, request)  # noqa: E731
    told(site, text)
    assignment = state.assignment
    assert assignment is not None
    method, client = assignment.method, Client("north", 24)
    server = method.init(assignment.start)
    for number in (1, 2):
        key = Key(0, number, "north")
        message = encode(method.publish(method.plan(server, key), client, key))
        body = site(train(text, number, message)).body
        update = decode(
            body, assignment.start.layout, decode(message, assignment.start.layout).support
        )
        server = method.merge(server, [(client, update)], Key(0, number))
    message = resident.whole_message(method.export(server))
    answer = site(rate("evaluate", text, 2, message))
    score = joint_score({"north": answer}, "classification", LABELS, print)
    assert site(rate("keep", text, 2, message)).header["ok"]
    kept = path.parent / "worker" / "adapters" / hashlib.sha256(text).hexdigest()[:16]
    load = AutoModelForSequenceClassification.from_pretrained
    if name == "flora":
        read = load(kept)
    else:
        read = PeftModel.from_pretrained(load(tiny.bert, num_labels=3), kept)
    read.eval()
    assert isinstance(assignment.test, Texts)
    with torch.inference_mode():
        logits = read(
            assignment.test.input_ids, attention_mask=assignment.test.attention_mask
        ).logits
    right = float((logits.argmax(-1) == assignment.test.labels).double().mean())
    loss = float(torch.nn.functional.cross_entropy(logits, assignment.test.labels))
    assert score is not None
    assert right == pytest.approx(score.metrics["accuracy"])
    assert loss == pytest.approx(score.loss, rel=1e-5)


# What is asked twice, late, or again after the server went back.


class Worker:
    """One site in this process that is ready for a recipe, and a server's messages for it."""

    def __init__(self, tiny: Tiny, folder: Path, **changes: Any) -> None:
        method = {"name": "flasc", "feedback": True}
        budgets = {"kind": "list", "clients": {"north": {"down": 0.5, "up": 0.25}}}
        self.text = recipe_text(tiny, **{"method": method, "budgets": budgets, **changes})
        self.path = write_site(tiny, folder, budget={"down": 0.5, "up": 0.25})
        self.state = settled(self.path)
        told(self.ask, self.text)
        assert self.state.assignment is not None
        self.assignment = self.state.assignment
        self.rounds = self.path.parent / "worker" / "runs" / self.assignment.run / "rounds"

    def ask(self, request: Frame) -> Frame:
        return resident.answer(self.state, request)

    def message(self, number: int, scale: float = 1.0) -> bytes:
        """What a server whose adapter is the start's, times `scale`, sends."""
        method, start = self.assignment.method, self.assignment.start
        server = method.init(
            start._replace(tensors={n: scale * t for n, t in start.tensors.items()})
        )
        client = Client("north", 24, sites.budget_of(self.state.site))
        return encode(method.publish(server, client, Key(0, number, "north")))

    def train(self, number: int, scale: float = 1.0) -> Frame:
        return self.ask(train(self.text, number, self.message(number, scale)))

    def residual(self) -> dict[str, torch.Tensor]:
        return next(journal.memories(self.rounds, 10**6, self.whose))[1]["residual"]

    @property
    def whose(self) -> str:
        return f"{self.assignment.run}/{self.state.site.name}"


def same(tree: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return tree.keys() == other.keys() and all(torch.equal(t, other[n]) for n, t in tree.items())


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def test_the_same_request_gets_the_same_answer_and_no_training(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Worker(tiny, tmp_path)
    first, second = site.train(1), site.train(2)
    assert first.body != second.body
    kept = contents(tmp_path)
    monkeypatch.setattr(resident, "take_part", lambda *_: pytest.fail("trained again"))
    assert site.train(2) == second
    assert site.train(1) == first  # a late copy of an old request
    assert contents(tmp_path) == kept


def test_a_server_that_went_back_finds_the_memory_of_then(tiny: Tiny, tmp_path: Path) -> None:
    """Rounds 1, 2, 3, then 2 and 3 again with another adapter: as if the first ones never were."""
    site, other = Worker(tiny, tmp_path / "a"), Worker(tiny, tmp_path / "b")
    for number in (1, 2, 3):
        site.train(number)
    other.train(1)
    for each in (site, other):
        each.train(2, scale=2.0)
    assert same(site.residual(), other.residual())
    assert site.train(3).body == other.train(3).body
    assert journal.find(site.rounds, 3, site.whose) is not None
    assert same(site.residual(), other.residual())


def test_a_site_says_so_when_the_server_goes_back_too_far(tiny: Tiny, tmp_path: Path) -> None:
    site = Worker(tiny, tmp_path, rounds=20)
    for number in range(1, 9):
        site.train(number)
    # Two checkpoints a round apart are in reach, and one before them.
    assert len(list(site.rounds.iterdir())) == 4
    kept = contents(tmp_path)
    refused = site.train(3, scale=2.0)
    assert not refused.header["ok"]
    assert "forgotten" in refused.header["error"]
    assert contents(tmp_path) == kept
    assert site.train(6, scale=2.0).header["ok"]


@pytest.mark.filterwarnings("ignore:.*is damaged")
@pytest.mark.parametrize("gone", ["missing", "damaged", "all missing"])
@pytest.mark.parametrize("after", kinds.some_of([0, 1]))
def test_a_site_without_the_memory_to_go_back_to_goes_on_without_it(
    tiny: Tiny, tmp_path: Path, gone: str, after: int
) -> None:
    """And not with that of the rounds that the server went back from, nor is it shut out."""
    site, other = Worker(tiny, tmp_path / "a"), Worker(tiny, tmp_path / "b")
    for number in (1, 2, 3):
        site.train(number)
    first, *later = sorted(site.rounds.iterdir())
    if gone == "damaged":
        first.write_bytes(b"x")
    else:
        for path in (first, *(later if gone == "all missing" else ())):
            path.unlink()
    kept = contents(tmp_path)
    answer = site.ask(train(site.text, after + 1, site.message(after + 1, 2.0), after=after))
    assert answer.header["ok"] or answer.header["lost_memory"] is True
    assert answer.header["ok"] == (after == 0 and gone == "all missing")
    if not answer.header["ok"]:
        assert f"has lost what it kept after round {after}" in answer.header["error"]
        assert contents(tmp_path) == kept  # it may be an old request that came again
        message = site.message(after + 2, 2.0)
        again = train(site.text, after + 2, message, after=after, lost=True)
        assert site.ask(again).body == other.train(after + 2, scale=2.0).body
        assert same(site.residual(), other.residual())


def test_an_old_request_that_comes_again_takes_no_memory(tiny: Tiny, tmp_path: Path) -> None:
    """One of a round that is not kept any more: after it, a site had no memory at all."""
    site = Worker(tiny, tmp_path / "a", rounds=20)
    other = Worker(tiny, tmp_path / "b", rounds=20)
    asked = [train(site.text, n, site.message(n), after=n - 1) for n in range(1, 9)]
    for request in asked[:-1]:
        assert site.ask(request).header["ok"]
        assert other.ask(request).header["ok"]
    kept = contents(tmp_path / "a")
    for request in asked[:3]:
        assert site.ask(request).header["lost_memory"] is True
    assert contents(tmp_path / "a") == kept
    assert site.ask(asked[-1]).body == other.ask(asked[-1]).body
    assert same(site.residual(), other.residual())


def test_what_was_put_back_is_used_though_the_server_knows_that_it_was_lost(
    tiny: Tiny, tmp_path: Path
) -> None:
    site, other = Worker(tiny, tmp_path / "a"), Worker(tiny, tmp_path / "b")
    for number in (1, 2):
        site.train(number)
        other.train(number)
    newest = sorted(site.rounds.iterdir())[-1]
    newest.rename(tmp_path / "aside")
    asked = train(site.text, 3, site.message(3), after=2)
    assert site.ask(asked).header["lost_memory"] is True
    (tmp_path / "aside").rename(newest)
    again = train(site.text, 3, site.message(3), after=2, lost=True)
    assert site.ask(again).body == other.ask(asked).body
    assert same(site.residual(), other.residual())


def test_what_its_owner_keeps_beside_the_rounds_stays(tiny: Tiny, tmp_path: Path) -> None:
    site = Worker(tiny, tmp_path, rounds=20)
    site.train(1)
    first = next(site.rounds.iterdir())
    own = [site.rounds / f"{first.name}.bak", site.rounds / "round-3", site.rounds / "round-x"]
    own.append(site.rounds / "round-000000009-notes")
    for path in own[:-1]:
        path.write_bytes(first.read_bytes())
    own[-1].mkdir()
    (own[-1] / "note").write_text("mine", encoding="utf-8")
    for number in range(2, 9):
        assert site.train(number).header["ok"]
    assert site.train(6, scale=2.0).header["ok"]
    assert all(path.exists() for path in own)
    assert not first.exists()


def test_no_round_is_done_after_itself(tiny: Tiny, tmp_path: Path) -> None:
    site = Worker(tiny, tmp_path)
    site.train(1)
    kept = contents(tmp_path)
    for after in (2, 3, 10**30):
        refused = site.ask(train(site.text, 2, site.message(2), after=after)).header
        assert (refused["ok"], refused.get("lost_memory")) == (False, None)
    assert contents(tmp_path) == kept


@pytest.mark.parametrize("name", ["flora", "florist", "fedex_lora"])
def test_a_lost_answer_does_not_shut_a_site_out(tiny: Tiny, tmp_path: Path, name: str) -> None:
    """Their servers send what a site's base lacks since the last answer that they saw."""
    text = recipe_text(tiny, method={"name": name}, budgets=None, rounds=9, lora__rank=1)
    path = write_site(tiny, tmp_path)
    state = settled(path)
    told(lambda request: resident.answer(state, request), text)
    assert state.assignment is not None
    assignment = state.assignment
    method, layout, lost = assignment.method, assignment.start.layout, (2, 3, 4, 5, 7)
    client, server = Client("north", 24), method.init(assignment.start)
    here: Memory = {}

    def again(view: View, client: Client, key: Key) -> Fit:
        return fit(assignment.resident, view, assignment.examples, assignment.recipe.training, key)

    for number in range(1, 9):
        key = Key(0, number, "north")
        message = encode(method.publish(server, client, key))
        answer = resident.answer(state, train(text, number, message))
        assert answer.header["ok"], answer.header
        # The oracle has a memory that only moves when the server has seen the answer.
        reply, after = take_part(method, again, assignment.start, client, here, key, message)
        assert answer.body == reply.update
        support = decode(message, layout).support
        other = Client("other" if number in lost else "north", 24)
        server = method.merge(server, [(other, decode(answer.body, layout, support))], key)
        here = here if number in lost else after


def test_a_damaged_memory_is_passed_over_with_a_warning(tiny: Tiny, tmp_path: Path) -> None:
    site = Worker(tiny, tmp_path)
    site.train(1)
    after_one = site.residual()
    site.train(2)
    newest = site.rounds / "round-000000002"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(bytes(data))
    with pytest.warns(UserWarning, match="is damaged"):
        assert same(site.residual(), after_one)
    with pytest.warns(UserWarning, match="is damaged"):
        assert site.train(3).header["ok"]


@pytest.mark.parametrize("whose", ["another run's", "another site's"])
def test_rounds_of_another_run_or_site_are_none(tiny: Tiny, tmp_path: Path, whose: str) -> None:
    """Put back from the wrong backup: whole, of the right shapes, and not what was kept here."""
    site = Worker(tiny, tmp_path)
    site.train(1)
    entry = journal.find(site.rounds, 1, site.whose)
    assert entry is not None
    run, name = site.whose.split("/")
    other = f"{run}/south" if whose == "another site's" else f"{run[::-1]}/{name}"
    journal.write(site.rounds, entry._replace(whose=other), keep=9)
    with pytest.warns(UserWarning, match="it is of another run or client"):
        refused = site.ask(train(site.text, 2, site.message(2), after=1))
    assert refused.header["lost_memory"]
    assert "has lost what it kept after round 1" in refused.header["error"]


@pytest.mark.parametrize("odd", ["names", "shapes", "facts"])
def test_a_memory_that_this_site_has_not_written_is_lost_and_ends_nothing(
    tiny: Tiny, tmp_path: Path, odd: str
) -> None:
    """Whole, with its digest; the server then lets the site go on from what is there."""
    site = Worker(tiny, tmp_path)
    site.train(1)
    entry = journal.find(site.rounds, 1, site.whose)
    assert entry is not None
    kept = entry.memory["residual"]
    if odd == "names":
        entry = entry._replace(memory={"residual": {f"{n}x": t for n, t in kept.items()}})
    elif odd == "shapes":
        entry = entry._replace(memory={"residual": {n: torch.zeros(1, 2, 3) for n in kept}})
    else:
        entry = entry._replace(facts={"ok": "yes"})
    journal.write(site.rounds, entry, keep=9)
    if odd == "facts":
        with pytest.warns(UserWarning, match="is damaged"):
            assert site.train(1).header["ok"]
        return
    refused = site.train(2)
    assert refused.header["lost_memory"] is True
    assert "what this site kept after round 1 cannot be used" in refused.header["error"]


@pytest.mark.parametrize("error", toy.no_memory(), ids=lambda e: type(e).__name__)
def test_too_little_memory_loses_nothing_that_a_site_keeps(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """What it kept is whole: the round is done again with it once there is room."""

    def full(*_: Any) -> Any:
        raise error

    site = Worker(tiny, tmp_path)
    site.train(1)
    with monkeypatch.context() as patch:
        patch.setattr(resident, "fit", full)
        answer = site.train(2).header
        assert (answer["ok"], answer.get("lost_memory")) == (False, None)
    assert site.train(2).header["ok"]


@pytest.mark.parametrize("place", ["rounds", "run", "runs"])
@pytest.mark.parametrize("odd", kinds.some_of(["a link", "a file", "a pipe"]))
def test_a_site_writes_no_round_through_a_link(
    tiny: Tiny, tmp_path: Path, place: str, odd: str
) -> None:
    """Nor removes what lies there; put back, it goes on as if nothing had been."""
    site = Worker(tiny, tmp_path / "site")
    site.train(1)
    run = site.rounds.parent
    there = {"rounds": site.rounds, "run": run, "runs": run.parent}[place]
    elsewhere = tmp_path / "elsewhere"
    there.rename(elsewhere)
    kept = contents(elsewhere)
    if odd == "a link":
        there.symlink_to(elsewhere)
    elif odd == "a file":
        there.write_text("x")
    else:
        os.mkfifo(there)
    refused = site.train(2)
    assert not refused.header["ok"]
    assert "nothing is read or written there" in refused.header["error"]
    assert str(tmp_path) not in refused.header["error"]
    if odd == "a link":
        again = site.ask(Frame({"do": "recipe"}, site.text))
        assert not again.header["ok"]
    assert contents(elsewhere) == kept
    if there.exists() or there.is_symlink():
        there.unlink()
    elsewhere.rename(there)
    assert site.train(2).header["ok"]


def test_a_full_disk_is_an_answer_and_loses_nothing(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, other = Worker(tiny, tmp_path / "a"), Worker(tiny, tmp_path / "b")
    for each in (site, other):
        each.train(1)
    kept = contents(tmp_path / "a")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("fedsieve.disk.os.fsync", full)
        refused = site.train(2)
        told_again = site.ask(Frame({"do": "recipe"}, site.text + b"\n"))
    for answer in (refused, told_again):
        assert not answer.header["ok"]
        assert "No space left" in answer.header["error"]
        assert not answer.body
    assert contents(tmp_path / "a") == kept
    assert site.train(2).body == other.train(2).body
    assert same(site.residual(), other.residual())


def test_a_client_that_diverges_keeps_its_memory_and_says_why(tiny: Tiny, tmp_path: Path) -> None:
    site = Worker(tiny, tmp_path)
    site.train(1)
    before = site.residual()
    answer = site.train(2, scale=1e38)
    assert answer.header["ok"]
    assert answer.header["loss"] is None
    assert "loss became" in answer.header["reason"]
    assert not answer.body
    assert same(site.residual(), before)
    assert unpack(pack(answer)) == answer


UNREADABLE: dict[str, Callable[[Path], object]] = {
    "too long": lambda path: path.write_bytes(b"x" * 2000),
    "empty": lambda path: path.write_bytes(b""),
    "a folder": lambda path: path.mkdir(),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link in circles": lambda path: path.symlink_to(path.name),
    "a pipe": lambda path: os.mkfifo(path),
}


@pytest.mark.parametrize("name", [resident.BASE, resident.SAID])
@pytest.mark.parametrize("how", kinds.some_of(UNREADABLE))
def test_what_a_site_noted_and_cannot_read_lets_no_request_pass(
    tiny: Tiny, tmp_path: Path, name: str, how: str
) -> None:
    """The first was refused, and the next was answered over whatever base and rows were there."""
    site = Worker(tiny, tmp_path)
    site.train(1)
    noted = site.rounds.parent / name
    noted.unlink()
    UNREADABLE[how](noted)
    site.state = settled(site.path)
    for _ in range(3):
        answer = site.train(2).header
        assert answer["ok"] or answer.get("unknown_recipe") is True
        # A link to nothing says no more than a file of old that was never there.
        assert answer["ok"] == (name == resident.SAID and how == "a link to nothing")
    told(site.ask, site.text)
    assert site.train(2).header["ok"]


def test_the_model_loads_once(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[str] = []
    pretrained = model.pretrained

    def counted(kind: Any, name: str, **given: Any) -> Any:
        loads.append(kind.__name__)
        return pretrained(kind, name, **given)

    monkeypatch.setattr(model, "pretrained", counted)
    monkeypatch.setattr(reader, "pretrained", counted)
    site = Worker(tiny, tmp_path, rounds=20)
    whole = resident.whole_message(site.assignment.start)
    for number in range(1, 9):
        told(site.ask, site.text)
        assert site.train(number).header["ok"]
        assert site.ask(rate("evaluate", site.text, number, whole)).header["ok"]
    # The configuration alone is read once more, to work out what the recipe would cost.
    assert sorted(set(loads)) == [
        "AutoConfig", "AutoModelForSequenceClassification", "AutoTokenizer",
    ]  # fmt: skip
    assert len(loads) == 4


def test_a_worker_that_starts_again_knows_the_recipe(tiny: Tiny, tmp_path: Path) -> None:
    site = Worker(tiny, tmp_path)
    answers = site.train(1), site.train(2)
    site.state = settled(site.path)
    assert (site.train(1), site.train(2)) == answers
    unknown = site.ask(train(site.text + b"#", 1, site.message(1)))
    assert unknown.header["unknown_recipe"] is True
    (site.rounds.parent / "recipe.toml").write_bytes(site.text + b"#")
    site.state = settled(site.path)
    assert site.train(1).header["unknown_recipe"] is True


@pytest.mark.parametrize("name", ["recipe.toml", "most_bytes", "told", "round-000000001"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(
    tiny: Tiny, tmp_path: Path, name: str
) -> None:
    site = Worker(tiny, tmp_path)
    site.train(1)
    run = site.rounds.parent
    folder = {"told": run.parent.parent, "round-000000001": site.rounds}.get(name, run)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    site.state = settled(site.path)
    most = resident.most_bytes(site.state, {"do": "train", "recipe": run.name})
    assert isinstance(most, Frame) == (name == "most_bytes")
    with warnings.catch_warnings(record=True):
        answer = site.train(1)
    assert answer.header.get("unknown_recipe", False) == (name == "recipe.toml")
    assert told(site.ask, site.text).header["ok"]
    assert site.train(1).header["ok"]


def test_old_runs_are_forgotten_and_their_adapters_stay(tiny: Tiny, tmp_path: Path) -> None:
    site = Worker(tiny, tmp_path)
    site.train(1)
    assert site.ask(
        rate("keep", site.text, 1, resident.whole_message(site.assignment.start))
    ).header["ok"]
    for number in range(resident.RUNS):
        told(site.ask, site.text + b"#" * (number + 1))
    runs = tmp_path / "north" / "worker" / "runs"
    assert len(list(runs.iterdir())) == resident.RUNS
    assert not site.rounds.exists()
    assert (tmp_path / "north" / "worker" / "adapters" / site.assignment.run[:16]).is_dir()


def test_what_a_killed_worker_left_half_written_is_removed(tiny: Tiny, tmp_path: Path) -> None:
    site = Worker(tiny, tmp_path)
    site.train(1)
    whole = resident.whole_message(site.assignment.start)
    assert site.ask(rate("keep", site.text, 1, whole)).header["ok"]
    adapters = tmp_path / "north" / "worker" / "adapters"
    (place,) = adapters.iterdir()
    others = [
        ".film.mkv.part", "runs/demo/.adapter.part", "runs/demo/rounds/.x.part",
        "adapters/.mine.part", "adapters/.mine.old", "adapters/.v1.old/x",
    ]  # fmt: skip
    for name in others:  # the owner's own, in a folder that has other things in it
        (site.rounds.parents[2] / name).parent.mkdir(parents=True, exist_ok=True)
        (site.rounds.parents[2] / name).write_bytes(b"mine")
    kept = contents(tmp_path)
    (site.rounds / ".round-000000002.part").write_bytes(b"half")
    (site.rounds.parents[2] / ".told.part").write_bytes(b"half")
    (site.rounds.parent / ".recipe.toml.part").write_bytes(b"half")
    (adapters / f".{place.name}.part").mkdir()
    place.rename(adapters / f".{place.name}.old")  # killed between two renames
    settled(site.path)
    assert contents(tmp_path) == kept


def test_what_an_owner_put_beside_a_kept_adapter_stays_there(tiny: Tiny, tmp_path: Path) -> None:
    site = Worker(tiny, tmp_path)
    site.train(1)
    whole = resident.whole_message(site.assignment.start)
    assert site.ask(rate("keep", site.text, 1, whole)).header["ok"]
    (place,) = (tmp_path / "north" / "worker" / "adapters").iterdir()
    (place / "notes.txt").write_text("mine")
    assert site.ask(rate("keep", site.text, 1, whole)).header["ok"]
    assert (place / "notes.txt").read_text() == "mine"
    # Killed before they were brought over.
    old = place.with_name(f".{place.name}.old")
    old.mkdir()
    (place / "notes.txt").rename(old / "notes.txt")
    (old / "adapter_config.json").write_text("older")
    settled(site.path)
    assert (place / "notes.txt").read_text() == "mine"
    assert (place / "adapter_config.json").read_text() != "older"
    assert not old.exists()


@pytest.mark.parametrize("which", ["run", "rounds"])
def test_a_starting_worker_removes_nothing_that_a_link_leads_to(
    tiny: Tiny, tmp_path: Path, which: str
) -> None:
    path, mine = write_site(tiny, tmp_path), tmp_path / "mine"
    (mine / "rounds" / ".film.part").mkdir(parents=True)
    for name in (".draft.part", "rounds/.x.part", "rounds/.film.part/scene"):
        (mine / name).write_text("mine", encoding="utf-8")
    worker = path.parent / "worker"
    worker.mkdir(mode=0o700)
    place = worker / "runs" / ("a" * 64)
    place = place if which == "run" else place / "rounds"
    place.parent.mkdir(parents=True)
    place.symlink_to(mine)
    before = contents(mine)
    settled(path)
    assert contents(mine) == before


# What a server may not do.


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({}, "unknown request"),
        ({"do": None}, "unknown request"),
        ({"do": ["train"]}, "unknown request"),
        ({"do": "run"}, "unknown request 'run': known are describe, recipe, train, evaluate, keep"),
        ({"do": "x" * 9999}, "unknown request"),
        ({"do": "train"}, "recipe"),
        ({"round": 0}, "round"),
        ({"round": 1.5}, "round"),
        ({"round": True}, "round"),
        ({"round": 5}, "the recipe has seed 0 and 4 rounds"),
        ({"seed": 1}, "the recipe has seed 0"),
        ({"recipe": "../../../etc"}, "recipe"),
        ({"data": "/etc/passwd"}, "data"),
        (
            {"budget": {"ratio": 1.0, "down": 0.5, "up": 0.9}},
            "budget.up 0.9 is more than this site affords",
        ),
        ({"budget": {"ratio": 1.0, "down": 0.5, "up": 0.0}}, "budget.up"),
        ({"budget": {"up": 0.1}}, "budget.ratio"),
        ({"budget": {"ratio": 1.0, "down": 0.5, "up": 0.1, "rank": 4}}, "budget.rank"),
    ],
)
def test_requests_that_are_refused(
    tiny: Tiny, tmp_path: Path, header: dict[str, Any], said: str
) -> None:
    site = Worker(tiny, tmp_path)
    good = train(site.text, 1, site.message(1))
    asked = header if "do" in header or not header else {**good.header, **header}
    kept = contents(tmp_path)
    answer = site.ask(Frame(asked, good.body))
    assert not answer.header["ok"]
    assert said in answer.header["error"]
    assert len(answer.header["error"]) <= 500
    assert contents(tmp_path) == kept
    assert site.ask(good).header["ok"]


def test_messages_that_are_no_payload_change_nothing(tiny: Tiny, tmp_path: Path) -> None:
    site = Worker(tiny, tmp_path)
    site.train(1)
    kept = contents(tmp_path)
    good = site.message(2)
    whole = resident.whole_message(site.assignment.start)
    for message in (b"", b"garbage", good[:-1], good[:20] + b"\xff" + good[21:], good + b"\0"):
        assert not site.ask(train(site.text, 2, message)).header["ok"]
    for do in ("evaluate", "keep"):
        for message in (b"", whole[:-1], whole + b"\0"):
            assert not site.ask(rate(do, site.text, 2, message)).header["ok"]
    assert contents(tmp_path) == kept


def test_a_server_may_ask_for_less_than_the_site_affords(tiny: Tiny, tmp_path: Path) -> None:
    site = Worker(tiny, tmp_path)
    usual = site.train(1)
    budget = {"ratio": 1.0, "down": 0.5, "up": 0.1}
    less = site.ask(train(site.text, 1, site.message(1), budget=budget))
    assert 0 < len(less.body) < len(usual.body) / 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": {"name": "os.path"}}, "no method of FedSieve itself"),
        ({"method": {"name": "tests.sites.sites"}}, "no method of FedSieve itself"),
        ({"model__settings": {"trust_remote_code": True}}, "foreign code is run"),
        ({"model__settings": {"attention_dropout": 2}}, "dropout rates only"),
        ({"model__settings": {"hidden_dropout_prob": True}}, "dropout rates only"),
        ({"data__classes": None}, "data.classes"),
        ({"training__steps": 10**12}, "at most 100000"),
        ({"training__steps": None, "training__epochs": 10**12}, "at most 100000"),
        ({"training__rate": 1}, "training.rate: unknown key"),
        ({"lora__targets": ["nowhere"]}, "lora.targets"),
        ({"data__max_length": 64, "name": "long"}, None),
    ],
)
def test_recipes_that_are_refused(
    tiny: Tiny, tmp_path: Path, changes: dict[str, Any], said: str | None
) -> None:
    site = Worker(tiny, tmp_path)
    answer = site.ask(Frame({"do": "recipe"}, recipe_text(tiny, **changes)))
    if said is None:
        assert answer.header["ok"]
    else:
        assert said in answer.header["error"]
    assert site.train(1).header["ok"]


@pytest.mark.parametrize("text", [b"\xff", b"rounds = ", b"[" * 9999, b"a" * (1 << 21), b""])
def test_a_recipe_that_is_none_is_refused(tiny: Tiny, tmp_path: Path, text: bytes) -> None:
    site = Worker(tiny, tmp_path)
    assert not site.ask(Frame({"do": "recipe"}, text)).header["ok"]
    assert site.train(1).header["ok"]


def test_paths_never_come_from_a_message(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe that names files which exist here, with other columns: the site's own are read."""
    opened: list[str] = []
    load, locate = sources.load, experiment.locate

    def loading(source: str, *arguments: Any, **options: Any) -> Any:
        opened.append(source)
        return load(source, *arguments, **options)

    located: list[str] = []

    def locating(name: str) -> str:
        located.append(name)
        return locate(name)

    monkeypatch.setattr(sources, "load", loading)
    for place in (desks, experiment):
        monkeypatch.setattr(place, "locate", locating)
    path = write_site(tiny, tmp_path)
    site = asking(path)
    text = recipe_text(
        tiny,
        data__train=str(tiny.train),
        data__test=str(tiny.test),
        data__text="author",
        data__names=["text", "author", "label"],
        model__source=str(tiny.gpt2),
    )
    count = len((path.parent / "train.csv").read_text().splitlines()) - 1
    assert told(site, text).header["examples"] == count
    assert set(opened) == {str(path.parent / name) for name in ("train.csv", "test.csv")}
    assert set(located) == {str(tiny.bert)}


def test_without_a_model_of_its_own_a_site_takes_stored_names_only(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSIEVE_CACHE", str(tmp_path / "cache"))
    path = write_site(tiny, tmp_path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not line.startswith("model")))
    site = asking(path)
    for source in (str(tiny.bert), "org/name", "../north"):
        answer = site(Frame({"do": "recipe"}, recipe_text(tiny, model__source=source)))
        assert "model.source" in answer.header["error"]
    answer = site(Frame({"do": "recipe"}, recipe_text(tiny, model__source="minilm-l6")))
    assert "cannot load its base model" in answer.header["error"]
    assert str(tmp_path) not in answer.header["error"]


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors"])
def test_a_model_that_is_broken_is_not_told_by_its_path(
    tiny: Tiny, tmp_path: Path, name: str
) -> None:
    broken = tmp_path / "base"
    shutil.copytree(tiny.bert, broken)
    (broken / name).unlink()
    site = asking(write_site(tiny, tmp_path, model=str(broken)))
    answer = site(Frame({"do": "recipe"}, recipe_text(tiny)))
    assert "cannot load its base model" in answer.header["error"]
    assert "base/" not in answer.header["error"]
    assert str(tmp_path) not in answer.header["error"]


def test_errors_do_not_tell_the_server_what_the_rows_hold(tiny: Tiny, tmp_path: Path) -> None:
    path = write_site(tiny, tmp_path)
    with (path.parent / "train.csv").open("a") as file:
        file.write("some words,a-rare-illness,north\n")
    said: list[str] = []
    state = resident.start(sites.load(path), said.append)
    answer = resident.answer(state, Frame({"do": "recipe"}, recipe_text(tiny)))
    assert "rows do not fit the recipe" in answer.header["error"]
    assert "illness" not in json.dumps(answer.header)
    assert any("a-rare-illness" in line for line in said)  # the site's owner has to find it


def test_nor_how_their_columns_are_called(tiny: Tiny, tmp_path: Path) -> None:
    """Nor of dates beyond what Python has."""
    path = write_site(tiny, tmp_path)
    stamps = pa.array([1, 2, 10**13], pa.timestamp("s"))
    pq.write_table(pa.table({"born": stamps, "label": LABELS}), path.parent / "rows.parquet")
    table = tomllib.loads(path.read_text())
    table["data"] = {"train": "rows.parquet", "text": "born", "label": "label"}
    path.write_text(tomli_w.dumps(table))
    said: list[str] = []
    state = resident.start(sites.load(path), said.append)
    answer = resident.answer(state, Frame({"do": "recipe"}, recipe_text(tiny)))
    assert "rows do not fit the recipe" in answer.header["error"]
    assert "born" not in json.dumps(answer.header)
    assert any("row 0 of column 'born' holds" in line for line in said)


def test_whatever_breaks_is_an_answer(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Worker(tiny, tmp_path)
    with monkeypatch.context() as patch:

        def broken(*_: Any) -> Any:
            raise RuntimeError("row 3 holds a-rare-illness")

        patch.setattr(resident, "fit", broken)
        answer = site.train(1)
    assert "unexpected RuntimeError" in answer.header["error"]
    assert "illness" not in answer.header["error"]
    assert site.train(1).header["ok"]


def test_what_a_site_tells_about_itself(tiny: Tiny, tmp_path: Path) -> None:
    path = write_site(
        tiny,
        tmp_path,
        memory=2000,
        step_seconds=0.1,
        link={"downlink": 10, "uplink": 2.5},
        budget={"ratio": 0.5, "up": 0.25},
    )
    site = asking(path)
    facts = dict(site(Frame({"do": "describe"})).header)
    versions = facts.pop("versions")
    assert facts == {
        "ok": True,
        "name": "north",
        "examples": len((path.parent / "train.csv").read_text().splitlines()) - 1,
        "recipe": None,
        "base": None,
        "reads": None,
        "budget": {"ratio": 0.5, "down": 1.0, "up": 0.25},
        "link": {"downlink": 10.0, "uplink": 2.5, "latency": 0.0},
        "memory": 2000.0,
        "step_seconds": 0.1,
    }
    assert versions["wire"] == 1
    assert versions["torch"] == torch.__version__
    text = recipe_text(tiny, method={"name": "fedit"}, budgets=None, data__validation=0.2)
    ready = told(site, text).header
    assert ready["recipe"] == hashlib.sha256(text).hexdigest()
    assert ready["examples"] == facts["examples"] - round(0.2 * facts["examples"])
    told_before = {name: value for name, value in ready.items() if name != "tag"}
    assert site(Frame({"do": "describe"})).header == told_before
    assert not site(Frame({"do": "describe", "path": "/"})).header["ok"]
    # Two sites find out whether they hold the same base.
    changed = recipe_text(tiny, method={"name": "fedit"}, budgets=None, model__dtype="bfloat16")
    assert told(site, changed).header["base"] != ready["base"]
    # And whether a configuration was changed over the same weights.
    other = tmp_path / "other"
    shutil.copytree(tiny.bert, other)
    config = json.loads((other / "config.json").read_text())
    for act, same in ((config["hidden_act"], True), ("relu", False)):
        (other / "config.json").write_text(json.dumps(config | {"hidden_act": act}))
        plain = recipe_text(tiny, method={"name": "fedit"}, budgets=None)
        answer = told(asking(write_site(tiny, tmp_path / act, model=str(other))), plain).header
        assert (answer["base"] == ready["base"]) is same


# What a worker must live through on its socket.


@pytest.fixture
def echo(tmp_path: Path) -> Iterator[Path]:
    """A socket behind which requests are repeated; "wait" takes a while."""
    folder = tmp_path / "w"
    folder.mkdir(mode=0o700)
    ready, may_go_on = threading.Event(), threading.Event()

    def work(request: Frame) -> Frame:
        if request.header["do"] == "stop":
            raise SystemExit
        if request.header["do"] == "wait":
            may_go_on.wait(60)
        return Frame({"ok": True, **request.header}, request.body)

    def about(request: Frame) -> Frame | None:
        if request.header.get("do") == "go on":
            may_go_on.set()
        return Frame({"ok": True}) if request.header.get("do") in ("describe", "go on") else None

    def serve() -> None:
        with suppress(SystemExit):
            worker.serve(folder, work, about, lambda _: ready.set())

    serving = threading.Thread(target=serve, daemon=True)
    serving.start()
    assert ready.wait(10)
    yield folder / SOCKET
    assert ask(folder / SOCKET, Frame({"do": "describe"}), 10).header["ok"]
    spoken(folder / SOCKET, pack(Frame({"do": "stop"})), listen=False)
    serving.join(10)
    assert not serving.is_alive()
    assert not (folder / SOCKET).exists()


@pytest.mark.parametrize("other", [False, True])
def test_a_worker_that_nobody_can_reach_any_more_ends(tmp_path: Path, other: bool) -> None:
    """Its socket was swept away, or another worker's lies there, which it leaves alone."""

    def sweep(address: Path) -> None:
        address.unlink()
        if other:
            address.touch()

    folder = tmp_path / "w"
    folder.mkdir(mode=0o700)
    with pytest.raises(FedSieveError, match=r"nobody can reach this one any more\. Start it"):
        worker.serve(folder, lambda request: request, lambda request: None, sweep)
    assert (folder / SOCKET).exists() == other


def near(address: Path) -> str:
    """The shorter way to name a socket: only so many bytes fit."""
    return min(str(address), os.path.relpath(address), key=len)


def spoken(address: Path, data: bytes, *, listen: bool = True) -> bytes:
    """What comes back for these bytes."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(60)
        connection.connect(near(address))
        connection.sendall(data)
        if not listen:
            return b""
        connection.shutdown(socket.SHUT_WR)
        came = b""
        while part := connection.recv(1 << 16):
            came += part
        return came


def header(text: bytes) -> bytes:
    return len(text).to_bytes(4, "big") + text


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0",
        b"GET / HTTP/1.1\r\n\r\n",
        bytes(1000),
        (1 << 31).to_bytes(4, "big"),
        header(b"{}"),
        header(b"[]"),
        header(b"nonsense"),
        header(b"\xff\xfe"),
        header(b"[" * 60_000),
        header(b'{"do": "x", "length": -1}'),
        header(b'{"do": "x", "length": 1e3}'),
        header(b'{"do": "x", "length": true}'),
        header(b'{"do": "x", "length": NaN}'),
        header(b'{"do": "x", "length": 99999999999999}'),
        header(b'{"do": "x", "length": 2000000000}') + b"too little",
        header(b'{"do": "x", "length": 5}') + b"1234",
        pack(Frame({"do": "x"}, b"12345"))[:-1],
    ],
)
def test_what_is_no_request_is_told_so(echo: Path, data: bytes) -> None:
    answer = unpack(spoken(echo, data))
    assert answer.header["ok"] is False
    assert "no request" in answer.header["error"]


def test_a_worker_outlives_those_who_hang_up(echo: Path) -> None:
    for _ in range(3 * worker.JOBS):
        spoken(echo, b"", listen=False)
        spoken(echo, pack(Frame({"do": "x"}, bytes(1 << 20))), listen=False)
        spoken(echo, (1 << 31).to_bytes(4, "big") + bytes(100_000), listen=False)
    assert ask(echo, Frame({"do": "x"}, b"y"), 60) == Frame({"ok": True, "do": "x"}, b"y")


def test_those_who_say_nothing_keep_nobody_waiting_for_ever(
    echo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "SILENCE", 0.3)
    silent = [socket.socket(socket.AF_UNIX) for _ in range(2 * worker.JOBS)]
    for each in silent:
        each.settimeout(60)
        each.connect(near(echo))
    began = time.monotonic()
    assert ask(echo, Frame({"do": "x"}), 60).header["ok"]
    assert time.monotonic() - began < 10
    for each in silent:
        each.close()


def test_a_worker_tells_about_itself_while_it_works(echo: Path) -> None:
    answers: list[Frame] = []

    def wait() -> None:
        answers.append(ask(echo, Frame({"do": "wait"}), 60))

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert ask(echo, Frame({"do": "describe"}), 5).header["ok"]
    assert not answers
    with pytest.raises(FedSieveError, match=r"did not answer in 0\.2 s"):  # noqa: PT012
        for _ in range(100):  # on a busy machine the first request may be on its way yet
            ask(echo, Frame({"do": "next"}), 0.2)
    ask(echo, Frame({"do": "go on"}), 5)
    waiting.join(60)
    assert answers == [Frame({"ok": True, "do": "wait"})]


def test_too_many_requests_are_put_off(echo: Path) -> None:
    answers: list[Frame] = []
    count = 2 * worker.JOBS

    def wait() -> None:
        answers.append(ask(echo, Frame({"do": "wait"}), 30))

    waiting = [threading.Thread(target=wait) for _ in range(count)]
    for each in waiting:
        each.start()
    until = time.monotonic() + 60
    while len(answers) < count - worker.JOBS - 1 and time.monotonic() < until:
        time.sleep(0.01)
    assert all("ask again later" in a.header["error"] for a in answers)
    ask(echo, Frame({"do": "go on"}), 5)
    for each in waiting:
        each.join(60)
    assert sum(a.header["ok"] for a in answers) in (worker.JOBS, worker.JOBS + 1)


def test_large_bodies_come_whole(echo: Path) -> None:
    body = os.urandom(5_000_001)
    assert ask(echo, Frame({"do": "x"}, body), 60).body == body
    assert unpack(carry(echo, pack(Frame({"do": "x"}, body)), 60)).body == body


@pytest.mark.parametrize("value", [float("nan"), float("inf"), b"bytes", {1, 2}])
def test_headers_hold_only_what_json_can_say(value: Any) -> None:
    with pytest.raises(WireError, match="not JSON"):
        pack(Frame({"loss": value}))


def test_a_header_has_a_limit() -> None:
    with pytest.raises(WireError, match="at most"):
        pack(Frame({"error": "x" * worker.HEADER}))
    with pytest.raises(WireError, match="follow the end"):
        unpack(pack(refusal("x")) + b"\0")


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(FedSieveError, match="start `fedsieve worker"):
        ask(tmp_path / SOCKET, Frame({"do": "describe"}), 5)
    (tmp_path / SOCKET).parent.mkdir()
    with socket.socket(socket.AF_UNIX) as left:  # by a worker that was killed
        left.bind(str(tmp_path / SOCKET))
    with pytest.raises(FedSieveError, match="start `fedsieve worker"):
        ask(tmp_path / SOCKET, Frame({"do": "describe"}), 5)


def test_a_path_too_long_for_a_socket_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(FedSieveError, match="too long for a socket"):
        worker.serve(tmp_path / ("x" * 200), lambda r: r, lambda r: r)


def test_a_folder_that_others_may_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(FedSieveError, match="chmod 700"):
        worker.lock(tmp_path / "open")
    (tmp_path / "open").chmod(0o1777)  # as /tmp is, and must stay
    with pytest.raises(FedSieveError, match="than its owner: choose another folder"):
        worker.lock(tmp_path / "open")
    with worker.lock(tmp_path / "new" / "one"):
        assert stat.S_IMODE((tmp_path / "new" / "one").stat().st_mode) == 0o700


def test_who_only_carries_bytes_needs_no_torch() -> None:
    """Flower starts a process for every message: it must be up in a moment."""
    code = (
        "import sys, fedsieve.sites.worker; print({'torch', 'pydantic', 'numpy'} & {*sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "set()"


# A real process.


def test_a_signal_that_wakes_nobody_ends_a_worker_too(tmp_path: Path) -> None:
    """One that arrives just before the main thread waits does not end the wait.

    Here another thread takes it: Python notes it for the main thread, which sleeps on.
    """
    code = """
import signal, sys, threading, time
from pathlib import Path
from fedsieve.sites import worker

def ready(address):
    def later():
        time.sleep(0.5)
        signal.raise_signal(signal.SIGTERM)
    threading.Thread(target=later, daemon=True).start()

def interrupt(number, frame):
    raise KeyboardInterrupt

signal.signal(signal.SIGTERM, interrupt)
try:
    worker.serve(Path(sys.argv[1]), lambda request: request, lambda request: None, ready)
except KeyboardInterrupt:
    print("ended")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == "ended\n"


@pytest.mark.slow
def test_a_worker_in_a_process_of_its_own(tiny: Tiny, tmp_path: Path, command: Command) -> None:
    """Its life: alone on its folder, closed to others, killed in training, on a full disk, ended.

    One test, since a process takes seconds to start. The oracle is a site in this process that
    nothing ever happens to.
    """
    calm = Worker(tiny, tmp_path / "calm")
    path = write_site(tiny, tmp_path / "busy", budget={"down": 0.5, "up": 0.25})
    folder = path.parent / "worker"
    address = folder / SOCKET
    whole = resident.whole_message(calm.assignment.start)
    requests = [train(calm.text, n, calm.message(n)) for n in (1, 2, 3)]

    with process(path) as busy:
        assert ask(address, Frame({"do": "recipe"}, calm.text), 60).header["ok"]
        for place in [folder, *folder.rglob("*")]:
            mode = stat.S_IMODE(place.stat().st_mode)
            assert not mode & 0o077, f"{place}: {mode:o}"
        assert stat.S_ISSOCK(address.stat().st_mode)
        second = command("worker", path)
        assert second.code == 2
        assert "another worker is running" in second.err
        assert b"no request" in spoken(address, os.urandom(5000))
        first = ask(address, requests[0], 60)
        # Killed in a round that would take minutes.
        slow = recipe_text(tiny, training__steps=50_000)
        assert ask(address, Frame({"do": "recipe"}, slow), 60).header["ok"]
        asked = threading.Thread(target=lost, args=(address, train(slow, 1, whole)))
        asked.start()
        time.sleep(1)
        busy.kill()
        asked.join(30)
    assert len(list(folder.glob("runs/*/rounds/*"))) == 1
    assert address.exists()  # nobody was left to remove it

    with process(path) as again:
        # A full disk: no file may grow beyond what a memory needs.
        limit = resource.RLIMIT_FSIZE
        before = resource.prlimit(again.pid, limit, (1000, resource.RLIM_INFINITY))
        refused = ask(address, requests[1], 60)
        assert not refused.header["ok"]
        assert "the site's disk" in refused.header["error"]
        resource.prlimit(again.pid, limit, before)
        bodies = [ask(address, request, 60).body for request in requests]
        again.send_signal(signal.SIGTERM)
        assert again.wait(30) == 0
    assert not address.exists()
    assert bodies[0] == first.body
    assert bodies == [calm.ask(request).body for request in requests]
    assert not list(folder.rglob("*.part"))


def lost(address: Path, request: Frame) -> None:
    """A request whose worker is killed."""
    with pytest.raises(FedSieveError, match="gave no answer"):
        ask(address, request, 60)


@pytest.mark.parametrize("odd", ["a link", "a pipe", "a folder"])
def test_a_lock_that_is_none_is_not_opened(odd: str, tmp_path: Path) -> None:
    folder, victim = tmp_path / "worker", tmp_path / "victim"
    folder.mkdir(mode=0o700)
    victim.write_text("kept")
    if odd == "a link":
        (folder / ".lock").symlink_to(victim)
    elif odd == "a pipe":
        os.mkfifo(folder / ".lock")
    else:
        (folder / ".lock").mkdir()
    with pytest.raises(FedSieveError, match=r"\.lock is .*where a run has a file of its own"):
        worker.lock(folder)
    assert victim.read_text() == "kept"
