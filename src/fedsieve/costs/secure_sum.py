"""Could the server do with the sum of its clients' updates? Where secure aggregation would fit.

Secure aggregation shows a server the sum of its clients' vectors and none of them. That takes two
things of a method: all clients of a round send the same coordinates, and the server's step depends
on nothing but the mean of what they sent. Then an engine that learns only the mean can hand it to
`Method.merge` in every client's name, and the step is the same. `obstacle` rehearses a method and
says what is missing, if anything is; docs/security.md has the table for the methods that ship.
"""

from collections.abc import Sequence

import torch

from fedsieve.algebra.adapter import Layout
from fedsieve.algebra.budget import Client
from fedsieve.algebra.method import Method
from fedsieve.algebra.payload import Form, Payload, Values, exact
from fedsieve.algebra.support import Support
from fedsieve.costs import dry_run

OWN_COORDINATES = "its clients send different coordinates"
OWN_UPDATES = "its server looks at each client's update"


def obstacle(method: Method, layout: Layout, clients: Sequence[Client]) -> str | None:
    """Why this method cannot be summed in secret over these clients (two or more); None if it can.

    The clients count alike: with weights by examples each would multiply its own update first.
    """
    for round in dry_run.rounds(method, layout, clients):
        updates = [part.update for part in round.parts]
        if not all(_same(update.support, updates[0].support) for update in updates):
            return OWN_COORDINATES
        mean = mean_of(updates)
        apart = [(part.client, part.update) for part in round.parts]
        alike = [(client, mean) for client in clients]
        one = method.merge(round.state, iter(apart), round.key)
        two = method.merge(round.state, iter(alike), round.key)
        for group, tree in one.trees.items():
            if not all(torch.allclose(t, two.trees[group][n], 1e-4, 1e-7) for n, t in tree.items()):
                return OWN_UPDATES
    return None


def mean_of(updates: Sequence[Payload]) -> Payload:
    """The mean of payloads on one support; in float32, if they are not in float64."""
    mean = torch.stack([exact(update.values) for update in updates]).mean(0)
    form: Form = "float64" if mean.dtype == torch.float64 else "float32"
    return updates[0]._replace(values=Values(form, mean, torch.empty(0)))


def _same(one: Support, two: Support) -> bool:
    if one.names != two.names or one.masks.keys() != two.masks.keys():
        return False
    if (one.ranks is None) != (two.ranks is None):
        return False
    ranks = one.ranks is None or two.ranks is None or torch.equal(one.ranks, two.ranks)
    return ranks and all(torch.equal(mask, two.masks[n]) for n, mask in one.masks.items())
