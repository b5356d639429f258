"""Whether what a checkpoint holds is what the recipe's method keeps, before a round begins.

A checkpoint may be of another recipe, or made to harm. What a method keeps is known to the method
alone, so the next round is rehearsed: its own functions run over the state, and over the memory of
one client of each form, with noise in the place of training and every message really encoded. What
they make must have the form of what they make without a memory. Nothing of it is kept.
"""

from collections.abc import Collection, Iterator
from pathlib import Path

import torch

from fedsieve.algebra.adapter import Tree
from fedsieve.algebra.budget import Client
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import ClientContext, Memory, State
from fedsieve.algebra.payload import Payload
from fedsieve.costs import dry_run
from fedsieve.errors import FedSieveError
from fedsieve.recipe.experiment import Experiment
from fedsieve.run.checkpoint import Snapshot
from fedsieve.wire import decode, encode

Forms = dict[str, tuple[torch.dtype, torch.Size]]
_ADAPTER = "the client's adapter"
_ODD = (AttributeError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)


def refuse_another(folder: Path, experiment: Experiment, snapshot: Snapshot) -> None:
    """Raises FedSieveError, naming what of it, for a state or a client's memory that the method
    does not have: the next round would break off.
    """
    method, state = experiment.federation.method, snapshot.progress.state
    start = experiment.start
    for group, tree in method.init(start).trees.items():
        if _forms(state.trees.get(group, {})) != _forms(tree):
            raise _other(folder, repr(group))
    clients = {client.id: client for client in experiment.federation.clients}
    anyone = next(iter(clients.values()), None)
    if anyone is None:
        return
    what = "state"
    try:
        method.export(state)
        update, alike = _rehearsed(experiment, snapshot, anyone, {})
        after = method.merge(state, [(anyone, update)], _key(experiment, snapshot))
        _refuse_unknown_groups(state, after)
        rehearsal = dry_run.rounds(method, start.layout, [anyone])
        _refuse_other_names(state, method.init(start).trees, rehearsal, clients)
        for id, memory in _one_of_each(snapshot, clients):
            what = f"memory of client {id[:80]!r}"
            own = alike if clients[id].budget == anyone.budget else None
            if own is None:
                _, own = _rehearsed(experiment, snapshot, clients[id], {})
            _, found = _rehearsed(experiment, snapshot, clients[id], memory)
            kept = {group: _forms(tree) for group, tree in memory.items()}
            if found != found | own or found != found | kept or found.keys() - kept != {_ADAPTER}:
                raise ValueError("the client's adapter or memory has another form")
    except FedSieveError as error:
        raise _other(folder, what) from error
    except _ODD as error:
        raise _other(folder, what) from error


def _rehearsed(
    experiment: Experiment, snapshot: Snapshot, client: Client, memory: Memory
) -> tuple[Payload, dict[str, Forms]]:
    """A client's decoded update of the next round, and the forms of its adapter and of what it then
    keeps.
    """
    method, start, key = experiment.federation.method, experiment.start, _key(experiment, snapshot)
    plan = method.plan(snapshot.progress.state, key)
    context = ClientContext(client, start, key._replace(client=client.id))
    payload = method.publish(plan, client, context.key)
    view, caught = method.view(decode(encode(payload), start.layout), memory, context)
    experiment.resident.put(view.adapter)
    report, after = method.report(view, dry_run.moved(view, context.key), caught, context)
    forms = {group: _forms(tree) for group, tree in after.items()}
    forms[_ADAPTER] = _forms(view.adapter.tensors)
    return decode(encode(report), start.layout, payload.support), forms


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


def _key(experiment: Experiment, snapshot: Snapshot) -> Key:
    return experiment.federation.own_key(snapshot.progress.round + 1)


def _forms(tree: Tree) -> Forms:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tree.items()}


def _other(folder: Path, what: str) -> FedSieveError:
    return FedSieveError(
        f"{folder}: the newest checkpoint's {what} is not what the recipe's method and "
        "server keep: it is of another recipe, or was not written by FedSieve"
    )
