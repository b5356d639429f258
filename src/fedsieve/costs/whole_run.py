"""What a whole run of a recipe sends, worked out before a row is read or a weight is loaded.

The run is rehearsed: the engine's own rounds with the recipe's cohorts, budgets and method, every
message really encoded, and noise in the place of training. The model's shapes come from its
configuration. What only the rows would tell must be said: how many clients there are, how many
classes, and, where budgets follow from deadlines, how many rows a client has.

What is rehearsed is bounded whatever a recipe says: of many rounds the first, and of a large cohort
as many clients as are soon done, who stand for the others.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import torch

from fedsieve.algebra.adapter import Layout
from fedsieve.algebra.budget import Budget, Client
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import Method, State, View
from fedsieve.costs import dry_run
from fedsieve.costs.table import LARGEST
from fedsieve.data.names import numbered
from fedsieve.engine.local import in_process, punctual
from fedsieve.engine.loop import Federation, Receipt, Round, begin, rounds
from fedsieve.errors import FedSieveError
from fedsieve.recipe import schema
from fedsieve.recipe.budgets import hand_out, machines_of
from fedsieve.recipe.experiment import locate
from fedsieve.recipe.method import build_method
from fedsieve.recipe.schema import ListBudgets, Recipe, ResourceBudgets
from fedsieve.settings import Sampling
from fedsieve.tasks import catalogue
from fedsieve.train.local import Fit
from fedsieve.train.model import set_up, shape_of

MOST_CLIENTS = 1_000_000
_META = torch.device("meta")
_WORK = 300_000_000  # numbers of all messages that are rehearsed, about
_MESSAGE = 100_000  # numbers that take as long as what a message costs beside its numbers
_FEWEST = 6  # rounds: by then masks have begun, and whoever was away comes back
_COHORT = 64  # clients of a round that are rehearsed, if there are so many
_STEADY = 0.05  # by so much the rounds' bytes may differ from those before


class Part(NamedTuple):
    """Clients of one budget: how many there are, and the mean of what one sent and got a round, in
    bytes; None where none of them was drawn.
    """

    budget: Budget
    clients: int
    down: float | None
    up: float | None


class Bill(NamedTuple):
    """What a run sends, in bytes, and what makes it up.

    parts:     by budget
    numbers:   that are trained, and that the model has in all
    rounds:    of the run; rehearsed: of them, the others are taken to be as the last ones were
    stand_ins: clients of a round that were rehearsed in the place of all; None where all were
    asked:     clients a round, those who come too late or not at all included: the mean
    total:     of the whole run; dense: the same where every message were all of dense LoRA, float32
    steady:    whether the rounds that were rehearsed came to as much one as the other; where they
               do not and some were not rehearsed, the total is rough
    """

    parts: list[Part]
    numbers: tuple[int, int]
    rounds: int
    rehearsed: int
    asked: float
    total: float
    dense: float
    steady: bool
    stand_ins: int | None = None


def of_recipe(
    recipe: Recipe,
    classes: int | None = None,
    clients: int | None = None,
    rows: int | None = None,
) -> Bill:
    """What a run of a recipe will send. Masks and entropy-coded values depend a little on the
    numbers, and clients that get no rows, which nobody knows here, are not asked in a run.

    classes: of the task's labels, where the recipe does not list them
    clients: how many there are, where the rows would tell
    rows:    of each client, where budgets depend on them
    Raises FedSieveError where the recipe leaves open what is asked for above, for a model that
    cannot be found, and for budgets that do not fit.
    """
    ids = _ids(recipe, clients)
    task = catalogue.load(recipe.model.task)
    found = classes or len(recipe.data.classes or ())
    if task.named and not found:
        raise FedSieveError("data.classes is not in the recipe: say how many with --classes")
    timed = isinstance(recipe.budgets, ResourceBudgets)
    if timed and rows is None and recipe.training.steps is None:
        raise FedSieveError(
            "budgets follow from what a client does in a round, and so from its rows: say how many "
            "with --rows, or give training.steps"
        )
    method = build_method(recipe)
    base = shape_of(locate(recipe.model.source), recipe.model.task, found, recipe.model.settings)
    weights = sum(parameter.numel() for parameter in base.parameters())
    resident = set_up(base, recipe.model.task, recipe.lora, method.trains, key=Key(0), device=_META)
    counts = dict.fromkeys(ids, rows or 1)
    machines = machines_of(recipe, counts)
    budgets = hand_out(recipe, method, resident.layout, counts, machines)
    everyone = [
        Client(id, counts[id], budgets[id])
        if machines is None
        else Client(id, counts[id], budgets[id], machines[id].link, machines[id].step_seconds)
        for id in sorted(ids)
    ]
    return of_clients(recipe, method, resident.layout, resident.dense, everyone, weights)


def of_clients(
    recipe: Recipe,
    method: Method,
    layout: Layout,
    dense: Layout,
    everyone: Sequence[Client],
    weights: int,
) -> Bill:
    """The same where the clients are known.

    layout: of what is trained; dense: of dense LoRA; weights: numbers of the model in all
    """
    if layout.size > LARGEST:
        raise FedSieveError(f"{layout.size:,} trained numbers: too many to rehearse here")
    sampling = schema.sampling(recipe)
    asked = _asked(sampling, [client.id for client in everyone])
    work = max(_MESSAGE, layout.size)
    some = max(_COHORT, _WORK // (_FEWEST * work))
    stand_ins, times = (None, 1.0) if asked <= some else (some, asked / some)
    if stand_ins is not None:
        sampling = dataclasses.replace(sampling, kind="uniform", size=some, extra=0, quorum=0)
    number = min(recipe.rounds, max(_FEWEST, int(_WORK / (2 * max(1, min(asked, some)) * work))))
    done, state = _rehearsed(recipe, method, layout, dense, everyone, number, sampling)
    if stand_ins is not None and "base" in state.trees:
        raise FedSieveError(
            f"cohort: {asked:,.0f} clients a round are too many to rehearse, and with "
            f"{recipe.method.name} some cannot stand for all: what a client is sent of the base "
            f"grows with the cohort. Ask with cohort={some}, which is less than such a run sends "
            "by a client"
        )
    each = [times * (summary.down_bytes + summary.up_bytes) for summary, _ in done]
    late = each[len(each) // 2 :]
    left = recipe.rounds - number
    receipts = [receipt for _, of_round in done for receipt in of_round]
    last, late_dense = times * done[-1][0].dense_bytes, 0.0
    if left:
        early = times * done[len(done) - len(late) - 1][0].dense_bytes
        late_dense = (last - early) / len(late)
    return Bill(
        _parts(everyone, receipts),
        (layout.size, weights),
        recipe.rounds,
        number,
        times * len(receipts) / number,
        sum(each) + left * fmean(late),
        last + left * late_dense,
        abs(fmean(late) / max(1.0, fmean(each[1 : -len(late)] or late)) - 1) < _STEADY,
        stand_ins,
    )


def _ids(recipe: Recipe, clients: int | None) -> list[str]:
    """The clients' ids, as a run would call them."""
    listed: Any = None
    if isinstance(recipe.budgets, ListBudgets | ResourceBudgets):
        listed = recipe.budgets.clients
    if isinstance(listed, dict):
        return list(listed)
    number = clients or recipe.partition.clients or len(listed or ())
    if not number:
        raise FedSieveError(
            f"how many clients partition.kind {recipe.partition.kind!r} makes is known once the "
            "rows are read: say how many with --clients"
        )
    if number > MOST_CLIENTS:
        raise FedSieveError(
            f"{number:,} clients: costs are worked out for {MOST_CLIENTS:,} at most (--clients "
            f"{MOST_CLIENTS}), of whom a cohort costs as much as of more"
        )
    return numbered(number)


def _asked(sampling: Sampling, ids: Sequence[str]) -> float:
    """How many clients a round asks, in the mean."""
    if isinstance(sampling.availability, Mapping):
        there = float(sum(sampling.availability.get(id, 1.0) for id in ids))
    else:
        there = sampling.availability * len(ids)
    if sampling.kind == "uniform":
        return min(sampling.size + sampling.extra, there)
    return sampling.probability(len(ids)) * there


def _rehearsed(
    recipe: Recipe,
    method: Method,
    layout: Layout,
    dense: Layout,
    clients: Sequence[Client],
    number: int,
    sampling: Sampling,
) -> tuple[list[tuple[Round, list[Receipt]]], State]:
    """The first rounds of a run, with noise in the place of training, and the state after them."""
    start, steps = dry_run.start(layout), recipe.training.steps or 1

    def train(view: View, client: Client, key: Key) -> Fit:
        return Fit(dry_run.moved(view, key), 1.0, steps, 0.0)

    exchange = in_process(method, train, start, {})
    federation = Federation(
        method=method._replace(private=None),  # no noise here, so an empty draw moves nothing
        clients=clients,
        sampling=sampling,
        seed=recipe.seed,
        exchange=punctual(exchange, sampling.size) if sampling.extra else exchange,
        dense=dense,
        spare=number,
    )
    _, progress = begin(federation, start)
    every = list(rounds(federation, progress, number))
    return [(summary, receipts) for summary, receipts, _ in every], every[-1][2].state


def _parts(clients: Sequence[Client], receipts: Sequence[Receipt]) -> list[Part]:
    of = {client.id: client.budget for client in clients}
    by: dict[Budget, list[Receipt]] = defaultdict(list)
    for receipt in receipts:
        by[of[receipt.client]].append(receipt)
    many: dict[Budget, int] = defaultdict(int)
    for client in clients:
        many[client.budget] += 1
    return [
        Part(
            budget,
            count,
            fmean(each.down_bytes for each in by[budget]) if by[budget] else None,
            fmean(each.up_bytes for each in by[budget]) if by[budget] else None,
        )
        for budget, count in sorted(many.items())
    ]
