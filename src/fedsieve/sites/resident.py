"""What a site's worker does with each request: the client's side of a federation across machines.

The base model, its adapter and the site's examples stay here from round to round; a round is
`engine.client.take_part`, the very function that runs in one process. What a server may ask for is
this list and no more, and every request is checked key by key:

    describe   who the site is, what it has, and which recipe it is ready for
    recipe     (body: the recipe's TOML) be ready to train this
    train      (body: an encoded payload) one round; the body of the answer is the update
    evaluate   (body: a whole adapter) the site's test rows, as sums, so that means are exact
    keep       (body: a whole adapter) write it to the site's disk, in PEFT's format

assignment.py makes a recipe ready. Errors that could quote a row or a path are told to the site's
own terminal; the server learns that there was one.
"""

import hashlib
import json
import math
import os
import re
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from datasets import Dataset
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError
from torch import Tensor

from fedsieve.algebra.adapter import Adapter, Layout, base_layout
from fedsieve.algebra.budget import Budget, Client
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import Memory, View
from fedsieve.algebra.payload import Base, Payload, rounded
from fedsieve.algebra.support import everything, gather
from fedsieve.disk import (
    NotAFile,
    bring_over,
    bytes_of,
    no_room,
    of_the_disk,
    refuse_link,
    remove,
    take_place,
    write_whole,
)
from fedsieve.engine.client import facts, take_part
from fedsieve.errors import FedSieveError, MethodFailed, WireError, of_memory, printable
from fedsieve.frame import Frame, refusal
from fedsieve.recipe import schema
from fedsieve.recipe.examples import load_rows
from fedsieve.recipe.told import told
from fedsieve.settings import Share, in_round
from fedsieve.sites import journal, limits, worker
from fedsieve.sites.assignment import Assignment, checked, prepare
from fedsieve.sites.journal import Entry
from fedsieve.sites.site import Site, budget_of, link_of, load
from fedsieve.tasks.examples import count
from fedsieve.train.local import Fit, fit, tally
from fedsieve.train.model import pick_device
from fedsieve.wire import decode, encode, longest
from fedsieve.wire.format import VERSION

RUNS = 8  # whose memory stays on the disk; which was used longest ago is forgotten beyond that
RECIPE = "recipe.toml"
MOST = "most_bytes"  # of a request's body, beside it
BASE = "base"  # the digests of the base over which it was told, beside it
SAID = "said"  # the digest of what the server was told of the site then
_RUN = re.compile(r"[0-9a-f]{64}")  # what a run's folder is called: the digest of its recipe
_ADAPTER = re.compile(r"\.[0-9a-f]{16}")  # and an adapter's, while it is written
_UNTOLD = "this recipe was not told here: tell it first"
RECIPE_BYTES = 1 << 20  # the longest that is taken
TOLD = "told"  # the digests of the recipes, in the order in which they were used last
_SAID = 500  # characters of an error
# What a method raises over a memory that is whole and none of its own, among other things.
_OVER_A_MEMORY = (AttributeError, IndexError, KeyError, TypeError, RuntimeError, MethodFailed)
_SHOWN = 20_000  # characters shown to the site's owner at a time, the last ones

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@dataclass
class Resident:
    """The worker's state: the site, its rows, and the recipe that it is ready for.

    say: where the site's owner reads what happens; it may hold paths and quote rows
    forgotten: the runs that gave way to others since the worker began
    """

    site: Site
    rows: Dataset
    test_rows: Dataset | None
    say: Callable[[str], None]
    assignment: Assignment | None = None
    forgotten: set[str] = field(default_factory=set)


def run(path: Path, say: Callable[[str], None]) -> None:
    """Be the worker that a site's file describes, until the process is interrupted.

    say: tells the site's owner what happens; where it cannot (a full disk, a letter that the log
        has not), nothing depends on it
    Raises FedSieveError if the file is not right, the rows or the device are not there, or another
    worker runs on the site's folder.
    """

    def tell(text: str) -> None:
        # What a server sent may be quoted: nothing of it may steer the terminal, or fill a log.
        # ValueError: a letter that the log cannot hold, or a log that was closed.
        with suppress(OSError, ValueError):
            say(printable(text[-_SHOWN:], "\n"))

    site = load(path)
    if site.cache is not None:
        os.environ["FEDSIEVE_CACHE"] = str(site.cache)
    before = os.umask(0o077)  # whatever is written here is for its owner alone
    try:
        with worker.lock(site.folder):
            resident = start(site, tell)
            tell(f"{site.name}: {len(resident.rows)} rows on {pick_device(site.device)}")
            worker.serve(
                site.folder,
                partial(answer, resident),
                partial(about, resident),
                lambda address: tell(f"ready at {address}"),
                partial(most_bytes, resident),
            )
    finally:
        os.umask(before)


def start(site: Site, say: Callable[[str], None]) -> Resident:
    """Read the site's rows, and clean up what a worker that was killed left behind.

    The site's folder is locked by the caller. Raises FedSieveError if the rows or the device are
    not there.
    """
    pick_device(site.device)
    for name in ("runs", "adapters"):
        refuse_link(site.folder / name, folder=True)
    for part in _left_behind(site.folder):
        remove(part)
    for old in _adapters(site.folder, "old"):
        bring_over(old.with_name(old.name.removeprefix(".").removesuffix(".old")))
    data = schema.Data(**site.data.model_dump())
    rows = load_rows(data, data.train, data.train_split)
    test_rows = None
    if data.test is not None or data.test_split is not None:
        test_rows = load_rows(data, data.test or data.train, data.test_split)
    return Resident(site, rows, test_rows, say)


def _left_behind(folder: Path) -> list[Path]:
    """What a worker writes under another name first. What else is in the folder is its owner's, as
    is what a link in the place of one of its folders leads to.
    """
    runs = [run for run in (folder / "runs").glob("*") if _RUN.fullmatch(run.name)]
    ours = [place for run in runs for place in (run, run / "rounds") if not run.is_symlink()]
    return [
        *folder.glob(f".{TOLD}.part"),
        *_adapters(folder, "part"),
        *(part for place in ours if not place.is_symlink() for part in place.glob(".*.part")),
    ]


def _adapters(folder: Path, end: str) -> list[Path]:
    """Adapters under the names that they have while another takes their place."""
    return [p for p in (folder / "adapters").glob(f".*.{end}") if _ADAPTER.fullmatch(p.stem)]


def about(resident: Resident, request: Frame) -> Frame | None:
    """The answer to what needs no work, at any time and in any thread; None for all else."""
    if request.header.get("do") != "describe":
        return None
    try:
        _checked(Describe, request)
    except FedSieveError as error:
        return refusal(_told(resident.site, error))
    return Frame(_facts(resident))


def most_bytes(resident: Resident, header: Mapping[str, Any]) -> int | Frame:
    """The longest body of a request, from its header: what the adapter's layout can fill.

    Of a recipe that was told to a worker before this one it is on the disk; one that was never told
    here has no use for a body, and is the answer.
    """
    do, run = header.get("do"), header.get("recipe")
    if do == "recipe":
        return RECIPE_BYTES
    if do not in ("train", "evaluate", "keep") or not isinstance(run, str):
        return 0
    assignment = resident.assignment
    if assignment is not None and assignment.run == run:
        return longest(assignment.start.layout, down=True)
    try:
        return int(bytes_of(_folder(resident, run) / MOST, 100)) if _RUN.fullmatch(run) else 0
    except (OSError, ValueError):
        return _unknown(_UNTOLD)


def answer(resident: Resident, request: Frame) -> Frame:
    """Do what a request asks. Never raises: whatever goes wrong is an answer."""
    do = request.header.get("do")
    do = do if isinstance(do, str) else repr(do)
    began = time.perf_counter()
    try:
        work = _WORK.get(do)
        if work is None:
            known = ", ".join(["describe", *_WORK])
            raise FedSieveError(f"unknown request {do[:40]!r}: known are {known}")
        result = work(resident, request)
    except _Unknown as error:
        result = _unknown(str(error))
    except _Lost as error:
        result = refusal(str(error), lost_memory=True)
    except FedSieveError as error:
        result = refusal(_told(resident.site, error))
        if result.header["error"] != str(error):
            resident.say(f"error: {error}")
    except Exception as error:
        # Whatever it is, the other rounds go on. Its words may quote data: they stay here.
        if (found := of_the_disk(error)) is not None:
            resident.say(f"error: {error}")
            why = found.strerror or type(error).__name__
            kept = ". Nothing that was kept is lost" if no_room(found) else ""
            result = refusal(f"the site's disk: {why}{kept}")
        else:
            resident.say(traceback.format_exc())
            why = f"an unexpected {type(error).__name__}"
            result = refusal(f"{why}; the worker's terminal says more")
    seconds = time.perf_counter() - began
    number = request.header.get("round")
    what = do if do in _WORK else "a request"
    what += f", round {number}" if isinstance(number, int) else ""
    told = "done" if result.header["ok"] else f"refused: {result.header['error']}"
    resident.say(f"{what}: {told} ({seconds:.1f} s)")
    return worker.seal(worker.digest(request), result)


def _told(site: Site, error: FedSieveError) -> str:
    """An error as the server may read it: no path of the site, and of a bounded length."""
    own = (site.folder, site.cache, site.model, site.data.train, site.data.test)
    paths = [str(path) for path in own if path is not None and os.sep in str(path)]
    return worker.without_paths(str(error), *paths)[:_SAID]


def whole_message(adapter: Adapter) -> bytes:
    """A whole adapter as a message, with the change of its base where there is one: the body of
    `evaluate` and `keep`.
    """
    payload = _whole(adapter.layout, adapter.tensors)
    if adapter.base:
        change = _whole(base_layout(adapter.layout, 0), adapter.base)
        payload = payload._replace(base=Base(0, change))
    return encode(payload)


def _whole(layout: Layout, tensors: dict[str, Tensor]) -> Payload:
    support = everything(layout)
    values = rounded(gather(tensors, support).cpu(), "float32", torch.Generator())
    return Payload(layout, support, values, "known", "known")


def _adapter(message: bytes, layout: Layout) -> Adapter:
    """The whole adapter that a message holds. Raises WireError if it is not one."""
    payload = decode(message, layout)
    if payload.support.names != layout.names or payload.support.ranks is not None:
        raise WireError("this message holds a part of an adapter, and all of it is needed")
    base = payload.base
    if base is not None and base.change.layout.pairs:
        raise WireError("a change of the base that is not whole: evaluate and keep need all of it")
    return Adapter(layout, payload.tree(), {} if base is None else base.change.tree())


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


T = TypeVar("T", bound=_Asked)


class Describe(_Asked):
    """Who are you?"""

    do: Literal["describe"]


class SetRecipe(_Asked):
    """Be ready for the recipe in the body."""

    do: Literal["recipe"]
    round: NonNegativeInt = 0


SiteName = Annotated[str, Field(max_length=64)]


class BudgetOffer(_Asked):
    """The budget that the server chose for this site (budget.Budget)."""

    ratio: Share
    down: Share
    up: Share


class Train(_Asked):
    """One round. recipe: SHA-256 of its text; budget: where it is not the site's own.

    site: whom it is for
    after: the last round of this site that the server merged: what it kept since then is void, and
        a method that keeps a memory needs that round's. None goes on from what is there
    lost: the site has said that it has lost that: it goes on from what it has of before, if any
    """

    do: Literal["train"]
    recipe: Digest
    seed: NonNegativeInt
    round: PositiveInt
    after: NonNegativeInt | None = None
    lost: bool = False
    site: SiteName | None = None
    budget: BudgetOffer | None = None


class EvaluateRequest(_Asked):
    """Evaluate the adapter in the body, which is that after `round`, or write it to the disk.

    site: whom it is for: the answers of two sites are never to the same request
    after, lost: as in `Train`: what the site has of its own in the adapter is that of this round
    """

    do: Literal["evaluate", "keep"]
    recipe: Digest
    round: NonNegativeInt
    after: NonNegativeInt | None = None
    lost: bool = False
    site: SiteName | None = None


def _unknown(why: str) -> Frame:
    return refusal(why, unknown_recipe=True)


class _Unknown(FedSieveError):
    """A recipe that was never told here."""


class _Lost(FedSieveError):
    """A memory that a round needs, and that is not on the disk any more."""


def _checked(kind: type[T], request: Frame) -> T:
    try:
        return kind.model_validate(dict(request.header))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(step) for step in first["loc"])
        raise FedSieveError(f"the request's {place[:60]!r}: {first['msg']}") from error


def _facts(resident: Resident) -> dict[str, Any]:
    """What the server may know of the site."""
    site, assignment, link = resident.site, resident.assignment, link_of(resident.site)
    own = None if assignment is None else count(assignment.examples)
    packages = ("fedsieve", "torch", "transformers", "peft")
    versions: dict[str, Any] = {name: metadata.version(name) for name in packages}
    return {
        "ok": True,
        "name": site.name,
        "examples": len(resident.rows) if own is None else own,
        "recipe": None if assignment is None else assignment.run,
        "base": None if assignment is None else assignment.digest,
        "reads": None if assignment is None else assignment.reads,
        "budget": budget_of(site)._asdict(),
        "link": None if link is None else link._asdict(),
        "memory": site.memory,
        "step_seconds": site.step_seconds,
        "versions": {**versions, "wire": VERSION},
    }


def _tell(resident: Resident, request: Frame) -> Frame:
    _checked(SetRecipe, request)
    run = hashlib.sha256(request.body).hexdigest()
    if resident.assignment is None or resident.assignment.run != run:
        _change_assignment(resident, run, request.body)
    folder = _folder(resident, run)
    folders = (folder.parent, folder, folder / "rounds")
    for place in (
        *folders,
        folder / RECIPE,
        folder / MOST,
        folder / BASE,
        folder / SAID,
        resident.site.folder / TOLD,
    ):
        _clear(place, folder=place in folders)
    if not folder.exists():
        limits.check_room(resident.site, len(request.body))
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    assert resident.assignment is not None
    most = longest(resident.assignment.start.layout, down=True)
    write_whole(folder / MOST, str(most).encode("ascii"))
    write_whole(folder / BASE, _base(resident.assignment).encode("ascii"))
    write_whole(folder / SAID, _said(resident).encode("ascii"))
    write_whole(folder / RECIPE, request.body)
    _forget_old_runs(resident, run)
    return Frame(_facts(resident))


def _train(resident: Resident, request: Frame) -> Frame:
    asked = _checked(Train, request)
    assignment = _assignment(resident, asked.recipe)
    recipe, site, number = assignment.recipe, resident.site, asked.round
    if asked.seed != recipe.seed or number > recipe.rounds:
        raise FedSieveError(
            f"seed {asked.seed}, round {number}: the recipe has seed {recipe.seed} and "
            f"{recipe.rounds} rounds"
        )
    if asked.after is not None and asked.after >= number:
        raise FedSieveError(f"round {number} cannot be done after round {asked.after}")
    _refuse_another_site(resident, asked.site)
    budget = _budget(site, asked.budget)
    folder = _rounds(resident, assignment.run)
    digest = hashlib.sha256(repr(tuple(budget)).encode() + request.body).hexdigest()
    whose = _whose(resident, assignment)
    done = journal.find(folder, number, whose)
    if done is None or done.asked != digest:
        client = Client(
            site.name, count(assignment.examples), budget, link_of(site), site.step_seconds
        )
        key = Key(recipe.seed, number, site.name)
        since = number if asked.after is None else asked.after + 1
        memories = journal.memories(folder, since, whose)
        if asked.lost:
            newest = next(memories, (0, {}))
            if assignment.method.counts and newest[0] != asked.after:
                newest, memories = (0, {}), iter(())
            memories = chain([newest], memories)
        elif assignment.method.keeps and asked.after is not None:
            try:
                memories = _from(asked.after, memories)
            except _Lost as error:
                if assignment.run in resident.forgotten:
                    why = f"it keeps {RUNS} runs, and others were used since"
                    raise _Lost(f"{error}; {why}") from None
                raise
        done = _round(assignment, client, memories, key, request.body)
        done = done._replace(asked=digest, whose=whose)
        # As far as the server's checkpoints reach: two of them, `every` rounds apart.
        room = partial(limits.check_room, site)
        journal.write(folder, done, keep=2 * recipe.checkpoint.every, room=room)
        _forget_old_runs(resident, assignment.run)
    return Frame(done.facts, done.answer)


def _refuse_another_site(resident: Resident, asked: str | None) -> None:
    if asked not in (None, resident.site.name):
        raise FedSieveError("this request is for another site")


def _whose(resident: Resident, assignment: Assignment) -> str:
    """What the site writes beside its rounds: a folder may be put back from another's backup."""
    return f"{assignment.run}/{resident.site.name}"


def _lost(after: int) -> _Lost:
    return _Lost(
        f"this site has lost what it kept after round {after}: its own update of that round counts "
        "on it"
    )


def _from(after: int, memories: Iterator[tuple[int, Memory]]) -> Iterator[tuple[int, Memory]]:
    """The memories again, of which the newest is that after this round. Raises _Lost else."""
    newest = next(memories, None)
    if newest is None or newest[0] != after:
        raise _lost(after)
    return chain([newest], memories)


def _round(
    assignment: Assignment,
    client: Client,
    memories: Iterator[tuple[int, Memory]],
    key: Key,
    message: bytes,
) -> Entry:
    """One round from the first memory that the message fits; a WireError comes before training."""

    def train(view: View, client: Client, key: Key) -> Fit:
        training = in_round(assignment.recipe.training, key.round, assignment.recipe.rounds)
        return fit(assignment.resident, view, assignment.examples, training, key)

    unfit: WireError | None = None
    for before, memory in memories:
        try:
            reply, after = take_part(
                assignment.method, train, assignment.start, client, memory, key, message
            )
        except WireError as error:
            unfit = unfit or error
        except _OVER_A_MEMORY as error:
            # Whole, and not what this method keeps: somebody else has written it.
            if not memory or of_memory(error):
                raise
            raise _Lost(
                f"what this site kept after round {before} cannot be used "
                f"({type(error).__name__}): a worker of this site has not written it"
            ) from error
        else:
            said = {"ok": True, "round": key.round, **facts(reply)}
            return Entry(key.round, before, "", "", said, reply.update or b"", after)
    raise unfit or FedSieveError(
        f"round {key.round} cannot be done again here: this site has forgotten what it kept before"
    )


def _evaluate(resident: Resident, request: Frame) -> Frame:
    asked = _checked(EvaluateRequest, request)
    assignment = _assignment(resident, asked.recipe)
    _refuse_round(assignment, asked.round)
    _refuse_another_site(resident, asked.site)
    if assignment.test is None:
        raise FedSieveError("this site has no test rows")
    adapter = _own(resident, assignment, _adapter(request.body, assignment.start.layout), asked)
    precision, batch = assignment.recipe.training.precision, assignment.recipe.evaluation.batch
    counts = tally(assignment.resident, adapter, assignment.test, batch=batch, precision=precision)
    return Frame(
        {
            "ok": True,
            "round": asked.round,
            "counted": counts.counted,
            "loss_sum": counts.loss if math.isfinite(counts.loss) else None,
        },
        json.dumps(dict(counts.sums)).encode(),  # what is kept row by row stays here
    )


def _keep(resident: Resident, request: Frame) -> Frame:
    asked = _checked(EvaluateRequest, request)
    assignment = _assignment(resident, asked.recipe)
    _refuse_round(assignment, asked.round)
    _refuse_another_site(resident, asked.site)
    adapter = _own(resident, assignment, _adapter(request.body, assignment.start.layout), asked)
    place = resident.site.folder / "adapters" / assignment.run[:16]
    for there in (place.parent, place):
        _clear(there, folder=True)
    part = place.with_name(f".{place.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    _refuse_another_adapter(resident.site, place)
    try:
        # Again afterwards: what else is in the folder has no size before it is written.
        limits.check_room(resident.site, assignment.resident.bytes_saved(adapter))
        part.mkdir(mode=0o700, parents=True)
        known = told(assignment.recipe)._replace(rounds=asked.round)
        assignment.resident.save(adapter, part, known, home=place)
        limits.check_room(resident.site, 0)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    take_place(part, place)
    resident.say(f"the adapter after round {asked.round} is in {place}")
    return Frame({"ok": True, "round": asked.round})


def _refuse_another_adapter(site: Site, place: Path) -> None:
    others = [path for path in place.parent.glob("[!.]*") if path != place]
    if len(others) >= site.most_adapters:
        raise FedSieveError(
            f"this site's folder has {len(others)} adapters, and takes at most "
            f"{site.most_adapters} (most_adapters): its owner moves old ones away, or raises that"
        )


_WORK: dict[str, Callable[[Resident, Frame], Frame]] = {
    "recipe": _tell,
    "train": _train,
    "evaluate": _evaluate,
    "keep": _keep,
}


def _refuse_round(assignment: Assignment, number: int) -> None:
    if number > assignment.recipe.rounds:
        raise FedSieveError(
            f"round {str(number)[:20]}: the recipe has {assignment.recipe.rounds} rounds"
        )


def _own(
    resident: Resident, assignment: Assignment, adapter: Adapter, asked: EvaluateRequest
) -> Adapter:
    """The site's own model where a method leaves a part of it here; else the server's.

    Raises _Lost where what is left here is that of another round than the server counts on: the
    newest may be void, and one before it is not what the site has learned.
    """
    personal = assignment.method.personal
    if personal is None:
        return adapter
    place, whose = _rounds(resident, assignment.run), _whose(resident, assignment)
    if asked.after is None or asked.lost:
        last = asked.round if asked.after is None else asked.after
        _, memory = next(journal.memories(place, last + 1, whose), (0, {}))
        return personal(adapter, memory)
    if asked.after == 0:
        return personal(adapter, {})
    entry = journal.find(place, asked.after, whose)
    if entry is None:
        raise _lost(asked.after)
    return personal(adapter, entry.memory)


def _budget(site: Site, offer: BudgetOffer | None) -> Budget:
    most = budget_of(site)
    if offer is None:
        return most
    given = Budget(offer.ratio, offer.down, offer.up)
    for knob, value in given._asdict().items():
        if value > getattr(most, knob):
            raise FedSieveError(
                f"budget.{knob} {value:g} is more than this site affords ({getattr(most, knob):g})"
            )
    return given


def _folder(resident: Resident, run: str) -> Path:
    return resident.site.folder / "runs" / run


def _rounds(resident: Resident, run: str) -> Path:
    """Where a run's journal is. Raises FedSieveError for a link on the way there: rounds would be
    written, and removed, elsewhere.
    """
    folder = _folder(resident, run)
    for place in (folder.parent, folder, folder / "rounds"):
        refuse_link(place, folder=True)
    return folder / "rounds"


def _clear(place: Path, *, folder: bool) -> None:
    """Remove what is not of the kind that belongs there: a file for a folder, a link to nothing.

    Raises FedSieveError for a link to a folder.
    """
    if place.is_symlink() and not place.exists():
        place.unlink()
    elif place.exists() and place.is_dir() != folder:
        remove(place)
    if folder:
        refuse_link(place, folder=True)


def _forget_old_runs(resident: Resident, run: str) -> None:
    """Forget all but the `RUNS` that were used last, the newest of which is this one.

    In the order in which they were told or trained, and not by the dates of files: clocks are set
    back.
    """
    folder = resident.site.folder
    place = folder / TOLD
    # No more than an order is lost with it.
    before: list[str] = []
    with suppress(OSError):
        before = bytes_of(place, 1 << 16).decode("ascii", errors="replace").split()
    runs = folder / "runs"
    refuse_link(runs, folder=True)
    there = {path.name for path in runs.iterdir() if _RUN.fullmatch(path.name)} - {run}
    known = [digest for digest in before if digest in there]
    order = [*sorted(there - {*known}), *known, run]
    if order[-RUNS:] != before:
        write_whole(place, "\n".join(order[-RUNS:]).encode("ascii"))
    for digest in order[:-RUNS]:
        resident.forgotten.add(digest)
        resident.say(f"{runs / digest} is removed: {RUNS} are kept, and others were used since")
        remove(runs / digest)


def _assignment(resident: Resident, run: str) -> Assignment:
    """The assignment of a recipe that was told, by this process or by one before it."""
    if resident.assignment is None or resident.assignment.run != run:
        try:
            text = bytes_of(_folder(resident, run) / RECIPE, RECIPE_BYTES)
        except (FileNotFoundError, NotADirectoryError, NotAFile):
            raise _Unknown(_UNTOLD) from None
        if hashlib.sha256(text).hexdigest() != run:
            raise _Unknown("the recipe that was stored here is damaged: tell it again")
        _change_assignment(resident, run, text)
        try:
            _refuse_another_base(resident, run)
            _refuse_other_facts(resident, run)
        except BaseException:
            resident.assignment = None  # or the next request would not be held against them
            raise
    assert resident.assignment is not None
    return resident.assignment


def _base(assignment: Assignment) -> str:
    """What the base is known by: its weights and configuration, and how it reads rows."""
    return f"{assignment.digest} {assignment.reads}"


def _refuse_another_base(resident: Resident, run: str) -> None:
    """What the server believes of this site, and what is kept here, is over the base it told of.

    Raises _Unknown where the site's model has become another since: who tells the recipe again is
    told which.
    """
    assert resident.assignment is not None
    try:
        before = bytes_of(_folder(resident, run) / BASE, 1000).decode("ascii", errors="replace")
    except OSError:
        before = ""
    if before != _base(resident.assignment):
        raise _Unknown(
            "this site's base model is another than when the recipe was told: tell it again"
        )


def _said(resident: Resident) -> str:
    """The digest of what the server knows of the site."""
    facts = {key: value for key, value in _facts(resident).items() if key != "versions"}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _refuse_other_facts(resident: Resident, run: str) -> None:
    """The server would go on sending what the site afforded once, and weigh rows that it had.

    Raises _Unknown where the site's file, or its rows, are others since.
    """
    try:
        before = bytes_of(_folder(resident, run) / SAID, 100).decode("ascii", errors="replace")
    except FileNotFoundError:
        return  # of a version that kept none
    except OSError:
        before = ""
    if before != _said(resident):
        raise _Unknown(
            "this site's budget, rows or name are others than when the recipe was told: tell it "
            "again"
        )


def _change_assignment(resident: Resident, run: str, text: bytes) -> None:
    """Be ready for another recipe; where it is refused, the old one stays."""
    site = resident.site
    recipe = checked(text, site)
    resident.assignment = None  # two models at once may be more than the memory holds
    rows, test_rows = resident.rows, resident.test_rows
    resident.assignment = prepare(run, recipe, rows, test_rows, site, resident.say)
