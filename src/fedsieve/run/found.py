"""A run's folder as it is found: in order, or refused before its model is loaded.

It may come from somebody else, or have been changed by hand since it was left. What is asked here:
the recipe names no program and is the one by which the rounds so far were trained, and the logs are
whole as far as the newest checkpoint knows of them.
"""

import os
import shlex
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsieve import report
from fedsieve.errors import MOST_TOLD, FedSieveError, count, quoted
from fedsieve.recipe import read as recipes
from fedsieve.recipe.overrides import flat
from fedsieve.recipe.schema import Engine, Recipe, deployed
from fedsieve.run import checkpoint, rundir

# Keys that say where things are, and not what they are.
PLACES = ("name", "device", "model.source", "lora.start", "data.train", "data.test")


def in_order(
    folder: Path,
    *,
    rounds: int | None = None,
    allow_code: bool,
    accept_changes: bool,
    engine: Engine | None = None,
) -> Recipe:
    """A run's recipe, after all that can be read without its model was read.

    rounds, allow_code, accept_changes, engine: see `runner.resume`
    Raises FedSieveError, naming file and line or key, for what is not as a run leaves it. Warns of
    changes of the recipe that are accepted.
    """
    source = str(folder / rundir.RECIPE)
    recipe = recipes.load(source, allow_code=allow_code)
    if rounds is not None:
        recipe = _of_rounds(folder, recipe, rounds)
    if engine is not None:
        recipe = recipe.model_copy(update={"engine": engine})
    else:
        _refuse_cluster(source, recipe.engine.address)
    if rundir.untouched(folder):
        return recipe
    for note in checkpoint.notes(rundir.place(folder, rundir.CHECKPOINTS))[:1]:
        if note.recipe is not None:
            then = recipes.parse_text(note.recipe, f"the recipe in a checkpoint of {source}")
            if rounds is not None:
                then = then.model_copy(update={"rounds": rounds})
            _refuse_edited(source, then, recipe, accept_changes)
        last = note.round if note.evaluated else note.round - 1
        metrics, clients = (rundir.place(folder, name) for name in rundir.LOGS)
        report.check_logs(metrics, clients, note.marks, last)
        report.check_shown(folder)
    return recipe


def _refuse_cluster(source: str, address: str | None) -> None:
    """Raises FedSieveError for a cluster that only a folder's recipe names: it would get the rows,
    and what it answers is unpickled by Ray.
    """
    if address not in (None, os.environ.get("RAY_ADDRESS")):
        raise FedSieveError(
            f"{source}: its engine.address is a Ray cluster at {quoted(address)}, which would get "
            "the rows and the model: if it is yours, say so in the environment, RAY_ADDRESS="
            f"{shlex.quote(str(address))}; else take [engine] out of the recipe"
        )


def _of_rounds(folder: Path, recipe: Recipe, rounds: int) -> Recipe:
    """The recipe with another number of rounds. Raises FedSieveError where a run cannot have it."""
    if recipe.privacy is not None:
        raise FedSieveError(
            f"{folder}: --rounds: its epsilon is that of {count(recipe.rounds, 'round')}, for "
            "which its noise was settled: start a new run of so many"
        )
    rundir.refuse_fewer(folder, rounds)
    if recipe.training.last_lr is not None and rounds != recipe.rounds:
        warnings.warn(falls_over(rounds, recipe.rounds), stacklevel=4)
    return recipe.model_copy(update={"rounds": rounds})


def falls_over(rounds: int, then: int) -> str:
    """What is said where a learning rate falls over another number of rounds than so far."""
    return (
        f"training.last_lr: the learning rate falls over {rounds} rounds from here on; so far it "
        f"fell over {then}"
    )


def _refuse_edited(source: str, then: Recipe, now: Recipe, accept_changes: bool) -> None:
    """Raises FedSieveError, naming what, where a recipe is not the one that rounds were trained by.

    then: that recipe
    """
    changed, said = edits(then, now)
    if not changed:
        return
    if deployed(then) and not changed <= {*PLACES}:
        raise FedSieveError(
            f"{source} was edited since the run's rounds were trained ({said}), and epsilon is of "
            "the recipe as it was: put it back"
        )
    if changed == {"rounds"} and not accept_changes and _may_have_others(source, now):
        raise FedSieveError(
            f"{source}: rounds was {then.rounds} at the newest checkpoint and is {now.rounds} (as "
            "where a change by --rounds was broken off): say how many by "
            f"`{rundir.again(Path(source).parent)} --rounds N`, or give --accept-changes to take "
            "the recipe as it is now"
        )
    if not accept_changes:
        # The sites of a federation go by the recipe that they were told.
        offered = (
            "put it back, or start a new federation"
            if rundir.federated(Path(source).parent)
            else "put it back, start a new run, or give --accept-changes to go on with the recipe "
            "as it is now"
        )
        raise FedSieveError(
            f"{source} was edited since the run's rounds were trained ({said}): {offered}"
        )
    warnings.warn(f"{source} was edited since the run's rounds were trained: {said}", stacklevel=4)


def _may_have_others(source: str, recipe: Recipe) -> bool:
    """Whether `resume --rounds` takes such a run."""
    return recipe.privacy is None and not rundir.federated(Path(source).parent)


def edits(then: Recipe, now: Recipe) -> tuple[set[str], str]:
    """The keys that differ, and how, in words, for the first `MOST_TOLD` of them."""
    before, after = (settings_of(each) for each in (then, now))
    changed = [k for k in sorted(before.keys() | after.keys()) if before.get(k) != after.get(k)]
    said = "; ".join(
        f"{key} was {quoted(before.get(key))} and is {quoted(after.get(key))}"
        for key in changed[:MOST_TOLD]
    )
    if len(changed) > MOST_TOLD:
        said += f"; and {len(changed) - MOST_TOLD} more"
    return {*changed}, said


def settings_of(recipe: Recipe) -> Mapping[str, Any]:
    """A recipe's keys, less those of [engine] and [tracking]: where clients run, and where a run is
    looked at, changes nothing of it. What `engine.together` trains at once is another model.
    """
    keys = dict(flat(recipe.model_dump(mode="json", exclude={"engine", "tracking"})))
    return {**keys, "engine.together": recipe.engine.together}
