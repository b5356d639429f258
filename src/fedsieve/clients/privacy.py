"""What client-level differential privacy with a trusted server a run has, and against whom.

`ledger` says what (epsilon, delta) a number of rounds has spent, for the sampling that is really
used and the noise of `noise.private`, by the Renyi accountant of dp-accounting; that number holds
while nobody knows who took part. `unamplified` says it for those who do. `settle` works out a run's
noise and rounds, and `refuse_what_is_not_covered` says where no account of this kind holds.
docs/privacy.md says what the guarantee covers, against whom, and what not.
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import Method
from fedsieve.algebra.optim import Optimizer
from fedsieve.clients.noise import Adaptive, beside_the_count, private
from fedsieve.errors import FedSieveError, count
from fedsieve.settings import Kind, Sampling, Source

Spent = Callable[[int], float]  # rounds -> epsilon at the ledger's delta

LEAST = 1e-6  # that a noise multiplier is
_GRID = 1000  # noise multipliers are searched in steps of 1 / _GRID: short to write down
_LARGEST = 1e6
_INSTALL = "privacy needs the package dp-accounting: pip install 'fedsieve[privacy]'"


class Cohorts(NamedTuple):
    """How the clients of a round are drawn, as far as the accountant asks.

    kind:    "uniform" draws `size` clients without replacement, "poisson" each client by itself
             with probability size / clients, "all" takes everyone
    size:    clients a round; the expected number for "poisson"
    clients: how many there are in all
    """

    kind: Kind
    size: int
    clients: int


class PrivacyPlan(NamedTuple):
    """A run's privacy, settled: what `private` needs, and what is to be told.

    noise_multiplier: z; the noise on the sum of updates has the standard deviation z * clip
    expected:   n, what the sum is divided by
    simulated_cohort: the cohort that the noise is for, where that is not the real one; else None
    noise_from, adaptive: see `noise.private`
    spent:      rounds -> epsilon; None where there is no noise
    rounds:     how many rounds are within the target, at most those that were asked for
    guarantee:  one sentence for everyone who reads the results
    cautions:   what they should be warned of
    ending:     why no more rounds than these are possible, or None
    known:      rounds in which a client took part -> epsilon against those who know which these
                were; None where there is no noise, where drawing clients buys nothing, or where the
                cohort is simulated
    """

    clip: float
    noise_multiplier: float
    expected: float
    simulated_cohort: int | None
    noise_from: Source
    spent: Spent | None
    rounds: int
    guarantee: str
    cautions: tuple[str, ...]
    ending: str | None
    adaptive: Adaptive | None = None
    known: Spent | None = None

    def around(self, optimizer: Optimizer, key: Key) -> Optimizer:
        """The server optimizer, made private as this plan says."""
        return private(
            optimizer,
            clip=self.clip,
            noise_multiplier=self.noise_multiplier,
            expected=self.expected,
            key=key,
            simulated_cohort=self.simulated_cohort,
            noise_from=self.noise_from,
            adaptive=self.adaptive,
        )


def ledger(cohorts: Cohorts, noise_multiplier: float, delta: float) -> Spent:
    """A function from a number of rounds to the epsilon that they spend at `delta`.

    noise_multiplier: z, over the clip C, whatever the kind of sampling

    What two federations that must look alike differ in, and so how far the sum can move, depends
    on the sampling:

    poisson: one client more or less; by C. The subsampled Gaussian (Mironov et al. 2019,
             arXiv 1908.10530) at q = size / clients
    all:     one client more or less (its update is there or is zero); by C. The plain Gaussian
    uniform: one client's data exchanged for any other; the size of a cohort is fixed and public, so
             its update goes and another comes: by 2 C. Sampling without replacement (Wang et al.
             2019, arXiv 1808.00087, Theorem 27), or no amplification at all where that is less:
             the theorem's bound can be above it when the noise is small

    Raises FedSieveError if dp-accounting is missing, or for numbers that make no sense.
    """
    if not 0 < delta < 1:
        raise FedSieveError(f"privacy: delta is {delta}; it must be between 0 and 1")
    if not (0 < cohorts.size <= cohorts.clients):
        raise FedSieveError(
            f"privacy: a cohort of {cohorts.size} of {cohorts.clients} clients makes no sense"
        )
    if not (noise_multiplier >= LEAST and math.isfinite(noise_multiplier)):
        raise FedSieveError(
            f"privacy: noise_multiplier is {noise_multiplier}; it must be a number from {LEAST:g} "
            "up: of less noise the account is infinite"
        )
    try:
        import dp_accounting
        from dp_accounting import rdp
    except ImportError as error:
        raise FedSieveError(_INSTALL) from error
    relations = dp_accounting.NeighboringRelation
    gaussian = dp_accounting.GaussianDpEvent(noise_multiplier)
    if cohorts.kind == "all":
        relation, events = relations.ADD_OR_REMOVE_ONE, [gaussian]
    elif cohorts.kind == "poisson":
        relation = relations.ADD_OR_REMOVE_ONE
        events = [dp_accounting.PoissonSampledDpEvent(cohorts.size / cohorts.clients, gaussian)]
    else:
        relation = relations.REPLACE_ONE
        # The accountant's multiplier is over the sensitivity, and that is 2 C here.
        gaussian = dp_accounting.GaussianDpEvent(noise_multiplier / 2)
        sampled = dp_accounting.SampledWithoutReplacementDpEvent
        events = [sampled(cohorts.clients, cohorts.size, gaussian), gaussian]
    with _quiet():
        accountants = [rdp.RdpAccountant(neighboring_relation=relation) for _ in events]
        curves = [a.compose(e).rdp.tolist() for a, e in zip(accountants, events, strict=True)]
    orders = accountants[0].orders.tolist()
    # Renyi divergences of one round, at each order; those of t rounds are t times as much.
    curve = [min(bounds) for bounds in zip(*curves, strict=True)]

    def spent(rounds: int) -> float:
        if rounds == 0:  # an order that is left out is infinite, and 0 times that is nothing
            return 0.0
        epsilon, _ = rdp.compute_epsilon(orders, [rounds * r for r in curve], delta)
        return float(epsilon)

    return spent


def unamplified(cohorts: Cohorts, noise_multiplier: float, delta: float) -> Spent:
    """A function from the number of rounds in which a client took part to the epsilon against those
    who know which rounds these were.

    Nothing is gained from how clients are drawn then. A client's updates in k rounds of noise z are
    one Gaussian mechanism of z / sqrt(k), whose epsilon at `delta` is known exactly (Balle and Wang
    2018, arXiv 1805.06530, Theorem 8). By how much the sum moves is as in `ledger`.

    Raises FedSieveError if dp-accounting is missing.
    """
    try:
        import dp_accounting
    except ImportError as error:
        raise FedSieveError(_INSTALL) from error
    deviation = noise_multiplier / (2 if cohorts.kind == "uniform" else 1)

    @cache  # milliseconds each, and asked of every client; of how many rounds, there are few
    def spent(rounds: int) -> float:
        if rounds == 0:
            return 0.0
        return float(dp_accounting.get_epsilon_gaussian(deviation / rounds**0.5, delta))

    return spent


def calibrate(cohorts: Cohorts, *, epsilon: float, delta: float, rounds: int) -> float:
    """The smallest noise multiplier, in steps of 0.001, with which `rounds` rounds stay in epsilon.

    Raises FedSieveError if epsilon is not above 0, or so small that no sane noise reaches it.
    """
    if not epsilon > 0:
        raise FedSieveError(f"privacy: epsilon is {epsilon}; it must be above 0")

    def enough(steps: int) -> bool:
        return ledger(cohorts, steps / _GRID, delta)(rounds) <= epsilon

    low, high = 0, _GRID
    while not enough(high):
        low, high = high, 2 * high
        if high > _LARGEST * _GRID:
            raise FedSieveError(
                f"privacy: epsilon {epsilon:g} at delta {delta:g} over "
                f"{count(rounds, 'round')} needs a noise multiplier above {_LARGEST:g}: "
                "ask for less"
            )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high / _GRID


def affordable(spent: Spent, epsilon: float, rounds: int) -> int:
    """How many rounds, at most `rounds`, stay within epsilon: what is spent never falls."""
    low, high = 0, rounds + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if spent(middle) <= epsilon else (low, middle)
    return low


def settle(
    cohorts: Cohorts,
    *,
    rounds: int,
    clip: float,
    delta: float,
    epsilon: float | None = None,
    noise_multiplier: float | None = None,
    simulated_cohort: int | None = None,
    simulated_population: int | None = None,
    noise_from: Source = "seed",
    quantile: float | None = None,
    clip_rate: float = 0.2,
    count_noise: float | None = None,
) -> PrivacyPlan:
    """Work out a run's privacy from a target epsilon, a noise multiplier, or both.

    cohorts: the sampling as it is, after clients without data are left out
    epsilon: the target. Without noise_multiplier the noise is what `rounds` rounds need; with it,
             the run ends before the round that would pass the target.
    simulated_cohort, simulated_population: of the federation that is pretended (`noise.private`)
    quantile: of the updates' norms, which the clip then follows, from `clip` on (see `Adaptive`);
             count_noise is by default a 20th of the cohort, as in the paper
    Raises FedSieveError for what makes no sense, or if not one round is within the target.
    """
    expected = cohorts.clients if cohorts.kind == "all" else min(cohorts.size, cohorts.clients)
    real = Cohorts(cohorts.kind, expected, cohorts.clients)
    counted = _pretended(real, simulated_cohort, simulated_population)
    adaptive = None
    if quantile is not None:
        adaptive = Adaptive(quantile, clip_rate, count_noise or counted.size / 20)
        if adaptive.count_noise > counted.size:
            raise FedSieveError(
                f"privacy.count_noise: {adaptive.count_noise:g} is more than the {counted.size} "
                "clients that are counted, so that the clip would follow noise alone: leave it "
                "out, for a 20th of them"
            )
    if noise_multiplier is None:
        if epsilon is None:
            raise FedSieveError("privacy: give epsilon, noise_multiplier, or both")
        noise_multiplier = calibrate(counted, epsilon=epsilon, delta=delta, rounds=rounds)
    if noise_multiplier == 0:
        if epsilon is not None:
            raise FedSieveError("privacy: without noise there is no epsilon: remove one of them")
        said = f"Privacy: NONE; updates are clipped to {clip:g}, but no noise is added."
        return PrivacyPlan(
            clip=clip,
            noise_multiplier=0.0,
            expected=expected,
            simulated_cohort=simulated_cohort,
            noise_from=noise_from,
            spent=None,
            rounds=rounds,
            guarantee=said,
            cautions=(said,),
            ending=None,
            adaptive=adaptive,
        )
    if adaptive is not None:
        beside_the_count(noise_multiplier, adaptive.count_noise)  # refused before training
    spent = ledger(counted, noise_multiplier, delta)
    asked, ending = rounds, None
    if epsilon is not None:
        rounds = affordable(spent, epsilon, asked)
        if rounds == 0:
            raise FedSieveError(
                f"privacy: one round spends epsilon {spent(1):.4g}, which is over the target "
                f"{epsilon:g}: raise noise_multiplier, or leave it out and let it be found"
            )
        if rounds < asked:  # else it ends where it was to end
            ending = (
                f"the privacy budget is spent: epsilon {spent(rounds):.4g} of {epsilon:g} at delta "
                f"{delta:g} after round {rounds}; one more round would make it "
                f"{spent(rounds + 1):.4g}"
            )
    cautions = []
    if simulated_cohort is not None:
        cautions.append(_pretence(real, counted))
    elif noise_from == "seed":
        cautions.append(
            "Privacy: the noise follows from the recipe's seed, for simulation: who knows the seed "
            "can take it off again. A deployment sets privacy.noise_from = 'system'."
        )
    if delta * counted.clients >= 1:
        cautions.append(
            f"Privacy: delta {delta:g} is not below 1 / {counted.clients} clients: it would allow "
            "to publish some client's data as they are."
        )
    if rounds < asked:
        verb = "is" if rounds == 1 else "are"
        cautions.append(
            f"Privacy: {rounds} of the {asked} rounds asked for {verb} within the target."
        )
    known = None
    if simulated_cohort is None and expected < cohorts.clients:
        known = unamplified(real, noise_multiplier, delta)
    clipped = f"updates clipped to {clip:g}"
    if adaptive is not None:
        clipped += f" at first, then to the {adaptive.quantile:g} quantile of their norms"
    return PrivacyPlan(
        clip,
        noise_multiplier,
        expected,
        simulated_cohort,
        noise_from,
        spent,
        rounds,
        _guarantee(counted, clipped, noise_multiplier, delta, rounds, spent, simulated_cohort)
        + ("" if known is None else _to_those_who_know(known, real, rounds)),
        tuple(cautions),
        ending,
        adaptive,
        known,
    )


def refuse_what_is_not_covered(method: Method, sampling: Sampling) -> None:
    """Raises FedSieveError where a method is private and no account of `ledger` holds for it.

    How a method's server must move is refused earlier, where it is built (`method.Unbounded`).
    """
    if method.private is None:
        return
    if not sampling.plain or sampling.quorum:
        key = "quorum" if sampling.plain else "extra" if sampling.extra else "availability"
        raise FedSieveError(
            f"sampling.{key}: the accountant of [privacy] does not cover it: it counts on clients "
            "that are drawn by kind and size alone, and on rounds that end with whoever answers"
        )
    if method.keeps and sampling.kind == "uniform":
        raise FedSieveError(
            "sampling.kind: with [privacy], clients that keep something between their rounds (as "
            "this method lets them) need 'poisson' or 'all': for 'uniform' no bound is known to "
            "hold then"
        )


def uncovered(source: Source, evaluated: str | None) -> str:
    """One sentence for everyone who reads the results: which figures the noise does not cover.

    source: with "system", as in a deployment, figures from clients' rows are withheld; else they
            are there, and named here
    evaluated: what accuracy and evaluation loss are taken on, where that is not public; else None
    """
    figures = "the mean training loss"
    if evaluated is not None:
        figures += f", and accuracy and evaluation loss, which are taken on {evaluated}"
    counts = (
        "how many took part, how often at most, bytes and times in metrics.jsonl; and the classes, "
        "where they are taken from the rows and not from data.classes"
    )
    if source == "system":
        return f"Privacy: no noise covers {figures}: withheld. Not covered either: {counts}."
    return f"Privacy: no noise covers {figures}; {counts}; and all of clients.jsonl."


def _pretended(real: Cohorts, cohort: int | None, population: int | None) -> Cohorts:
    """The federation that is accounted for: the real one, or the one that is pretended."""
    if cohort is None:
        if population is not None:
            raise FedSieveError(
                "privacy.simulated_population: it needs simulated_cohort: the population at hand "
                "is known"
            )
        return real
    if real.kind == "all":
        raise FedSieveError(
            "privacy.simulated_cohort: with all clients in every round there is no larger cohort"
        )
    if cohort < real.size:
        raise FedSieveError(
            f"privacy.simulated_cohort: {cohort} is below the real cohort of {real.size}"
        )
    clients = real.clients if population is None else population
    if cohort > clients:
        raise FedSieveError(
            f"privacy.simulated_cohort: {cohort} of {clients} clients: give a larger "
            "simulated_population"
        )
    return Cohorts(real.kind, cohort, clients)


def _guarantee(
    counted: Cohorts,
    clipped: str,
    noise_multiplier: float,
    delta: float,
    rounds: int,
    spent: Spent,
    simulated: int | None,
) -> str:
    drawn = {
        "uniform": f"{counted.size} of {counted.clients} clients a round without replacement, one "
        "client exchanged for another",
        "poisson": f"each of {counted.clients} clients a round with probability "
        f"{counted.size / counted.clients:.4g}, one client more or less",
        "all": f"all {counted.clients} clients in every round, one client more or less",
    }[counted.kind]
    whose = "" if simulated is None else " IN THE SIMULATED FEDERATION"
    return (
        f"Privacy{whose}: client-level, trusted server, epsilon {spent(rounds):.4g} at delta "
        f"{delta:g} after {count(rounds, 'round')}, for the models alone ({drawn}; {clipped}, "
        f"noise multiplier {noise_multiplier:g}; Renyi accounting)."
    )


def _to_those_who_know(known: Spent, real: Cohorts, rounds: int) -> str:
    """The same without the draw of the clients, for a client in few, as many as expected, all."""
    mean = max(1, round(rounds * real.size / real.clients))
    counts = sorted({1, mean, rounds})
    shares = ", ".join(f"{known(n):.4g} for {n}" for n in counts)
    return (
        " It holds while nobody knows who took part; without amplification by sampling, against "
        f"those who know, epsilon is, by the number of a client's rounds: {shares}."
    )


def _pretence(real: Cohorts, counted: Cohorts) -> str:
    return (
        f"Simulated cohort: the noise is that of {counted.size} of {counted.clients} clients a "
        f"round, but {real.size} of {real.clients} really take part. Every epsilon is that of the "
        "simulated federation; the clients at hand are NOT protected by it."
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """dp-accounting warns of every order that it leaves out, at which nothing is lost."""
    log = logging.getLogger("absl")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
