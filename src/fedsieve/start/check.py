"""What a recipe will do on this machine, found out by loading all of it and training nothing.

Every number is another part's own: who has which rows from the experiment that a run would start
from, bytes from a rehearsal of its rounds (costs/whole_run.py), memory from a step over fake
tensors (costs/memory.py), and seconds from real steps of one client, whose result is thrown away.
"""

import dataclasses
import time
from collections.abc import Sequence
from statistics import fmean, median
from typing import NamedTuple

import torch

from fedsieve.algebra.budget import Budget, Client
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import View
from fedsieve.costs import memory, whole_run
from fedsieve.costs.memory import Needs
from fedsieve.costs.whole_run import Bill
from fedsieve.engine.client import take_part
from fedsieve.errors import FedSieveError
from fedsieve.recipe import workers
from fedsieve.recipe.experiment import Experiment, from_recipe, reaching
from fedsieve.recipe.method import build_method
from fedsieve.recipe.schema import Engine, Recipe, ResourceBudgets
from fedsieve.run.progress import in_vain
from fedsieve.settings import in_round, steps_of
from fedsieve.tasks.examples import Examples, count, take
from fedsieve.tasks.images import Images
from fedsieve.tasks.mixture import in_classes
from fedsieve.tasks.tokens import by_token
from fedsieve.train.local import Fit, fit, tally
from fedsieve.wire import encode_for

BUDGETS = 12  # of so many, the memory is worked out
STEPS = 2  # that are timed, after one that is not


class Spread(NamedTuple):
    """Of some numbers: the least, the one in the middle, the largest."""

    least: float
    middle: float
    most: float


class Labels(NamedTuple):
    """How the classes of the training rows are spread.

    rows:   of a class; the commonest: its name and its share of all rows
    unseen: classes that no training row has
    held:   classes of a client
    """

    classes: int
    rows: Spread
    commonest: tuple[str, float]
    unseen: int
    held: Spread


class Texts(NamedTuple):
    """Tokens of a training text; how many reach `data.max_length`, and how many hold none beside
    what the tokenizer puts around a text.
    """

    tokens: Spread
    cut: int
    empty: int


class Speed(NamedTuple):
    """Seconds here, one client after another: of a step, and of all of an evaluation; and the loss
    of the steps that were timed. None where nothing is evaluated.
    """

    step: float
    evaluation: float | None
    loss: float


class Checked(NamedTuple):
    """What was found.

    recipe: with what the data told filled in
    rows:   to train on, all clients' together; tested: to evaluate on, or None; clients: of these
    labels, texts, values: whichever the task has
    steps:  of a client's round, on average, where texts are not packed
    idle:   what of the recipe would silently do nothing, a sentence each
    notes:  those of the run
    """

    recipe: Recipe
    rows: int
    tested: int | None
    clients: Spread
    many: int
    labels: Labels | None
    values: Spread | None
    texts: Texts | None
    bill: Bill
    needs: dict[Budget, Needs]
    speed: Speed
    steps: float
    idle: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def round_seconds(self) -> float:
        """Of a round here, its evaluation apart."""
        return self.bill.asked * self.steps * self.speed.step

    @property
    def evaluations(self) -> int:
        """Of the whole run: before the first round, after each `every`, and after the last."""
        rounds, every = self.recipe.rounds, self.recipe.evaluation.every
        return 0 if self.speed.evaluation is None else 1 + -(-rounds // every)

    @property
    def seconds(self) -> float:
        """Of the whole run here, loading and the report apart."""
        judged = self.evaluations * (self.speed.evaluation or 0.0)
        return self.recipe.rounds * self.round_seconds + judged


def check(recipe: Recipe, *, trust_remote_code: bool = False) -> Checked:
    """Load what a run of the recipe would load, and look at it.

    Raises FedSieveError for whatever of it does not fit together.
    """
    workers.check(recipe)
    # Whoever trains the clients in a run: here it is this process.
    alone = recipe.model_copy(update={"engine": Engine()})
    experiment = from_recipe(alone, trust_remote_code=trust_remote_code)
    settled, federation, resident = experiment.recipe, experiment.federation, experiment.resident
    assert settled is not None
    assert experiment.examples is not None
    clients = federation.clients
    own = [experiment.examples(client.id) for client in clients]
    weights = sum(parameter.numel() for parameter in _base_of(experiment))
    bill = whole_run.of_clients(
        settled, build_method(settled), resident.layout, resident.dense, clients, weights
    )
    length = max(map(_length, own))
    budgets = [part.budget for part in bill.parts[:BUDGETS]]
    return Checked(
        recipe=settled,
        rows=sum(client.examples for client in clients),
        tested=None if experiment.test is None else count(experiment.test),
        clients=spread([client.examples for client in clients]),
        many=len(clients),
        labels=_labels(settled, own),
        values=_values(own),
        texts=_texts(experiment, own),
        bill=bill,
        needs=memory.of_recipe(settled, budgets, length),
        speed=_speed(experiment, own),
        steps=fmean(steps_of(client.examples, settled.training) for client in clients),
        idle=tuple(idle(recipe, experiment)),
        notes=experiment.notes,
    )


def spread(values: Sequence[float]) -> Spread:
    return Spread(min(values), median(values), max(values))


def idle(recipe: Recipe, experiment: Experiment) -> list[str]:
    """What of a recipe would silently do nothing, or have nothing done, a sentence each."""
    found = in_vain(recipe)
    name, knobs = recipe.method.name, experiment.federation.method.knobs
    if not knobs and isinstance(recipe.budgets, ResourceBudgets):
        found.append(
            f"[budgets] choose nothing: method {name!r} has no budgets, and what clients have is "
            "used for the times in the report alone"
        )
    if experiment.federation.evaluate is not None and recipe.evaluation.every > recipe.rounds:
        found.append(
            f"evaluation.every is {recipe.evaluation.every}, and there are {recipe.rounds} rounds: "
            "the model is evaluated before the first and after the last alone"
        )
    return found


def _base_of(experiment: Experiment) -> list[torch.Tensor]:
    """The base's own weights: all of the model but the pairs."""
    resident = experiment.resident
    pairs = {id(p) for name, p in resident.parameters() if name in resident.layout.rank_axis}
    return [each for each in resident.model.parameters() if id(each) not in pairs]


def _length(examples: Examples) -> int:
    """Tokens of the longest row, or what memory.py takes for those of an image."""
    if isinstance(examples, Images):
        height, width = examples.pixels.shape[-2:]
        return max(1, height * width // memory.PATCH)
    return int(examples.attention_mask.sum(1).max())


def _labels(recipe: Recipe, own: Sequence[Examples]) -> Labels | None:
    """Of a task each of whose rows has one class or several."""
    names = recipe.data.classes
    if not names or any(by_token(each.labels) for each in own):
        return None
    held = [in_classes(each.labels, len(names)) for each in own]
    rows = torch.stack(held).sum(0)
    most = int(rows.argmax())
    return Labels(
        len(names),
        spread(rows.tolist()),
        (names[most], float(rows[most]) / max(1, sum(map(count, own)))),
        int((rows == 0).sum()),
        spread([int((each > 0).sum()) for each in held]),
    )


def _values(own: Sequence[Examples]) -> Spread | None:
    """Of a task whose labels are numbers."""
    if any(each.labels.ndim > 1 or not each.labels.is_floating_point() for each in own):
        return None
    return spread(torch.cat([each.labels for each in own]).tolist())


def _texts(experiment: Experiment, own: Sequence[Examples]) -> Texts | None:
    recipe, tokenizer = experiment.recipe, experiment.resident.tokenizer
    assert recipe is not None
    lengths = [each.attention_mask.sum(1) for each in own if not isinstance(each, Images)]
    if not lengths:
        return None
    bare = 0 if tokenizer is None else len(tokenizer("")["input_ids"])
    all_ = torch.cat(lengths)
    cut = sum(reaching(each, recipe.data.max_length) for each in own)
    return Texts(spread(all_.tolist()), cut, int((all_ <= bare).sum()))


def _speed(experiment: Experiment, own: Sequence[Examples]) -> Speed:
    """Steps of the client with as many rows as most, and one batch of the evaluation."""
    recipe, federation, resident = experiment.recipe, experiment.federation, experiment.resident
    assert recipe is not None
    clients = federation.clients
    order = sorted(range(len(clients)), key=lambda number: clients[number].examples)
    number = order[len(order) // 2]
    client, examples = clients[number], own[number]
    training, method = in_round(recipe.training, 1, recipe.rounds), federation.method
    key = federation.own_key(1)._replace(client=client.id)
    fits: list[Fit] = []

    def train(view: View, client: Client, key: Key) -> Fit:
        for steps in (1, STEPS):
            few = dataclasses.replace(training, steps=steps, epochs=1)
            fits.append(fit(resident, view, examples, few, key))
        return fits[-1]

    plan = method.plan(method.init(experiment.start), federation.own_key(1))
    message = encode_for(method.publish(plan, client, key))
    reply, _ = take_part(method, train, experiment.start, client, {}, key, message)
    if reply.reason is not None:
        raise FedSieveError(f"client {client.id!r} cannot train: {reply.reason}")
    timed = fits[-1]
    return Speed(timed.compute / max(1, timed.steps), _evaluation(experiment), timed.loss)


def _evaluation(experiment: Experiment) -> float | None:
    """Seconds that all that is evaluated takes, by its first batch."""
    recipe, test = experiment.recipe, experiment.test
    if test is None or experiment.federation.evaluate is None:
        return None
    assert recipe is not None
    batch = recipe.evaluation.batch
    some = take(test, torch.arange(min(batch, count(test))))
    began = time.perf_counter()
    tally(
        experiment.resident,
        experiment.start,
        some,
        batch=batch,
        precision=recipe.training.precision,
    )
    return (time.perf_counter() - began) * count(test) / count(some)
