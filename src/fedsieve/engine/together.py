"""The in-process engine that trains several clients of a cohort at once (train/cohort.py).

How many pays depends on the model, the batches and the device. So it can be measured in the first
round that is large enough: a few clients alone, a few at once, and the faster from then on.
"""

import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Literal

from fedsieve.algebra.adapter import Adapter
from fedsieve.algebra.method import Memory, Method
from fedsieve.engine.client import (
    Asked,
    Reply,
    Train,
    TrainTogether,
    take_part_together,
)
from fedsieve.engine.local import Take, alone, remembering
from fedsieve.engine.loop import Exchange

MOST = 8  # at once, where that is measured
_LEAST = 4  # that a measurement needs
_ALONE = 2  # clients that are measured alone, after one that finds everything cold


def together(
    method: Method,
    train: Train,
    train_together: TrainTogether,
    start: Adapter,
    memories: dict[str, Memory],
    size: int | Literal["auto"],
    say: Callable[[str], None],
) -> Exchange:
    """`in_process`, with so many clients at once. say: what was measured, where that is asked"""

    def at_once(asked: Iterator[Asked]) -> Iterator[tuple[Reply, Memory]]:
        most = MOST if size == "auto" else size
        while some := list(islice(asked, most)):
            yield from take_part_together(method, train_together, start, some)

    if size != "auto":
        return remembering(at_once, memories)
    return remembering(_measured(alone(method, train, start), at_once, say), memories)


def _measured(alone: Take, at_once: Take, say: Callable[[str], None]) -> Take:
    """The faster of both, once that is known."""
    cold, seconds = True, dict[Take, float]()  # seconds a step

    def timed(take: Take, asked: list[Asked]) -> list[tuple[Reply, Memory]]:
        began = time.perf_counter()
        taken = list(take(iter(asked)))
        steps = sum(reply.steps for reply, _ in taken)
        seconds[take] = (time.perf_counter() - began) / max(1, steps)
        return taken

    def take(asked: Iterator[Asked]) -> Iterator[tuple[Reply, Memory]]:
        nonlocal cold
        if cold:
            yield from alone(islice(asked, 1))
            cold = False
        for way, most, least in ((alone, _ALONE, 1), (at_once, MOST, _LEAST)):
            if way in seconds:
                continue
            some = list(islice(asked, most))
            if len(some) < least:  # the next round has more, or none has
                yield from alone(iter(some))
                return
            yield from timed(way, some)
            if way is at_once:
                share = seconds[alone] / seconds[at_once]
                kept = "kept" if share > 1 else "not kept"
                say(
                    f"engine.together: {len(some)} clients at once are {share:.2f} times as fast "
                    f"as one after another: {kept}"
                )
        yield from min(seconds, key=lambda way: seconds[way])(asked)

    return take
