"""A worker that misbehaves as it is told: a process of its own, on a true worker's socket.

    impostor.py site.toml '{"3": "noise", "4": "nan"}'

All that it is asked, a true worker's code does, on the site's own folder. Before it trains in a
round that is closed to it, it waits; and in the rounds that it was told, it sends another answer
than it got. The file `open` beside the site's file holds the last round that is open to it; without
the file, all are. It notes the round that it was last asked to train in a file `asked`.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from fedsieve.algebra.adapter import Adapter, Layout, layout_of
from fedsieve.frame import Frame
from fedsieve.sites import resident, worker
from fedsieve.sites import site as sites
from fedsieve.wire import decode, encode
from fedsieve.wire import values as wire_values

HUGE = 1e6
NOISE = b"\xff" * 400  # says that a header of 4 GiB follows


class Answered(NamedTuple):
    """What the true worker says now, what it said in the round before, and what it trains."""

    now: Frame
    before: Frame | None
    start: Adapter


def huge(update: bytes, layout: Layout) -> bytes:
    """The same direction, and far too much of it."""
    payload = decode(update, layout)
    return encode(payload._replace(values=payload.values._replace(data=payload.values.data * HUGE)))


def _other_layout(answered: Answered) -> Frame:
    """An update that is right in itself, for a model with another head."""
    tensors = dict(answered.start.tensors)
    head = next(name for name in tensors if "lora_" not in name)
    tensors[head] = torch.zeros(*(size + 1 for size in tensors[head].shape))
    layout = layout_of(tensors, answered.start.layout.scale)
    adapter = Adapter(layout, tensors)
    return answered.now._replace(body=resident.whole_message(adapter))


def _nan(answered: Answered) -> Frame:
    """What the format can say and `encode` would not: its checksum is right."""
    payload = decode(answered.now.body, answered.start.layout)
    payload.values.data[payload.values.data.numel() // 2] = torch.nan
    check, wire_values._refuse = wire_values._refuse, lambda *given: None
    try:
        return answered.now._replace(body=encode(payload))
    finally:
        wire_values._refuse = check


def _again(answered: Answered) -> Frame:
    assert answered.before is not None
    number = answered.now.header["round"]
    return answered.before._replace(header={**answered.before.header, "round": number})


def _other_round(answered: Answered) -> Frame:
    number = answered.now.header["round"]
    return answered.now._replace(header={**answered.now.header, "round": number + 1})


SPOILT: dict[str, Callable[[Answered], Frame]] = {
    "noise": lambda answered: Frame({"noise": True}),
    "garbage": lambda answered: answered.now._replace(body=os.urandom(len(answered.now.body))),
    "layout": _other_layout,
    "nan": _nan,
    "again": _again,
    "round": _other_round,
    "huge": lambda answered: answered.now._replace(
        body=huge(answered.now.body, answered.start.layout)
    ),
}


def main(path: Path, plan: dict[str, str]) -> None:
    say = partial(print, flush=True)
    site = sites.load(path)
    honest: list[Frame] = []

    def work(state: resident.Resident, request: Frame) -> Frame:
        number = request.header.get("round")
        if request.header.get("do") != "train" or not isinstance(number, int):
            return resident.answer(state, request)
        note(path.with_name("asked"), str(number))
        while number > last_open(path):
            time.sleep(0.05)
        answer = resident.answer(state, request)
        how = plan.get(str(number))
        if how is not None and answer.header["ok"]:
            assert state.assignment is not None
            before = honest[-1] if honest else None
            answered = Answered(answer, before, state.assignment.start)
            honest.append(answer)
            say(f"round {number}: {how}")
            return worker.seal(worker.digest(request), SPOILT[how](answered))
        honest.append(answer)
        return answer

    packed = worker.pack
    worker.pack = lambda frame: NOISE if "noise" in frame.header else packed(frame)
    os.umask(0o077)
    with worker.lock(site.folder):
        state = resident.start(site, say)
        about = partial(resident.about, state)
        ready = lambda address: say(f"ready at {address}")  # noqa: E731
        worker.serve(site.folder, partial(work, state), about, ready)


def last_open(path: Path) -> float:
    """The last round that is open to the site."""
    place = path.with_name("open")
    return float(place.read_text()) if place.exists() else float("inf")


def note(place: Path, text: str) -> None:
    """Write a small file so that whoever reads it reads all of it."""
    part = place.with_suffix(".part")
    part.write_text(text)
    part.replace(place)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]) if len(sys.argv) > 2 else {})
