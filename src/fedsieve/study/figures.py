"""Figures and tables of papers, each one TOML file: what it claims, what it runs, what it shows.

A figure is a study (tables.py) over two more axes. Its *places* stand along the horizontal axis: a
rank, a density, a task; its *panels* stand below each other: a data set with its model, each with
a recipe of its own. `[[small]]` and `[[paper]]` are two lists of panels, and all that differs
between a figure that runs here and one of the paper's sizes. What runs is a *part*: the entries at
one panel, and at those of its places whose settings are one, as one ordinary study.

`[[check]]` is what the paper claims as a comparison of numbers. docs/papers.md describes the keys.
Nothing here needs torch.
"""

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import Field, ValidationError, model_validator

from fedsieve.data import fetch
from fedsieve.disk import bytes_of, parsed
from fedsieve.disk import place as path_of
from fedsieve.errors import FedSieveError, count, few, nearest, printable, quoted, reason
from fedsieve.recipe import lines
from fedsieve.recipe import read as recipes
from fedsieve.recipe.overrides import flat, put
from fedsieve.settings import Share, Table
from fedsieve.study.tables import MOST, TAKEN, EntryTable, Name, Seeds, Settings, Study, TuneTable

Scale = Literal["small", "paper"]
SCALES: tuple[Scale, ...] = get_args(Scale)
Measure = Literal[
    "score", "megabytes", "megabytes down", "megabytes up", "seconds", "memory megabytes"
]
IN_ALL = "megabytes in all"  # the x of a front
FRONT: tuple[Measure, Measure] = ("megabytes", "score")  # what it is of
MEAN = "mean"  # the place of a check that is of the mean over all places
DATA = "{data}/"  # how a recipe's path begins that lies in the folder of --data
SETTINGS = "settings"  # beside the figures of the papers: the recipes of their panels
_OF_PANELS = ("small", "paper", "numbers")
PUBLISHED = "published.toml"  # what `python -m tests.papers_page` writes


Number = Annotated[float, Field(ge=-1e30, le=1e30)]  # of which differences can be drawn


class PlaceTable(Table):
    """A place along the axis.

    x: where it stands; without one, places stand side by side
    set: of all entries there; an entry's own settings come later, and win
    metric: which is told there; None is the panel's
    uplink: of `seconds`: the uplink's rate, as a share of the downlink's
    """

    name: Name
    x: Number | None = None
    set: Settings = Field(default_factory=dict)
    metric: str | None = None
    uplink: Annotated[float, Field(ge=1e-9, le=1e9)] = 1.0


class PanelTable(Table):
    """What the entries are run on: a recipe (of papers/settings, shipped, or a file), changed.

    seeds, tune: in the place of the figure's, and of entries' own grids; a tune whose grid is []
        leaves all entries untuned
    target: the score to which costs are counted; without one they are those of the whole run
    metrics: whose mean is told at places that name none; by default the leading one
    entries, places: only these, of which there are some
    needs: what it takes beyond what its recipe names, in words
    """

    name: Name
    recipe: str
    set: Settings = Field(default_factory=dict)
    seeds: Seeds | None = None
    target: Share | None = None
    tune: TuneTable | None = None
    metrics: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    entries: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    places: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    needs: str = ""


class CheckTable(Table):
    """A claim: a number of `left` against one of `right`, at one place or at every one.

    right: another entry, or None: the same at another place
    at: of both; or left_at and right_at. "mean" is the mean over all places
    measure: None is the figure's
    panel: None is all
    least, most: bounds of left / right, and within them; above: what left - right is beyond, so
                 that of two alike neither is above the other
    """

    says: str
    left: str
    right: str | None = None
    at: str | None = None
    left_at: str | None = None
    right_at: str | None = None
    measure: Measure | None = None
    panel: str | None = None
    least: Number | None = None
    most: Number | None = None
    above: Number | None = None

    @model_validator(mode="after")
    def _says_something(self) -> "CheckTable":
        if (self.least, self.most, self.above) == (None, None, None):
            raise ValueError("give least, most or above: the bound that is claimed")
        if (self.left_at is None) != (self.right_at is None) or (self.at and self.left_at):
            raise ValueError("give at, of both sides, or left_at and right_at")
        if self.right is None and self.left_at is None:
            raise ValueError("give right, or left_at and right_at: a number is not its own rival")
        return self


class Figure(Table):
    """A figure or table of a paper.

    draws: what the paper calls each that is drawn here, where the file's name is none of them
    x: what the horizontal axis is: the places, how far a run has come, or ("megabytes in all") what
        it sent, of which the Pareto front is drawn
    y: what is told of a run; of `x` other than places the leading score
    tune_at: the place that is tuned; the others take what each entry chose there
    relative_to: the entry whose y at the same place is 1
    numbers: the paper's own: panel -> entry -> place -> number, in the unit of y (scores as shares)
    small, paper: panels of this machine's sizes and of the paper's, of which there are some
    remarks: what is other than in the paper at any scale
    """

    draws: tuple[Name, ...] = ()
    title: str
    claim: str
    x: Literal["place", "round", "megabytes", "megabytes up", "megabytes in all"] = "place"
    x_label: str = ""
    log: bool = False
    y: Measure = "score"
    relative_to: str | None = None
    remarks: tuple[str, ...] = ()
    seeds: Seeds = (0, 1, 2)
    set: Settings = Field(default_factory=dict)
    tune: TuneTable | None = None
    tune_at: str | None = None
    entry: Annotated[tuple[EntryTable, ...], Field(min_length=1, max_length=MOST)]
    place: Annotated[tuple[PlaceTable, ...], Field(min_length=1, max_length=MOST)] = (
        PlaceTable(name="all"),
    )
    small: tuple[PanelTable, ...] = ()
    paper: tuple[PanelTable, ...] = ()
    check: tuple[CheckTable, ...] = ()
    numbers: dict[str, dict[str, dict[str, Number]]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _names_that_are_there(self) -> "Figure":
        entries = [entry.name for entry in self.entry]
        places = [place.name for place in self.place]
        panels = [panel.name for panel in (*self.small, *self.paper)]
        if not panels:
            raise ValueError("give [[small]] or [[paper]]: the panels, each with a recipe")
        if len({*places}) < len(places):
            raise ValueError("place: two have one name")
        for number, name in enumerate(places):
            if name.strip().lower() == MEAN:
                raise ValueError(
                    f"place.{number}.name: {quoted(name)} is the mean over all places, in tables "
                    "and claims: give it another name"
                )
        folders = [entry.name.strip().lower() for entry in self.entry]
        for number, name in enumerate(folders):
            if name in folders[:number]:
                raise ValueError(
                    f"entry.{number}.name: two entries are called {quoted(entries[number])}"
                )
        for name in (*places, *panels):
            if not slug(name):
                raise ValueError(
                    f"{quoted(printable(name))} has no letter or digit: it names a folder"
                )
            if slug(name).startswith(TAKEN):
                raise ValueError(
                    f"{quoted(name)} names a folder beside {', '.join(TAKEN)}: give it another name"
                )
        for name in ("small", "paper"):
            _refuse_one_folder(name, _folders(self, getattr(self, name)))
        for check in self.check:
            at = (check.at, check.left_at, check.right_at)
            _refuse_unknown("check", (check.left, check.right), entries)
            _refuse_unknown("check", at, [*places, MEAN])
            _refuse_unknown("check", (check.panel,), panels)
        for panel in (*self.small, *self.paper):
            _refuse_unknown(panel.name, panel.entries or (), entries)
            _refuse_unknown(panel.name, panel.places or (), places)
        _refuse_unknown("numbers", self.numbers, panels)
        for rows in self.numbers.values():
            _refuse_unknown("numbers", rows, entries)
            for row in rows.values():
                _refuse_unknown("numbers", row, places)
        _refuse_unknown("relative_to", (self.relative_to,), entries)
        _refuse_unknown("tune_at", (self.tune_at,), places)
        for panel in (*self.small, *self.paper):
            if self.tune_at is not None and self.tune_at not in (panel.places or places):
                raise ValueError(f"{panel.name}: tune_at: it is without {quoted(self.tune_at)}")
            if self.tune_at is not None and not (panel.tune or self.tune):
                raise ValueError(f"{panel.name}: tune_at: there is no [tune]")
            if panel.target is not None and self.x == IN_ALL:
                raise ValueError(f"{panel.name}: target: a front is of whole runs")
        along = [place.x for place in self.place if place.x is not None]
        if self.log and self.x == "place" and min(along, default=1) <= 0:
            raise ValueError("place.x: on a logarithmic axis it is more than zero")
        return self


class Part(NamedTuple):
    """One study of a figure: a panel, and the places whose runs it holds.

    after: the folder of the part, an earlier one, whose entries chose the settings for these
    """

    panel: PanelTable
    places: tuple[PlaceTable, ...]
    study: Study
    folder: Path
    after: Path | None = None


def _refuse_unknown(
    where: str, given: Sequence[str | None] | Mapping[str, Any], known: Any
) -> None:
    for name in given:
        if name is not None and name not in known:
            raise ValueError(f"{where}: {quoted(name)} is not there{nearest(name, known)}")


def _refuse_one_folder(what: str, folders: Iterable[Path]) -> None:
    """Raises ValueError for runs that would meet in one folder."""
    found: set[Path] = set()
    for folder in folders:
        if folder in found:
            raise ValueError(
                f"{what}: two parts would have the folder {quoted(str(folder))}: name them apart"
            )
        found.add(folder)


def _folders(figure: Figure, panels: Sequence[PanelTable]) -> Iterator[Path]:
    """Of each part, and of each entry of one that lies beside another's, below where the figure's
    go.
    """
    for panel in panels:
        for group in _groups(figure, panel):
            below = _below(panel, group)
            yield below
            if below == Path(slug(panel.name)):
                yield from (below / entry.name.lower() for entry in figure.entry)


def _below(panel: PanelTable, places: Sequence[PlaceTable]) -> Path:
    own = Path(slug(panel.name))
    return own / slug(places[0].name) if places[0].set else own


def _groups(figure: Figure, panel: PanelTable) -> list[list[PlaceTable]]:
    """The places of a panel; those that set the same are told of the same runs."""
    groups: list[list[PlaceTable]] = []
    for place in figure.place:
        if panel.places is not None and place.name not in panel.places:
            continue
        alike = (group for group in groups if group[0].set == place.set)
        if (group := next(alike, None)) is None:
            groups.append([place])
        else:
            group.append(place)
    return groups


def shipped() -> dict[str, str]:
    """The figures that ship with FedSieve, by name ("flasc/fig5"), as text."""
    found = {}
    for paper in sorted(_papers().iterdir(), key=lambda entry: entry.name):
        if paper.is_dir() and paper.name != SETTINGS:
            files = [entry for entry in paper.iterdir() if entry.name.endswith(".toml")]
            for entry in sorted(files, key=lambda entry: Path(entry.name).stem):
                found[f"{paper.name}/{Path(entry.name).stem}"] = entry.read_text(encoding="utf-8")
    return found


def called(name: str) -> str:
    """The shipped figure that a person means by its name, or by a number of the paper's that it
    draws: "fslora/fig5" is in fslora/fig2-3a-5. What means a file is given back as it is.

    Raises FedSieveError, with the nearest, where there is none, and where there are several.
    """
    known = shipped()
    if name.endswith(".toml") or name in known:
        return name
    meant = name.lower()
    drawn: dict[str, list[str]] = {}
    for figure, text in known.items():
        paper = figure.partition("/")[0]
        for each in recipes.toml(text, figure).get("draws", ()):
            drawn.setdefault(f"{paper}/{each}", []).append(figure)
    found = [meant] if meant in known else drawn.get(meant, [])
    if len(found) > 1:
        raise FedSieveError(f"{name} is {' and '.join(found)}: run one after the other")
    if not found:
        told = nearest(meant, {*known, *drawn})
        raise FedSieveError(f"no figure is called {quoted(name)}{told}")
    return found[0]


def load(source: str) -> Figure:
    """A figure by its name, or a file. Raises FedSieveError, naming the key, for what is wrong."""
    if source.endswith(".toml"):
        try:
            text = recipes.text_of(Path(source))
        except (OSError, ValueError) as error:
            raise FedSieveError(f"the figure {source} cannot be read: {reason(error)}") from error
    else:
        known = shipped()
        if source not in known:
            raise FedSieveError(f"no figure is called {quoted(source)}{nearest(source, known)}")
        text = known[source]
    table = recipes.toml(text, f"the figure {source}")
    own = table
    if "like" in table:
        table = _like(str(table["like"]), {k: v for k, v in own.items() if k != "like"}, source)
    try:
        return Figure.model_validate(table)
    except ValidationError as error:
        raise FedSieveError(lines.explained(error, source, text, own, _keys)) from error


def _like(other: str, own: Mapping[str, Any], source: str) -> dict[str, Any]:
    """A figure that is one of the shipped ones over panels of its own: what it does not say itself
    is said there.
    """
    known = shipped()
    if other not in known:
        raise FedSieveError(
            f"{source}: like: no figure is called {quoted(other)}{nearest(other, known)}"
        )
    table = recipes.toml(known[other], f"the figure {other}")
    return {key: value for key, value in table.items() if key not in _OF_PANELS} | dict(own)


def parts(figure: Figure, scale: Scale, folder: Path, seeds: Sequence[int] = ()) -> list[Part]:
    """What a figure runs at a scale; folder: where all of it goes; seeds: in the place of its own.

    Raises FedSieveError where it has no panel of that scale.
    """
    panels = figure.small if scale == "small" else figure.paper
    if not panels:
        raise FedSieveError(
            "this figure has no small form: give --scale paper, which needs what the list says"
            if scale == "small"
            else "this figure has no panels of a paper's sizes: give --scale small"
        )
    found = []
    for panel in panels:
        entries = tuple(
            entry for entry in figure.entry if panel.entries is None or entry.name in panel.entries
        )
        if panel.tune is not None:  # entries' own grids are for the figure's
            own: list[Any] | None = None if panel.tune.grid else []
            entries = tuple(entry.model_copy(update={"grid": own}) for entry in entries)
        groups = _groups(figure, panel)
        first = next((g for g in groups if any(p.name == figure.tune_at for p in g)), None)
        for group in groups if first is None else [first, *(g for g in groups if g is not first)]:
            study = Study(
                recipe=panel.recipe,
                seeds=tuple(seeds) or panel.seeds or figure.seeds,
                target=panel.target,
                set={**figure.set, **panel.set, **group[0].set},
                entry=entries,
                tune=panel.tune or figure.tune,
            )
            after = None if first in (None, group) else folder / _below(panel, first)
            if after is not None:
                # [tune] stays: it holds back the same rows.
                untuned = tuple(entry.model_copy(update={"grid": []}) for entry in entries)
                study = study.model_copy(update={"entry": untuned})
            found.append(Part(panel, tuple(group), study, folder / _below(panel, group), after))
    return found


def with_settings(part: Part, chosen: Mapping[str, Settings]) -> Part:
    """The part with what each entry chose; without those that chose nothing.

    Raises FedSieveError where that is all of them.
    """
    entries = tuple(
        entry.model_copy(
            update={"set": {**dict(flat(entry.set)), **dict(flat(chosen[entry.name]))}}
        )
        for entry in part.study.entry
        if entry.name in chosen
    )
    if not entries:
        raise FedSieveError("no entry has settings: none of the trials has won")
    return part._replace(study=part.study.model_copy(update={"entry": entries}))


def ready(part: Part, source: str, data: Path | None) -> tuple[dict[str, Any], Study]:
    """The recipe of a part's panel, as it is written, and its study; the paths of --data in both.

    source: the figure's name or file, beside which a recipe's file may lie
    Raises FedSieveError, saying what to do, where a file that either names is not there.
    """
    names = [path.removeprefix(DATA) for path in _of_data(_whole(part, source))]
    if names and data is None:
        raise FedSieveError(
            f"it needs {few(names, _SHOWN)}, no part of FedSieve: give --data and the folder in "
            "which they lie so"
        )
    if names and data is not None and not data.is_dir():
        raise FedSieveError(f"--data: there is no folder {data}")
    gone = [name for name in names if data is not None and not path_of(data / name).exists()]
    if gone:
        raise FedSieveError(f"there is no {few(gone, _SHOWN)} in the folder {data}")
    study = part.study.model_copy(update={"set": _filled(part.study.set, data)})
    return dict(_filled(_recipe(part.panel.recipe, source), data)), study


_SHOWN = 12  # files of --data


class Needs(NamedTuple):
    """What a part's recipe names, by where it comes from; and what its panel says beside.

    models, sets: of the hub; a data set with its configuration
    """

    fetched: tuple[str, ...]
    files: tuple[str, ...]
    models: tuple[tuple[str, None], ...]
    sets: tuple[tuple[str, str | None], ...]
    words: str

    @property
    def hub(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for name, _ in (*self.models, *self.sets)))


def needs(part: Part, source: str) -> Needs:
    """What has to be there before a part runs."""
    table = _whole(part, source)
    # Not the file's own name: the recipe's keys stand on none of its lines.
    where = f"{source}, the recipe of {part.panel.name!r} with what is set"
    full: Any = recipes.parse({**table, "method": {"name": "fedit"}}, where)
    model, data = full.model.source, full.data
    named = (model, data.train, data.test)
    names = dict.fromkeys(name for name in named if name and not name.startswith(DATA))
    fetched = tuple(name for name in names if name in fetch.PACKAGES)
    hub = [name for name in names if name not in fetched and not path_of(name).exists()]
    files = tuple(name.removeprefix(DATA) for name in _of_data(table))
    return Needs(
        fetched,
        files,
        ((model, None),) if model in hub else (),
        tuple((name, data.config) for name in hub if name in (data.train, data.test)),
        part.panel.needs,
    )


def needs_of(figure: Figure, scale: Scale, source: str) -> dict[str, Needs]:
    """What has to be there before each panel runs, that of all its parts together."""
    found: dict[str, Needs] = {}
    for part in parts(figure, scale, Path()):
        here, name = needs(part, source), part.panel.name
        found[name] = _joined(found[name], here) if name in found else here
    return found


def _joined(left: Needs, right: Needs) -> Needs:
    return Needs(
        tuple(dict.fromkeys((*left.fetched, *right.fetched))),
        tuple(dict.fromkeys((*left.files, *right.files))),
        tuple(dict.fromkeys((*left.models, *right.models))),
        tuple(dict.fromkeys((*left.sets, *right.sets))),
        "; ".join(dict.fromkeys(words for words in (left.words, right.words) if words)),
    )


def missing(found: Needs, data: Path | None) -> list[str]:
    """What of it is not on this machine, in words. The hub is not asked."""
    said = []
    gone = [name for name in found.fetched if not (fetch.cache_folder() / name).is_dir()]
    if gone:
        said.append(f"`fedsieve fetch {' '.join(gone)}`")
    files = [name for name in found.files if data is None or not (data / name).exists()]
    if files:
        said += [f"{name} in --data" for name in by_folder(files)]
    if found.hub:
        said += [f"{name} of the hub" for name in found.hub]
    if found.words:
        said.append(found.words)
    return said


_LARGEST = 1 << 24  # bytes of a figure.json


def state(source: str, figure: Figure, scale: Scale, data: Path | None) -> str:
    """What came out of a figure here, or what it needs that is not here, in words."""
    told = folder_of(source, scale) / "figure.json"
    if told.is_file():
        with contextlib.suppress(OSError, FedSieveError, KeyError):
            verdict = parsed(bytes_of(told, _LARGEST), str(told))["verdict"]
            return f"run here: {printable(str(verdict))[:80]} ({told.parent})"
    if not (figure.small if scale == "small" else figure.paper):
        return "none"
    verdict = published().get(source) if scale == "small" else None
    before = f"measured here (docs/papers.md): {verdict}; " if verdict else ""
    gone: dict[str, dict[str, None]] = {}
    panels = needs_of(figure, scale, source)
    for panel, needed in panels.items():
        for each in missing(needed, data):
            gone.setdefault(each, {})[panel] = None
    said = [
        need if len(of) == len(panels) else f"{need} (for {', '.join(of)})"
        for need, of in gone.items()
    ]
    return before + (f"needs {'; '.join(said)}: ready otherwise" if said else "ready")


def published() -> dict[str, str]:
    """The figures that docs/papers.md has results of, in small: name -> verdict and seeds."""
    told = (_papers() / PUBLISHED).read_text(encoding="utf-8")
    return {name: str(verdict) for name, verdict in recipes.toml(told, PUBLISHED).items()}


def scale_of(name: str) -> Scale:
    """Raises FedSieveError for a name that is none."""
    for scale in SCALES:
        if scale == name:
            return scale
    raise FedSieveError(f"--scale {name[:80]!r}: there are {' and '.join(SCALES)}")


def folder_of(source: str, scale: Scale) -> Path:
    """Where a figure goes by default."""
    return Path("runs") / "papers" / f"{slug(source.removesuffix('.toml'))}-{scale}"


def by_folder(files: Sequence[str]) -> list[str]:
    """Files of --data in words, those of one folder together."""
    found: dict[str, list[str]] = {}
    for name in files:
        found.setdefault(name.partition("/")[0], []).append(name)
    return [
        names[0] if len(names) == 1 else f"{top}/ ({count(len(names), 'file')})"
        for top, names in found.items()
    ]


def slug(name: str) -> str:
    """A name as a folder's: never "." or ".."."""
    return re.sub(r"[^\w.]+", "-", name.lower()).strip("-.")


def _papers() -> Any:
    return resources.files("fedsieve") / "recipes" / "papers"


def _recipe(name: str, source: str) -> dict[str, Any]:
    """A panel's recipe: of the papers' settings, a file beside the figure, or a shipped one."""
    beside = Path(source).parent / path_of(name)
    path_of(f"{name}.toml")  # refuses what can be no file's name
    own = _papers() / SETTINGS / f"{name}.toml"
    if own.is_file():
        return recipes.toml(own.read_text(encoding="utf-8"), name)
    return recipes.read(str(beside) if beside.is_file() else name)


def _whole(part: Part, source: str) -> dict[str, Any]:
    """The recipe of a part, less what its entries change."""
    table = _recipe(part.panel.recipe, source)
    for key, value in flat(part.study.set):
        put(table, key, value, f"{source}: set.{key}")
    return table


def _of_data(table: Mapping[str, Any]) -> list[str]:
    """The paths in a recipe that lie in the folder of --data."""
    return sorted({text for text in _texts(table) if text.startswith(DATA)})


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(each)


def _filled(value: Any, data: Path | None) -> Any:
    """The same with `data` in the place of {data} at the beginning of a text."""
    if isinstance(value, str) and data is not None and value.startswith(DATA):
        return str(data / value.removeprefix(DATA))
    if isinstance(value, Mapping):
        return {key: _filled(each, data) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_filled(each, data) for each in value]
    return value


_TABLES: dict[str, type[Table]] = {
    "entry": EntryTable,
    "tune": TuneTable,
    "place": PlaceTable,
    "small": PanelTable,
    "paper": PanelTable,
    "check": CheckTable,
}


def _keys(path: Sequence[str | int]) -> list[str]:
    return list((_TABLES.get(str(path[0]), Figure) if path else Figure).model_fields)
