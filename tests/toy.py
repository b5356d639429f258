"""A small federation in float64: two linear layers with LoRA, or with cores between frozen factors,
and a head, trained by plain autograd.

It knows nothing of FedSieve's trainer: it takes a client's adapter at whatever rank it has, and the
scale beside it, and takes gradient steps on W0 + s B A. That makes it an oracle for the algebra.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedsieve.algebra.adapter import Adapter, Tree, layout_of
from fedsieve.algebra.budget import Budget, Client
from fedsieve.algebra.cores import Cores, cored
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import ClientContext, Memory, Method, Trained, View
from fedsieve.algebra.support import everything
from fedsieve.clients.sampling import cohort as drawn
from fedsieve.engine.local import in_process
from fedsieve.engine.loop import (
    Federation,
    Progress,
    Receipt,
    Round,
    begin,
    evaluated,
    merged,
    rounds,
)
from fedsieve.settings import Sampling, Training
from fedsieve.train.local import Fit

SEED = 7  # of the clients
RANK, INPUTS, HIDDEN, OUTPUTS = 8, 12, 10, 3
A1, B1 = "m.first.lora_A.weight", "m.first.lora_B.weight"
A2, B2 = "m.second.lora_A.weight", "m.second.lora_B.weight"
HEAD = "m.head.weight"


def start(seed: int = 0, *, zero_b: bool = False, trains: Trained = "lora") -> Adapter:
    """An adapter of rank 8 on both layers, in float64, or the cores of one."""
    draws = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draws, dtype=torch.float64) / 3

    tensors = {
        A1: random(RANK, INPUTS),
        B1: random(HIDDEN, RANK) * (0 if zero_b else 1),
        A2: random(RANK, HIDDEN),
        B2: random(HIDDEN, RANK) * (0 if zero_b else 1),
        HEAD: random(OUTPUTS, HIDDEN),
    }
    pairs = Adapter(layout_of(tensors, scale=0.5), dict(sorted(tensors.items())))
    if not isinstance(trains, Cores):
        return pairs
    layout = cored(pairs.layout, trains)
    cores = {n: random(*shape) * (0 if zero_b else 1) for n, shape in layout.shapes.items()}
    gains = {n: torch.ones(1, 1, dtype=torch.float64) for n in layout.names if "gain" in n}
    return Adapter(layout, {**cores, HEAD: tensors[HEAD], **gains})


def factors() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """B and A of the two layers, where cores are trained between them."""
    draws = torch.Generator().manual_seed(98)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draws, dtype=torch.float64) / 3

    return (
        (random(HIDDEN, RANK), random(RANK, INPUTS)),
        (random(HIDDEN, RANK), random(RANK, HIDDEN)),
    )


def products(tree: Tree) -> tuple[Tensor, Tensor]:
    """What an adapter adds to the two layers' weights at scale 1: B A, or sum_j g_j B_j R_j A_j."""
    if A1 in tree:
        return tree[B1] @ tree[A1], tree[B2] @ tree[A2]
    found = []
    for module, (b, a) in zip(("m.first", "m.second"), factors(), strict=True):
        cores = [n for n in sorted(tree) if n.startswith(f"{module}.lora_core.")]
        width = RANK // len(cores)
        parts = []
        for number, name in enumerate(cores):
            own = slice(number * width, (number + 1) * width)
            gain = tree.get(f"{module}.lora_gain.{number}", torch.ones(()))
            parts.append(gain * (b[:, own] @ tree[name] @ a[own]))
        found.append(torch.stack(parts).sum(0))
    return found[0], found[1]


def frozen() -> tuple[Tensor, Tensor]:
    """The base weights of the two layers."""
    draws = torch.Generator().manual_seed(99)
    first = torch.randn(HIDDEN, INPUTS, generator=draws, dtype=torch.float64) / 4
    second = torch.randn(HIDDEN, HIDDEN, generator=draws, dtype=torch.float64) / 4
    return first, second


def data(client: str) -> tuple[Tensor, Tensor]:
    """A client's own 6 inputs and targets."""
    draws = torch.Generator().manual_seed(1000 + int(client))
    x = torch.randn(6, INPUTS, generator=draws, dtype=torch.float64)
    return x, torch.randn(6, OUTPUTS, generator=draws, dtype=torch.float64)


def weights(tree: Tree, scale: float, base: Tree) -> tuple[Tensor, Tensor]:
    """What the two layers really multiply by: W0 + base + scale * B A."""
    (first, second), (one, two) = frozen(), products(tree)
    first = first + base.get("m.first.base", 0) + scale * one
    return first, second + base.get("m.second.base", 0) + scale * two


def loss(tree: Tree, scale: float, x: Tensor, y: Tensor, *, base: Tree | None = None) -> Tensor:
    """Mean squared error of the network."""
    first, second = weights(tree, scale, base or {})
    hidden = torch.tanh(x @ first.T)
    hidden = torch.tanh(hidden @ second.T)
    return ((hidden @ tree[HEAD].T - y) ** 2).mean()


def train(view: View, client: Client, key: Key, *, steps: int = 3, lr: float = 0.1) -> Fit:
    """Plain gradient descent on those of a client's entries that the view lets move."""
    adapter = view.adapter
    tree = {n: t.clone().requires_grad_(True) for n, t in adapter.tensors.items()}
    value = torch.zeros(())
    for _ in range(steps):
        value = loss(tree, adapter.layout.scale, *data(client.id), base=adapter.base)
        if view.penalty is not None:
            value = value + view.penalty(tree)
        gradients = torch.autograd.grad(value, list(tree.values()))
        with torch.no_grad():
            for (name, tensor), gradient in zip(tree.items(), gradients, strict=True):
                if name in view.moves.names:
                    tensor -= lr * gradient * view.moves.masks.get(name, torch.ones(()))
    return Fit({n: t.detach() for n, t in tree.items()}, float(value.detach()), steps, 0.0)


def trained(number: int) -> Training:
    """How `train` trains in a round."""
    return Training(lr=0.1, momentum=0.0, steps=3)


def clients(budgets: Sequence[Budget]) -> list[Client]:
    """One client for each budget; client i has 10 + i examples."""
    return [Client(f"{i:04d}", 10 + i, budget) for i, budget in enumerate(budgets)]


def federation(
    method: Method,
    members: Sequence[Client],
    *,
    cohort: int | None = None,
    seed: int = SEED,
    memories: dict[str, Memory] | None = None,
    adapter: Adapter | None = None,
) -> Federation:
    """The clients in this process, every message really encoded and decoded."""
    adapter = adapter or start(trains=method.trains)
    exchange = in_process(method, train, adapter, {} if memories is None else memories)
    sampling = Sampling(size=cohort or len(members))
    return Federation(method, members, sampling, seed, exchange)


def after(
    method: Method,
    members: Sequence[Client],
    number: int,
    *,
    cohort: int | None = None,
    seed: int = SEED,
    zero_b: bool = False,
    memories: dict[str, Memory] | None = None,
) -> tuple[Tree, list[Receipt], Progress]:
    """The adapter, all receipts and the progress after some rounds."""
    begun = start(zero_b=zero_b, trains=method.trains)
    setup = federation(method, members, cohort=cohort, seed=seed, adapter=begun, memories=memories)
    _, progress = begin(setup, begun)
    receipts: list[Receipt] = []
    for _, part, now in rounds(setup, progress, number):
        receipts.extend(part)
        progress = now
    return method.export(progress.state).tensors, receipts, progress


def one_round(
    setup: Federation, progress: Progress, *, evaluate: bool = False
) -> tuple[Round, list[Receipt], Progress]:
    """One round, evaluated when it is due or when `evaluate` says so."""
    half = merged(setup, progress, last=progress.round + 1 if evaluate else None)
    return evaluated(setup, half), half.receipts, half.progress


def nobody_drawn() -> tuple[Sampling, list[Client]]:
    """A Poisson sampling whose first round has nobody in it, at `federation`'s own seed."""
    members = clients([Budget()] * 4)
    sampling = Sampling("poisson", 1)
    for number in range(1, 60):
        ids = [c._replace(id=f"{int(c.id) + 10 * number:04d}") for c in members]
        if not drawn(ids, sampling, Key(SEED, 1)):
            return sampling, ids
    raise AssertionError("a round of four clients at 1/4 is empty in a third of all draws")


def whole(adapter: Adapter) -> View:
    """All of an adapter, to be trained."""
    return View(adapter, adapter.layout, everything(adapter.layout), everything(adapter.layout))


def context(client: Client, key: Key | None = None, trains: Trained = "lora") -> ClientContext:
    """A client's own end."""
    return ClientContext(client, start(trains=trains), key or Key(7, 1, client.id))


def distance(left: Tree, right: Tree) -> float:
    """The largest difference of two trees of the same names."""
    assert sorted(left) == sorted(right)
    return max(float((left[n] - right[n]).abs().max()) for n in left)


def no_memory() -> list[Exception]:
    """How it is said that memory does not suffice: by Python, by torch of a device's, and of the
    machine's own.
    """
    try:
        torch.empty(1 << 50)
    except RuntimeError as error:
        return [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), error]
    raise AssertionError("a machine with a petabyte")
