"""FSLoRA's theory: the step-size bound, and convergence that orders with mean(r / k).

The problem, with its exact objective, is that of benchmarks/convergence.py; a short version of its
measurement runs here, through the method's own functions. Two wrong algebras stand beside the right
one, so that these laws are seen to fail where they must: one forgets the scale r / k, one takes the
mean over the clients that hold a rank instead of counting zeros.
"""

import math
from collections.abc import Iterable
from itertools import combinations, islice
from statistics import mean
from typing import Any

import pytest
import torch
from torch import Tensor

import bound
import convergence
from fedsieve.algebra.adapter import Adapter
from fedsieve.algebra.budget import Budget, Client
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import Method, State, View, compose
from fedsieve.algebra.payload import Payload
from fedsieve.algebra.sieve import dense, sketch
from fedsieve.errors import FedSieveError
from fedsieve.methods.fslora import gradient_bound, step_size_bound

PROBLEM = convergence.problem()
USUAL: dict[str, Any] = {
    "smoothness": 2.0,
    "rho": 1.0,
    "c_h": 1.0,
    "local_steps": 3,
    "ratios": [0.5, 0.25],
}


def test_bound_by_hand() -> None:
    """Theorem 4.4 as printed, worked out with a pencil."""
    # mean(r/k) = (2 + 4) / 2 = 3, L_bar = 6: 2 / (24 * 1 * 2 * 3 * 6) = 1 / 432, the smaller.
    assert step_size_bound(**USUAL) == pytest.approx(1 / 432)
    # Ten of each: 20 / 864; mean(r^2/k^2) = (4 + 16) / 2 = 10, L_tilde L = 40: sqrt(40 * 2 * 2) is
    # 4 sqrt(10), and 1 / (8 * 4 sqrt(10) * 3) is smaller.
    ten = USUAL | {"ratios": [0.5, 0.25] * 10}
    assert step_size_bound(**ten) == pytest.approx(1 / (96 * math.sqrt(10)))
    # Gradients without variance: only the second condition is left.
    many = step_size_bound(smoothness=1, rho=0, c_h=0, local_steps=1, ratios=[1.0] * 100)
    assert many == pytest.approx(1 / 8)
    # The same hundred at k = r / 4: sqrt(L_tilde L) is 4 L.
    quarter = step_size_bound(smoothness=1, rho=0, c_h=0, local_steps=1, ratios=[0.25] * 100)
    assert quarter == pytest.approx(many / 4)
    # A very flat loss: there is no other cap.
    flat = step_size_bound(**USUAL | {"smoothness": 2e-6, "local_steps": 3})
    assert flat == pytest.approx(1e6 / 432)


def test_full_rank_leaves_the_smoothness_as_it_is() -> None:
    alone = step_size_bound(smoothness=3, rho=0.5, c_h=0, local_steps=2, ratios=[1.0])
    assert alone == pytest.approx(1 / (24 * 0.5 * 2 * 3))


def test_promise_by_hand() -> None:
    """The right side of Theorem 4.4, worked out with a pencil."""
    given: dict[str, Any] = {"smoothness": 2.0, "rho": 1.0, "local_steps": 3, "ratios": [0.5, 0.25]}
    exact = gradient_bound(**given, step=0.1, rounds=20, gap=3.0)
    assert exact == pytest.approx(2.0)  # 4 * 3 / (0.1 * 20 * 3): no noise, no difference
    # sigma^2 = 1, sigma_h^2 = 0.5: s^2 = 1 + 3 * 2 * 0.5 = 4; L_bar = 6, L_tilde L = 20 * 2.
    noisy = gradient_bound(**given, step=0.1, rounds=20, gap=3.0, sigma=1.0, sigma_h=0.5**0.5)
    assert noisy == pytest.approx(2.0 + 0.1 * 12 * 4 + 10 * 0.01 * 9 * 40 * 4)


@pytest.mark.parametrize(
    "harder",
    [
        {"smoothness": 2.1},
        {"rho": 1.1},
        {"c_h": 1.1},
        {"local_steps": 4},
        {"ratios": [0.5, 0.125]},
        {"ratios": [0.4, 0.25]},
    ],
)
@pytest.mark.parametrize("copies", [1, 100], ids=["noise binds", "drift binds"])
def test_bound_falls(harder: dict[str, Any], copies: int) -> None:
    def bound(changes: dict[str, Any]) -> float:
        asked = USUAL | changes
        return step_size_bound(**asked | {"ratios": asked["ratios"] * copies})

    assert bound(harder) < bound({})


@pytest.mark.parametrize(
    "wrong",
    [
        {"smoothness": 0.0},
        {"smoothness": math.inf},
        {"smoothness": math.nan},
        {"rho": -0.1},
        {"rho": math.nan},
        {"c_h": -1.0},
        {"local_steps": 0},
        {"ratios": []},
        {"ratios": [0.5, 0.0]},
        {"ratios": [1.5]},
    ],
)
def test_bound_refuses(wrong: dict[str, Any]) -> None:
    with pytest.raises(FedSieveError, match=next(iter(wrong)).removesuffix("s")):
        step_size_bound(**USUAL | wrong)


def _somewhere(seed: int) -> Adapter:
    """An adapter with nothing symmetric about it."""
    begin: Adapter = convergence.start(PROBLEM, seed)
    draws = torch.Generator().manual_seed(seed)
    moved = {
        name: tensor + 0.2 * torch.randn(tensor.shape, generator=draws, dtype=torch.float64)
        for name, tensor in begin.tensors.items()
    }
    return Adapter(begin.layout, moved)


@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_exact_gradient_is_the_mean_over_all_sketches(k: int) -> None:
    """The closed form against autograd through every S of Definition 3.1."""
    adapter = _somewhere(k)
    b = adapter.tensors[convergence.B].clone().requires_grad_()
    a = adapter.tensors[convergence.A].clone().requires_grad_()
    losses = []
    for subset in combinations(range(8), k):
        sketching = torch.zeros(8, 8, dtype=torch.float64)
        for j in subset:
            sketching[j, j] = 8 / k
        error = b @ sketching @ a @ PROBLEM.x - PROBLEM.target
        losses.append(0.5 * (PROBLEM.curvature * error**2).sum())
    loss = torch.stack(losses).mean()
    by_b, by_a = torch.autograd.grad(loss, [b, a])
    exact = convergence.gradient(PROBLEM, adapter, k)
    torch.testing.assert_close(exact[:-1], by_b, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.outer(exact[-1], PROBLEM.x), by_a, rtol=1e-10, atol=1e-12)
    assert convergence.objective(PROBLEM, adapter, (k,)) == pytest.approx(float(loss.detach()))


def _right() -> Method:
    method: Method = convergence.exact()
    return method


def _without_scale() -> Method:
    return compose(down=sketch(), up=dense, down_values="float64", up_values="float64")


def _mean_over_holders() -> Method:
    """Equation 5 misread: a rank's mean over those clients that held it."""
    method = _right()

    def merge(state: State, updates: Iterable[tuple[Client, Payload]], key: Key) -> State:
        returned = list(updates)
        layout = state.layout
        total = {n: torch.zeros_like(p) for n, p in state.trees["adapter"].items()}
        holders = torch.zeros(layout.rank, dtype=torch.float64)
        for _, payload in returned:
            ranks = payload.support.ranks
            held = torch.arange(layout.rank) if ranks is None else ranks[0]
            holders[held] += 1
            for name, change in payload.tree().items():
                total[name].index_add_(layout.rank_axis[name][1], held, change)
        weight = 1 / holders.clamp(min=1)
        shape = {0: (-1, 1), 1: (1, -1)}
        moved = {
            name: p - total[name] * weight.reshape(shape[layout.rank_axis[name][1]])
            for name, p in state.trees["adapter"].items()
        }
        return State(layout, {"adapter": moved})

    return method._replace(merge=merge)


def _drift(method: Method) -> float:
    """|mean move of a round, from one point, + step * grad f~| over |step * grad f~|."""
    ranks, step, draws = (4, 2, 1), 0.1, 500
    clients = [Client(str(i), 1, Budget(ratio=k / 8)) for i, k in enumerate(ranks)]
    state = method.init(_somewhere(3))
    here = method.export(state)
    moved = torch.zeros(len(PROBLEM.target) + 1, 8, dtype=torch.float64)

    def trained(client: Client, view: View) -> dict[str, Tensor]:
        return convergence.train(PROBLEM, view, step, 1)

    for number in range(draws):
        after = convergence.one_round(method, state, clients, trained, Key(0, number))
        change = {n: t - here.tensors[n] for n, t in after.trees["adapter"].items()}
        along = change[convergence.A] @ PROBLEM.x
        moved += torch.cat([change[convergence.B], along[None]]) / draws
    wanted = -step * torch.stack([convergence.gradient(PROBLEM, here, k) for k in ranks]).mean(0)
    return float((moved - wanted).norm() / wanted.norm())


def test_a_round_of_one_step_descends_the_sketched_objective() -> None:
    """Over sketches, a round moves the adapter by -step * grad f~ (equations 2, 4 and 5)."""
    assert _drift(_right()) < 0.15
    assert _drift(_without_scale()) > 0.3
    assert _drift(_mean_over_holders()) > 0.3


def _falls(method: Method) -> dict[str, tuple[float, float]]:
    """Of each set of ranks, at half the predicted step: the mean over 40 rounds and 4 seeds of
    |grad f~|^2, and its last value, in units of its start.
    """
    falls = {}
    for name, ranks in convergence.COHORTS.items():
        step = convergence.predicted(PROBLEM, ranks) / 2
        means, lasts = [], []
        for seed in range(4):
            run = convergence.rounds(
                PROBLEM, ranks, step=step, local_steps=1, seed=seed, method=method
            )
            squares = [point.squared for point in islice(run, 40)]
            means.append(mean(squares) / squares[0])
            lasts.append(squares[-1] / squares[0])
        falls[name] = mean(means), mean(lasts)
    return falls


def _orders(falls: dict[str, tuple[float, float]]) -> bool:
    burdens = {name: convergence.burden(convergence.COHORTS[name]) for name in falls}
    return all(
        falls[x][0] < falls[y][0] for x in falls for y in falls if burdens[x] < burdens[y]
    ) and all(last < 0.02 for _, last in falls.values())


def test_convergence_orders_with_mean_r_over_k() -> None:
    """Theorem 4.4: at half the step that its mean(r / k) allows, a set of fewer ranks is slower."""
    assert _orders(_falls(_right()))


@pytest.mark.parametrize("wrong", [_without_scale, _mean_over_holders])
def test_a_wrong_algebra_does_not_converge_so(wrong: Any) -> None:
    assert not _orders(_falls(wrong()))


def test_the_theory_step_descends() -> None:
    """At the bound's own step, H = 4: 150 rounds keep the promise and need more at fewer ranks."""
    lasts = []
    for k in (8, 4, 2, 1):
        ranks = (k, k, k)
        step = step_size_bound(
            smoothness=convergence.smoothness(PROBLEM),
            rho=convergence.RHO,
            c_h=convergence.C_H,
            local_steps=4,
            ratios=[k / 8] * 3,
        )
        run = convergence.rounds(PROBLEM, ranks, step=step, local_steps=4, seed=0, method=_right())
        points = list(islice(run, 150))
        squares = [point.squared for point in points]
        promise = gradient_bound(
            smoothness=convergence.smoothness(PROBLEM),
            rho=convergence.RHO,
            local_steps=4,
            ratios=[k / 8] * 3,
            step=step,
            rounds=len(points),
            gap=points[0].value,
        )
        assert mean(squares) <= promise
        lasts.append(squares[-1] / squares[0])
    assert lasts == sorted(lasts)
    assert lasts[0] < 0.5


@pytest.mark.parametrize("case", [bound.Case(4, 2, 4), bound.Case(1, 2, 2)], ids=str)
def test_with_noise_and_clients_that_differ_the_promise_is_kept(case: bound.Case) -> None:
    step = bound.allowed(PROBLEM, case)
    found = bound.measure(PROBLEM, case, step, rounds=60, seeds=1)
    assert found.met.rho <= bound.RHO
    assert found.met.extent <= convergence.REGION
    assert 0.01 * found.promised < found.measured <= found.promised


def test_clients_differ_by_what_is_said() -> None:
    """The mean of their gradients is that of f~, and none is further from it than sigma_h says."""
    adapter = convergence.start(PROBLEM, 0)
    adapter.tensors[convergence.B][:] = 0.1 * torch.randn(adapter.tensors[convergence.B].shape)
    own = bound.differing(PROBLEM, 4)
    gradients = torch.stack([convergence.gradient(each, adapter, 4) for each in own])
    mean_of_all = gradients.mean(0)
    torch.testing.assert_close(mean_of_all, convergence.gradient(PROBLEM, adapter, 4))
    apart = float((gradients - mean_of_all).square().sum()) / 4
    reach = max(1.0, convergence.extent(adapter, PROBLEM) / convergence.REGION)
    assert 0 < apart <= bound.sigma_h(PROBLEM, 4) ** 2 * reach
