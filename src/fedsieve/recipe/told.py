"""What a recipe says of what is trained by it, for the card that goes with it (train/card.py)."""

from pathlib import Path

from fedsieve.data import fetch
from fedsieve.recipe.schema import Recipe
from fedsieve.train.card import Told, called


def told(recipe: Recipe, epsilon: float | None = None) -> Told:
    """Names alone: of a path its last part, for a card goes where the paths of a machine do not.

    epsilon: that the rounds have spent, where it is known
    """
    train, held_back = recipe.data.train, recipe.evaluation.on == "validation"
    tested = train if held_back else recipe.data.test or train
    return Told(
        method=recipe.method.name,
        recipe=recipe.name,
        data=_name(train, recipe.data.config),
        tested=_name(tested, recipe.data.config) + ", rows held back" * held_back,
        start=None if recipe.lora.start is None else called(recipe.lora.start),
        settings=recipe.model.settings,
        on_hub=not _here(train) and "://" not in train and train not in fetch.PACKAGES,
        privacy=_privacy(recipe, epsilon),
    )


def _here(rows: str) -> bool:
    return Path(rows).is_absolute() or Path(rows).exists()


def _name(rows: str, config: str | None) -> str:
    name = Path(rows).name if _here(rows) else rows
    return f"{name} ({config})" if config else name


def _privacy(recipe: Recipe, epsilon: float | None) -> str | None:
    asked = recipe.privacy
    if asked is None:
        return None
    how = f"clip {asked.clip:g}"
    if asked.quantile is not None:
        how += f" at first, then the {asked.quantile:g} quantile of the updates' norms"
    if asked.noise_multiplier is not None:
        how += f", noise multiplier {asked.noise_multiplier:g}"
    if epsilon is None:
        return f"{how}; what epsilon that is, whoever ran it knows"
    whose = (
        ""
        if asked.simulated_cohort is None
        else f" as if {asked.simulated_cohort:,} clients took part in a round"
    )
    said = f"epsilon {epsilon:.4g} at delta {asked.delta:g} for each client{whose} ({how})"
    if asked.noise_from == "seed":
        said += ", in simulation: the noise follows from the recipe's seed, and protects nobody"
    return said
