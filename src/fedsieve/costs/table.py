"""What a method costs a client each round: memory, download, upload.

There is no formula a method. The method's own functions are rehearsed (dry_run.py), with every
message really encoded. So the figures hold for any method, one's own included, and need shapes
alone: no weights, no data. They are those of the last round: by then masks have begun, and the base
has changed. Sizes of masks and of entropy-coded values depend a little on the numbers; everything
else is exact.
"""

from collections.abc import Sequence
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
from fedsieve.train.model import set_up, shape_of

_META = torch.device("meta")
LARGEST = 100_000_000  # numbers of a tree that is rehearsed


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
    return [
        Cost(
            part.view.adapter.layout.rank,
            allocated(part.view, training) + _size(part.memory),
            len(part.down),
            len(part.up),
        )
        for part in last.parts
    ]


def of_model(
    source: str,
    rank: int,
    targets: tuple[str, ...] | None,
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
    task: Task = "classification" if classes > 1 else "causal-lm"
    lora = Lora(rank=rank, alpha=float(rank), targets=targets)
    clients = [Client(str(number), 1, budget) for number in range(cohort)]
    costs: list[tuple[str, Cost | str]] = []
    layouts: dict[Trained, Layout] = {}
    for name in methods.names():
        method = methods.load(name)()
        try:
            if method.trains not in layouts:
                base = shape_of(locate(source), task, classes)
                resident = set_up(base, task, lora, method.trains, key=Key(0), device=_META)
                layouts[method.trains] = resident.layout
        except FedSieveError as error:
            if method.trains == "lora":
                raise
            costs.append((name, str(error)))  # a causal LM may have no head of its own
            continue
        layout = layouts[method.trains]
        if layout.size > LARGEST:
            costs.append((name, f"{layout.size:,} numbers: too many to rehearse here"))
            continue
        costs.append((name, rehearse(method, layout, clients, Training())[0]))
    return costs


def allocated(view: View, training: Training) -> int:
    """Bytes of a client's adapter, its gradients and the optimizer's state, in float32."""
    tensors = view.adapter.tensors
    trained = sum(tensors[name].numel() for name in view.moves.names)
    numbers = sum(t.numel() for t in tensors.values()) + trained
    if training.optimizer == "adamw":
        numbers += 2 * trained + len(view.moves.names)  # a counter of steps for each tensor
    elif training.momentum:
        numbers += trained
    return 4 * numbers


def _size(memory: Memory) -> int:
    return sum(t.nbytes for tree in memory.values() for t in tree.values())
