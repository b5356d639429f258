"""A paper's figure, from its file to its picture: run what it needs, measure, draw, judge.

Its parts are ordinary comparisons (compare.py), one after another, so all of it goes on where it
was stopped. A run that a neighbouring figure has done already, with the very same recipe, is copied
and not done again. A part that fails is named, and the others go on.
"""

import copy
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoConfig

from fedsieve.clients.network import DOWNLINK
from fedsieve.data import fetch, hub, sources
from fedsieve.data.paths import is_path
from fedsieve.disk import refuse_link, write_whole
from fedsieve.errors import FedSieveError, count
from fedsieve.recipe import examples
from fedsieve.recipe import read as recipes
from fedsieve.recipe.overrides import flat, put
from fedsieve.report.series import gather, spread
from fedsieve.study import claims, compare, drawn
from fedsieve.study import figures as figuring
from fedsieve.study.claims import WORST_FIRST, Finding, number
from fedsieve.study.compare import markdown
from fedsieve.study.figures import (
    FRONT,
    IN_ALL,
    MEAN,
    CheckTable,
    Figure,
    PanelTable,
    Part,
    Scale,
)
from fedsieve.study.front import Point, front_of
from fedsieve.study.jobs import Known, ShowRound
from fedsieve.study.measured import Measured, numbers_of, rises_of, untold
from fedsieve.study.neighbours import bring
from fedsieve.study.parts import refuse_run
from fedsieve.study.plan import Plan, final_jobs, trial_jobs, worked_out
from fedsieve.study.tables import Settings
from fedsieve.train.model import pretrained

RESULT = "figure"  # .json, .md and .png
_OF_ENTRIES = {"model", "model.source", "data", "data.train", "data.test", "data.config"}
_OF_ROWS = ("data", "partition", "model.task")  # with which the keys of what is read begin
_TOLD = 3  # claims in the last line, those that fare worst first


class Outcome(NamedTuple):
    """What came of a figure. rows: panel -> its table; line: the verdict, in one line."""

    rows: dict[str, list[dict[str, str]]]
    findings: list[Finding]
    line: str
    problems: list[str]
    written: list[Path]


def run(
    source: str,
    scale: Scale,
    folder: Path,
    workers: int,
    show: ShowRound,
    say: Callable[[str], None],
    *,
    seeds: Sequence[int] = (),
    data: Path | None = None,
    allow_code: bool = False,
) -> Outcome:
    """Run a figure, and leave its picture, table and verdict in `folder`.

    source: the figure's name, or its file; data: the folder of the files that its recipes name
    Raises FedSieveError where the figure's file is not right, runner.Stopped if the user stops it.
    """
    refuse_run(folder)
    figure = figuring.load(source)
    parts = figuring.parts(figure, scale, folder, seeds)
    problems: list[str] = []
    measured: dict[str, Measured] = {}
    chosen: dict[Path, dict[str, Settings]] = {}  # a part's folder -> entry -> what tuning found
    known: Known = {}  # of all parts: what is compared stands on the same
    absent = _absent(parts, source, data)
    left_out = _by_cause(parts, absent)
    if len(absent) == len(parts):
        raise FedSieveError(f"nothing of it can be run here: {'; '.join(left_out)}")
    for line in left_out:
        problems.append(line)
        say(f"left out: {line}")
    for nth, part in enumerate(parts):
        of = _measured(figure, part, measured)
        where = _called_part(part)
        if nth in absent:
            continue
        try:
            if part.after is not None:
                part = figuring.with_settings(part, chosen.get(part.after, {}))
            for above in (part.folder, *part.folder.parents):
                if above == folder:
                    break
                refuse_link(above, folder=True)
            base, study = figuring.ready(part, source, data)
            plan = worked_out(study, base, source, part.folder, allow_code=allow_code)
            _bring(plan, folder)
            of_all = f"[part {nth + 1}/{len(parts)}] " if len(parts) > 1 else ""
            say(f"{of_all}{where}: {len(plan.entries)} entries, into {part.folder}")
            result = compare.run(plan, workers, show, say, known)
            chosen[part.folder] = _chosen(plan)
        except FedSieveError as error:
            problems.append(f"{where}: {error}")
            say(f"{where}: left out: {error}")
            continue
        problems += [f"{where}: {each}" for each in result.problems]
        if part.after is None:
            for note in result.notes:
                of.notes.setdefault(note, []).append(part.places[0].name)
        loaded = {one.label: one for one in gather([], result.groups)} if result.groups else {}
        for place in part.places:
            of.runs[place.name] = loaded
    panels = {name: numbers_of(figure, of) for name, of in measured.items()}
    for of in measured.values():
        problems += untold(figure, of, panels[of.name])
    asked = [check for check in figure.check if any(_asks(check, of) for of in measured.values())]
    rises = {name: rises_of(of) for name, of in measured.items()}
    findings = [claims.judged(check, figure, panels, rises) for check in asked]
    return _written(source, scale, figure, folder, measured, panels, findings, problems)


def _called_part(part: Part) -> str:
    return part.panel.name + (f", {part.places[0].name}" if part.places[0].set else "")


def _absent(parts: Sequence[Part], source: str, data: Path | None) -> dict[int, str]:
    """The parts that cannot be run for want of a file, a model or a data set, by number, and why.

    Looked at before the first run begins: hours later it is too late to hear that the last panel
    has no rows, and each of its runs would say it anew.
    """
    found: dict[int, str] = {}
    known: dict[tuple[str, str | None], str | None] = {}
    read: dict[str, list[str]] = {}
    for nth, part in enumerate(parts):
        said = []
        try:
            asked = figuring.needs(part, source)
        except FedSieveError as error:
            found[nth] = str(error)
            continue
        # Where entries name their own, their runs tell which of them have what is not here.
        own = {key for entry in part.study.entry for key, _ in flat(entry.set)}
        try:
            base, study = figuring.ready(part, source, data)
            if asked.files and not any(key.startswith(_OF_ROWS) for key in own):
                said += _unread(base, study.set, source, read)
        except FedSieveError as error:
            said.append(str(error))
        if not _OF_ENTRIES & own:
            said += _names_not_here(asked, known)
        if said:
            found[nth] = "; ".join(said)
    return found


def _unread(
    base: Mapping[str, Any], changes: Mapping[str, Any], source: str, known: dict[str, list[str]]
) -> list[str]:
    """Why the rows of files that the user gave cannot be read as a part's recipe has them.

    known: what was found out of each [data] before, and is now
    """
    table = copy.deepcopy(dict(base))
    for key, value in flat(changes):
        put(table, key, value, f"{source}: set.{key}")
    recipe: Any = recipes.parse({**table, "method": {"name": "fedit"}}, source)
    data, said = recipe.data, json.dumps(table["data"], sort_keys=True, default=str)
    if said not in known:
        known[said] = []
        try:
            examples.load_rows(data, data.train, data.train_split, recipe.partition.reads)
            if data.test is not None or data.test_split is not None:
                examples.load_rows(data, data.test or data.train, data.test_split)
            examples.load_more(data)
        except FedSieveError as error:
            known[said] = [str(error)]
    return known[said]


def _names_not_here(
    asked: figuring.Needs, known: dict[tuple[str, str | None], str | None]
) -> list[str]:
    """What cannot be loaded of the models and data sets that are no files here, in sentences.

    known: what was found out of each before, and is now
    """
    names = (*asked.models, *asked.sets)
    for looked in names:
        if looked not in known:
            known[looked] = _not_here(*looked, model=looked in asked.models)
    gone = {looked[0]: why for looked in names if (why := known[looked])}
    of_hub = [] if hub.reachable() else [name for name in gone if fetch.instead_of(name)]
    said = [why for name, why in gone.items() if name not in of_hub]
    if of_hub:
        is_not, it = ("is not", "it") if len(of_hub) == 1 else ("are not", "them")
        said.append(
            f"{' and '.join(of_hub)} {is_not} here (looked up {hub.places()}): load {it} on a "
            "machine that reaches the hub, and bring its cache here (the folder of `HF_HOME`)"
        )
    return said


def _not_here(name: str, config: str | None, *, model: bool) -> str | None:
    """Why what is no file here cannot be loaded; None where it can."""
    if is_path(name):
        return f"there is no {name}"
    try:
        if model:
            pretrained(AutoConfig, name)
        else:
            sources.refuse_absent(name, config)
    except FedSieveError as error:
        return str(error)
    return None


def _by_cause(parts: Sequence[Part], absent: Mapping[int, str]) -> list[str]:
    """The parts that are absent, those of one cause in one line; a panel all of whose parts are has
    its name alone.
    """
    lines = []
    for why in dict.fromkeys(absent.values()):
        left: dict[str, list[Part]] = {}
        for nth, each in absent.items():
            if each == why:
                left.setdefault(parts[nth].panel.name, []).append(parts[nth])
        names = [
            panel
            if len(those) == sum(part.panel.name == panel for part in parts)
            else "; ".join(map(_called_part, those))
            for panel, those in left.items()
        ]
        lines.append(f"{'; '.join(names)}: {why}")
    return lines


def _legend(figure: Figure, panel: PanelTable) -> str:
    """How to read a panel's table."""
    text = "Mean ± standard deviation of the sample, over seeds."
    if panel.target is not None and figure.y not in ("score", "memory megabytes"):
        text += f" What it takes to a score of {panel.target:g}."
    if figure.y == "seconds":
        text += f" Seconds are simulated, for downlinks of {DOWNLINK:g} Mbit/s."
    return text


def _noted(notes: Mapping[str, Sequence[str]]) -> list[str]:
    """What parts said of themselves: what all of them said once, and else of which place it is."""
    every = {place for places in notes.values() for place in places}
    return [
        note if len(places) == len(every) else f"{', '.join(places)}: {note}"
        for note, places in notes.items()
    ]


def _measured(figure: Figure, part: Part, known: dict[str, Measured]) -> Measured:
    name = part.panel.name
    entries = [entry.name for entry in part.study.entry]
    fresh = Measured(name, part.panel, [], {}, entries, {})
    of = known.setdefault(name, fresh)
    of.places.extend(part.places)
    of.places.sort(key=figure.place.index)
    return of


def _asks(check: CheckTable, of: Measured) -> bool:
    """Whether a claim is of what this panel is to run; a small one may leave entries out."""
    sides = {check.left, check.right or check.left}
    at = {check.at, check.left_at, check.right_at} - {None, MEAN}
    return (
        check.panel in (None, of.name)
        and sides <= {*of.entries}
        and at <= {place.name for place in of.places}
    )


def _bring(plan: Plan, folder: Path) -> None:
    """Copy what a figure beside this one has run with the very recipe that is asked for here."""
    bring(trial_jobs(plan), folder)
    bring(final_jobs(plan, _chosen(plan)), folder)


def _chosen(plan: Plan) -> dict[str, Settings]:
    """What each entry is run with beside its own: nothing where it is not tuned."""
    found: dict[str, Settings] = {entry.name: {} for entry in plan.entries if not entry.trials}
    tuned = compare.judge(plan) if plan.tune is not None else {}
    return found | {n: t.trials[t.best].settings for n, t in tuned.items() if t.best is not None}


def _written(
    source: str,
    scale: Scale,
    figure: Figure,
    folder: Path,
    measured: Mapping[str, Measured],
    panels: Mapping[str, claims.Numbers],
    findings: list[Finding],
    problems: list[str],
) -> Outcome:
    fronts = {name: front_of(figure, of, panels[name]) for name, of in measured.items()}
    rows = {
        name: _front_table(of, panels[name], fronts[name])
        if figure.x == IN_ALL
        else _table(figure, name, of, panels[name][figure.y])
        for name, of in measured.items()
    }
    notes = {n: [_legend(figure, of.panel), *_noted(of.notes)] for n, of in measured.items()}
    head, worst = _line(source, scale, figure, findings, panels)
    line = f"{head}: {worst}" if worst else head
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / f"{RESULT}.{kind}" for kind in ("png", "md", "json")]
    for path in written:
        refuse_link(path)
    image = drawn.picture(figure, measured, panels, fronts)
    if image is not None:
        write_whole(written[0], image)
    else:
        written = written[1:]
    settings = {name: _settings(of) for name, of in measured.items()}
    text = [f"# {source}: {figure.title}\n", f"{figure.claim}\n"]
    text += [f"*{remark}*\n" for remark in figure.remarks]
    if image is not None:
        text.append(f"![{figure.title}]({RESULT}.png)\n")
    if figure.x == IN_ALL:
        text.append("Bold: no other run has at least its score for at most its bytes.\n")
    for name, table in rows.items():
        text += [
            f"## {name}\n",
            *([f"{sizes(settings[name])}.\n"] if settings[name] else []),
            markdown(table),
            *(f"- {note}" for note in notes[name]),
            "",
        ]
    text += [f"- failed: {problem.splitlines()[0][:500]}" for problem in problems]
    text += [*(f"- {said(each)}" for each in findings), "", f"{head}.", ""]
    write_whole(folder / f"{RESULT}.md", "\n".join(text).encode())
    told = {
        "figure": source,
        "scale": scale,
        "rows": rows,
        "settings": settings,
        "notes": notes,
        "values": {
            name: {m: _plain(values) for m, values in of.items()} for name, of in panels.items()
        },
        "checks": [each._asdict() for each in findings],
        "verdict": claims.of_all(findings),
        "line": line,
        "problems": problems,
    }
    write_whole(folder / f"{RESULT}.json", (json.dumps(told, indent=1) + "\n").encode())
    return Outcome(rows, findings, line, problems, written)


def _plain(values: Any) -> Any:
    """JSON has neither infinity nor NaN."""
    if isinstance(values, Mapping):
        return {str(key): _plain(each) for key, each in values.items()}
    return values if math.isfinite(values) else number(values)


def _settings(of: Measured) -> dict[str, Any]:
    """The sizes of a panel's runs, as the first one had them, and all places' rows."""
    runs = [run for place in of.runs.values() for one in place.values() for run in one.runs]
    if not runs:
        return {}
    recipe = runs[0].recipe
    rows = dict.fromkeys(_called(run.recipe["data"]["train"]) for run in runs)
    return {
        "model": _called(recipe["model"]["source"]),
        "data": ", ".join(rows),
        "partition": recipe["partition"],
        "rounds": recipe["rounds"],
        "cohort": recipe["cohort"],
        "target": of.panel.target,
    }


def sizes(own: Mapping[str, Any]) -> str:
    """These in words: "minilm-l6 on 20newsgroups, 20 clients, 10 a round, 30 rounds"."""
    dealt = own["partition"]
    clients = (
        f"a client a {dealt['column']}" if "column" in dealt else f"{dealt['clients']} clients"
    )
    costs = f"; costs to a score of {own['target']:g}" if own["target"] else ""
    return (
        f"{own['model']} on {own['data']}, {clients}, {own['cohort']} a round, "
        f"{count(own['rounds'], 'round')}{costs}"
    )


def _called(source: str) -> str:
    """A source without the folder in which one machine has it: `--data` says that."""
    path = Path(source)
    if not path.is_absolute():
        return source
    return f"{path.parent.name}/{path.name}" if path.suffix else path.name


def _table(figure: Figure, panel: str, of: Measured, values: claims.Values) -> list[dict[str, str]]:
    """A row an entry, a column a place: mean and deviation over seeds, and the paper's number."""
    printed = figure.numbers.get(panel, {})
    names = [place.name for place in of.places]
    rows = []
    for entry in of.entries:
        cells = {"": entry}
        for name in names:
            cells[name] = _cell(values[entry].get(name, {}), printed.get(entry, {}).get(name))
        if len(names) > 1 and figure.y == "score":
            theirs = [printed.get(entry, {}).get(name) for name in names]
            known = [each for each in theirs if each is not None]
            mean = statistics.fmean(known) if len(known) == len(names) else None
            cells[MEAN] = _cell(claims.over_places(values[entry], names), mean)
        rows.append(cells)
    return rows


def _front_table(
    of: Measured, numbers: claims.Numbers, best: Sequence[Point]
) -> list[dict[str, str]]:
    """A row an entry, a column a place: the score, and at how many bytes; bold on the front."""
    on = {(point.entry, point.place) for point in best}
    rows = []
    for entry in of.entries:
        cells = {"": entry}
        for place in of.places:
            sent, score = (_cell(numbers[m][entry][place.name], None) for m in FRONT)
            bold = "**" if (entry, place.name) in on else ""
            told = f"{bold}{score}{bold} at {sent.partition(' ')[0]} MB"
            cells[place.name] = told if sent != "-" else sent
        rows.append(cells)
    return rows


def _cell(seeds: Mapping[int, float], printed: float | None) -> str:
    paper = "" if printed is None else f" (paper {printed:g})"
    found = spread([*seeds.values()])
    if found is None:
        return f"-{paper}"
    deviation = "" if found.deviation is None else f" ± {number(found.deviation)}"
    return f"{number(found.mean)}{deviation if math.isfinite(found.mean) else ''}{paper}"


def said(finding: Finding) -> str:
    """A claim and what became of it, in one line."""
    holding, of = finding.seeds
    seeds = ""
    if of and finding.verdict == "holds":
        seeds = f", in {holding} of {count(of, 'seed')}"
    elif of:
        seeds = f" (holds in {holding} of {count(of, 'seed')})"
    measured = f": {finding.measured}" if finding.measured else ""
    return f"{finding.verdict}{seeds}: {finding.says}{measured}"


def _line(
    source: str,
    scale: Scale,
    figure: Figure,
    findings: list[Finding],
    panels: Mapping[str, claims.Numbers],
) -> tuple[str, str]:
    """The verdict in a line: how many claims hold, and those that fare worst."""
    holding = sum(each.verdict == "holds" for each in findings)
    seeds = {
        seed
        for numbers in panels.values()
        for places in numbers[figure.y].values()
        for of_place in places.values()
        for seed in of_place
    }
    left_out = len(figure.check) - len(findings)
    worst = sorted(findings, key=lambda each: WORST_FIRST.index(each.verdict))[:_TOLD]
    verb = "holds" if len(findings) == 1 else "hold"
    more = f" ({left_out} more are of what this form leaves out)" if left_out else ""
    return (
        f"{source} ({scale}, {count(len(seeds), 'seed')}): {claims.of_all(findings)}. "
        f"The claim: {figure.claim} Here {holding} of {count(len(findings), 'claim')} {verb}{more}",
        "; ".join(said(each) for each in worst),
    )
