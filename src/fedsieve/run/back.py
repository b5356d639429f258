"""Going back: a run goes on from an earlier checkpoint, and what came after it is put aside."""

import os
from collections.abc import Sequence
from pathlib import Path

from fedsieve.disk import bring_over, bytes_of, is_gone, remove, write_whole
from fedsieve.errors import FedSieveError
from fedsieve.recipe import read as recipes
from fedsieve.recipe.schema import deployed
from fedsieve.run import checkpoint, rundir

LEFT = "left-after-round-"  # and the number of the round


def fall_back(folder: Path, number: int) -> Path | None:
    """Let a run go on from an earlier checkpoint, of round `number`, when it is resumed next.

    What it leaves (later checkpoints, the logs' later lines, adapter and report) is put into a
    folder of the run's, which is returned: None where there is nothing later. Nothing is lost, and
    a process that is killed here leaves a run that can be resumed.

    Raises FedSieveError, with the rounds that can be gone back to, if there is no whole checkpoint
    of that round, and for a run whose noise cannot be drawn again: its later rounds were given out
    once, and done again they would be given out twice.
    """
    rundir.check(folder)
    with rundir.lock(folder), rundir.disk_errors(folder, f" --at-round {number}"):
        source = str(folder / rundir.RECIPE)
        recipe = recipes.parse(recipes.read(source), source)
        checkpoints = rundir.place(folder, rundir.CHECKPOINTS)
        known = {note.round: note for note in checkpoint.notes(checkpoints)}
        trained = [note.recipe for note in known.values() if note.recipe is not None]
        said = [recipe, *(recipes.parse_text(text, source) for text in trained)]
        if any(map(deployed, said)) or rundir.own(folder).exists():
            raise FedSieveError(
                f"{folder}: --at-round: a run with privacy.noise_from = 'system' does not go back: "
                "rounds that were given out would be done again with other noise, and epsilon "
                "counts one version of each"
            )
        if number not in known:
            there = ", ".join(map(str, sorted(known)))
            raise FedSieveError(
                f"{folder}: --at-round {number}: there is no whole checkpoint of that round; "
                + (f"those of rounds {there} are there" if there else "nor of any other")
            )
        for log in (rundir.place(folder, name) for name in rundir.LOGS):
            if not log.is_file():
                raise is_gone(log)
        return _put_aside(folder, known[number], checkpoint.later(checkpoints, number))


def said(number: int, left: Path | None) -> str:
    """What there is to say of a run that went back. left: what `fall_back` returned."""
    return f"what came after round {number} is kept in {left}" if left else "nothing is later"


def _put_aside(folder: Path, note: checkpoint.Note, later: Sequence[Path]) -> Path | None:
    logs = {name: bytes_of(rundir.place(folder, name), None) for name in rundir.LOGS}
    tails = {name: text[note.marks.get(name, 0) :] for name, text in logs.items()}
    if not later and not any(tails.values()):
        return None
    names = (f"{LEFT}{note.round}" + (f"-{n}" if n > 1 else "") for n in range(1, 10**6))
    left = next(folder / name for name in names if not os.path.lexists(folder / name))
    left.mkdir(mode=0o700)
    try:
        for name, tail in tails.items():
            write_whole(left / name, tail)
    except OSError:  # nothing was moved yet
        remove(left)
        raise
    bring_over(folder / rundir.ADAPTER)
    made = [folder / name for name in (rundir.ADAPTER, rundir.EVALUATION, rundir.REPORT)]
    for path in [path for path in made if path.exists()] + rundir.plots(folder):
        path.rename(left / path.name)
    (left / rundir.CHECKPOINTS).mkdir(mode=0o700)
    for path in later:  # the newest first: killed in between, the run goes on from the next
        path.rename(left / rundir.CHECKPOINTS / path.name)
    rundir.cut_back(folder, note.marks)
    return left
