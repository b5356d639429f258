"""Many clients: a start costs by rows, a round by its cohort, and memory does not grow.

Things are counted where they can be; where only time tells, the bounds are generous. Training is
replaced by recorded updates where the server alone is looked at.
"""

import gc
import time
import tracemalloc
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch

from fedsieve.algebra.budget import Client
from fedsieve.algebra.keys import Key, words
from fedsieve.clients import sampling
from fedsieve.clients.privacy import Cohorts, settle
from fedsieve.data.names import numbered
from fedsieve.engine.client import Reply
from fedsieve.engine.local import in_process
from fedsieve.engine.loop import Exchange, Federation, begin, merged, rounds
from fedsieve.methods import fedit
from fedsieve.recipe import read as recipe
from fedsieve.recipe.experiment import from_recipe
from fedsieve.settings import Sampling
from tests import toy
from tests.conftest import Tiny, write_rows

MANY = 20_000
DOUBLE: dict[str, Any] = {"down_values": "float64", "up_values": "float64"}  # as toy trains


def clients(count: int) -> list[Client]:
    return [Client(id, 2) for id in numbered(count)]


def replayed() -> Exchange:
    """Whoever is asked, the first client's first update comes back."""
    first: list[Reply] = []
    real = in_process(fedit.method(**DOUBLE), toy.train, toy.start(), {})

    def carry(messages: Iterable[tuple[Client, bytes]], key: Key) -> Iterator[Reply]:
        for client, message in messages:
            if not first:
                first.extend(real.carry([(client, message)], key))
            yield first[0]._replace(client=client)

    return Exchange(carry, lambda merged: None)


def federation(count: int, drawn: Sampling, **more: Any) -> Federation:
    return Federation(fedit.method(**DOUBLE), clients(count), drawn, 3, replayed(), **more)


@pytest.mark.parametrize(
    ("drawn", "most"),
    [
        (Sampling("uniform", 10), 0),
        (Sampling("uniform", 10, availability={"00007": 0.5, "00070": 0.5}), 2),
        (Sampling("poisson", 10), MANY),
        (Sampling("poisson", 10, availability=0.5), MANY + 40),
        (Sampling("uniform", 10, availability=0.9), MANY),
    ],
)
def test_only_who_may_be_away_is_asked(
    monkeypatch: pytest.MonkeyPatch, drawn: Sampling, most: int
) -> None:
    """No round asks a client twice, and a plain one asks none of those who are not drawn."""
    asked = 0

    def counted(key: Key, ids: Iterable[str]) -> Iterator[int]:
        nonlocal asked
        for word in words(key, ids):
            asked += 1
            yield word

    monkeypatch.setattr(sampling, "words", counted)
    sampling.cohort(clients(MANY), drawn, Key(0, 1))
    assert asked <= most


def test_a_round_costs_by_its_cohort() -> None:
    """A hundred times as many clients, and the server is about as soon done."""
    seconds = []
    for count in (1_000, 100_000):
        made = federation(count, Sampling(size=20))
        _, progress = begin(made, toy.start())
        times = []
        for _ in range(5):
            began = time.perf_counter()
            progress = merged(made, progress).progress
            times.append(time.perf_counter() - began)
        seconds.append(min(times[1:]))
    assert seconds[1] < 4 * seconds[0]


def test_a_private_round_asks_for_few_epsilons() -> None:
    """As many as there are numbers of rounds in which a client may have been."""
    drawn = Sampling("poisson", 40)
    plan = settle(Cohorts("poisson", 40, MANY), rounds=5, clip=1.0, delta=1e-6, noise_multiplier=1)
    assert plan.known is not None
    known, asked = plan.known, []

    def counted(count: int) -> float:
        asked.append(count)
        return known(count)

    made = federation(MANY, drawn, privacy=plan._replace(known=counted))
    _, progress = begin(made, toy.start())
    *_, (last, receipts, _) = rounds(made, progress, 5)
    everyone = made.drawn(5)
    assert len(everyone) > 120
    assert last.epsilon_unamplified == max(known(count) for count in everyone.values())
    assert [r.epsilon for r in receipts] == [known(everyone[r.client]) for r in receipts]
    assert len(asked) < 5 * 40 * 2


def test_a_recipe_of_many_clients_starts_and_runs_in_seconds(tiny: Tiny, tmp_path: Any) -> None:
    """Ten times as many clients of the same rows: little more to start, and real rounds."""
    rows = write_rows(tmp_path / "rows.csv", MANY, 1, [f"a{n}" for n in range(MANY)])
    seconds = {}
    for count in (MANY // 10, MANY):
        changes = {"data__train": str(rows), "partition": {"kind": "iid", "clients": count}}
        began = time.perf_counter()
        made = from_recipe(recipe.check(tiny.table(**changes)))
        seconds[count] = time.perf_counter() - began
        assert len(made.federation.clients) == count
    assert seconds[MANY] < 3 * seconds[MANY // 10]
    began = time.perf_counter()
    _, progress = begin(made.federation, made.start)
    *_, (last, _, _) = rounds(made.federation, progress, 3)
    assert (last.round, last.clients, last.dropped) == (3, 3, 0)
    assert time.perf_counter() - began < 30


def test_memory_after_300_rounds_is_that_after_100() -> None:
    made = federation(2_000, Sampling(size=2))
    _, progress = begin(made, toy.start())
    held: dict[int, tuple[int, int]] = {}
    tracemalloc.start()
    try:
        for number in range(1, 301):
            progress = merged(made, progress).progress
            if number % 100 == 0:
                gc.collect()
                tensors = sum(type(thing) is torch.Tensor for thing in gc.get_objects())
                held[number] = tracemalloc.get_traced_memory()[0], tensors
    finally:
        tracemalloc.stop()
    assert held[300][1] <= held[100][1]
    # 200 rounds of 2 receipts would be a hundred kilobytes and more.
    assert held[300][0] - held[100][0] < 30_000
