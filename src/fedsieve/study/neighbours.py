"""Runs that a neighbouring figure has done: copied, where this one asks for the very same.

A neighbour is a figure's folder beside this one's. Whatever is found there may come from somebody
else: a run counts only if it is whole, is of the recipe that is asked for, on the same rows, and
over the same base model.
"""

import contextlib
import os
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path

from fedsieve import report
from fedsieve.disk import copied, everything_in, refuse_link
from fedsieve.errors import FedSieveError
from fedsieve.recipe import read as recipes
from fedsieve.recipe.experiment import digest_of_rows, locate, set_up_resident
from fedsieve.recipe.schema import Recipe
from fedsieve.run import rundir
from fedsieve.run.found import settings_of
from fedsieve.study.jobs import Ground, Job, asked_for, finished, ground_of
from fedsieve.study.parts import ASKED
from fedsieve.tasks.digest import RowsDigest
from fedsieve.train.model import pick_device
from fedsieve.train.reader import load_reader


def bring(jobs: Sequence[Job], folder: Path) -> None:
    """Copy what was run beside `folder` already, where a job has not begun.

    A run is copied only where its rows and its base model are those that are there now.
    """
    rows: dict[tuple[str | None, ...], RowsDigest] = {}
    bases: dict[str | None, str | None] = {}
    for job in jobs:
        if os.path.lexists(job.folder) and not _only_asked(job.folder):
            continue
        last = f"{job.folder.parent.name}/{job.folder.name}/{ASKED}"
        there = [*folder.parent.glob(f"*/*/{last}"), *folder.parent.glob(f"*/*/*/{last}")]
        for asked in sorted(there):
            # Whatever it is then, it is not what is asked for.
            with contextlib.suppress(FedSieveError, OSError, RecursionError):
                refuse_link(asked)
                refuse_link(asked.parent, folder=True)
                own = recipes.parse(recipes.read(str(asked)), str(asked))
                if settings_of(own) == settings_of(job.recipe) and finished(
                    job._replace(folder=asked.parent)
                ):
                    if ground_of(asked.parent) != _ground_now(job, asked.parent, rows, bases):
                        continue
                    _refuse_damaged(asked.parent)
                    _copy_whole(asked.parent, job.folder)
                    break


def _ground_now(
    job: Job,
    run: Path,
    rows: dict[tuple[str | None, ...], RowsDigest],
    bases: dict[str | None, str | None],
) -> Ground:
    """What a job would stand on if it began now.

    run: of its very recipe, which says what classes its rows have
    rows, bases: what was found of others that ask for the same, and is now
    """
    asked, recipe = asked_for(job), job.recipe
    if asked[:2] not in rows:
        rows[asked[:2]] = digest_of_rows(recipe)
    if asked.base not in bases:
        held = recipes.parse(recipes.read(str(run / rundir.RECIPE)), str(run)).data
        told = recipe.data.model_copy(update={"classes": held.classes})
        bases[asked.base] = _base_now(recipe.model_copy(update={"data": told}))
    return Ground(*rows[asked[:2]], bases[asked.base])


def _base_now(recipe: Recipe) -> str | None:
    """`ResidentModel.body` of what a recipe asks for, whose classes are filled in."""
    reader, _ = load_reader(locate(recipe.model.source), recipe.model.task)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run has said it, or will
        return set_up_resident(recipe, reader, pick_device("cpu")).body


def _refuse_damaged(run: Path) -> None:
    """Raises FedSieveError for a run of which a figure could not be made, or of a part of it; or
    that lies in part elsewhere, where a link leads.
    """
    for path in everything_in(run):
        refuse_link(path, folder=path.is_dir())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        try:
            report.load(run)
        except UserWarning as said:
            raise FedSieveError(str(said)) from None


def _only_asked(folder: Path) -> bool:
    """Whether a run is to go there and has not begun: what is left by a study that was stopped."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    return [path.name for path in folder.iterdir()] == [ASKED]


def _copy_whole(run: Path, to: Path) -> None:
    """A folder that is there with all of the other's, or as it was."""
    to.parent.mkdir(parents=True, exist_ok=True)
    part = to.with_name(f".{to.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        shutil.copytree(run, part, symlinks=True, copy_function=copied)
        if to.exists():
            (to / ASKED).unlink()
            to.rmdir()
        part.rename(to)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
