"""Who gets which budget, as a recipe says: tiers, lists, laws, or what each machine can do."""

from collections.abc import Iterable, Mapping
from functools import partial
from math import prod

from fedsieve.algebra.adapter import Layout
from fedsieve.algebra.budget import Budget, Link, refuse_rank
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import Method
from fedsieve.clients import laws
from fedsieve.clients.laws import assign
from fedsieve.clients.resources import Resources, Work, choose
from fedsieve.errors import FedSieveError, nearest
from fedsieve.recipe import schema
from fedsieve.recipe.method import tiers_differ_in
from fedsieve.recipe.schema import Recipe
from fedsieve.settings import steps_of


def hand_out(
    recipe: Recipe,
    method: Method,
    layout: Layout,
    counts: Mapping[str, int],
    machines: Mapping[str, Resources] | None,
) -> dict[str, Budget]:
    """The budget of each client, by id.

    counts:   their training examples; machines: what they have, where the budgets come from that

    Raises FedSieveError if a client is not listed, or has too little for any budget.
    """
    given, key, ids = recipe.budgets, Key(recipe.seed), sorted(counts)
    rank = recipe.lora.rank
    if isinstance(given, tuple):
        return assign(ids, [(t.share, Budget(t.ratio, t.down, t.up)) for t in given], key)
    if isinstance(given, schema.TierBudgets):
        by_rank = tiers_differ_in(given, method.knobs) == "rank"
        make = laws.tiers_by_rank if by_rank else laws.tiers_by_density
        return assign(ids, make(given.tiers), key)
    if isinstance(given, schema.RatioBudgets):
        drawn = laws.ratios(ids, given.ratios, key)
        return {id: Budget(ratio, given.down, given.up) for id, ratio in drawn.items()}
    if isinstance(given, schema.RankLaw):
        law = laws.normal if given.kind == "normal" else laws.heavy_tail
        ranks = law(ids, given.low, given.high, key)
        return {id: Budget(own / rank, given.down, given.up) for id, own in ranks.items()}
    if isinstance(given, schema.ListBudgets):
        limits = schema.limits_by_id(given)
        if not isinstance(given.clients, dict) and len(limits) == len(ids):
            limits = dict(zip(ids, limits.values(), strict=True))  # in order, whatever the ids
        _refuse_other_ids("budgets.clients", limits, ids)
        for id in ids:
            refuse_rank(id, limits[id].rank or 1, rank)
        return {
            id: Budget(own.rank / rank if own.rank else own.ratio or 1.0, own.down, own.up)
            for id, own in limits.items()
        }
    assert machines is not None
    chosen = partial(choose, deadline=given.deadline, knobs=method.knobs, least=given.least)
    # A client without data takes no part, so it needs no budget that fits. Of many clients most are
    # alike: what one gets follows from its machine and its examples alone.
    found: dict[tuple[Resources, int], Budget] = {}
    for id, count in counts.items():
        if count and (machines[id], count) not in found:
            found[machines[id], count] = chosen(id, machines[id], _work(recipe, layout, count))
    return {id: found[machines[id], n] if n else Budget() for id, n in counts.items()}


def machines_of(recipe: Recipe, counts: Mapping[str, int]) -> dict[str, Resources] | None:
    """What each client has, by id, if the recipe says so."""
    given = recipe.budgets
    if not isinstance(given, schema.ResourceBudgets):
        return None
    machines = given.clients
    if machines is None:
        tiers = given.tiers or ()
        places = laws.divide(list(counts), [tier.share for tier in tiers], Key(recipe.seed))
        machines = {id: tiers[place] for id, place in places.items()}
    _refuse_other_ids("budgets.clients", machines, counts)
    return {
        id: Resources(own.memory, Link(own.downlink, own.uplink, own.latency), own.step_seconds)
        for id, own in machines.items()
    }


def _work(recipe: Recipe, layout: Layout, examples: int) -> Work:
    """What a client's round is made of. A method's option that is not given has its default."""
    training, options = recipe.training, recipe.method.model_extra or {}
    paired = sum(prod(layout.shapes[name]) for name in layout.rank_axis)
    moments = 2 if training.optimizer == "adamw" else int(training.momentum > 0)
    return Work(
        rank=max(1, layout.rank),  # a head alone, or all weights, have none
        per_rank=paired // max(1, layout.rank),
        head=layout.size - paired,
        steps=steps_of(examples, training),
        # What the upload left out stays with the client: one number more for each.
        moments=moments + bool(options.get("feedback", False)),
        down_values=options.get("down_values", "float32"),
        up_values=options.get("up_values", "float32"),
        sieved_head=options.get("head", "sieved") == "sieved",
    )


def _refuse_other_ids(key: str, given: Iterable[str], ids: Iterable[str]) -> None:
    listed, known = set(given), set(ids)
    if missing := sorted(known - listed):
        raise FedSieveError(f"{key}: none for client {missing[0]!r}")
    if unknown := sorted(listed - known):
        raise FedSieveError(f"{key}: there is no client {unknown[0]!r}{nearest(unknown[0], known)}")
