"""What is said of how a run goes: once each, and not of runs that learn."""

from typing import Any

import pytest

from fedsieve.engine.cautions import cautioning
from fedsieve.engine.loop import Round

FALLING = [3.0, 2.9, 2.7, 2.6, 2.5, 2.5, 2.5, 2.5]
SLOW = [3.0, 2.999, 2.99, 2.98, 2.96, 2.9]
STILL = [3.0, 3.01, 2.99, 3.02, 2.98, 2.97, 2.96]


def told(losses: list[float | None], **more: Any) -> list[tuple[int, str]]:
    of = cautioning()
    blank = dict.fromkeys(Round._fields)
    found = []
    for number, loss in enumerate([None, *losses]):
        row = {**blank, "clients": 3, "starved": 0, "round": number, "loss": loss, **more}
        found += [(number, text) for text in of(Round(**row))]
    return found


@pytest.mark.parametrize("losses", [FALLING, SLOW, [None] * 9, [0.0] * 4])
def test_a_loss_that_falls_or_is_not_told_is_not_warned_of(losses: list[float | None]) -> None:
    assert told(losses) == []


def test_a_loss_that_does_not_fall_is_said_once() -> None:
    ((number, said),) = told([*STILL])
    assert number == 5
    assert "has not fallen in 5 rounds (3.000 in the first, 2.980 now)" in said


def test_a_run_that_is_resumed_was_told() -> None:
    of = cautioning()
    blank: dict[str, Any] = {**dict.fromkeys(Round._fields), "clients": 3, "starved": 0}
    for number, loss in enumerate(STILL, start=30):
        assert of(Round(**{**blank, "round": number, "loss": loss})) == []


def test_a_clip_that_has_grown_far_is_said_once() -> None:
    of = cautioning()
    blank: dict[str, Any] = {
        **dict.fromkeys(Round._fields),
        "clients": 3,
        "dropped": 0,
        "starved": 0,
    }
    said = []
    for number, clip in enumerate([None, 0.2, 0.1, 1.9, 2.1, 4.0, 0.001]):
        said += of(Round(**{**blank, "round": number, "clip": clip}))
    (one,) = said
    assert "round 4: the clip" in one
    assert "is at 2.1 and was at 0.2 in round 1, and the noise has grown with it" in one


def test_each_is_said_once() -> None:
    said = told([*STILL], starved=2, down_a=0.9, down_b=0.0)
    assert [number for number, _ in said] == [2, 5]


def test_a_round_in_which_nobody_was_drawn_is_said_once() -> None:
    ((number, said),) = told([None, None, None], clients=0, dropped=0)
    assert number == 1
    assert (
        "round 1: nobody was drawn, or fewer than sampling.quorum, so that nothing was learned"
        in said
    )
