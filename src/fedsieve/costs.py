"""What a method costs a client each round: memory, download, upload.

There is no formula a method. The method's own functions are rehearsed: a few rounds in which each
client's "training" adds noise to what it may move, with every message really encoded. So the
figures hold for any method, one's own included, and need shapes alone: no weights, no data. Sizes
of masks and of entropy-coded values depend a little on the numbers; everything else is exact.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fedsieve import methods
from fedsieve.adapter import Adapter, Layout, Tree
from fedsieve.budget import Budget, Client
from fedsieve.errors import FedSieveError
from fedsieve.experiment import locate
from fedsieve.keys import Key, generator
from fedsieve.method import Memory, Method, Seat, Trained, View
from fedsieve.train.local import Training
from fedsieve.train.model import Lora, Task, set_up, shape_of
from fedsieve.wire import decode, encode

_META = torch.device("meta")
LARGEST = 100_000_000  # numbers of a tree that is rehearsed
ROUNDS = 3  # the last one is told: by then masks have begun, and the base has changed


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
    start = _start(layout)
    state = method.init(start)
    memories: dict[str, Memory] = {}
    costs: list[Cost] = []
    for number in range(1, ROUNDS + 1):
        key = Key(0, number)
        plan = method.plan(state, key)
        updates = []
        costs = []
        for client in clients:
            seat = Seat(client, start, key._replace(client=client.id))
            payload = method.publish(plan, client, seat.key)
            down = encode(payload)
            sent = decode(down, layout)
            view, memory = method.view(sent, memories.get(client.id, {}), seat)
            report, memory = method.report(view, _moved(view, seat.key), memory, seat)
            up = encode(report)
            memories[client.id] = memory
            updates.append((client, decode(up, layout, payload.support)))
            held = allocated(view, training) + _size(memory)
            costs.append(Cost(view.adapter.layout.rank, held, len(down), len(up)))
        state = method.merge(state, iter(updates), key)
    return costs


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
                bench = set_up(base, task, lora, method.trains, key=Key(0), device=_META)
                layouts[method.trains] = bench.layout
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


def _start(layout: Layout) -> Adapter:
    """Random numbers in the layout's shapes, B zero as LoRA has it."""
    tensors: Tree = {}
    for name in layout.names:
        if layout.rank_axis.get(name, (0, 0))[1] == 1:
            tensors[name] = torch.zeros(layout.shapes[name])
        else:
            draws = generator(Key(0, purpose=name))
            tensors[name] = 0.05 * torch.randn(layout.shapes[name], generator=draws)
    return Adapter(layout, tensors)


def _moved(view: View, key: Key) -> Tree:
    """The view's tensors after noise was added to what may move."""
    trained = dict(view.adapter.tensors)
    for name in view.moves.names:
        noise = torch.randn(trained[name].shape, generator=generator(key.at(f"moved {name}")))
        trained[name] = trained[name] + 0.01 * noise * view.moves.masks.get(name, 1)
    return trained


def _size(memory: Memory) -> int:
    return sum(t.nbytes for tree in memory.values() for t in tree.values())
