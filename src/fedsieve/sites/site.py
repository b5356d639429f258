"""A site describes itself in one file, `site.toml`: what it has, and what a worker may use of it.

A recipe says what is trained and comes from the server; a site's file says with what, and never
leaves the site. Whatever a recipe says of data, files and devices counts for nothing here: the rows
that are read, their columns, the model's folder and the machine are those that this file names.
docs/deploy.md describes the keys. Paths are relative to the file's own folder.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from fedsieve.algebra import budget
from fedsieve.data import fetch
from fedsieve.data.paths import is_path
from fedsieve.disk import place
from fedsieve.errors import FedSieveError
from fedsieve.recipe import lines
from fedsieve.recipe import read as recipes
from fedsieve.settings import Share, Table

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class Rows(Table):
    """The site's own rows, and the columns of them that may be read; keys as in a recipe's [data].

    test: rows that adapters are evaluated on; without `test` and `test_split` there are none
    """

    train: str
    test: str | None = None
    config: str | None = None
    train_split: str | None = None
    test_split: str | None = None
    names: tuple[str, ...] | None = None
    separator: str | None = None
    field: str | None = None
    text: str | None = None
    text_b: str | None = None
    image: str | None = None
    label: str | tuple[str, ...] | None = None
    prompt: str | None = None
    completion: str | None = None
    options: str | tuple[str, ...] | None = None

    @model_validator(mode="after")
    def _columns_named(self) -> "Rows":
        given = self.text or self.image
        if given is None and (self.prompt is None or self.completion is None):
            raise ValueError(
                "say which columns to read: text or image (and label), or prompt, completion"
            )
        return self


class Link(Table):
    """The site's line to the server: Mbit/s, Mbit/s and seconds (budget.Link)."""

    downlink: PositiveFloat
    uplink: PositiveFloat
    latency: NonNegativeFloat = 0.0


class Limits(Table):
    """What the site can afford (budget.Budget); the server may ask for less."""

    ratio: Share = 1.0
    down: Share = 1.0
    up: Share = 1.0


class Site(Table):
    """All that a worker knows of its site.

    name:   by which the server calls this client; every site of a federation has its own
    folder: of the worker: its socket, its memory of runs, final adapters
    model:  the base model here, a folder or a name; without it, a recipe may only name models that
            `fedsieve fetch` has stored here
    cache:  where fetched models and data lie; None is where `fedsieve fetch` puts them
    memory: free, in MB beside the base model; step_seconds: an optimizer step's
    most_steps: optimizer steps that a server may ask for in one round
    most_tokens: and tokens of them all; most_memory: MB that training may take beside the base
        model; most_disk: MB that the worker's folder may hold; most_adapters: final adapters in it
    """

    name: Annotated[str, Field(pattern=NAME)]
    data: Rows
    folder: Path = Path("worker")
    device: str = "auto"
    model: str | None = None
    cache: Path | None = None
    memory: PositiveFloat | None = None
    step_seconds: NonNegativeFloat | None = None
    most_steps: PositiveInt = 100_000
    most_tokens: PositiveInt = 10**9
    most_memory: PositiveFloat = 8000.0
    most_disk: PositiveFloat = 10_000.0
    most_adapters: PositiveInt = 16
    link: Link | None = None
    budget: Limits = Limits()


def load(path: Path) -> Site:
    """Read a site's file. Raises FedSieveError for anything that is not right, naming the key."""
    table = recipes.table_in(path)
    try:
        site = Site.model_validate(table)
    except ValidationError as error:
        text = recipes.text_of(path)
        raise FedSieveError(lines.explained(error, str(path), text, table, _keys)) from error
    try:
        return _settled(site, path.absolute().parent)
    except FedSieveError as error:
        raise FedSieveError(f"{path}: {error}") from None


def budget_of(site: Site) -> budget.Budget:
    """The most that the site can afford."""
    return budget.Budget(site.budget.ratio, site.budget.down, site.budget.up)


def link_of(site: Site) -> budget.Link | None:
    """The site's line, if its file says so."""
    line = site.link
    return None if line is None else budget.Link(line.downlink, line.uplink, line.latency)


def _settled(site: Site, home: Path) -> Site:
    """The site with its paths made absolute: they are relative to the file that names them."""
    data, model = site.data, site.model
    train = _found("data.train", data.train, home)
    test = None if data.test is None else _found("data.test", data.test, home)
    return site.model_copy(
        update={
            "data": data.model_copy(update={"train": train, "test": test}),
            "folder": _at(site.folder, home),
            "cache": None if site.cache is None else _at(site.cache, home),
            "model": None if model is None else _found("model", model, home),
        }
    )


def _found(key: str, source: str, home: Path) -> str:
    """An absolute path where there is such a file or folder, else the name as it is.

    Raises FedSieveError where another one of that name lies in the folder in which the command is
    given: whoever reads the name would take it.
    """
    if source in fetch.PACKAGES:
        return source
    path = _at(source, home)
    if path.exists():
        return str(path)
    if place(source).exists() or is_path(source):
        raise FedSieveError(f"{key}: there is no {path} (a path is relative to this file)")
    return source


def _at(text: str | Path, home: Path) -> Path:
    return place(home / place(text))


def _keys(path: Sequence[str | int]) -> list[str]:
    tables: dict[tuple[str | int, ...], type[Table]] = {
        ("data",): Rows,
        ("link",): Link,
        ("budget",): Limits,
    }
    return list(tables.get(tuple(path), Site).model_fields)
