"""FSLoRA: sketch the rank (Fang et al. 2025, arXiv 2501.19389, Algorithm 1).

One adapter of rank r lives on the server. Each round, client i draws a sketch (Definition 3.1)

    S = (r / k) sum over j in I of e_j e_j^T,    I uniform over the subsets of k of the r ranks

and trains W0 + B S A, which is an adapter of rank k, B[:, I] and A[I, :], at r / k times the scale
(equation 4). It returns the change of those slices, and the server adds the mean over the cohort,
counting zero for a rank that a client did not hold (equation 5). E[S] is the identity, so what the
clients optimise is an unbiased estimate of W0 + B A.

Departures: the paper broadcasts the whole adapter; here a client gets only its k slices, and the
sketch as a seed of 8 bytes. A rank-k adapter's usual scale alpha / k IS the sketch's; for rsLoRA
the r / k is applied to alpha / sqrt(r). A classifier head has no ranks: it travels whole.
"""

import math
from collections.abc import Sequence

from fedsieve.algebra.method import Method, Weighting, compose, r_over_k
from fedsieve.algebra.optim import Optimizer
from fedsieve.algebra.options import checked
from fedsieve.algebra.payload import Form
from fedsieve.algebra.sieve import dense, sketch
from fedsieve.errors import FedSieveError


@checked
def method(
    *,
    server: Optimizer | None = None,
    shared: bool = True,
    weighting: Weighting = "uniform",
    down_values: Form = "float32",
    up_values: Form = "float32",
) -> Method:
    """FSLoRA. Each client's ratio k / r comes from its budget; SGD(1) on the server is equation 5.

    shared: one index set a client and round for all modules, as in the paper; else one a module.
    """
    return compose(
        down=sketch(shared=shared),
        up=dense,
        knobs=frozenset({"ratio"}),
        rescale=r_over_k,
        server=server,
        weighting=weighting,
        down_values=down_values,
        up_values=up_values,
    )


def step_size_bound(
    *, smoothness: float, rho: float, c_h: float, local_steps: int, ratios: Sequence[float]
) -> float:
    """The largest local step size of Theorem 4.4, under which FSLoRA is shown to converge.

    With q_i = r / k_i, L_bar = mean(q_i) L, L_tilde = mean(q_i^2) L, H local steps, N clients:

        gamma <= min{ N / (24 rho (c_h + 1) H L_bar),
                      1 / (8 sqrt(L_tilde L (rho + 1) (c_h + 1)) H) }

    for SGD(1) on the server and all clients in every round, under Assumptions 4.1 to 4.3, where f_i
    is the expected loss of client i at W0 + B A, and f~_i and f~ are as in equation 2, with the
    mean over sketches:

    smoothness: L; the loss is L-smooth IN THE FACTORS (B, A), not in W. No LoRA loss is so
        everywhere: L is that of the region where the iterates and their sketches are
    rho: a client's stochastic gradient has a variance of at most rho |grad f~_i|^2 + sigma^2. At 0
        the first condition asks for nothing
    c_h: mean over i of |grad f~_i - grad f~|^2 is at most c_h |grad f~|^2 + sigma_h^2
    local_steps: H, local gradient steps a round
    ratios: k_i / r of each client

    Raises FedSieveError for a constant or a ratio that makes no sense.
    """
    for name, value in (("rho", rho), ("c_h", c_h)):
        if not (math.isfinite(value) and value >= 0):
            raise FedSieveError(f"{name} is {value}; it must be a number of at least 0")
    l_bar, l_tilde = _sketched(smoothness, local_steps, ratios)
    noise = 24 * rho * (c_h + 1) * local_steps * l_bar
    drift = 8 * math.sqrt(l_tilde * smoothness * (rho + 1) * (c_h + 1)) * local_steps
    return min(len(ratios) / noise if noise else math.inf, 1 / drift)


def gradient_bound(
    *,
    smoothness: float,
    rho: float,
    local_steps: int,
    ratios: Sequence[float],
    step: float,
    rounds: int,
    gap: float,
    sigma: float = 0.0,
    sigma_h: float = 0.0,
) -> float:
    """What Theorem 4.4 says that the mean over the rounds of E |grad f~|^2 cannot exceed.

    With s^2 = sigma^2 + 3 (rho + 1) sigma_h^2, and all else as in `step_size_bound`:

        4 gap / (gamma T H) + gamma (4 L_bar / N) s^2 + 10 gamma^2 H^2 L_tilde L s^2

    step, rounds, gap: gamma, at most that bound; T; f~ at the start less its minimum
    """
    l_bar, l_tilde = _sketched(smoothness, local_steps, ratios)
    noise = sigma**2 + 3 * (rho + 1) * sigma_h**2
    return (
        4 * gap / (step * rounds * local_steps)
        + step * 4 * l_bar / len(ratios) * noise
        + 10 * step**2 * local_steps**2 * l_tilde * smoothness * noise
    )


def _sketched(smoothness: float, local_steps: int, ratios: Sequence[float]) -> tuple[float, float]:
    """L_bar and L_tilde. Raises FedSieveError for numbers that make no sense."""
    if not (math.isfinite(smoothness) and smoothness > 0):
        raise FedSieveError(f"smoothness is {smoothness}; it must be a number above 0")
    if local_steps < 1:
        raise FedSieveError(f"local_steps is {local_steps}; a client makes at least 1 step a round")
    if not ratios:
        raise FedSieveError("ratios is empty; give k / r of each client")
    for ratio in ratios:
        if not 0 < ratio <= 1:
            raise FedSieveError(f"a ratio k / r is {ratio}; it must be in (0, 1]")
    mean = sum(1 / ratio for ratio in ratios) / len(ratios)
    mean_square = sum(1 / ratio**2 for ratio in ratios) / len(ratios)
    return mean * smoothness, mean_square * smoothness
