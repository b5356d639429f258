"""What to say, once in a run, of how its rounds go. Needs no torch: whoever shows a run can."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from fedsieve.engine.shares import starving

if TYPE_CHECKING:
    from fedsieve.engine.loop import Round

STILL = 5  # rounds in which a training loss falls, if rates are near what they should be
GROWN = 10.0  # times what it was, from where a clip that follows the updates is spoken of
_NOTHING = 1e-3  # of a loss, from where none has to fall
_FALLEN = 0.01  # of what it was in the first: less is no fall

Caution = Callable[["Round"], list[str]]


def cautioning() -> Caution:
    """A function that is told of each round of a run, in order, and says what is new to say."""
    said: set[str] = set()
    losses: list[float] = []
    clips: list[tuple[int, float]] = []  # the first that was told

    def of(summary: "Round") -> list[str]:
        # Whoever resumes a run that went on longer has been told.
        if summary.loss is not None and (losses or 0 < summary.round <= STILL):
            losses.append(summary.loss)
        if summary.clip is not None and not clips:
            clips.append((summary.round, summary.clip))
        found = {
            "starving": starving(summary),
            "still": _still(summary, losses),
            "empty": _empty(summary),
            "noise": _noise(summary),
            "grown": _grown(summary, clips),
        }
        new = {name: text for name, text in found.items() if text and name not in said}
        said.update(new)
        return list(new.values())

    return of


def _empty(summary: "Round") -> str | None:
    if not summary.round or summary.clients or summary.dropped:
        return None
    return (
        f"round {summary.round}: nobody was drawn, or fewer than sampling.quorum, so that nothing "
        "was learned: if that is so in most rounds, raise cohort or what [sampling] draws clients "
        "by, or lower the quorum (docs/recipes.md)"
    )


def _noise(summary: "Round") -> str | None:
    if summary.epsilon is None or not 0 < summary.clients == summary.dropped:
        return None
    return (
        f"round {summary.round}: of those who were drawn nobody gave an update, so that noise "
        "alone was merged; what the round cost of the privacy is spent all the same"
    )


def _grown(summary: "Round", clips: list[tuple[int, float]]) -> str | None:
    for number, first in clips:
        if summary.clip is not None and summary.clip > GROWN * first:
            return (
                f"round {summary.round}: the clip, which follows the updates' norms "
                f"(privacy.quantile), is at {summary.clip:.3g} and was at {first:.3g} in round "
                f"{number}, and the noise has grown with it: privacy.clip began too low, or "
                "clients send ever larger updates on purpose (docs/privacy.md, A clip that adapts)"
            )
    return None


def _still(summary: "Round", losses: list[float]) -> str | None:
    if len(losses) != STILL or losses[0] < _NOTHING or min(losses[1:]) < losses[0] * (1 - _FALLEN):
        return None
    return (
        f"round {summary.round}: the training loss has not fallen in {STILL} rounds "
        f"({losses[0]:.3f} in the first, {losses[-1]:.3f} now): what helps first is another "
        "training.lr or server.lr (docs/recipes.md, Rates that worked)"
    )
