"""What a whole run of a recipe sends, worked out before a row is read or a weight is loaded.

The model's shapes come from its configuration, the clients' budgets from the recipe, and the bytes
from a rehearsal of one client of each budget (dry_run.py). How many clients there are must be in
the recipe: by a column of the rows it is known only once they are read.
"""

from collections import Counter
from typing import NamedTuple

import torch

from fedsieve.algebra.budget import Budget, Client
from fedsieve.algebra.keys import Key
from fedsieve.costs.table import LARGEST, Cost, rehearse
from fedsieve.engine.loop import dense_bytes
from fedsieve.errors import FedSieveError
from fedsieve.recipe import schema
from fedsieve.recipe.budgets import hand_out, machines_of
from fedsieve.recipe.experiment import locate
from fedsieve.recipe.method import build_method
from fedsieve.recipe.schema import Recipe
from fedsieve.tasks import catalogue
from fedsieve.train.model import set_up, shape_of

_META = torch.device("meta")


class Bill(NamedTuple):
    """What a run sends, in bytes, and what makes it up.

    costs:   of each budget that clients have: how many have it, and what a round costs each
    numbers: that are trained, and that the model has in all
    rounds:  of the run; asked: clients a round, those whose update comes too late included
    each:    a round's messages, both ways: the mean over the clients
    dense:   the same where every client gets and returns all of the adapter, as float32
    """

    costs: list[tuple[Budget, int, Cost]]
    numbers: tuple[int, int]
    rounds: int
    asked: float
    each: float
    dense: float

    @property
    def total(self) -> float:
        """Of the whole run."""
        return self.rounds * self.each


def of_recipe(recipe: Recipe, classes: int | None = None) -> Bill:
    """What a run of a recipe will send. Masks and entropy-coded values depend a little on the
    numbers; all else is exact, but for who is drawn.

    classes: of the task's labels, where the recipe does not list them
    Raises FedSieveError where the recipe leaves open how many clients or classes there are, for a
    model that cannot be found, and for budgets that do not fit.
    """
    number = recipe.partition.clients
    if number is None:
        raise FedSieveError(
            f"how many clients partition.kind {recipe.partition.kind!r} makes is known once the "
            "rows are read: give partition.kind=iid and partition.clients=... to count with"
        )
    task = catalogue.load(recipe.model.task)
    found = classes or len(recipe.data.classes or ())
    if task.named and not found:
        raise FedSieveError("data.classes is not in the recipe: say how many with --classes")
    method = build_method(recipe)
    base = shape_of(locate(recipe.model.source), recipe.model.task, found)
    weights = sum(parameter.numel() for parameter in base.parameters())
    resident = set_up(base, recipe.model.task, recipe.lora, method.trains, key=Key(0), device=_META)
    if resident.layout.size > LARGEST:
        raise FedSieveError(f"{resident.layout.size:,} trained numbers: too many to rehearse here")
    counts = {f"{place:0{max(4, len(str(number - 1)))}d}": 1 for place in range(number)}
    budgets = hand_out(recipe, method, resident.layout, counts, machines_of(recipe, counts))
    kinds = Counter(budgets.values())
    clients = [Client(str(place), 1, budget) for place, budget in enumerate(kinds)]
    costs = rehearse(method, resident.layout, clients, recipe.training)
    sampling = schema.sampling(recipe)
    asked = float(number if sampling.kind == "all" else min(number, sampling.size + sampling.extra))
    mean = sum(
        count * (cost.down + cost.up) for count, cost in zip(kinds.values(), costs, strict=True)
    )
    return Bill(
        [(*kind, cost) for kind, cost in zip(kinds.items(), costs, strict=True)],
        (resident.layout.size, weights),
        recipe.rounds,
        asked,
        asked * mean / number,
        asked * 2 * dense_bytes(resident.dense),
    )
