"""Laws of sampling: the probabilities of each kind, and rounds with late, few, or no clients."""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsieve.algebra.budget import Budget, Client, Link
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import Memory, Method
from fedsieve.clients.sampling import check, cohort
from fedsieve.engine.client import Reply
from fedsieve.engine.local import punctual
from fedsieve.engine.loop import Exchange, Receipt, begin, rounds
from fedsieve.errors import FedSieveError, NoUsableUpdate
from fedsieve.methods import fedit, flasc, flora
from fedsieve.recipe import read as recipes
from fedsieve.recipe import schema
from fedsieve.recipe.experiment import from_recipe
from fedsieve.settings import Sampling
from tests import toy
from tests.conftest import Tiny

TEN = [Client(f"{i}", 1) for i in range(10)]
ROUNDS = 2000
DOUBLE: dict[str, Any] = {"down_values": "float64", "up_values": "float64"}  # as toy trains


def seen(sampling: Sampling) -> tuple[Counter[str], list[int]]:
    """How often each of ten clients is in 2000 rounds, and the rounds' sizes."""
    counts: Counter[str] = Counter()
    sizes = []
    for number in range(ROUNDS):
        chosen = cohort(TEN, sampling, Key(0, number))
        assert chosen == cohort(TEN[::-1], sampling, Key(0, number))
        ids = [client.id for client in chosen]
        assert ids == sorted(set(ids))
        counts.update(ids)
        sizes.append(len(ids))
    return counts, sizes


def about(count: float, probability: float, trials: int = ROUNDS) -> bool:
    """Within five standard deviations of a binomial."""
    return abs(count - trials * probability) <= 5 * math.sqrt(
        trials * probability * (1 - probability)
    )


def test_uniform_cohorts_have_their_size_and_treat_clients_alike() -> None:
    counts, sizes = seen(Sampling("uniform", 3))
    assert set(sizes) == {3}
    assert all(about(counts[client.id], 0.3) for client in TEN)
    assert set(seen(Sampling("uniform", 30))[1]) == {10}


def test_poisson_draws_each_client_by_itself() -> None:
    counts, sizes = seen(Sampling("poisson", 3))
    assert all(about(counts[client.id], 0.3) for client in TEN)
    # The binomial of 10 and 0.3: none in 0.7**10 of the rounds, variance 2.1.
    assert about(sizes.count(0), 0.7**10)
    assert about(sizes.count(3), 120 * 0.3**3 * 0.7**7)
    mean = sum(sizes) / ROUNDS
    assert abs(sum((size - mean) ** 2 for size in sizes) / ROUNDS - 2.1) < 0.4
    both = sum(
        {"2", "7"} <= {c.id for c in cohort(TEN, Sampling("poisson", 3), Key(0, number))}
        for number in range(ROUNDS)
    )
    assert about(both, 0.09)
    # Who else could be drawn changes nothing but the probability.
    for number in range(50):
        some = cohort(TEN[:5], Sampling("poisson", 2), Key(0, number))
        assert some == [
            c for c in cohort(TEN, Sampling("poisson", 4), Key(0, number)) if c.id < "5"
        ]


def test_all_takes_all_whatever_the_size() -> None:
    assert set(seen(Sampling("all", 3))[1]) == {10}
    counts, _ = seen(Sampling("all", 3, availability=0.5))
    assert all(about(count, 0.5) for count in counts.values())


def test_who_is_not_there_is_not_drawn() -> None:
    rare = {"0": 0.1, "1": 0.5}
    counts, sizes = seen(Sampling("uniform", 8, availability=rare))
    assert max(sizes) == 8
    assert counts["0"] < 0.13 * ROUNDS
    assert 0.35 * ROUNDS < counts["1"] < 0.55 * ROUNDS
    assert all(counts[client.id] > 0.8 * ROUNDS for client in TEN[2:])
    counts, _ = seen(Sampling("poisson", 5, availability=rare))
    assert about(counts["0"], 0.05)
    assert about(counts["1"], 0.25)
    assert about(counts["2"], 0.5)  # the others are not asked more often for it
    few = seen(Sampling("uniform", 8, availability=0.5))[1]
    assert about(sum(size < 8 for size in few), 1 - 56 / 1024)


@pytest.mark.parametrize("kind", ["uniform", "poisson"])
def test_rounds_and_seeds_draw_apart(kind: Any) -> None:
    sampling = Sampling(kind, 5, availability=0.7)
    drawn = [tuple(cohort(TEN, sampling, Key(0, number))) for number in range(40)]
    # Of some 250 to 1000 possible cohorts, 40 draws hit few twice.
    assert len(set(drawn)) > 30
    assert drawn != [tuple(cohort(TEN, sampling, Key(1, number))) for number in range(40)]


def test_what_an_accountant_reads() -> None:
    assert Sampling("poisson", 3).plain
    assert Sampling("poisson", 3, quorum=1, availability={"a": 1.0}).plain
    assert not Sampling("poisson", 3, availability=0.9).plain
    assert not Sampling("uniform", 3, extra=1).plain
    assert Sampling("poisson", 3).probability(12) == 0.25
    assert Sampling("uniform", 30).probability(12) == 1
    assert Sampling("all", 3).probability(12) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "sampling.size is 0; it must be at least 1"),
        ({"extra": -1}, "sampling.extra is -1; it must be at least 0"),
        ({"quorum": -1}, "sampling.quorum is -1; it must be at least 0"),
        ({"size": 3, "quorum": 4}, "sampling.quorum is 4, but a round merges at most 3 updates"),
        ({"kind": "poisson", "extra": 1}, "kind 'poisson' has no fixed size"),
        ({"kind": "all", "extra": 1}, "kind 'all' has no fixed size"),
        ({"availability": 0.0}, "sampling.availability is 0.0; it must be above 0"),
        ({"availability": {"a": 1.5}}, "sampling.availability.a is 1.5; it must be above 0"),
    ],
)
def test_sampling_that_makes_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(FedSieveError, match=re.escape(message)):
        Sampling(**options)


def test_sampling_that_does_not_fit_the_clients() -> None:
    with pytest.raises(FedSieveError, match="names client 'x', which does not exist"):
        check(Sampling(availability={"x": 0.5}), TEN)
    with pytest.raises(FedSieveError, match="quorum is 11, but there are only 10 clients"):
        check(Sampling("poisson", 3, quorum=11), TEN)
    linked = [client._replace(link=Link(1, 1), step_seconds=0.1) for client in TEN]
    check(Sampling(extra=2), linked)
    with pytest.raises(FedSieveError, match=r"sampling.extra: .* client '4' has none"):
        check(Sampling(extra=2), [*linked[:4], linked[4]._replace(link=None), *linked[5:]])
    with pytest.raises(FedSieveError, match=r"sampling.extra: .* client '9' has none"):
        check(Sampling(extra=2), [*linked[:9], linked[9]._replace(step_seconds=None)])


def in_time(seconds: Mapping[str, float], size: int, refused: Collection[str]) -> dict[str, str]:
    """Who is late of clients whose updates take so many seconds, and why; of them some are refused
    as they come.
    """
    clients = [Client(id, 1, link=Link(1, 1), step_seconds=s) for id, s in seconds.items()]

    def carry(messages: Iterable[tuple[Client, bytes]], key: Key) -> Iterator[Reply]:
        for client, _ in messages:
            yield Reply(client, b"", None, 0.0, 1, 0.0, 0.0, 0.0, 0)

    exchange = punctual(Exchange(carry, lambda merged: None), size)
    found, taken = {}, 0
    for reply in exchange.carry([(client, b"") for client in clients], Key(0, 1)):
        if reply.reason is not None:
            found[reply.client.id] = reply.reason
        taken += reply.reason is None and reply.client.id not in refused
        exchange.usable(taken)
    return found


@given(st.dictionaries(st.text("abc", min_size=1, max_size=3), st.sampled_from([1.0, 2.0, 3.5])),
       st.integers(1, 5), st.sets(st.text("abc", min_size=1, max_size=1)))  # fmt: skip
def test_the_slowest_beyond_the_size_are_late(
    seconds: dict[str, float], size: int, refused: set[str]
) -> None:
    """The size is that of updates which can be merged: what is refused takes nobody's place."""
    behind = in_time(seconds, size, refused)
    kept = [id for id in seconds if id not in behind]
    able = [id for id in seconds if id not in refused]
    assert len([id for id in kept if id in able]) == min(size, len(able))
    if behind:
        closed = max(seconds[id] for id in kept if id in able)
        assert all(seconds[id] >= closed for id in behind)
        assert all(seconds[id] <= closed for id in kept)
        assert all(f"had its {size} after {closed:.4g} s" in why for why in behind.values())
    assert in_time(dict(reversed(list(seconds.items()))), size, refused) == behind
    assert all(reason.startswith("late: ") for reason in behind.values())


# --- rounds


def round_of(
    method: Method, members: Sequence[Client], sampling: Sampling, *, lost: Iterable[str] = ()
) -> tuple[Any, list[Receipt], Any]:
    """The first round, in which the training of some clients breaks down."""
    federation = replace(toy.federation(method, members), sampling=sampling)
    exchange, lost = federation.exchange, set(lost)

    def breaking(messages: Iterable[tuple[Client, bytes]], key: Key) -> Iterator[Reply]:
        for reply in exchange.carry(messages, key):
            broke = reply.client.id in lost
            yield reply._replace(update=None, reason="it broke") if broke else reply

    broken = exchange._replace(carry=breaking)
    in_time = punctual(broken, sampling.size) if sampling.extra else broken
    federation = replace(federation, exchange=in_time)
    _, progress = begin(federation, toy.start())
    return toy.one_round(federation, progress)


def members(step_seconds: Sequence[float], budgets: Sequence[Budget] | None = None) -> list[Client]:
    """Clients on the same fast link; who is slow is slow in training."""
    link = Link(100.0, 100.0)
    return [
        client._replace(link=link, step_seconds=step)
        for client, step in zip(
            toy.clients(budgets or [Budget()] * len(step_seconds)), step_seconds, strict=True
        )
    ]


def test_the_slowest_of_an_over_selected_cohort_are_counted_and_not_merged() -> None:
    clients = members([1.0, 9.0, 2.0, 3.0, 8.0])
    summary, receipts, progress = round_of(
        fedit.method(**DOUBLE), clients, Sampling("uniform", 3, extra=2)
    )
    assert [r.client for r in receipts] == ["0000", "0001", "0002", "0003", "0004"]
    behind = {r.client: r.dropped for r in receipts if r.dropped}
    assert sorted(behind) == ["0001", "0004"]
    # 3 steps each: 27 s for the slowest, and the third of those in time has 9 s.
    assert re.fullmatch(r"late: its update took 27.* s, and .* 3 after 9.* s", behind["0001"] or "")
    assert (summary.clients, summary.dropped) == (5, 2)
    assert all(r.up_bytes > 0 for r in receipts)
    assert summary.up_bytes == sum(r.up_bytes for r in receipts)
    # The adapter is that of a round in which only the three were asked.
    three = [clients[i] for i in (0, 2, 3)]
    _, _, alone = round_of(fedit.method(**DOUBLE), three, Sampling("uniform", 3))
    assert toy.distance(progress.state.trees["adapter"], alone.state.trees["adapter"]) == 0


def test_bytes_make_a_client_late_too() -> None:
    """The same steps, but a sparse upload arrives first."""
    sparse = [Budget(up=0.1), Budget(), Budget(up=0.1), Budget()]
    clients = [c._replace(link=Link(1.0, 0.01)) for c in members([0.0] * 4, sparse)]
    _, receipts, _ = round_of(flasc.method(**DOUBLE), clients, Sampling("uniform", 2, extra=2))
    assert [r.client for r in receipts if r.dropped is None] == ["0000", "0002"]


def test_a_client_that_broke_down_makes_room_for_a_slower_one() -> None:
    clients = members([1.0, 9.0, 2.0, 3.0, 8.0])
    _, receipts, _ = round_of(
        fedit.method(**DOUBLE), clients, Sampling("uniform", 3, extra=2), lost=["0000"]
    )
    dropped = {r.client: r.dropped for r in receipts if r.dropped}
    assert dropped.pop("0000") == "it broke"
    assert [client for client, why in dropped.items() if str(why).startswith("late")] == ["0001"]


def test_over_selection_of_clients_without_a_link_is_refused() -> None:
    with pytest.raises(FedSieveError, match=r"client .000\d. has no link"):
        round_of(
            fedit.method(**DOUBLE), toy.clients([Budget()] * 3), Sampling("uniform", 1, extra=1)
        )


def test_a_quorum_that_is_met_changes_nothing_and_one_that_is_not_refuses_the_round() -> None:
    clients = toy.clients([Budget()] * 5)
    _, _, with_it = round_of(fedit.method(**DOUBLE), clients, Sampling("all", 5, quorum=5))
    _, _, without = round_of(fedit.method(**DOUBLE), clients, Sampling("all", 5))
    assert toy.distance(with_it.state.trees["adapter"], without.state.trees["adapter"]) == 0
    with pytest.raises(
        NoUsableUpdate,
        match=r"3 updates can be merged, and the quorum is 4 \(client 0001: it broke; client 0003",
    ):
        round_of(
            fedit.method(**DOUBLE), clients, Sampling("all", 5, quorum=4), lost=["0001", "0003"]
        )


@pytest.mark.parametrize("how", ["poisson", "poisson, a quorum", "nobody is there", "too few are"])
def test_an_empty_round_goes_by(how: str) -> None:
    """It would be as empty when it is done again: a run that stopped there stopped for good."""
    sampling, clients = toy.nobody_drawn()
    if how == "poisson, a quorum":
        sampling = replace(sampling, quorum=1)
    elif how == "nobody is there":
        sampling = Sampling("uniform", 1, availability=dict.fromkeys([c.id for c in clients], 1e-9))
    elif how == "too few are":
        some = {client.id: 1.0 if n < 1 else 1e-9 for n, client in enumerate(clients)}
        sampling = Sampling("uniform", 2, availability=some, quorum=2)
    method = fedit.method(**DOUBLE)
    summary, receipts, progress = round_of(method, clients, sampling)
    assert receipts == []
    assert (summary.clients, summary.dropped, summary.loss) == (0, 0, None)
    assert (summary.down_bytes, summary.up_bytes, progress.dense_bytes) == (0, 0, 0)
    assert progress.round == 1


# --- recipes

MACHINE = {"memory": 100.0, "downlink": 50.0, "uplink": 50.0, "step_seconds": 0.1}


def test_sampling_in_a_recipe(tiny: Tiny) -> None:
    budgets = {"kind": "resources", "deadline": 60.0, "tiers": [MACHINE]}
    table = tiny.table(sampling={"extra": 2, "quorum": 2}, budgets=budgets, cohort=4)
    experiment = from_recipe(recipes.check(table))
    assert experiment.federation.sampling == Sampling("uniform", 4, 1.0, 2, 2)
    _, progress = begin(experiment.federation, experiment.start)
    summary, receipts, _ = toy.one_round(experiment.federation, progress)
    assert (summary.clients, summary.dropped) == (6, 2)
    assert sum(str(r.dropped).startswith("late: ") for r in receipts) == 2
    default = schema.sampling(recipes.check(tiny.table()))
    assert default == Sampling("uniform", 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling__kind": "poison"}, "sampling.kind: Input should be 'uniform', 'poisson' or"),
        ({"sampling__qorum": 1}, "sampling.qorum: unknown key (did you mean 'quorum'"),
        ({"sampling__quorum": 4}, "sampling.quorum is 4, but a round merges at most 3"),
        ({"sampling__extra": 1}, "sampling.extra: who is late follows from each client's link"),
        ({"sampling": {"kind": "poisson", "extra": 1}}, "kind 'poisson' has no fixed size"),
        ({"sampling__availability": 2.0}, "sampling.availability is 2.0; it must be above 0"),
        ({"sampling__availability": {"a": -1.0}}, "sampling.availability.a is -1.0"),
    ],
)
def test_wrong_sampling_is_refused(tiny: Tiny, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FedSieveError, match=re.escape(message)):
        recipes.check(tiny.table(**changes))


def test_an_availability_of_nobody_is_refused_with_its_id(tiny: Tiny) -> None:
    recipe = recipes.check(tiny.table(sampling__availability={"00003": 0.5}))
    with pytest.raises(FedSieveError, match=r"names client '00003'.*did you mean '0003'"):
        from_recipe(recipe)


@pytest.mark.parametrize("method", [flora.method(**DOUBLE), flasc.method(feedback=True, **DOUBLE)])
def test_a_late_client_remembers_nothing_of_the_round(method: Method) -> None:
    """What it sent was not merged, so what it keeps must be what the server believes it to keep."""
    clients = members([1.0, 9.0, 2.0], [Budget(0.5, 0.5, 0.5)] * 3)
    memories: dict[str, Memory] = {}
    federation = toy.federation(method, clients, memories=memories)
    alone = federation.exchange
    federation = replace(
        federation, sampling=Sampling("uniform", 2, extra=1), exchange=punctual(alone, 2)
    )
    _, progress = begin(federation, toy.start())
    for number, (_, receipts, now) in enumerate(rounds(federation, progress, 3), 1):
        assert [r.client for r in receipts if r.dropped] == ["0001"]
        assert all("late" in r.dropped for r in receipts if r.dropped)
        assert "0001" not in memories
        assert now.round == number
    # When it is on time at last, it catches up from the very start.
    quick = [client._replace(step_seconds=1.0) for client in clients]
    federation = replace(federation, clients=quick, sampling=Sampling("all"), exchange=alone)
    _, receipts, _ = toy.one_round(federation, now)
    assert all(r.dropped is None for r in receipts)
    assert "0001" in memories
