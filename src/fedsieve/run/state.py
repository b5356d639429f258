"""Whether what a checkpoint holds is what the recipe's method keeps, before a round begins.

A checkpoint may be of another recipe, or made to harm. What a method keeps is known to the method
alone, so the next round is rehearsed: its own functions run over the state, and over the memory of
one client of each form, with noise in the place of training and every message really encoded. What
they make must have the form of what they make without a memory. Nothing of it is kept.
"""

from collections.abc import Collection, Iterator
from pathlib import Path

import torch

from fedsieve.algebra.adapter import Adapter, Tree
from fedsieve.algebra.budget import Budget, Client
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import Memory, Method, State
from fedsieve.costs import dry_run
from fedsieve.errors import FedSieveError
from fedsieve.recipe.experiment import Experiment
from fedsieve.run.checkpoint import Snapshot
from fedsieve.train.model import ResidentModel

Forms = dict[str, tuple[torch.dtype, torch.Size]]
_ADAPTER = "the client's adapter"
_ANYONE, _ANY_ROUND = Client("anyone", 1, Budget()), Key(0, 1)
_ODD = (AttributeError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)


def exported(
    folder: Path,
    method: Method,
    resident: ResidentModel,
    state: State,
    client: Client = _ANYONE,
    key: Key = _ANY_ROUND,
) -> Adapter:
    """A state's adapter, once it was seen that the method could go on from it.

    client, key: who takes part in the round that is rehearsed, and its key
    Raises FedSieveError, naming what of it, for a state that the method does not have.
    """
    start = resident.adapter()
    for group, tree in method.init(start).trees.items():
        if _forms(state.trees.get(group, {})) != _forms(tree):
            raise _other(folder, repr(group))
    try:
        adapter = method.export(state)
        resident.put(adapter)
        part = _rehearsed(method, resident, method.plan(state, key), start, client, {}, key)
        _refuse_unknown_groups(state, method.merge(state, [(client, part.update)], key))
    except (FedSieveError, *_ODD) as error:
        raise _other(folder, "state") from error
    return adapter


def refuse_another(folder: Path, experiment: Experiment, snapshot: Snapshot) -> None:
    """Raises FedSieveError, naming what of it, for a state or a client's memory that the method
    does not have: the next round would break off.
    """
    federation, state, start = experiment.federation, snapshot.progress.state, experiment.start
    method, key = federation.method, federation.own_key(snapshot.progress.round + 1)
    clients = {client.id: client for client in federation.clients}
    anyone = next(iter(clients.values()), _ANYONE)
    exported(folder, method, experiment.resident, state, anyone, key)
    plan, what = method.plan(state, key), "state"

    def rehearsed(id: str, memory: Memory) -> dry_run.Part:
        return _rehearsed(method, experiment.resident, plan, start, clients[id], memory, key)

    try:
        rehearsal = dry_run.rounds(method, start.layout, [anyone])
        _refuse_other_names(state, method.init(start).trees, rehearsal, clients)
        for id, memory in _one_of_each(snapshot, clients):
            what = f"memory of client {id[:80]!r}"
            anew, found = (_made(rehearsed(id, each)) for each in ({}, memory))
            kept = {group: _forms(tree) for group, tree in memory.items()}
            if found != found | anew or found != found | kept or found.keys() - kept != {_ADAPTER}:
                raise ValueError("the client's adapter or memory has another form")
    except (FedSieveError, *_ODD) as error:
        raise _other(folder, what) from error


def _rehearsed(
    method: Method,
    resident: ResidentModel,
    plan: State,
    start: Adapter,
    client: Client,
    memory: Memory,
    key: Key,
) -> dry_run.Part:
    """What a client makes of its message, which the model has room for."""
    part = dry_run.take_part(method, plan, start, client, memory, key)
    resident.put(part.view.adapter)
    return part


def _made(part: dry_run.Part) -> dict[str, Forms]:
    """The forms of a client's adapter and of what it then keeps."""
    kept = {group: _forms(tree) for group, tree in part.memory.items()}
    return {**kept, _ADAPTER: _forms(part.view.adapter.tensors)}


def _one_of_each(snapshot: Snapshot, clients: dict[str, Client]) -> Iterator[tuple[str, Memory]]:
    """One client of each form of memory and each budget; who is no client now is asked no more."""
    seen = set()
    for id, memory in sorted(snapshot.memories.items()):
        if id in clients:
            form = frozenset(
                (group, name, form)
                for group, tree in memory.items()
                for name, form in _forms(tree).items()
            )
            if (form, clients[id].budget) not in seen:
                seen.add((form, clients[id].budget))
                yield id, memory


def _refuse_unknown_groups(state: State, after: State) -> None:
    """Raises ValueError for a group of the state that the method would not keep, or not so."""
    for group, tree in state.trees.items():
        kept = after.trees.get(group)
        if kept is None or (tree and not _forms(tree).items() <= _forms(kept).items()):
            raise ValueError(f"the state has {group!r}, which the method does not keep so")


def _refuse_other_names(
    state: State,
    begun: Collection[str],
    rehearsal: Iterator[dry_run.Rehearsed],
    clients: Collection[str],
) -> None:
    """Raises ValueError for a group of the state with other tensors than it has over random
    numbers, but for what it keeps by client.

    begun: the groups that are there from the beginning, which are known to be right
    """
    for each in rehearsal:
        for group, tree in each.state.trees.items():
            if group in begun:
                continue
            kept, wanted = _forms(state.trees.get(group, tree)), _forms(tree)
            # Who has not taken part yet is not in a group by client.
            wanted = {name: form for name, form in wanted.items() if name not in clients}
            if kept | wanted != kept or set(kept) - set(wanted) - set(clients):
                raise ValueError(f"the state's {group!r} has other tensors")


def _forms(tree: Tree) -> Forms:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tree.items()}


def _other(folder: Path, what: str) -> FedSieveError:
    return FedSieveError(
        f"{folder}: the newest checkpoint's {what} is not what the recipe's method and "
        "server keep: it is of another recipe, or was not written by FedSieve"
    )
