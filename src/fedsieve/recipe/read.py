"""Recipes: a TOML file that names a whole experiment.

Reading, changing and checking one; schema.py has its keys, method.py builds its method. An unknown
key is refused and the nearest known one is named, because a misspelt setting that is silently
ignored costs a day of training. Nothing here needs torch until a recipe has been found in order.
"""

import codecs
import errno
import re
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from fedsieve.disk import LARGEST, bytes_of
from fedsieve.errors import (
    LONGEST_TOLD,
    FedSieveError,
    explain_all,
    nearest,
    printable,
    quoted,
    reason,
    words,
)
from fedsieve.methods import catalogue
from fedsieve.methods.catalogue import OPTIMIZERS, known, options
from fedsieve.recipe import lines, sets
from fedsieve.recipe.overrides import put
from fedsieve.recipe.schema import SERVERS, Recipe, keys_of, path_of
from fedsieve.tasks import catalogue as tasks

MOST = 1 << 24  # bytes of a recipe, with the names of many classes
DEEPEST = 32  # tables and lists in one another; no recipe has more than a few
# Characters of a key and of those above it: places are told, and noted for each value.
LONGEST = 1000

# Python's reader takes the cube of a key's parts to read it: minutes and gigabytes for kilobytes.
# So long keys are looked for before, among the tokens of TOML, since no key stands in a string.
# Nothing is tried twice: a search that goes back takes the square of a long word's length. But no
# group is closed to that (`*+`): up to 3.11.3 Python's reader of patterns loses its place there.
_WORD, _BASIC, _LITERAL = r"[\w-]++", r'"[^"\\\n]*+(?:\\.[^"\\\n]*+)*', r"'[^'\n]*+"
_PART = rf"""(?:{_WORD}|{_BASIC}"|{_LITERAL}')"""
_TOKENS = re.compile(
    rf"(?P<key>{_PART}(?:[ \t]*+\.[ \t]*+{_PART}){{{DEEPEST},}})"
    r'|"""[^"\\]*+(?:(?:\\[\s\S]|"(?!""))[^"\\]*+)*"{0,5}'
    r"|'''[^']*+(?:'(?!'')[^']*+)*'{0,5}"
    rf"""|{_BASIC}"?|{_LITERAL}'?|#[^\n]*+|{_WORD}|[^"'#\w-]++"""
)


def load(source: str, overrides: Sequence[str] = (), *, allow_code: bool = False) -> Recipe:
    """Read a recipe from a file, or one that ships with FedSieve by its name.

    overrides: "key=value" each; the key is dotted ("training.lr"), the value is TOML, or plain text
    allow_code: see `check`
    Raises FedSieveError for anything that is not right, naming the key.
    """
    return check(read(source, overrides), source, allow_code=allow_code)


def text_of(path: Path) -> str:
    """What a recipe's file says, without the mark that some editors begin a text with. Raises
    OSError as reading does, and for a file that is larger than any recipe or is no UTF-8.
    """
    data = bytes_of(path, MOST)
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data[:4]
    try:
        if wide:
            raise ValueError
        return data.decode("utf-8-sig")
    except ValueError:
        said = f"it is {'UTF-16 or UTF-32' if wide else 'not UTF-8'}: save it as UTF-8"
        raise OSError(errno.EILSEQ, said, str(path)) from None


def table_in(path: Path) -> dict[str, Any]:
    """What a TOML file holds. Raises FedSieveError, naming it, where it cannot be read."""
    try:
        text = text_of(path)
    except OSError as error:
        raise FedSieveError(f"{path} cannot be read: {reason(error)}") from error
    return toml(text, str(path))


def read(source: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What `load` checks: the recipe's keys as they are written, changed by the overrides.

    Raises FedSieveError if there is no such recipe, or if it or an override is not TOML.
    """
    path = Path(source)
    if path.suffix == ".toml" or path.is_file():
        try:
            text = text_of(path)
        except FileNotFoundError as error:
            there = (each.name for each in path.parent.glob("*.toml"))
            raise FedSieveError(
                f"there is no recipe {source}{nearest(path.name, there)}"
            ) from error
        except OSError as error:
            raise FedSieveError(f"the recipe {source} cannot be read: {reason(error)}") from error
    elif path.is_dir() and (path / "recipe.toml").is_file() and source not in shipped():
        raise FedSieveError(f"{source} is a run's directory: its recipe is {path / 'recipe.toml'}")
    else:
        text = shipped_text(source)
    table = toml(text, f"the recipe {source}")
    for given in overrides:
        override(table, given)
    table.pop("environment", None)
    return table


def toml(text: str, source: str) -> dict[str, Any]:
    """The table that a TOML file holds; source: what the file is called.

    Raises FedSieveError where it is not TOML, with the line, and for nesting, keys or whole numbers
    beyond what anybody writes.
    """
    try:
        for token in _TOKENS.finditer(text):
            if token["key"]:
                number = text.count("\n", 0, token.start()) + 1
                raise ValueError(f"a key of more than {DEEPEST} parts (at line {number})")
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        said = lines.quoted(str(error), text)
        raise FedSieveError(f"{source} is not valid TOML: {said}") from error
    _refuse_beyond(table, source)
    return table


def parse_text(text: str, source: str) -> Recipe:
    """`parse` of what `dump` gave."""
    table = toml(text, source)
    table.pop("environment", None)
    return parse(table, source)


def _refuse_beyond(value: Any, source: str, place: str = "", depth: int = 0) -> None:
    """Raises FedSieveError for nesting that no recursion gets through, long keys, large numbers."""
    if depth > DEEPEST:
        raise FedSieveError(f"{source}: {place[:80]} is nested more than {DEEPEST} deep")
    if isinstance(value, int) and abs(value) > LARGEST:
        called = f"{source}: {place[:80]}" if place else source  # alone, as of a key of its own
        raise FedSieveError(f"{called} is a number beyond {LARGEST}")
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if len(place) + len(str(key)) > LONGEST:
                said = f"{place}.{str(key)[:80]}".lstrip(".")[:80]
                raise FedSieveError(
                    f"{source}: {said}... is a key of more than {LONGEST} characters"
                )
            _refuse_beyond(inner, source, f"{place}.{key}".lstrip("."), depth + 1)


def check(
    table: Mapping[str, Any], source: str = "the recipe", *, allow_code: bool = False
) -> Recipe:
    """The recipe that a table of plain values describes; raises FedSieveError, naming the key.

    Where it names no server optimizer, the method's own is written out.

    allow_code: that a method which is no part of FedSieve, or a `training.function`, is imported,
        and so run, was asked for by who started this; a recipe cannot ask for it
    """
    from fedsieve.recipe.method import build_method, with_server  # need torch

    recipe = parse(table, source)
    if not allow_code:
        refuse_programs(recipe, source)
    try:
        check_metrics(recipe)
        recipe = with_server(recipe)
        build_method(recipe)  # its options are checked now, not after the data are loaded
    except FedSieveError as error:
        raise _at_its_line(error, table, source) from error
    return recipe


def check_metrics(recipe: Recipe, by_row: bool = True) -> None:
    """Raises FedSieveError for an `evaluation.metric` that cannot lead (`tally.check_lead`), or for
    `data.more_tests` whose metrics would be called as others are.
    """
    from fedsieve.tasks import tally  # needs numpy

    task, classes = tasks.load(recipe.model.task), recipe.data.classes or ()
    try:
        tally.check_lead(task, recipe.evaluation.metric, classes, by_row)
    except FedSieveError as error:
        raise FedSieveError(f"evaluation.metric: {error}") from None
    try:
        tally.check_beside(task, list(recipe.data.more_tests or ()))
    except FedSieveError as error:
        raise FedSieveError(f"data.more_tests: {error}") from None


def parse(table: Mapping[str, Any], source: str = "the recipe") -> Recipe:
    """`check`, less the values of the options of method and server, and whether budgets fit."""
    if "entry" in table and "method" not in table:
        what, reads = (
            ("figure", "reproduce") if {"small", "paper"} & {*table} else ("study", "compare")
        )
        raise FedSieveError(f"{source} is a {what} and no recipe: `fedsieve {reads}` runs it")
    try:
        recipe = Recipe.model_validate(sets.filled(table))
        _refuse_unknown_options(recipe)
    except ValidationError as error:
        head, *said = explain_all(error, source, keys_of, path_of).split("\n")
        told = [f"  {_placed(_at_home(each.strip(), table), table, source)}" for each in said]
        raise FedSieveError("\n".join([head, *told])) from error
    except FedSieveError as error:
        raise _at_its_line(error, table, source) from error
    return recipe


def _at_home(said: str, given: Mapping[str, Any]) -> str:
    """The words of an error about an unknown key, with the one table that does have it; a table of
    that name is another one's, misspelt.
    """
    place, unknown, _ = said.partition(": unknown key")
    key, top = place.rpartition(".")[2], keys_of(())
    if isinstance(given.get(place), Mapping):
        return said
    if not unknown or key in top:
        return f"{place}{unknown} here: it stands above all tables" if unknown else said
    tables = [table for table in top if (own := keys_of((table,))) != top and key in own]
    return f"{place}{unknown} here: [{tables[0]}] has it" if len(tables) == 1 else said


def _at_its_line(error: FedSieveError, table: Mapping[str, Any], source: str) -> FedSieveError:
    said = _placed(str(error), table, source)
    return error if said == str(error) else FedSieveError(f"{source}, {said}")


def _placed(said: str, table: Mapping[str, Any], source: str) -> str:
    """An error's words after the line of the file that they are about, where they begin with one of
    its keys; or after "an override" where such a one has changed it.

    table: what was checked
    """
    path = Path(source)
    if not path.is_file():
        return said
    try:
        return lines.placed(said, text_of(path), table)
    except (OSError, ValueError, RecursionError):  # it has changed since
        return said


def refuse_programs(recipe: Recipe, source: str) -> None:
    """Raises FedSieveError for a recipe that names programs of somebody's own."""
    refuse_code(recipe.method.name, source)
    refuse_function(recipe.training.function, source)


def is_ours(recipe: Recipe) -> bool:
    """Whether a recipe names no program but FedSieve's own."""
    return not _foreign(recipe.method.name) and recipe.training.function is None


def _foreign(method: str) -> bool:
    return "." in method and not method.startswith("fedsieve.methods.")


def refuse_code(name: str, source: str) -> None:
    """Raises FedSieveError for a method's name that is a module of somebody's own."""
    if _foreign(name):
        raise FedSieveError(
            f"{source}: method.name {name[:80]!r} is no method of FedSieve but somebody's program, "
            "which would run with your rights: give --allow-code if you trust it"
        )


def refuse_function(name: object, source: str) -> None:
    """Raises FedSieveError for a `training.function`, which is somebody's own."""
    if name is not None:
        raise FedSieveError(
            f"{source}: training.function {str(name)[:80]!r} is somebody's program, which would "
            "run with your rights: give --allow-code if you trust it"
        )


def _refuse_unknown_options(recipe: Recipe) -> None:
    """Raises FedSieveError for a method that is not there, or an option that is not its own.

    A method of the user's own is a module that would have to be imported: `check` does.
    """
    server = recipe.server
    # Which optimizer a method has of its own is known once it is built: `check` looks again.
    possible = SERVERS if server.optimizer is None else (server.optimizer,)
    of_server = dict.fromkeys(each for name in possible for each in options(OPTIMIZERS, name))
    takes = [("server", server.model_extra, tuple(of_server))]
    name = recipe.method.name
    if "." not in name:
        takes.append(("method", recipe.method.model_extra, known(name).options))
    for table, given, names in takes:
        for key in given or ():
            if key not in names:
                shown = printable(key)
                said = f"{table}.{shown}: unknown key{nearest(key, names)}"
                if table == "method" and _is_of_another(key):
                    said = (
                        f"method.{shown}: the method {name!r} has no such option"
                        f"{nearest(key, names)}: remove it from [method], or replace the whole "
                        f"table, as in method='{{ name = \"{name}\" }}' on the command line"
                    )
                raise FedSieveError(said)


def _is_of_another(option: str) -> bool:
    """Whether a method that ships has an option of this name."""
    return any(option in known(each).options for each in catalogue.names())


def dump(recipe: Recipe, environment: Mapping[str, Any]) -> str:
    """The recipe with the defaults of its tables written out, as TOML, less those of the method's
    own options; `environment` is a table of its own."""
    table = _without_none(recipe.model_dump(mode="json"))
    text: str = tomli_w.dumps({**table, "environment": dict(environment)})
    return text


def shipped() -> dict[str, str]:
    """The recipes that ship with FedSieve: name -> text."""
    folder = resources.files("fedsieve") / "recipes"
    return {
        entry.name.removesuffix(".toml"): entry.read_text(encoding="utf-8")
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name)
        if entry.name.endswith(".toml")
    }


def shipped_text(name: str) -> str:
    """One of `shipped`. Raises FedSieveError, with the nearest, for a name that none has."""
    known = shipped()
    if name not in known:
        files = {path.name for path in Path().glob("*.toml")}
        raise FedSieveError(f"no recipe is called {name!r}{nearest(name, {*known} | files)}")
    return known[name]


def override(table: dict[str, Any], given: str) -> None:
    """Apply one "key=value" to a recipe's table, in place; see `load`. "key=" takes the key out."""
    key, equals, text = given.partition("=")
    if not equals or not key:
        raise FedSieveError(f"{given!r} is not of the form key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"] if text.strip() else None
    except tomllib.TOMLDecodeError as error:
        if len(text) > 1 and text.strip()[0] == text.strip()[-1] and text.strip()[0] in "'\"":
            # Whoever quotes a text means TOML, and would get the quotation marks as part of it.
            raise FedSieveError(
                f"{given!r}: {error} (in '...' a backslash is a backslash, in \"...\" it is not)"
            ) from None
        value = text
    except (ValueError, RecursionError) as error:  # of numbers and nesting without end
        raise FedSieveError(f"{quoted(given)}: it cannot be read: {words(error)}") from None
    _refuse_beyond(value, key.strip()[:LONGEST_TOLD])
    put(table, key.strip(), value, repr(given))


def _without_none(value: Any) -> Any:
    """TOML has no null: a key that is not set is left out."""
    if isinstance(value, dict):
        return {key: _without_none(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list):
        return [_without_none(entry) for entry in value]
    return value
