"""Studies: what a comparison is to run, read from a file and worked out to single recipes.

A study (a TOML file) names a recipe and its *entries*: a method each, with settings of its own. An
entry's runs differ in the seed alone. With `[tune]`, every entry first tries the same number of
settings on the rows that `data.validation` holds back. docs/compare.md describes the keys.

The shared recipe is bent to each method, and it is told how: a budget that a method makes no use of
counts as 1 for it, and options of another method or server optimizer are left out.
"""

import itertools
import math
import re
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from fedsieve import methods as known_methods
from fedsieve.algebra import optim
from fedsieve.clients.laws import tiers_by_density, tiers_by_rank
from fedsieve.disk import place as path_of
from fedsieve.errors import MOST_TOLD, FedSieveError, quoted, reason
from fedsieve.recipe import lines
from fedsieve.recipe import read as recipes
from fedsieve.recipe.method import alone, limits_said, options_of
from fedsieve.recipe.method import knobs as knobs_of
from fedsieve.recipe.overrides import flat, put
from fedsieve.recipe.schema import MethodTable, Recipe, ServerTable
from fedsieve.settings import is_number
from fedsieve.study.jobs import Job, refuse_changed
from fedsieve.study.parts import refuse_run
from fedsieve.study.tables import (
    LONGEST,
    MOST,
    TAKEN,
    EntryTable,
    Grid,
    Settings,
    Study,
    TuneTable,
    keys_of,
)

VALIDATION = 0.1  # the share held back where a study tunes and its recipe says nothing
LAST = 3  # a trial's score is the mean of so many last evaluations, to damp their swing
_MOST_RUNS = 10_000  # of a study, trials too
_NAME = re.compile(r"[\w(][\w .,+=()-]*")


class Entry(NamedTuple):
    """An entry, worked out.

    table:  its recipe, without seed and tuned settings
    trials: the settings to try; empty where it is not tuned
    knobs:  the budgets that its method makes use of
    notes:  what of the shared recipe it could not use
    """

    name: str
    method: str
    table: dict[str, Any]
    seeds: tuple[int, ...]
    trials: list[Settings]
    knobs: tuple[str, ...]
    notes: tuple[str, ...]


class Plan(NamedTuple):
    """What a comparison runs; `tune` holds the seeds and settings of all trials."""

    folder: Path
    target: float | None
    entries: tuple[Entry, ...]
    tune: TuneTable | None
    notes: tuple[str, ...]


def plan(
    source: str,
    folder: Path,
    *,
    methods: Sequence[str] = (),
    seeds: Sequence[int] = (),
    target: float | None = None,
    overrides: Sequence[str] = (),
    allow_code: bool = False,
) -> Plan:
    """Read a study, or a recipe with the methods to compare, and check all that it would run.

    methods, seeds, target: for a recipe; for a study, seeds and target replace its own.
    overrides: "key=value" changes to the shared recipe.
    allow_code: see `recipes.check`
    Raises FedSieveError for anything that is not right, naming entry and key.
    """
    study = _read(source, methods)
    target = study.target if target is None else target
    changes = {"seeds": tuple(seeds) or study.seeds, "target": target}
    study = study.model_copy(update=changes)
    base = recipes.read(_beside(source, study.recipe))
    return worked_out(study, base, source, folder, overrides=overrides, allow_code=allow_code)


def worked_out(
    study: Study,
    base: dict[str, Any],
    source: str,
    folder: Path,
    *,
    overrides: Sequence[str] = (),
    allow_code: bool = False,
) -> Plan:
    """What a study runs, whose recipe is `base`, as it was read; changed in place.

    source: what errors call the study. Raises FedSieveError as `plan` does.
    """
    refuse_run(folder)
    _refuse_own(study, source)
    for key, value in flat(study.set):
        put(base, key, value, f"{source}: set.{key}")
    for override in overrides:
        recipes.override(base, override)
    for name in _TABLES:
        base.setdefault(name, {})
    _refuse_no_tables(base, source)
    notes = []
    if study.tune is not None:
        base["evaluation"]["on"] = "test"
        share = base["data"].setdefault("validation", VALIDATION)
        if not is_number(share):
            raise FedSieveError(f"{source}: data.validation is {quoted(share)}: a share is needed")
        notes.append(
            f"Settings were chosen on {share:g} of the training rows, which no client of any run "
            f"holds; a trial's score is the mean of its last {LAST} evaluations there."
        )
    entries = tuple(_work_out(study, each, base, source, allow_code) for each in study.entry)
    _refuse_twice(entries, source)
    _refuse_many(entries, study.tune, source)
    tuned = {entry.name: len(entry.trials) for entry in entries if entry.trials}
    if len(set(tuned.values())) > 1:
        first = {count: name for name, count in reversed(tuned.items())}
        counts = [*dict.fromkeys(tuned.values())][:MOST_TOLD]
        said = ", ".join(f"{first[count]} {count}" for count in counts)
        raise FedSieveError(
            f"{source}: every tuned entry must have the same number of trials, or the one with "
            f"more has the better chance ({said})"
        )
    made = Plan(folder, study.target, entries, study.tune, tuple(notes))
    for entry in entries:  # a mistake shows now, not after hours
        for settings in entry.trials or [{}]:
            recipe_of(entry, settings, entry.seeds[0])
    refuse_changed(trial_jobs(made))
    return made


def trial_jobs(plan: Plan) -> list[Job]:
    """The runs on the validation rows, the first trial of every entry first."""
    if plan.tune is None:
        return []
    numbers = range(max((len(entry.trials) for entry in plan.entries), default=0))
    return [
        trial_job(plan, plan.tune, entry, number, seed)
        for number in numbers
        for seed in plan.tune.seeds
        for entry in plan.entries
        if entry.trials
    ]


def final_jobs(plan: Plan, chosen: Mapping[str, Settings]) -> list[Job]:
    """The runs on the test rows, the first seed of every entry first.

    chosen: entry -> the settings that tuning found; an entry that is to be tuned and is not there
    has no runs
    """
    seeds = dict.fromkeys(seed for entry in plan.entries for seed in entry.seeds)
    jobs = []
    for seed in seeds:
        for entry in plan.entries:
            if seed in entry.seeds and (not entry.trials or entry.name in chosen):
                name = f"{entry.name}/seed-{seed}"
                recipe = recipe_of(entry, chosen.get(entry.name, {}), seed)
                jobs.append(Job(name, recipe, plan.folder / name))
    return jobs


def recipe_of(entry: Entry, settings: Settings, seed: int) -> Recipe:
    """One run's recipe. Raises FedSieveError, naming the entry, where it is not right."""
    table = deepcopy(entry.table)
    where = f"entry {entry.name!r}"
    for key, value in flat(settings):
        put(table, key, value, f"{where}: {key}")
    _refuse_no_tables(table, where)
    table["seed"] = seed
    # Of the entry's own programs it was asked when the study was read; a setting may name others.
    asked = table["method"]["name"] == entry.method and _function(table) == _function(entry.table)
    return recipes.check(table, where, allow_code=asked)


def _function(table: Mapping[str, Any]) -> object:
    training = table.get("training")
    return training.get("function") if isinstance(training, Mapping) else None


def trial_job(plan: Plan, tune: TuneTable, entry: Entry, number: int, seed: int) -> Job:
    name = f"{entry.name}/tune-{number}-seed-{seed}"
    # Settings that are tried come last: they are what the trial is about.
    settings = dict(flat(tune.set)) | dict(flat(entry.trials[number]))
    settings |= {"evaluation.on": "validation"}
    return Job(name, recipe_of(entry, settings, seed), plan.folder / name)


def _read(source: str, methods: Sequence[str]) -> Study:
    path = Path(source)
    table: dict[str, Any] = {}
    if path.is_file():
        try:
            text = recipes.text_of(path)
        except (OSError, ValueError) as error:
            raise FedSieveError(f"the study {source} cannot be read: {reason(error)}") from error
        table = recipes.toml(text, f"the study {source}")
    if "entry" not in table and "recipe" not in table:
        # A recipe, and the methods to run it with.
        own = recipes.read(source).get("method")
        names = list(methods) or [str(own.get("name") if isinstance(own, dict) else own)]
        if len(names) > MOST:
            raise FedSieveError(f"--methods: {len(names):,} methods: at most {MOST:,}")
        entries = tuple(EntryTable(name=name, method=name) for name in names)
        return Study(recipe=str(path.resolve()) if path.is_file() else source, entry=entries)
    if methods:
        raise FedSieveError(f"{source} is a study: its methods are its [[entry]] tables")
    try:
        return Study.model_validate(table)
    except ValidationError as error:
        raise FedSieveError(lines.explained(error, source, text, table, keys_of)) from error


def _beside(source: str, recipe: str) -> str:
    """A study's recipe: a file, from where the study is, or a recipe's name."""
    path = Path(source).parent / path_of(recipe)
    return str(path) if path.is_file() else recipe


def _work_out(
    study: Study, given: EntryTable, base: Mapping[str, Any], source: str, allow_code: bool
) -> Entry:
    where = f"{source}: entry {quoted(given.name)}"
    if not _NAME.fullmatch(given.name):
        raise FedSieveError(f"{where}: a name is letters, digits and . , + = - ( ) _ or spaces")
    if len(given.name) > LONGEST or given.name.lower().startswith(TAKEN):
        raise FedSieveError(
            f"{where}: its runs go into a folder of that name, beside {', '.join(TAKEN)}, and of "
            f"{LONGEST} letters at most: give it another"
        )
    table = deepcopy(dict(base))
    own = dict(flat(given.set))
    if given.method is not None:
        table.setdefault("method", {})["name"] = given.method
    for key, value in own.items():
        put(table, key, value, f"{where}: set.{key}")
    _refuse_no_tables(table, where)
    table["name"] = given.name
    if not allow_code:
        recipes.refuse_code(str(table.get("method", {}).get("name")), where)
        recipes.refuse_function(_function(table), where)
    notes = _drop_foreign(table, own, where)
    parsed = recipes.parse(table, where)
    knobs = knobs_of(parsed)
    limited = limits_said(parsed.budgets, knobs)
    unused = [knob for knob in limited if knob not in knobs]
    if unused:
        table["budgets"] = without(table["budgets"], unused)
        notes.append(f"makes no use of the budgets' {' and '.join(unused)}")
    grid = given.grid
    if grid is None and study.tune is not None:
        grid = study.tune.grid
    return Entry(
        given.name,
        parsed.method.name,
        table,
        given.seeds or study.seeds,
        _trials(grid or []),
        tuple(knob for knob in limited if knob in knobs),
        tuple(notes),
    )


def _drop_foreign(table: dict[str, Any], own: Settings, where: str) -> list[str]:
    """Take out options of the shared recipe that are another method's, or another optimizer's.

    An entry's own options stay, and are refused later if they are unknown. A server that is not
    named is the method's own.
    """
    method, server = table.get("method", {}), table.get("server", {})
    notes: list[str] = []

    def drop(name: str, options: dict[str, Any], known: Collection[str]) -> None:
        foreign = [k for k in options if k not in known and f"{name}.{k}" not in own]
        for key in foreign:
            del options[key]
        if foreign:
            notes.append(f"has no {' and no '.join(f'{name}.{key}' for key in foreign)}")

    build = known_methods.load(str(method.get("name")))
    drop("method", method, {"name", *options_of(build)})
    if server:
        built = alone(MethodTable.model_validate(method))
        optimizer = server.get("optimizer") or built.server.table.get("optimizer")
        make = getattr(optim, str(optimizer), None)
        known = {*ServerTable.model_fields, *(options_of(make) if make else ())}
        drop("server", server, known if built.linear else known - {"clip"})
    return notes


def without(budgets: Any, knobs: Sequence[str]) -> Any:
    """A recipe's budgets, as they are written, with 1 in the place of some knobs."""
    if isinstance(budgets, list):
        return [tier | dict.fromkeys(knobs, 1.0) for tier in budgets]
    if budgets["kind"] == "list":
        clients = budgets["clients"]
        gone = {*knobs, "rank"} if "ratio" in knobs else {*knobs}
        if isinstance(clients, list):
            kept: Any = [{k: v for k, v in each.items() if k not in gone} for each in clients]
        else:
            kept = {i: {k: v for k, v in c.items() if k not in gone} for i, c in clients.items()}
        return {**budgets, "clients": kept}
    if budgets["kind"] == "tiers":
        law = tiers_by_rank if "ratio" in knobs else tiers_by_density
        tiers = [{"share": share, **budget._asdict()} for share, budget in law(budgets["tiers"])]
        return without(tiers, knobs)
    if "ratio" in knobs:  # a law of ranks: what is left is the same for all clients
        rest = {key: budgets.get(key, 1.0) for key in ("down", "up") if key not in knobs}
        return [rest]
    return {**budgets, **dict.fromkeys(knobs, 1.0)}


_TABLES = ("method", "evaluation", "data", "server")  # that are looked into before a recipe is made


def _refuse_no_tables(table: Mapping[str, Any], where: str) -> None:
    for name in _TABLES:
        if not isinstance(table.get(name, {}), dict):
            raise FedSieveError(f"{where}: {name} is a table of the recipe, and not one value")


def _refuse_own(study: Study, source: str) -> None:
    """Raises FedSieveError for a setting that the study itself makes, and so would not be the one
    that is named.
    """
    tried: list[Settings] = []
    for grid in (study.tune.grid if study.tune else None, *(e.grid for e in study.entry)):
        tried += grid if isinstance(grid, list) else [grid or {}]
    sets = [study.set, *(e.set for e in study.entry), *([study.tune.set] if study.tune else [])]
    for table in (*sets, *tried):
        named = {key for key, _ in flat(table)}
        if "seed" in named:
            raise FedSieveError(f"{source}: seed: a study has `seeds`, of runs and of [tune]")
        if "evaluation.on" in named and any(tried):
            raise FedSieveError(f"{source}: evaluation.on: trials are judged on validation rows")
    for table in tried:
        if {"method", "method.name"} & {key for key, _ in flat(table)}:
            raise FedSieveError(f"{source}: method.name: give each method an [[entry]] of its own")


def _trials(grid: Grid) -> list[Settings]:
    count = len(grid) if isinstance(grid, list) else math.prod(map(len, grid.values()))
    if count > _MOST_RUNS:
        raise FedSieveError(
            f"grid: {count:,} trials of each seed: at most {_MOST_RUNS:,}: try fewer values"
        )
    if isinstance(grid, list):
        return grid
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _refuse_many(entries: Sequence[Entry], tune: TuneTable | None, source: str) -> None:
    """Raises FedSieveError for more runs than anybody waits for: each is looked at before the first
    begins.
    """
    trials = sum(len(entry.trials) for entry in entries) * (len(tune.seeds) if tune else 0)
    runs = trials + sum(len(entry.seeds) for entry in entries)
    if runs > _MOST_RUNS:
        raise FedSieveError(
            f"{source}: {runs:,} runs in all, {trials:,} of them trials: at most {_MOST_RUNS:,}"
        )


def _refuse_twice(entries: Sequence[Entry], source: str) -> None:
    seen: set[str] = set()
    for entry in entries:
        name = entry.name.strip().lower()  # some file systems take both for one, and tables do
        if name in seen:
            raise FedSieveError(f"{source}: two entries are called {entry.name!r}")
        seen.add(name)
