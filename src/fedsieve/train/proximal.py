"""FedProx: a local loss that holds a client near what it was sent (Li et al. 2020,
arXiv 1812.06127, equation 2).

    loss(x) + mu / 2 |x - x_0|^2

x is all of the adapter that the client trains, x_0 what it begins the round with. The paper's
server is FedAvg's; here any method and any server optimizer goes with it, and how far a client
solves its problem is said by the steps of `training`. The gradient of the term is mu (x - x_0): it
is added to the one that is there, so that nothing more is kept over a backward pass.
"""

from collections.abc import Sequence

from torch import Tensor


def hold(mu: float, now: Sequence[Tensor], began: Sequence[Tensor], clients: int = 1) -> Tensor:
    """Add the term's gradient to that of what is trained now. Returns the term, (clients,).

    clients: whose tensors lie side by side, (clients, ...), or one, whose have no such axis
    """
    total = now[0].new_zeros(clients)
    for x, own in zip(now, began, strict=True):
        away = x.detach() - own
        if x.grad is not None:  # else it does not move
            x.grad.add_(away, alpha=mu)
        total += away.reshape(clients, -1).square().sum(1)
    return mu / 2 * total
