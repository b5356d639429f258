"""A recipe that a server told, made ready at a site: checked, and with the site's model and rows.

A recipe is trusted with what is trained, not with anything of the site: its [data] says how long
texts are and which classes there are, and all else that concerns data, files and devices is the
site's own (site.py). What could load foreign code or files is refused: methods that are not
FedSieve's own, changes of the model's configuration other than dropout rates, models that the site
has not stored. Errors that could quote a row or a path are told to the site's own terminal; the
server learns that there was one.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from fedsieve import methods
from fedsieve.algebra.adapter import Adapter
from fedsieve.algebra.method import Method
from fedsieve.data import fetch
from fedsieve.data.sources import column
from fedsieve.errors import FedSieveError
from fedsieve.recipe import examples as rows_to_examples
from fedsieve.recipe import read as recipes
from fedsieve.recipe import schema
from fedsieve.recipe.experiment import locate, set_up_resident
from fedsieve.recipe.method import build_method
from fedsieve.recipe.schema import Recipe
from fedsieve.sites import limits
from fedsieve.sites.foreign import NO_FUNCTION, refuse_foreign
from fedsieve.sites.site import Site
from fedsieve.tasks import catalogue
from fedsieve.tasks.examples import Examples, count
from fedsieve.tasks.task import Reader
from fedsieve.train.lengths import check_rows
from fedsieve.train.local import check_packing
from fedsieve.train.model import ResidentModel, pick_device
from fedsieve.train.reader import load_reader, reader_digest
from fedsieve.train.step import check_step

LONGEST = 1 << 20  # bytes of a recipe

Say = Callable[[str], None]  # where the site's owner reads what happens


class Assignment(NamedTuple):
    """All that the site needs for one recipe, in memory.

    start:    the adapter before the first round
    examples: to train on; test: to evaluate on, or None
    digest:   of the base model, weights and configuration; reads: of its tokenizer or processor
    """

    run: str
    recipe: Recipe
    method: Method
    resident: ResidentModel
    start: Adapter
    examples: Examples
    test: Examples | None
    digest: str
    reads: str


def checked(text: bytes, site: Site) -> Recipe:
    """The recipe in a text that a server told, on the site's own model, rows and device.

    Raises FedSieveError for one that a site may not follow.
    """
    return _localised(_recipe(text), site)


def prepare(
    run: str,
    recipe: Recipe,
    rows: Dataset,
    test_rows: Dataset | None,
    site: Site,
    say: Say,
) -> Assignment:
    """Load the model and make the examples that a checked recipe needs.

    run: digest of the recipe's text. Raises FedSieveError where model or rows do not fit, or where
    the recipe asks for more than the site's bounds (limits.py), before that is spent; its words may
    be told to the server.
    """
    check_packing(recipe.training, recipe.model.task)
    method = build_method(recipe)
    tokenizer = _tokenizer(recipe, say)
    parts = [each for each in (rows, test_rows) if each is not None]
    limits.check_rows(recipe, site, parts, partial(_column, say))
    examples, test = _examples(recipe, rows, test_rows, tokenizer, say)
    _within(recipe, method, site, examples, test, say)
    resident = _resident(recipe, tokenizer, say)
    check_rows(resident, examples, test)
    check_step(resident.model, resident.task, recipe.training)
    assert resident.digest is not None
    digest = resident.digest.whole
    start, reads = resident.adapter(), reader_digest(tokenizer)
    return Assignment(run, recipe, method, resident, start, examples, test, digest, reads)


def _recipe(text: bytes) -> Recipe:
    """The recipe that a server told, if it is one that a site may follow."""
    if len(text) > LONGEST:
        raise FedSieveError(f"a recipe of {len(text)} bytes: at most {LONGEST}")
    try:
        told = text.decode()
    except UnicodeDecodeError as error:
        raise FedSieveError(f"the recipe is not valid TOML: {error}") from error
    table = recipes.toml(told, "the recipe")
    table.pop("environment", None)
    limits.check_numbers(table)
    method = table.get("method")
    name = method.get("name") if isinstance(method, dict) else None
    if name not in methods.names():
        # Any other name would be imported.
        raise FedSieveError(f"method.name {str(name)[:40]!r} is no method of FedSieve itself")
    training = table.get("training")
    if isinstance(training, dict) and training.get("function") is not None:
        raise FedSieveError(NO_FUNCTION)
    recipe = recipes.check(table)
    refuse_foreign(recipe)
    if catalogue.load(recipe.model.task).named and recipe.data.classes is None:
        raise FedSieveError(
            "data.classes: sites cannot see each other's labels, so the recipe must list them"
        )
    return recipe


def _localised(recipe: Recipe, site: Site) -> Recipe:
    """The recipe with all that concerns files and devices taken from the site."""
    if site.model is None and recipe.model.source not in fetch.PACKAGES:
        raise FedSieveError(
            "model.source is no name that `fedsieve fetch` stores, and this site's file does not "
            "say where its model is"
        )
    given, asked = site.data.model_dump(), recipe.data
    data = schema.Data(**given, **{name: getattr(asked, name) for name in schema.READ_AS})
    model = recipe.model.model_copy(update={"source": site.model or recipe.model.source})
    return recipe.model_copy(update={"data": data, "model": model, "device": site.device})


def _tokenizer(recipe: Recipe, say: Say) -> PreTrainedTokenizerBase:
    try:
        tokenizer, _ = load_reader(locate(recipe.model.source), recipe.model.task)
    except FedSieveError as error:
        raise _no_model(error, say) from None
    return tokenizer


def _resident(recipe: Recipe, tokenizer: Reader, say: Say) -> ResidentModel:
    place = locate(recipe.model.source)
    try:
        return set_up_resident(recipe, tokenizer, pick_device(recipe.device))
    except FedSieveError as error:
        # What is wrong with the recipe's [lora] may be told; where the model lies may not.
        if place in str(error):
            raise _no_model(error, say) from None
        raise


def _no_model(error: FedSieveError, say: Say) -> FedSieveError:
    say(f"error: {error}")
    return FedSieveError("this site cannot load its base model; its worker's terminal says why")


def _examples(
    recipe: Recipe,
    rows: Dataset,
    test_rows: Dataset | None,
    tokenizer: Reader,
    say: Say,
) -> tuple[Examples, Examples | None]:
    """What the site trains on and what it evaluates on.

    Errors here may quote rows, so the server is only told that there was one.
    """
    try:
        prepared = rows_to_examples.prepare(recipe, rows, test_rows, tokenizer)
        if count(prepared.train) == 0:
            raise FedSieveError("no row is left to train on")
    except FedSieveError as error:
        raise _no_rows(error, say) from None
    return prepared.train, prepared.test


def _column(say: Say, rows: Dataset, name: str) -> list[Any]:
    """As data/sources.py has it; errors as of `_examples`."""
    try:
        return column(rows, name)
    except FedSieveError as error:
        raise _no_rows(error, say) from None


def _no_rows(error: FedSieveError, say: Say) -> FedSieveError:
    say(f"error: {error}")
    return FedSieveError("this site's rows do not fit the recipe; its worker's terminal says why")


def _within(
    recipe: Recipe, method: Method, site: Site, examples: Examples, test: Examples | None, say: Say
) -> None:
    """Raises FedSieveError where the recipe is beyond what the site's file allows."""
    place = locate(recipe.model.source)
    try:
        limits.check(recipe, method, site, examples, test)
    except FedSieveError as error:
        if place in str(error):
            raise _no_model(error, say) from None
        raise
