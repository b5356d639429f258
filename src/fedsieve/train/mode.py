"""A model while it trains: it drops what it drops, and its running statistics stay the base's.

Batch norm in training mode normalises a row by the other rows of its batch, and moves a mean and a
variance that are no parameters: they travel in no message, and a client would leave its own behind
for the next one. So such layers normalise by what the checkpoint holds, while training too.
"""

from torch import Tensor, nn


def to_training(model: nn.Module) -> None:
    """Put the model into training mode, all but the layers that keep running statistics."""
    model.train()
    for module in model.modules():
        if isinstance(getattr(module, "running_mean", None), Tensor):
            module.eval()
