"""Evaluation client by client, for methods that leave a part of the model with each client.

There is no global model then, so some of the clients that have taken part are drawn, each one's own
model is evaluated on test rows that look like its own data, and the mean over all these rows is
reported. It answers another question than a global model's accuracy, and is easier where clients
have few labels: do not compare the two.
"""

from collections.abc import Mapping

import torch

from fedsieve.algebra.keys import Key, generator
from fedsieve.algebra.method import Memory
from fedsieve.tasks.examples import Examples, take

CLIENTS = 10  # evaluated at most
ROWS = 50  # of the test split, for each


def some_of(memories: Mapping[str, Memory], key: Key) -> list[tuple[str, Memory]]:
    """At most `CLIENTS` of the clients that have taken part, and what they hold."""
    ids = sorted(memories)
    draw = torch.randperm(len(ids), generator=generator(key.at("personal")))[:CLIENTS]
    return [(ids[i], memories[ids[i]]) for i in sorted(draw.tolist())]


def own_test(test: Examples, own: Examples, key: Key) -> Examples:
    """`ROWS` test rows in a client's own mix of labels; any rows where none has such a label."""
    weights = torch.ones(test.labels.shape[0])
    if own.labels.ndim == 1 and not own.labels.is_floating_point():
        classes = int(max(test.labels.max(), own.labels.max())) + 1
        mine = torch.bincount(own.labels, minlength=classes).double()
        there = torch.bincount(test.labels, minlength=classes).double()
        fitting = (mine / there.clamp(min=1))[test.labels]
        weights = fitting if fitting.any() else weights
    rows = min(ROWS, int((weights > 0).sum()))
    draws = generator(key.at("personal"))
    return take(test, torch.multinomial(weights, rows, replacement=False, generator=draws))
