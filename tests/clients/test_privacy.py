"""Laws of privacy: no payload moves the sum by more than the clip, noise is on every coordinate
with the variance that is claimed, nothing else changes, and the account agrees with exact figures.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import dp_accounting
import pytest
import torch
from dp_accounting import pld, rdp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedsieve.algebra.adapter import Layout, Tree
from fedsieve.algebra.budget import Budget, Client
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import Method, State, compose
from fedsieve.algebra.optim import Optimizer, adam, fading, fedadam, sgd
from fedsieve.algebra.payload import Form, Payload, Values, rounded
from fedsieve.algebra.sieve import dense
from fedsieve.algebra.support import Support, draw_ranks, everything, gather, narrowed
from fedsieve.clients.noise import Adaptive, private
from fedsieve.clients.privacy import (
    Cohorts,
    affordable,
    calibrate,
    ledger,
    settle,
    unamplified,
)
from fedsieve.errors import FedSieveError
from fedsieve.methods import ffa_lora, flasc, fslora
from fedsieve.settings import Kind, Source
from fedsieve.study import figures
from tests import toy

KEY = Key(3)
EXACT: Any = {"down_values": "float64", "up_values": "float64"}


def plain(clip: float, noise: float = 0.0, expected: float = 1.0, **given: object) -> Optimizer:
    """DP-FedAvg."""
    return private(
        sgd(),
        clip=clip,
        noise_multiplier=noise,
        expected=expected,
        key=KEY,
        **given,  # type: ignore[arg-type]
    )


def method_with(server: Optimizer) -> Method:
    return compose(down=dense, up=dense, server=server)


def flat(tree: Tree) -> Tensor:
    return torch.cat([tree[n].double().flatten() for n in sorted(tree)])


def noise_of(optimizer: Optimizer, like: Tree, rounds: int) -> list[Tree]:
    """The noise of each round: what SGD with lr 1 moves by where the gradient is zero."""
    zeros = {n: torch.zeros_like(t) for n, t in like.items()}
    slots = optimizer.init(zeros)
    found = []
    for _ in range(rounds):
        moved, slots = optimizer.step(zeros, zeros, slots)
        found.append({n: -t for n, t in moved.items()})
    return found


# Sensitivity ------------------------------------------------------------------------------------


@st.composite
def payloads(draw: st.DrawFn) -> Payload:
    """Any payload on the toy's layout: every form, some of the ranks, masks on some tensors."""
    layout = toy.start().layout
    ranks = None
    if draw(st.booleans()):
        keep = draw(st.integers(1, layout.rank))
        word = draw(st.integers(0, 2**64 - 1))
        shared = draw(st.booleans())
        ranks = draw_ranks(word, len(layout.pairs), layout.rank, keep, shared=shared)
    seed = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    own = narrowed(layout, ranks, layout.scale)
    masks = {}
    for name in layout.names:
        if draw(st.booleans()):
            density = draw(st.floats(0, 1))
            masks[name] = torch.rand(own.shapes[name], generator=seed) < density
    support = Support(layout.names, ranks, masks)
    size = 10.0 ** draw(st.integers(-8, 30))
    spread = draw(st.sampled_from([0.0, 3.0]))  # all of a size, or a few that tower above the rest
    tree = {
        n: size * (spread * torch.randn(s, generator=seed)).exp() * torch.randn(s, generator=seed)
        for n, s in own.shapes.items()
    }
    form: Form = draw(st.sampled_from(["float64", "float32", "bfloat16", "int8"]))
    return Payload(layout, support, rounded(gather(tree, support), form, seed), "known", "known")


@settings(max_examples=150)
@given(payloads(), st.floats(1e-6, 1e3), st.booleans())
def test_no_payload_moves_the_sum_by_more_than_the_clip(
    payload: Payload, clip: float, with_others: bool
) -> None:
    """With the client and without it; the mean is over a fixed number, so it tells the sum."""
    expected = 7.0
    method = method_with(plain(clip, expected=expected))
    state = method.init(toy.start())
    # The others are 1 entry of the size of the clip each, in different places.
    others = []
    if with_others:
        ones = torch.zeros(payload.layout.size, dtype=torch.float64)
        ones[::37] = clip
        values = rounded(ones, "float64", torch.Generator())
        support = Support(payload.layout.names, None, {})
        others = [(Client("0", 1), Payload(payload.layout, support, values, "known", "known"))]
    there = method.merge(state, iter([*others, (Client("1", 9), payload)]), KEY)
    away = method.merge(state, iter(others), KEY)
    moved = expected * (flat(there.trees["adapter"]) - flat(away.trees["adapter"]))
    size = float(moved.norm())
    # Rounding of float32 values, and of sums in float64 beside weights of about 1.
    slack = 1e-6 * clip + 1e-13
    assert size <= clip + slack
    told = float(flat(payload.tree()).norm())
    if told > 2 * clip:  # and no more is taken away than must be
        assert size >= clip - slack
    if told < clip / 2:
        assert size == pytest.approx(told, rel=1e-5, abs=slack)


def test_the_clip_is_over_all_values_together_and_keeps_the_direction() -> None:
    method = method_with(plain(2.0))
    state = method.init(toy.start())
    layout = state.layout
    numbers = torch.randn(layout.size, generator=torch.Generator().manual_seed(0)).double()
    values = rounded(numbers, "float64", torch.Generator())
    payload = Payload(layout, Support(layout.names, None, {}), values, "known", "known")
    merged = method.merge(state, iter([(Client("0", 1), payload)]), KEY)
    moved = flat(state.trees["adapter"]) - flat(merged.trees["adapter"])
    expected = flat(payload.tree()) * (2.0 / float(numbers.norm()))
    assert float((moved - expected).abs().max()) < 1e-12


# Noise ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["seed", "system"])
def test_the_noise_is_gaussian_with_the_variance_that_is_claimed(source: Source) -> None:
    clip, multiplier, expected = 0.25, 1.5, 8.0
    optimizer = plain(clip, multiplier, expected, noise_from=source)
    tree = {"a": torch.zeros(150, 200), "b": torch.zeros(7), "c": torch.zeros(())}
    rounds = noise_of(optimizer, tree, 4)
    for name in ("b", "c"):
        assert all((noise[name] != 0).all() for noise in rounds)
    numbers = torch.cat([noise["a"].flatten() for noise in rounds]).double()
    numbers = numbers / (multiplier * clip / expected)
    count = numbers.numel()
    assert abs(float(numbers.mean())) < 5 / count**0.5
    assert abs(float((numbers**2).mean()) - 1) < 5 * (2 / count) ** 0.5
    # The whole distribution: Kolmogorov's distance is below 1.95 / sqrt(n) in 999 of 1000 cases.
    ordered = numbers.sort().values
    normal = 0.5 * (1 + torch.erf(ordered / 2**0.5))
    steps = torch.arange(1, count + 1) / count
    assert float((normal - steps).abs().max()) < 2.2 / count**0.5


def test_every_coordinate_gets_noise_of_its_own_in_every_round() -> None:
    """Also where nothing was sent: masks of density 1/20, an eighth of the ranks, a lone client."""
    deviation = 0.5 * 2.0 / 4.0
    server = plain(0.5, 2.0, 4.0)
    lone = [Client("0000", 10, Budget(ratio=0.125, up=0.05))]
    for build in (flasc.method, fslora.method):
        quiet, _, _ = toy.after(build(server=plain(0.5, 0.0, 4.0), **EXACT), lone, 1)
        noisy, _, _ = toy.after(build(server=server, **EXACT), lone, 1)
        noise = (flat(noisy) - flat(quiet)) / deviation
        assert (noise != 0).all()
        assert abs(float((noise**2).mean()) - 1) < 5 * (2 / noise.numel()) ** 0.5
    # Coordinate by coordinate over rounds: variances within 6 deviations of a chi-squared mean.
    small = {"x": torch.zeros(4, 5), "y": torch.zeros(4, 5)}
    table = torch.stack([flat(noise) for noise in noise_of(server, small, 3000)]) / deviation
    assert float(((table**2).mean(0) - 1).abs().max()) < 6 * (2 / 3000) ** 0.5
    # Neither two coordinates, of one tensor or of two, nor two rounds go together.
    together = table.T @ table / 3000 - torch.eye(40, dtype=torch.float64)
    assert float((together - together.diag().diag()).abs().max()) < 6 / 3000**0.5
    assert float(((table[1:] * table[:-1]).mean(0)).abs().max()) < 6 / 3000**0.5


def test_the_noise_is_on_the_mean_before_the_optimizer_sees_it() -> None:
    """DP-FedAdam: its moments are those of the noisy mean, so what follows is post-processing."""
    draws = torch.Generator().manual_seed(0)
    params = {"x": torch.randn(6, generator=draws), "y": torch.randn(2, 3, generator=draws)}
    gradients = [{n: torch.randn(t.shape, generator=draws) for n, t in params.items()}] * 3
    noises = noise_of(plain(0.5, 2.0, 4.0), params, 3)
    inner = fading(fedadam(0.1), 0.5)
    outer = private(inner, clip=0.5, noise_multiplier=2.0, expected=4.0, key=KEY)
    left, slots = params, inner.init(params)
    right, private_slots = params, outer.init(params)
    for gradient, noise in zip(gradients, noises, strict=True):
        noisy = {n: gradient[n] + noise[n] for n in gradient}
        left, slots = inner.step(left, noisy, slots)
        right, private_slots = outer.step(right, gradient, private_slots)
    assert toy.distance(left, right) == 0
    assert set(private_slots) == {*slots, "privacy"}
    for group, tree in slots.items():
        assert toy.distance(tree, private_slots[group]) == 0


def test_noise_follows_from_the_seed_and_the_round_alone() -> None:
    tree = {"x": torch.zeros(50)}
    once, again = (noise_of(plain(1.0, 1.0), tree, 4) for _ in range(2))
    assert all(torch.equal(a["x"], b["x"]) for a, b in zip(once, again, strict=True))
    # Resumed after two rounds: the slot says where it stands.
    optimizer = plain(1.0, 1.0)
    slots = optimizer.init(tree)
    slots["privacy"]["rounds"] += 2
    moved, _ = optimizer.step(tree, tree, slots)
    assert torch.equal(-moved["x"], once[2]["x"])
    other = private(sgd(), clip=1.0, noise_multiplier=1.0, expected=1.0, key=Key(4))
    assert not torch.equal(noise_of(other, tree, 1)[0]["x"], once[0]["x"])
    system = plain(1.0, 1.0, noise_from="system")
    assert not torch.equal(noise_of(system, tree, 1)[0]["x"], noise_of(system, tree, 1)[0]["x"])


def test_a_simulated_cohort_scales_the_noise_and_nothing_else() -> None:
    tree = {"x": torch.zeros(30, dtype=torch.float64)}
    (real,) = noise_of(plain(1.0, 2.0, 10.0), tree, 1)
    simulated = plain(1.0, 2.0, 10.0, simulated_cohort=1000.0)
    (scaled,) = noise_of(simulated, tree, 1)
    assert torch.allclose(scaled["x"], real["x"] * (10 / 1000), rtol=1e-12)
    assert (simulated.clip(simulated.init(tree)), simulated.expected) == (1.0, 10.0)


# Nothing else changes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "server", [sgd(), sgd(0.5, 0.9), adam(0.01), fedadam(0.01), fading(adam(0.01), 0.5)]
)
@pytest.mark.parametrize("build", [flasc.method, fslora.method, ffa_lora.method])
def test_without_noise_and_clip_the_run_is_the_same_to_the_last_bit(
    build: Callable[..., Method], server: Optimizer
) -> None:
    budgets = [Budget(ratio, up=up) for ratio in (0.25, 1.0) for up in (0.1, 1.0)]
    members = toy.clients(budgets)
    free, _, _ = toy.after(build(server=server, **EXACT), members, 3, cohort=3)
    guarded = private(server, clip=math.inf, noise_multiplier=0, expected=3, key=KEY)
    same, _, _ = toy.after(build(server=guarded, **EXACT), members, 3, cohort=3)
    assert all(torch.equal(free[n], same[n]) for n in free)


def test_what_a_method_leaves_alone_stays_free_of_noise() -> None:
    """FFA-LoRA's A is the same whatever the clients do: there is nothing to hide."""
    members = toy.clients([Budget()] * 3)
    tree, _, _ = toy.after(ffa_lora.method(server=plain(1.0, 1.0, 3.0), **EXACT), members, 2)
    for name, tensor in toy.start().tensors.items():
        assert torch.equal(tree[name], tensor) == (name in (toy.A1, toy.A2))


def test_an_empty_round_is_noise_alone() -> None:
    """A Poisson cohort may be empty; that it was is a secret too."""
    method = method_with(plain(1.0, 1.0, 5.0))
    state = method.init(toy.start())
    after: State = method.merge(state, iter([]), KEY)
    (noise,) = noise_of(plain(1.0, 1.0, 5.0), state.trees["adapter"], 1)
    for name, tensor in state.trees["adapter"].items():
        assert torch.equal(after.trees["adapter"][name], tensor - noise[name])


def test_noise_is_added_once() -> None:
    twice = private(plain(1.0, 1.0), clip=1.0, noise_multiplier=1.0, expected=1.0, key=KEY)
    with pytest.raises(FedSieveError, match="adds noise already"):
        twice.init({"x": torch.zeros(2)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip": 0.0}, "clip is 0.0"),
        ({"clip": math.nan}, "clip is nan"),
        ({"clip": math.inf}, "noise needs a finite clip"),
        ({"noise_multiplier": -1.0}, "noise_multiplier is -1.0"),
        ({"noise_multiplier": math.inf}, "noise_multiplier is inf"),
        ({"expected": 0.0}, "a cohort of 0.0"),
        ({"simulated_cohort": -3.0}, "a cohort of -3.0"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(changes: dict[str, float], message: str) -> None:
    options = {"clip": 1.0, "noise_multiplier": 1.0, "expected": 1.0, **changes}
    with pytest.raises(FedSieveError, match=message):
        private(sgd(), key=KEY, **options)  # type: ignore[arg-type]


# The account ------------------------------------------------------------------------------------


def solved(delta_at: Callable[[float], float], delta: float) -> float:
    """The epsilon at which a falling delta(epsilon) reaches delta."""
    low, high = 0.0, 1.0
    while delta_at(high) > delta:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_at(middle) > delta else (low, middle)
    return high


def gaussian_epsilon(deviation: float, delta: float) -> float:
    """The exact epsilon of one Gaussian mechanism of sensitivity 1 (Balle and Wang 2018, eq. 6)."""

    def above(x: float) -> float:
        return math.erfc(-x / 2**0.5) / 2

    def delta_at(epsilon: float) -> float:
        a, b = 1 / (2 * deviation), epsilon * deviation
        return above(a - b) - math.exp(epsilon) * above(-a - b)

    return solved(delta_at, delta)


def mixture_epsilon(
    left: Sequence[tuple[float, float]],
    right: Sequence[tuple[float, float]],
    deviation: float,
    delta: float,
) -> float:
    """The exact epsilon between two mixtures of (weight, mean), both ways, by summing on a grid."""
    x = torch.linspace(-2 - 12 * deviation, 2 + 12 * deviation, 40001, dtype=torch.float64)
    width = float(x[1] - x[0])

    def density(parts: Sequence[tuple[float, float]]) -> Tensor:
        norm = deviation * math.sqrt(2 * math.pi)
        total = torch.zeros_like(x)
        for weight, mean in parts:
            total += weight * (-((x - mean) ** 2) / (2 * deviation**2)).exp() / norm
        return total

    p, q = density(left), density(right)

    def delta_at(epsilon: float) -> float:
        ways = ((p - math.exp(epsilon) * q), (q - math.exp(epsilon) * p))
        return max(float(way.clamp(min=0).sum()) * width for way in ways)

    return solved(delta_at, delta)


@pytest.mark.parametrize("noise", [0.7, 1.0, 3.0, 12.0])
@pytest.mark.parametrize("rounds", [1, 10, 300])
def test_all_clients_is_the_gaussian_mechanism(noise: float, rounds: int) -> None:
    """t rounds of noise z are one of z / sqrt(t), exactly; Renyi's bound is above it, a little."""
    exact = gaussian_epsilon(noise / rounds**0.5, 1e-5)
    told = ledger(Cohorts("all", 50, 50), noise, 1e-5)(rounds)
    assert exact <= told <= 1.1 * exact + 0.1


@pytest.mark.parametrize("noise", [1.0, 4.0])
@pytest.mark.parametrize("rounds", [1, 30])
def test_a_cohort_of_everyone_moves_by_twice_the_clip_when_one_is_exchanged(
    noise: float, rounds: int
) -> None:
    exact = gaussian_epsilon(noise / 2 / rounds**0.5, 1e-5)
    told = ledger(Cohorts("uniform", 50, 50), noise, 1e-5)(rounds)
    assert exact <= told <= 1.1 * exact + 0.1


@pytest.mark.parametrize("noise", [0.6, 1.0, 2.0])
@pytest.mark.parametrize("size", [1, 10, 50])
def test_the_account_of_one_round_is_above_the_exact_epsilon(noise: float, size: int) -> None:
    """Between the two sums that are hardest to tell apart, all others' updates being zero."""
    delta, rate = 1e-5, size / 100
    gone, there = [(1.0, 0.0)], [(1 - rate, 0.0), (rate, 1.0)]
    exact = mixture_epsilon(gone, there, noise, delta)
    told = ledger(Cohorts("poisson", size, 100), noise, delta)(1)
    assert exact <= told <= 1.3 * exact + 1.3
    # One update exchanged for its opposite: without replacement, the bound must be above this.
    other = [(1 - rate, 0.0), (rate, -1.0)]
    exact = mixture_epsilon(other, there, noise, delta)
    assert exact <= ledger(Cohorts("uniform", size, 100), noise, delta)(1)


def test_the_account_grows_with_rounds_and_rate_and_falls_with_noise() -> None:
    kinds: tuple[Kind, ...] = ("poisson", "uniform", "all")
    for kind in kinds:
        size = 100 if kind == "all" else 10
        rounds = [ledger(Cohorts(kind, size, 100), 1.2, 1e-4)(t) for t in (0, 1, 10)]
        assert rounds[0] == 0
        assert rounds == sorted(set(rounds))
        noise = [ledger(Cohorts(kind, size, 100), z, 1e-4)(20) for z in (0.5, 2.0, 8.0)]
        assert noise == sorted(set(noise), reverse=True)
        deltas = [ledger(Cohorts(kind, size, 100), 1.2, d)(20) for d in (1e-8, 1e-2)]
        assert deltas == sorted(set(deltas), reverse=True)
        if kind != "all":
            rates = [ledger(Cohorts(kind, n, 100), 3.0, 1e-4)(20) for n in (1, 20, 80)]
            assert rates == sorted(set(rates))


def test_the_account_of_many_rounds_is_close_to_a_numerical_composition() -> None:
    """Privacy loss distributions, convolved: another method, whose bound is tighter."""
    event = dp_accounting.PoissonSampledDpEvent(0.05, dp_accounting.GaussianDpEvent(1.0))
    tight = pld.PLDAccountant().compose(event, 200).get_epsilon(1e-5)
    told = ledger(Cohorts("poisson", 10, 200), 1.0, 1e-5)(200)
    assert tight <= told <= 1.2 * tight


@pytest.mark.parametrize("noise", [0.3, 0.6, 2.0])
def test_sampling_without_replacement_never_costs_more_than_none_at_all(noise: float) -> None:
    sampled = ledger(Cohorts("uniform", 30, 100), noise, 1e-5)(10)
    assert sampled <= ledger(Cohorts("uniform", 100, 100), noise, 1e-5)(10)


def test_who_knows_when_a_client_took_part_has_an_epsilon_of_its_own() -> None:
    """4 of 40 clients, 40 rounds, epsilon 8: what an audit found for 1, 2, 3 and 8 rounds."""
    noise = calibrate(Cohorts("poisson", 4, 40), epsilon=8.0, delta=1e-3, rounds=40)
    known = unamplified(Cohorts("poisson", 4, 40), noise, 1e-3)
    assert [round(known(k), 1) for k in (1, 2, 3, 8)] == [5.0, 7.8, 10.2, 20.2]
    assert known(0) == 0


@pytest.mark.parametrize(("kind", "moves"), [("poisson", 1), ("all", 1), ("uniform", 2)])
@pytest.mark.parametrize("rounds", [1, 3, 12])
def test_without_amplification_rounds_are_plain_gaussian_mechanisms(
    kind: Kind, moves: int, rounds: int
) -> None:
    """Composed by another method, of privacy loss distributions, whose bound is barely above."""
    event = dp_accounting.GaussianDpEvent(2.5 / moves)
    tight = pld.PLDAccountant().compose(event, rounds).get_epsilon(1e-5)
    told = unamplified(Cohorts(kind, 4, 40), 2.5, 1e-5)(rounds)
    assert told == pytest.approx(tight, rel=1e-3)
    one = mixture_epsilon([(1.0, 0.0)], [(1.0, 1.0)], 2.5 / moves / rounds**0.5, 1e-5)
    assert told == pytest.approx(one, rel=1e-3)


def test_a_plan_tells_both_where_they_differ() -> None:
    given: Any = {"rounds": 40, "clip": 1.0, "delta": 1e-3, "noise_multiplier": 0.692}
    plan = settle(Cohorts("poisson", 4, 40), **given)
    assert plan.known is not None
    tight = pld.PLDAccountant().compose(dp_accounting.GaussianDpEvent(0.692), 4).get_epsilon(1e-3)
    assert "epsilon 7.979 at" in plan.guarantee
    assert f"4.98 for 1, {tight:.4g} for 4, " in plan.guarantee
    assert settle(Cohorts("all", 4, 40), **given).known is None
    assert settle(Cohorts("uniform", 40, 40), **given).known is None
    assert settle(Cohorts("poisson", 4, 40), **given, simulated_cohort=20).known is None


@pytest.mark.parametrize("kind", ["poisson", "uniform", "all"])
def test_the_noise_that_is_found_is_enough_and_barely_so(kind: Kind) -> None:
    cohorts = Cohorts(kind, 40 if kind == "all" else 8, 40)
    found = calibrate(cohorts, epsilon=4.0, delta=1e-4, rounds=25)
    assert ledger(cohorts, found, 1e-4)(25) <= 4.0 < ledger(cohorts, found - 0.001, 1e-4)(25)


def test_rounds_that_are_affordable_are_those_within_the_target() -> None:
    spent = ledger(Cohorts("poisson", 8, 40), 1.0, 1e-4)
    found = affordable(spent, 6.0, 500)
    assert spent(found) <= 6.0 < spent(found + 1)
    assert affordable(spent, 6.0, found - 1) == found - 1
    assert affordable(spent, 1e-6, 500) == 0


# A run's plan -----------------------------------------------------------------------------------


def test_a_target_finds_the_noise_and_all_rounds_fit() -> None:
    plan = settle(Cohorts("poisson", 8, 40), rounds=25, clip=0.5, delta=1e-4, epsilon=4.0)
    assert plan.rounds == 25
    assert plan.spent is not None
    assert plan.spent(25) <= 4.0
    assert plan.expected == 8
    assert f"noise multiplier {plan.noise_multiplier:g}" in plan.guarantee


def test_a_target_with_given_noise_ends_the_run_before_it_is_passed() -> None:
    plan = settle(
        Cohorts("all", 3, 40), rounds=500, clip=0.5, delta=1e-4, epsilon=4.0, noise_multiplier=8.0
    )
    assert plan.spent is not None
    assert plan.spent(plan.rounds) <= 4.0 < plan.spent(plan.rounds + 1)
    assert plan.rounds < 500
    assert plan.expected == 40  # all take part, whatever the cohort's size says
    assert f"after round {plan.rounds}" in (plan.ending or "")
    assert any("of the 500 rounds asked for" in caution for caution in plan.cautions)


def test_noise_alone_is_reported_and_ends_nothing() -> None:
    plan = settle(Cohorts("uniform", 90, 40), rounds=9, clip=1.0, delta=1e-2, noise_multiplier=0.5)
    assert (plan.rounds, plan.ending, plan.expected) == (9, None, 40)
    assert f"epsilon {plan.spent(9):.4g}" in plan.guarantee if plan.spent else False


def test_no_noise_is_said_to_be_no_privacy() -> None:
    plan = settle(Cohorts("uniform", 4, 40), rounds=9, clip=1.0, delta=1e-3, noise_multiplier=0.0)
    assert plan.spent is None
    assert "NONE" in plan.guarantee
    assert plan.cautions


def test_a_simulated_cohort_is_accounted_for_as_what_it_pretends_and_says_so() -> None:
    pretended = settle(
        Cohorts("poisson", 10, 100),
        rounds=20,
        clip=1.0,
        delta=1e-6,
        noise_multiplier=1.0,
        simulated_cohort=1000,
        simulated_population=100_000,
    )
    honest = ledger(Cohorts("poisson", 1000, 100_000), 1.0, 1e-6)
    assert pretended.spent is not None
    assert pretended.spent(20) == honest(20)
    assert pretended.expected == 10
    assert "IN THE SIMULATED FEDERATION" in pretended.guarantee
    assert any("NOT protected" in caution for caution in pretended.cautions)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give epsilon, noise_multiplier, or both"),
        ({"epsilon": 0.0}, "epsilon is 0.0"),
        ({"epsilon": -1.0}, "epsilon is -1.0"),
        ({"epsilon": 1e-9, "delta": 1e-12}, "needs a noise multiplier above"),
        ({"epsilon": 1.0, "delta": 0.0}, "delta is 0.0"),
        ({"epsilon": 1.0, "delta": 1.0}, "delta is 1.0"),
        ({"epsilon": 0.01, "noise_multiplier": 0.5}, "one round spends epsilon"),
        ({"epsilon": 1.0, "noise_multiplier": 0.0}, "without noise there is no epsilon"),
        ({"noise_multiplier": 1.0, "simulated_population": 9}, "needs simulated_cohort"),
        ({"noise_multiplier": 1.0, "simulated_cohort": 2}, "below the real cohort of 4"),
        ({"noise_multiplier": 1.0, "simulated_cohort": 50}, "a larger simulated_population"),
    ],
)
def test_plans_that_make_no_sense_are_refused(given: dict[str, float], message: str) -> None:
    options = {"delta": 1e-4, **given}
    with pytest.raises(FedSieveError, match=message):
        settle(Cohorts("poisson", 4, 40), rounds=5, clip=1.0, **options)  # type: ignore[arg-type]


def test_with_everyone_there_is_no_larger_cohort_to_simulate() -> None:
    with pytest.raises(FedSieveError, match="no larger cohort"):
        settle(
            Cohorts("all", 4, 40),
            rounds=5,
            clip=1.0,
            delta=1e-4,
            noise_multiplier=1.0,
            simulated_cohort=80,
            simulated_population=80,
        )


# A clip that adapts -----------------------------------------------------------------------------


def test_the_clip_goes_to_the_quantile_of_the_norms() -> None:
    """Without noise, over updates of norms 1 to 9: the median is 5, whatever the clip began at."""
    layout = toy.start().layout
    for quantile, expected in ((0.5, 5.0), (0.8, 7.5)):
        for begin in (0.05, 400.0):
            adaptive = Adaptive(quantile, rate=0.2)
            server = private(
                sgd(), clip=begin, noise_multiplier=0, expected=9.0, key=KEY, adaptive=adaptive
            )
            method = method_with(server)
            state = method.init(toy.start())
            for number in range(1, 150):
                updates = [
                    (Client(str(size), 1), update_of_norm(layout, float(size)))
                    for size in range(1, 10)
                ]
                state = method.merge(state, iter(updates), Key(0, number))
            assert server.clip(state.trees) == pytest.approx(expected, abs=0.7)


def update_of_norm(layout: Layout, size: float) -> Payload:
    numbers = torch.randn(layout.size, generator=torch.Generator().manual_seed(int(size)))
    values = Values("float64", numbers.double() * size / numbers.double().norm(), torch.empty(0))
    return Payload(layout, everything(layout), values, "known", "known")


def test_sum_and_count_together_are_as_private_as_the_sum_alone() -> None:
    """Measured noise on both, given to an accountant that knows nothing of how z is shared."""
    z, count_noise, clip, expected = 1.3, 0.8, 2.0, 1.0
    adaptive = Adaptive(0.5, rate=1.0, count_noise=count_noise)
    server = private(
        sgd(), clip=clip, noise_multiplier=z, expected=expected, key=KEY, adaptive=adaptive
    )
    params = {"x": torch.zeros(40_000, dtype=torch.float64)}
    slots = server.init(params)
    moved, slots = server.step(params, params, slots)
    on_sum = float(moved["x"].std()) / clip
    counts = []
    for number in range(4000):
        own = {**slots["privacy"], "rounds": torch.tensor(float(number))}
        settled = server.settle({**slots, "privacy": own}, 0, 0)
        counts.append(-math.log(float(settled["privacy"]["clip"]) / clip))
    assert abs(float(torch.tensor(counts).mean())) < 5 * count_noise / 4000**0.5
    on_count = float(torch.tensor(counts).std())

    def epsilon(*multipliers: float) -> float:
        accountant = rdp.RdpAccountant()
        for multiplier in multipliers:
            accountant.compose(dp_accounting.GaussianDpEvent(multiplier))
        return float(accountant.get_epsilon(1e-5))

    # The count moves by 1/2 at most, the sum by the clip.
    assert epsilon(on_sum, 2 * on_count) == pytest.approx(epsilon(z), rel=0.02)


def test_a_count_that_spends_everything_is_refused() -> None:
    for noise in (0.3, 0.5):
        with pytest.raises(FedSieveError, match=r"count_noise: .* must be above 0.5"):
            plain(1.0, 1.0, adaptive=Adaptive(count_noise=noise))
    with pytest.raises(FedSieveError, match="count_noise"):
        settle(
            Cohorts("poisson", 4, 40),
            rounds=5,
            clip=1.0,
            delta=1e-3,
            noise_multiplier=1.0,
            quantile=0.5,
        )
    large = Cohorts("poisson", 40, 400)
    with pytest.raises(FedSieveError, match="count_noise: 41 is more than the 40 clients"):
        settle(large, rounds=5, clip=1.0, delta=1e-3, epsilon=8, quantile=0.5, count_noise=41.0)
    plan = settle(large, rounds=5, clip=1.0, delta=1e-3, epsilon=8, quantile=0.5)
    assert plan.adaptive == Adaptive(0.5, 0.2, 2.0)
    assert "0.5 quantile" in plan.guarantee


def test_flascs_noise_costs_the_epsilon_that_its_paper_says() -> None:
    """Of its Figure 7, where 10 of Reddit's 32,000 users stand for 1,000, after 200 rounds."""
    figure = figures.load("flasc/fig7")
    table = figure.set["privacy"]
    cohorts = Cohorts("poisson", table["simulated_cohort"], table["simulated_population"])
    told = {}
    for place in figure.place:
        said, _, of = place.name.removeprefix("epsilon ").partition(", ")
        multiplier = place.set["privacy.noise_multiplier"]
        if of == "Reddit" and multiplier > 0:
            told[float(said)] = ledger(cohorts, multiplier, table["delta"])(200)
    assert told == {each: pytest.approx(each, rel=0.1) for each in (2.0, 0.25, 0.025)}
