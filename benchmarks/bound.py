"""Is the bound of FSLoRA's theorem a bound (arXiv 2501.19389, Theorem 4.4), all constants above 0?

The problem of convergence.py, where sigma and sigma_h are 0, with both put in:

    sigma    a client's gradient gets normal noise with E |noise|^2 = sigma^2, on what it holds
    sigma_h  client i has the target t + d_i; the d_i are in pairs of opposite sign, so that their
             mean is 0 and f~ is as before, up to a constant. Then grad f~_i - grad f~ is
             -(D d_i) a for B and -(D d_i) b for A x, and inside the region |a|^2 + |b|^2 <= R:

                 mean_i |grad f~_i - grad f~|^2  <=  R mean_i |D d_i|^2  =  sigma_h^2,   c_h = 0

All clients hold k of r ranks. Each panel of the plot moves one of k/r, H, N and T, at the step that
the theorem allows there, and holds the mean over T rounds of |grad f~|^2, exact, against the right
side of the theorem; the fifth goes beyond that step. At every 25th round the runs check R and rho,
the latter over all subsets of ranks (3 seeds):

    python benchmarks/bound.py [--json PATH] [--plot PATH] [--seeds N]

It exits with 1 if a claim of its last lines does not hold.
"""

import argparse
import json
import math
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

import convergence
from convergence import RANK, A, B, Problem
from fedsieve.algebra.budget import Budget, Client
from fedsieve.algebra.keys import Key, generator
from fedsieve.algebra.method import View
from fedsieve.methods import fslora

SIGMA, DIFFERENCE = 0.5, 0.1  # of the noise, and |d_i|
RHO = 7.5  # checked on the way
ROUNDS = 400
USUAL = {"k": 4, "local_steps": 4, "clients": 4}
MOVED: dict[str, tuple[int, ...]] = {
    "k": (8, 4, 2, 1),
    "local_steps": (1, 2, 4, 8, 16),
    "clients": (2, 4, 8, 16),
}
LONGEST = 1600  # T of the run whose every T is looked at
BEYOND = (1, 4, 16, 64, 256, 1024)  # times the allowed step
GONE = 100.0  # times the start's squared gradient: a run ends there


class Case(NamedTuple):
    """Of all clients k ranks, H local steps, N clients."""

    k: int
    local_steps: int
    clients: int


def differing(p: Problem, clients: int) -> list[Problem]:
    """Each client's own problem. Pairs lie along different outputs, one after another."""
    own = []
    for number in range(clients):
        away = torch.zeros_like(p.target)
        away[number // 2 % len(p.target)] = DIFFERENCE * (-1) ** number
        own.append(p._replace(target=p.target + away))
    return own


def sigma_h(p: Problem, clients: int) -> float:
    """On the region; see the head."""
    away = torch.stack([own.target - p.target for own in differing(p, clients)])
    squared = (p.curvature * away).square().sum(1).mean()
    return math.sqrt(convergence.REGION * float(squared))


def smoothness(p: Problem, clients: int) -> float:
    """L on the region, of every client."""
    return max(convergence.smoothness(own) for own in differing(p, clients))


def allowed(p: Problem, case: Case) -> float:
    """The theorem's largest step."""
    return fslora.step_size_bound(
        smoothness=smoothness(p, case.clients),
        rho=RHO,
        c_h=0.0,
        local_steps=case.local_steps,
        ratios=[case.k / RANK] * case.clients,
    )


def promised(p: Problem, case: Case, step: float, rounds: int) -> float:
    """The right side of Theorem 4.4."""
    return fslora.gradient_bound(
        smoothness=smoothness(p, case.clients),
        rho=RHO,
        local_steps=case.local_steps,
        ratios=[case.k / RANK] * case.clients,
        step=step,
        rounds=rounds,
        gap=gap(p, case),
        sigma=SIGMA,
        sigma_h=sigma_h(p, case.clients),
    )


def gap(p: Problem, case: Case) -> float:
    """f~ at the start less its minimum: both have what the targets' differences add."""
    return convergence.objective(p, convergence.start(p, 0), (case.k,))


def corollary(p: Problem, case: Case, rounds: int) -> tuple[float, float, float]:
    """Corollary 4.5 as it is printed, for the step that balances the theorem's terms.

    That step; what is printed; and the same with the theorem's first term at the allowed step in
    the place of the printed 4 F0 / T.
    """
    q, s2 = RANK / case.k, SIGMA**2 + 3 * (RHO + 1) * sigma_h(p, case.clients) ** 2
    smooth, n, h, t = smoothness(p, case.clients), case.clients, case.local_steps, rounds
    f0, largest = gap(p, case), allowed(p, case)
    step = min(
        largest,
        math.sqrt(n * f0 / (t * h * q * smooth * s2)),
        (f0 / (t * h**3 * q**2 * smooth**2 * s2)) ** (1 / 3),
    )
    noisy = 8 * math.sqrt(q * smooth * f0 * s2) / math.sqrt(n * t * h)
    noisy += 10 * (q * smooth) ** (2 / 3) * (f0 * math.sqrt(s2) / t) ** (2 / 3)
    return step, noisy + 4 * f0 / t, noisy + 4 * f0 / (largest * t * h)


def train(p: Problem, view: View, step: float, local_steps: int, draws: torch.Generator) -> Any:
    """H gradient steps with noise."""
    b, rows = view.adapter.tensors[B].clone(), view.adapter.tensors[A].clone()
    outputs, held = b.shape
    each = SIGMA / math.sqrt((outputs + 1) * held)
    for _ in range(local_steps):
        by_b, by_a = convergence.sketched(p, b, rows @ p.x, view.adapter.layout.scale)
        noise = torch.randn(outputs + 1, held, generator=draws, dtype=torch.float64) * each
        b -= step * (by_b + noise[:-1])
        rows -= step * torch.outer(by_a + noise[-1], p.x)
    return {A: rows, B: b}


class Met(NamedTuple):
    """The largest on the way."""

    rho: float
    extent: float


def squares(p: Problem, case: Case, step: float, seed: int) -> Iterator[tuple[float, Met]]:
    """|grad f~|^2 at the start of each round, and what was met so far; it never ends by itself."""
    method, own = convergence.exact(), differing(p, case.clients)
    clients = [
        Client(str(number), 1, Budget(ratio=case.k / RANK)) for number in range(case.clients)
    ]
    state, number, met = method.init(convergence.start(p, seed)), 0, Met(0.0, 0.0)
    while True:
        adapter = method.export(state)
        if number % 25 == 0:
            noises = [convergence.noise(each, adapter, case.k) for each in own]
            met = Met(max(met.rho, *noises), max(met.extent, convergence.extent(adapter, p)))
        yield float(convergence.gradient(p, adapter, case.k).square().sum()), met
        key = Key(seed, number)

        def trained(client: Client, view: View, key: Key = key) -> dict[str, Tensor]:
            draws = generator(key._replace(client=client.id).at("noise"))
            made: dict[str, Tensor] = train(
                own[int(client.id)], view, step, case.local_steps, draws
            )
            return made

        state = convergence.one_round(method, state, clients, trained, key)
        number += 1


class Measured(NamedTuple):
    """At one step: means over rounds and seeds. met: over all of them; rounds: fewer, where a run
    went beyond GONE.
    """

    case: Case
    step: float
    rounds: int
    measured: float
    promised: float
    met: Met


def measure(p: Problem, case: Case, step: float, rounds: int, seeds: int) -> Measured:
    """The mean over rounds and seeds of |grad f~|^2 beside its bound."""
    means, rho, extent, done = [], 0.0, 0.0, rounds
    for seed in range(seeds):
        values: list[float] = []
        for squared, met in islice(squares(p, case, step, seed), rounds):
            values.append(squared)
            rho, extent = max(rho, met.rho), max(extent, met.extent)
            if not squared < GONE * values[0]:
                break
        done = min(done, len(values))
        means.append(mean(values))
    told = promised(p, case, step, rounds)
    return Measured(case, step, done, mean(means), told, Met(rho, extent))


class Along(NamedTuple):
    """One long run: the mean up to each T, of all seeds, the bound there, and the corollary's."""

    rounds: list[int]
    measured: list[float]
    promised: list[float]


def along(p: Problem, case: Case, seeds: int) -> Along:
    """T from 10 to LONGEST at the allowed step."""
    step = allowed(p, case)
    every = []
    for seed in range(seeds):
        values = [squared for squared, _ in islice(squares(p, case, step, seed), LONGEST)]
        every.append(torch.tensor(values).cumsum(0) / torch.arange(1, LONGEST + 1))
    total = torch.stack(every).mean(0)
    at = sorted({round(10 * 1.1**n) for n in range(60) if 10 * 1.1**n <= LONGEST} | {LONGEST})
    return Along(at, [float(total[t - 1]) for t in at], [promised(p, case, step, t) for t in at])


class Results(NamedTuple):
    """moved: by what was moved; corollary: T, measured, printed, mended."""

    moved: dict[str, list[Measured]]
    along: Along
    beyond: list[Measured]
    corollary: list[tuple[int, float, float, float]]


def everything(seeds: int) -> Results:
    """All panels."""
    p = convergence.problem()
    moved = {}
    for name, values in MOVED.items():
        cases = [Case(**{**USUAL, name: value}) for value in values]
        moved[name] = [measure(p, case, allowed(p, case), ROUNDS, seeds) for case in cases]
    usual = Case(**USUAL)
    step = allowed(p, usual)
    beyond = [measure(p, usual, step * times, ROUNDS // 2, seeds) for times in BEYOND]
    told = []
    for rounds in (100, ROUNDS, LONGEST):
        step, printed, mended = corollary(p, usual, rounds)
        told.append((rounds, measure(p, usual, step, rounds, seeds).measured, printed, mended))
    return Results(moved, along(p, usual, seeds), beyond, told)


def claims(found: Results) -> dict[str, bool]:
    """What the theorem says, and whether it was seen."""
    flat = [one for rows in (*found.moved.values(), found.beyond[:1]) for one in rows]
    k, h, n = (found.moved[name] for name in MOVED)
    return {
        "the runs stayed in the region, and rho below its bound": all(
            one.met.rho <= RHO and one.met.extent <= convergence.REGION for one in flat
        ),
        "the mean squared gradient is below the bound, for every k/r, H, N and T": all(
            one.measured <= one.promised for one in flat
        )
        and all(a <= b for a, b in zip(found.along.measured, found.along.promised, strict=True)),
        "with more ranks both fall": _fall([(one.measured, one.promised) for one in k[::-1]]),
        "with more clients the measured one falls, until the step no longer grows": all(
            a.measured > b.measured or (a.step == b.step and a.measured > 0.95 * b.measured)
            for a, b in pairwise(n)
        ),
        "with more local steps it stays, for step times H does": all(
            abs(a.measured / b.measured - 1) < 0.05 for a, b in pairwise(h)
        ),
        "far beyond the allowed step it rises above the bound, or the run is gone": any(
            one.measured > one.promised or one.rounds < ROUNDS // 2 for one in found.beyond
        ),
    }


def _fall(pairs: list[tuple[float, float]]) -> bool:
    return all(a > b and c > d for (a, c), (b, d) in pairwise(pairs))


def plot(found: Results, path: Path) -> None:
    """Five panels, all on logarithmic axes; full: measured, dashed: the bound."""
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    axes = figure.subplots(2, 3).flatten()
    labels = {"k": "k / r", "local_steps": "local steps H", "clients": "clients N"}
    for ax, (name, rows) in zip(axes, found.moved.items(), strict=False):
        x = [getattr(one.case, name) / (RANK if name == "k" else 1) for one in rows]
        _pair(ax, x, [one.measured for one in rows], [one.promised for one in rows])
        ax.set(xlabel=labels[name])
        ax.set_xticks(x, [f"{value:g}" for value in x])
    _pair(axes[3], found.along.rounds, found.along.measured, found.along.promised, marker="")
    axes[3].set(xlabel="rounds T")
    step = found.beyond[0].step
    x = [one.step / step for one in found.beyond]
    _pair(
        axes[4], x, [one.measured for one in found.beyond], [one.promised for one in found.beyond]
    )
    axes[4].set(xlabel="step / the allowed step")
    axes[4].axvspan(1, max(x) * 2, color="#d8dde3", alpha=0.5, label="not allowed")
    for ax in axes[:5]:
        ax.set(ylabel="mean of |gradient of f~|²")
        ax.minorticks_off()
    axes[4].legend(fontsize=8)
    axes[0].legend(fontsize=8)
    axes[5].axis("off")
    figure.savefig(path, dpi=110)


def _pair(ax: Any, x: Any, measured: Any, bound: Any, marker: str = "o") -> None:
    ax.plot(x, measured, marker=marker, color="#0072b2", label="measured")
    ax.plot(x, bound, "--", marker=marker, color="#d55e00", label="Theorem 4.4")
    ax.set(xscale="log", yscale="log")


def table(found: Results) -> str:
    """The numbers, a line a case."""
    lines = ["   k/r    H    N     T   step       mean |grad|^2   bound      ratio   rho   extent"]
    for one in [each for rows in found.moved.values() for each in rows] + found.beyond:
        case = one.case
        lines.append(
            f"  {case.k / RANK:5.3f} {case.local_steps:4d} {case.clients:4d} {one.rounds:5d}   "
            f"{one.step:.2e}   {one.measured:.3e}       {one.promised:.3e}  "
            f"{one.measured / one.promised:.3f}   {one.met.rho:.2f}  {one.met.extent:.3f}"
        )
    lines.append("  Corollary 4.5:  T    measured    as printed   with 4 F0 / (gamma T H)")
    for rounds, measured, printed, mended in found.corollary:
        lines.append(f"               {rounds:5d}   {measured:.3e}   {printed:.3e}    {mended:.3e}")
    return "\n".join(lines)


def main() -> int:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description="Hold FSLoRA's Theorem 4.4 against runs.")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = everything(options.seeds)
    print(table(found))
    held = claims(found)
    for claim, holds in held.items():
        print(f"  {'yes' if holds else 'NO '}  {claim}")
    if options.json:
        told = {
            "seeds": options.seeds, "sigma": SIGMA, "difference": DIFFERENCE, "rho": RHO,
            "moved": {n: [one._asdict() for one in rows] for n, rows in found.moved.items()},
            "beyond": [one._asdict() for one in found.beyond],
            "corollary": found.corollary,
            "claims": held,
        }  # fmt: skip
        options.json.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    if options.plot:
        plot(found, options.plot)
    return 0 if all(held.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
