"""FLASC-Search: which rank and which density together, at equal bytes (after Kuo et al. 2024,
arXiv 2406.05233, which names the search and leaves its details open).

From a small configuration, two steps are tried: twice the rank, and twice the density. Every trial
spends the same bytes, those of the first one: a configuration whose messages are twice as long gets
half the rounds. How long they are is measured in a pilot of two rounds, because a mask costs less
an entry when it is denser, and a head does not grow with the rank. The cohorts of all trials are
the same, so their rounds compare. The better step is kept if it beats where it started from; the
search ends when neither does, at the limits, or when the bytes of all trials, pilots included,
would pass the budget.

Only validation rows are looked at. The search keeps no state but its run directories: a search that
was stopped makes the same decisions again from what is there, and goes on.
"""

import json
import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import tomli_w

from fedsieve import report
from fedsieve.disk import write_whole
from fedsieve.errors import FedSieveError
from fedsieve.recipe import read as recipes
from fedsieve.recipe.method import knobs as knobs_of
from fedsieve.report import words
from fedsieve.run import rundir
from fedsieve.study.compare import counting, markdown, score
from fedsieve.study.jobs import Job, Known, ShowRound, diverged, run_all
from fedsieve.study.parts import refuse_run
from fedsieve.study.plan import LAST, VALIDATION

BEST = "best.toml"
TABLE = "search"  # .json and .md
PILOT = 2  # rounds; the second is measured, since at first most of an adapter is zeros
LEGEND = (
    "Every trial sends as much as the first, to half a round. A score is the mean of the leading "
    f"metric on the validation rows of a trial's last {LAST} evaluations; the density is the "
    "clients' largest."
)
EVALUATIONS = 10  # about so many a trial, whatever its rounds: the last ones see the same bytes


class Config(NamedTuple):
    """One point of the search. doublings: how often the recipe's densities were doubled."""

    rank: int
    doublings: int


class Search(NamedTuple):
    """What is searched.

    table: the recipe's; budget: bytes that all trials together may send
    """

    table: dict[str, Any]
    folder: Path
    seeds: tuple[int, ...]
    budget: float
    max_rank: int


class Trial(NamedTuple):
    """A configuration, tried.

    rounds:  0 where its pilot diverged, and it was not begun
    sent:    payload bytes of all its runs, both ways, without the pilot's
    score:   on validation, mean over seeds; None where a run diverged
    verdict: what became of it
    """

    config: Config
    rounds: int
    sent: int
    score: float | None
    folders: tuple[Path, ...]
    verdict: str


class Found(NamedTuple):
    """How a search ended. rows: of the table, a cell by its head; reason: why it ended."""

    rows: list[dict[str, str]]
    best: Trial
    reason: str
    written: list[Path]


def prepare(
    source: str,
    folder: Path,
    *,
    budget_mb: float,
    rank: int | None = None,
    density: float | None = None,
    max_rank: int = 64,
    seeds: Sequence[int] = (),
    overrides: Sequence[str] = (),
    allow_code: bool = False,
) -> Search:
    """Read the recipe from which a search starts.

    rank, density: where to begin; by default the recipe's rank and budgets. A density replaces the
        budgets: all clients get it, both ways.
    allow_code: see `recipes.check`
    Raises FedSieveError for what cannot be searched.
    """
    refuse_run(folder)
    table = recipes.read(source, overrides)
    if density is not None:
        table["budgets"] = [{"down": density, "up": density}]
    if not isinstance(table.get("budgets", []), list):
        raise FedSieveError(
            f"{source}: the search doubles densities: it needs [[budgets]] with down and up, or "
            "--density"
        )
    table.setdefault("data", {}).setdefault("validation", VALIDATION)
    parsed = recipes.check(table, source, allow_code=allow_code)
    if not {"down", "up"} <= knobs_of(parsed):
        raise FedSieveError(
            f"{source}: the method {parsed.method.name!r} has no densities to search: choose one "
            "that sieves both ways (flasc, fslora_flasc)"
        )
    # All that is doubled stands in the table now, defaults too.
    full = parsed.model_dump(mode="json")
    table["budgets"] = full["budgets"]
    table["lora"] = {key: value for key, value in full["lora"].items() if value is not None}
    # What is found is a recipe: its server is written out as every run's is.
    table["server"] = {key: value for key, value in full["server"].items() if value is not None}
    table["seed"] = parsed.seed
    search = Search(table, folder, tuple(seeds) or (parsed.seed,), budget_mb * 1e6, max_rank)
    if rank is not None:
        search = search._replace(table=_table(search, Config(rank, 0)))
    start = _start(search)
    if not _steps(search, start):
        raise FedSieveError(
            f"{source}: there is nothing to search: rank {start.rank} cannot be doubled within "
            f"{max_rank} (--max-rank), nor density {_density(search, start):g}"
        )
    return search


def run(search: Search, workers: int, show: ShowRound, say: Callable[[str], None]) -> Found:
    """Search, and write the table, the report and the best recipe.

    Raises FedSieveError if a run fails, or if the budget is too small for the first trial;
    runner.Stopped if the user stops it. The same call then goes on from where it was.
    """
    search.folder.mkdir(parents=True, exist_ok=True)
    known: Known = {}  # of pilots and trials alike

    def carry_out(jobs: Sequence[Job], workers: int = workers) -> None:
        for outcome in run_all(jobs, workers, show, counting(jobs, "run", say), say, known):
            if outcome.problem is not None and diverged(outcome.job) is None:
                raise FedSieveError(f"{outcome.job.name}: {outcome.problem}")

    def tried(config: Config, rounds: int) -> Trial:
        if not rounds:
            return Trial(config, 0, 0, None, (), "diverged in its pilot")
        jobs = _jobs(search, config, rounds)
        reached = score(jobs)
        return Trial(
            config,
            rounds,
            sum(_sent(job) for job in jobs),
            reached,
            tuple(job.folder for job in jobs),
            "diverged" if reached is None else "",
        )

    first_lost = f"{search.folder}: the first trial diverged: lower the learning rates"
    start, rounds = _start(search), int(search.table["rounds"])
    pilots = [_pilot(search, start)]
    carry_out(pilots, 1)
    if diverged(pilots[0]) is not None:
        raise FedSieveError(first_lost)
    first_round = _last_round(pilots[0])
    share = first_round * rounds * len(search.seeds)
    if _sent(pilots[0]) + share > search.budget:
        raise FedSieveError(
            f"the first trial needs about {share / 1e6:.3g} MB, and the budget is "
            f"{search.budget / 1e6:g} MB: raise --budget-mb or lower rounds"
        )
    carry_out(_jobs(search, start, rounds))
    best = tried(start, rounds)._replace(verdict="start")
    if best.score is None:
        raise FedSieveError(first_lost)
    say(_said(search, best))
    trials, share = [best], best.sent
    while True:
        steps = _steps(search, best.config)
        if not steps:
            reason = f"rank {best.config.rank} and its density are at their limits"
            break
        spent = sum(trial.sent for trial in trials) + sum(_sent(pilot) for pilot in pilots)
        # A step about doubles what a round sends.
        ahead = len(steps) * (share + PILOT * 2 * best.sent / best.rounds / len(search.seeds))
        if spent + ahead > search.budget:
            reason = (
                f"the next trials would pass the budget: {spent / 1e6:.3g} of "
                f"{search.budget / 1e6:g} MB are sent, and they need about {ahead / 1e6:.3g}"
            )
            break
        piloted = [_pilot(search, config) for config in steps]
        carry_out(piloted, 1)  # too short to start processes for
        pilots += piloted
        going = [pilot for pilot in piloted if diverged(pilot) is None]
        lengths = {p.name: round(rounds * first_round / _last_round(p)) for p in going}
        if 0 in lengths.values():
            reason = "a round of the next step would send more than a whole trial"
            break
        numbers = [(c, lengths.get(p.name, 0)) for c, p in zip(steps, piloted, strict=True)]
        carry_out([job for c, number in numbers if number for job in _jobs(search, c, number)])
        pair = [tried(config, number) for config, number in numbers]
        top = max(pair, key=_rating)  # the first of equals: the denser one, which costs no memory
        helps = _rating(top) > _rating(best)
        for trial in pair:
            verdict = "kept" if helps else "does not help"
            if helps and trial is not top:
                verdict = "helps less than the other step"
            trials.append(trial._replace(verdict=trial.verdict or verdict))
            say(_said(search, trials[-1]))
        if not helps:
            reason = "neither a higher rank nor a higher density helps at equal bytes"
            break
        best = top
    return _result(search, trials, best, reason)


def _start(search: Search) -> Config:
    return Config(int(search.table["lora"]["rank"]), 0)


def _steps(search: Search, config: Config) -> list[Config]:
    """The configurations of about twice the bytes: denser, and of higher rank."""
    steps = []
    if 2 * _density(search, config) <= 1:
        steps.append(config._replace(doublings=config.doublings + 1))
    if 2 * config.rank <= search.max_rank:
        steps.append(config._replace(rank=2 * config.rank))
    return steps


def _density(search: Search, config: Config) -> float:
    """The largest density of any client, either way."""
    tiers = search.table["budgets"]
    densest: float = max(max(tier["down"], tier["up"]) for tier in tiers)
    return densest * 2.0**config.doublings


def _table(search: Search, config: Config) -> dict[str, Any]:
    """The recipe at a configuration. The adapter's scale is kept."""
    table = deepcopy(search.table)
    lora = table["lora"]
    more = config.rank / lora["rank"]
    rooted = lora["rslora"] or lora.get("clients") is not None
    lora |= {"rank": config.rank, "alpha": lora["alpha"] * (more**0.5 if rooted else more)}
    for tier in table["budgets"]:
        tier |= {way: 2.0**config.doublings * tier[way] for way in ("down", "up")}
    return table


def _name(search: Search, config: Config) -> str:
    return f"rank-{config.rank}-density-{_density(search, config):g}"


def _jobs(search: Search, config: Config, rounds: int) -> list[Job]:
    """A trial's runs, one a seed."""
    every = max(1, rounds // EVALUATIONS)
    return [_job(search, config, f"seed-{seed}", seed, rounds, every) for seed in search.seeds]


def _pilot(search: Search, config: Config) -> Job:
    return _job(search, config, "pilot", search.seeds[0], PILOT, PILOT)


def _job(search: Search, config: Config, last: str, seed: int, rounds: int, every: int) -> Job:
    table = _table(search, config)
    name = f"{_name(search, config)}/{last}"
    table |= {"name": name.replace("/", " "), "seed": seed, "rounds": rounds}
    table["evaluation"] = {**table.get("evaluation", {}), "on": "validation", "every": every}
    recipe = recipes.check(table, name, allow_code=True)  # of its method it was asked in `prepare`
    return Job(name, recipe, search.folder / name)


def _sent(job: Job) -> int:
    """Payload bytes of a run; none of one that is marked as diverged and has no log."""
    rows = report.rounds(job.folder / rundir.METRICS)
    return rows[-1].total_bytes if rows else 0


def _last_round(job: Job) -> int:
    path = job.folder / rundir.METRICS
    last = report.rounds(path)[-1]
    if last.down_bytes + last.up_bytes == 0:
        raise FedSieveError(f"{path}: round {last.round} sent nothing: remove {job.folder}")
    return last.down_bytes + last.up_bytes


def _rating(trial: Trial) -> float:
    return -math.inf if trial.score is None else trial.score


def _cells(search: Search, trial: Trial) -> dict[str, str]:
    return {
        "rank": str(trial.config.rank),
        "density": f"{_density(search, trial.config):g}",
        "rounds": str(trial.rounds),
        "sent": words.megabytes(trial.sent),
        "validation score": "-" if trial.score is None else words.score(trial.score),
        "verdict": trial.verdict,
    }


def _said(search: Search, trial: Trial) -> str:
    return ", ".join(f"{head} {cell}" for head, cell in _cells(search, trial).items())


def _result(search: Search, trials: Sequence[Trial], best: Trial, reason: str) -> Found:
    """Write the best recipe, search.json, search.md and the report of all trials."""
    rows = [_cells(search, trial) for trial in trials]
    folder = search.folder
    written = [folder / rundir.REPORT, *(folder / f"{TABLE}.{kind}" for kind in ("md", "json"))]
    written.append(folder / BEST)
    notes = [f"Ended because {reason}.", LEGEND]
    plain = {
        "trials": [
            {
                "rank": trial.config.rank,
                "density": _density(search, trial.config),
                "rounds": trial.rounds,
                "sent": trial.sent,
                "score": trial.score,
                "verdict": trial.verdict,
            }
            for trial in trials
        ],
        "best": {"rank": best.config.rank, "density": _density(search, best.config)},
        "reason": reason,
    }
    write_whole(written[1], (markdown(rows) + "".join(f"\n{note}\n" for note in notes)).encode())
    write_whole(written[2], (json.dumps(plain, indent=2) + "\n").encode())
    table = _table(search, best.config) | {"rounds": best.rounds}
    head = (
        f"# Rank {best.config.rank}, density {_density(search, best.config):g}: the best of "
        f"{len(trials)} trials of a search\n"
    )
    write_whole(written[3], (head + tomli_w.dumps(table)).encode())
    groups = {
        _name(search, trial.config): trial.folders for trial in trials if trial.score is not None
    }
    report.write([], written[0], groups=groups)
    return Found(rows, best, reason, written)
