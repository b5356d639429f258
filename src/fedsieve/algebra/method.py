"""A method of federated fine-tuning: pure functions over explicit state.

A round calls them in this order. The server plans once, publishes a payload for each client of the
cohort, and merges what they return; a client turns its payload into a view, trains that, and
reports a payload. `compose` builds all of them from what passes down, what is trained, what passes
up and how the server moves, which is enough for most methods; a method that needs more replaces
single functions of the result.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from fedsieve.algebra.adapter import Adapter, Layout, Tree
from fedsieve.algebra.budget import Client
from fedsieve.algebra.cores import Cores
from fedsieve.algebra.intact import left_intact, ours
from fedsieve.algebra.keys import Key, generator
from fedsieve.algebra.optim import (
    Optimizer,
    clip_of,
    limits,
    settled,
    sgd,
    slots_of,
    stepped,
)
from fedsieve.algebra.options import checked
from fedsieve.algebra.payload import Form, Payload, rounded
from fedsieve.algebra.sieve import (
    Choice,
    Passed,
    Sieve,
    competing,
    every_name,
    leading,
    nonzero,
    top_ranks,
)
from fedsieve.algebra.support import (
    Support,
    add_back,
    cut,
    equal,
    gather,
    masked,
    narrowed,
    norm,
    top_k,
)
from fedsieve.errors import (
    THEIRS,
    FedSieveError,
    MethodFailed,
    NoUsableUpdate,
    cannot_take,
    line_of,
    nearest,
    quoted,
    raise_of_memory,
    with_type,
)
from fedsieve.settings import Source, Training, as_float, is_number

Memory = dict[str, Tree]  # what a client keeps between its rounds; {} for most methods
Weighting = Literal["uniform", "examples"]
Knob = Literal["ratio", "down", "up"]
Trained = Literal["lora", "head", "all"] | Cores
Scaling = Literal["server", "alpha/k", "alpha/sqrt(k)"]
Ranked = Literal["values", "change"]


def unlimited(state: "State") -> float:
    """No update is too large."""
    return math.inf


class Unbounded(FedSieveError):
    """The server optimizer clips updates, and in this method that would bound nothing.

    by: what lets one client move the server further: how updates are weighed, or the merge itself
    """

    def __init__(self, by: Literal["weighting", "merge"]) -> None:
        self.by = by
        clips = "a server that clips updates (noise.private, optim.bounded)"
        super().__init__(
            f"weighting: with {clips} it must be 'uniform': a client's number of examples is its "
            "own secret, and would weigh its update beyond the clip"
            if by == "weighting"
            else f"server: this method's server does not move by a mean of the clients' changes "
            f"alone, so {clips} bounds nothing: choose a method that does (fedit, fslora, flasc, "
            "...), or a server without a clip"
        )


class State(NamedTuple):
    """What the server keeps between rounds: tensors alone, so any checkpoint can hold it.

    trees: "adapter" is the global adapter at full rank; the others are the optimizer's moments and
           whatever else a method needs
    """

    layout: Layout
    trees: dict[str, Tree]


class ClientContext(NamedTuple):
    """A client's own end of a round.

    start: the adapter before the first round; both ends draw it from the recipe's seed, so it is
           never sent
    key:   of this round and this client
    """

    client: Client
    start: Adapter
    key: Key


class View(NamedTuple):
    """What a client trains.

    adapter: at the client's own rank k, its layout's scale already holding the r / k of a sketch
    layout, support: the server's layout, and the coordinates of it that arrived
    moves:   of the adapter's own tensors, what training moves: names, and masks of single entries;
             everything else stays as it is
    penalty: added to the local loss, from the adapter's tensors by name; None adds nothing
    """

    adapter: Adapter
    layout: Layout
    support: Support
    moves: Support
    penalty: Callable[[Tree], Tensor] | None = None


def anything_fits(update: Payload, sent: Support, client: Client, key: Key) -> str | None:
    """Nothing is known of what a method asks of its clients."""
    return None


class Method(NamedTuple):
    """The functions of a round; see the module's head.

    knobs:    the parts of a client's budget that it uses
    init:     the server's state before the first round
    plan:     what all clients of a round share, as a state
    export:   the global model
    server:   the optimizer that moves it: the one that was given, or the method's own
    personal: a client's own model, from the global one and the client's memory, for methods that
              leave a part with the client; None for all others
    trains:   what of the model is its tree: LoRA pairs and the head, the head alone, all weights,
              or cores between frozen factors and the head (cores.py)
    linear:   the server moves by a mean of the clients' changes, each clipped as `Optimizer.clip`
              says: what differential privacy needs
    clip:     that limit in a state, on the L2 norm of one client's decoded update
    private:  where the noise comes from that hides single clients; None where nothing does
    keeps:    clients keep something from round to round that came from their rows
    counts:   the server has added up what they keep: of a client, nothing older than what it kept
              when its update was last merged will do
    misfit:   an update, the support that its client was sent, the client, the round's key -> how
              the update differs from what was asked, or None: what `merge` may count on
    trained_by: the same method, where it has to know how clients train: (a round's number -> their
              training) -> it. Raises FedSieveError, naming the key, for training that does not fit
    """

    knobs: frozenset[Knob]
    init: Callable[[Adapter], State]
    plan: Callable[[State, Key], State]
    publish: Callable[[State, Client, Key], Payload]
    view: Callable[[Payload, Memory, ClientContext], tuple[View, Memory]]
    report: Callable[[View, Tree, Memory, ClientContext], tuple[Payload, Memory]]
    merge: Callable[[State, Iterable[tuple[Client, Payload]], Key], State]
    export: Callable[[State], Adapter]
    server: Optimizer
    personal: Callable[[Adapter, Memory], Adapter] | None = None
    trains: Trained = "lora"
    linear: bool = False
    clip: Callable[[State], float] = unlimited
    private: Source | None = None
    keeps: bool = False
    counts: bool = False
    misfit: Callable[[Payload, Support, Client, Key], str | None] = anything_fits
    trained_by: "Callable[[Callable[[int], Training]], Method] | None" = None


def unscaled(rank: int, kept: int) -> float:
    """Clients use the server's own scale s."""
    return 1.0


def r_over_k(rank: int, kept: int) -> float:
    """The factor that makes a sketch unbiased (FSLoRA, Definition 3.1); it turns alpha / r into
    alpha / k.
    """
    return rank / kept


def root_r_over_k(rank: int, kept: int) -> float:
    """alpha / sqrt(k) for a server whose scale is alpha / sqrt(r) (rank-stabilised LoRA)."""
    return float((rank / kept) ** 0.5)


SCALINGS: dict[Scaling, Callable[[int, int], float]] = {
    "server": unscaled,
    "alpha/k": r_over_k,
    "alpha/sqrt(k)": root_r_over_k,
}


def _refuse_odd(name: str, function: Callable[..., object], *takes: str) -> None:
    """Raises FedSieveError, naming it, for a part of a method that cannot be called as one is."""
    if why := cannot_take(function, *takes):
        raise FedSieveError(f"{name}: a function ({', '.join(takes)}) is needed: {why}")


def _called(name: str, kind: str, function: Callable[..., object]) -> str:
    """A part of a method in words: what `compose` calls it, what it is, and its own name. One of
    FedSieve's own that another made is told by that one's, as in `sketch()`.
    """
    own = getattr(function, "__name__", function)
    if ours(function):
        own = str(getattr(function, "__qualname__", own)).partition(".")[0]
    return f"{name}: the {kind} {quoted(own)}"


def _asked(called: str, function: Callable[..., Any], *given: Any) -> Any:
    """What a part of a method gives. Raises MethodFailed, with the line, where one of the user's
    own fails: whoever goes through a method's functions sees this part alone, if at all.

    called: who it is, with which the message begins
    """
    if ours(function):
        return function(*given)
    with left_intact(given, called):
        try:
            return function(*given)
        except FedSieveError:
            raise
        except THEIRS as error:
            raise_of_memory(error)
            raise MethodFailed(f"{called} fails: {with_type(error)}{line_of(error)}") from error


def _sieved(
    name: str, sieve: Sieve, tree: Tree, layout: Layout, client: Client, key: Key
) -> Passed:
    """What a sieve lets pass. Raises MethodFailed, naming it, for what is no `Passed` of this tree:
    it may be the user's own.

    name: what `compose` calls it
    """
    called = _called(name, "sieve", sieve)
    made = _asked(called, sieve, tree, layout, client, key)
    said = f"{called} must give"
    if not isinstance(made, Passed) or not isinstance(made.support, Support):
        raise MethodFailed(f"{said} a Passed of a Support, not {quoted(made)}")
    if (wrong := _unfit(made.support, tree, layout)) is not None:
        raise MethodFailed(f"{said} {wrong}")
    return made


def _unfit(support: Support, tree: Tree, layout: Layout) -> str | None:
    """What a support of this tree must have, and has not: "..., not ..."; None if it has all."""
    names, ranks, masks = cast(tuple[Any, Any, Any], support)
    if not isinstance(names, tuple | list) or not all(isinstance(name, str) for name in names):
        return f"the tensors that pass as a tuple of names, not {quoted(names)}"
    for name in names:
        if name not in tree:
            return f"names of the tree that it sees, not {quoted(name)}{nearest(name, tree)}"
    held = {*names}
    if names != tuple(sorted(held)):
        return f"a tuple of names that are sorted, each once, not {quoted(names)}"
    if ranks is not None:
        asked = f"ranks as an int64 tensor of shape ({len(layout.pairs)}, k)"
        if not isinstance(ranks, Tensor):
            return f"{asked}, not {quoted(ranks)}"
        if ranks.dtype != torch.int64 or ranks.ndim != 2 or len(ranks) != len(layout.pairs):
            return f"{asked}, not {ranks.dtype} of shape {tuple(ranks.shape)}"
        inside = bool(((ranks >= 0) & (ranks < layout.rank)).all())
        if not inside or not bool((ranks.diff(dim=1) > 0).all()) or not ranks.shape[1]:
            return f"ranks that rise within 0..{layout.rank - 1} for each pair, not {quoted(ranks)}"
    if not isinstance(masks, dict):
        return f"masks as a dictionary, {{}} for none, not {quoted(masks)}"
    shapes = narrowed(layout, ranks).shapes if masks else {}
    for tensor, mask in masks.items():
        shape = shapes.get(tensor) if tensor in held else None
        found = (getattr(mask, "dtype", None), tuple(getattr(mask, "shape", ())))
        if found != (torch.bool, shape):
            asked = "no mask" if shape is None else f"a mask of bools of shape {tuple(shape)}"
            return f"{asked} for {quoted(tensor)}, not {quoted(found)}"
    return None


def _uploaded(up: Sieve, change: Tree, own: Layout, client: Client, key: Key) -> Passed:
    """What a sieve lets go up. Raises MethodFailed, naming it, where it chooses ranks."""
    passed = _sieved("up", up, change, own, client, key)
    if passed.support.ranks is not None:
        raise _no_ranks(up)
    return passed


def _no_ranks(up: Sieve) -> MethodFailed:
    """Clients would send all the ranks that came down, whatever such a sieve says."""
    return MethodFailed(
        f"{_called('up', 'sieve', up)} lets ranks pass, and an upload has those that came down: "
        "choose ranks by `down`, and by `up` tensors or entries"
    )


# Of a weight: sums of float32 hold such a one times any number that may come, and its inverse.
_HEAVIEST = 1e12


def _weighed(weighting: Callable[[Tree, Layout], float], change: Tree, own: Layout) -> float:
    """What an update counts by a function. Raises MethodFailed, naming it, for what is no weight:
    it may be the user's own.
    """
    called = _called("weighting", "function", weighting)
    made = _asked(called, weighting, change, own)
    if ours(weighting):  # of numbers that no float32 has, its merge says so
        return cast(float, made)
    try:
        weight = math.nan if isinstance(made, str | bytes) else float(made)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # of none, several, too large
        weight = math.nan
    if weight != 0 and not 1 / _HEAVIEST <= weight <= _HEAVIEST:
        raise MethodFailed(
            f"{called} must give 0, or a number from {1 / _HEAVIEST:g} to {_HEAVIEST:g} (their "
            f"ratios alone count), not {quoted(made)}"
        )
    return weight


def _chosen(name: str, choice: Choice, layout: Layout, number: int) -> tuple[str, ...]:
    """The tensors that a choice names in a round. Raises MethodFailed, naming it, for what are
    none of this model's: it may be the user's own.
    """
    called = _called(name, "function", choice)
    made = _asked(called, choice, layout, number)
    if ours(choice):
        return cast(tuple[str, ...], made)
    said = f"{called} must give names of the model's tensors"
    if not isinstance(made, tuple | list | set | frozenset):
        raise MethodFailed(f"{said} in a tuple, not {quoted(made)}")
    for each in made:
        if not isinstance(each, str) or each not in layout.shapes:
            near = nearest(each, layout.names) if isinstance(each, str) else ""
            raise MethodFailed(f"{said}, not {quoted(each)}{near}")
    return tuple(made)


def _rescaled(rescale: Callable[[int, int], float], rank: int, kept: int) -> float:
    """The factor on a scale. Raises MethodFailed, naming the function, for what is no factor."""
    called = _called("rescale", "function", rescale)
    made = _asked(called, rescale, rank, kept)
    if not is_number(made) or not math.isfinite(as_float(made)):
        raise MethodFailed(f"{called} must give a finite number, not {quoted(made)}")
    return cast(float, made)


@checked
def compose(
    *,
    down: Sieve,
    up: Sieve,
    knobs: frozenset[Knob] = frozenset(),
    rescale: Callable[[int, int], float] = unscaled,
    trained: Choice = every_name,
    shared: Choice | None = None,
    freeze_absent: bool = False,
    returns: Literal["change", "values"] = "change",
    server: Optimizer | None = None,
    weighting: Weighting | Callable[[Tree, Layout], float] = "uniform",
    down_values: Form = "float32",
    up_values: Form = "float32",
    feedback: bool = False,
    trains: Trained = "lora",
    ranked: Ranked = "values",
) -> Method:
    """A method from what passes down, what is trained, what passes up, and how the server moves.

    down, up:  sieves; `up` sees what the client returns, at the client's own rank, and chooses
               tensors or entries of it: its ranks are those that came down
    rescale:   (r, k) -> factor on the scale of a client that holds k of r ranks
    trained:   the tensors that a round trains; the others stay as they are, at client and server
    shared:    the tensors of which the server keeps a mean; default those that are trained
    freeze_absent: a client trains only the entries that arrived, and returns exactly these
    returns:   the change, start minus end, or the trained values themselves; what a value's mean
               lacks because its client does not hold the rank then counts as the value zero
    server:    the optimizer that takes the mean change as its gradient; default SGD with lr 1,
               FedAvg; a method whose paper has another gives that here
    weighting: clients count alike, by their number of examples, or by a function of what they
               return (a tree at the client's rank, and its layout)
    down_values, up_values: the form in which numbers travel
    feedback:  a client keeps what its upload left out and adds it to its next change. The client
               must hold the same coordinates every round, so this is for methods without a sketch.
    ranked:    what `down` sees and what travels down: the values, or their change since the start
               (`since_start`)

    Raises FedSieveError, by its name, for a part that is not what its annotation says, and for one
    that cannot be called as one is; Unbounded for a server that clips updates where that bounds
    nothing: one client moves the mean by at most clip / n if the mean is of changes, all counting
    alike, and else by anything.
    """
    for name, sieve in (("down", down), ("up", up)):
        _refuse_odd(name, sieve, "tree", "layout", "client", "key")
    for name, choice in (("trained", trained), ("shared", shared or trained)):
        _refuse_odd(name, choice, "layout", "round")
    _refuse_odd("rescale", rescale, "rank", "kept")
    if callable(weighting):
        _refuse_odd("weighting", weighting, "change", "layout")
    if up is leading or up is top_ranks:  # others are known by what they give
        raise _no_ranks(up)
    if ranked == "change":
        chosen = down
        down = nonzero(down if ours(down) else lambda *given: _sieved("down", chosen, *given))
    optimizer = sgd() if server is None else server
    shared = shared or trained
    linear = returns == "change" and weighting == "uniform"
    if limits(optimizer) and not linear:
        raise Unbounded("weighting" if weighting == "examples" else "merge")

    def init(adapter: Adapter) -> State:
        slots = slots_of(optimizer, adapter.tensors)
        return State(adapter.layout, {"adapter": dict(adapter.tensors), **slots})

    def plan(state: State, key: Key) -> State:
        return state

    def publish(plan: State, client: Client, key: Key) -> Payload:
        layout, tree = plan.layout, plan.trees["adapter"]
        passed = _sieved("down", down, tree, layout, client, key)
        return pack(layout, tree, passed, down_values, key.at("round down values"))

    def view(payload: Payload, memory: Memory, context: ClientContext) -> tuple[View, Memory]:
        layout, support = payload.layout, payload.support
        own = own_layout(layout, support, rescale)
        tensors = {**held(context.start, support), **payload.tree()}
        moves = Support(_chosen("trained", trained, layout, context.key.round), None, {})
        if not moves.names:
            raise FedSieveError(
                "method: what it trains (`trained`) names no tensor of this model in round "
                f"{context.key.round}"
            )
        if freeze_absent:
            names = tuple(n for n in moves.names if n in support.names)
            masks = {n: m for n, m in support.masks.items() if n in names}
            moves = Support(names, None, masks)
        return View(Adapter(own, dict(sorted(tensors.items()))), layout, support, moves), memory

    def report(
        view: View, trained: Tree, memory: Memory, context: ClientContext
    ) -> tuple[Payload, Memory]:
        start, moves = view.adapter.tensors, view.moves
        among = _chosen("shared", shared, view.layout, context.key.round)
        names = [n for n in among if n in moves.names]
        if returns == "values":
            result = {n: trained[n] for n in names}
        else:
            result = {n: start[n] - trained[n] for n in names}
        if "residual" in memory:
            result = {n: c + memory["residual"][n] for n, c in result.items()}
        own, key = view.adapter.layout, context.key
        passed = _uploaded(up, result, own, context.client, key)
        if moves.masks and not passed.support.masks:
            masks = {n: m for n, m in moves.masks.items() if n in passed.support.names}
            passed = Passed(passed.support._replace(masks=masks), "known", "known")
        # The server knows which ranks it gave: they need not be told again.
        support = passed.support._replace(ranks=view.support.ranks)
        passed = Passed(support, "known", passed.masks_told)
        key = context.key.at("round up values")
        payload = pack(view.layout, result, passed, up_values, key, cut_already=True)
        if feedback:
            sent = payload.tree()
            memory = {**memory, "residual": {n: c - sent[n] for n, c in result.items()}}
        return payload, memory

    def misfit(update: Payload, sent: Support, client: Client, key: Key) -> str | None:
        # Of a change whose entries are all alike `up` lets pass as many as it ever does: a sieve of
        # the largest its share of them, one with a threshold all.
        own = own_layout(update.layout, sent, rescale)
        among = _chosen("shared", shared, update.layout, key.round)
        names = [n for n in among if not freeze_absent or n in sent.names]
        change = {n: torch.ones(()).expand(own.shapes[n]) for n in names}
        asked = _uploaded(up, change, own, client, key).support._replace(ranks=sent.ranks)
        exactly = freeze_absent and not asked.masks
        if exactly:
            masks = {n: m for n, m in sent.masks.items() if n in asked.names}
            asked = asked._replace(masks=masks)
        return difference(update, asked, up_values, places=exactly)

    def clip(state: State) -> float:
        return clip_of(optimizer, state.trees)

    def merge(state: State, updates: Iterable[tuple[Client, Payload]], key: Key) -> State:
        params = state.trees["adapter"]
        names = _chosen("shared", shared, state.layout, key.round)
        total = {n: torch.zeros_like(p) for n, p in params.items()}
        most = clip(state)
        weight, merged, inside = 0.0, 0, 0
        for client, payload in updates:
            part = payload.tree()
            if callable(weighting):
                own = own_layout(state.layout, payload.support, rescale)
                share = _weighed(weighting, part, own)
            else:
                share = share_of(client, weighting)
            if weight == 0 < share:
                total = {n: torch.zeros_like(p) for n, p in params.items()}
            weight += share
            limit = 1.0 if most == math.inf else within(part, most)
            merged, inside = merged + 1, inside + (limit == 1.0)
            # While nobody weighs anything all count alike; beside one who does they are nothing.
            counted = share if weight else 1.0
            add_back(total, part, state.layout, payload.support.ranks, counted * limit)
            del payload, part  # before the next one comes: one client's update in memory at a time
        if merged == 0 and not optimizer.expected:
            raise NoUsableUpdate("no client returned an update that can be merged")
        divisor = (weight or merged) if optimizer.expected is None else optimizer.expected
        # The mean counts zeros: a client that did not hold a rank still counts below the line
        # (FSLoRA, equation 5; FLASC, Algorithm 1).
        for name, tensor in total.items():
            tensor.div_(divisor)
            if returns == "values":
                tensor.neg_().add_(params[name])
        after = step(optimizer, state, total, names)
        return State(after.layout, settled(optimizer, after.trees, inside, merged))

    def export(state: State) -> Adapter:
        return Adapter(state.layout, state.trees["adapter"])

    method = Method(
        knobs=knobs,
        init=init,
        plan=plan,
        publish=publish,
        view=view,
        report=report,
        merge=merge,
        export=export,
        server=optimizer,
        trains=trains,
        linear=linear,
        clip=clip,
        private=optimizer.private,
        keeps=feedback,
        misfit=misfit,
    )
    return since_start(method) if ranked == "change" else method


def step(optimizer: Optimizer, state: State, gradient: Tree, names: tuple[str, ...]) -> State:
    """The state after the optimizer's step on the named tensors; all else stays as it is.

    The optimizer sees these alone: with momentum it would go on moving what a round leaves alone.
    """
    params = state.trees["adapter"]
    kept = set(state.layout.names) - set(names)
    slots = {group: tree for group, tree in state.trees.items() if group != "adapter"}
    seen = {g: {n: t for n, t in tree.items() if n not in kept} for g, tree in slots.items()}
    moved, kept_of = stepped(
        optimizer, {n: params[n] for n in names}, {n: gradient[n] for n in names}, seen
    )
    after = {group: {**slots.get(group, {}), **tree} for group, tree in kept_of.items()}
    return State(state.layout, {**slots, **after, "adapter": {**params, **moved}})


def difference(update: Payload, asked: Support, form: Form, *, places: bool) -> str | None:
    """How an update differs from what was asked, in a few words; None if it does not.

    places: its masks must be the asked ones; else at most as many entries as those keep may come,
            of the same tensors
    """
    came = update.support
    if update.base is not None:
        return "it holds a change of the base, which only downloads have"
    if update.control is not None:
        return "it holds control variates, which only downloads have"
    if update.values.form != form:
        return f"its numbers are {update.values.form}, and {form} was asked"
    if came.names != asked.names:
        return f"it holds {_these(came.names)}, and {_these(asked.names)} were asked"
    if not equal(came.ranks, asked.ranks):
        return "it is on other ranks than were sent"
    if came.masks.keys() != asked.masks.keys():
        masked, wanted = _these(tuple(came.masks)), _these(tuple(asked.masks))
        return f"it masks {masked}, and masks of {wanted} were asked"
    if places and any(not torch.equal(came.masks[n], m) for n, m in asked.masks.items()):
        return "it holds other entries than were sent"
    held, most = (sum(int(m.sum()) for m in each.masks.values()) for each in (came, asked))
    if held > most:
        return f"it holds {held} entries under masks, and at most {most} were asked"
    return None


def _these(names: tuple[str, ...]) -> str:
    return "no tensors" if not names else f"{len(names)} tensors ({names[0]}, ...)"


def share_of(client: Client, weighting: Weighting) -> float:
    """What a client's update counts for in a mean."""
    return float(client.examples) if weighting == "examples" else 1.0


def within(part: Tree, clip: float) -> float:
    """The factor, at most 1, that brings a tree's L2 norm down to `clip`."""
    size = norm(part)
    return 1.0 if size <= clip else clip / size


def since_start(method: Method) -> Method:
    """The same method, whose downloads are of the change since the start, not of the values.

        the server ranks and sends     C = P - P_0,  what passes of it
        client i holds and trains      P_0 + C

    P_0 is the first adapter, which both ends draw from the seed: it never travels, and what a mask
    leaves out stands at its start. Ranked by value, the entries of A pass before those of B for as
    long as what B has learned is smaller than the random numbers that A began with.

    method: one whose view holds the values of the payload as they came, as `compose` makes it. The
            state keeps P_0 as the tree "start".
    """

    def init(adapter: Adapter) -> State:
        state = method.init(adapter)
        return state._replace(trees={**state.trees, "start": dict(adapter.tensors)})

    def plan(state: State, key: Key) -> State:
        planned = method.plan(state, key)
        start = planned.trees["start"]
        change = {n: t - start[n] for n, t in planned.trees["adapter"].items()}
        return planned._replace(trees={**planned.trees, "adapter": change})

    def view(payload: Payload, memory: Memory, context: ClientContext) -> tuple[View, Memory]:
        seen, memory = method.view(payload, memory, context)
        tensors = dict(seen.adapter.tensors)
        came = {n: context.start.tensors[n] for n in payload.support.names}
        for name, start in cut(came, payload.layout, payload.support.ranks).items():
            tensors[name] = start + tensors[name]
        return seen._replace(adapter=seen.adapter._replace(tensors=tensors)), memory

    return method._replace(init=init, plan=plan, view=view)


def evaluated_at(method: Method, density: float, head: Literal["sieved", "whole"]) -> Method:
    """The same method, with a global model of its largest entries alone; density 1 masks nothing.

    Clients that get a masked adapter train around its gaps. The entries that never pass still move
    on the server, a little in every round, and a client never sees them: evaluated with them, the
    model is another one than clients train (docs/results.md has both). The largest are those of the
    change where the state holds its start (`since_start`), and the gaps stand at their start then,
    as they do at a client.
    """

    def export(state: State) -> Adapter:
        layout, tensors = state.layout, state.trees["adapter"]
        among = competing(layout.names, layout, head)
        start = state.trees.get("start")
        if start is None:
            return Adapter(layout, masked(tensors, top_k(tensors, density, among)))
        masks = top_k({n: t - start[n] for n, t in tensors.items()}, density, among)
        filled = {n: torch.where(m, tensors[n], start[n]) for n, m in masks.items()}
        return Adapter(layout, {**tensors, **filled})

    return method._replace(export=export)


def own_layout(layout: Layout, support: Support, rescale: Callable[[int, int], float]) -> Layout:
    """The layout of a client that holds these ranks, with its own scale."""
    kept = layout.rank if support.ranks is None else support.ranks.shape[1]
    scale = layout.scale * (_rescaled(rescale, layout.rank, kept) if kept else 1.0)
    return narrowed(layout, support.ranks, scale)


def held(start: Adapter, support: Support) -> Tree:
    """What a client holds of the tensors that did not travel: the start's values. Absent is not 0.

    They are at the ranks of the support.
    """
    absent = {n: t for n, t in start.tensors.items() if n not in support.names}
    return cut(absent, start.layout, support.ranks)


def pack(
    layout: Layout, tree: Tree, passed: Passed, form: Form, key: Key, *, cut_already: bool = False
) -> Payload:
    """What passes of a tree, rounded, as a payload.

    cut_already: the tree has the shapes of the ranks that pass, not the layout's
    """
    part = tree if cut_already else cut(tree, layout, passed.support.ranks)
    values = rounded(gather(part, passed.support).cpu(), form, generator(key))
    return Payload(layout, passed.support, values, passed.ranks_told, passed.masks_told)
