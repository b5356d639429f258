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
from fedsieve.algebra.payload import Form
from fedsieve.algebra.sieve import dense, sketch
from fedsieve.errors import FedSieveError


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
    """A local step size at which FSLoRA converges, after Theorem 4.4 (SGD(1), all clients present).

    With q_i = r / k_i, L_bar = mean(q_i) L, L_tilde = mean(q_i^2) L, H local steps, N clients:

        gamma <= min{ N / (24 (1 + rho) (1 + c_h) H L_bar),
                      1 / (8 H sqrt((1 + rho) (1 + c_h) (N + 1) L_tilde L)),  1 / H }

    It holds under Assumptions 4.1 to 4.3 in this reading, where f_i(B, A) is the expected loss of
    client i at W0 + B A, and f~_i and f~ are as in equation 2, with the mean over sketches:

    smoothness: L; the loss of each example is L-smooth IN THE FACTORS (B, A), not in W. No LoRA
        loss is so everywhere: L is that of the region where the iterates and their sketches are
    rho: a client's stochastic gradient, over the draw of sketch AND batch, has a variance of at
        most rho |grad f~_i|^2 + sigma^2
    c_h: mean over i of |grad f~_i - grad f~|^2 is at most c_h |grad f~|^2 + sigma_h^2
    local_steps: H, local gradient steps a round
    ratios: k_i / r of each client

    The paper's are the quantities that enter and the growth with L_bar and L_tilde. The constants
    24 and 8 and the cap 1 / H are the form in which we know its condition; they were not checked
    against its text. 1 + rho stands for its rho, so that exact gradients get a finite step too.
    That this bound suffices is shown in docs/convergence.md, and is ours.

    Raises FedSieveError for a constant or a ratio that makes no sense.
    """
    if not (math.isfinite(smoothness) and smoothness > 0):
        raise FedSieveError(f"smoothness is {smoothness}; it must be a number above 0")
    for name, value in (("rho", rho), ("c_h", c_h)):
        if not (math.isfinite(value) and value >= 0):
            raise FedSieveError(f"{name} is {value}; it must be a number of at least 0")
    if local_steps < 1:
        raise FedSieveError(f"local_steps is {local_steps}; a client makes at least 1 step a round")
    if not ratios:
        raise FedSieveError("ratios is empty; give k / r of each client")
    for ratio in ratios:
        if not 0 < ratio <= 1:
            raise FedSieveError(f"a ratio k / r is {ratio}; it must be in (0, 1]")
    clients = len(ratios)
    l_bar = smoothness * sum(1 / ratio for ratio in ratios) / clients
    l_tilde = smoothness * sum(1 / ratio**2 for ratio in ratios) / clients
    spread = (1 + rho) * (1 + c_h)
    noise = clients / (24 * spread * local_steps * l_bar)
    drift = 1 / (8 * local_steps * math.sqrt(spread * (clients + 1) * l_tilde * smoothness))
    return min(noise, drift, 1 / local_steps)
