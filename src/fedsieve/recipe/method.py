"""The method that a recipe describes, built and checked against the recipe's other tables."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from fedsieve import methods
from fedsieve.algebra import optim
from fedsieve.algebra.method import Knob, Method, Unbounded
from fedsieve.algebra.optim import Optimizer
from fedsieve.algebra.options import kinds, value_of
from fedsieve.clients.privacy import refuse_what_is_not_covered
from fedsieve.errors import FedSieveError, nearest, quoted
from fedsieve.recipe.schema import (
    Budgets,
    ListBudgets,
    MethodTable,
    Recipe,
    ResourceBudgets,
    ServerTable,
    TierBudgets,
    deployed,
    limits_by_id,
    sampling,
)
from fedsieve.settings import NORM_BOUND, Training, in_round, refuse_flags


def build_method(recipe: Recipe, around: Callable[[Optimizer], Optimizer] | None = None) -> Method:
    """The method that the recipe's [method], [server] and [[budgets]] tables describe.

    around: what the server optimizer is put into (`privacy.PrivacyPlan.around`, once it is known)
    Raises FedSieveError for an option that the method lacks, a value that it does not take, or
    budgets that it would ignore.
    """
    build = methods.load(recipe.method.name)
    options = _options(build, recipe.method.model_extra or {}, "method")
    recipe = with_server(recipe)
    server_options = recipe.server.model_extra or {}
    if recipe.server.optimizer is None:
        server = alone(recipe.method).server  # one that no recipe can name, and so cannot change
        _options(lambda: None, server_options, "server")
    else:
        make_server = getattr(optim, recipe.server.optimizer)
        chosen = _options(make_server, server_options, "server")
        try:
            server = make_server(**chosen)
        except FedSieveError as error:  # which begins with the number's name
            raise FedSieveError(f"server.{error}") from None
    if recipe.server.decay < 1:
        server = optim.fading(server, recipe.server.decay)
    if recipe.server.clip is not None:
        if recipe.privacy is not None:
            raise FedSieveError("server.clip: [privacy] has its own clip: leave one of them out")
        server = optim.bounded(server, recipe.server.clip)
    if around is not None:
        server = around(server)
    elif recipe.privacy is not None:
        # What the noise will be is not known yet; what it asks of the method is.
        clipped = optim.bounded(server, recipe.privacy.clip)
        server = clipped._replace(private=recipe.privacy.noise_from)
    try:
        method: Method = build(server=server, **options)
    except Unbounded as error:
        raise _in_the_words_of(recipe, error) from None
    if method.trained_by is not None:
        method = method.trained_by(partial(_in_round, recipe))
    if optim.limits(server) and not method.linear:  # one that was not made by `compose`
        raise _in_the_words_of(recipe, Unbounded("merge"))
    for knob in limits_said(recipe.budgets, method.knobs):
        if knob not in method.knobs:
            raise FedSieveError(
                f"budgets.{knob}: the method {recipe.method.name!r} makes no use of it (clients "
                f"would get {knob} 1 whatever the recipe says): remove it "
                "(`budgets=[{}]` leaves all of them out) or choose another method"
            )
    refuse_what_is_not_covered(method, sampling(recipe))
    if deployed(recipe):
        _refuse_what_a_deployment_must_not(recipe)
    return method


def _in_round(recipe: Recipe, number: int) -> Training:
    return in_round(recipe.training, number, recipe.rounds)


def with_server(recipe: Recipe) -> Recipe:
    """The recipe with the method's own server optimizer written out, if it names none, and with the
    bound on updates.

    A run that is gone on with then has the same, whatever the defaults are by that time.
    Raises FedSieveError for an option that the method lacks or a value that it does not take.
    """
    own = {} if recipe.server.optimizer is not None else alone(recipe.method).server.table
    given = recipe.server.model_dump(exclude_unset=True, exclude_none=True)
    bound = norm_bound(recipe)
    told = "none" if bound == math.inf else bound
    server = ServerTable.model_validate({**own, **given, "norm_bound": told})
    return recipe.model_copy(update={"server": server})


def norm_bound(recipe: Recipe) -> float:
    """How many times the median norm of its round an update may have: `Federation.norm_bound`.

    Raises FedSieveError for one beside [privacy]: who is merged would depend on others' updates.
    """
    said = recipe.server.norm_bound
    if said == "none":
        return math.inf
    if recipe.privacy is not None:
        if said is not None:
            raise FedSieveError(
                "server.norm_bound: [privacy] has a clip, which bounds every update by itself, and "
                "whether one is left out would tell of the others: leave it out"
            )
        return math.inf
    if said is not None:
        return said
    return NORM_BOUND if recipe.server.clip is None else math.inf


def knobs(recipe: Recipe) -> frozenset[Knob]:
    """The budgets that the recipe's method uses, whatever budgets the recipe gives.

    Raises FedSieveError for an option that the method lacks or a value that it does not take.
    """
    return alone(recipe.method).knobs


def alone(table: MethodTable) -> Method:
    """The method that a recipe's table [method] describes, with the server that is its own.

    Raises FedSieveError for an option that the method lacks or a value that it does not take.
    """
    build = methods.load(table.name)
    method: Method = build(**_options(build, table.model_extra or {}, "method"))
    return method


def _in_the_words_of(recipe: Recipe, error: Unbounded) -> FedSieveError:
    """The same error, with the recipe's own keys."""
    table = "server.clip" if recipe.privacy is None else "[privacy]"
    if error.by == "weighting":
        return FedSieveError(
            f"method.weighting: with {table} it must be 'uniform': a client's number of examples "
            "is its own secret, and would weigh its update beyond the clip"
        )
    return FedSieveError(
        f"{table}: the server of the method {recipe.method.name!r} does not move by a mean of "
        "the clients' changes alone, so clipping these bounds nothing: choose a method that does "
        f"(fedit, fslora, flasc, ...), or remove {table}"
    )


def _refuse_what_a_deployment_must_not(recipe: Recipe) -> None:
    """Raises FedSieveError for what noise that cannot be drawn again does not allow."""
    if recipe.checkpoint.every != 1:
        raise FedSieveError(
            "checkpoint.every: privacy.noise_from = 'system' needs 1: a round that was given out "
            "and is done again with new noise would be spent twice"
        )
    if recipe.evaluation.on == "validation":
        raise FedSieveError(
            "evaluation.on: privacy.noise_from = 'system' needs 'test': the rows that are held "
            "back for validation are the clients' own, and no noise covers figures from them"
        )
    if recipe.data.validation is not None:
        raise FedSieveError(
            "data.validation: leave it out with privacy.noise_from = 'system': which rows "
            "are held back depends on how many there are in all, so one client's would decide "
            "which rows the others train on, and the clip would not bound what one client does"
        )


def limits_said(budgets: Budgets, knobs: frozenset[Knob]) -> list[Knob]:
    """What some client's budget says that is not 1, for a method that uses `knobs`."""
    if isinstance(budgets, ResourceBudgets):
        return []  # only what the method uses is chosen
    if isinstance(budgets, TierBudgets):
        if budgets.tiers == 1:
            return []
        return ["ratio"] if tiers_differ_in(budgets, knobs) == "rank" else ["down", "up"]
    said: list[Knob] = []
    given: Sequence[Any] = budgets if isinstance(budgets, tuple) else [budgets]
    if isinstance(budgets, ListBudgets):
        given = list(limits_by_id(budgets).values())
        if any(each.rank is not None or each.ratio not in (None, 1) for each in given):
            said.append("ratio")
    elif not isinstance(budgets, tuple) or any(tier.ratio != 1 for tier in budgets):
        said.append("ratio")
    if any(each.down != 1 for each in given):
        said.append("down")
    if any(each.up != 1 for each in given):
        said.append("up")
    return said


def tiers_differ_in(budgets: TierBudgets, knobs: frozenset[Knob]) -> Literal["rank", "density"]:
    """What FLASC's tiers differ in, for a method that uses `knobs`."""
    return budgets.by or ("rank" if "ratio" in knobs else "density")


def options_of(build: Any) -> list[str]:
    """The names of the options that a method's `method`, or an optimizer's function, takes."""
    return [name for name in inspect.signature(build).parameters if name != "server"]


def _options(build: Any, given: Mapping[str, Any], table: str) -> dict[str, Any]:
    known = {name: kind for name, kind in kinds(build).items() if name != "server"}
    checked = {}
    for name, value in given.items():
        if name not in known:
            raise FedSieveError(f"{table}.{name}: unknown key{nearest(name, known)}")
        try:
            refuse_flags(known, {name: value})
        except ValueError as error:
            raise FedSieveError(f"{table}.{error}") from None
        try:
            checked[name] = value_of(known[name], value, strict=False)
        except ValueError as error:
            said = f"{error} (it is {quoted(value)})"
            raise FedSieveError(f"{table}.{name}: {said}") from None
    return checked
