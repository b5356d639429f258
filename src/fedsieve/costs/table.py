"""What a method costs a client each round: memory, download, upload.

There is no formula a method. The method's own functions are rehearsed (dry_run.py), with every
message really encoded. So the figures hold for any method, one's own included, and need shapes
alone: no weights, no data. They are those of the last round: by then masks have begun, and the base
has changed. Sizes of masks and of entropy-coded values depend a little on the numbers; everything
else is exact.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import torch

from fedsieve import methods
from fedsieve.algebra.adapter import Layout
from fedsieve.algebra.budget import Budget, Client
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import Memory, Method, Trained, View
from fedsieve.costs import dry_run
from fedsieve.errors import FedSieveError
from fedsieve.recipe.experiment import locate
from fedsieve.settings import Lora, Task, Training
from fedsieve.train.model import ResidentModel, set_up, shape_of

_META = torch.device("meta")
LARGEST = 400_000_000  # numbers of the trees that are rehearsed, of all clients


class Cost(NamedTuple):
    """One client's part in one round, in bytes.

    rank:   of the adapter that it trains
    memory: of the adapter, its gradients, the optimizer's state, and what the client keeps between
            rounds; the base model and its activations come on top
    """

    rank: int
    memory: int
    down: int
    up: int


def rehearse(
    method: Method, layout: Layout, clients: Sequence[Client], training: Training
) -> list[Cost]:
    """The cost of each client, if all of them take part in every round."""
    *_, last = dry_run.rounds(method, layout, clients)
    return [_cost(part, training) for part in last.parts]


def _cost(part: dry_run.Part, training: Training) -> Cost:
    memory = allocated(part.view, training) + _size(part.memory)
    return Cost(part.view.adapter.layout.rank, memory, len(part.down), len(part.up))


def of_model(
    source: str,
    rank: int,
    targets: tuple[str, ...] | str | None,
    classes: int,
    budget: Budget,
    cohort: int,
) -> list[tuple[str, Cost | str]]:
    """Each method's cost for a model, of which the configuration alone is loaded.

    source:  a hub name, a folder, or a fetched name
    classes: of the classifier; 1 stands for a causal LM
    Returns (method, cost), or why there is none. Raises FedSieveError for a model, targets or a
    rank that do not fit.
    """
    return [
        (name, got if isinstance(got, str) else _cost(got[1][0], Training()))
        for name, got in rehearsals(source, rank, targets, classes, budget, cohort)
    ]


def rehearsals(
    source: str,
    rank: int,
    targets: tuple[str, ...] | str | None,
    classes: int,
    budget: Budget,
    cohort: int,
    only: Collection[str] | None = None,
) -> Iterator[tuple[str, tuple[ResidentModel, list[dry_run.Part]] | str]]:
    """Each method's last round for a model of shapes alone, or why there is none.

    only: these methods; None is all. The rest, and what is raised, as in `of_model`.
    """
    task: Task = "classification" if classes > 1 else "causal-lm"
    lora = Lora(rank=rank, alpha=float(rank), targets=targets)
    clients = [Client(str(number), 1, budget) for number in range(cohort)]
    made: dict[Trained, ResidentModel] = {}
    for name in methods.names():
        if only is not None and name not in only:
            continue
        method = methods.load(name)()
        try:
            if method.trains not in made:
                base = shape_of(locate(source), task, classes)
                made[method.trains] = set_up(
                    base, task, lora, method.trains, key=Key(0), device=_META
                )
        except FedSieveError as error:
            if method.trains == "lora":
                raise
            yield name, str(error)  # a causal LM may have no head of its own
            continue
        layout = made[method.trains].layout
        if layout.size * cohort > LARGEST:
            yield name, f"{layout.size:,} numbers: too many to rehearse here"
            continue
        *_, last = dry_run.rounds(method, layout, clients)
        yield name, (made[method.trains], last.parts)


def allocated(view: View, training: Training) -> int:
    """Bytes of a client's adapter, its gradients and what is kept of it, in float32."""
    tensors = view.adapter.tensors
    trained = sum(tensors[name].numel() for name in view.moves.names)
    numbers = sum(t.numel() for t in tensors.values()) + trained
    if training.optimizer == "adamw":
        numbers += 2 * trained + len(view.moves.names)  # a counter of steps for each tensor
    elif training.momentum:
        numbers += trained
    if training.proximal:
        numbers += trained
    return 4 * numbers


def moments(training: Training) -> int:
    """Numbers that are kept for each one that moves: the local optimizer's, and FedProx's start."""
    own = 2 if training.optimizer == "adamw" else int(training.momentum > 0)
    return own + int(training.proximal > 0)


def _size(memory: Memory) -> int:
    return sum(t.nbytes for tree in memory.values() for t in tree.values())
