"""Whether what a checkpoint holds is what the recipe's method keeps, before a round begins.

A checkpoint may be of another recipe, or made to harm. What a method keeps is known to the method
alone, so the next round is rehearsed: its own functions run over the state, and over the memory of
one client of each form, with noise in the place of training and every message really encoded. What
they make must have the form of what they make without a memory. Nothing of it is kept.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch

from fedsieve.algebra.adapter import Adapter, Tree, base_layout
from fedsieve.algebra.budget import Client
from fedsieve.algebra.catchup import SEEN
from fedsieve.algebra.method import Memory, Method, State
from fedsieve.costs import dry_run
from fedsieve.errors import FedSieveError, MethodFailed, WireError, raise_of_memory
from fedsieve.recipe.experiment import Experiment
from fedsieve.run.checkpoint import Snapshot
from fedsieve.train.model import ResidentModel

Forms = dict[str, tuple[torch.dtype, torch.Size]]
_ADAPTER = "the client's adapter"
_NOBODY = "\0"  # no client's name
_ODD = (AttributeError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)


def exported(
    folder: Path, method: Method, resident: ResidentModel, start: Adapter, state: State
) -> Adapter:
    """A checkpoint's adapter. What of the state has no part in it (the optimizer's counts, say,
    which were others before) may have any form.

    start: the adapter before the first round
    Raises FedSieveError, naming what of it, for a state that the method does not have.
    """
    what = "state"
    try:
        adapter = method.export(state)
        what = "'base'"
        _refuse_half(adapter)
        what = "state"
        resident.put(adapter)
        for group, tree in _odd(method, start, state).items():
            what = repr(group)
            other = method.export(state._replace(trees={**state.trees, group: tree}))
            if not _alike(adapter, other):
                raise ValueError("it has another form")
    except (FedSieveError, *_ODD) as error:
        raise_of_memory(error)
        raise _other(folder, what, error) from error
    for name, tensor in (*adapter.tensors.items(), *adapter.base.items()):
        if not tensor.isfinite().all():
            raise FedSieveError(
                f"{folder}: the newest checkpoint's adapter is not finite ({name[:80]}): go back "
                "to an earlier one, by `fedsieve resume --at-round`"
            )
    return adapter


def _odd(method: Method, start: Adapter, state: State) -> dict[str, Tree]:
    """The groups that are there from the beginning and have another form, as they began."""
    begun = method.init(start).trees
    return {g: tree for g, tree in begun.items() if _forms(state.trees.get(g, {})) != _forms(tree)}


def _refuse_half(adapter: Adapter) -> None:
    """Raises ValueError for a change of other weights than all those under the pairs."""
    wanted = {name: tuple(shape) for name, shape in base_layout(adapter.layout, 0).shapes.items()}
    found = {n: tuple(t.shape) for n, t in adapter.base.items() if t.is_floating_point()}
    if adapter.base and found != wanted:
        raise ValueError("it is the change of other weights")


def _alike(one: Adapter, other: Adapter) -> bool:
    pairs = ((one.tensors, other.tensors), (one.base, other.base))
    return all(
        _forms(a) == _forms(b) and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in pairs
    )


def refuse_another(
    folder: Path, experiment: Experiment, snapshot: Snapshot, before: Collection[str] = ()
) -> None:
    """Raises FedSieveError, naming what of it, for a state or a client's memory that the method
    does not have: the next round would break off.

    before: who took part in the rounds so far. Sites may be away now, and the state keeps of them
        what it kept
    """
    federation, state, start = experiment.federation, snapshot.progress.state, experiment.start
    method, key = federation.method, federation.own_key(snapshot.progress.round + 1)
    for group, tree in _odd(method, start, state).items():
        # Names may have come into it since, at which the rehearsal looks.
        if not _forms(tree).items() <= _forms(state.trees.get(group, {})).items():
            raise _other(folder, repr(group))
    clients = {client.id: client for client in federation.clients}
    _refuse_other_rounds(folder, snapshot)
    if not clients:
        return
    # What the least update makes is there for the others, if they make it.
    anyone = min(clients.values(), key=lambda client: client.budget.ratio)
    what = "state"
    try:
        method.export(state)
        plan = method.plan(state, key)

        def rehearsed(client: Client, memory: Memory) -> dry_run.Part:
            part = dry_run.take_part(method, plan, start, client, memory, key)
            experiment.resident.put(part.view.adapter)
            return part

        def beginning(client: Client) -> dry_run.Part:
            try:
                return rehearsed(client, {})
            except WireError:  # the server counts on what it keeps: one that is new, then
                return rehearsed(client._replace(id=_NOBODY), {})

        update = beginning(anyone).update
        rehearsal = dry_run.rounds(method, start.layout, [anyone])
        names = {*clients, *before}
        made = _refuse_other_names(state, method.init(start).trees, rehearsal, names)
        _refuse_unknown_groups(state, method.merge(state, [(anyone, update)], key), made)
        for id, memory in _one_of_each(snapshot, clients):
            what = f"memory of client {id[:80]!r}"
            anew, found = _made(beginning(clients[id])), _made(rehearsed(clients[id], memory))
            kept = {group: _forms(tree) for group, tree in memory.items()}
            if found != found | anew or found != found | kept or found.keys() - kept != {_ADAPTER}:
                raise ValueError("the client's adapter or memory has another form")
    except (FedSieveError, *_ODD) as error:
        raise_of_memory(error)
        raise _other(folder, what, error) from error


def _refuse_other_rounds(folder: Path, snapshot: Snapshot) -> None:
    """Raises FedSieveError where a client is at a round that has not been (catchup.py): what it
    lacks is worked out by it.
    """
    seen = {
        f"memory of client {id[:80]!r}": memory.get(SEEN, {})
        for id, memory in snapshot.memories.items()
    }
    for what, tree in {repr(SEEN): snapshot.progress.state.trees.get(SEEN, {}), **seen}.items():
        last = snapshot.progress.round
        if not all(at.numel() == 1 and 0 <= at.item() <= last for at in tree.values()):
            raise _other(folder, what)


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


def _refuse_unknown_groups(state: State, after: State, made: Collection[str]) -> None:
    """Raises ValueError for a group of the state that the method would not keep, or not so.

    made: groups that it makes, without numbers: one of a round may be dropped again (catchup.py)
    """
    for group, tree in state.trees.items():
        kept = after.trees.get(group)
        if kept is None and group != _unnumbered(group) and _unnumbered(group) in made:
            continue
        if kept is None or (tree and not _forms(tree).items() <= _forms(kept).items()):
            raise ValueError(f"the state has {group!r}, which the method does not keep so")


def _refuse_other_names(
    state: State,
    begun: Mapping[str, Tree],
    rehearsal: Iterator[dry_run.Rehearsed],
    clients: Collection[str],
) -> set[str]:
    """The groups that the rehearsal made, without numbers. Raises ValueError for a group of the
    state with other tensors than it has over random numbers, but for what it keeps by client.

    begun: what is there from the beginning, which is known to be right
    """
    made: set[str] = set()
    from_the_first: dict[str, Forms] = {}
    in_the_end: dict[str, Forms] = {}
    for each in rehearsal:
        for group, tree in each.state.trees.items():
            made.add(_unnumbered(group))
            if group != _unnumbered(group):
                if group not in begun:
                    _refuse_another_round(state, group, tree)
                continue
            # Who has not taken part yet is not in a group by client.
            right = {*clients, *begun.get(group, {})}
            forms = {name: form for name, form in _forms(tree).items() if name not in right}
            from_the_first.setdefault(group, forms)
            in_the_end[group] = forms
    for group, wanted in in_the_end.items():
        if group not in state.trees:
            continue
        kept = _forms(state.trees[group])
        right = {*clients, *begun.get(group, {})}
        more = {name: form for name, form in kept.items() if name not in right}
        if not from_the_first[group].items() <= kept.items() or not more.items() <= wanted.items():
            raise ValueError(f"the state's {group!r} has other tensors")
    return made


def _refuse_another_round(state: State, group: str, tree: Tree) -> None:
    """Raises ValueError for what is kept of some round and is not of the kind of this one. How long
    it is along an axis follows from who took part; whether it fits, the next round finds out.
    """
    wanted = {name: (tensor.dtype, tensor.ndim) for name, tensor in tree.items()}
    for other, found in state.trees.items():
        if _unnumbered(other) != _unnumbered(group):
            continue
        if {name: (tensor.dtype, tensor.ndim) for name, tensor in found.items()} != wanted:
            raise ValueError(f"the state's {other!r} has other tensors")


def _unnumbered(group: str) -> str:
    return re.sub(r"\d+$", "#", group)


def _forms(tree: Tree) -> Forms:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tree.items()}


def _other(folder: Path, what: str, error: BaseException | None = None) -> FedSieveError:
    own = f"; or the method is at fault: {error}" if isinstance(error, MethodFailed) else ""
    return FedSieveError(
        f"{folder}: the newest checkpoint's {what} is not what the recipe's method and "
        f"server keep: it is of another recipe, or was not written by FedSieve{own}"
    )
