"""What no recipe may ask of a site: a server finds it out before it asks, a site when it is asked.

Light enough to be told at once by the command that prepares a federation.
"""

from fedsieve.errors import FedSieveError
from fedsieve.recipe.read import is_ours
from fedsieve.recipe.schema import Recipe

NO_FUNCTION = "training.function: a site runs no program that a server names: leave it out"


def refuse_foreign(recipe: Recipe) -> None:
    """Raises FedSieveError for a recipe that names what a server has and no site (a function of
    somebody's own, the folder of an adapter to begin from), that gives settings to the function
    which loads a site's model, or whose layers are found by a regular expression: a short one can
    keep a processor busy for ever.
    """
    if recipe.training.function is not None:
        raise FedSieveError(NO_FUNCTION)
    if not is_ours(recipe):
        raise FedSieveError(
            f"method.name {recipe.method.name[:80]!r} is no method of FedSieve: sites take no "
            "program from a server, and know FedSieve's own methods alone"
        )
    for key, value in recipe.model.settings.items():
        rate = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
        if not ("drop" in key and rate):
            raise FedSieveError(f"model.settings.{key[:40]}: a site takes dropout rates only")
    if recipe.lora.pattern is not None:
        raise FedSieveError(
            "lora.targets: a site takes no regular expression from a server: list the names of "
            "the layers, as [lora] in the recipe of another run has them"
        )
    if recipe.lora.start is not None:
        raise FedSieveError(
            "lora.start: sites draw the first adapter from the seed, and none has this folder: "
            "leave it out"
        )
