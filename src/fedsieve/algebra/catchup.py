"""Changes of the frozen base: what the server has folded into it, and how clients catch up.

FLoRA, FLoRIST and FedEx-LoRA add products to the frozen weights W0, so clients that were away hold
an older base than the server. The server's state remembers

    "base"       the whole change since the start, (m, n) a module
    "fold <t>"   the factors that round t added: B (m, K) and A (K, n), the scale inside B
    "seen"       client -> the round after which its base is up to date

and each message carries, beside its payload, what its client lacks (`payload.Base`): the missing
factors side by side, or the whole change, whichever holds fewer numbers. Those bytes are charged to
the client like all others. A client keeps the change and its round in its own memory.

The change travels in full precision: rounding errors in a base would never be corrected.
"""

from collections.abc import Iterable

import torch

from fedsieve.algebra.adapter import Layout, Tree, base_layout
from fedsieve.algebra.budget import Client
from fedsieve.algebra.keys import Key, generator
from fedsieve.algebra.method import Memory, State
from fedsieve.algebra.payload import Base, Form, Payload, rounded
from fedsieve.algebra.support import everything, gather
from fedsieve.errors import WireError

SEEN = "seen"  # the group with the round that each client is at: of the state, and of its memory


def fold(state: State, factors: Tree, clients: Iterable[str], number: int) -> State:
    """The state after round `number` added the product of `factors` to the base.

    factors: by the adapter's names, B (m, K, ...) and A (K, n, ...)
    clients: those that took part, and so held the base as it was before this round
    """
    base = _added(state.trees.get("base", {}), state.layout, factors)
    seen = dict(state.trees.get(SEEN, {}))
    for client in clients:
        seen[client] = torch.tensor(number - 1)
    trees = {**state.trees, "base": base, SEEN: seen, _fold(number): factors}
    # Factors that together hold more numbers than the whole change are never sent again.
    dense = base_layout(state.layout, 0).size
    size = 0
    for old in range(number, 0, -1):
        size += sum(t.numel() for t in trees.get(_fold(old), {}).values())
        if size >= dense:
            trees.pop(_fold(old), None)
    return State(state.layout, trees)


def missing(state: State, client: Client, number: int) -> Base | None:
    """What a client lacks of the base at the beginning of round `number`; None if nothing."""
    if "base" not in state.trees or not state.layout.pairs:
        return None
    seen = state.trees[SEEN].get(client.id)
    since = 0 if seen is None else int(seen)
    if since == number - 1:
        return None
    folds = [state.trees.get(_fold(n)) for n in range(since + 1, number)]
    known = [f for f in folds if f is not None]
    if len(known) < len(folds):
        return _dense(state)
    factors: Tree = {}
    for pair in state.layout.pairs:
        factors[pair.a] = torch.cat([f[pair.a] for f in known], dim=0)
        factors[pair.b] = torch.cat([f[pair.b] for f in known], dim=1)
    # Shorter than the whole change, or `fold` would not have kept them.
    layout = base_layout(state.layout, factors[state.layout.pairs[0].a].shape[0])
    return Base(since, _payload(layout, factors))


def catch_up(base: Base | None, memory: Memory, layout: Layout, number: int) -> Memory:
    """A client's memory with its base brought to where the server's is in round `number`.

    Raises WireError if the change counts from another round than the client is at.
    """
    at = int(memory[SEEN]["round"]) if SEEN in memory else 0
    if base is None:
        return memory
    tree = base.change.tree()
    if base.change.layout.pairs:
        if base.since != at:
            raise WireError(
                f"a change of the base since round {base.since} came, and this client is at round "
                f"{at}: what it kept of the base is lost, and it takes part again when the whole "
                "base travels"
            )
        tree = _added(memory.get("base", {}), layout, tree)
    return {**memory, "base": tree, SEEN: {"round": torch.tensor(number - 1)}}


def _added(base: Tree, layout: Layout, factors: Tree) -> Tree:
    """A change of the base, empty at first, with the products of the factors added."""
    shapes = base_layout(layout, 0).shapes
    added: Tree = {}
    for pair in layout.pairs:
        name = f"{pair.module}.base"
        product = (factors[pair.b].flatten(1) @ factors[pair.a].flatten(1)).reshape(shapes[name])
        added[name] = base[name] + product if name in base else product
    return added


def _dense(state: State) -> Base:
    layout = base_layout(state.layout, 0)
    return Base(0, _payload(layout, state.trees["base"]))


def _payload(layout: Layout, tree: Tree) -> Payload:
    support = everything(layout)
    numbers = gather(tree, support).cpu()
    form: Form = "float64" if numbers.dtype == torch.float64 else "float32"
    values = rounded(numbers, form, generator(Key(0)))  # exact: nothing is drawn
    return Payload(layout, support, values, "known", "known")


def _fold(number: int) -> str:
    return f"fold {number}"
