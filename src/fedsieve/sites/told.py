"""What the sites of a federation are told of its recipe: `told.toml` in the run's directory.

It is the recipe without what is the server's own, and with the federation's name, by which two
federations of one recipe differ. Sites call a run by the digest of this very text. It is kept, so
that a later FedSieve, whose recipes may have more keys, goes on under the same digest; and as the
directory may have been edited, or come from somebody else, it is sent only where it says what the
recipe beside it says.
"""

from pathlib import Path

import tomli_w

from fedsieve.data.fetch import PACKAGES
from fedsieve.disk import refuse_link, write_whole
from fedsieve.errors import FedSieveError, reason
from fedsieve.recipe import read as recipes
from fedsieve.recipe import schema
from fedsieve.recipe.schema import Recipe
from fedsieve.run import rundir
from fedsieve.run.found import edits

TOLD = "told.toml"
FEDERATION = "federation"  # its name, in the recipe's [environment]


def write(folder: Path, recipe: Recipe, name: str) -> str:
    """Write what the sites are told of a recipe. name: the federation's"""
    text = _dumped(recipe, name)
    write_whole(folder / TOLD, text.encode())
    return text


def text_for_sites(folder: Path, recipe: Recipe) -> str:
    """What the sites are told, where it is there and what this recipe makes of it; made if missing.

    recipe: that of the folder
    Raises FedSieveError, naming the keys, where it says anything else.
    """
    path, source = folder / TOLD, folder / rundir.RECIPE
    refuse_link(path)  # what it leads to would go to every site
    name = _name(source)
    if not path.exists():
        return write(folder, recipe, name)
    try:
        text = recipes.text_of(path)
    except OSError as error:
        raise FedSieveError(f"{path} cannot be read ({reason(error)}): {_MEND}") from error
    should = _dumped(recipe, name)
    if text == should:
        return text
    table, right = (recipes.toml(each, str(path)) for each in (text, should))
    facts = table.pop("environment", None)
    right.pop("environment")
    _, said = edits(recipes.check(right), recipes.check(table, str(path)))
    if said:
        raise FedSieveError(
            f"{path} does not say what {source} says ({said}): put back the one that was edited, "
            "or start a new federation"
        )
    if facts != {FEDERATION: name} or tomli_w.dumps({**table, "environment": facts}) != text:
        raise FedSieveError(f"{path} is not as it was written: {_MEND}")
    return text


_MEND = "put it back, or remove it: it is made again of the recipe"


def _dumped(recipe: Recipe, name: str) -> str:
    return recipes.dump(for_sites(recipe), {FEDERATION: name})


def for_sites(recipe: Recipe) -> Recipe:
    """The recipe without what is the server's own: paths, files, columns, device, versions; and
    without its engine and its tracker, which no site has.
    """
    own = "the site's own"
    data = schema.Data(train=own, **{n: getattr(recipe.data, n) for n in schema.READ_AS})
    source = recipe.model.source if recipe.model.source in PACKAGES else own
    model = recipe.model.model_copy(update={"source": source})
    where = {"device": "auto", "engine": schema.Engine(), "tracking": None}
    return recipe.model_copy(update={"data": data, "model": model, **where})


def _name(source: Path) -> str:
    """The federation's name, from its recipe's file. Raises FedSieveError where it has none."""
    table = recipes.table_in(source)
    facts = table.get("environment")
    name = facts.get(FEDERATION) if isinstance(facts, dict) else None
    if not isinstance(name, str):
        raise FedSieveError(
            f"{source} does not say in [environment] which federation it is of ({FEDERATION}): put "
            "it back, or start a new one"
        )
    return name
