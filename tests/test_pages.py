"""What the pages say is there is there, and what is there is said: links, commands, names."""

import itertools
import re
import runpy
import subprocess
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import click
import pytest
from pydantic import BaseModel, ValidationError
from typer.main import get_command

import fedsieve
from fedsieve import cli
from fedsieve.errors import FedSieveError
from fedsieve.methods import catalogue
from fedsieve.recipe import read as recipes
from fedsieve.recipe import schema
from fedsieve.sites import site
from fedsieve.study import figures, tables
from tests import api_page, commands_page, defaults_page, models_page, pages, papers_page
from tests.pages import DOCS, PAGES, ROOT

SOURCE = Path(fedsieve.__file__).parent
EVERYTHING = "\n".join(map(pages.read, [ROOT / "README.md", *DOCS]))
METHODS = [catalogue.known(name) for name in catalogue.names()]
# Words in backticks that are options of other programs.
FOREIGN = {"--enable-supernode-auth", "--database", "--data", "--json", "--plot"}
# What docs/methods.md and the tutorial have their reader write.
TO_BE_WRITTEN = {"src/fedsieve/methods/random_entries.py", "src/fedsieve/tasks/ordinal.py"}

# A changelog names what is no more.
today = pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name
)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def tracked() -> list[Path]:
    """The files that git tracks; all that are here where there is no git."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        return [path for path in ROOT.rglob("*") if path.is_file()]
    return [ROOT / name for name in done.stdout.decode().split("\0") if name]


def test_no_file_holds_a_merge_that_was_not_ended() -> None:
    marker = re.compile(rb"(?m)^(<{7}|>{7}|\|{7}) ")
    held = [path for path in tracked() if path.is_file() and marker.search(path.read_bytes())]
    assert held == []


# --- links


@each_page
def test_links_and_images_lead_somewhere(page: Path) -> None:
    for link in pages.links(page):
        target, _, anchor = link.partition("#")
        place = (page.parent / target) if target else page
        assert place.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in pages.anchors(place), f"{page.name}: {link}"


@cache
def _python_files() -> set[str]:
    rooms = ("src", "tests", "docs", "benchmarks", "examples")
    return {path.name for room in rooms for path in (ROOT / room).rglob("*.py")}


@today
def test_files_and_modules_that_are_named_exist(page: Path) -> None:
    """`tests/wire/reader.py`, `privacy.py`, `fedsieve.costs.table`."""
    for code in pages.inline(page):
        path = code.split("::")[0].split(" ")[0]
        if path in TO_BE_WRITTEN:
            continue
        if re.fullmatch(r"(src|tests|docs|benchmarks|examples)/[\w./-]*", path):
            assert (ROOT / path).exists(), f"{page.name}: {code}"
        elif re.fullmatch(r"\w+\.py", code):
            assert code in _python_files(), f"{page.name}: {code}"
        elif re.fullmatch(r"fedsieve(\.\w+)+", code):
            _found(code)


def _found(dotted: str) -> Any:
    """What a dotted name in the docs means, module or attribute."""
    value: Any = fedsieve
    for number, step in enumerate(dotted.split(".")[1:], 1):
        name = ".".join(dotted.split(".")[: number + 1])
        try:
            __import__(name)
        except ModuleNotFoundError:
            value = getattr(value, step)
        else:
            value = __import__(name, fromlist=["_"])
    return value


# --- commands


def parsed(words: tuple[str, ...]) -> None:
    """Let the command line read the words, without doing what they say.

    Words in capitals stand for something: a number will do.
    """
    given = ["1" if re.fullmatch(r"[A-Z][A-Z_]*", word) else word for word in words]
    group = get_command(cli.app)
    assert isinstance(group, click.Group)
    if given[0] in {name for each in group.params for name in each.opts} | {"--help"}:
        return  # not read on: these act as soon as they are met
    context = click.Context(group)
    name, command, rest = group.resolve_command(context, given)
    assert name is not None
    assert command is not None
    command.make_context(name, rest, parent=context)


def trouble(words: tuple[str, ...]) -> click.UsageError | None:
    try:
        parsed(words)
    except click.UsageError as error:
        return error
    except click.exceptions.Exit:
        pass  # --help
    return None


# In the midst of a sentence a command may be named without all that it needs.
UNFINISHED = (click.MissingParameter, click.BadOptionUsage)


@each_page
def test_the_command_line_knows_every_command_line(page: Path) -> None:
    for line in pages.commands(page):
        problem = trouble(line.words)
        if problem is not None and (line.whole or not isinstance(problem, UNFINISHED)):
            pytest.fail(f"{page.name}: {line.words}: {problem.format_message()}")
        own = next((word for word in line.words if word in recipes.shipped()), "demo")
        given = [w for w in line.words if "=" in w and w[0] != "-" and not w.startswith("key=")]
        recipes.parse(recipes.read(own, given))


@pytest.mark.parametrize(
    "words",
    [("rnu",), ("run",), ("run", "demo", "--uot", "x"), ("search", "demo")],
)
def test_a_command_line_that_is_wrong_would_be_found(words: tuple[str, ...]) -> None:
    assert trouble(words) is not None


def options() -> set[str]:
    group = get_command(cli.app)
    assert isinstance(group, click.Group)
    every = [group, *group.commands.values()]
    names = {name for command in every for each in command.params for name in each.opts}
    return {name for name in names if name.startswith("--")} | {"--help"}


def test_every_option_is_on_a_page_and_every_option_on_a_page_exists() -> None:
    said = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", EVERYTHING))
    assert options() - said == set()
    assert "--no-such-option" not in options()
    for page in PAGES:
        for code in pages.inline(page):
            if re.match(r"--[a-z]", code):
                assert code.split()[0] in options() | FOREIGN, f"{page.name}: {code}"


def test_the_page_of_commands_is_what_the_command_line_says() -> None:
    assert pages.read(commands_page.PAGE) == commands_page.page(), commands_page.__doc__


# --- names


def test_the_page_of_python_holds_every_public_name() -> None:
    assert pages.read(api_page.PAGE) == api_page.page(), api_page.__doc__
    held = [name for names in api_page.GROUPS.values() for name in names]
    assert sorted(held) == sorted(fedsieve.__all__)


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    """And none that is not there; the site's own build says so too, where it is installed."""
    named = set(re.findall(r"(?m)^ +- [^:#]+: (\S+\.md)$", pages.read(ROOT / "mkdocs.yml")))
    assert named == {page.relative_to(ROOT / "docs").as_posix() for page in DOCS}


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_a_list_has_an_empty_line_before_it(page: Path) -> None:
    """Or the site shows it as a paragraph; prose that looks like one is broken elsewhere."""
    prose = re.sub(r"(?ms)^```.*?^```", "", pages.read(page))
    for before, line in itertools.pairwise(prose.splitlines()):
        if re.match(r"(-|\d+\.) ", line):
            assert re.match(r"((-|\d+\.) | |$)", before), (before, line)


def test_docstrings_become_lists_on_the_site() -> None:
    pytest.importorskip("griffe")
    markdown = runpy.run_path(str(ROOT / "docs" / "docstrings.py"))["markdown"]
    given = "What: it is.\n\na, b: of both,\n    and more\nc:   alone\nRaises Error: if."
    assert markdown(given) == (
        "\n- `What`: it is.\n\n\n- `a`, `b`: of both,\n    and more\n- `c`: alone\n\n"
        "Raises Error: if."
    )


def test_the_table_of_defaults_is_what_the_methods_have() -> None:
    written = pages.read(defaults_page.PAGE)
    assert defaults_page.table() in written, defaults_page.__doc__


def test_the_tables_of_families_are_those_of_the_sweep() -> None:
    written = pages.read(models_page.PAGE)
    assert models_page.table() in written, models_page.__doc__


def test_the_page_of_papers_is_what_the_figures_and_their_results_say() -> None:
    written = pages.read(papers_page.PAGE)
    assert papers_page.page(written) == written, papers_page.__doc__
    assert papers_page.verdicts() == pages.read(papers_page.VERDICTS), papers_page.__doc__
    # A result is of a figure that is there.
    found = {path.stem for path in papers_page.RESULTS.glob("*.json")}
    assert found <= {figures.slug(name) for name in figures.shipped()}


def test_every_method_is_on_the_pages_and_no_other() -> None:
    """All are in the table of docs/methods.md; the README's choice of them exists."""
    names = set(catalogue.names())

    def rows(page: Path) -> list[str]:
        return re.findall(r"(?m)^\| `(\w+)` \|", pages.read(page))

    assert set(rows(ROOT / "README.md")) <= names
    listed = [row for row in rows(ROOT / "docs" / "methods.md") if row in names]
    assert sorted(listed) == sorted(names)


def keys(table: type[BaseModel] | Any, at: str = "") -> Iterator[str]:
    for name in table.__pydantic_fields__:
        yield f"{at}{name}"


TABLES: dict[str, list[Any]] = {
    "recipes.md": [
        schema.Recipe, schema.Model, schema.Lora, schema.Data, schema.Partition, schema.Tier,
        schema.Limits, schema.ListBudgets, schema.TierBudgets, schema.RatioBudgets, schema.RankLaw,
        schema.Machine, schema.ResourceBudgets, schema.SamplingTable, schema.MethodTable,
        schema.ServerTable, schema.Privacy, schema.Training, schema.Evaluation, schema.Checkpoint,
        schema.Engine, schema.Tracking,
    ],
    "deploy.md": [site.Site, site.Rows, site.Link, site.Limits],
    "compare.md": [tables.Study, tables.EntryTable, tables.TuneTable],
    "papers.md": [figures.Figure, figures.PlaceTable, figures.PanelTable, figures.CheckTable],
}  # fmt: skip


def words(page: Path) -> set[str]:
    """What the page's backticks, code and table headings name."""
    text = pages.read(page)
    return set(re.findall(r"\w+", " ".join([*pages.inline(page), *pages.code_of(page)]))) | set(
        re.findall(r"\[+(\w+)\]+", text)
    )


@pytest.mark.parametrize("name", TABLES)
def test_every_key_of_a_file_is_on_its_page(name: str) -> None:
    said = words(ROOT / "docs" / name)
    for table in TABLES[name]:
        missing = set(table.__pydantic_fields__) - said
        assert not missing, (name, table.__name__, missing)


def test_every_option_of_methods_and_optimizers_is_on_the_page_of_recipes() -> None:
    said = words(ROOT / "docs" / "recipes.md")
    for entry in METHODS:
        assert set(entry.options) <= said, (entry.name, set(entry.options) - said)
    for name in ("sgd", "adam", "fedadam"):
        assert set(catalogue.options(catalogue.OPTIMIZERS, name)) <= said, name


def test_the_page_of_recipes_names_no_key_that_is_not_there() -> None:
    method_options = {option for entry in METHODS for option in entry.options} | {"name"}
    page = pages.read(ROOT / "docs" / "recipes.md")
    for section in re.split(r"(?m)^## ", page)[1:]:
        named = re.findall(r"`\[+(\w+)\]+`", section.splitlines()[0])
        if section.startswith("Top level"):
            known = set(schema.keys_of(()))
        elif named:
            known = {key for table in named for key in _keys_of(table, method_options)}
        else:
            continue
        for row in re.findall(r"(?m)^\| ([^|]*) \| [^|]* \| ", section):
            for key in re.findall(r"`([a-z][\w.]*)`", row):
                assert key in known, f"docs/recipes.md: {key} under {section.splitlines()[0]}"


def _keys_of(table: str, method_options: set[str]) -> set[str]:
    own = set(schema.keys_of((table,)))
    if table == "method":
        return own | method_options
    if table == "server":
        optimizers = ("sgd", "adam", "fedadam")
        return own.union(*(catalogue.options(catalogue.OPTIMIZERS, name) for name in optimizers))
    if table == "budgets":
        return own.union(*(t.__pydantic_fields__ for t in TABLES["recipes.md"]), {"kind"})
    return own | {f"{table}.{key}" for key in own}


@today
def test_keys_with_a_dot_lead_to_a_key(page: Path) -> None:
    known = set(schema.keys_of(()))
    for code in pages.inline(page):
        said = re.fullmatch(r"([a-z]+)\.(\w+)( = .*)?", code)
        if said and said[1] in known - {"method", "server", "budgets"} and said[2] != "py":
            inner = schema.keys_of((said[1],))
            assert said[2] in inner, f"{page.name}: {code}"


@each_page
def test_tables_in_code_hold_known_keys_alone(page: Path) -> None:
    """Every piece of TOML on the pages, by the file that it is of."""
    for code in pages.code_of(page):
        try:
            table = tomllib.loads(code)
        except tomllib.TOMLDecodeError:
            continue
        if not table or "environment" in table:
            continue
        problems = {kind: _unknown(kind, table) for kind in FILES}
        assert not all(problems.values()), f"{page.name}:\n{code}\n{problems}"


FILES: dict[str, Any] = {
    "recipe": schema.Recipe,
    "site": site.Site,
    "study": tables.Study,
    "figure": figures.Figure,
}


def _unknown(kind: str, table: dict[str, Any]) -> list[str]:
    """The keys of a table that a file of this kind does not have."""
    file = FILES[kind]
    try:
        recipe = file.model_validate(table)
    except ValidationError as error:
        return [
            ".".join(map(str, detail["loc"]))
            for detail in error.errors()
            if detail["type"] in ("extra_forbidden", "unexpected_keyword_argument")
        ]
    if kind == "recipe":
        try:
            recipes.parse(recipe.model_dump())
        except FedSieveError as error:
            return [str(error)]
    return []
