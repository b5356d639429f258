"""Time on a network: laws of the model, and rounds that can be counted by hand."""

import math
import statistics
import subprocess
import sys
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsieve.algebra.budget import Link
from fedsieve.algebra.keys import Key
from fedsieve.clients.network import (
    REFERENCE,
    Conditions,
    Part,
    client_time,
    clock,
    first_round,
    round_time,
    slowdown,
    time_to,
    times,
)
from fedsieve.errors import FedSieveError

MEGABIT = 125_000  # bytes
rates = st.floats(0.01, 10_000)
seconds = st.floats(0, 10_000)
sizes = st.integers(0, 10**10)
replies = st.dictionaries(st.text("abcdef", min_size=1), seconds, min_size=1, max_size=12)


def test_a_client_fetches_works_and_sends() -> None:
    # 20 Mbit at 10 Mbit/s, three seconds of work, 5 Mbit at 2.5 Mbit/s, and 1/4 s each way.
    assert client_time(Link(10, 2.5, 0.25), 20 * MEGABIT, 5 * MEGABIT, 3.0) == 2 + 3 + 2 + 0.5
    assert client_time(Link(10, 2.5, 0.25), 0, 0, 0) == 0.5
    assert client_time(Link(math.inf, math.inf), 10**12, 10**12, 3.0) == 3.0


@given(rates, rates, st.floats(0, 10), sizes, sizes, seconds)
def test_more_bytes_or_work_take_longer_and_a_faster_line_never_does(
    down: float, up: float, latency: float, fetched: int, sent: int, work: float
) -> None:
    link = Link(down, up, latency)
    time = client_time(link, fetched, sent, work)
    assert time >= max(work, 2 * latency)
    assert client_time(link, fetched + 10**6, sent, work) > time
    assert client_time(link, fetched, sent + 10**6, work) > time
    assert client_time(link, fetched, sent, work + 1) > time
    assert client_time(link._replace(uplink=2 * up), fetched, sent, work) <= time
    assert client_time(link._replace(downlink=2 * down), fetched, sent, work) <= time
    # A line seen from its other end, with the messages exchanged.
    assert client_time(Link(up, down, latency), sent, fetched, work) == pytest.approx(time)


def test_the_reference_links_are_a_downlink_and_its_parts() -> None:
    assert [world.link for world in REFERENCE] == [Link(10, 10), Link(10, 2.5), Link(10, 0.625)]
    # An upload of which one in sixteen is sent takes the time of the whole on a line as fast.
    whole = client_time(REFERENCE[0].link, 0, 16 * MEGABIT, 0)
    assert client_time(REFERENCE[2].link, 0, MEGABIT, 0) == whole


FOUR = {"a": 4.0, "b": 1.0, "c": 3.0, "d": 2.0}


@pytest.mark.parametrize(
    ("deadline", "needed", "end", "late"),
    [
        (None, None, 4.0, ()),
        (10.0, None, 4.0, ()),  # nobody is left to wait for
        (2.5, None, 2.5, ("a", "c")),
        (3.0, None, 3.0, ("a",)),  # at the very moment is in time
        (0.5, None, 0.5, ("a", "b", "c", "d")),
        (None, 3, 3.0, ("a",)),
        (None, 1, 1.0, ("a", "c", "d")),
        (None, 9, 4.0, ()),
        (2.5, 3, 2.5, ("a", "c")),
        (3.5, 2, 2.0, ("a", "c")),
    ],
)
def test_a_round_of_four(
    deadline: float | None, needed: int | None, end: float, late: tuple[str, ...]
) -> None:
    assert round_time(FOUR, deadline, needed) == (end, late)


@given(replies, st.none() | st.floats(0.1, 20_000), st.none() | st.integers(1, 15))
def test_the_server_goes_on_when_it_may_and_no_later(
    of: dict[str, float], deadline: float | None, needed: int | None
) -> None:
    outcome = round_time(of, deadline, needed)
    in_time = [client for client in of if client not in outcome.late]
    assert all(of[client] <= outcome.seconds for client in in_time)
    assert all(of[client] > outcome.seconds for client in outcome.late)
    enough = len(of) if needed is None else min(needed, len(of))
    if deadline is None:
        assert len(in_time) >= enough
        # A moment earlier there were not enough.
        assert sum(time < outcome.seconds for time in of.values()) < enough
    else:
        assert outcome.seconds <= deadline
        assert len(in_time) >= enough or outcome.seconds == deadline
    # The order in which clients are named changes nothing but the order of the late ones.
    turned = round_time(dict(reversed(of.items())), deadline, needed)
    assert (turned.seconds, set(turned.late)) == (outcome.seconds, set(outcome.late))


def test_a_client_that_never_replies_is_late_or_waited_for_without_end() -> None:
    of = {"a": 1.0, "gone": math.inf}
    assert round_time(of) == (math.inf, ())
    assert round_time(of, deadline=5.0) == (5.0, ("gone",))
    assert round_time(of, needed=1) == (1.0, ("gone",))


def test_a_round_without_clients_takes_no_time() -> None:
    assert round_time({}, 5.0, 2) == (0.0, ())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: client_time(Link(0, 1), 1, 1, 1), "carries nothing"),
        (lambda: client_time(Link(1, -1), 1, 1, 1), "carries nothing"),
        (lambda: client_time(Link(math.nan, 1), 1, 1, 1), "carries nothing"),
        (lambda: client_time(Link(1, 1, -0.1), 1, 1, 1), "neither may be below 0"),
        (lambda: client_time(Link(1, 1), 1, 1, -1.0), "neither may be below 0"),
        (lambda: round_time({"x": -1.0}), "client x takes"),
        (lambda: round_time({"x": math.nan}), "client x takes"),
        (lambda: round_time(FOUR, deadline=0.0), "leaves no time"),
        (lambda: round_time(FOUR, needed=0), "at least 1 is needed"),
        (lambda: slowdown(Key(0), -1.0), "from 0 up"),
        (lambda: slowdown(Key(0), math.inf), "from 0 up"),
    ],
)
def test_what_cannot_be_is_refused(wrong: Callable[[], object], message: str) -> None:
    with pytest.raises(FedSieveError, match=message):
        wrong()


def test_stragglers_are_log_normal() -> None:
    logs = [math.log(slowdown(Key(7, n, "c"), 0.5)) for n in range(4000)]
    # Bounds at about four standard errors: .5/sqrt(4000), .5/sqrt(8000), sqrt(.05*.95/4000).
    assert abs(statistics.fmean(logs)) < 0.032
    assert abs(statistics.stdev(logs) - 0.5) < 0.023
    slow = sum(log > 0.5 * 1.6449 for log in logs) / len(logs)
    assert abs(slow - 0.05) < 0.014


def test_a_straggler_depends_on_its_key_alone() -> None:
    key = Key(1, 2, "c")
    assert slowdown(key, 1.0) == slowdown(key, 1.0) == slowdown(key.at("other"), 1.0)
    others = [Key(2, 2, "c"), Key(1, 3, "c"), Key(1, 2, "d")]
    assert len({slowdown(k, 1.0) for k in [key, *others]}) == 4
    assert slowdown(key, 0.0) == 1.0
    assert slowdown(key, 2.0) == pytest.approx(slowdown(key, 1.0) ** 2)


def part(client: str, work: float, **more: object) -> Part:
    return Part(client, 10 * MEGABIT, 5 * MEGABIT, work)._replace(**more)  # type: ignore[arg-type]


ROUNDS = {1: [part("a", 1.0), part("b", 3.0)], 2: [part("a", 2.0)], 3: []}


def test_the_clock_adds_up_the_slowest_of_each_round() -> None:
    world = Conditions(Link(10, 5, 0.5))  # 1 s down, 1 s up, 1 s of latency
    assert clock(ROUNDS, world) == {0: 0.0, 1: 6.0, 2: 11.0, 3: 11.0}
    assert clock({}, world) == {0: 0.0}
    # A client with a slower line of its own.
    slow = world._replace(links={"a": Link(10, 1, 0.5)})
    assert clock(ROUNDS, slow) == {0: 0.0, 1: 8.0, 2: 17.0, 3: 17.0}


def test_a_given_time_a_step_takes_the_place_of_the_measured_seconds() -> None:
    world = Conditions(Link(math.inf, math.inf), seconds_per_step=0.5)
    rounds = {1: [part("a", 99.0, steps=4), part("b", 98.0, steps=6)]}
    assert clock(rounds, world)[1] == 3.0


def test_the_server_waits_for_what_it_merged() -> None:
    world = Conditions(Link(math.inf, math.inf))
    rounds = {1: [part("a", 1.0), part("b", 50.0, merged=False)]}
    assert clock(rounds, world)[1] == 1.0
    # With all of them known, a deadline can still be asked about.
    assert round_time(times(rounds[1], world), deadline=20.0) == (20.0, ("b",))


def test_stragglers_slow_the_work_and_not_the_line() -> None:
    world = Conditions(Link(10, 5), spread=1.0, seed=3)
    (time,) = times([part("a", 2.0)], world, 4).values()
    assert time == pytest.approx(2.0 + 2.0 * slowdown(Key(3, 4, "a"), 1.0))
    assert times([part("a", 0.0)], world, 4) == {"a": 2.0}
    assert times([part("a", 2.0)], world, 5) != {"a": time}


def test_the_time_to_a_target_is_that_of_the_first_evaluation_to_reach_it() -> None:
    passed = {0: 0.0, 1: 5.0, 2: 9.0, 3: 20.0, 4: 21.0}
    scores = {4: 0.9, 0: 0.1, 2: 0.5, 3: 0.4}
    assert time_to(0.5, scores, passed) == 9.0
    assert time_to(0.45, scores, passed) == 9.0
    assert time_to(0.6, scores, passed) == 21.0
    assert time_to(0.05, scores, passed) == 0.0
    assert time_to(0.95, scores, passed) is None
    assert first_round(0.5, {1: math.nan, 2: 0.6}) == 2


def test_a_report_on_logs_needs_no_torch() -> None:
    code = "import sys, fedsieve.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
