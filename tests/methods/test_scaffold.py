"""SCAFFOLD: what its control variates do, and what they cost."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fedsieve
from fedsieve.algebra.adapter import Adapter, Tree, layout_of
from fedsieve.algebra.budget import Budget, Client
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import ClientContext, Memory, Method, View
from fedsieve.algebra.optim import bounded, sgd
from fedsieve.algebra.payload import Form
from fedsieve.engine.local import in_process
from fedsieve.engine.loop import Federation, Progress, begin, rounds
from fedsieve.errors import FedSieveError, WireError
from fedsieve.methods.scaffold import pace
from fedsieve.recipe import read as recipes
from fedsieve.recipe.method import build_method
from fedsieve.settings import Sampling, Training
from fedsieve.train.local import Fit

A, B, HEAD = "m.lora_A.weight", "m.lora_B.weight", "m.head.weight"
CLIENTS = 6


def drawn(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


START = Adapter(
    layout_of({A: drawn(1, 2, 5), B: drawn(2, 4, 2), HEAD: drawn(3, 3)}, 1.0),
    {HEAD: drawn(3, 3), A: drawn(1, 2, 5), B: drawn(2, 4, 2)},
)
# Client i's loss is sum_j s_ij (x_j - t_ij)^2 / 2, over all numbers of its adapter.
STEEP = {f"{i}": {n: 0.2 + drawn(10 + i, *s).abs() for n, s in START.layout.shapes.items()}
         for i in range(CLIENTS)}  # fmt: skip
TOWARDS = {f"{i}": {n: 3 * drawn(50 + i, *s) for n, s in START.layout.shapes.items()}
           for i in range(CLIENTS)}  # fmt: skip
TRAINING = Training(lr=0.2, momentum=0.0, steps=8)


@pytest.mark.parametrize("momentum", [0.0, 1e-300, 0.5, 0.9, 0.999999])
def test_the_pace_is_that_of_the_steps(momentum: float) -> None:
    """Of a number whose gradient is one, and at once for as many as a site may claim."""
    training = Training(lr=0.01, momentum=momentum)
    number = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([number], lr=0.01, momentum=momentum)
    for steps in range(40):
        assert pace(training, steps) == pytest.approx(-float(number), rel=1e-9, abs=1e-12)
        number.grad = torch.ones_like(number)
        optimizer.step()
    assert pace(training, 10**15) == pytest.approx(0.01 * 10**15 / (1 - momentum), rel=1e-6)


def optimum() -> Tree:
    """Where the mean of the clients' losses is smallest: each number's own weighted mean."""
    best = {}
    for name in START.layout.names:
        steep = torch.stack([STEEP[i][name] for i in STEEP])
        towards = torch.stack([TOWARDS[i][name] for i in STEEP])
        best[name] = (steep * towards).sum(0) / steep.sum(0)
    return best


def stepping(training: Training) -> Callable[[View, Client, Key], Fit]:
    """Local training by torch's own SGD on the client's loss, with what the method adds to it."""

    def train(view: View, client: Client, key: Key) -> Fit:
        tree = {n: t.clone().requires_grad_() for n, t in view.adapter.tensors.items()}
        optimizer = torch.optim.SGD(tree.values(), training.lr, momentum=training.momentum)
        for _ in range(training.steps or 1):
            optimizer.zero_grad()
            steep, towards = STEEP[client.id], TOWARDS[client.id]
            parts = [(steep[n] * (t - towards[n]) ** 2).sum() / 2 for n, t in tree.items()]
            value = torch.stack(parts).sum()
            if view.penalty is not None:
                value = value + view.penalty(tree)
            value.backward()
            optimizer.step()
        return Fit({n: t.detach() for n, t in tree.items()}, 1.0, training.steps or 1, 0.0)

    return train


def run(
    method: Method, last: int, cohort: int = CLIENTS, training: Training = TRAINING
) -> tuple[Progress, dict[str, Memory], list[Any]]:
    memories: dict[str, Memory] = {}
    exchange = in_process(method, stepping(training), START, memories)
    clients = [Client(f"{i}", 20, Budget()) for i in range(CLIENTS)]
    sampling = Sampling(size=cohort)
    federation = Federation(method, clients, sampling, 3, exchange)
    _, progress = begin(federation, START)
    all_receipts: list[Any] = []
    for _, receipts, now in rounds(federation, progress, last):
        assert all(receipt.dropped is None for receipt in receipts)
        progress = now
        all_receipts += receipts
    return progress, memories, all_receipts


def away(progress: Progress) -> float:
    best = optimum()
    return max(float((t - best[n]).abs().max()) for n, t in progress.state.trees["adapter"].items())


def scaffold(training: Training = TRAINING, form: Form = "float64", **more: Any) -> Method:
    method = fedsieve.scaffold(down_values=form, up_values=form, **more)
    assert method.trained_by is not None
    return method.trained_by(lambda number: training)


def fedit(**more: Any) -> Method:
    return fedsieve.fedit(down_values="float64", up_values="float64", **more)


@pytest.mark.parametrize("momentum", [pytest.param(0.0, marks=pytest.mark.slow), 0.7])
def test_it_reaches_the_optimum_that_many_local_steps_miss(momentum: float) -> None:
    training = Training(lr=0.1, momentum=momentum, steps=8)
    plain, _, _ = run(fedit(), 60, training=training)
    ours, _, _ = run(scaffold(training), 100, training=training)
    assert away(plain) > 0.1
    assert away(ours) < 1e-4


def test_it_does_where_half_of_the_clients_take_part() -> None:
    plain, _, _ = run(fedit(), 100, cohort=3)
    ours, _, _ = run(scaffold(server=sgd(0.5)), 250, cohort=3)
    assert away(plain) > 0.1
    assert away(ours) < 1e-2


def test_a_client_that_is_new_is_not_corrected() -> None:
    """Of its own gradients nothing is known yet: c alone would be a second gradient on top."""
    _, _, receipts = run(scaffold(), 6, cohort=1)
    ids = [receipt.client for receipt in receipts]
    new = next((n for n, id in enumerate(ids) if id in ids[:n]), len(ids))
    assert new > 1, "more than one new client in a row"
    ours, _, told = run(scaffold(), new, cohort=1)
    plain, _, same = run(fedit(), new, cohort=1)
    assert [r.client for r in told] == [r.client for r in same]
    assert [r.down_bytes for r in told] == [r.down_bytes for r in same]  # and gets no c
    for name, x in plain.state.trees["adapter"].items():
        assert torch.equal(ours.state.trees["adapter"][name], x)


def test_a_client_that_lost_its_own_is_told_and_does_not_train_on() -> None:
    """c alone, with nothing of its own against it, would be a second gradient."""
    method = scaffold()
    progress, _, _ = run(method, 2)
    client, key = Client("1", 20, Budget()), Key(3, 3, "1")
    message = method.publish(progress.state, client, key)
    with pytest.raises(WireError, match="a control variate that this client has not kept"):
        method.view(message, {}, ClientContext(client, START, key))


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.9])
def test_the_pace_is_how_far_sgd_goes(momentum: float) -> None:
    for steps in (1, 2, 7):
        x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([x], 0.03, momentum=momentum)
        for _ in range(steps):
            x.grad = torch.ones_like(x)
            optimizer.step()
        assert pace(Training(lr=0.03, momentum=momentum), steps) == pytest.approx(-x.item())


@pytest.mark.parametrize("form", ["float64", "float32", "bfloat16", "int8"])
def test_the_server_has_the_sum_of_what_clients_keep(form: Form) -> None:
    progress, memories, _ = run(scaffold(form=form), 7, cohort=4)
    total = progress.state.trees["control"]
    for name in START.layout.names:
        kept = torch.stack([memory["control"][name] for memory in memories.values()]).sum(0)
        assert torch.allclose(total[name].double(), kept.double(), rtol=1e-5, atol=1e-4)
    assert all(memory.keys() == {"control"} for memory in memories.values())


def test_what_a_client_keeps_is_its_mean_gradient() -> None:
    """After one step it is the gradient where the round began, whatever it kept before."""
    one = Training(lr=0.05, momentum=0.0, steps=1)
    method = scaffold(one)
    before, _, _ = run(method, 3, training=one)
    _, memories, _ = run(method, 4, training=one)
    for id, memory in memories.items():
        for name, x in before.state.trees["adapter"].items():
            slope = STEEP[id][name] * (x - TOWARDS[id][name])
            assert torch.allclose(memory["control"][name], slope, atol=1e-9)


def test_uploads_are_fedits_and_downloads_hold_as_much_again() -> None:
    _, _, plain = run(fedit(), 2)
    _, _, ours = run(scaffold(), 2)
    assert [r.up_bytes for r in ours] == [r.up_bytes for r in plain]
    first, second = ours[:CLIENTS], ours[CLIENTS:]
    assert [r.down_bytes for r in first] == [r.down_bytes for r in plain[:CLIENTS]]
    for own, other in zip(second, plain[CLIENTS:], strict=True):
        assert own.down_bytes == 2 * other.down_bytes + 16


def test_a_server_that_clips_is_refused() -> None:
    with pytest.raises(FedSieveError, match="bounds nothing"):
        fedsieve.scaffold(server=bounded(sgd(), 1.0))


UNFIT = (
    {"optimizer": "adamw"},
    {"weight_decay": 0.1},
    {"clip": 1.0},
    {"proximal": 0.1},
    {"packing": True},
)


@pytest.mark.parametrize("unfit", UNFIT, ids=lambda each: next(iter(each)))
def test_training_that_tells_no_gradient_is_refused_by_name(unfit: dict[str, Any]) -> None:
    ((name, value),) = unfit.items()
    table = {
        "rounds": 1, "cohort": 1, "model": {"source": "minilm-l6"},
        "data": {"train": "x.csv", "text": "t", "label": "l"}, "method": {"name": "scaffold"},
        "partition": {"kind": "iid", "clients": 2},
        "training": {name: value},
    }  # fmt: skip
    with pytest.raises(FedSieveError, match=rf"^training\.{name}: the method scaffold"):
        build_method(recipes.check(table))
    with pytest.raises(FedSieveError, match=rf"^training\.{name}: the method scaffold"):
        fedsieve.finetune(
            "model", [{"text": ["a"], "label": [0]}], "scaffold", rounds=1,
            training=Training(**unfit),
        )  # fmt: skip


def test_a_function_that_trains_is_refused() -> None:
    with pytest.raises(FedSieveError, match=r"^training: a function trains in its own way"):
        fedsieve.finetune(
            "model", [{"text": ["a"], "label": [0]}], "scaffold", rounds=1,
            training=lambda model, rows, seed: None,
        )  # fmt: skip
