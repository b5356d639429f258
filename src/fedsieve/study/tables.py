"""The keys of a study's file, by themselves: nothing here needs torch. plan.py works them out."""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, Field, NonNegativeInt

from fedsieve.errors import quoted
from fedsieve.settings import Share, Table

MOST = 1000  # seeds, entries or places
LONGEST = 100  # letters of a name, which is a folder's too
# How the files of a study, a search or a figure begin, beside which folders of runs lie.
TAKEN = ("report.html", "table.", "tuning.json", "search.", "figure.")
Name = Annotated[str, Field(max_length=LONGEST)]
Seeds = Annotated[tuple[NonNegativeInt, ...], Field(min_length=1, max_length=MOST)]
Settings = dict[str, Any]


def _with_values(grid: dict[str, list[Any]] | list[Settings]) -> Any:
    """Raises ValueError for a key without values: of none there is no combination, and what was to
    be tuned would run untuned.
    """
    for key, values in grid.items() if isinstance(grid, dict) else ():
        if not values:
            raise ValueError(
                f"{quoted(key)} has no values to try: give some, or take it out (a grid that is [] "
                "leaves entries untuned)"
            )
    return grid


Grid = Annotated[dict[str, list[Any]] | list[Settings], AfterValidator(_with_values)]


class EntryTable(Table):
    """A method and its own settings; `grid` replaces that of [tune], and [] leaves it untuned."""

    name: str
    method: str | None = None
    set: Settings = Field(default_factory=dict)
    seeds: Seeds | None = None
    grid: Grid | None = None


class TuneTable(Table):
    """Settings to try: lists by dotted key (every combination), or a list of sets of settings."""

    grid: Grid
    seeds: Seeds = (100,)
    set: Settings = Field(default_factory=dict)


class Study(Table):
    """A whole comparison."""

    recipe: str
    seeds: Seeds = (0,)
    target: Share | None = None
    set: Settings = Field(default_factory=dict)
    entry: tuple[EntryTable, ...] = Field(min_length=1, max_length=MOST)
    tune: TuneTable | None = None


def keys_of(path: Sequence[str | int]) -> list[str]:
    """The keys of the table at a place of a study."""
    tables: dict[str | int, type[Table]] = {"entry": EntryTable, "tune": TuneTable}
    return list((tables.get(path[0], Study) if path else Study).model_fields)
