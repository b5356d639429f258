"""Each method on a problem whose optimum is known: a teacher of the same shape made the targets.

Clients see different inputs but one teacher, so the loss that all of them share has its minimum at
zero, whatever their inputs: a method that is right drives it there. Methods that may not reach it
exactly (a mask that is fixed early, say) have their own limit.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedsieve import methods
from fedsieve.algebra.adapter import Adapter, Tree, layout_of
from fedsieve.algebra.budget import Budget, Client
from fedsieve.algebra.cores import Cores, cored
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import Memory, Method, Trained, View
from fedsieve.algebra.optim import sgd
from fedsieve.engine.local import in_process
from fedsieve.engine.loop import Federation, begin, rounds
from fedsieve.settings import Sampling, Training
from fedsieve.train.local import Fit

A, B, HEAD = "m.lora_A.weight", "m.lora_B.weight", "m.head.weight"
ROWS, INPUTS, OUTPUTS, RANK = 6, 5, 3, 4
CLIENTS = 4


def drawn(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


FROZEN, START_HEAD = drawn(1, ROWS, INPUTS) / 2, drawn(2, OUTPUTS, ROWS) / 2
CHANGE = 0.6 * drawn(3, ROWS, 1) @ drawn(4, 1, INPUTS)  # of rank 1
TEACHER_HEAD = START_HEAD + 0.3 * drawn(5, OUTPUTS, ROWS)
FACTORS = torch.linalg.qr(drawn(7, ROWS, RANK))[0], torch.linalg.qr(drawn(8, INPUTS, RANK))[0].T


def start(trains: Trained = "lora") -> Adapter:
    zero = torch.zeros(ROWS, RANK, dtype=torch.float64)
    tensors = {A: drawn(6, RANK, INPUTS) / 2, B: zero, HEAD: START_HEAD}
    layout = layout_of(tensors, 1.0)
    if isinstance(trains, Cores):
        layout = cored(layout, trains)
        gains = {n: torch.ones(1, 1, dtype=torch.float64) for n in layout.names if "gain" in n}
        zeros = {n: torch.zeros(s, dtype=torch.float64) for n, s in layout.shapes.items()}
        tensors = {**zeros, **gains, HEAD: START_HEAD}
    return Adapter(layout, dict(sorted(tensors.items())))


def product(tree: Tree) -> Tensor:
    """What is added to the weight: B A, or the sum of the g_j B_j R_j A_j."""
    if A in tree:
        return tree[B] @ tree[A]
    cores = [name for name in sorted(tree) if "core" in name]
    total, side = torch.zeros(ROWS, INPUTS, dtype=torch.float64), RANK // len(cores)
    for number, name in enumerate(cores):
        own = slice(number * side, (number + 1) * side)
        gain = tree.get(name.replace("core", "gain"), torch.ones(()))
        total = total + gain * FACTORS[0][:, own] @ tree[name] @ FACTORS[1][own]
    return total


def change_of(trains: Trained) -> Tensor:
    """What the teacher has and the student lacks: something that the student can learn."""
    if trains == "head":
        return torch.zeros_like(CHANGE)
    if not isinstance(trains, Cores):
        return CHANGE
    shapes = start(trains).layout.shapes
    return product({n: drawn(40 + i, *s) for i, (n, s) in enumerate(shapes.items()) if "core" in n})


def loss(tree: Tree, scale: float, base: Tree, x: Tensor, y: Tensor) -> Tensor:
    weight = FROZEN + base.get("m.base", 0) + scale * product(tree)
    return ((x @ weight.T @ tree[HEAD].T - y) ** 2).mean()


class Optimum(NamedTuple):
    """How a method is to be run on the problem, and how near it must come.

    options, budget: its settings, and what its clients can afford
    least:   the share of the first loss that may be left after `number` rounds
    only:    the part of the model that the teacher changed; "" for all of it
    """

    options: dict[str, Any] = {}  # noqa: RUF012
    budget: Budget = Budget()
    least: float = 1e-3
    number: int = 150
    only: str = ""


def share_left(name: str, case: Optimum) -> float:
    """The loss after the rounds over the loss before them."""
    # A plain mean: Adam's steps of one size would need a rate that is chosen for the problem.
    exact = {"server": sgd(), "down_values": "float64", "up_values": "float64"}
    method: Method = methods.load(name)(**exact, **case.options)
    if method.trained_by is not None:
        method = method.trained_by(lambda number: Training(lr=0.1, momentum=0.0, steps=4))
    change = change_of("head" if case.only == "head" else method.trains)
    data = {}
    for number in range(CLIENTS):
        x = drawn(100 + number, 20, INPUTS)
        x[:, number] *= 2  # every client sees another direction best
        data[f"{number:04d}"] = (x, x @ (FROZEN + change).T @ TEACHER_HEAD.T)

    def train(view: View, client: Client, key: Key) -> Fit:
        held = view.adapter
        tree = {n: t.clone().requires_grad_(True) for n, t in held.tensors.items()}
        value = torch.zeros(())
        for _ in range(4):
            value = loss(tree, held.layout.scale, held.base, *data[client.id])
            if view.penalty is not None:
                value = value + view.penalty(tree)
            gradients = torch.autograd.grad(value, list(tree.values()), allow_unused=True)
            with torch.no_grad():
                for (name, tensor), slope in zip(tree.items(), gradients, strict=True):
                    moves = name in view.moves.names and (case.only != "head" or name == HEAD)
                    if moves and slope is not None:
                        tensor -= 0.1 * slope * view.moves.masks.get(name, torch.ones(()))
        return Fit({n: t.detach() for n, t in tree.items()}, float(value.detach()), 4, 0.0)

    members = [Client(id, 20, case.budget) for id in data]
    memories: dict[str, Memory] = {}
    exchange = in_process(method, train, start(method.trains), memories)
    federation = Federation(method, members, Sampling(size=CLIENTS), 3, exchange)
    _, progress = begin(federation, start(method.trains))

    def left() -> float:
        """The mean of the clients' losses, of the global model or each client's own."""
        values = []
        for id, pair in data.items():
            model = method.export(progress.state)
            if method.personal is not None:
                model = method.personal(model, memories.get(id, {}))
            values.append(float(loss(model.tensors, model.layout.scale, model.base, *pair)))
        return sum(values) / len(values)

    first = left()
    for _, receipts, now in rounds(federation, progress, case.number):
        assert all(receipt.dropped is None for receipt in receipts)
        progress = now
    return left() / first
