"""Does FSLoRA converge as its theory says (arXiv 2501.19389, Theorem 4.4)?

It says how fast the mean squared gradient of what FSLoRA optimises (equation 2),

    f~(B, A) = mean over clients i of E_S loss(W0 + B S A),   S = (r / k_i) on k_i of the r ranks,

falls, and that the ranks k_i enter through mean(r / k_i). The problem here is small enough to know
everything about it. One input x of length 1, m outputs with targets t and curvatures d, W0 = 0:

    loss(W) = 1/2 sum over outputs o of d_o ((W x)_o - t_o)^2

It is bilinear in the two factors, as LoRA is; both are trained. With a = A x (r numbers) only the
first two moments of S enter f~, so f~ and its gradient have a closed form (`gradient`), and the
variance of a sketched gradient is a sum over the subsets of k ranks. All r ranks can reproduce t in
equal shares, and then every sketch reproduces it: f~ has the same minimum, 0, for all k, so that
gradient norms of different k can be compared, and the noise of the sketch vanishes there.

No bilinear loss is smooth everywhere. On the region r * max_j (a_j^2 + |b_j|^2) <= R it is, with
L = max(d) (3/2 R + |t|), and under a sketch of k ranks with r / k times that (docs/convergence.md
has the proof). Runs at the theory's step check at every 25th round that they are inside, and that
the variance of the sketch and the difference of the clients are within the rho and c_h that gave
the step.

The rounds go through the method's own publish, view, report and merge; only the local training,
H plain gradient steps, is written here. Run it:

    python benchmarks/convergence.py [--json PATH] [--plot PATH] [--seeds N]

It exits with 1 if a claim of its last lines does not hold.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from itertools import combinations, islice
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from fedsieve.algebra.adapter import Adapter, layout_of
from fedsieve.algebra.budget import Budget, Client
from fedsieve.algebra.keys import Key, generator
from fedsieve.algebra.method import ClientContext, Method, State, View
from fedsieve.methods import fslora

RANK = 8
A, B = "layer.lora_A.weight", "layer.lora_B.weight"

# k of each of the three clients, by rising mean(r / k): 1, 2, 2, 4, 4, 8. Two sets mix ranks.
COHORTS = {
    "8 8 8": (8, 8, 8),
    "4 4 4": (4, 4, 4),
    "8 8 2": (8, 8, 2),
    "2 2 2": (2, 2, 2),
    "4 4 1": (4, 4, 1),
    "1 1 1": (1, 1, 1),
}
REGION = 1.1  # R
RHO, C_H = 7.5, 0.1  # checked all along the runs at the theory's step
THEORY_STEPS = 4  # H of those runs
FALL = 0.1  # they end when the squared gradient norm has fallen to this part of its start
HORIZON = 60  # rounds of the runs at the largest steps


class Problem(NamedTuple):
    """x: (n,) of length 1; target, curvature: (m,)."""

    x: Tensor
    target: Tensor
    curvature: Tensor


def problem(outputs: int = 6, inputs: int = 8) -> Problem:
    """Curvatures from 1 down to 1/4, a target of length 0.1 in no special direction."""
    x = torch.ones(inputs, dtype=torch.float64) / math.sqrt(inputs)
    target = torch.full((outputs,), 0.1 / math.sqrt(outputs), dtype=torch.float64)
    curvature = 4.0 ** -torch.linspace(0, 1, outputs, dtype=torch.float64)
    return Problem(x, target, curvature)


def smoothness(p: Problem) -> float:
    """L on the region."""
    return float(p.curvature.max() * (1.5 * REGION + p.target.norm()))


def start(p: Problem, seed: int) -> Adapter:
    """B = 0, as LoRA starts; A with |A x| = 1, shared by the ranks alike, of random sign."""
    signs = torch.randint(0, 2, (RANK, 1), generator=generator(Key(seed, purpose="start"))) * 2 - 1
    rows = signs.double() * p.x / math.sqrt(RANK)
    columns = torch.zeros(len(p.target), RANK, dtype=torch.float64)
    tensors = {A: rows, B: columns}
    return Adapter(layout_of(tensors, 1.0), tensors)


def gradient(p: Problem, adapter: Adapter, k: int) -> Tensor:
    """The exact gradient of E_S loss(B S A) by B and by A x, columns side by side: (m + 1, r).

    E s_j^2 = r/k and E s_j s_l = (r/k) (k-1)/(r-1) are all of S that enters a quadratic loss.
    A's own gradient is the last row times x, of the same length.
    """
    b, a = adapter.tensors[B], adapter.tensors[A] @ p.x
    same = RANK / k
    cross = same * (k - 1) / (RANK - 1)
    error = cross * (b @ a) - p.target
    by_b = p.curvature[:, None] * (error[:, None] * a + (same - cross) * b * a**2)
    by_a = p.curvature @ (error[:, None] * b + (same - cross) * b**2 * a)
    return torch.cat([by_b, by_a[None]])


def objective(p: Problem, adapter: Adapter, ranks: tuple[int, ...]) -> float:
    """The exact f~."""
    b, a = adapter.tensors[B], adapter.tensors[A] @ p.x
    losses = []
    for k in ranks:
        same = RANK / k
        cross = same * (k - 1) / (RANK - 1)
        spread = (same - cross) * (b**2 @ a**2) + (cross - 1) * (b @ a) ** 2
        losses.append(0.5 * p.curvature @ ((b @ a - p.target) ** 2 + spread))
    return float(torch.stack(losses).mean())


def sketched(p: Problem, b: Tensor, a: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Gradients of loss(scale b a) by b (m, k) and by a (k,), where a = A x."""
    pull = scale * p.curvature * (scale * (b @ a) - p.target)
    return torch.outer(pull, a), pull @ b


def noise(p: Problem, adapter: Adapter, k: int) -> float:
    """The variance of a sketched gradient over all subsets, in units of its mean's square: rho."""
    b, a = adapter.tensors[B], adapter.tensors[A] @ p.x
    centre = gradient(p, adapter, k)
    subsets = list(combinations(range(RANK), k))
    total = 0.0
    for subset in subsets:
        held = list(subset)
        drawn = torch.zeros_like(centre)
        by_b, by_a = sketched(p, b[:, held], a[held], RANK / k)
        drawn[:, held] = torch.cat([by_b, by_a[None]])
        total += float((drawn - centre).square().sum())
    return total / len(subsets) / float(centre.square().sum())


def extent(adapter: Adapter, p: Problem) -> float:
    """r * max_j (a_j^2 + |b_j|^2): below R inside the region."""
    a = adapter.tensors[A] @ p.x
    return float(RANK * (a**2 + adapter.tensors[B].square().sum(0)).max())


def train(p: Problem, view: View, step: float, local_steps: int) -> dict[str, Tensor]:
    """H plain gradient steps on what the client holds."""
    b, rows = view.adapter.tensors[B].clone(), view.adapter.tensors[A].clone()
    scale = view.adapter.layout.scale
    for _ in range(local_steps):
        by_b, by_a = sketched(p, b, rows @ p.x, scale)
        b -= step * by_b
        rows -= step * torch.outer(by_a, p.x)
    return {A: rows, B: b}


class Point(NamedTuple):
    """A round's start: the adapter, f~ and its squared gradient norm, and how much the clients
    differ: the mean over i of |grad f~_i - grad f~|^2.
    """

    adapter: Adapter
    value: float
    squared: float
    difference: float


def exact() -> Method:
    """FSLoRA with nothing lost on the way."""
    return fslora.method(down_values="float64", up_values="float64")


def rounds(
    p: Problem,
    ranks: tuple[int, ...],
    *,
    step: float,
    local_steps: int,
    seed: int,
    method: Method,
) -> Iterator[Point]:
    """The points that FSLoRA visits, the start first; it never ends by itself."""
    clients = [Client(str(i), 1, Budget(ratio=k / RANK)) for i, k in enumerate(ranks)]
    state = method.init(start(p, seed))
    number = 0
    while True:
        adapter = method.export(state)
        parts = {k: gradient(p, adapter, k) for k in set(ranks)}
        gradients = torch.stack([parts[k] for k in ranks])
        centre = gradients.mean(0)
        difference = float((gradients - centre).square().sum()) / len(ranks)
        value = objective(p, adapter, ranks)
        yield Point(adapter, value, float(centre.square().sum()), difference)

        def trained(client: Client, view: View) -> dict[str, Tensor]:
            return train(p, view, step, local_steps)

        state = one_round(method, state, clients, trained, Key(seed, number))
        number += 1


def one_round(
    method: Method,
    state: State,
    clients: list[Client],
    trained: Callable[[Client, View], dict[str, Tensor]],
    key: Key,
) -> State:
    """A round as the engine runs it, without the bytes."""
    plan = method.plan(state, key)
    updates = []
    for client in clients:
        own = key._replace(client=client.id)
        context = ClientContext(client, method.export(state), own)
        view, memory = method.view(method.publish(plan, client, own), {}, context)
        updates.append((client, method.report(view, trained(client, view), memory, context)[0]))
    return method.merge(state, updates, key)


def burden(ranks: tuple[int, ...]) -> float:
    """mean(r / k)."""
    return mean(RANK / k for k in ranks)


class Theory(NamedTuple):
    """Runs at the step of `fslora.step_size_bound`, a list entry a seed where there is a list.

    falls:    rounds until |grad f~|^2 is below FALL of its start
    curve:    |grad f~|^2 over its start at each round, the first seed's
    measured: mean over those rounds and the seeds of |grad f~|^2
    promised: what the theory says that this mean cannot exceed, `fslora.gradient_bound`
    rho, c_h, extent: the largest met on the way
    """

    step: float
    falls: list[int]
    curve: list[float]
    measured: float
    promised: float
    rho: float
    c_h: float
    extent: float


def at_theory_step(p: Problem, ranks: tuple[int, ...], seeds: int) -> Theory:
    """Run each seed until FALL."""
    step = fslora.step_size_bound(
        smoothness=smoothness(p),
        rho=RHO,
        c_h=C_H,
        local_steps=THEORY_STEPS,
        ratios=[k / RANK for k in ranks],
    )
    curves: list[list[float]] = []
    rho = c_h = reach = value = 0.0
    for seed in range(seeds):
        curve: list[float] = []
        run = rounds(p, ranks, step=step, local_steps=THEORY_STEPS, seed=seed, method=exact())
        for number, point in enumerate(run):
            value = value if curve else point.value
            curve.append(point.squared)
            if number % 25 == 0:
                rho = max(rho, *(noise(p, point.adapter, k) for k in set(ranks)))
                c_h = max(c_h, point.difference / point.squared)
                reach = max(reach, extent(point.adapter, p))
            if point.squared < FALL * curve[0]:
                break
        curves.append(curve)
    shortest = min(len(curve) for curve in curves)
    return Theory(
        step,
        [len(curve) - 1 for curve in curves],
        [squared / curves[0][0] for squared in curves[0]],
        mean(mean(curve[:shortest]) for curve in curves),
        fslora.gradient_bound(
            smoothness=smoothness(p),
            rho=RHO,
            local_steps=THEORY_STEPS,
            ratios=[k / RANK for k in ranks],
            step=step,
            rounds=shortest,
            gap=value,  # the minimum is 0, and there is neither sigma nor sigma_h
        ),
        rho,
        c_h,
        reach,
    )


def descends(p: Problem, ranks: tuple[int, ...], step: float, local_steps: int, seeds: int) -> bool:
    """Whether f~, the mean over the seeds, stays at or below its start for HORIZON rounds."""
    curves = []
    for seed in range(seeds):
        values: list[float] = []
        run = rounds(p, ranks, step=step, local_steps=local_steps, seed=seed, method=exact())
        for point in islice(run, HORIZON):
            values.append(point.value)
            if not point.value < 100 * values[0]:
                return False
        curves.append(values)
    return all(
        mean(column) <= mean(curve[0] for curve in curves) for column in zip(*curves, strict=True)
    )


def largest_step(p: Problem, ranks: tuple[int, ...], local_steps: int, seeds: int) -> float:
    """The largest step, to 5 percent, below the first at which f~ rises above its start.

    A bilinear problem may settle again at still larger steps, elsewhere: hence the search upwards.
    """
    low, grow = 0.15, 1.25
    while descends(p, ranks, low * grow, local_steps, seeds):
        low *= grow
    high = low * grow
    while high / low > 1.05:
        middle = math.sqrt(low * high)
        if descends(p, ranks, middle, local_steps, seeds):
            low = middle
        else:
            high = middle
    return low


def predicted(p: Problem, ranks: tuple[int, ...]) -> float:
    """Where one step a round ceases to be stable in mean square, near the solution, A held still.

    With N clients, 2 N / (max(d) (N - 1 + mean(r / k))): see docs/convergence.md.
    """
    return 2 * len(ranks) / (float(p.curvature.max()) * (len(ranks) - 1 + burden(ranks)))


def mean_squared(p: Problem, ranks: tuple[int, ...], step: float, seeds: int) -> list[float]:
    """Mean over HORIZON rounds of |grad f~|^2, in units of its start, one number a seed; H = 1."""
    results = []
    for seed in range(seeds):
        run = rounds(p, ranks, step=step, local_steps=1, seed=seed, method=exact())
        squares = [point.squared for point in islice(run, HORIZON)]
        results.append(mean(squares) / squares[0])
    return results


class Row(NamedTuple):
    """What was measured of one set of ranks; `largest` maps "clients, H" to a step."""

    ranks: tuple[int, ...]
    burden: float
    theory: Theory
    largest: dict[str, float]
    predicted: float
    half: list[float]


def measure(p: Problem, seeds: int) -> dict[str, Row]:
    """Everything, set by set."""
    rows = {}
    for name, ranks in COHORTS.items():
        largest = {f"3, {h}": largest_step(p, ranks, h, seeds) for h in (1, 8)}
        if len(set(ranks)) == 1:
            largest["1, 1"] = largest_step(p, ranks[:1], 1, seeds)
        half = mean_squared(p, ranks, largest["3, 1"] / 2, 2 * seeds)
        theory = at_theory_step(p, ranks, 3)
        rows[name] = Row(ranks, burden(ranks), theory, largest, predicted(p, ranks), half)
    return rows


def ordered(rows: list[Row], values: list[float]) -> bool:
    """Whether a larger mean(r / k) always goes with a larger value; equal means are free."""
    pairs = [(row.burden, value) for row, value in zip(rows, values, strict=True)]
    return all(x < y for a, x in pairs for b, y in pairs if a < b)


def claims(rows: list[Row]) -> dict[str, bool]:
    """What Theorem 4.4 leads one to expect, and whether it was seen."""
    runs = [row.theory for row in rows]
    return {
        "at the theory's step, its assumptions held all along": all(
            run.rho <= RHO and run.c_h <= C_H and run.extent <= REGION for run in runs
        ),
        "at the theory's step, the mean squared gradient is below what it promises": all(
            run.measured <= run.promised for run in runs
        ),
        "at the theory's step, the rounds needed rise with mean(r/k)": ordered(
            rows, [mean(run.falls) for run in runs]
        ),
        "the largest step falls as mean(r/k) rises": ordered(
            rows, [-row.largest["3, 1"] for row in rows]
        ),
        "at half the largest step, the mean squared gradient rises with mean(r/k)": ordered(
            rows, [mean(row.half) for row in rows]
        ),
    }


def table(rows: dict[str, Row]) -> str:
    """The numbers, a line a set of ranks."""
    lines = [
        "  k of 8 | mean | theory's  rounds to  measured / | largest step               | mean sq."
        " gradient",
        "  ranks  | r/k  | step      1/10       promised   | H=1   (predicted)  H=8     | at half"
        " of it, H=1",
    ]
    for name, row in rows.items():
        run, steps = row.theory, row.largest
        lines.append(
            f"  {name}  | {row.burden:4.1f} | {run.step:.2e}  {mean(run.falls):7.1f}"
            f"    {run.measured / run.promised:8.3f}   |"
            f" {steps['3, 1']:.2f}  ({row.predicted:.2f})       {steps['3, 8']:.2f}    |"
            f" {mean(row.half):.4f} +- {stdev(row.half):.4f}"
        )
    alone = {row.burden: row.largest["1, 1"] for row in rows.values() if "1, 1" in row.largest}
    lines.append("  one client alone, H=1: largest step by r/k (2 k/r is predicted)")
    lines.append("    " + "   ".join(f"{q:.0f}: {step:.2f}" for q, step in alone.items()))
    return "\n".join(lines)


def plot(rows: dict[str, Row], path: Path) -> None:
    """Left: the gradient's fall at the theory's step. Right: steps against mean(r / k)."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    colours = {1.0: "#0072b2", 2.0: "#009e73", 4.0: "#d55e00", 8.0: "#000000"}
    for name, row in rows.items():
        mixed = len(set(row.ranks)) > 1
        left.plot(
            range(len(row.theory.curve)),
            row.theory.curve,
            "--" if mixed else "-",
            color=colours[row.burden],
            linewidth=3 if mixed else 1.2,
            label=f"k = {name.replace(' ', ', ')}: mean(r/k) = {row.burden:.0f}",
        )
    left.set(
        xlabel="round",
        ylabel="|gradient of f~|² / its start",
        xscale="log",
        yscale="log",
        title=f"at the theory's step, {THEORY_STEPS} local steps",
    )
    left.legend(fontsize=8)

    series = {
        "1, 1": ("s", "#0072b2", "largest, 1 client, H = 1"),
        "3, 1": ("o", "#009e73", "largest, 3 clients, H = 1"),
        "3, 8": ("^", "#d55e00", "largest, 3 clients, H = 8"),
    }
    for key, (marker, colour, label) in series.items():
        for alike in (True, False):
            chosen = [row for row in rows.values() if key in row.largest and _alike(row) == alike]
            right.plot(
                [row.burden for row in chosen],
                [row.largest[key] for row in chosen],
                marker,
                color=colour,
                fillstyle="full" if alike else "none",
                label=label if alike else None,
            )
    burdens = [1.0, 8.0]
    right.plot(burdens, [2 / q for q in burdens], ":", color="grey", label="proportional to 1/mean")
    grid = [1 + i / 10 for i in range(71)]
    right.plot(grid, [6 / (2 + q) for q in grid], "-", color="#009e73", label="predicted, N = 3")
    right.plot(
        [row.burden for row in rows.values()],
        [row.theory.step * THEORY_STEPS for row in rows.values()],
        "x",
        color="black",
        label="theory's step times H",
    )
    right.set(
        xlabel="mean(r/k)",
        ylabel="step",
        xscale="log",
        yscale="log",
        title="steps (hollow: mixed ranks)",
    )
    right.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    right.minorticks_off()
    right.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def _alike(row: Row) -> bool:
    return len(set(row.ranks)) == 1


def record(rows: dict[str, Row], seeds: int) -> dict[str, Any]:
    """All numbers but the curves, for JSON."""
    sets = {}
    for name, row in rows.items():
        theory = row.theory._asdict()
        del theory["curve"]
        sets[name] = {**row._asdict(), "theory": theory}
    return {
        "seeds": seeds,
        "rank": RANK,
        "smoothness": smoothness(problem()),
        "rho": RHO,
        "c_h": C_H,
        "sets": sets,
        "claims": claims(list(rows.values())),
    }


def main() -> int:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description="Check FSLoRA's convergence theory.")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--seeds", type=int, default=5, help="of the largest steps (default: 5)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(problem(), options.seeds)
    result = record(rows, options.seeds)
    print(table(rows))
    for claim, holds in result["claims"].items():
        print(f"  {'yes' if holds else 'NO '}  {claim}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    if options.plot:
        plot(rows, options.plot)
    return 0 if all(result["claims"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
