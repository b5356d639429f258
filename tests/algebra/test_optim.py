"""Server optimizers where not every tensor moves in every round, as RoLoRA's factors do not.

The oracle is torch.optim with no gradient on a tensor that a round leaves alone: it skips it, state
and count of steps too.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsieve.algebra.budget import Budget
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import State, compose, step
from fedsieve.algebra.optim import Optimizer, adam, bounded, fading, fedadam, sgd, slots_of
from fedsieve.algebra.sieve import dense
from fedsieve.clients.noise import private
from fedsieve.engine.loop import begin, rounds
from fedsieve.errors import FedSieveError, OptimizerFailed
from fedsieve.methods import rolora
from tests import toy

NAMES = toy.start().layout.names


def _reddi(params: list[torch.Tensor]) -> torch.optim.Optimizer:
    """FedAdam in torch's terms: Adam that is told that it has made so many steps already that
    nothing is corrected for, with v = tau^2 at first.
    """
    made = torch.optim.Adam(params, lr=0.1, betas=(0.9, 0.99), eps=1e-3)
    for param in params:
        made.state[param] = {
            "step": torch.tensor(1e6),
            "exp_avg": torch.zeros_like(param),
            "exp_avg_sq": torch.full_like(param, 1e-6),
        }
    return made


CASES: dict[str, tuple[Callable[[], Optimizer], Callable[[Any], torch.optim.Optimizer], float]] = {
    "adam": (lambda: adam(0.1), lambda p: torch.optim.Adam(p, lr=0.1), 1.0),
    "other betas": (
        lambda: adam(0.02, 0.8, 0.95, 1e-3),
        lambda p: torch.optim.Adam(p, 0.02, (0.8, 0.95), 1e-3),
        1.0,
    ),
    "momentum": (lambda: sgd(0.3, 0.9), lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9), 1.0),
    "sgd": (lambda: sgd(0.3), lambda p: torch.optim.SGD(p, lr=0.3), 1.0),
    "fedadam": (lambda: fedadam(0.1), _reddi, 1.0),
    "fading": (lambda: fading(adam(0.1), 0.7), lambda p: torch.optim.Adam(p, lr=0.1), 0.7),
    "bounded": (lambda: bounded(adam(0.1), 1e9), lambda p: torch.optim.Adam(p, lr=0.1), 1.0),
    "private": (
        lambda: private(adam(0.1), clip=1e9, noise_multiplier=0.0, expected=1, key=Key(0)),
        lambda p: torch.optim.Adam(p, lr=0.1),
        1.0,
    ),
}
patterns = st.lists(st.frozensets(st.sampled_from(NAMES)), min_size=1, max_size=12)


@pytest.mark.parametrize("case", CASES)
@given(pattern=patterns)
@settings(max_examples=30)
def test_for_any_pattern_of_which_tensors_move_it_is_torchs(
    case: str, pattern: list[frozenset[str]]
) -> None:
    make, theirs, fade = CASES[case]
    ours, start = make(), toy.start()
    state = State(start.layout, {"adapter": dict(start.tensors), **ours.init(start.tensors)})
    mirror = {n: t.clone().requires_grad_(True) for n, t in start.tensors.items()}
    server = theirs(list(mirror.values()))
    schedule = torch.optim.lr_scheduler.ExponentialLR(server, fade)
    draws = torch.Generator().manual_seed(0)
    for moving in pattern:
        gradient = {
            n: torch.randn(t.shape, generator=draws, dtype=t.dtype)
            for n, t in start.tensors.items()
        }
        state = step(ours, state, gradient, tuple(sorted(moving)))
        for name, tensor in mirror.items():
            tensor.grad = gradient[name].clone() if name in moving else None
        server.step()
        schedule.step()
    found = state.trees["adapter"]
    assert all((found[n] - mirror[n].detach()).abs().max() <= 1e-9 for n in NAMES)


@pytest.mark.parametrize(
    ("make", "name"), [(sgd, "lr"), (adam, "lr"), (adam, "eps"), (fedadam, "lr"), (fedadam, "tau")]
)
def test_a_number_that_no_step_could_be_taken_with(make: Any, name: str) -> None:
    said = rf"^{name} is .*; it must be a number above 0, at most"
    for value in (0, -1, math.inf, math.nan, "1", True, 1e39, 10**400, 10**5000):
        with pytest.raises(FedSieveError, match=said):
            make(**{name: value})


def test_any_number_of_python_is_taken_as_a_recipe_has_it() -> None:
    half: Any = Fraction(1, 2)
    most, single = 10**38, cast(Any, np.float32(0.5))
    for made, plain in (
        (sgd(half, half), sgd(0.5, 0.5)),
        (sgd(most), sgd(1e38)),
        (adam(half, half, half, most), adam(0.5, 0.5, 0.5, 1e38)),
        (fedadam(single, half, half, 10**19), fedadam(0.5, 0.5, 0.5, 1e19)),
        (fading(sgd(), half), fading(sgd(), 0.5)),
    ):
        assert made.table == plain.table
        assert {type(each) for each in made.table.values()} <= {str, float}
        start = toy.start().tensors
        slots = made.init(start)
        made.step(start, {n: torch.ones_like(t) for n, t in start.items()}, slots)


def test_a_fraction_that_is_none_as_a_float_is_refused() -> None:
    near: Any = Fraction(10**30 - 1, 10**30)
    with pytest.raises(FedSieveError, match=r"beta1 is .* below 1"):
        adam(0.1, near)
    with pytest.raises(FedSieveError, match=r"decay is .* above 0"):
        fading(sgd(), cast(Any, Fraction(1, 10**400)))


def test_the_first_step_of_roloras_a_is_a_whole_one() -> None:
    """Adam's first step is lr in every entry whose gradient is far above eps."""
    method = rolora.method(server=adam(0.1), down_values="float64", up_values="float64")
    setup = toy.federation(method, toy.clients([Budget()] * 3))
    _, progress = begin(setup, toy.start())
    trees = [progress.state.trees["adapter"]]
    trees += [now.state.trees["adapter"] for _, _, now in rounds(setup, progress, 2)]
    for number, moving in ((1, (toy.B1, toy.B2, toy.HEAD)), (2, (toy.A1, toy.A2))):
        for name in moving:
            size = (trees[number][name] - trees[number - 1][name]).abs()
            assert torch.allclose(size, torch.full_like(size, 0.1), rtol=1e-2)


@pytest.mark.parametrize("expected", [0, -1.0, math.nan, True, "4"])
def test_what_the_sum_of_updates_is_divided_by_is_above_zero(expected: Any) -> None:
    server = sgd()._replace(expected=expected)
    with pytest.raises(FedSieveError, match="server: its `expected` is"):
        compose(down=dense, up=dense, server=server)


def test_what_fades_already_is_told() -> None:
    own = sgd()._replace(init=lambda params: {"fading": dict(params)})
    for inner in (fading(sgd(), 0.9), own):
        with pytest.raises(OptimizerFailed, match="fading: the optimizer in it has slots called"):
            slots_of(fading(inner, 0.9), {"x": torch.zeros(2)})
